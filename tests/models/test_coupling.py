"""Carried counts keep the cell, move its levels as asked, and round without bias."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellop_nb.models.coupling import carried_mean, carry_counts, levels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cells(n=50, genes=7, seed=0):
    x = torch.poisson(torch.full((n, genes), 2.0), generator=generator(seed))
    return x, x.sum(1).clamp_min(1.0)


def test_levels_are_those_of_the_field():
    x, library = cells()
    expected = np.log1p(x.numpy() / library.numpy()[:, None] * 1e4)
    np.testing.assert_allclose(levels(x, library), expected, rtol=1e-6)


def test_no_change_keeps_every_count():
    x, library = cells()
    mean = carried_mean(x, library, x + 0.5, x + 0.5)
    assert torch.equal(mean, x)
    assert torch.equal(carry_counts(mean, generator(3)), x)


def test_every_level_moves_by_the_decoders_change():
    """Against the formula written out for one cell and one gene at a time."""
    x, library = cells(6, 4)
    before, after = torch.rand(6, 4, generator=generator(1)) * 3, torch.rand(6, 4, generator=generator(2)) * 3
    moved = carried_mean(x, library, before, after)
    for i in range(6):
        for g in range(4):
            y = [np.log1p(1e4 * float(v[i, g]) / float(library[i])) for v in (x, before, after)]
            expected = (np.exp(max(0.0, y[0] + y[2] - y[1])) - 1) * float(library[i]) / 1e4
            assert float(moved[i, g]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_perfect_decoder_ends_at_its_own_expectation():
    """Where the observed counts are what the decoder expects, the moved ones are too."""
    x, library = cells()
    after = torch.rand(x.shape, generator=generator(4)) * 5
    torch.testing.assert_close(carried_mean(x, library, x, after), after, rtol=1e-4, atol=1e-5)


def test_the_remainder_is_added_to_every_cells_level():
    x, library = cells()
    before = x + 1
    remainder = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0])
    moved = carried_mean(x, library, before, before, remainder)
    torch.testing.assert_close(
        levels(moved, library) - levels(x, library), remainder.expand_as(x), atol=1e-4, rtol=0
    )


def test_a_fall_below_zero_ends_at_zero():
    x, library = cells()
    moved = carried_mean(x, library, x + 5, torch.zeros_like(x))
    assert (moved[x == 0] == 0).all() and (moved >= 0).all()


def test_what_the_model_does_not_explain_is_kept():
    """Cells with twice the expected counts stay above the others after a change."""
    library = torch.full((4000,), 1000.0)
    high = torch.where(torch.arange(4000).unsqueeze(1) < 2000, 8.0, 2.0)
    before, after = torch.full_like(high, 4.0), torch.full_like(high, 8.0)
    moved = carry_counts(carried_mean(high, library, before, after), generator(5))
    assert moved[:2000].mean() > 2 * moved[2000:].mean()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.0, 50.0), st.integers(0, 100))
def test_rounding_is_unbiased_and_to_a_neighbour(mean, seed):
    drawn = carry_counts(torch.full((20_000,), mean, dtype=torch.float64), generator(seed))
    assert set(drawn.unique().tolist()) <= {np.floor(mean), np.floor(mean) + 1}
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.02)


def test_expectations_that_underflowed_to_zero_give_counts_not_nan():
    x, library = torch.tensor([[0.0, 3.0]]), torch.tensor([3.0])
    nothing, some = torch.zeros(1, 2), torch.ones(1, 2)
    for before, after in [(nothing, nothing), (nothing, some), (some, nothing)]:
        assert carried_mean(x, library, before, after).isfinite().all()
