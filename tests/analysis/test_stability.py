"""Operator health against operators whose behaviour is known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cellop_nb.analysis.stability import affine_health, compare_health, operator_health
from cellop_nb.errors import LabelError
from cellop_nb.models.operators import Condition, OperatorModel, spectral_excess

ZERO = np.zeros(2)


def rotation(angle):
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def test_identity_is_green_and_changes_nothing():
    health = affine_health(np.eye(3), np.zeros(3))
    assert health["verdict"] == "green" and health["bounded"] and health["real_logarithm"]
    for name in ("spectral_norm", "spectral_radius", "condition_number", "growth_10", "growth_bound"):
        assert health[name] == pytest.approx(1)
    for name in ("growth_rate", "numerical_abscissa", "numerical_low", "drift_10"):
        assert health[name] == pytest.approx(0, abs=1e-12)


def test_a_pure_shift_is_green_but_drifts():
    health = affine_health(np.eye(2), np.array([3.0, 4.0]))
    assert health["verdict"] == "green" and health["growth_bound"] == 1
    assert health["drift_10"] == pytest.approx(50) and not health["bounded"]


def test_a_contraction_towards_a_fixed_point_is_bounded():
    health = affine_health(0.5 * np.eye(2), np.array([1.0, 0.0]))
    assert health["bounded"] and health["growth_10"] == pytest.approx(0.5**10)
    assert health["drift_10"] == pytest.approx(2 * (1 - 0.5**10))
    assert health["growth_rate"] == pytest.approx(math.log(0.5))


def test_a_scaled_rotation():
    health = affine_health(1.2 * rotation(0.7), ZERO)
    assert health["spectral_radius"] == pytest.approx(1.2)
    assert health["growth_10"] == pytest.approx(1.2**10)
    assert health["growth_bound"] == math.inf and not health["bounded"]
    assert health["verdict"] == "amber" and "not repeat it more than 13 times" in health["advice"]
    assert health["numerical_abscissa"] == pytest.approx(math.log(1.2))


def test_a_transient_that_the_spectral_radius_hides():
    """Stable in the long run, eight-fold growth before: only the norm of the powers shows it."""
    A = np.array([[0.9, 2.0], [0.0, 0.9]])
    health = affine_health(A, ZERO)
    powers = [np.linalg.norm(np.linalg.matrix_power(A, k), 2) for k in range(1, 200)]
    assert health["spectral_radius"] == pytest.approx(0.9)
    assert health["growth_bound"] == pytest.approx(max(powers)) and max(powers) > 7
    assert health["bounded"] and health["growth_rate"] < 0 < health["numerical_abscissa"]


def test_a_shear_grows_without_bound_though_its_radius_is_one():
    health = affine_health(np.array([[1.0, 0.5], [0.0, 1.0]]), ZERO)
    assert health["growth_bound"] == math.inf and not health["bounded"]


def test_the_growth_bound_is_the_largest_norm_of_all_powers():
    """Against every power one by one; in the first case the power of the largest Frobenius norm is another one."""
    wide = np.zeros((22, 22))
    wide[:20, :20], wide[20:, 20:] = 0.9 * np.eye(20), [[0.6, 1.6], [0.0, 0.6]]
    rng = np.random.default_rng(0)
    others = [np.triu(rng.normal(size=(6, 6)), 1) + rng.uniform(0.3, 0.97) * np.eye(6) for _ in range(20)]
    powers = {k: np.linalg.matrix_power(wide, k) for k in (1, 2)}
    assert np.linalg.norm(powers[1]) > np.linalg.norm(powers[2])
    assert np.linalg.norm(powers[1], 2) < np.linalg.norm(powers[2], 2)
    for A in (wide, *others):
        expected = max(np.linalg.norm(np.linalg.matrix_power(A, k), 2) for k in range(400))
        assert affine_health(A, np.zeros(len(A)))["growth_bound"] == pytest.approx(expected, rel=1e-9)


def test_turning_about_a_far_point_stays_bounded():
    """The norms of such powers rise and fall without end, so that the last may well exceed the one before."""
    for angle in np.linspace(0.1, 3.0, 25):
        assert affine_health(rotation(angle), np.array([3.0, 4.0]))["bounded"], angle


def test_an_operator_whose_powers_vanish_is_bounded_by_their_largest():
    health = affine_health(np.diag([10.0, 10.0], k=1), np.zeros(3))
    assert health["growth_bound"] == pytest.approx(100) and health["growth_10"] == 0


@pytest.mark.parametrize("t", [0.3, 1.0, 2.5])
def test_the_numerical_abscissa_bounds_every_strength(t):
    from scipy.linalg import expm, logm

    A = np.eye(4) + 0.3 * np.random.default_rng(0).normal(size=(4, 4))
    health = affine_health(A, np.zeros(4))
    assert health["real_logarithm"]
    assert np.linalg.norm(expm(t * logm(A)), 2) <= math.exp(t * health["numerical_abscissa"]) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("A", "has_logarithm"),
    [(np.diag([-1.0, 2.0]), False), (np.diag([0.0, 1.0]), False), (rotation(3.0), True)],
    ids=["reflection", "singular", "nearly half a turn"],
)
def test_real_logarithm(A, has_logarithm):
    health = affine_health(A, ZERO)
    assert health["real_logarithm"] is has_logarithm
    assert ("no real logarithm" in health["advice"]) is not has_logarithm
    assert math.isnan(health["growth_rate"]) is not has_logarithm


def test_a_singular_operator_is_not_reversible():
    health = affine_health(np.diag([0.0, 1.0]), ZERO)
    assert health["condition_number"] == math.inf and "not reversible" in health["advice"]


@pytest.mark.parametrize("size", [1e20, 1e200])
def test_a_huge_operator_gives_numbers_not_an_overflow(size):
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        health = affine_health(size * np.eye(2), np.ones(2))
    assert health["verdict"] == "red" and health["spectral_norm"] == pytest.approx(size)
    assert "stability_weight" in health["advice"]


def test_nan_is_red():
    health = affine_health(np.diag([np.nan, 1.0]), ZERO)
    assert health["verdict"] == "red" and "not finite" in health["advice"]


# -- the whole family ---------------------------------------------------------------------------


def family(excess: float) -> OperatorModel:
    model = OperatorModel(3, ["A", "B"], ["x", "y"])
    with torch.no_grad():
        model.axis_left.copy_(excess * torch.eye(3).expand_as(model.axis_left))
        model.conditions.embedding.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.1]]))
    return model


def test_one_row_per_condition_with_the_worst_one_red():
    table = operator_health(family(3.0))
    assert list(table.index) == ["x, A", "x, B", "y, A", "y, B"]
    assert table.loc["x, A", "spectral_norm"] == pytest.approx(4, rel=1e-5)
    assert table["verdict"].tolist() == ["red", "amber", "red", "amber"]


def test_chosen_conditions_and_unknown_ones():
    table = operator_health(family(0.0), [Condition(("A", "B"), None)])
    assert list(table.index) == ["A+B"] and table["verdict"].tolist() == ["green"]
    with pytest.raises(LabelError):
        operator_health(family(0.0), [Condition(("C",), None)])


def test_the_penalty_makes_a_red_family_healthy():
    model = family(5.0)
    conditions = [Condition((name,), c) for c in ("x", "y") for name in ("A", "B")]
    tables = {"before": operator_health(model, conditions, max_norm=1.5)}
    design = model.conditions.design(conditions)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        penalty = spectral_excess(model.affine(design)[0], 1.5)
        if not penalty:
            break
        penalty.backward()
        optimizer.step()
    tables["after"] = operator_health(model, conditions, max_norm=1.5 + 1e-3)
    worst = compare_health(tables)
    assert worst.loc["before", "red"] == 2 and worst.loc["after", "red"] == 0
    assert worst.loc["before", "spectral_norm"] == pytest.approx(6, rel=1e-4)
    assert worst.loc["after", "spectral_norm"] <= 1.5 + 1e-3


def test_the_numerical_range_of_a_known_generator():
    """A shear is exp of [[0, 1], [0, 0]], whose field of values spans [-1/2, 1/2] on the real axis."""
    health = affine_health(np.array([[1.0, 1.0], [0.0, 1.0]]), ZERO)
    assert health["numerical_abscissa"] == pytest.approx(0.5)
    assert health["numerical_low"] == pytest.approx(-0.5)
