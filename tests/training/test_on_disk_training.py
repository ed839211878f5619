"""Training, embedding and prediction from a file: the numbers of the same work in memory."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from cellop_nb.analysis.streaming import predict_to_file
from toy import CPU, Do, assert_same_run, small_screen

from cellop_nb.analysis.predict import embed, predict
from cellop_nb.data import counts as counts_module
from cellop_nb.data.datasets import load
from cellop_nb.errors import DataError
from cellop_nb.training.operators import new_operators
from cellop_nb.training.vae import VAETrainer, new_vae


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.setattr(counts_module, "PART", 32)
    adata = small_screen()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    return adata, load(tmp_path / "screen.h5ad", backed=True)


def trainer_of(adata, **settings):
    vae = new_vae(adata, covariate_keys=["batch"], n_latent=3, n_hidden=8)
    given = {"max_epochs": 4, "batch_size": 16, "lr": 1e-2, "progress": False, "machine": CPU}
    trainer = VAETrainer(adata, vae, **given | settings)
    trainer.loader.order = counts_module.chunked_order(8, 32)
    return trainer


def fitted(adata, **settings):
    trainer = trainer_of(adata, **settings)
    trainer.fit()
    return trainer


def test_the_loss_curve_is_that_in_memory_for_the_same_order(pair):
    memory, disk = (fitted(adata) for adata in pair)
    assert type(disk.loader) is counts_module.DiskLoader and type(memory.loader) is not type(disk.loader)
    assert_same_run(memory, disk)
    assert memory.history["val_loss"].iloc[-1] < memory.history["val_loss"][0]


def test_a_run_on_disk_resumes_exactly(pair, tmp_path):
    plain = fitted(pair[1])
    trainer_of(pair[1], folder=tmp_path, callbacks=[Do(lambda t: t.stop(), epoch=1)]).fit()
    again = trainer_of(pair[1], folder=tmp_path)
    again.fit(resume=True)
    assert_same_run(plain, again)


def test_latents_and_predictions_are_those_in_memory(pair, tmp_path):
    memory, disk = pair
    vae = fitted(memory).model
    for adata in pair:
        embed(adata, vae, batch_size=50)
    np.testing.assert_array_equal(disk.obsm["X_nbvae"], memory.obsm["X_nbvae"])
    operators = new_operators(memory, n_axes=1, rank=1)
    asked = {
        "perturbation": operators.conditions.perturbations[0],
        "context": memory.obs["cell_type"].iloc[0],
    }
    expected = predict(memory, vae, operators, **asked)
    assert (predict(disk, vae, operators, **asked).X != expected.X).nnz == 0
    whole = ad.read_h5ad(predict_to_file(disk, vae, operators, path=tmp_path / "whole.h5ad", **asked))
    assert (whole.X != expected.X).nnz == 0, "in one part, the very draws"
    np.testing.assert_array_equal(whole.obsm["X_nbvae"], expected.obsm["X_nbvae"])
    assert whole.obs.astype(str).equals(expected.obs.astype(str))
    assert list(whole.var_names) == list(expected.var_names)
    assert whole.uns["cellop_nb"]["prediction"]["perturbation"] == asked["perturbation"]

    parts = predict_to_file(disk, vae, operators, path=tmp_path / "parts.h5ad", batch_size=7, **asked)
    found = ad.read_h5ad(parts)
    assert found.obs_names.equals(expected.obs_names) and found.shape == expected.shape
    np.testing.assert_allclose(found.obsm["X_nbvae"], expected.obsm["X_nbvae"], rtol=1e-5, atol=1e-6)
    difference = np.asarray(found.X.sum(0) - expected.layers["mean"].sum(0)).ravel()
    spread = np.sqrt(expected.layers["mean"].sum(0))
    assert np.abs(difference / spread).max() < 6, "other draws from the same means"


def test_a_prediction_is_written_whole_or_not_at_all(pair, tmp_path):
    memory, disk = pair
    vae = fitted(memory, max_epochs=1).model
    embed(disk, vae)
    embed(memory, vae)
    operators = new_operators(memory, n_axes=1, rank=1)
    with pytest.raises(DataError, match="end it in .h5ad"):
        predict_to_file(disk, vae, operators, path=tmp_path / "x.zarr", perturbation="drug 1")
    del disk.obsm["X_nbvae"]
    with pytest.raises(DataError, match="latents in obsm"):
        predict_to_file(disk, vae, operators, path=tmp_path / "x.h5ad",
                        perturbation=operators.conditions.perturbations[0])  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["screen.h5ad"]
