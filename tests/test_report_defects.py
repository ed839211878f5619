"""The six defects of the report: each in its old form, the check that catches it, and ours without it.

The old forms stand in `tests/known_faults.py`.
"""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.distributions import Normal

from cellop_nb.analysis.diagnose import gradient_audit
from cellop_nb.errors import ModelError, NonFiniteError
from cellop_nb.models.energy import energy_distance
from cellop_nb.models.likelihood import nb_log_likelihood, nb_log_likelihood_logits
from cellop_nb.models.operators import Condition, OperatorModel
from cellop_nb.models.vae import MIN_DISPERSION, NBVAE, DecoderNB, Encoder, sample_z
from cellop_nb.training.guard import NonFiniteGuard

from .known_faults import (
    backward_seconds,
    bare_loop,
    cached_operator_loss,
    dense_energy,
    gradient,
    nonfinite_parameters,
    old_decoder_nb,
    old_dispersion,
    old_energy,
    old_kl,
    old_nb,
    old_operator_loss,
    old_sample,
    old_variance,
    outcome,
    own_dispersion,
    own_kl,
    own_posterior,
    own_sample,
    path_gradients,
    relative_error,
)


def double(*shape, seed=0, requires_grad=True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


# -- 1, critical: a chunked energy distance keeps the gradient of its last block only --------------


def own_energy(x: Tensor, y: Tensor, tile: int) -> Tensor:
    return energy_distance(x, y, tile=tile)


def test_1_the_broken_gradient_depends_on_the_tile_and_ours_does_not():
    x, y = double(12, 3), double(9, 3, seed=1, requires_grad=False)
    reference = gradient(lambda given: dense_energy(given, y), x)
    for tile in (1, 4, 5, 12, 64):
        own = gradient(lambda given, tile=tile: own_energy(given, y, tile), x)
        torch.testing.assert_close(own, reference)
        broken = gradient(lambda given, tile=tile: old_energy(given, y, tile), x)
        error = relative_error(broken, reference)
        assert error < 1e-12 if tile >= 12 else error > 0.2


def test_1_the_broken_value_is_right_so_that_only_the_gradient_tells():
    x, y = double(12, 3), double(9, 3, seed=1, requires_grad=False)
    torch.testing.assert_close(old_energy(x, y, 5), energy_distance(x, y))


def test_1_gradcheck_finds_the_broken_one_and_passes_ours():
    x, y = double(6, 2), double(5, 2, seed=1, requires_grad=False)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda given: old_energy(given, y, 2), x)
    for tile in (2, 5, 16):
        assert torch.autograd.gradcheck(lambda given, tile=tile: energy_distance(given, y, tile=tile), x)


# -- 2, critical: gradients of a frozen encoder; A and b kept for every cell ------------------------


def two_models():
    torch.manual_seed(0)
    vae, operators = NBVAE(30, n_latent=4, n_hidden=16), OperatorModel(4, ["A"], ["x"])
    with torch.no_grad():
        operators.axis_shift.fill_(0.1)
    x = torch.poisson(torch.full((200, 30), 1.0))
    cells = SimpleNamespace(x=x, library=x.sum(1), covariates={})
    with torch.no_grad():
        z = vae.encode(x).loc
    return vae, operators, cells, z, operators.conditions.design([Condition(("A",), "x")])


def test_2_the_audit_shows_which_path_reaches_the_encoder():
    vae, operators, cells, z, design = two_models()
    both = nn.ModuleDict({"vae": vae, "operators": operators})
    broken = gradient_audit(both, lambda: old_operator_loss(vae, operators, cells, z + 1, design))
    encoder = broken["parameter"].str.startswith("vae.encoder")
    assert broken[encoder & ~broken["parameter"].str.contains("log_variance")]["reached"].all()

    vae.requires_grad_(False)
    own = gradient_audit(both, lambda: cached_operator_loss(operators, z, z + 1, design))
    assert set(own[own["parameter"].str.startswith("vae")]["status"]) == {"frozen"}
    assert own.set_index("parameter").loc["operators.axis_shift", "status"] == "ok"


def test_2_the_two_losses_are_the_same_number():
    vae, operators, cells, z, design = two_models()
    old = old_operator_loss(vae, operators, cells, z + 1, design)
    torch.testing.assert_close(old, cached_operator_loss(operators, z, z + 1, design), rtol=1e-4, atol=1e-5)


def saved_for_backward(loss):
    """Bytes of tensors that the graph of a loss keeps for its backward pass, beside the parameters' own."""
    sizes = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _graph = loss()  # held, so that no address is used twice
    return sum(sizes.values())


def test_2_the_graph_of_ours_holds_no_operator_per_cell():
    vae, operators, cells, z, design = two_models()
    broken = saved_for_backward(lambda: old_operator_loss(vae, operators, cells, z + 1, design))
    own = saved_for_backward(lambda: cached_operator_loss(operators, z, z + 1, design))
    per_cell = len(z) * 4 * 4 * 4  # cells times a 4 by 4 matrix in float32
    assert broken > per_cell > own


# -- 3, high: exp(logvar) overflows --------------------------------------------------------------


