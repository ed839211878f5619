"""The workspace of the notebooks: what one notebook leaves, the next one takes, and only if it fits."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch

from cellop_nb.analysis.predict import embed
from cellop_nb.data.synthetic import synthetic
from cellop_nb.notebook import parameters, workspace
from cellop_nb.notebook.workspace import CheckFailed, Workspace, fingerprint, vae_sizes
from cellop_nb.training.operators import new_operators
from cellop_nb.training.vae import new_vae

SMALL = {"n_contexts": 2, "n_perturbations": 2, "n_cells": 30, "n_genes": 40}


@pytest.fixture
def short(monkeypatch):
    """Trainings of one epoch, for tests that ask who trains and not how well."""
    tables = {}
    for name in ("02_train_vae", "04_train_operators"):
        values = parameters.defaults(name) | {"max_epochs": 1}
        tables[name] = values | {key: 4 for key in ("latent_dim", "hidden", "rank") if key in values}
    known = parameters.defaults
    monkeypatch.setattr(workspace.parameters, "defaults", lambda name: dict(tables.get(name) or known(name)))


@pytest.fixture
def screen(tmp_path):
    path = tmp_path / "mine.h5ad"
    synthetic(**SMALL).write_h5ad(path)
    return path


def work_in(folder, notebook, screen, **values):
    given = {name: value for name, value in parameters.defaults(notebook).items() if name != "run_dir"}
    return Workspace(notebook, folder, **(given | {"data": str(screen), "n_genes": 0} | values))


def test_the_parameters_of_a_cell_make_a_workspace(tmp_path):
    namespace = parameters.defaults("01_data") | {"run_dir": str(tmp_path), "other": 1}
    work = Workspace.from_cell("01_data", namespace)
    assert work.run_dir == tmp_path
    assert work.at_defaults, "the run folder is no result"
    assert work.keys == {"perturbation_key": "perturbation", "context_key": "cell_type", "control": "control"}
    assert not Workspace.from_cell("01_data", namespace | {"seed": 1}).at_defaults


def test_a_screen_is_prepared_once_and_again_when_anything_differs(tmp_path, screen):
    first = work_in(tmp_path, "01_data", screen)
    adata = first.screen()
    assert set(adata.obs["split"]) == {"train", "val", "test"}
    first.keep_screen(adata)
    assert first.origin["screen"] == "prepared here"
    here = "prepared here"
    for values, origin in (({}, "01_data"), ({"seed": 1}, here), ({"n_genes": 20}, here)):
        work = work_in(tmp_path, "02_train_vae", screen, **values)
        assert work.screen().n_vars == (values.get("n_genes") or 40)
        assert work.origin["screen"] == origin
    synthetic(**SMALL, seed=5).write_h5ad(screen)
    work = work_in(tmp_path, "02_train_vae", screen)
    work.screen()
    assert work.origin["screen"] == "prepared here", "the file has changed"


def test_models_come_from_the_notebook_before_or_from_a_stand_in(tmp_path, screen, short):
    work = work_in(tmp_path, "03_inspect_latent", screen)
    adata = work.screen()
    stand_in = work.vae(adata)
    assert work.origin["vae"] == "a stand-in trained here"
    assert adata.obsm["X_nbvae"].shape == (adata.n_obs, 4)
    maker = work_in(tmp_path, "02_train_vae", screen)
    other = new_vae(adata, n_latent=3, n_hidden=4, seed=1)
    maker.keep_model(adata, vae=other)
    assert fingerprint(work.vae(adata)) == fingerprint(other) != fingerprint(stand_in)
    assert work.origin["vae"] == "02_train_vae"


def test_operators_of_another_latent_space_are_not_taken(tmp_path, screen, short):
    work = work_in(tmp_path, "04_train_operators", screen)
    adata = work.screen()
    work.vae(adata)
    operators = new_operators(adata, rank=2)
    work.keep_model(adata, operators=operators)
    later = work_in(tmp_path, "05_diagnose", screen)
    assert fingerprint(later.operators(adata)) == fingerprint(operators)
    vae = new_vae(adata, n_latent=4, n_hidden=4, seed=1)
    work_in(tmp_path, "02_train_vae", screen).keep_model(adata, vae=vae)
    later.vae(adata)
    later.operators(adata)
    assert later.origin == {"vae": "02_train_vae", "operators": "a stand-in trained here"}


def test_a_damaged_model_is_replaced_by_a_stand_in(tmp_path, screen, short):
    work = work_in(tmp_path, "03_inspect_latent", screen)
    adata = work.screen()
    maker = work_in(tmp_path, "02_train_vae", screen)
    path = maker.keep_model(adata, vae=new_vae(adata, n_latent=3, n_hidden=4))
    path.write_bytes(path.read_bytes()[:100])
    work.vae(adata)
    assert work.origin["vae"] == "a stand-in trained here"


def test_a_kept_vae_embeds_as_before(tmp_path, screen):
    work = work_in(tmp_path, "02_train_vae", screen)
    adata = work.screen()
    vae = new_vae(adata, **vae_sizes({"latent_dim": 3, "hidden": 8, "n_layers": 1}))
    embed(adata, vae)
    before = adata.obsm["X_nbvae"].copy()
    work.keep_model(adata, vae=vae)
    work.vae(adata)
    np.testing.assert_array_equal(adata.obsm["X_nbvae"], before)


def test_results_go_to_the_folder_of_the_notebook(tmp_path, screen):
    from cellop_nb.notebook.style import canvas

    work = work_in(tmp_path, "01_data", screen)
    work.table(pd.DataFrame({"a": [1, 2]}), "numbers")
    work.figure(canvas()[0], "empty")
    work.metrics(cells=np.int64(3), loss=torch.tensor(0.5), gone=float("nan"))
    assert {path.name for path in work.folder.rglob("*") if path.is_file()} == {
        "numbers.csv", "empty.png", "metrics.json",
    }  # fmt: skip
    written = json.loads((work.folder / "metrics.json").read_text())
    assert list(written)[:3] == ["cells", "loss", "gone"]
    assert (written["cells"], written["loss"], written["gone"]) == (3, 0.5, None)
    assert written["parameters"]["data"] == str(screen)


@pytest.mark.parametrize(
    ("value", "bounds", "passes"),
    [
        (1.05, {"expected": 1.0}, True), (1.2, {"expected": 1.0}, False), (-1.05, {"expected": -1.0}, True),
        (3, {"expected": 3, "rtol": 0}, True), (0.4, {"at_most": 0.5}, True), (0.6, {"at_most": 0.5}, False),
        (0.4, {"at_least": 0.5}, False), (float("nan"), {"at_most": 1}, False), (float("nan"), {}, False),
    ],
)  # fmt: skip
def test_a_check_can_fail(tmp_path, value, bounds, passes):
    work = Workspace.from_cell("01_data", parameters.defaults("01_data") | {"run_dir": str(tmp_path)})
    if passes:
        assert work.check("loss", value, **bounds) == "as expected: loss"
        return
    with pytest.raises(CheckFailed, match="Expected loss between .* Found .* To fix it"):
        work.check("loss", value, **bounds)


def test_with_other_parameters_nothing_is_claimed(tmp_path, screen):
    text = work_in(tmp_path, "01_data", screen).check("loss", 5.0, at_most=1)
    assert text == "not checked, since parameters differ from the defaults: loss"
