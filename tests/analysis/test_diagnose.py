"""Gradient audit on paths whose end is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cellop_nb import gradient_audit
from cellop_nb.analysis.diagnose import saved_for_backward
from cellop_nb.errors import ModelError
from cellop_nb.models.energy import energy_distance
from cellop_nb.models.operators import Condition, OperatorModel
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


def test_a_tensor_loss_names_where_constants_enter():
    model = Two(lambda hidden: hidden.detach())
    table = gradient_audit(model, model(X).sum()).set_index("parameter")
    assert not table.loc["first.weight", "reached"]
    assert "Addmm" in table.loc["first.weight", "path_ends"]


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


def test_a_graph_can_be_kept():
    model = Two()
    loss = model(X).sum()
    gradient_audit(model, loss, retain_graph=True)
    loss.backward()
    with pytest.raises(ModelError, match="scalar loss"):
        gradient_audit(model, model(X))


def test_bytes_kept_for_backward():
    weight = nn.Parameter(torch.ones(100))
    data = torch.rand(1000, 100)
    assert saved_for_backward(lambda: (data * weight).sum()) >= data.nbytes
    assert saved_for_backward(lambda: data.sum() + weight.sum()) == 0


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
