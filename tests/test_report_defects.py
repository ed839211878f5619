"""The six defects of the report: each in its old form, the check that catches it, and ours without it.

The old forms are written out here in a few lines; nothing of the package contains them.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.distributions import Normal

from cellop_nb import gradient_audit
from cellop_nb.analysis.diagnose import saved_for_backward
from cellop_nb.errors import ModelError
from cellop_nb.models.conditions import Condition
from cellop_nb.models.energy import energy_distance
from cellop_nb.models.likelihood import nb_log_likelihood
from cellop_nb.models.operators import OperatorModel
from cellop_nb.models.vae import MIN_DISPERSION, NBVAE, DecoderNB, Encoder, sample_z
from cellop_nb.training.guard import NonFiniteError, NonFiniteGuard


def double(*shape, seed=0, requires_grad=True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


# -- 1, critical: a chunked energy distance keeps the gradient of its last block only --------------


def broken_energy(x: Tensor, y: Tensor, tile: int) -> Tensor:
    """Every block but the last is added as a number."""
    blocks = list(x.split(tile))
    cross = sum(torch.cdist(block, y).sum().detach() for block in blocks[:-1])
    cross = cross + torch.cdist(blocks[-1], y).sum()
    return 2 * cross / (len(x) * len(y)) - torch.cdist(y, y).mean() - torch.cdist(x, x).detach().mean()


def own_energy(x: Tensor, y: Tensor, tile: int) -> Tensor:
    return energy_distance(x, y, tile=tile)


def gradient(function, x: Tensor, y: Tensor, tile: int) -> Tensor:
    return torch.autograd.grad(function(x, y, tile), x)[0]


def test_1_the_broken_gradient_depends_on_the_tile_and_ours_does_not():
    x, y = double(12, 3), double(9, 3, seed=1, requires_grad=False)
    broken = [gradient(broken_energy, x, y, tile) for tile in (4, 12)]
    own = [gradient(own_energy, x, y, tile) for tile in (1, 4, 5, 12, 64)]
    assert not torch.allclose(broken[0], broken[1])
    assert bool((broken[0][:8] == 0).all())  # only the last block moves
    for other in own[1:]:
        torch.testing.assert_close(other, own[0])
    assert bool((own[0].norm(dim=1) > 0).all())


def test_1_gradcheck_finds_the_broken_one_and_passes_ours():
    x, y = double(6, 2), double(5, 2, seed=1, requires_grad=False)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda given: broken_energy(given, y, 2), x)
    for tile in (2, 5, 16):
        assert torch.autograd.gradcheck(lambda given, tile=tile: energy_distance(given, y, tile=tile), x)


# -- 2, critical: gradients of a frozen encoder; A and b kept for every cell ------------------------


def two_models():
    torch.manual_seed(0)
    vae, operators = NBVAE(30, n_latent=4, n_hidden=16), OperatorModel(4, ["A"], ["x"])
    with torch.no_grad():
        operators.axis_shift.fill_(0.1)
    x = torch.poisson(torch.full((200, 30), 1.0))
    design = operators.conditions.design([Condition(("A",), "x")])
    return vae, operators, x, design


def broken_operator_loss(vae, operators, x, design) -> Tensor:
    """The encoder runs with its graph, and each cell gets its own copy of the operator."""
    z = vae.encode(x).loc
    matrices, shifts = operators.affine(design)
    per_cell, shift = matrices.repeat(len(z), 1, 1), shifts.repeat(len(z), 1)
    moved = (per_cell * z.unsqueeze(1)).sum(-1) + shift
    return energy_distance(moved, z.detach() + 1)


def own_operator_loss(operators, z, design) -> Tensor:
    return energy_distance(operators(z, [len(z)], *operators.affine(design)), z + 1)


def test_2_the_audit_shows_which_path_reaches_the_encoder():
    vae, operators, x, design = two_models()
    both = nn.ModuleDict({"vae": vae, "operators": operators})
    broken = gradient_audit(both, lambda: broken_operator_loss(vae, operators, x, design))
    encoder = broken["parameter"].str.startswith("vae.encoder")
    assert broken[encoder & ~broken["parameter"].str.contains("log_variance")]["reached"].all()

    vae.requires_grad_(False)
    with torch.no_grad():
        z = vae.encode(x).loc
    own = gradient_audit(both, lambda: own_operator_loss(operators, z, design))
    assert set(own[own["parameter"].str.startswith("vae")]["status"]) == {"frozen"}
    assert own.set_index("parameter").loc["operators.axis_shift", "status"] == "ok"


def test_2_the_graph_of_ours_holds_no_operator_per_cell():
    vae, operators, x, design = two_models()
    z = vae.encode(x).loc.detach()
    broken = saved_for_backward(lambda: broken_operator_loss(vae, operators, x, design))
    own = saved_for_backward(lambda: own_operator_loss(operators, z, design))
    per_cell = len(x) * 4 * 4 * 4  # cells times a 4 by 4 matrix in float32
    assert broken > per_cell > own


# -- 3, high: exp(logvar) overflows --------------------------------------------------------------


def broken_scale(log_variance: Tensor) -> Tensor:
    return torch.exp(log_variance)


@pytest.mark.parametrize("log_variance", [25.0, 800.0, 1e4])
def test_3_log_variances_far_outside(log_variance):
    value = torch.tensor([log_variance], requires_grad=True)
    kl = 0.5 * (broken_scale(value) - 1 - value).sum()
    assert float(kl.detach()) > 1e9  # 25: no overflow yet, but it drowns the reconstruction

    encoder = Encoder(5, 2, n_hidden=4)
    nn.init.constant_(encoder.log_variance.bias, log_variance)
    x = torch.ones(3, 5)
    posterior = encoder(x, x.sum(1))
    assert float(posterior.scale.detach().max()) <= math.exp(5) * (1 + 1e-6)
    z = sample_z(posterior, torch.Generator().manual_seed(0))
    z.square().sum().backward()
    # The bound must let the gradient through, or the bias could never come back.
    slope = encoder.log_variance.bias.grad
    assert torch.isfinite(z).all() and torch.isfinite(slope).all() and (slope > 0).all()


def test_3_a_plain_clamp_would_have_been_caught():
    model = nn.ParameterDict({"logvar": nn.Parameter(torch.tensor([25.0]))})
    table = gradient_audit(model, lambda: model["logvar"].clamp(-10, 10).exp().sum())
    assert table["status"].tolist() == ["zero gradient"]


def test_3_the_overflow_is_found_where_it_happens():
    value = torch.tensor([800.0])
    assert torch.isinf(broken_scale(value)).all()
    error = stopped(Overflowing(), lambda model, batch: {"kl": broken_scale(model(batch)).mean()})
    assert error.origin.name == "operation exp" and "in broken_scale" in error.origin.line
    assert error.values["inputs"][0][1] == 800


class Overflowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.logvar = nn.Parameter(torch.tensor([1.0, 800.0]))

    def forward(self, batch):
        return self.logvar * batch


def stopped(model: nn.Module, terms) -> NonFiniteError:
    """The error of the guard in one step of a bare loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard, batch = NonFiniteGuard(model, optimizer), torch.ones(2)
    trainer = SimpleNamespace(epoch=0, step=0, batch=batch, loss_terms=lambda given: terms(model, given))
    guard.begin_step(trainer)
    with pytest.raises(NonFiniteError) as caught:
        guard.before_backward(trainer.loss_terms(batch), trainer)
    return caught.value


