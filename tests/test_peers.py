"""Peers on the same questions: the runner and the scorer, with peers of ten lines that need no environment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cellop_nb as co
from benchmarks import figures, peers
from cellop_nb.__main__ import main

PEER = """
import sys
import anndata as ad, numpy as np
name, folder, seed = sys.argv[1:]
train = ad.read_h5ad(folder + "/train.h5ad")
asked = train.uns["question"]
obs = train.obs
if name == "broken":
    raise SystemExit("no such wheel")
control = (obs["perturbation"] == asked["control"]).to_numpy()
own = (obs["context"] == asked["context"]).to_numpy()
assert control[own].all(), "the held-out cells are not in the file"
cells = train[own & control].copy()
space = name
if name == "log1p":  # the mean shift of the other contexts
    logs = train.layers["log1p"].toarray()
    others = [c for c in obs["context"].unique() if c != asked["context"]]
    shifts = []
    for c in others:
        inside = (obs["context"] == c).to_numpy()
        shifts.append(logs[inside & ~control].mean(0) - logs[inside & control].mean(0))
    cells.X = cells.layers["log1p"].toarray() + np.mean(shifts, axis=0)
else:
    cells.X = cells.X.toarray()
del cells.layers["log1p"]
cells.obs["perturbation"] = str(asked["perturbation"])
cost = {"version": "fake 1", "space": space, "fit_cpu_seconds": 2.0, "predict_cpu_seconds": 1.0, "peak_mb": 9.0}
cells.uns = {"cost": cost}
cells.write_h5ad(folder + "/predicted.h5ad")
"""


@pytest.fixture(scope="module")
def question():
    adata = co.datasets.synthetic(n_contexts=4, n_perturbations=1, n_cells=60, n_genes=60)
    adata.obs["context"] = adata.obs["cell_type"].astype(str)
    co.setup(adata, perturbation_key="perturbation", context_key="context", control="control")
    return peers.Question.of(adata, "type B", 0)


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "peer.py").write_text(PEER)
    return tmp_path / "peer.py"


def test_a_peer_sees_no_held_out_cell_and_is_scored_as_the_rule_that_it_is(question, script):
    table = pd.DataFrame(peers.answers(question, "log1p", script)).set_index("method")
    assert [*table.index] == [*peers.RULES, "log1p"]
    for number in peers.METRICS.values():
        assert table.loc["log1p", number] == pytest.approx(
            table.loc["mean shift", number], abs=1e-4, nan_ok=True
        )
    assert table.loc["log1p", "fit_cpu_seconds"] == 2 and table.loc["log1p", "peak_mb"] == 9
    still = pd.DataFrame(peers.answers(question, "counts", script)).set_index("method")
    assert still.loc["counts", "energy"] == pytest.approx(still.loc["no change", "energy"], abs=1e-6)
    assert (table.loc[[*peers.RULES], "energy"] == still.loc[[*peers.RULES], "energy"]).all()


def test_a_peer_that_does_not_run_is_a_row_that_says_why_until_it_runs(question, script):
    (row,) = peers.answers(question, "broken", script)
    assert row["note"] == "no such wheel" and np.isnan(row["energy"])
    rows = pd.DataFrame(peers.answers(question, "counts", script))
    table = peers.joined(peers.joined(rows.iloc[:0], rows), pd.DataFrame([row]))
    assert [*table["method"]] == [*peers.RULES, "counts", "broken"]
    repaired = peers.joined(table, rows.assign(method=rows["method"].replace("counts", "broken")))
    assert [*repaired["method"]] == [*table["method"]] and repaired["energy"].notna().all()
    assert "| broken | – |" in peers.page(table)
    summary = peers.summary(table)
    assert [*summary.index[-1:]] == ["broken"] and summary["shared_energy"].iloc[:-1].is_monotonic_increasing


def test_means_are_over_types_and_the_order_is_that_of_the_types_that_all_answered():
    def row(method, context, energy):
        cost = {"fit_cpu_seconds": 2.0, "predict_cpu_seconds": 1.0, "peak_mb": 9.0, "version": "1"}
        return {"context": context, "seed": 0, "method": method, "energy": energy, "pearson": 0.5} | cost

    table = pd.DataFrame([row("a", "B", 1.0), row("a", "NK", 5.0), row("b", "B", 2.0)])
    assert peers.shared_types(table) == ["B"]
    assert peers.page(table).splitlines()[2:] == [
        "| a | 1 | 1.00 | 0.50 | 2 | 3.00 | 5.00 | 3 | 9 |",
        "| b | 1 | 2.00 | 0.50 | 1 | – | – | 3 | 9 |",
    ]
    points = {line.get_xydata()[0][1] for line in figures.peers(table).axes[0].lines}
    assert {3.0, 2.0} <= points


def test_the_command_refuses_what_it_could_not_ask(capsys, tmp_path):
    assert main(["bench", "peers", "--only", "scvii"]) == 2
    assert "scvi" in capsys.readouterr().err
    assert main(["bench", "peers", "--only", "scvi", "--data", str(tmp_path / "none.h5ad")]) == 2
    assert "--data FILE.h5ad" in capsys.readouterr().err


def test_an_environment_that_cannot_be_made_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("CELLOP_CACHE", str(tmp_path))
    monkeypatch.setitem(peers.ENVIRONMENTS, "bad", peers.Environment(("./no-such-folder",)))
    with pytest.raises(peers.PeerError, match="no-such-folder"):
        peers.interpreter("bad")
