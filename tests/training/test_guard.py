"""The non-finite guard: planted faults, what is none, what a healthy step pays, and how training goes on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cellop_nb.errors import CellopError, NonFiniteError
from cellop_nb.training.guard import replay

from .guarded import CELLS, LATENT, ToyTrainer, assert_same, everything_is_finite, fail


@pytest.fixture
def trainer(tmp_path):
    """Three healthy steps."""
    return ToyTrainer(folder=tmp_path).run(3)


# -- planted faults --------------------------------------------------------------------------------


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
    trainer.run(2)


def test_logvar_of_1e4(trainer):
    trainer.model.encoder[2].bias.data[LATENT] = 1e4
    before = trainer.state()
    error = fail(trainer)
    assert (error.stage, error.tensor) == ("loss", "reconstruction")
    assert (error.origin.name, error.module) == ("operation exp", "Toy")
    assert "guarded.py" in error.origin.line and error.origin.line.endswith("in forward")
    assert error.origin.inputs[0][1] == pytest.approx(5e3, rel=1e-2)
    assert error.cells == [f"cell{i}" for i in range(CELLS)]
    assert_same(trainer.state(), before)


def test_theta_to_zero(trainer):
    trainer.model.log_theta.data[3] = -200.0  # exp underflows to 0: lgamma(0) is infinite
    error = fail(trainer)
    assert (error.stage, error.tensor, error.genes) == ("loss", "reconstruction", ["gene3"])
    assert error.origin.name in ("operation lgamma", "operation log")
    assert error.module is None and error.origin.line.endswith("in loss_terms")


def test_a_loss_term(trainer):
    trainer.weird_term = lambda value: (value - value.detach()) / 0.0
    error = fail(trainer)
    assert (error.stage, error.tensor, error.origin.name) == ("loss", "extra", "operation div")
    assert error.module is None and math.isnan(error.terms["extra"]) and math.isfinite(error.terms["kl"])


class Root(nn.Module):
    """sqrt at 0 is finite, its derivative is not: the forward pass shows nothing."""

    def forward(self, value):
        return (value - value.detach()).sqrt()


def test_a_gradient_of_an_operation(trainer):
    trainer.model.root = Root()
    trainer.weird_term = trainer.model.root
    before = trainer.state()
    error = fail(trainer)
    assert (error.stage, error.origin.kind, error.module) == ("gradient", "gradient", "root")
    assert error.origin.name == "gradient of operation Sqrt" and error.origin.line.endswith("in forward")
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


def test_infinities_that_are_masked_are_not_blamed():
    trainer = ToyTrainer()
    harmless = torch.tensor([0.0, 1.0])
    trainer.weird_term = lambda v: torch.where(harmless > 0, harmless.log(), 0.0).sum() + v / 0.0
    assert fail(trainer).origin.name == "operation div"


def test_of_two_births_in_one_term_the_first_is_told():
    trainer = ToyTrainer()
    trainer.weird_term = lambda value: value / 0.0 + (value * 0).log()
    assert fail(trainer).origin.name == "operation div"


def test_the_end_of_an_epoch_sees_a_parameter_that_no_loss_has_met(trainer):
    trainer.model.decoder.bias.data[0] = math.nan
    with pytest.raises(NonFiniteError, match="decoder.bias"):
        trainer.guard.end_of_epoch(trainer)
    assert everything_is_finite(trainer)


# -- what is not a fault ---------------------------------------------------------------------------


def test_a_norm_that_overflows_is_not_a_non_finite_gradient(caplog):
    trainer = ToyTrainer(clip=1.0).run(2)
    trainer.model.decoder.weight.register_hook(lambda g: torch.full_like(g, 1e25))
    trainer.run(2)
    assert trainer.guard.overflows == 2
    assert caplog.text.count("overflowed") == 1


def test_but_an_optimiser_that_squares_it_is():
    """Without clipping Adam's second moment overflows, and the parameter would stand still for ever."""
    trainer = ToyTrainer(clip=None).run(2)
    trainer.model.decoder.weight.register_hook(lambda g: torch.full_like(g, 1e25))
    error = fail(trainer)
    assert error.stage == "parameter" and error.tensor.startswith("decoder.weight")
    assert everything_is_finite(trainer)