# -- 4, high: lgamma is NaN or infinite for r near 0 and x < 0 -------------------------------------


def broken_nb(x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
    terms = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    return (terms + r * torch.log(r / (r + mu)) + x * torch.log(mu / (r + mu))).sum(-1)


@pytest.mark.parametrize("r", [1e-30, 1e-40, 0.0])
def test_4_tiny_inverse_dispersion(r):
    x, mu = torch.tensor([[0.0, 1.0, 50.0]]), torch.full((1, 3), 2.0)
    dispersion = torch.full((3,), r, requires_grad=True)
    broken_nb(x, mu, dispersion).sum().backward()
    assert not (dispersion.grad.abs() < 1e20).all()  # 1 / r, or NaN

    if r == 0.0:
        with pytest.raises(ModelError, match="r"):
            nb_log_likelihood(x, mu, torch.zeros(3))
        return
    dispersion = torch.full((3,), r, requires_grad=True)
    value = nb_log_likelihood(x, mu, dispersion)
    value.sum().backward()
    assert torch.isfinite(value).all() and (dispersion.grad.abs() < 1e20).all()


def test_4_negative_counts_are_refused_not_clamped():
    x, mu, r = torch.tensor([[-1.0, 2.0]]), torch.ones(1, 2), torch.ones(2)
    assert not torch.isfinite(broken_nb(x, mu, r)).all()
    with pytest.raises(ModelError, match="negative|>= 0"):
        nb_log_likelihood(x, mu, r)


# -- 5, high: the loop goes on after a NaN ---------------------------------------------------------


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


def loop(with_guard: bool) -> nn.Module:
    """Four batches, the second of which holds one NaN; gradients are clipped by their norm."""
    torch.manual_seed(0)
    model = Line()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    trainer = SimpleNamespace(epoch=0, loss_terms=lambda batch: {"error": model(batch).square().mean()})
    guard = NonFiniteGuard(model, optimizer)
    for step in range(4):
        trainer.step, trainer.batch = step, torch.ones(3, 2)
        trainer.batch[0, 0] = math.nan if step == 1 else 1.0
        optimizer.zero_grad()
        terms = trainer.loss_terms(trainer.batch)
        if with_guard:
            guard.before_backward(terms, trainer)
        terms["error"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if with_guard:
            guard.after_backward(trainer, norm)
        optimizer.step()
        if with_guard:
            guard.after_step(trainer)
    return model


def test_5_without_the_guard_one_nan_poisons_every_parameter():
    assert all(torch.isnan(parameter).all() for parameter in loop(with_guard=False).parameters())


def test_5_with_it_training_stops_and_the_parameters_stay_finite():
    with pytest.raises(NonFiniteError, match="step 1") as caught:
        loop(with_guard=True)
    frame = next(f for f in _frames(caught.tb) if f.f_code.co_name == "loop")
    assert all(torch.isfinite(p).all() for p in frame.f_locals["model"].parameters())
    assert frame.f_locals["guard"].last_finite.step == 1


def _frames(tb):
    while tb is not None:
        yield tb.tb_frame
        tb = tb.tb_next


# -- 6, medium: exp(log_dispersion) can vanish -----------------------------------------------------


@pytest.mark.parametrize("log_dispersion", [-120.0, -50.0, 120.0])
def test_6_the_dispersion_stays_inside_its_bounds_and_can_come_back(log_dispersion):
    broken = torch.exp(torch.tensor(log_dispersion))
    assert float(broken) < 1e-20 or math.isinf(float(broken))

    decoder = DecoderNB(2, 3, n_hidden=4)
    nn.init.constant_(decoder.log_dispersion, log_dispersion)
    r = decoder.dispersion
    assert bool((r >= MIN_DISPERSION * (1 - 1e-5)).all()) and bool(torch.isfinite(r).all())
    x, mu = torch.tensor([[0.0, 3.0, 7.0]]), torch.full((1, 3), 3.0)
    nb_log_likelihood(x, mu, r).sum().backward()
    slope = decoder.log_dispersion.grad
    assert torch.isfinite(slope).all() and (slope != 0).any()


def test_posterior_is_a_normal_with_positive_scale():
    x = torch.zeros(2, 5)  # cells without any count
    posterior = Encoder(5, 2, n_hidden=4)(x, x.sum(1))
    assert isinstance(posterior, Normal) and (posterior.scale > 0).all()
