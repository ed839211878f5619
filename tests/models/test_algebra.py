"""Operators as one: against matrix products, scipy's exponential, and what commuting maps must do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from cellop_nb.errors import ModelError
from cellop_nb.models.affine import AffineOperator
from cellop_nb.models.algebra import check_strength, commutator, compose, sum_generators

D = 4
quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def operator_of(generator: np.ndarray, label: str = "") -> AffineOperator:
    whole = torch.as_tensor(expm(generator))
    return AffineOperator(whole[:-1, :-1], whole[:-1, -1], label)


def draw_generator(rng: np.random.Generator, size: float = 0.4) -> np.ndarray:
    generator = np.zeros((D + 1, D + 1))
    generator[:-1] = size * rng.normal(size=(D, D + 1)) / np.sqrt(D)
    return generator


@quick
@given(seeds)
def test_composition_applies_the_first_part_first(seed):
    rng = np.random.default_rng(seed)
    parts = [operator_of(draw_generator(rng)) for _ in range(3)]
    z = torch.as_tensor(rng.normal(size=(7, D)))
    step_by_step = parts[2](parts[1](parts[0](z)))
    torch.testing.assert_close(compose(parts)(z), step_by_step)


@quick
@given(seeds)
def test_generators_add(seed):
    rng = np.random.default_rng(seed)
    first, second = draw_generator(rng), draw_generator(rng)
    both = sum_generators([operator_of(first), operator_of(second)])
    np.testing.assert_allclose(both.homogeneous, expm(first + second), atol=1e-8)
    again = sum_generators([operator_of(second), operator_of(first)])
    np.testing.assert_allclose(both.homogeneous, again.homogeneous, atol=1e-8)


@quick
@given(seeds, st.floats(0.1, 1.5))
def test_powers_of_one_operator_commute_and_all_rules_agree(seed, t):
    whole = operator_of(draw_generator(np.random.default_rng(seed)))
    parts = [whole, whole.power(t)]
    found = commutator(*parts)
    assert found.relative < 1e-7
    np.testing.assert_allclose(sum_generators(parts).homogeneous, compose(parts).homogeneous, atol=1e-7)


@quick
@given(seeds)
def test_commutator_is_the_gap_between_the_orders(seed):
    rng = np.random.default_rng(seed)
    first, second = (operator_of(draw_generator(rng)) for _ in range(2))
    z = torch.as_tensor(rng.normal(size=(5, D)))
    gap = compose([first, second])(z) - compose([second, first])(z)
    found = commutator(first, second)
    np.testing.assert_allclose(found.displacement(z.numpy()), gap.numpy(), atol=1e-10)
    assert 0 < found.relative <= 1


def test_pure_shifts_commute():
    shifts = [AffineOperator(torch.eye(D), torch.randn(D)) for _ in range(2)]
    assert commutator(*shifts).relative == 0


def test_what_cannot_be_combined_is_refused():
    flip = AffineOperator(torch.diag(torch.tensor([-1.0, 1.0])), torch.zeros(2), "flip")
    with pytest.raises(ModelError, match="real logarithm"):
        sum_generators([flip, flip])
    with pytest.raises(ModelError, match="at least one operator"):
        compose([])
    with pytest.raises(ModelError, match=r"\[2, 3\]"):
        compose([flip, AffineOperator.identity(3)])


@pytest.mark.parametrize("strength", [-0.1, 1.6, float("nan")])
def test_strength_out_of_range_is_refused(strength):
    with pytest.raises(ModelError, match="between 0 and 1.5"):
        check_strength(strength)
