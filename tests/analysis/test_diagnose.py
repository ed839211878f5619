"""Gradient audit on paths whose end is known, operator health against behaviour known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from cellop_nb.analysis.diagnose import (
    affine_health,
    gradient_audit,
    operator_health,
)
from cellop_nb.errors import LabelError, ModelError
from cellop_nb.models.energy import energy_distance
from cellop_nb.models.operators import Condition, OperatorModel, spectral_excess
from cellop_nb.models.vae import NBVAE, bounded, elbo_loss


class Two(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between=lambda hidden: hidden):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(2, 2)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


X = torch.arange(15.0).reshape(5, 3) / 7


def audit(model, loss=None):
    return gradient_audit(model, loss or (lambda: model(X).square().mean())).set_index("parameter")


def test_norms_and_ratios_are_those_of_backward():
    model = Two()
    table = audit(model)
    model(X).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("unused"):
            continue
        row = table.loc[name]
        assert row["grad_norm"] == pytest.approx(float(parameter.grad.norm()), rel=1e-5)
        ratio = float(parameter.grad.norm() / parameter.detach().norm())
        assert row["grad_to_weight"] == pytest.approx(ratio, rel=1e-5)
        assert row["reached"] and row["status"] == "ok" and row["path_ends"] == ""


def test_a_parameter_without_any_use():
    assert audit(Two()).loc["unused.weight", ["reached", "path_ends"]].tolist() == [False, "never used"]


def no_grad(hidden):
    with torch.no_grad():
        return hidden * 2


@pytest.mark.parametrize(
    ("between", "told"),
    [
        (lambda hidden: hidden.detach(), "detach in module 'Two' at test_diagnose.py"),
        (no_grad, "no_grad around mul in module 'Two' at test_diagnose.py"),
        (lambda hidden: (hidden > 0).float(), "no derivative of gt in module 'Two'"),
        (lambda hidden: torch.from_numpy(hidden.detach().numpy().copy()), "detach in module 'Two'"),
    ],
    ids=["detach", "no_grad", "comparison", "numpy"],
)
def test_the_operation_that_cuts_a_path_is_named(between, told):
    table = audit(Two(between))
    assert table.loc["first.weight", "status"] == "not reached"
    assert table.loc["first.weight", "path_ends"].startswith(told)
    assert table.loc["second.weight", "status"] == "ok"


def test_a_result_that_is_dropped():
    model = Two()
    table = audit(model, lambda: (model.first(X), model.second(torch.ones(1, 4)))[1].sum())
    ends = table.loc["first.weight", "path_ends"]
    assert "addmm in module 'first'" in ends and "does not enter the loss" in ends


def test_a_loss_cut_off_from_everything():
    model = Two()
    table = audit(model, lambda: model(X).sum().detach())
    assert not table["reached"].any()
    assert table.loc["second.bias", "path_ends"].startswith("detach at test_diagnose.py")


def test_dead_units_and_clamps_show_as_zeros():
    model = Two(torch.relu)
    with torch.no_grad():
        model.first.bias.copy_(torch.tensor([-100.0, 100, 100, -100]))
    table = audit(model)
    assert table.loc["first.weight", "dead_units"] == 2
    assert table.loc["first.weight", "zero_share"] == pytest.approx(0.5)
    clamped = audit(Two(lambda hidden: hidden.clamp(50, 60)))
    assert clamped.loc["first.weight", "status"] == "zero gradient"


def test_frozen_and_non_finite():
    model = Two(lambda hidden: (hidden - hidden.detach()).sqrt())
    model.second.requires_grad_(False)
    table = audit(model)
    assert table.loc["second.weight", "status"] == "frozen"
    assert table.loc["first.weight", "status"] == "non-finite"


def test_nothing_is_left_behind():
    model = nn.Sequential(Two(), nn.Dropout(0.5), nn.BatchNorm1d(1))
    model(X).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    random = torch.get_rng_state()
    gradient_audit(model, lambda: model(X).sum())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters() if n in before)
    assert all(p.grad is None for n, p in model.named_parameters() if n not in before)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_is_no_scalar_computed_by_a_function_is_refused():
    model = Two()
    with pytest.raises(ModelError, match="scalar loss"):
        gradient_audit(model, lambda: model(X))
    with pytest.raises(ModelError, match="a function that computes the loss.*Tensor"):
        gradient_audit(model, model(X).sum())


# -- the two paths of the report ---------------------------------------------------------------


def test_the_first_path_reaches_every_parameter_of_the_vae():
    torch.manual_seed(0)
    vae = NBVAE(12, n_latent=3, n_hidden=8)
    x = torch.poisson(torch.full((20, 12), 2.0))
    table = audit(vae, lambda: elbo_loss(*vae(x, x.sum(1))))
    assert table["reached"].all()
    assert set(table["status"]) == {"ok"}


def test_the_second_path_reaches_the_operators_and_leaves_the_frozen_encoder_alone():
    torch.manual_seed(0)
    vae = NBVAE(12, n_latent=3, n_hidden=8).requires_grad_(False)
    operators = OperatorModel(3, ["A", "B"], ["x"], context_rank=1)
    both = nn.ModuleDict({"vae": vae, "operators": operators})
    x = torch.poisson(torch.full((40, 12), 2.0))
    with torch.no_grad():
        operators.axis_shift.normal_()
        operators.axis_left.normal_()
        operators.center.fill_(0.3)
        z = vae.encode(x).loc
    design = operators.conditions.design([Condition(("A",), "x"), Condition(("B",), "x")])

    def loss():
        matrices, shifts = operators.affine(design)
        moved = operators(z, [20, 20], matrices, shifts)
        return energy_distance(moved[:20], z[20:] + 1) + energy_distance(moved[20:], z[:20] - 1)

    table = audit(both, loss)
    mine = table[table.index.str.startswith("operators")]
    assert (table[table.index.str.startswith("vae")]["status"] == "frozen").all()
    assert mine.drop("operators.conditions.interaction")["reached"].all()
    assert mine.loc["operators.axis_shift", "status"] == "ok"


def test_a_function_with_its_own_backward_is_no_cut():
    """Its forward runs without gradients; the path ends later, where the result is dropped."""
    model = Two(lambda hidden: bounded(hidden, -1.0, 1.0))
    assert audit(model).loc["first.weight", "status"] == "ok"
    ends = audit(model, lambda: (model(X), model.second(torch.ones(1, 4)))[1].sum())
    assert "does not enter the loss" in ends.loc["first.weight", "path_ends"]


def test_what_autograd_keeps_for_itself_is_no_cut():
    """A ReLU detaches its result for the backward pass; the cut is the one in the loss."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 1))
    table = audit(model, lambda: model[4](model[:4](X).detach()).sum())
    assert table.loc["0.weight", "path_ends"].startswith("detach at test_diagnose.py")
    assert table.loc["4.weight", "status"] == "ok"


