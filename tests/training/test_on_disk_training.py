"""Training, embedding and prediction from a file: the numbers of the same work in memory."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch
from toy import CPU, Do, assert_same_run, small_screen

from cellop_nb.analysis.predict import Start, assemble, embed, modelled_counts, write_parts
from cellop_nb.data import counts as counts_module
from cellop_nb.data.contract import keys_of
from cellop_nb.data.datasets import load
from cellop_nb.errors import DataError
from cellop_nb.models.operators import Condition
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
    assert disk.loader.matrix.csr is None and memory.loader.matrix.csr is not None
    assert_same_run(memory, disk)
    assert memory.history["val_loss"].iloc[-1] < memory.history["val_loss"][0]


def test_a_run_on_disk_resumes_exactly(pair, tmp_path):
    plain = fitted(pair[1])
    trainer_of(pair[1], folder=tmp_path, callbacks=[Do(lambda t: t.stop(), epoch=1)]).fit()
    again = trainer_of(pair[1], folder=tmp_path)
    again.fit(resume=True)
    assert_same_run(plain, again)


def virtual_cells(adata, vae, operators, rows):
    """Some cells moved by the first perturbation of the operators, as counts."""
    keys, perturbation = keys_of(adata), operators.conditions.perturbations[0]
    operator = operators.operator(Condition((perturbation,), adata.obs["cell_type"].iloc[0]))
    generator = torch.Generator().manual_seed(0)
    drawn = Start.of(modelled_counts(adata[rows], vae, keys), vae).moved(operator, generator=generator)
    return assemble(adata[rows], keys, vae.genes, drawn, perturbation)


def test_latents_and_predictions_are_those_in_memory(pair, tmp_path):
    memory, disk = pair
    vae = fitted(memory).model
    for adata in pair:
        embed(adata, vae, batch_size=50)
    np.testing.assert_array_equal(disk.obsm["X_nbvae"], memory.obsm["X_nbvae"])
    operators = new_operators(memory, n_axes=1, rank=1)
    rows = np.flatnonzero(memory.obs["perturbation"] == "control")
    expected, cells = (virtual_cells(adata, vae, operators, rows) for adata in pair)
    assert (cells.X != expected.X).nnz == 0, "the very draws"
    np.testing.assert_array_equal(cells.obsm["X_nbvae"], expected.obsm["X_nbvae"])
    assert cells.obs.astype(str).equals(expected.obs.astype(str))

    parts = (virtual_cells(disk, vae, operators, some) for some in np.array_split(rows, 5))
    written = ad.read_h5ad(write_parts(tmp_path / "parts.h5ad", parts, {"predictions": "all"}, total=5))
    assert written.obs_names.equals(expected.obs_names) and list(written.var_names) == list(
        expected.var_names
    )
    assert written.uns["cellop_nb"]["predictions"] == "all"
    np.testing.assert_allclose(written.obsm["X_nbvae"], expected.obsm["X_nbvae"], rtol=1e-5, atol=1e-6)
    difference = np.asarray(written.X.sum(0) - expected.layers["mean"].sum(0)).ravel()
    assert np.abs(difference).max() < len(rows), "a draw of whole counts from the same means"


def test_a_prediction_is_written_whole_or_not_at_all(pair, tmp_path):
    vae = fitted(pair[0], max_epochs=1).model
    embed(pair[0], vae)
    operators = new_operators(pair[0], n_axes=1, rank=1)

    def interrupted():
        yield virtual_cells(pair[1], vae, operators, np.arange(8))
        raise KeyboardInterrupt

    with pytest.raises(DataError, match="end it in .h5ad"):
        write_parts(tmp_path / "x.zarr", interrupted(), {}, total=2)
    with pytest.raises(KeyboardInterrupt):
        write_parts(tmp_path / "x.h5ad", interrupted(), {}, total=2)
    assert [path.name for path in tmp_path.iterdir()] == ["screen.h5ad"]
