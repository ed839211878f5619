"""Carried counts follow the target distribution, keep the cell, and average to the formula."""

import numpy as np
import pytest
import torch
from scipy import stats

from cellop_nb.models.coupling import carried_mean, carry_counts
from cellop_nb.models.likelihood import NegativeBinomial


def nb(mean, r, shape=(40_000, 1)):
    return NegativeBinomial(torch.full(shape, float(mean)), torch.tensor([float(r)]))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("before", "after", "r"), [(2.0, 6.0, 1.5), (6.0, 2.0, 1.5), (0.05, 3.0, 0.7), (3.0, 0.05, 5.0)]
)
def test_marginal_is_the_target(before, after, r):
    start, end = nb(before, r), nb(after, r)
    moved = carry_counts(start.sample(generator(1)), start, end, generator(2)).numpy().ravel()
    p = r / (r + after)
    edges = np.unique(stats.nbinom.ppf(np.linspace(0.05, 0.95, 8), r, p))
    observed = np.histogram(moved, np.r_[-0.5, edges + 0.5, np.inf])[0]
    expected = np.diff(np.r_[0, stats.nbinom.cdf(edges, r, p), 1]) * len(moved)
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_no_change_keeps_every_count():
    start = nb(3.0, 2.0, (50, 7))
    x = start.sample(generator())
    assert torch.equal(carry_counts(x, start, start, generator(3)), x)


@pytest.mark.parametrize("after", [0.5, 9.0])
def test_mean_given_the_cell(after):
    start, end = nb(3.0, 2.0), nb(after, 2.0)
    x = torch.full_like(start.mean, 5.0)
    moved = carry_counts(x, start, end, generator(4))
    assert float(moved.mean()) == pytest.approx(float(carried_mean(x, start, end)[0, 0]), rel=0.02)


def test_what_the_model_does_not_explain_is_kept():
    """Cells with twice the expected counts stay above the others after a change."""
    start, end = nb(4.0, 2.0, (4000, 1)), nb(8.0, 2.0, (4000, 1))
    high = torch.where(torch.arange(4000).unsqueeze(1) < 2000, 8.0, 2.0)
    moved = carry_counts(high, start, end, generator(5))
    assert moved[:2000].mean() > 2 * moved[2000:].mean()


def test_a_mean_that_underflowed_to_zero_gives_counts_not_nan():
    x, r = torch.tensor([[0.0, 3.0]]), torch.ones(2)
    nothing = NegativeBinomial(torch.zeros(1, 2), r)
    some = NegativeBinomial(torch.ones(1, 2), r)
    for start, end in [(nothing, nothing), (nothing, some), (some, nothing)]:
        assert carry_counts(x, start, end).isfinite().all()
        assert carried_mean(x, start, end).isfinite().all()
    assert torch.equal(carry_counts(x, nothing, nothing), x)
