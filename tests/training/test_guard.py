"""The non-finite guard: eight planted faults, what is none, and what a healthy step pays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cellop_nb.errors import CellopError, NonFiniteError
from cellop_nb.training.guard import NonFiniteGuard

from .guarded import CELLS, LATENT, ToyTrainer, assert_same, everything_is_finite, fail

# -- eight planted faults --------------------------------------------------------------------------


def test_input_counts(trainer):
    before = trainer.state()
    trainer.counts[4, 2] = math.nan
    error = fail(trainer)
    assert (error.stage, error.step, error.origin.kind) == ("loss", 3, "batch")
    assert (error.cells, error.genes, error.module) == (["cell4"], ["gene2"], None)
    assert "batch.counts" in str(error) and "cell4" in str(error) and "gene2" in str(error)
    assert_same(trainer.state(), before)
    assert trainer.guard.last_finite.step == 3


def test_encoder_weight(trainer):
    healthy = trainer.guard.last_finite
    trainer.model.encoder[2].weight.data[1, 3] = math.inf
    error = fail(trainer)
    assert (error.stage, error.step, error.origin.kind) == ("parameter", 2, "parameter")
    assert error.module == "encoder.2" and "encoder.2.weight" in str(error)
    # The present state is poisoned; the one that was kept is put back.
    assert trainer.guard.last_finite is healthy
    assert everything_is_finite(trainer)
    assert_same(trainer.state(), healthy.model)


def test_logvar_of_1e4(trainer):
    trainer.model.encoder[2].bias.data[LATENT] = 1e4
    before = trainer.state()
    error = fail(trainer)
    assert (error.stage, error.tensor) == ("loss", "reconstruction")
    assert (error.origin.name, error.module) == ("operation exp", "Toy")
    assert "guarded.py" in error.origin.line and error.origin.line.endswith("in forward")
    assert error.values["inputs"][0][1] == pytest.approx(5e3, rel=1e-2)
    assert error.cells == [f"cell{i}" for i in range(CELLS)]
    assert_same(trainer.state(), before)
    assert trainer.guard.last_finite.step == 3


def test_theta_to_zero(trainer):
    trainer.model.log_theta.data[3] = -200.0  # exp underflows to 0: lgamma(0) is infinite
    before = trainer.state()
    error = fail(trainer)
    assert (error.stage, error.tensor, error.genes) == ("loss", "reconstruction", ["gene3"])
    assert error.origin.name in ("operation lgamma", "operation log")
    assert error.module is None and error.origin.line.endswith("in loss_terms")
    assert_same(trainer.state(), before)


def test_a_loss_term(trainer):
    trainer.weird_term = lambda value: (value - value.detach()) / 0.0
    before = trainer.state()
    error = fail(trainer)
    assert (error.stage, error.tensor, error.origin.name) == ("loss", "extra", "operation div")
    assert error.module is None and math.isnan(error.values["terms"]["extra"])
    assert math.isfinite(error.values["terms"]["kl"])
    assert_same(trainer.state(), before)


def test_a_gradient_of_an_operation(trainer):
    # sqrt at 0 is finite, its derivative is not: the forward pass shows nothing.
    trainer.weird_term = lambda value: (value - value.detach()).sqrt()
    before = trainer.state()
    error = fail(trainer)
    assert (error.stage, error.origin.kind) == ("gradient", "gradient")
    assert error.origin.name == "gradient of operation Sqrt" and "<lambda>" in error.origin.line
    assert_same(trainer.state(), before)
    assert everything_is_finite(trainer)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_of_one_parameter(trainer, value):
    handle = trainer.model.decoder.weight.register_hook(lambda g: g * value)
    before = trainer.state()
    error = fail(trainer)
    # Clipping by a NaN norm has spread it over every gradient; the second run still knows the first one.
    assert (error.stage, error.tensor, error.module) == ("gradient", "decoder.weight", "decoder")
    assert_same(trainer.state(), before)
    handle.remove()
    trainer.run(2)


@pytest.mark.parametrize("check_every", [1, 10])
def test_a_parameter_after_the_step(trainer, check_every):
    trainer.guard.check_every = check_every
    healthy = trainer.guard.last_finite
    trainer.between[3] = lambda: trainer.model.decoder.bias.data[0].fill_(math.nan)
    error = fail(trainer, steps=2)
    assert (error.stage, error.step) == ("parameter", 3)
    assert (error.tensor, error.module) == ("decoder.bias", "decoder")
    assert_same(trainer.state(), healthy.model)
    assert everything_is_finite(trainer)
    trainer.run(2)


def test_an_operator_of_norm_1e20():
    from cellop_nb.models.energy import grouped_energy_distance

    class Operators(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(3).repeat(2, 1, 1))

        def forward(self, z):
            return z @ self.matrix.mT

    class OperatorToy(ToyTrainer):
        def __init__(self):
            super().__init__()
            self.model = Operators()
            self.optimizer = torch.optim.Adam(self.model.parameters())
            self.guard = NonFiniteGuard(self.model, self.optimizer)
            self.counts = torch.randn(2, 10, 3, generator=self.generator)

        def loss_terms(self, batch):
            moved, target = self.model(batch.counts), batch.counts + 1
            energy = grouped_energy_distance(moved.flatten(0, 1), target.flatten(0, 1), [10, 10], [10, 10])
            excess = (torch.linalg.matrix_norm(self.model.matrix, 2) - 3).clamp_min(0).square()
            return {"energy": energy.mean(), "stability": excess.mean()}

        def describe_batch(self, batch):
            return {"groups": ["B, IFNb", "NK, IFNb"]}

    trainer = OperatorToy().run(2)
    trainer.model.matrix.data[1] *= 1e20
    before = trainer.state()
    error = fail(trainer)
    assert error.stage == "loss" and error.tensor in ("energy", "stability")
    assert error.groups == ["NK, IFNb"]
    assert error.norms["matrix"] == pytest.approx(3**0.5 * 1e20, rel=0.01)
    assert_same(trainer.state(), before)


# -- what is not a fault ---------------------------------------------------------------------------


def test_a_norm_that_overflows_is_not_a_non_finite_gradient(caplog):
    trainer = ToyTrainer(clip=1.0).run(2)
    trainer.model.decoder.weight.register_hook(lambda g: torch.full_like(g, 1e25))
    trainer.run(2)
    assert trainer.guard.overflows == 2 and not trainer.guard.errors
    assert caplog.text.count("overflowed") == 1


def test_but_an_optimiser_that_squares_it_is():
    """Without clipping Adam's second moment overflows, and the parameter would stand still for ever."""
    trainer = ToyTrainer(clip=None).run(2)
    trainer.model.decoder.weight.register_hook(lambda g: torch.full_like(g, 1e25))
    error = fail(trainer)
    assert error.stage == "parameter" and error.tensor == "decoder.weight.exp_avg_sq"
    assert everything_is_finite(trainer)


