"""The loop: its history, seeds and rate; what is not finite, and the length of a gradient."""

from __future__ import annotations

import logging
import math

import pandas as pd
import pytest
import torch
from toy import Do, LineTrainer, assert_same_run

from cellop_nb.errors import DataError, NonFiniteError
from cellop_nb.training import loop
from cellop_nb.training.loop import Machine, half_cosine

# -- history and seeds ------------------------------------------------------------------------------------


def test_history_has_one_row_per_epoch_with_the_agreed_columns():
    trainer = LineTrainer()
    history = trainer.fit()
    assert isinstance(history, pd.DataFrame)
    assert history["epoch"].tolist() == list(range(6))
    agreed = [
        "epoch",
        "seconds",
        "lr",
        "cells_per_s",
        "grad_norm",
        "train_loss",
        "train_error",
        "train_ridge",
    ]
    assert list(history.columns) == [*agreed, "ridge", "val_loss"]
    assert (trainer.epoch, trainer.step, trainer.status) == (6, 24, "finished")


def test_loss_is_the_sum_of_its_terms_and_falls():
    history = LineTrainer(max_epochs=30).fit()
    torch.testing.assert_close(
        torch.tensor(history["train_loss"]), torch.tensor(history["train_error"] + history["train_ridge"])
    )
    assert history["val_loss"].iloc[-1] < 0.1 * history["val_loss"].iloc[0]


def test_equal_seeds_give_bit_equal_runs_whatever_was_drawn_before():
    one = LineTrainer(seed=3)
    one.fit()
    torch.manual_seed(12345)
    two = LineTrainer(seed=3)
    two.fit()
    assert_same_run(one, two)


def test_other_seeds_give_other_runs():
    one, two = LineTrainer(seed=3), LineTrainer(seed=4)
    assert not one.fit()["train_loss"].equals(two.fit()["train_loss"])


def test_fit_leaves_the_global_randomness_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    LineTrainer().fit()
    assert torch.equal(torch.rand(1), expected)


def test_frozen_parameters_are_never_touched():
    trainer = LineTrainer(weight_decay=0.5)
    trainer.fit()
    assert torch.equal(trainer.model.frozen, torch.ones(2))
    assert trainer.model.frozen.grad is None


def test_the_rate_falls_along_half_a_cosine():
    assert half_cosine(0, 10) == 1
    assert half_cosine(5, 10) == pytest.approx((1 + 0.02) / 2)
    assert half_cosine(10, 10) == half_cosine(99, 10) == pytest.approx(0.02)
    lrs = LineTrainer().fit()["lr"]
    expected = [0.1 * (0.02 + 0.98 * (1 + math.cos(math.pi * (4 * e + 3) / 24)) / 2) for e in range(6)]
    assert lrs.tolist() == pytest.approx(expected)


def test_gradients_are_clipped():
    step = []
    trainer = LineTrainer(
        clip_norm=1e-3, callbacks=[Do(lambda t: step.append(t.model.slope.grad.norm()), step=1)]
    )
    trainer.fit(1)
    assert step[0] <= 1.001e-3


def test_no_batches_is_an_error_not_an_endless_loop():
    with pytest.raises(DataError, match="at least one batch"):
        LineTrainer(steps=0).fit()


def test_a_validation_loss_of_nan_is_never_the_best():
    trainer = LineTrainer(scripted=[float("nan"), 2.0, float("nan")], max_epochs=3)
    trainer.fit()
    assert trainer.best_epoch == 1


# -- the guard --------------------------------------------------------------------------------------------


def poison(trainer):
    trainer.y[:] = float("nan")


def test_a_loss_that_is_not_finite_stops_at_once_with_a_finite_model():
    trainer = LineTrainer(callbacks=[Do(poison, step=6)])
    with pytest.raises(NonFiniteError, match="error"):
        trainer.fit()
    assert (trainer.status, trainer.step, len(trainer.rows)) == ("failed", 6, 1)
    assert trainer.model.slope.isfinite().all()


