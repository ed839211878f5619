"""Affine operators as a group: composition, reversal, real powers, and what has none of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm, logm

from cellop_nb.errors import ModelError
from cellop_nb.models.affine import AffineOperator, check_strength, commutator, compose, sum_generators

D = 3
strengths = st.floats(-2, 2)
some = settings(deadline=None, max_examples=10)


@st.composite
def operators(draw):
    """Near-identity operators in float64: every eigenvalue of A is within 0.6 of one."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    departure = rng.normal(size=(D, D))
    matrix = np.eye(D) + draw(st.floats(0, 0.6)) / np.linalg.norm(departure, 2) * departure
    return AffineOperator(torch.as_tensor(matrix), torch.as_tensor(rng.normal(size=D)), "K")


def cells(n=4):
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def close(left, right):
    torch.testing.assert_close(left, right, atol=1e-9, rtol=1e-9)


@some
@given(operators())
def test_applies_a_z_plus_b_to_each_cell(k):
    close(k(cells())[1], torch.as_tensor(k.matrix.numpy() @ cells()[1].numpy() + k.shift.numpy()))


@some
@given(operators(), st.floats(0, 1))
def test_a_share_of_the_matrix_moves_the_centre_as_before_and_the_rest_in_proportion(k, share):
    centre = cells().mean(0)
    moved = k.with_share(share, centre)(cells())
    close(moved.mean(0), k(centre))
    close(moved, share * k(cells()) + (1 - share) * (cells() + k(centre) - centre))
    assert torch.equal(k.with_share(1.0, centre).matrix, k.matrix)
    assert torch.equal(k.with_share(1.0, centre).shift, k.shift)


@some
@given(operators(), operators())
def test_composition_applies_the_right_operator_first(a, b):
    close((a @ b)(cells()), a(b(cells())))
    np.testing.assert_allclose((a @ b).homogeneous, a.homogeneous @ b.homogeneous, atol=1e-12)


def test_composition_does_not_commute_and_names_the_order():
    double = AffineOperator(2 * torch.eye(1), torch.zeros(1), "double")
    step = AffineOperator(torch.eye(1), torch.ones(1), "step")
    z = torch.tensor([[3.0]])
    assert (double @ step)(z).item() == 8
    assert (step @ double)(z).item() == 7
    assert (step @ double).label == "step after double"


@some
@given(operators(), operators(), operators())
def test_composition_is_associative(a, b, c):
    close(((a @ b) @ c)(cells()), (a @ (b @ c))(cells()))


@some
@given(operators())
def test_inverse_undoes_from_both_sides(k):
    close(k.inverse()(k(cells())), cells())
    close(k(k.inverse()(cells())), cells())


@some
@given(operators(), operators())
def test_inverse_of_a_composition_reverses_the_order(a, b):
    close((a @ b).inverse()(cells()), (b.inverse() @ a.inverse())(cells()))


@some
@given(operators())
def test_power_zero_one_and_minus_one(k):
    close(k.power(0)(cells()), cells())
    close(k.power(1)(cells()), k(cells()))
    close(k.power(-1)(cells()), k.inverse()(cells()))


@some
@given(operators(), strengths, strengths)
def test_powers_add(k, s, t):
    close((k.power(s) @ k.power(t))(cells()), k.power(s + t)(cells()))


@some
@given(operators())
def test_whole_powers_repeat_the_operator(k):
    close(k.power(2)(cells()), k(k(cells())))
    close(k.power(0.5)(k.power(0.5)(cells())), k(cells()))


@some
@given(operators())
def test_the_generator_is_the_matrix_logarithm(k):
    np.testing.assert_allclose(k.generator, logm(k.homogeneous), atol=1e-9)
    np.testing.assert_allclose(expm(k.generator), k.homogeneous, atol=1e-9)


