"""Synthetic screens carry the truth they claim, and look like counts."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from cellop_nb.data.contract import setup
from cellop_nb.data.datasets import load
from cellop_nb.data.synthetic import (
    EXAMPLE,
    planted_operator,
    planted_proportions,
    synthetic,
)
from cellop_nb.errors import DataError, LabelError


def latents(adata, context, perturbation):
    chosen = (adata.obs["cell_type"] == context) & (adata.obs["perturbation"] == perturbation)
    return adata.obsm["X_truth"][chosen.to_numpy()].astype(float)


def energy(x, y):
    """Energy distance, Euclidean, U-statistic."""
    within = sum(cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return 2 * cdist(x, y).mean() - within


@pytest.fixture(scope="module")
def example():
    return load("synthetic_screen")


def test_committed_example_is_what_its_arguments_make(example, tmp_path):
    synthetic(**EXAMPLE).write_h5ad(tmp_path / "again.h5ad")
    again = anndata.read_h5ad(tmp_path / "again.h5ad")
    assert again.obs.equals(example.obs) and again.var_names.equals(example.var_names)
    assert (again.X != example.X).nnz == 0
    np.testing.assert_allclose(again.obsm["X_truth"], example.obsm["X_truth"], rtol=1e-5)
    ours, theirs = (a.uns["cellop_nb"]["truth"] for a in (again, example))
    np.testing.assert_allclose(ours["A"], theirs["A"], atol=1e-10)
    np.testing.assert_allclose(ours["b"], theirs["b"], atol=1e-10)


def test_example_is_small_and_fit_for_use(example, root):
    assert (root / "data" / "synthetic_screen.h5ad").stat().st_size < 3e6
    assert (setup(example)["cells"] >= 160).all()


def test_example_looks_like_counts(example):
    x = example.X.toarray()
    assert 0.87 < (x == 0).mean() < 0.92
    totals = x.sum(1)
    assert 100 < np.median(totals) < 300 and totals.std() / totals.mean() > 0.3
    mean, variance = x.mean(0), x.var(0)
    loud = mean > 0.5
    assert (variance[loud] > 1.2 * mean[loud]).mean() > 0.9, "counts are not over-dispersed"


@pytest.mark.parametrize("context", ["type A", "type B", "type C", "type D"])
def test_planted_operators_move_controls_onto_perturbed_cells(example, context):
    z = latents(example, context, "control")
    for perturbation in ("drug 1", "drug 2", "drug 3", "drug 1+drug 2", "drug 1+drug 3"):
        matrix, shift = planted_operator(example, perturbation, context)
        target = latents(example, context, perturbation)
        assert energy(z @ matrix.T + shift, target) < 0.08
    for strong in ("drug 1", "drug 2", "drug 1+drug 2"):
        assert energy(z, latents(example, context, strong)) > 1
    assert abs(energy(z, latents(example, context, "drug 4"))) < 0.08


def test_one_shift_for_all_contexts_is_not_enough(example):
    """The affine part matters: the mean shift of the other contexts misses by far more than the noise."""
    contexts = ["type A", "type B", "type C", "type D"]
    moves = {
        c: latents(example, c, "drug 2").mean(0) - latents(example, c, "control").mean(0) for c in contexts
    }
    errors = []
    for context in contexts:
        shift = np.mean([moves[other] for other in contexts if other != context], axis=0)
        errors.append(
            energy(latents(example, context, "control") + shift, latents(example, context, "drug 2"))
        )
    assert min(errors) > 0.15 and np.mean(errors) > 0.4


def test_combination_is_the_composition_and_null_is_the_identity(example):
    first, second = planted_operator(example, "drug 1"), planted_operator(example, "drug 2")
    both = planted_operator(example, "drug 1+drug 2")
    np.testing.assert_allclose(both[0], second[0] @ first[0], atol=1e-12)
    np.testing.assert_allclose(both[1], second[0] @ first[1] + second[1], atol=1e-12)
    np.testing.assert_allclose(planted_operator(example, "drug 4")[0], np.eye(6))
    np.testing.assert_allclose(planted_operator(example, "control")[1], 0)


def test_operators_are_shared_and_bounded(example):
    truth = example.uns["cellop_nb"]["truth"]
    for perturbation in set(truth["condition"]):
        matrices = truth["A"][truth["condition"] == perturbation]
        assert np.ptp(matrices, axis=0).max() == 0
        assert np.linalg.norm(matrices[0], 2) < 2


def test_contexts_deviate_on_request():
    adata = synthetic(n_contexts=2, n_perturbations=3, n_cells=5, n_genes=20, context_deviation=0.1)
    a, b = (planted_operator(adata, "drug 1", context)[0] for context in ("type A", "type B"))
    assert 0.01 < abs(a - b).max() < 1
    np.testing.assert_allclose(planted_operator(adata, "drug 3", "type B")[0], np.eye(6))


def test_doses_follow_one_generator():
    adata = synthetic(n_contexts=1, n_perturbations=1, doses=(0.5, 1.0, 2.0), n_cells=10, n_genes=20)
    assert sorted(adata.obs.loc[adata.obs["perturbation"] == "drug 1", "dose"].unique()) == [0.5, 1, 2]
    half, one, two = (planted_operator(adata, "drug 1", dose=dose) for dose in (0.5, 1.0, 2.0))
    np.testing.assert_allclose(half[0] @ half[0], one[0], atol=1e-12)
    np.testing.assert_allclose(one[0] @ one[1] + one[1], two[1], atol=1e-12)


def test_counts_average_to_the_planted_proportions():
    adata = synthetic(n_contexts=1, n_perturbations=1, n_cells=3000, n_genes=40, library=400, seed=3)
    x = adata.X.toarray()
    expected = planted_proportions(adata, adata.obsm["X_truth"])
    np.testing.assert_allclose(expected.sum(1), 1)
    measured = x.sum(0) / x.sum()
    assert abs(measured - expected.mean(0)).max() < 0.01
    response = [x[rows].sum(0) / x[rows].sum() - expected[rows].mean(0) for rows in halves(adata)]
    assert max(abs(r).max() for r in response) < 0.015


def halves(adata):
    treated = (adata.obs["perturbation"] == "drug 1").to_numpy()
    return treated, ~treated


def test_dispersion_is_the_planted_one():
    """Given its mean, a count's variance is mean + mean^2 / r: the slope on one bright gene gives r back."""
    adata = synthetic(n_contexts=1, n_perturbations=1, n_cells=20_000, n_genes=8, library=200, seed=0)
    truth = adata.uns["cellop_nb"]["truth"]
    # the library size is not observed before sampling, so compare through the log-normal's known moments
    p = planted_proportions(adata, adata.obsm["X_truth"])
    x = adata.X.toarray().astype(float)
    depth1, depth2 = 200 * np.exp(0.35**2 / 2), 200**2 * np.exp(2 * 0.35**2)
    gene = int(p.mean(0).argmax())
    second = (x[:, gene] ** 2).mean()
    expected = depth1 * p[:, gene].mean() + depth2 * (p[:, gene] ** 2).mean() * (
        1 + 1 / truth["dispersion"][gene]
    )
    assert second == pytest.approx(expected, rel=0.05)


