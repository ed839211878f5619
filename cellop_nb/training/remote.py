"""What may be asked of a training run from another thread: stop, pause, another learning rate."""

from __future__ import annotations

import asyncio
import math
import threading

import pandas as pd


class RemoteControl:
    """The part of :class:`Trainer` that a notebook's controls talk to; the loop obeys after each step."""

    def __init__(self, lr: float) -> None:
        self.status, self.stop_reason = "idle", ""
        self._base_lr = float(lr)
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
            raise ValueError(
                f"Expected a positive learning rate. Found {value}. To fix it: give a number such as 1e-3."
            )
        self._base_lr = float(value)

    def stop(self, reason: str = "stopped by hand") -> None:
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
        if not self._go.is_set() and not self._stop.is_set():
            self.status = "paused"
            self._go.wait()
            self.status = "running"

    async def fit_async(self, max_epochs: int | None = None) -> pd.DataFrame:
        """Same as :meth:`fit` in a worker thread, so that a notebook's controls keep working meanwhile."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(None, self.fit, max_epochs)
        try:
            # Waking up often lets the kernel's interrupt reach this coroutine.
            while not future.done():
                await asyncio.wait({future}, timeout=0.1)
        except (KeyboardInterrupt, asyncio.CancelledError):
            self.stop("interrupted")
            await asyncio.wait({future})
        return future.result()
