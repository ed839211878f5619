"""A saved CellOp predicts what it predicted, in another session and of other cells; it holds no counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

import cellop_nb as co
from cellop_nb.errors import CheckpointError, DataError, LabelError, ModelError


@pytest.fixture(scope="module")
def screen():
    """Three contexts, of which the last has controls alone."""
    adata = co.datasets.synthetic(n_contexts=3, n_perturbations=2, n_cells=40, n_genes=50, seed=2)
    perturbed = (adata.obs["cell_type"] == "type C") & (adata.obs["perturbation"] != "control")
    return adata[~perturbed].copy()


@pytest.fixture(scope="module")
def model(screen):
    model = co.CellOp(screen, n_latent=np.int64(5), n_genes=np.int32(40), n_members=2)
    model.recipe = replace(model.recipe, n_hidden=16, vae_epochs=3, finish_epochs=2, operator_epochs=1)
    return model.fit(progress=False)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return model.save(tmp_path_factory.mktemp("saved") / "screen")


ASKED = [("type C", "drug 1"), ("type A", "drug 2")]


def test_predictions_are_those_of_the_model_that_was_saved(model, path, screen):
    assert path.name == "screen.safetensors"
    for again in (co.load(path, screen), co.load(path.with_suffix(""), screen)):
        one, two = model.predict(ASKED), again.predict(ASKED)
        assert (one.X != two.X).nnz == 0 and one.obs_names.equals(two.obs_names)
        for pair in ASKED:
            assert model.verdict(*pair) == again.verdict(*pair)
            pd.testing.assert_frame_equal(model.intervals(*pair), again.intervals(*pair))
            pd.testing.assert_frame_equal(model.support(*pair), again.support(*pair))
        for table in ("effects", "left_out"):
            pd.testing.assert_frame_equal(getattr(model, table), getattr(again, table), check_dtype=False)
        assert str(model.choice) == str(again.choice)
        pd.testing.assert_frame_equal(model.choice.table, again.choice.table)
        assert again.history["stage"].tolist() == model.history["stage"].tolist()


def test_a_folder_of_the_same_name_does_not_hide_a_model(model, screen, tmp_path):
    path = model.save(tmp_path / "a name, 模型")
    path.with_suffix("").mkdir()
    assert co.load(tmp_path / "a name, 模型", screen).verdict(*ASKED[0]) == model.verdict(*ASKED[0])


def test_cells_of_another_experiment_need_no_setup_and_may_be_controls_alone(model, path, screen):
    other = screen[(screen.obs["perturbation"] == "control") & (screen.obs["cell_type"] == "type B")].copy()
    del other.uns["cellop_nb"]
    other.obs["cell_type"] = "type Z"
    cells = co.load(path, other).predict(context="type Z", perturbation="drug 1")
    assert cells.n_obs == other.n_obs and set(cells.obs["cell_type"]) == {"type Z"}
    with pytest.raises(LabelError, match="a context with control cells in the data.*'type A'"):
        co.load(path, other).predict(context="type A", perturbation="drug 1")


def test_genes_that_the_cells_lack_are_refused_or_filled_as_said(model, path, screen):
    lacking = model.genes[3]
    fewer = screen[:, screen.var_names != lacking].copy()
    loaded = co.load(path, fewer)
    with pytest.raises(
        DataError, match=f"1 of {len(model.genes)} missing, such as .*{lacking}.*missing_genes="
    ):
        loaded.predict(context="type C", perturbation="drug 1")
    for how in ("zero", "impute"):
        cells = loaded.predict(context="type C", perturbation="drug 1", missing_genes=how)
        assert cells.var_names.equals(fewer.var_names) and cells.var["modelled"].sum() == len(model.genes) - 1


def test_the_file_holds_no_counts(path, screen):
    with safe_open(path, framework="pt") as file:
        shapes = [tuple(file.get_tensor(name).shape) for name in file.keys()]  # noqa: SIM118
    assert all(screen.n_obs not in shape for shape in shapes)


def test_parts_alone_are_saved_and_come_back_as_parts(model, screen, tmp_path, caplog):
    parts = co.CellOp(screen, vae=model.vae, operators=model.operators)
    path = parts.save(tmp_path / "parts")
    loaded = co.load(path)
    assert "no plan" in caplog.text and loaded.vae.genes == model.genes
    again = co.load(path, screen)
    assert again.members == []
    again.recipe = model.recipe
    before = [value.clone() for value in again._ready_vae.state_dict().values()]
    again.fit(progress=False)
    assert all(np.array_equal(a, b) for a, b in zip(before, again.vae.state_dict().values(), strict=True))


def test_nothing_to_save_and_nothing_to_load_is_said(screen, tmp_path):
    with pytest.raises(ModelError, match="a fitted CellOp.*call model.fit"):
        co.CellOp(screen).save(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="no such file"):
        co.load(tmp_path / "nothing")
