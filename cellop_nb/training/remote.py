"""What may be asked of a training run from another thread: stop, pause, another learning rate."""

from __future__ import annotations

import asyncio
import contextvars
import math
import queue
import threading
from collections.abc import Callable
from functools import partial

import pandas as pd

from ..errors import LabelError, ModelError, did_you_mean, three_beats

BY_HAND = "stopped by hand", "interrupted"
"""Reasons to stop that a repeated run would not find by itself."""


class RemoteControl:
    """The part of :class:`Trainer` that a notebook's controls talk to; the loop obeys between two steps.

    Attributes
    ----------
    changes
        What was changed by hand, in order: dicts of ``epoch``, ``step`` (steps done before it took effect), ``name``,
        ``value``. :class:`Replay` makes the same changes again.
    """

    # what the trainer that this is a part of has
    epoch: int
    step: int
    max_epochs: int
    fit: Callable[..., pd.DataFrame]
    _call: Callable[..., None]

    def __init__(self, lr: float) -> None:
        self.status, self.stop_reason = "idle", ""
        self.weights: dict[str, float] = {}
        self.changes: list[dict] = []
        self._asked: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        self.learning_rate = lr
        self._stop = threading.Event()
        self._go = threading.Event()
        self._go.set()

    @property
    def learning_rate(self) -> float:
        """Base learning rate; the rate in force is this times the schedule's factor."""
        return self._base_lr

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        if not (value > 0 and math.isfinite(value)):
            raise ModelError(
                three_beats("a positive learning rate", f"{value}", "give a number such as 1e-3")
            )
        self._base_lr = float(value)

    def change(self, name: str, value: float) -> None:
        """Change the learning rate or the weight of a loss term by hand, from the next step on.

        Parameters
        ----------
        name
            ``"learning_rate"``, or a name in ``weights``.
        value
            The new base learning rate (positive) or weight (not negative).

        Raises
        ------
        LabelError
            For a name that nothing here bears.
        ModelError
            For a value that cannot be trained with.
        """
        known = ["learning_rate", *self.weights]
        if name not in known:
            raise LabelError(three_beats("a setting of this training", repr(name), did_you_mean(name, known)))
        value = float(value)
        if not math.isfinite(value) or value < 0 or (value == 0 and name == "learning_rate"):
            fix = "give a finite number above 0 (a weight may be 0)"
            raise ModelError(three_beats(f"a value for {name}", f"{value:g}", fix))
        self._asked.put((name, value))
        if self.status not in ("running", "paused"):
            self._obey()

    def _obey(self) -> None:
        """Make the changes that were asked for; called between steps, so that each is known to the step."""
        while not self._asked.empty():
            name, value = self._asked.get()
            if name == "learning_rate":
                self.learning_rate = value
            else:
                self.weights[name] = value
            self._record(name, value)

    def _record(self, name: str, value: float | str) -> None:
        self.changes.append({"epoch": self.epoch, "step": self.step, "name": name, "value": value})

    def _changes_of_epoch(self) -> dict[str, str]:
        """The history's column of changes by hand; none where nothing was changed."""
        made = [c for c in self.changes if c["epoch"] == self.epoch and c["name"] != "stop"]
        return {"by_hand": "; ".join(self._words_of_changes(made))} if made else {}

    @staticmethod
    def _words_of_changes(made: list[dict]) -> list[str]:
        values = [c["value"] if isinstance(c["value"], str) else f"{c['value']:.4g}" for c in made]
        return [f"{c['name']} {value} after step {c['step']}" for c, value in zip(made, values, strict=True)]

    def stop(self, reason: str = BY_HAND[0]) -> None:
        """End after the current step; the model and the history stay usable."""
        self.stop_reason = reason
        self._stop.set()
        self._go.set()

    def pause(self) -> None:
        """Hold after the current step until :meth:`resume` or :meth:`stop`."""
        self._go.clear()

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._go.set()

    @property
    def ending(self) -> bool:
        """Whether the epoch just finished is the last one."""
        return self._stop.is_set() or self.epoch >= self.max_epochs

    def _hold_while_paused(self) -> None:
        if self._go.is_set() or self._stop.is_set():
            return
        self.status = "paused"
        self._call("on_pause")
        while not self._go.wait(0.2):
            if not self._asked.empty():
                self._obey()
                self._call("on_pause")
        self.status = "running"

    async def fit_async(self, max_epochs: int | None = None, *, resume: bool = False) -> pd.DataFrame:
        """Same as :meth:`fit` in a worker thread, so that a notebook's controls keep working meanwhile."""
        loop = asyncio.get_running_loop()
        # With the cell's context, as in asyncio.to_thread: ipykernel 7.0 publishes nothing from a thread without it.
        fit = partial(contextvars.copy_context().run, self.fit, max_epochs, resume=resume)
        future = loop.run_in_executor(None, fit)
        try:
            # Waking up often lets the kernel's interrupt reach this coroutine.
            while not future.done():
                await asyncio.wait({future}, timeout=0.1)
        except (KeyboardInterrupt, asyncio.CancelledError):
            self.stop("interrupted")
            await asyncio.wait({future})
        return future.result()
