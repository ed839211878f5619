"""The formulas of the metrics, against other people's code, by hand and by their properties."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse, stats

from cellop_nb.analysis import metrics as formulas
from cellop_nb.analysis.metrics import Undefined, log1p_cp10k
from cellop_nb.analysis.scores import differential

RNG = np.random.default_rng(0)
PROFILE = arrays(float, 12, elements=st.floats(0, 6, width=32))


def profiles(n=3, genes=40, seed=0):
    return np.random.default_rng(seed).gamma(1.0, 1.0, size=(n, genes))


# --- formulas against other people's code ---


def test_correlations_match_scipy():
    predicted, real, control = profiles()
    expected = stats.pearsonr(predicted - control, real - control)[0]
    assert formulas.pearson_delta(predicted, real, control) == pytest.approx(expected)
    top = [3, 5, 8, 13]
    expected = stats.pearsonr((predicted - control)[top], (real - control)[top])[0]
    assert formulas.pearson_delta(predicted, real, control, top) == pytest.approx(expected)
    assert formulas.squared_pearson(predicted, real) == pytest.approx(stats.pearsonr(predicted, real)[0] ** 2)


def test_errors_match_sklearn():
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    predicted, real, control = profiles()
    assert formulas.mae(predicted, real) == pytest.approx(mean_absolute_error(real, predicted))
    assert formulas.rmse(predicted, real) == pytest.approx(root_mean_squared_error(real, predicted))
    assert formulas.coefficient_of_determination(predicted, real) == pytest.approx(r2_score(real, predicted))
    top = sorted(range(40), key=lambda g: -control[g])[:7]
    expected = sum((predicted[g] - real[g]) ** 2 for g in top) ** 0.5
    assert formulas.l2_top_expressed(predicted, real, control, 7) == pytest.approx(expected)


def test_e_distance_equals_the_double_loop():
    x, y = RNG.normal(size=(7, 3)), RNG.normal(1, 1, size=(9, 3))

    def mean(a, b, same=False):
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not same or i != j]
        return np.mean([np.sqrt(((p - q) ** 2).sum()) for p, q in pairs])

    expected = 2 * mean(x, y) - mean(x, x, True) - mean(y, y, True)
    assert formulas.e_distance(x, y) == pytest.approx(expected)
    with pytest.raises(Undefined, match="two cells a side"):
        formulas.e_distance(x[:1], y)


def test_fold_change_metrics_match_scipy_and_loops():
    predicted, real = RNG.normal(size=(2, 50))
    significant = RNG.random(50) < 0.4
    expected = stats.spearmanr(predicted[significant], real[significant])[0]
    assert formulas.lfc_spearman(predicted, real, significant) == pytest.approx(expected)
    same = [predicted[g] * real[g] > 0 for g in range(50) if significant[g]]
    assert formulas.direction_match(predicted, real, significant) == pytest.approx(np.mean(same))


def test_gene_sets_by_hand():
    real = np.array([5.0, -4.0, 3.0, 2.0, 0.1, 0.0])
    real_mask = np.array([1, 1, 1, 0, 0, 0], dtype=bool)
    guess = np.array([1.0, -9.0, 0.1, 8.0, 7.0, 0.0])
    guess_mask = np.array([1, 1, 0, 1, 1, 0], dtype=bool)  # by size: 1, 3, 4, 0
    assert formulas.precision_at_k(guess, guess_mask, real, real_mask, k=2) == 0.5  # {1, 3} and {0, 1}
    assert formulas.precision_at_k(guess, guess_mask, real, real_mask, k=9) == 0.5  # {1, 3, 4, 0}
    assert formulas.de_score(guess, guess_mask, real, real_mask) == pytest.approx(1 / 3)  # {1, 3, 4}
    nothing = np.zeros(6, dtype=bool)
    assert formulas.precision_at_k(guess, nothing, real, real_mask) == 0.0
    for metric in (formulas.precision_at_k, formulas.de_score):
        with pytest.raises(Undefined, match="no gene is differential"):
            metric(guess, guess_mask, real, nothing)


def test_discrimination_matches_a_naive_ranking():
    real, predicted = RNG.normal(size=(2, 9, 6))
    left_out = [[p % 6] for p in range(9)]
    for p, value in enumerate(formulas.perturbation_discrimination(predicted, real, left_out)):
        kept = [g for g in range(6) if g != p % 6]
        order = np.argsort([np.abs(real[q, kept] - predicted[p, kept]).sum() for q in range(9)])
        assert value == pytest.approx(1 - list(order).index(p) / 9)
    assert (formulas.perturbation_discrimination(real, real) == 1).all()
    same = np.ones((9, 6))
    assert (formulas.perturbation_discrimination(same, same) <= 1 / 9 + 1e-12).all(), "ties must not flatter"


def test_differential_matches_scipy_and_scanpy():
    import scanpy as sc

    rates = RNG.gamma(1, 2, 12), 1.0
    cells, control = (log1p_cp10k(RNG.poisson(rate, size=(30, 12))) for rate in rates)
    found = differential(cells, control)
    p = [
        stats.mannwhitneyu(cells[:, g], control[:, g], use_continuity=False, method="asymptotic")[1]
        for g in range(12)
    ]
    np.testing.assert_allclose(found["p"], p, rtol=1e-5)
    np.testing.assert_allclose(found["fdr"], stats.false_discovery_control(p), rtol=1e-5)
    both = ad.AnnData(np.concatenate([cells, control]))
    both.obs["side"] = pd.Categorical(["a"] * 30 + ["b"] * 30)
    sc.tl.rank_genes_groups(both, "side", groups=["a"], reference="b", method="wilcoxon")
    lfc = sc.get.rank_genes_groups_df(both, "a").set_index("names")["logfoldchanges"]
    np.testing.assert_allclose(found["lfc"], lfc.loc[[str(g) for g in range(12)]], atol=1e-3)


def test_spearman_brown_predicts_the_correlation_of_wholes():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=20000)
    noisy = signal + rng.normal(size=(4, 20000)) * 2
    half = np.corrcoef(noisy[0], noisy[1])[0, 1]
    whole = np.corrcoef(noisy[:2].mean(axis=0), noisy[2:].mean(axis=0))[0, 1]
    assert formulas.spearman_brown(half) == pytest.approx(whole, abs=0.02)


def test_counts_metrics():
    real, guess = sparse.csr_matrix([[0, 2.0], [4.0, 2.0]]), np.array([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    sums = (np.asarray(counts.sum(axis=1)).ravel() for counts in (guess, real))
    assert formulas.ratio_of_means(*sums) == pytest.approx(2 / 4)
    assert formulas.zero_fraction_difference(guess, real) == pytest.approx(0.5 - 0.25)


def test_zeros_and_variances_of_genes_by_hand():
    real, guess = np.array([[0, 1, 5], [0, 2, 5.0]]), np.array([[1, 0, 1], [0, 4, 2], [1, 8, 3.0]])
    assert formulas.zero_error(guess, sparse.csr_matrix(real), [0, 1]) == pytest.approx((2 / 3 + 1 / 3) / 2)
    expected = np.var([0, 4, 8], ddof=1) / np.var([1, 2], ddof=1)  # the other genes do not vary
    assert formulas.variance_ratio(guess, real, [0, 1, 2]) == pytest.approx(expected)
    with pytest.raises(Undefined, match="do not vary"):
        formulas.variance_ratio(guess, real, [2])


def test_a_classifier_tells_clouds_apart_as_far_as_they_are_apart():
    """Two Gaussians a distance s apart: area Phi(s / sqrt 2)."""
    pairs = [np.random.default_rng(seed).normal(size=(2, 600, 5)) for seed in range(4)]
    assert np.mean([formulas.classifier_auc(*pair) for pair in pairs]) == pytest.approx(0.5, abs=0.03)
    x, y = pairs[0]
    x[:, 0] += 1.5
    assert formulas.classifier_auc(x, y) == pytest.approx(stats.norm.cdf(1.5 / np.sqrt(2)), abs=0.03)
    with pytest.raises(Undefined, match="too few for 5 folds"):
        formulas.classifier_auc(x[:9], y)


# --- properties ---


@given(PROFILE, PROFILE, PROFILE, st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_pearson_delta_ignores_scale_and_stays_in_range(predicted, real, control, scale):
    if np.ptp(real - control) < 1e-3 or 0 < np.ptp(predicted - control) < 1e-3:
        return
    value = formulas.pearson_delta(predicted, real, control)
    assert -1 <= value <= 1
    scaled = control + (predicted - control) * scale
    assert formulas.pearson_delta(scaled, real, control) == pytest.approx(value, abs=1e-6)
    assert formulas.pearson_delta(real, real, control) == pytest.approx(1)


@given(PROFILE, PROFILE)
@settings(max_examples=40, deadline=None)
def test_errors_are_symmetric_and_zero_only_at_the_truth(x, y):
    for error in (formulas.mae, formulas.rmse):
        assert error(x, y) == error(y, x) >= 0
        assert error(x, x) == 0
    assert formulas.mae(x, y) <= formulas.rmse(x, y) + 1e-12


def test_no_change_scores_zero_and_a_constant_truth_is_undefined():
    control, real, _ = profiles()
    assert formulas.pearson_delta(control, real, control) == 0.0
    with pytest.raises(Undefined, match="constant"):
        formulas.pearson_delta(real, control, control)
