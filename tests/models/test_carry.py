"""Carried counts keep the cell, have the mean of the target, and round without bias."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cellop_nb.errors import ModelError
from cellop_nb.models.carry import MOST_LEVEL, Observed, balanced_counts, carry_genes, whole_levels
from cellop_nb.models.likelihood import NegativeBinomial, levels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def nb(mean, r=2.0):
    return NegativeBinomial(mean, torch.full((mean.shape[-1],), float(r)))


def cells(n=50, genes=7, seed=0):
    x = torch.poisson(torch.full((n, genes), 2.0), generator=generator(seed))
    return x, x.sum(1).clamp_min(1.0)


def shares(library, seed):
    """Means (cell, gene) that sum to the library."""
    logits = torch.randn(len(library), 7, generator=generator(seed))
    return torch.softmax(logits, 1) * library.unsqueeze(1)


def test_levels_are_those_of_the_field():
    x, library = cells()
    expected = np.log1p(x.numpy() / library.numpy()[:, None] * 1e4)
    np.testing.assert_allclose(levels(x, library), expected, rtol=1e-6)


def test_no_change_keeps_every_count():
    x, library = cells()
    mean = Observed(x, library, nb(x + 0.5)).mean(nb(x + 0.5))
    assert torch.equal(mean, x)
    assert torch.equal(balanced_counts(mean, generator(3)), x)
    for seed in range(20):  # libraries that the sum over genes meets only up to rounding
        more = library * (1 + torch.rand(len(x), generator=generator(seed)))
        observed = Observed(x, more, nb(shares(more, seed)))
        assert torch.equal(observed.mean(nb(shares(more, seed))), x)


def test_no_expectation_is_negative():
    """A mean that all but vanishes leaves all but nothing of a count, and no rounding error below it."""
    x = torch.rand(5000, 7, generator=generator(0)) * 1e5
    start = torch.rand(5000, 7, generator=generator(1)) * 10
    moved = Observed(x, x.sum(1), nb(start)).mean(nb(start * 1e-9))
    assert (moved >= 0).all()


def test_every_count_follows_the_formula():
    """Written out for one cell and one gene at a time; much of the library is other genes."""
    x, _ = cells(6, 4)
    library, r = 2 * x.sum(1) + 5, torch.tensor([0.5, 1.0, 2.0, 50.0])
    before, after = (torch.rand(6, 4, generator=generator(k)) * 3 for k in (1, 2))
    moved = Observed(x, library, NegativeBinomial(before, r)).mean(NegativeBinomial(after, r))
    for i in range(6):
        ends = []
        for g in range(4):
            count, first, last, own = (float(v) for v in (x[i, g], before[i, g], after[i, g], r[g]))
            up = count + (last - first) * (own + count) / (own + first)
            ends.append(up if last > first else count * last / first)
        count, first, last = (float(library[i] - v[i].sum()) for v in (x, before, after))
        others = count + last - first if last > first else count * last / first
        expected = np.array(ends) / (sum(ends) + others) * float(library[i])
        np.testing.assert_allclose(moved[i], expected, rtol=1e-4)


@pytest.mark.parametrize(("start", "end"), [(1.0, 3.0), (3.0, 1.0), (0.05, 4.0)])
def test_the_mean_is_that_of_the_target(start, end):
    """Counts drawn from the model before the move have the model's mean after it; other genes leave room."""
    n, library = 40_000, torch.full((40_000,), 1e5)
    before, after = (nb(torch.full((n, 1), value), 1.5) for value in (start, end))
    moved = Observed(before.sample(generator(1)), library, before).mean(after)
    assert float(moved.mean()) == pytest.approx(end, rel=0.05)


def test_a_closed_library_stays_what_it_was():
    """Where all genes are modelled, the counts of a moved cell sum to its library."""
    x, library = cells()
    moved = Observed(x, library, nb(shares(library, 5))).mean(nb(shares(library, 4)))
    torch.testing.assert_close(moved.sum(1), library)


def test_modelled_genes_may_rise_at_the_expense_of_the_others():
    x, _ = cells()
    library = 10 * x.sum(1)
    start = x.clamp_min(1e-3)
    ratio = Observed(x, library, nb(start)).mean(nb(3 * start)).sum(1) / x.sum(1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0), rtol=2e-2, atol=0)