def test_rollback_goes_on_with_half_the_rate():
    weights = {}

    class Spiky(LineTrainer):
        def loss_terms(self, batch):
            weights[self.step] = self.model.slope.detach().clone()
            terms = super().loss_terms(batch)
            spike = self.step == 6 and self.learning_rate == 0.1
            return terms | {"error": terms["error"] / 0} if spike else terms

    trainer = Spiky(on_nonfinite="rollback")
    history = trainer.fit()
    assert torch.equal(weights[7], weights[6]), (
        "back to the state before the faulty step, and to no earlier one"
    )
    assert not torch.equal(weights[6], weights[5])
    assert trainer.learning_rate == 0.05
    assert trainer.guard.rolled_back == [
        {"epoch": 1, "step": 6, "back_to": 5, "learning_rate": 0.05, "reason": "loss 'error'"}
    ]
    said = ["", "loss 'error' in step 6: back to step 5, learning rate 0.05", "", "", "", ""]
    assert history["rollback"].fillna("").tolist() == said
    assert trainer.summary()["rollbacks"] == trainer.state()["rollbacks"] == trainer.guard.rolled_back
    again = LineTrainer()
    again.load_state(trainer.state())
    assert len(again.guard.rolled_back) == 1
    assert len(history) == 6
    assert history.drop(columns="rollback").map(math.isfinite).all(axis=None)


@pytest.mark.parametrize("scale", [0.0, 0.1, 100.0, math.nan])
def test_clipping_is_that_of_torch(scale):
    from cellop_nb.training.loop import clip_gradients

    pair = []
    for clip in (torch.nn.utils.clip_grad_norm_, clip_gradients):
        parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
        parameters[0].grad = scale * torch.arange(3.0)
        pair.append((clip(parameters, 1.0), parameters[0].grad, parameters[1].grad))
    for expected, found in zip(*pair, strict=True):
        assert (expected is None and found is None) or torch.equal(
            expected.nan_to_num(-1), found.nan_to_num(-1)
        )


def test_auto_is_a_device_that_has_float64(monkeypatch):
    """Lightning's own choice on a Mac would be MPS, which has none."""
    asked, plain = {}, loop.Fabric
    monkeypatch.setattr(loop, "Fabric", lambda **given: asked.update(given) or plain(**given))
    LineTrainer(machine=Machine())
    assert asked["accelerator"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_trainer_is_made_without_a_word(caplog):
    """Lightning would tell that bfloat16 was asked for, on stderr of every notebook."""
    log = logging.getLogger("lightning_fabric")
    before = log.level
    log.addHandler(caplog.handler)
    try:
        LineTrainer(machine=Machine(precision="bf16-mixed"))
    finally:
        log.removeHandler(caplog.handler)
    assert caplog.messages == [] and log.level == before


def test_dropout_is_another_in_each_epoch_and_process():
    def drawn(epoch, rank, seed=1):
        trainer = LineTrainer(seed=seed)
        trainer.epoch, trainer.processes.rank = epoch, rank
        with trainer._own_randomness():
            return torch.rand(4)

    assert torch.equal(drawn(0, 0), drawn(0, 0))
    draws = [drawn(0, 0), drawn(1, 0), drawn(2, 0), drawn(0, 1), drawn(1, 1), drawn(0, 0, seed=2)]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_processes_draw_noise_of_their_own_and_cells_in_one_order(monkeypatch):
    first = LineTrainer(seed=1)

    class Second(loop.Processes):
        def __init__(self, fabric):
            super().__init__(fabric)
            self.rank = 1

    monkeypatch.setattr(loop, "Processes", Second)
    second = LineTrainer(seed=1)
    assert not torch.equal(first.generator.get_state(), second.generator.get_state())
    assert torch.equal(first.cpu_generator.get_state(), second.cpu_generator.get_state())
