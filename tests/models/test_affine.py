"""Affine operators as a group: composition, reversal, real powers, and what has none of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm, logm

from cellop_nb.errors import ModelError
from cellop_nb.models.affine import AffineOperator

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
    np.testing.assert_allclose(k.generator(), logm(k.homogeneous), atol=1e-9)
    np.testing.assert_allclose(expm(k.generator()), k.homogeneous, atol=1e-9)
    half = k.power(0.5).matrix.clone()
    k.generator()[:] = 0.0  # the caller's own copy
    assert torch.equal(k.power(0.5).matrix, half)


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
    assert torch.equal(AffineOperator.identity(D)(z), z)


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


def test_latents_of_another_dimension_are_refused():
    with pytest.raises(ModelError, match="latents with 3 columns. Found 2.*use_rep"):
        AffineOperator.identity(D)(torch.ones(4, 2))
