"""The loop: seeded, obedient while it runs, and resumed exactly."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from toy import Do, Line, LineTrainer, assert_same_run, comparable, weights_of

from cellop_nb.errors import CheckpointError, DataError
from cellop_nb.training.callbacks import Callback, EarlyStopping, HistoryCSV, ProgressBar, SaveCheckpoints
from cellop_nb.training.guard import NonFiniteError
from cellop_nb.training.loop import half_cosine


def wait_until(condition):
    """Poll; a condition that never comes is a failure, not a hang."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def in_thread(trainer):
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    return thread


def interrupt(trainer):
    raise KeyboardInterrupt


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


# -- requests while it runs -------------------------------------------------------------------------------


def test_stop_from_another_thread_keeps_what_was_learned():
    started = threading.Event()
    trainer = LineTrainer(max_epochs=100_000, callbacks=[Do(lambda t: started.set(), epoch=1)])
    thread = in_thread(trainer)
    assert started.wait(30)
    trainer.stop("enough")
    thread.join(30)
    assert (trainer.status, trainer.stop_reason) == ("stopped", "enough")
    assert 2 <= len(trainer.rows) < 100_000
    assert trainer.history["val_loss"].min() == trainer.best_value


def test_pause_holds_and_resume_goes_on_as_if_nothing_had_been():
    trainer = LineTrainer(callbacks=[Do(lambda t: t.pause(), step=6)])
    thread = in_thread(trainer)
    wait_until(lambda: trainer.status == "paused")
    assert trainer.step == 6
    trainer.resume()
    thread.join(30)
    assert trainer.status == "finished"
    plain = LineTrainer()
    plain.fit()
    assert_same_run(trainer, plain)


def test_stop_ends_a_pause():
    trainer = LineTrainer(callbacks=[Do(lambda t: t.pause(), step=2)])
    thread = in_thread(trainer)
    wait_until(lambda: trainer.status == "paused")
    trainer.stop()
    thread.join(30)
    assert (trainer.status, trainer.step) == ("stopped", 2)


def test_a_learning_rate_changed_while_running_is_in_force_and_in_the_history():
    def change(trainer):
        trainer.learning_rate = 1e-9

    trainer = LineTrainer(max_epochs=4, callbacks=[Do(change, epoch=1)])
    lrs = trainer.fit()["lr"]
    assert (lrs[:2] > 1e-3).all()
    assert (lrs[2:] <= 1e-9).all()
    assert trainer.history["val_loss"][3] == pytest.approx(trainer.history["val_loss"][1], rel=1e-4)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_learning_rate_must_be_positive(value):
    with pytest.raises(ValueError, match="positive learning rate.*To fix it"):
        LineTrainer().learning_rate = value


def test_a_weight_changed_while_running_is_in_the_history():
    trainer = LineTrainer(callbacks=[Do(lambda t: t.weights.update(ridge=5.0), epoch=2)])
    assert trainer.fit()["ridge"].tolist() == [0.01] * 3 + [5.0] * 3


def test_fit_async_lets_the_notebook_answer():
    async def notebook():
        trainer = LineTrainer(max_epochs=100_000)
        task = asyncio.create_task(trainer.fit_async())
        while len(trainer.rows) < 2:
            await asyncio.sleep(0.01)  # this very line is the notebook staying alive
        trainer.stop()
        return trainer, await task

    trainer, history = asyncio.run(notebook())
    assert trainer.status == "stopped"
    assert len(history) == len(trainer.rows) >= 2


def test_fit_async_gives_the_history_and_the_same_numbers():
    trainer, plain = LineTrainer(), LineTrainer()
    history = asyncio.run(trainer.fit_async())
    plain.fit()
    assert len(history) == 6
    assert_same_run(trainer, plain)


def test_fit_async_works_in_the_context_of_its_cell():
    """ipykernel 7.0 knows the cell by a context variable alone, and publishes nothing without it."""
    cell, seen = contextvars.ContextVar("cell"), []
    cell.set("this one")
    trainer = LineTrainer(max_epochs=1, callbacks=[Do(lambda _: seen.append(cell.get("none")), step=1)])
    asyncio.run(trainer.fit_async())
    assert seen == ["this one"]


def test_cancelling_fit_async_stops_the_run():
    async def notebook():
        trainer = LineTrainer(max_epochs=100_000)
        task = asyncio.create_task(trainer.fit_async())
        while not trainer.rows:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        return trainer

    trainer = asyncio.run(notebook())
    assert (trainer.status, trainer.stop_reason) == ("stopped", "interrupted")