@pytest.mark.parametrize("log_variance", [25.0, 800.0, 1e4])
def test_3_log_variances_far_outside(log_variance):
    value = torch.tensor([log_variance], requires_grad=True)
    assert float(old_kl(value).detach()) > 1e9  # 25: no overflow yet, but it drowns the reconstruction

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
    assert torch.isinf(old_variance(value)).all()
    error = stopped(Overflowing(), lambda model, batch: {"kl": old_variance(model(batch)).mean()})
    assert error.origin.name == "operation exp" and "in old_variance" in error.origin.line
    assert error.origin.inputs[0][1] == 800


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
        guard.check(trainer, trainer.loss_terms(batch), torch.tensor(0.0))
    return caught.value


# -- 4, high: lgamma is NaN or infinite for r near 0 and x < 0 -------------------------------------


@pytest.mark.parametrize("r", [1e-30, 1e-40, 0.0])
def test_4_tiny_inverse_dispersion(r):
    x, mu = torch.tensor([[0.0, 1.0, 50.0]]), torch.full((1, 3), 2.0)
    dispersion = torch.full((3,), r, requires_grad=True)
    old_nb(x, mu, dispersion).sum().backward()
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
    assert not torch.isfinite(old_nb(x, mu, r)).all()
    with pytest.raises(ModelError, match="negative|>= 0"):
        nb_log_likelihood(x, mu, r)


# -- 5, high: the loop goes on after a NaN ---------------------------------------------------------


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


def train(guard=None) -> nn.Module:
    """Four batches, the second of which holds one NaN; a fault leaves the model in its last state."""
    torch.manual_seed(0)
    model, batches = Line(), torch.ones(4, 3, 2)
    batches[1, 0, 0] = math.nan
    with contextlib.suppress(NonFiniteError):
        bare_loop(model, lambda batch: {"error": model(batch).square().mean()}, batches, guard=guard, lr=0.1)
    return model


def test_5_without_the_guard_one_nan_poisons_every_parameter():
    model = train()
    assert nonfinite_parameters(model) == sum(parameter.numel() for parameter in model.parameters())


def test_5_with_it_training_stops_and_the_parameters_stay_finite():
    guards = []

    def watched(model, optimizer):
        guards.append(NonFiniteGuard(model, optimizer))
        return guards[0]

    assert nonfinite_parameters(train(watched)) == 0
    assert guards[0].last_finite.step == 1


# -- 6, medium: exp(log_dispersion) can vanish -----------------------------------------------------


@pytest.mark.parametrize("log_dispersion", [-120.0, -50.0, 120.0])
def test_6_the_dispersion_stays_inside_its_bounds_and_can_come_back(log_dispersion):
    broken = old_dispersion(torch.tensor(log_dispersion))
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


# -- how the notebook words what happens -----------------------------------------------------------


def test_an_outcome_is_sound_when_finite_or_refused():
    assert outcome(torch.exp, 0.0)["sound"] and outcome(torch.exp, 0.0)["value"] == 1
    assert not outcome(old_sample, 800.0)["sound"] and not outcome(old_kl, 800.0)["sound"]
    assert not outcome(torch.sqrt, 0.0)["sound"], "a finite value with an infinite gradient"
    refused = outcome(lambda x: nb_log_likelihood(x, torch.ones(1, 1), torch.ones(1)), torch.tensor([[-1.0]]))
    assert refused["sound"] and refused["words"].startswith("refused: Expected counts x >= 0. Found -1")


@pytest.mark.parametrize("log_variance", [25.0, 800.0, 1e4])
def test_the_own_forms_are_bounded_where_the_old_ones_are_not(log_variance):
    assert outcome(old_kl, log_variance)["huge"] and not outcome(own_kl, log_variance)["huge"]
    sample = outcome(own_sample, log_variance)
    assert sample["sound"] and sample["gradient"] > 0
    assert own_posterior(torch.tensor([2.0])).scale.log().item() == pytest.approx(1.0)
    assert float(own_dispersion(torch.tensor(-120.0))) == pytest.approx(MIN_DISPERSION)


def test_path_gradients_follow_the_path():
    start = torch.ones(2, 3, requires_grad=True)
    middle, aside = start * 2, start.sum() * 3
    table = path_gradients(middle.sum(), {"start": start, "aside": aside, "middle": middle})
    assert table["grad_norm"].tolist() == pytest.approx([2 * 6**0.5, 0, 6**0.5])
    assert table["zero_share"].tolist() == [0, 1, 0] and table["finite"].all()


def test_far_logits_overflow_in_the_old_decoder_only():
    x, library, r = torch.ones(1, 2), torch.full((1,), 2.0), torch.ones(2)
    far = torch.tensor([[0.0, 500.0]])
    assert not outcome(lambda logits: old_decoder_nb(x, logits, library, r), far)["sound"]
    assert outcome(lambda logits: nb_log_likelihood_logits(x, logits, library, r), far)["sound"]
    near = far / 500
    torch.testing.assert_close(
        old_decoder_nb(x, near, library, r), nb_log_likelihood_logits(x, near, library, r)
    )


def test_seconds_of_the_backward_pass_alone():
    vae, operators, cells, z, design = two_models()
    assert backward_seconds(lambda: cached_operator_loss(operators, z, z + 1, design), repeats=3) > 0
