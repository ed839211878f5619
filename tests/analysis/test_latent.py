"""What a VAE gives back of the counts, and what can be read off its latent space."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import nbinom

import cellop_nb as co
from cellop_nb.errors import LabelError


@pytest.fixture(scope="module")
def screen():
    adata = co.datasets.synthetic(
        n_contexts=3, n_perturbations=3, n_cells=100, n_genes=60, library=80.0, seed=3
    )
    co.split(adata, seed=0)
    return adata


@pytest.fixture(scope="module")
def vae(screen):
    vae = co.new_vae(screen, n_latent=6, n_hidden=32, seed=0)
    co.VAETrainer(screen, vae, max_epochs=30, lr=5e-3, progress=False, seed=0).fit()
    return vae


@pytest.fixture(scope="module")
def seen(screen, vae):
    return co.diagnose.posterior_check(screen, vae, seed=0)


def test_sampled_cells_look_like_the_observed_ones(screen, seen):
    n_test = int((screen.obs["split"] == "test").sum())
    assert seen.observed.shape == seen.sampled.shape == (n_test, screen.n_vars)
    np.testing.assert_array_equal(seen.observed, screen[screen.obs["split"] == "test"].X.toarray())
    assert seen.sampled.min() >= 0
    np.testing.assert_array_equal(seen.sampled, np.round(seen.sampled))
    assert seen.sampled.mean() == pytest.approx(seen.observed.mean(), rel=0.1)


def test_the_likelihood_of_one_profile_is_scipys(screen, vae, seen):
    train, test = (screen[screen.obs["split"] == part].X.toarray() for part in ("train", "test"))
    r = co.new_vae(screen, genes=vae.genes, seed=0).decoder.dispersion[: screen.n_vars].detach().numpy()
    share = train.sum(0) + 0.5 * train.mean(0) + 1e-6
    mean = test.sum(1, keepdims=True) * share / share.sum()
    expected = -nbinom.logpmf(test, r, r / (r + mean)).sum(1).mean()
    assert seen.loss["one profile"] == pytest.approx(expected, rel=1e-4)


def test_knowing_the_group_helps_and_the_model_is_near_it(seen):
    assert seen.loss["profile of the group"] < seen.loss["one profile"]
    assert seen.loss["VAE (bound)"] < seen.loss["one profile"]


def test_the_vae_reproduces_zeros_better_than_no_dispersion(seen):
    assert list(seen.zeros.index) == ["two samples of cells (noise)", "VAE", "Poisson, one profile"]
    assert seen.zeros["VAE"] < seen.zeros["Poisson, one profile"]


def test_the_dimensions_in_use_are_counted(seen):
    assert len(seen.kl) == 6
    assert (np.diff(seen.kl) <= 0).all()
    assert (seen.kl >= -1e-6).all()
    assert 1 <= seen.dimension <= 6


def test_a_planted_leak_is_read_off_and_others_are_not(screen):
    adata, rng = screen.copy(), np.random.default_rng(0)
    z = rng.normal(size=(adata.n_obs, 4)).astype(np.float32)
    z[:, 0] += 2.0 * (adata.obs["batch"] == "batch 2").to_numpy()
    z[:, 1] += 3.0 * np.log10(np.maximum(np.asarray(adata.X.sum(1)).ravel(), 1))
    z[:, 2] += 5.0 * (adata.obs["perturbation"] == "control").to_numpy()  # a group's mean is no leak
    adata.obsm["X_nbvae"] = z
    table = co.diagnose.leaks(adata, ["batch", "donor"], seed=0).set_index("what")
    assert list(table.index) == ["batch", "donor", "depth (R²)"]
    assert table.loc["batch", "score"] > 0.75
    assert table.loc["batch", "excess"] > 0.1
    assert table.loc["depth (R²)", "excess"] > 0.1
    assert table.loc["donor", "excess"] < 0.1
    assert table.loc["batch", "chance"] == 0.5


def test_a_column_that_tells_nothing_is_left_out(screen):
    adata = screen.copy()
    adata.obsm["X_nbvae"] = np.random.default_rng(0).normal(size=(adata.n_obs, 3)).astype(np.float32)
    adata.obs["same"], adata.obs["name"] = "all", adata.obs_names
    assert list(co.diagnose.leaks(adata, ["same", "name"])["what"]) == ["depth (R²)"]


def test_an_unknown_column_is_refused(screen):
    with pytest.raises(LabelError, match="columns of adata.obs"):
        co.diagnose.leaks(screen, ["place"])