def test_a_perfect_decoder_ends_at_its_own_expectation():
    """Where the observed counts are what the decoder expects, the moved ones are too."""
    x, library = cells()
    x = x + 1
    after = shares(x.sum(1), 4)
    torch.testing.assert_close(Observed(x, x.sum(1), nb(x)).mean(nb(after)), after, rtol=1e-4, atol=1e-5)


def test_what_the_model_does_not_explain_is_kept():
    """Cells with twice the expected counts stay above the others after a change."""
    library = torch.full((4000,), 1000.0)
    high = torch.where(torch.arange(4000).unsqueeze(1) < 2000, 8.0, 2.0)
    before, after = torch.full_like(high, 4.0), torch.full_like(high, 8.0)
    moved = balanced_counts(Observed(high, library, nb(before)).mean(nb(after)), generator(5))
    assert moved[:2000].mean() > 2 * moved[2000:].mean()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.0, 50.0), st.integers(0, 100))
def test_rounding_is_unbiased_and_to_a_neighbour(mean, seed):
    drawn = balanced_counts(torch.full((20_000, 1), mean, dtype=torch.float64), generator(seed))
    assert set(drawn.unique().tolist()) <= {np.floor(mean), np.floor(mean) + 1}
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.02)


def test_expectations_that_underflowed_to_zero_give_counts_not_nan():
    x, library = torch.tensor([[0.0, 3.0]]), torch.tensor([3.0])
    nothing, some = nb(torch.zeros(1, 2)), nb(torch.ones(1, 2))
    for before, after in [(nothing, nothing), (nothing, some), (some, nothing)]:
        assert Observed(x, library, before).mean(after).isfinite().all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_expectations_that_are_not_finite_make_no_counts(value):
    mean = torch.ones(3, 4)
    mean[1, 2] = value
    with pytest.raises(
        ModelError, match="finite expected counts.*NaN or infinity in 1 of 3 cells.*To fix it"
    ):
        balanced_counts(mean)


def test_one_cell_of_many_genes_is_rounded_without_bias():
    drawn = balanced_counts(torch.full((1, 20_000), 0.3, dtype=torch.float64), generator())
    assert float(drawn.mean()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("growth", [0.0, 0.2])
def test_every_gene_reaches_its_level_from_the_non_zeros_alone(growth):
    """Rare and common genes that fall, rise, rise steeply (more than a molecule in empty cells) or vanish."""
    rng = np.random.default_rng(0)
    mean = rng.gamma(0.5, 1.0, 90)
    x = rng.poisson(mean * rng.gamma(4.0, 0.25, (60, 1))).astype(np.float32)
    library = x.sum(1) + 50.0
    change = rng.normal(0, 0.4, 90)
    change[:3] = 3.0, -9.0, 0.0
    carried = torch.from_numpy(carry_genes(sparse.csc_matrix(x), library, change, growth, iterations=40))
    before, after = (torch.from_numpy(one) for one in (library, np.exp(growth) * library))
    aim = whole_levels(torch.from_numpy(x).double(), before)[0].mean(0) + torch.from_numpy(change)
    level = whole_levels(carried, after)[0].mean(0)
    assert (carried >= 0).all() and float(carried[x[:, 0] == 0, 0].max()) > 1
    torch.testing.assert_close(level, aim.clamp(0, MOST_LEVEL), atol=2e-4, rtol=0)


def test_one_order_keeps_expectations_totals_and_independence():
    """Two genes of the same expectations in one order of the cells: neither tells where the other's molecules are."""
    mean = torch.rand(30, 1, dtype=torch.float64).expand(30, 2)
    source = generator()
    draws = torch.stack([balanced_counts(mean, source, one_order=True) for _ in range(4000)])
    assert float((draws.mean(0) - mean).abs().max()) < 0.04
    assert float((draws.sum(1) - mean.sum(0)).abs().max()) < 1
    left = draws - mean
    correlation = (left[..., 0] * left[..., 1]).mean(0) / (mean[:, 0] * (1 - mean[:, 0]))
    assert float(correlation.mean().abs()) < 0.02