def test_fit_async_raises_what_training_raised():
    def fail(trainer):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        asyncio.run(LineTrainer(callbacks=[Do(fail, step=2)]).fit_async())


def test_an_interrupt_leaves_a_usable_model_that_goes_on():
    trainer = LineTrainer(callbacks=[Do(interrupt, step=10)])
    history = trainer.fit()
    assert (trainer.status, trainer.stop_reason) == ("stopped", "interrupted")
    assert len(history) == 2
    assert all(value.isfinite().all() for value in weights_of(trainer).values())
    assert len(trainer.fit()) == 6
    assert trainer.status == "finished"


def test_an_interrupted_pause_does_not_hold_the_next_fit():
    trainer = LineTrainer(callbacks=[Do(lambda t: (t.pause(), interrupt(t)), step=2)])
    trainer.fit()
    thread = in_thread(trainer)
    thread.join(30)
    assert trainer.status == "finished"


# -- the best state ---------------------------------------------------------------------------------------


def test_early_stopping_waits_and_the_best_state_is_put_back():
    seen = []
    record = Do(lambda t: seen.append(weights_of(t)), epoch=2)
    script = [5.0, 4.0, 1.0, 2.0, 1.5, 1.2, 0.1, 0.1]
    trainer = LineTrainer(scripted=script, max_epochs=8, callbacks=[record, EarlyStopping(3)])
    history = trainer.fit()
    assert len(history) == 6  # epochs 3, 4, 5 did not improve on epoch 2
    assert (trainer.status, trainer.best_epoch, trainer.best_value) == ("stopped", 2, 1.0)
    assert "val_loss has not improved for 3 epochs" in trainer.stop_reason
    assert torch.equal(trainer.model.slope, seen[0]["slope"])


def test_small_improvements_can_be_ignored():
    script = [1.0, 0.99, 0.98, 0.97, 0.96, 0.95]
    trainer = LineTrainer(scripted=script, callbacks=[EarlyStopping(2, min_delta=0.1)])
    assert len(trainer.fit()) == 3


def test_a_validation_loss_of_nan_is_never_the_best():
    trainer = LineTrainer(scripted=[float("nan"), 2.0, float("nan")], max_epochs=3)
    trainer.fit()
    assert trainer.best_epoch == 1


# -- callbacks --------------------------------------------------------------------------------------------


class Recorder(Callback):
    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer):
        self.seen.append(f"start {trainer.status}")

    def on_step_end(self, trainer):
        self.seen.append("step")

    def on_epoch_end(self, trainer, row):
        assert trainer.rows[-1] is row
        self.seen.append(f"epoch {row['epoch']}")

    def on_exception(self, trainer, error):
        self.seen.append(f"error {error} {trainer.status}")

    def on_fit_end(self, trainer):
        self.seen.append(f"end {trainer.status}")


def test_hooks_are_called_in_order():
    recorder = Recorder()
    LineTrainer(max_epochs=2, steps=2, callbacks=[recorder]).fit()
    epochs = ["step", "step", "epoch 0", "step", "step", "epoch 1"]
    assert recorder.seen == ["start running", *epochs, "end finished"]


def test_hooks_hear_of_an_error_before_it_is_raised():
    def fail(trainer):
        raise RuntimeError("boom")

    recorder = Recorder()
    trainer = LineTrainer(max_epochs=2, callbacks=[recorder, Do(fail, step=2)])
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit()
    assert recorder.seen == ["start running", "step", "step", "error boom failed", "end failed"]
    assert (trainer.status, trainer.stop_reason) == ("failed", "boom")


def test_an_error_at_the_start_is_heard_too():
    class Bad(Callback):
        def on_fit_start(self, trainer):
            raise RuntimeError("boom")

    recorder = Recorder()
    trainer = LineTrainer(callbacks=[recorder, Bad()])
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit()
    assert recorder.seen == ["start running", "error boom failed", "end failed"]


def test_the_last_step_hears_the_loss_terms():
    heard = {}
    LineTrainer(max_epochs=1, callbacks=[Do(lambda t: heard.update(t.terms), step=2)]).fit()
    assert set(heard) == {"error", "ridge"}
    assert not heard["error"].requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: Callback(),
        lambda folder: EarlyStopping(100),
        lambda folder: ProgressBar(),
        lambda folder: HistoryCSV(folder / "deep" / "history.csv"),
        lambda folder: SaveCheckpoints(folder / "deep", every=2),
    ],
    ids=["Callback", "EarlyStopping", "ProgressBar", "HistoryCSV", "SaveCheckpoints"],
)
def test_a_callback_changes_nothing_in_the_run(make, tmp_path):
    """The contract of a callback: it may look and write, and can serve two runs."""
    plain, watched = LineTrainer(), LineTrainer(callbacks=[make(tmp_path)])
    plain.fit()
    watched.fit(3)
    watched = LineTrainer(callbacks=[*watched.callbacks])
    watched.fit()
    assert_same_run(plain, watched)


