"""Bootstrap intervals of the metrics of a hold-out: around their values, the same for a seed, covering as they say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellop_nb import datasets, holdout
from cellop_nb.analysis import uncertainty
from cellop_nb.analysis.baselines import Prediction
from cellop_nb.analysis.metrics import EvaluationSpace, e_distance
from cellop_nb.analysis.scores import Truth
from cellop_nb.analysis.uncertainty import energy_replicates, metric_intervals

from .screens import rows_of, tiny

METRICS = ["e_distance", "pearson_delta", "mae", "library_ratio", "de_score"]


@pytest.fixture(scope="module")
def result():
    """Two fits of one held-out group, whose cells hold other genes' counts, too."""
    screen = datasets.synthetic(
        n_contexts=3, n_perturbations=2, n_cells=60, n_genes=80, n_latent=4, library=200.0, seed=2
    )
    screen.obs["total_counts"] = np.asarray(screen.X.sum(1)).ravel() + 300.0
    other = rows_of(screen, cell_type="type B", perturbation="drug 2")
    model = tiny(screen[~other].copy(), n_latent=6, n_genes=None)
    return holdout(model, only=["type B"], metrics=METRICS, n_seeds=2, progress=False)


def test_every_metric_has_an_interval_around_its_value(result):
    table = metric_intervals(result, n_replicates=20, progress=False).set_index("metric")
    assert set(table.index) == set(METRICS) and set(table["group"]) == {"type B, drug 1"}
    assert (table["low"] < table["high"]).all()
    assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()
    width = table["high"] - table["low"]
    assert width["e_distance"] < 2 * table.loc["e_distance", "value"] + 1
    assert width["library_ratio"] < 0.2


def test_same_seed_same_intervals(result):
    options = {"metrics": ["e_distance", "mae"], "n_replicates": 10, "progress": False}
    first, again = (metric_intervals(result, **options) for _ in range(2))
    pd.testing.assert_frame_equal(first, again)


def test_intervals_of_the_energy_distance_cover_that_of_new_samples():
    """Two Gaussians a known distance apart, sampled anew: the population's value lies inside as often as said."""
    rng = np.random.default_rng(0)
    space = EvaluationSpace(np.arange(3), np.zeros(3), np.eye(3), 0)
    draw = lambda n, shift: rng.normal(shift, 1, size=(n, 3))  # noqa: E731
    population = e_distance(draw(3000, 0.0), draw(3000, 0.7))
    inside = 0
    for _ in range(120):
        cells, real = draw(50, 0.0), draw(50, 0.7)
        fits = [Prediction.of_cells("p", cells)]
        values = energy_replicates(Truth(real, cells, space), fits, 200, rng)
        low, high = np.quantile(values - values.mean() + e_distance(cells, real), [0.05, 0.95])
        inside += low <= population <= high
    assert 0.82 < inside / 120 <= 0.97


def test_a_resample_keeps_the_ranking_of_genes(result, monkeypatch):
    (_, truth, fits), *_ = uncertainty._sides(result, 0)
    seen = []
    monkeypatch.setattr(uncertainty, "score_prediction", lambda guess, again, names: seen.append(again) or [])
    uncertainty._redrawn(truth, fits, ["pearson_delta_de20"], np.random.default_rng(0))
    assert seen[0].top_genes is truth.top_genes and len(seen[0].real) == len(truth.real)