def test_batch_effect_is_absent_unless_asked_for():
    def separation(effect):
        adata = synthetic(
            n_contexts=1, n_perturbations=1, n_cells=1000, n_genes=40, library=400, batch_effect=effect
        )
        x = adata.X.toarray()
        first = (adata.obs["batch"] == "batch 1").to_numpy()
        ratio = np.log((x[~first].sum(0) + 1) / x[~first].sum()) - np.log(
            (x[first].sum(0) + 1) / x[first].sum()
        )
        return np.corrcoef(ratio, adata.uns["cellop_nb"]["truth"]["batch_shift"] + 1e-9 * np.arange(40))[
            0, 1
        ], ratio

    correlation, ratio = separation(0.5)
    assert correlation > 0.95 and ratio[:].std() > 0.3
    assert separation(0.0)[1].std() < 0.2


def test_seeded():
    small = {"n_contexts": 1, "n_perturbations": 1, "n_cells": 5, "n_genes": 20}
    one, two, other = synthetic(**small), synthetic(**small), synthetic(**small, seed=1)
    assert (one.X != two.X).nnz == 0
    assert (one.X != other.X).nnz > 0


def test_labels_and_sizes():
    adata = synthetic(
        n_contexts=28, n_perturbations=2, combinations=["drug 2+drug 1"], n_cells=2, n_controls=3, n_genes=5
    )
    assert {"type A", "type Z", "type AA", "type AB"} <= set(adata.obs["cell_type"])
    assert adata.n_obs == 28 * (3 + 3 * 2)
    matrix = planted_operator(adata, "drug 2+drug 1")[0]
    np.testing.assert_allclose(
        matrix, planted_operator(adata, "drug 1")[0] @ planted_operator(adata, "drug 2")[0]
    )


def test_refusals(example):
    with pytest.raises(DataError, match="n_contexts of at least 1"):
        synthetic(n_contexts=0)
    with pytest.raises(LabelError, match="did you mean 'drug 1'"):
        planted_operator(example, "drug1")
    bare = example[:5].copy()
    del bare.uns["cellop_nb"]
    with pytest.raises(DataError, match="planted operators in uns"):
        planted_operator(bare, "drug 1")


def test_example_arguments_are_those_of_the_file(example):
    assert example.n_vars == EXAMPLE["n_genes"]
