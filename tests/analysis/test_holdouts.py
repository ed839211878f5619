"""Many hold-outs: what is held out, what is refused with its numbers, and the same tables on Dask."""

from functools import wraps

import numpy as np
import pandas as pd
import pytest

from cellop_nb import datasets, holdout, holdout_all
from cellop_nb.analysis.holdout_plan import plan_of
from cellop_nb.analysis.holdouts import Holdouts
from cellop_nb.analysis.selection import Complexity
from cellop_nb.errors import HoldoutError, LabelError

QUICK = {
    "vae": {"n_latent": 4, "n_hidden": 16},
    "training": {"max_epochs": 2},
    "candidates": [Complexity(rank=0)],
    "metrics": ["e_distance", "pearson_delta"],
    "progress": False,
}
KEYS = {"perturbation_key": "perturbation", "context_key": "cell_type", "control": "control"}


@pytest.fixture(scope="module")
def screen():
    return datasets.synthetic(n_contexts=3, n_perturbations=2, combinations=1, n_cells=30, n_genes=50, seed=4)


@pytest.fixture(scope="module")
def contexts(screen):
    return holdout_all(screen, where={"perturbation": "drug 1"}, n_seeds=2, **QUICK)


def test_every_context_and_seed_has_every_method(contexts):
    assert len(contexts.left_out) == 0
    counts = contexts.table.groupby(["heldout", "seed"])["method"].nunique()
    assert set(counts.index) == {(f"type {c}", seed) for c in "ABC" for seed in (0, 1)}
    assert counts.nunique() == 1 and {"operators", "mean shift"} <= set(contexts.table["method"])
    assert set(contexts.table["perturbation"]) == {"drug 1"}


def test_each_row_is_that_of_the_single_holdout(screen, contexts):
    alone = holdout(screen, heldout={"cell_type": "type B", "perturbation": "drug 1"}, seed=1, **QUICK).table
    same = contexts.table[(contexts.table["heldout"] == "type B") & (contexts.table["seed"] == 1)]
    pd.testing.assert_frame_equal(same[alone.columns].reset_index(drop=True), pd.DataFrame(alone))


def test_summary_is_the_mean_over_seeds_and_groups(contexts):
    wide = contexts.summary("e_distance")
    rows = contexts.table[
        (contexts.table["metric"] == "e_distance") & (contexts.table["method"] == "operators")
    ]
    assert wide.loc["mean", "operators"] == pytest.approx(rows["value"].mean())


def test_summary_of_each_holdout_is_the_mean_over_its_groups():
    rows = [
        ("d1", "a", "operators", 1.0), ("d1", "b", "operators", 3.0), ("d2", "a", "operators", 5.0),
        ("d1", "a", "no change", 8.0), ("d1", "b", "no change", 8.0), ("d2", "a", "no change", 9.0),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["heldout", "group", "method", "value"]).assign(metric="e_distance")
    wide = Holdouts(table, pd.DataFrame(), pd.DataFrame()).summary(by="heldout")
    assert wide["operators"].to_dict() == {"d1": 2.0, "d2": 5.0, "mean": 3.5}
    assert list(wide) == ["operators", "no change"] and wide.index.name == "heldout"


def test_the_same_tables_on_dask(screen):
    options = QUICK | {"metrics": ["e_distance"], "n_seeds": 1}
    here = holdout_all(screen, over="combination", **options)
    there = holdout_all(screen, over="combination", cluster=1, **options)
    pd.testing.assert_frame_equal(here.table, there.table)


@pytest.mark.parametrize(
    ("over", "names"),
    [
        ("context", {"type A", "type B", "type C"}),
        ("cell_type", {"type A", "type B", "type C"}),
        ("donor", {"donor 1", "donor 2", "donor 3"}),
        ("combination", {"drug 1+drug 2"}),
        ("group", {f"type {c}, {p}" for c in "ABC" for p in ("drug 1", "drug 2", "drug 1+drug 2")}),
    ],
)
def test_what_is_held_out(screen, over, names):
    plan, refused = plan_of(screen, over, {}, 5, KEYS)
    assert set(plan) == names and not refused


def test_contexts_of_two_columns(screen):
    plan, _ = plan_of(screen, "context", {}, 5, KEYS | {"context_key": ["cell_type", "batch"]})
    assert len(plan) == 6 and {"cell_type", "batch"} == set(next(iter(plan.values())))


def test_without_contexts(screen):
    plan, _ = plan_of(screen, "combination", {}, 5, KEYS | {"context_key": None})
    assert set(plan) == {"drug 1+drug 2"}
    with pytest.raises(HoldoutError, match="context_key=None"):
        holdout_all(screen, context_key=None, **QUICK)