# -- health of operators

ZERO = np.zeros(2)


def rotation(angle):
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def test_identity_is_green_and_changes_nothing():
    health = affine_health(np.eye(3), np.zeros(3))
    assert health["verdict"] == "green" and health["real_logarithm"]
    for name in ("spectral_norm", "spectral_radius", "condition_number", "growth_10"):
        assert health[name] == pytest.approx(1)
    assert health["drift_10"] == pytest.approx(0, abs=1e-12)


def test_a_pure_shift_is_green_but_drifts():
    health = affine_health(np.eye(2), np.array([3.0, 4.0]))
    assert health["verdict"] == "green" and health["drift_10"] == pytest.approx(50)


def test_a_contraction_towards_a_fixed_point():
    health = affine_health(0.5 * np.eye(2), np.array([1.0, 0.0]))
    assert health["growth_10"] == pytest.approx(0.5**10)
    assert health["drift_10"] == pytest.approx(2 * (1 - 0.5**10))


def test_a_scaled_rotation():
    health = affine_health(1.2 * rotation(0.7), ZERO)
    assert health["spectral_radius"] == pytest.approx(1.2)
    assert health["growth_10"] == pytest.approx(1.2**10)
    assert health["verdict"] == "amber" and "1.2-fold, 13 uses tenfold" in health["advice"]


def test_a_transient_that_the_spectral_radius_hides():
    """Stable in the long run, eight-fold growth before: only the norm of the powers shows it."""
    A = np.array([[0.9, 2.0], [0.0, 0.9]])
    health = affine_health(A, ZERO)
    assert health["spectral_radius"] == pytest.approx(0.9)
    assert health["growth_10"] == pytest.approx(np.linalg.norm(np.linalg.matrix_power(A, 10), 2)) and (
        health["growth_10"] > 7
    )


@pytest.mark.parametrize(
    ("A", "has_logarithm"),
    [(np.diag([-1.0, 2.0]), False), (np.diag([0.0, 1.0]), False), (rotation(3.0), True)],
    ids=["reflection", "singular", "nearly half a turn"],
)
def test_real_logarithm(A, has_logarithm):
    health = affine_health(A, ZERO)
    assert health["real_logarithm"] is has_logarithm
    assert ("no real logarithm" in health["advice"]) is not has_logarithm


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
    assert [(tables[name]["verdict"] == "red").sum() for name in ("before", "after")] == [2, 0]
    assert tables["before"]["spectral_norm"].max() == pytest.approx(6, rel=1e-4)
