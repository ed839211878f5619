"""What is asked of a trainer while it runs: stop, pause, another rate, an answering notebook."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time

import pytest
from toy import Do, LineTrainer, assert_same_run, weights_of


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
