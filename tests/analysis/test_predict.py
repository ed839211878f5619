"""From counts to latents and back: embedding, decoding, and cells that keep their own counts where nothing moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from cellop_nb.analysis.predict import embed
from cellop_nb.data.contract import Keys
from cellop_nb.data.splits import split
from cellop_nb.data.synthetic import synthetic
from cellop_nb.errors import DataError, LabelError
from cellop_nb.training.vae import new_vae

CONTEXT = "type A"


@pytest.fixture(scope="module")
def embedded():
    adata = synthetic(
        n_contexts=2, n_perturbations=2, n_cells=40, n_genes=30, n_latent=4, library=60.0, seed=0
    )
    split(adata, test_fraction=0, val_fraction=0.2)
    vae = new_vae(adata, covariate_keys=["batch"], n_latent=3, n_hidden=8, dropout=0.2)
    embed(adata, vae)
    return adata, vae


@pytest.fixture
def screen(embedded):
    return embedded[0].copy()


@pytest.fixture
def vae(embedded):
    return embedded[1]


def controls_of(adata, context=CONTEXT):
    return adata[(adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == context)]


# -- embed ------------------------------------------------------------------------------------------------


def test_embed_writes_posterior_means_and_nothing_else(embedded):
    adata, vae = embedded
    bare = adata.copy()
    del bare.obsm["X_nbvae"]
    before = bare.copy()
    assert embed(bare, vae, key_added="X_here", batch_size=33) is None
    assert bare.obsm["X_here"].shape == (adata.n_obs, 3)
    assert bare.obsm["X_here"].dtype == np.float32
    x = torch.as_tensor(bare.X.toarray())
    expected = vae.encode(x).loc.detach().numpy()
    np.testing.assert_allclose(bare.obsm["X_here"], expected, atol=1e-5)
    assert bare.obs.equals(before.obs)
    assert set(bare.obsm) == set(before.obsm) | {"X_here"}


def test_embed_reads_a_layer_dense_or_sparse_in_any_gene_order(screen, vae):
    expected = screen.obsm["X_nbvae"].copy()
    screen.layers["counts"] = screen.X.toarray()
    screen.X = sparse.csr_matrix(screen.shape, dtype=np.float32)
    turned = screen[:, ::-1].copy()
    Keys(layer="counts", batch_key="batch").write(turned)
    embed(turned, vae)
    np.testing.assert_allclose(turned.obsm["X_nbvae"], expected, atol=1e-5)


def test_embed_is_the_same_whatever_mode_the_model_is_in(screen, vae):
    vae.train()
    before = screen.obsm["X_nbvae"].copy()
    embed(screen, vae)
    assert np.array_equal(screen.obsm["X_nbvae"], before)


def test_missing_genes_are_refused_with_names(screen, vae):
    with pytest.raises(DataError, match="all genes of the model.*1 of 30 missing.*GENE0000"):
        embed(screen[:, 1:].copy(), vae)


def test_more_genes_than_the_model_knows_are_left_out(screen):
    few = screen[:, 5:20].copy()
    small = new_vae(few, n_latent=3, n_hidden=4)
    embed(few, small)
    embed(screen, small)
    assert screen.obsm["X_nbvae"].shape == (screen.n_obs, 3)
    assert list(small.genes) == list(screen.var_names[5:20])


def test_what_is_missing_is_said(screen, vae):
    Keys(layer="raw").write(screen)
    with pytest.raises(DataError, match="a layer 'raw'"):
        embed(screen, vae)
    del screen.uns["cellop_nb"]
    with pytest.raises(LabelError, match="setup"):
        embed(screen, vae)


# -- decode -----------------------------------------------------------------------------------------------