def test_the_history_file_is_the_history(tmp_path):
    trainer = LineTrainer(folder=tmp_path)
    pd.testing.assert_frame_equal(trainer.fit(), pd.read_csv(tmp_path / "history.csv"))
    assert not list(tmp_path.glob("*.part"))


def test_a_progress_bar_is_on_by_default():
    assert any(isinstance(callback, ProgressBar) for callback in LineTrainer(progress=True).callbacks)


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
    class Spiky(LineTrainer):
        def loss_terms(self, batch):
            terms = super().loss_terms(batch)
            spike = self.step == 6 and self.learning_rate == 0.1
            return terms | {"error": terms["error"] / 0} if spike else terms

    trainer = Spiky(on_nonfinite="rollback")
    history = trainer.fit()
    assert trainer.learning_rate == 0.05
    assert len(history) == 6
    assert history.map(math.isfinite).all(axis=None)


# -- checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_resumed_run_equals_one_that_was_never_interrupted(tmp_path, where):
    plain = LineTrainer(seed=1)
    plain.fit()
    kept = []
    LineTrainer(
        seed=1,
        callbacks=[
            Do(lambda t: kept.append(t.state()), epoch=2),
            Do(lambda t: t.save_checkpoint(tmp_path / "three.pt"), epoch=2),
        ],
    ).fit()
    resumed = LineTrainer(Line(seed=5), seed=8, lr=9.0)
    if where == "file":
        resumed.load_checkpoint(tmp_path / "three.pt")
    else:
        resumed.load_state(kept[0])
    assert resumed.epoch == 3
    resumed.fit()
    assert_same_run(plain, resumed)


def test_last_and_best_checkpoints_are_kept(tmp_path):
    script = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    seen = []
    LineTrainer(
        scripted=script, folder=tmp_path, callbacks=[Do(lambda t: seen.append(weights_of(t)), epoch=1)]
    ).fit()
    best, last = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (2, 6)
    assert torch.equal(best["model"]["slope"], seen[0]["slope"])
    assert torch.equal(last["best_model"]["slope"], seen[0]["slope"])


def test_a_last_checkpoint_is_written_when_the_run_ends_between_two(tmp_path):
    LineTrainer(max_epochs=4, callbacks=[SaveCheckpoints(tmp_path, every=3)]).fit()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 4


def test_numbers_of_numpy_do_not_break_a_checkpoint(tmp_path):
    trainer = LineTrainer(lr=np.float64(0.1), weight_decay=np.float64(0.1))
    trainer.weights["ridge"] = np.float64(0.5)
    trainer.fit(1)
    LineTrainer().load_checkpoint(trainer.save_checkpoint(tmp_path / "one.pt"))


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    trainer = LineTrainer()
    path = trainer.save_checkpoint(tmp_path / "last.pt")
    before = path.read_bytes()

    def half(state, where):
        where.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"half a file", "cut"])
def test_a_damaged_or_missing_checkpoint_is_refused(tmp_path, content):
    path = LineTrainer().save_checkpoint(tmp_path / "last.pt")
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-200] if content == "cut" else content)
    with pytest.raises(CheckpointError, match="a checkpoint of this Line.*last.pt.*To fix it"):
        LineTrainer().load_checkpoint(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"model": {"weight": torch.ones(2)}}, path)
    with pytest.raises(CheckpointError, match="names and sizes of the run"):
        LineTrainer().load_checkpoint(path)


def test_a_second_fit_goes_on_where_the_first_ended():
    trainer = LineTrainer()
    trainer.fit(2)
    assert comparable(trainer)["epoch"].tolist() == [0, 1]
    assert trainer.fit(4)["epoch"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("scale", [0.0, 0.1, 100.0, math.nan])
def test_clipping_is_that_of_torch(scale):
    from cellop_nb.training.clip import clip_gradients

    pair = []
    for clip in (torch.nn.utils.clip_grad_norm_, clip_gradients):
        parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
        parameters[0].grad = scale * torch.arange(3.0)
        pair.append((clip(parameters, 1.0), parameters[0].grad, parameters[1].grad))
    for expected, found in zip(*pair, strict=True):
        assert (expected is None and found is None) or torch.equal(
            expected.nan_to_num(-1), found.nan_to_num(-1)
        )
