"""The notebooks on a screen of a user: own column names, one perturbation, more genes than are modelled."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cellop_nb import datasets
from cellop_nb.analysis import cellop
from cellop_nb.notebook import parameters, runs

KEYS = {"perturbation_key": "condition", "context_key": "celltype", "control": "ctrl"}
SMALL = {
    "n_genes": 60,
    "latent_dim": 4,
    "hidden": 16,
    "max_epochs": 3,
}
BOOKS = parameters.names()
COMPARE = ("00_quickstart", "05_diagnose", "06_predict")
"""Those that leave a context out."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder, with the screen beside it; the notebooks hand their models on through it."""
    place = tmp_path_factory.mktemp("users")
    screen = datasets.synthetic(
        n_contexts=3, n_perturbations=1, n_cells=60, n_genes=100, n_latent=4, library=200.0, seed=1
    )
    labels = screen.obs["perturbation"].astype(str).replace({"control": "ctrl"})
    screen.obs = screen.obs.assign(condition=labels, celltype=screen.obs["cell_type"].astype(str))
    screen.obs = screen.obs[["condition", "celltype"]]
    screen.uns.clear()
    screen.obsm.clear()
    screen.write_h5ad(place / "screen.h5ad")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_ends_on_a_users_screen(name, folder, root):
    names = {parameter.name for parameter in parameters.for_notebook(name)}
    values = {key: value for key, value in {**KEYS, **SMALL}.items() if key in names}
    values |= {"data": str(folder / "screen.h5ad")}
    outcome = runs.execute(root / "notebooks" / f"{name}.ipynb", folder / "run", values, timeout=120)
    assert outcome.error == "", f"cell {outcome.cell}"
    assert outcome.metrics
    if name == "06_predict":
        assert "What cannot be known, and why" in (folder / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARE)
def test_a_notebook_ends_where_no_two_contexts_share_a_perturbation(name, tmp_path, root):
    screen = datasets.synthetic(
        n_contexts=2, n_perturbations=2, n_cells=40, n_genes=60, n_latent=4, library=200.0
    )
    own = screen.obs["perturbation"].astype(str) == screen.obs["cell_type"].astype(str).map(
        {"type A": "drug 1", "type B": "drug 2"}
    )
    screen[own | (screen.obs["perturbation"] == "control")].write_h5ad(tmp_path / "screen.h5ad")
    names = {parameter.name for parameter in parameters.for_notebook(name)}
    values = {key: value for key, value in SMALL.items() if key in names}
    values |= {"data": str(tmp_path / "screen.h5ad")}
    values |= {"donor_key": "cell_type"} if "donor_key" in names else {}
    outcome = runs.execute(root / "notebooks" / f"{name}.ipynb", tmp_path / "run", values, timeout=120)
    assert outcome.error == "", f"cell {outcome.cell}"
    assert "nothing can be left out" in said(outcome) or "No prediction can be" in said(outcome)


@pytest.fixture
def shell(monkeypatch):
    """IPython in this process, as a kernel has it; a CellOp that trains for a moment."""
    import matplotlib.pyplot as plt
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    brief = {"n_hidden": 8, "vae_epochs": 1, "finish_epochs": 1, "operator_epochs": 1, "n_folds": 2}
    monkeypatch.setattr(cellop, "RECIPE", replace(cellop.RECIPE, **brief))
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    InteractiveShell.clear_instance()
    plt.close("all")


ALONE = {
    "one context": (
        {"n_contexts": 1, "n_perturbations": 2},
        "nothing is taken away, and no answer can be checked",
    ),
    "one context, one perturbation": ({"n_contexts": 1, "n_perturbations": 1}, "it is the only perturbation"),
    "each perturbation in another context": (
        {"n_contexts": 2, "n_perturbations": 2},
        "No context could be held out",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALONE)
def test_every_notebook_says_what_cannot_be_asked_and_goes_on(
    kind, shell, tmp_path, monkeypatch, root, capsys
):
    sizes, sentence = ALONE[kind]
    screen = datasets.synthetic(**sizes, n_cells=30, n_genes=40, n_latent=4, library=200.0)
    places = screen.obs["cell_type"].astype(str).map({"type A": "drug 1", "type B": "drug 2"})
    own = (screen.obs["perturbation"].astype(str) == places) | (sizes["n_contexts"] == 1)
    screen.obs = screen.obs[["perturbation", "cell_type"]]
    screen[own | (screen.obs["perturbation"] == "control")].write_h5ad(tmp_path / "screen.h5ad")
    monkeypatch.chdir(tmp_path)
    for name in BOOKS:
        names = {parameter.name for parameter in parameters.for_notebook(name)}
        values = {key: value for key, value in SMALL.items() if key in names}
        values |= {"data": "screen.h5ad", "run_dir": "."}
        shell.reset(new_session=True)
        for cell in json.loads((root / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                shell.run_cell("".join(cell["source"])).raise_error()
                if "parameters" in cell["metadata"].get("tags", []):
                    shell.push(values)
    printed = capsys.readouterr().out
    for words in (sentence, "nothing can be left out", "No prediction can be compared with real cells"):
        assert words in printed


def said(outcome) -> str:
    """What an executed notebook shows."""
    return outcome.output.read_text(encoding="utf-8")