def test_too_few_cells_are_refused_with_the_number(screen):
    few = screen[~((screen.obs["cell_type"] == "type A") & (screen.obs["perturbation"] != "control"))]
    kept = screen[(screen.obs["cell_type"] == "type A") & (screen.obs["perturbation"] == "drug 1")][:7]
    import anndata as ad

    small = ad.concat([few, kept])
    plan, refused = plan_of(small, "context", {"perturbation": "drug 1"}, 10, KEYS)
    assert set(plan) == {"type B", "type C"}
    assert refused[0]["heldout"] == "type A" and "7 cells; 10 are needed" in refused[0]["reason"]
    with pytest.raises(HoldoutError, match="the largest group has 30 cells; 1000 are needed"):
        holdout_all(screen, min_cells=1000, **QUICK)


def test_a_leak_is_refused_with_the_label(screen):
    leaky = screen.copy()
    labels = leaky.obs["perturbation"].astype(str).to_numpy()
    turned = np.flatnonzero(labels == "drug 1+drug 2")[::2]
    labels[turned] = "drug 2+drug 1"
    leaky.obs["perturbation"] = labels
    with pytest.raises(HoldoutError, match=r"no leak.*drug 2\+drug 1"):
        holdout_all(leaky, over="combination", **QUICK)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [({"over": "doner"}, LabelError, "donor"), ({"n_seeds": 0}, HoldoutError, "n_seeds=0"),
     ({"where": {"perturbation": "drug 9"}}, HoldoutError, "no cells match"), ({"cluster": 0}, HoldoutError, "worker")],
)  # fmt: skip
def test_bad_arguments_are_refused(screen, wrong, error, text):
    with pytest.raises(error, match=text):
        holdout_all(screen, **wrong, **QUICK)


def test_one_refused_run_does_not_sink_the_others(screen, monkeypatch):
    from cellop_nb.analysis import holdouts

    real = holdouts.holdout

    @wraps(real)
    def sometimes(adata, *, heldout, **options):
        if heldout.get("cell_type") == "type B":
            raise HoldoutError("Expected luck. Found none. To fix it: try again.")
        return real(adata, heldout=heldout, **options)

    monkeypatch.setattr(holdouts, "holdout", sometimes)
    found = holdout_all(screen, where={"perturbation": "drug 1"}, **QUICK)
    assert set(found.table["heldout"]) == {"type A", "type C"}
    assert found.left_out["heldout"].tolist() == ["type B"] and "luck" in found.left_out["reason"].iloc[0]


def test_groups_behind_their_best_baseline_are_reported():
    values = {
        "operators": (1.0, 0.55),
        "mean shift": (0.5, 0.5),
        "no change": (3.0, 3.0),
        "noise floor": (0, 0),
    }
    rows = [(group, name, pair[k]) for k, group in enumerate("ab") for name, pair in values.items()]
    table = pd.DataFrame(rows, columns=["group", "method", "value"]).assign(metric="e_distance")
    behind = Holdouts(table, pd.DataFrame(), pd.DataFrame()).behind()
    assert behind["group"].tolist() == ["a"] and behind["best_baseline"].tolist() == ["mean shift"]
    assert behind["excess"].iloc[0] == pytest.approx(0.5)


def test_the_command_writes_the_table_and_shows_every_method(screen, tmp_path, capsys):
    from cellop_nb.__main__ import main

    screen.write_h5ad(tmp_path / "screen.h5ad")
    out = tmp_path / "table.csv"
    what = ["holdout", str(tmp_path / "screen.h5ad"), "--over", "combination", "--context-key", "none"]
    assert main([*what, "--epochs", "1", "--genes", "0", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("e_distance", "additive", "best single", "composition", "noise ceiling", "drug 1+drug 2"):
        assert word in shown
    assert set(pd.read_csv(out)["heldout"]) == {"drug 1+drug 2"}
    assert "chosen:" in shown and "latent dimensions" not in shown
    assert main([*what, "--where", "donor", "--out", str(out)]) == 2
    with pytest.raises(SystemExit):
        main([*what, "--latent", "8,many"])
    assert "numbers above 0 such as 16,32" in capsys.readouterr().err
    assert main([*what, "--out", str(tmp_path / "none" / "table.csv")]) == 2


def test_the_latent_sizes_are_given_on_the_command_line(screen, tmp_path, capsys, monkeypatch):
    from cellop_nb.__main__ import main

    asked = {}

    def spy(adata, **options):
        asked.update(options)
        return holdout_all(adata, **options | {"vae": options["vae"][:1]})

    monkeypatch.setattr("cellop_nb.holdout_all", spy)
    screen.write_h5ad(tmp_path / "screen.h5ad")
    what = ["holdout", str(tmp_path / "screen.h5ad"), "--over", "combination", "--context-key", "none"]
    assert main([*what, "--epochs", "1", "--genes", "0", "--latent", "3,4"]) == 0
    assert asked["vae"] == [{"n_latent": 3}, {"n_latent": 4}]
    assert "VAE: 1 x n_latent 3" in capsys.readouterr().out
