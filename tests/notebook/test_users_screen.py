"""The notebooks on a screen of a user: own column names, one perturbation, more genes than are modelled."""

from __future__ import annotations

import pytest

from cellop_nb import datasets
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


def said(outcome) -> str:
    """What an executed notebook shows."""
    return outcome.output.read_text(encoding="utf-8")
