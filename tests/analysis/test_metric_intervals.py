"""Intervals that cover as often as they say, on synthetic data with planted truth; contexts outside the support."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from cellop_nb.analysis.abstain import _contexts_with, support
from cellop_nb.analysis.gene_intervals import change_intervals, coverage_table, model_error, widening
from cellop_nb.analysis.selection import Complexity

from cellop_nb import datasets, holdout
from cellop_nb.analysis.metrics import e_distance
from cellop_nb.analysis.uncertainty import metric_intervals
from cellop_nb.errors import HoldoutError

METRICS = ["e_distance", "pearson_delta", "mae", "library_ratio", "de_score"]
HELD = {"cell_type": "type B", "perturbation": "drug 1"}


def fitted(screen, heldout=HELD, **options):
    quick = {
        "vae": {"n_latent": 6, "n_hidden": 32},
        "training": {"max_epochs": 6, "lr": 8e-3, "batch_size": 64},
        "candidates": [Complexity(rank=0)],
        "progress": False,
    }
    return holdout(screen, heldout=heldout, metrics=METRICS, **(quick | options))


@pytest.fixture(scope="module")
def screen():
    return datasets.synthetic(n_perturbations=2, n_cells=60, n_genes=80, n_latent=4, library=200.0, seed=2)


@pytest.fixture(scope="module")
def result(screen):
    return fitted(screen, n_seeds=2)


# -- metrics


def test_every_metric_has_an_interval_around_its_value(result):
    table = metric_intervals(result, n_replicates=20, progress=False).set_index("metric")
    assert set(table.index) == set(METRICS)
    assert (table["low"] < table["high"]).all()
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    assert (
        table.loc["e_distance", "high"] - table.loc["e_distance", "low"]
        < 2 * table.loc["e_distance", "value"] + 1
    )


def test_same_seed_same_intervals(result):
    options = {"metrics": ["e_distance", "mae"], "n_replicates": 10, "progress": False}
    first, again = (metric_intervals(result, **options) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)


def test_intervals_of_the_energy_distance_cover_that_of_new_samples():
    """Two Gaussians a known distance apart, sampled anew: the population's value lies inside as often as said."""
    from cellop_nb.analysis.sides import Sides

    from cellop_nb.analysis.metrics import EvaluationSpace
    from cellop_nb.analysis.scores import Truth
    from cellop_nb.analysis.uncertainty import _energy_replicates

    rng = np.random.default_rng(0)
    space = EvaluationSpace(np.arange(3), np.zeros(3), np.eye(3), 0)
    draw = lambda n, shift: rng.normal(shift, 1, size=(n, 3))  # noqa: E731
    population = e_distance(draw(3000, 0.0), draw(3000, 0.7))
    inside = 0
    for _ in range(120):
        cells, real = draw(50, 0.0), draw(50, 0.7)
        sides = Sides("c", "p", [cells], [None], real, None, cells)
        values = _energy_replicates(sides, Truth(real, cells, space), 200, rng)
        low, high = np.quantile(values - values.mean() + e_distance(cells, real), [0.05, 0.95])
        inside += low <= population <= high
    assert 0.82 < inside / 120 <= 0.97


# -- genes


def test_spread_between_fits_widens_the_intervals(screen, result):
    width = lambda found: (change_intervals(found)["high"] - change_intervals(found)["low"]).mean()  # noqa: E731
    assert width(result) > width(fitted(screen))


def test_coverage_of_a_perfect_prediction_is_nominal(result):
    """Real cells in the place of the predicted ones: nothing but sampling is left, and the intervals hold it."""
    from dataclasses import replace

    real = ad.concat([result.real, result.real])
    real.obs["fit"] = 0
    half = np.random.default_rng(0).permutation(result.real.n_obs)[: result.real.n_obs // 2]
    predicted, truth = result.real[half].copy(), result.real[np.setdiff1d(np.arange(result.real.n_obs), half)]
    predicted.obs["fit"] = 0
    table = coverage_table(replace(result, predictions=predicted, real=truth.copy()))
    assert (table["coverage"] >= table["level"] - 0.12).all()


def test_the_error_of_the_model_is_that_of_one_more_context():
    """Normal errors of contexts, with or without a bias: the next one's error is inside as often as said, or more."""
    from types import SimpleNamespace

    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 2.0, size=4000)
    for bias in (0.0, 1.0):
        errors = scale * (rng.normal(size=(6, 4000)) + bias)
        fit = SimpleNamespace(response=SimpleNamespace(errors={"drug": errors[:5]}))
        for level in (0.5, 0.8, 0.95):
            half = model_error(SimpleNamespace(fits=[fit]), "drug", level)
            assert level - 0.02 < (np.abs(errors[5]) <= half).mean() < level + 0.12
    assert model_error(SimpleNamespace(fits=[fit]), "other") == 0


def test_intervals_hold_what_other_contexts_were_off_by(result):
    errors = result.fits[0].response.errors["drug 1"]
    others = {c for c, p in result.measured if p == "drug 1"}
    assert errors.shape == (len(others), result.predictions.n_vars) and np.isfinite(errors).all()
    table = change_intervals(result)
    half = model_error(result, "drug 1")
    assert ((table["high"] - table["predicted"]) >= half - 1e-6).all() and (half > 0).any()


def test_coverage_shows_a_wrong_prediction(result):
    from dataclasses import replace

    wrong = result.predictions.copy()
    wrong.X = wrong.X[:, ::-1].copy()
    good = coverage_table(result).set_index("level")["coverage"]
    bad = coverage_table(replace(result, predictions=wrong)).set_index("level")["coverage"]
    assert bad[0.95] < good[0.95] - 0.2


def test_widening_reaches_the_coverage_on_another_context(screen, result):
    other = fitted(screen, {"cell_type": "type C", "perturbation": "drug 1"}, n_seeds=2)
    factor = widening([other])
    own = change_intervals(other, widen=factor)["inside"].mean()
    assert own == pytest.approx(0.95, abs=0.03) or factor == 0
    plain, wide = (change_intervals(result, widen=w)["inside"].mean() for w in (1.0, max(factor, 1.0)))
    assert wide >= plain and wide > 0.85
    with pytest.raises(HoldoutError, match="known answer"):
        widening([])


# -- support


def test_a_context_like_the_others_is_supported_and_one_far_away_is_flagged(screen):
    once = {"training": {"max_epochs": 1}}  # the networks take no part in this
    near = support(fitted(screen, **once))
    assert not near["outlier"].any() and not near["known_context"].any()
    alien = screen.copy()
    held = (alien.obs["cell_type"] == "type B").to_numpy()
    counts = alien.X.toarray()
    turned = counts[held][:, ::-1]
    counts[held] = np.random.default_rng(0).permutation(turned.T).T * 3
    alien.X = counts
    far = support(fitted(alien, **once), threshold=1.5).iloc[0]
    assert far["mean_distance"] > 1.5 * near["mean_distance"].iloc[0]
    assert far["outlier"] and "spacings from" in far["reason"]


def test_a_measured_context_supports_itself(screen):
    found = support(fitted(screen, {"donor": "donor 1"}, training={"max_epochs": 1}))
    assert (
        found["known_context"].all() and (found["mean_distance"] < 1e-8).all() and not found["outlier"].any()
    )


def test_contexts_that_know_every_part():
    measured = [("x", "A"), ("x", "B"), ("y", "A"), ("z", "B+C")]
    assert _contexts_with(measured, "A") == {"x", "y"}
    assert _contexts_with(measured, "A+B") == {"x"}
    assert _contexts_with(measured, "C") == {"z"} and not _contexts_with(measured, "D")