def test_infinities_that_are_masked_are_not_blamed():
    trainer = ToyTrainer()
    harmless = torch.tensor([0.0, 1.0])
    trainer.weird_term = lambda v: torch.where(harmless > 0, harmless.log(), 0.0).sum() + v / 0.0
    assert fail(trainer).origin.name == "operation div"


def test_of_two_births_in_one_term_the_first_is_told():
    trainer = ToyTrainer()
    trainer.weird_term = lambda value: value / 0.0 + (value * 0).log()
    assert fail(trainer).origin.name == "operation div"


# -- cost ------------------------------------------------------------------------------------------


class CountReads(TorchDispatchMode):
    """Counts how often a value is read from the device, which makes a GPU wait."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func.__name__ in ("_local_scalar_dense.default", "is_nonzero.default")
        return func(*args, **(kwargs or {}))


def test_a_deferred_step_reads_the_device_once():
    trainer = ToyTrainer(deferred=True).run(3)
    terms = trainer.loss_terms(trainer.batch)
    norm = torch.tensor(1.0)
    with CountReads() as counted:
        trainer.guard.before_backward(terms, trainer)
        trainer.guard.after_backward(trainer, norm)
        trainer.guard.after_step(trainer)
    assert counted.reads == 1


def test_the_end_of_an_epoch_sees_the_last_step():
    trainer = ToyTrainer(deferred=True).run(2)
    trainer.model.decoder.bias.data[0] = math.nan
    with pytest.raises(NonFiniteError, match="decoder.bias"):
        trainer.guard.end_of_epoch(trainer)
    assert everything_is_finite(trainer)


def test_an_unknown_policy_is_refused():
    with pytest.raises(CellopError, match="did you mean 'rollback'"):
        ToyTrainer(on_nonfinite="rolback")


def test_a_loop_without_begin_step_works_too():
    trainer = ToyTrainer(calls_begin=False).run(3)
    trainer.counts[1, 1] = math.nan
    assert fail(trainer).cells == ["cell1"]