class CountReads(TorchDispatchMode):
    """Counts how often a value is read from the device, which makes a GPU wait."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func.__name__ in ("_local_scalar_dense.default", "is_nonzero.default")
        return func(*args, **(kwargs or {}))


def test_a_healthy_step_is_read_once_at_most():
    trainer = ToyTrainer().run(3)
    terms, norm = trainer.loss_terms(trainer.batch), torch.tensor(1.0)
    with CountReads() as counted:
        trainer.guard.check(trainer, terms, norm)
        trainer.guard.after_step(trainer)
    assert counted.reads <= 1


def test_an_unknown_policy_is_refused():
    with pytest.raises(CellopError, match="did you mean 'rollback'"):
        ToyTrainer(on_nonfinite="rolback")


# -- after a fault ---------------------------------------------------------------------------------


def test_the_reproducer_shows_the_fault_again(trainer):
    trainer.model.encoder[2].bias.data[LATENT] = 1e4
    seen = float(trainer.model.seen)
    error = fail(trainer)
    assert float(trainer.model.seen) == seen + CELLS  # the faulty step itself, but not the second look
    again = replay(error.reproducer, ToyTrainer())
    assert (again.tensor, again.module, again.origin.line) == (error.tensor, error.module, error.origin.line)
    assert (again.cells, again.step) == (error.cells, error.step)


def test_a_repaired_model_replays_to_nothing(trainer):
    trainer.weird_term = lambda value: value / 0.0
    error = fail(trainer)
    assert replay(error.reproducer, ToyTrainer()) is None


def test_replay_draws_the_same_noise(tmp_path):
    """A fault of one draw in many is found again, because the random state is part of the file."""

    def rare(trainer):
        def term(value):
            drawn = torch.rand((), generator=trainer.generator)
            return value * torch.where(drawn > 0.97, torch.inf, 0.0)

        return term

    trainer = ToyTrainer(folder=tmp_path)
    trainer.weird_term = rare(trainer)
    error = fail(trainer, steps=2000)
    fresh = ToyTrainer()
    fresh.weird_term = rare(fresh)
    assert replay(error.reproducer, fresh).tensor == "extra"


def test_a_damaged_or_foreign_file_is_refused(trainer, tmp_path):
    trainer.counts[0, 0] = math.nan
    error = fail(trainer)
    with pytest.raises(CellopError, match="model of the reproducer"):
        replay(error.reproducer, ToyTrainer(nn.Linear(2, 2)))
    broken = tmp_path / "broken.pt"
    broken.write_bytes(error.reproducer.read_bytes()[:200])
    with pytest.raises(CellopError, match="Expected a reproducer"):
        replay(broken, trainer)


def test_rollback_halves_the_rate_and_goes_on():
    trainer = ToyTrainer(on_nonfinite="rollback").run(3)
    kept = trainer.state()
    trainer.weird_term = lambda value: value / 0.0
    trainer.run(1)
    assert len(trainer.guard.rolled_back) == 1 and trainer.learning_rate == 0.5e-2
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5e-2
    assert_same(trainer.state(), kept)
    trainer.weird_term = lambda value: value * 0
    trainer.run(3)
    assert everything_is_finite(trainer)
    with pytest.raises(AssertionError):
        assert_same(trainer.state(), kept)


def test_rollback_from_a_poisoned_parameter_and_gradient():
    trainer = ToyTrainer(on_nonfinite="rollback").run(3)
    trainer.between[3] = lambda: trainer.model.decoder.bias.data.fill_(math.nan)
    trainer.run(2)
    assert len(trainer.guard.rolled_back) == 1 and everything_is_finite(trainer)
    handle = trainer.model.decoder.weight.register_hook(lambda g: g * math.nan)
    trainer.run(1)
    handle.remove()
    trainer.run(1)
    reasons = [one["reason"] for one in trainer.guard.rolled_back]
    assert reasons == ["parameter 'decoder.bias'", "gradient 'decoder.weight'"]
    assert everything_is_finite(trainer)


def test_rollback_is_bounded():
    trainer = ToyTrainer(on_nonfinite="rollback").run(2)
    trainer.weird_term = lambda value: value / 0.0
    fail(trainer, steps=10)
    assert len(trainer.guard.rolled_back) == 5 and trainer.learning_rate == 1e-2 / 32


def test_nan_in_the_data_is_never_rolled_back():
    trainer = ToyTrainer(on_nonfinite="rollback").run(2)
    trainer.counts[0, 0] = math.nan
    assert fail(trainer).origin.kind == "batch"
    assert not trainer.guard.rolled_back


def test_restored_training_repeats_itself_exactly():
    trainer = ToyTrainer().run(4)
    trainer.guard.keep(trainer)
    first = trainer.run(3).state()
    trainer.guard.last_finite.restore(trainer.model, trainer.optimizer, trainer)
    assert_same(trainer.run(3).state(), first)
