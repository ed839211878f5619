"""After a fault: the reproducer shows it again, and a rollback goes on from the last finite state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cellop_nb.errors import CellopError
from cellop_nb.training.guard import replay

from .guarded import CELLS, LATENT, ToyTrainer, assert_same, everything_is_finite, fail


def test_the_reproducer_shows_the_fault_again(trainer):
    trainer.model.encoder[2].bias.data[LATENT] = 1e4
    error = fail(trainer)
    content = torch.load(error.reproducer, weights_only=True)
    assert content["fault"]["step"] == 3
    again = replay(error.reproducer, ToyTrainer())
    assert (again.tensor, again.module, again.origin.line) == (error.tensor, error.module, error.origin.line)
    assert (again.cells, again.step) == (error.cells, error.step)
    assert not list(error.reproducer.parent.glob("*.part"))


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
        replay(error.reproducer, model=nn.Linear(2, 2), loss_terms=lambda batch: {})
    broken = tmp_path / "broken.pt"
    broken.write_bytes(error.reproducer.read_bytes()[:200])
    with pytest.raises(CellopError, match="Expected a reproducer"):
        replay(broken, trainer)


def test_looking_again_leaves_no_trace(trainer):
    trainer.weird_term = lambda value: value / 0.0
    seen = float(trainer.model.seen)
    fail(trainer)
    assert float(trainer.model.seen) == seen + CELLS  # the faulty step itself, but not the second look


def test_rollback_halves_the_rate_and_goes_on():
    trainer = ToyTrainer(on_nonfinite="rollback").run(3)
    kept = trainer.state()
    trainer.weird_term = lambda value: value / 0.0
    trainer.run(1)
    assert trainer.guard.rollbacks == 1 and trainer.learning_rate == 0.5e-2
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
    assert trainer.guard.rollbacks == 1 and everything_is_finite(trainer)
    handle = trainer.model.decoder.weight.register_hook(lambda g: g * math.nan)
    trainer.run(1)
    handle.remove()
    trainer.run(1)
    assert [error.stage for error in trainer.guard.errors] == ["parameter", "gradient"]
    assert everything_is_finite(trainer)


def test_rollback_is_bounded():
    trainer = ToyTrainer(on_nonfinite="rollback", max_rollbacks=3).run(2)
    trainer.weird_term = lambda value: value / 0.0
    fail(trainer, steps=10)
    assert trainer.guard.rollbacks == 3 and trainer.learning_rate == 1e-2 / 8


def test_nan_in_the_data_is_never_rolled_back():
    trainer = ToyTrainer(on_nonfinite="rollback").run(2)
    trainer.counts[0, 0] = math.nan
    assert fail(trainer).origin.kind == "batch"
    assert trainer.guard.rollbacks == 0


def test_restored_training_repeats_itself_exactly():
    trainer = ToyTrainer().run(4)
    trainer.guard.keep(trainer)
    first = trainer.run(3).state()
    trainer.guard.restore(trainer)
    assert_same(trainer.run(3).state(), first)