def test_half_a_pure_shift_is_half_the_shift():
    shift = AffineOperator(torch.eye(D), torch.tensor([1.0, -2.0, 3.0]))
    torch.testing.assert_close(shift.power(0.5).shift, shift.shift / 2)
    torch.testing.assert_close(shift.power(0.5).matrix, torch.eye(D))


def test_half_a_quarter_turn_is_an_eighth_turn():
    turn = AffineOperator(torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.zeros(2))
    c = 0.5**0.5
    torch.testing.assert_close(turn.power(0.5).matrix, torch.tensor([[c, -c], [c, c]]))


def test_norm_is_the_largest_singular_value():
    assert AffineOperator(torch.diag(torch.tensor([0.5, -3.0])), torch.zeros(2)).norm == pytest.approx(3)


def test_identity_changes_nothing():
    z = cells().float()
    assert torch.equal(AffineOperator(torch.eye(D), torch.zeros(D))(z), z)


# -- what cannot be done ---------------------------------------------------------------------------------


def diagonal(*values):
    return AffineOperator(torch.diag(torch.tensor(values)), torch.ones(len(values)), "odd")


@pytest.mark.parametrize("values", [(1.0, -0.5), (-2.0, -2.0), (1.0, 0.0), (1.0, 1e-20)])
def test_no_fractional_power_without_a_real_logarithm(values):
    with pytest.raises(ModelError, match=r"real logarithm .*'odd'.*negative real axis.*strengths 0 and 1"):
        diagonal(*values).power(0.5)


def test_the_advised_strengths_work_where_no_logarithm_exists():
    mirror, z = diagonal(1.0, -0.5), torch.tensor([[3.0, 4.0]])
    assert torch.equal(mirror.power(0)(z), z)
    assert torch.equal(mirror.power(1)(z), mirror(z))


@pytest.mark.parametrize("values", [(1.0, 0.0), (1.0, 1e-8)])
def test_a_singular_operator_has_no_inverse(values):
    with pytest.raises(ModelError, match=r"invertible operator.*'odd'.*condition number.*larger ridge"):
        diagonal(*values).inverse()


def test_what_is_singular_depends_on_the_precision():
    """At a condition number of 1e5 a float32 way back would be off by per cents; in float64 it is exact to ten digits."""
    single = diagonal(1.0, 1e-5)
    with pytest.raises(ModelError, match=r"condition number of 1\.0e\+05, above 8\.4e\+03 for float32"):
        single.inverse()
    double = AffineOperator(single.matrix.double(), single.shift.double())
    z = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(double.inverse()(double(z)), z, rtol=1e-9, atol=0)


@some
@given(st.integers(0, 2**31), st.floats(1, 3.9))
def test_a_way_back_that_is_given_leads_back(seed, digits):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(D, D)))[0] for _ in range(2))
    matrix = left @ np.diag([1.0, 0.1, 10.0**-digits]) @ right
    k = AffineOperator(torch.as_tensor(matrix).float(), torch.as_tensor(rng.normal(size=D)).float())
    torch.testing.assert_close(k.inverse()(k(cells().float())), cells().float(), rtol=0, atol=1e-2)


def test_latents_of_another_dimension_are_refused():
    with pytest.raises(ModelError, match="latents with 3 columns. Found 2.*use_rep"):
        AffineOperator(torch.eye(D), torch.zeros(D))(torch.ones(4, 2))


# -- operators as one: against matrix products, scipy's exponential, and what commuting maps must do -----


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
    ways = [whole.homogeneous - np.eye(D + 1) for whole in (first, second)]
    most = 2 * np.prod([np.linalg.norm(way) for way in ways])
    assert found.relative == pytest.approx(np.linalg.norm(ways[1] @ ways[0] - ways[0] @ ways[1]) / most)


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
        compose([flip, AffineOperator(torch.eye(3), torch.zeros(3))])


@pytest.mark.parametrize("strength", [-0.1, 1.6, float("nan")])
def test_strength_out_of_range_is_refused(strength):
    with pytest.raises(ModelError, match="between 0 and 1.5"):
        check_strength(strength)
