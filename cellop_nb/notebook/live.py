"""Watch a training while it runs: one picture, drawn often enough to be alive and rarely enough to cost nothing.

As a callback of our trainers, of Lightning and of scvi-tools, or fed with rows of any training.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..files import write_whole
from ..training.callbacks import Callback
from .curves import Columns, Dashboard, Marks, changes_of_trainer, pick_panels
from .style import DPI, compact

log = logging.getLogger("cellop_nb")

A_MINUTE = 60.0
"""Seconds: a shorter training may spend as much on pictures as one of this length."""
_SOON = 0.3  # seconds until the first picture: what ends before gets the last one alone
_OF_THE_TIME = 6.0  # while a training is young, the next picture comes after this part of its time
_MOST_REST = 1.5  # an old one rests so many times as long as the budget asks for


class LivePlot(Callback):
    """A picture of the history, updated in place while training runs; the last one stays in the notebook.

    Panels follow from the columns of the history: loss and its terms (training and validation), gradient
    norm, operator norm, learning rate, energy distance per group against its floor, and any other number. What
    was changed by hand is marked at its step, with the name of the setting. The first picture comes with the first
    steps, before the first epoch is over.
    Give it to a trainer as a callback, or call :meth:`update` with rows of any kind and :meth:`finish` at
    the end. Outside a notebook nothing is shown; with `path` the picture goes to a file.

    Parameters
    ----------
    path
        PNG file for the picture, replaced as a whole at each drawing.
    every
        Seconds between drawings, at least.
    budget
        Largest part of the training time that drawing may take; a training of less than a minute may spend what one of
        a minute may: 1.2 seconds.
    monitor
        Column whose minimum is the best epoch; that of the trainer, else `val_loss`, else `train_loss`.
    clock
        Seconds as a function, for tests.
    publish
        Takes each picture (PNG bytes) instead of the notebook.

    Attributes
    ----------
    cost_seconds
        Time spent drawing since the training began.
    n_drawn
        Pictures drawn.
    picture
        The last picture, PNG, twice as large as its place on the page.
    headline
        What stands above the curves.
    """

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        every: float = 0.7,
        budget: float = 0.02,
        monitor: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        publish: Callable[[bytes], None] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.every, self.budget, self.monitor = every, budget, monitor
        self._clock, self._own_outlet = clock, publish
        self._requested, self._lock = threading.Event(), threading.RLock()
        self._begin()

    def _begin(self) -> None:
        self.columns, self.picture, self.headline = Columns(), b"", ""
        self.cost_seconds, self.n_drawn = 0.0, 0
        self._board: Dashboard | None = None
        self._board_key: tuple = ()
        self._start = self._last = self._last_row = self._clock()
        self._end: float | None = None
        self._last_cost = 0.0
        self._first_steps: list[dict[str, float]] = []
        self._durations: list[float] = []
        self._outlets: list[Callable[[bytes], None]] | None = None
        self._requested.clear()

    # -- as a callback

    def on_fit_start(self, trainer) -> None:
        """Take a place in the cell that runs; later pictures go there from any thread."""
        getattr(trainer, "floors", None)  # computed on first use: not while a picture is drawn
        self._begin()
        if not getattr(getattr(trainer, "fabric", None), "is_global_zero", True):
            self._outlets = []  # one picture, not one per process
        elif self._ready() and trainer.rows:
            self._draw(trainer, trainer.rows)

    def on_step_end(self, trainer) -> None:
        """Draw if it is time, or when asked to."""
        if self._requested.is_set() or self._due():
            self._draw(trainer, trainer.rows)

    def on_epoch_end(self, trainer, row: dict) -> None:
        """Draw if it is time."""
        now = self._clock()
        self._durations.append(now - self._last_row)
        self._last_row = now
        self.on_step_end(trainer)

    def on_fit_end(self, trainer) -> None:
        """Draw the picture that stays."""
        self.finish(trainer.rows, source=trainer)

    # -- for any other source of rows

    def update(self, rows: Sequence[Mapping[str, object]], *, source: object | None = None) -> None:
        """Show `rows`, all of them so far, if it is time to draw.

        Parameters
        ----------
        rows
            One mapping of column to number per epoch (a DataFrame's `to_dict("records")` will do).
        source
            Object whose `max_epochs`, `patience` and `floors` are shown where it has them.
        """
        if self._outlets is None or self._end is not None:  # the first rows, or another training
            self._begin()
            self._ready()
        if self._requested.is_set() or self._due():
            self._draw(source, rows)

    def finish(self, rows: Sequence[Mapping[str, object]], *, source: object | None = None) -> None:
        """Draw the last picture of rows given to :meth:`update`."""
        self._end = self._clock()
        self._draw(source, rows, last=True)

    def draw_now(self, trainer: Any = None) -> None:
        """Ask for a picture: drawn by the training at the end of its step, or here if `trainer` rests."""
        self._requested.set()
        if trainer is not None and getattr(trainer, "status", "running") != "running":
            self._draw(trainer, trainer.rows)

    @property
    def share(self) -> float:
        """Part of the training time that went into drawing, the last picture included."""
        return self.cost_seconds / max((self._end or self._clock()) - self._start, 1e-9)

    # -- drawing

    def _due(self) -> bool:
        """Not too soon after the last picture, and with enough of the budget left for this one and the last."""
        now = self._clock()
        elapsed = now - self._start
        if self.n_drawn == 0:
            return elapsed >= min(_SOON, self.every)
        rest = min(elapsed / _OF_THE_TIME, _MOST_REST * self._last_cost / self.budget)
        allowed = self.budget * max(elapsed, A_MINUTE)
        return (
            now - self._last >= max(self.every, rest) and self.cost_seconds + 2 * self._last_cost <= allowed
        )

    def _draw(self, source, rows: Sequence[Mapping], *, last: bool = False) -> None:
        with self._lock:
            self._requested.clear()
            running = {} if last else _running(source, len(rows))
            if not self._ready() or not (rows or running):
                return
            start = self._clock()
            built = self._safely(self._render, source, list(rows), running, last)
            now = self._clock()
            # a dashboard is made twice in a training: its cost says little about the next picture
            self._last_cost = (now - start) / (3.0 if built else 1.0)
            self.cost_seconds += now - start
            self._last, self.n_drawn = now, self.n_drawn + 1

    def _render(self, source, rows: list[Mapping], running: dict[str, float], last: bool) -> bool:
        """Bring the dashboard up to date and publish it; whether it had to be made anew."""
        if rows and self._first_steps:  # the first epoch is over: its mean stands for its steps
            self.columns, self._first_steps = Columns(), []
        if rows:
            self.columns.extend(rows, running)
        else:
            self._first_steps.append(running)
            self.columns.extend(self._first_steps)
        monitor = self.monitor or getattr(source, "monitor", None) or self.columns.default_monitor()
        panels = pick_panels(self.columns.names(), self.columns.constant())
        key = (monitor, *panels)
        board, built = self._board, key != self._board_key
        if board is None or built:
            board = Dashboard(panels, monitor=monitor)
            self._board, self._board_key = board, key
        patience = getattr(source, "patience", None)
        best = self.columns.best_epoch(monitor) if rows else None
        self.headline = self._headline(source, rows, monitor, best, patience, last)
        floors = getattr(source, "floors", None) or {}
        board.update(
            self.columns, Marks(self.headline, monitor, best, patience, floors, changes_of_trainer(source))
        )
        self._publish(board.png(small=last))
        return built

    def _headline(
        self, source, rows: list[Mapping], monitor: str, best: float | None, patience: int | None, last: bool
    ) -> str:
        total, step = getattr(source, "max_epochs", None), getattr(source, "step", None)
        status = getattr(source, "status", "finished" if last else "running")
        done = float(self.columns.epochs()[len(rows) - 1] + 1) if rows else 0.0
        text = [(f"epoch {done:g}" if rows else "first epoch") + (f" of {total}" if total else "")]
        if status != "running":
            text.insert(0, status)
        elif step:
            text[0] += f", step {step:,}"
        if best is not None:
            value = self.columns[monitor][np.flatnonzero(self.columns.epochs() == best)[0]]
            text.append(f"best {best + 1:g} ({monitor} {value:.4g})")
            if patience:
                text.append(f"patience {done - 1 - best:g} of {patience}")
        if rows and "cells_per_s" in self.columns:
            rate = self.columns.values["cells_per_s"][-1]
            text.append(f"{compact(float(f'{rate:.2g}'))} cells/s")
        text.append(self._time_left(done, total, last))
        return " | ".join(part for part in text if part)

    def _time_left(self, done: float, total: int | None, last: bool) -> str:
        if last:
            return duration((self._end or self._clock()) - self._start)
        if not total or not self._durations:
            return ""
        return f"{duration(float(np.median(self._durations[-10:])) * max(total - done, 0))} left"

    # -- where pictures go

    def _ready(self) -> bool:
        if self._outlets is None:
            outlets = [self._own_outlet or self._notebook(), self._write_file if self.path else None]
            self._outlets = [outlet for outlet in outlets if outlet is not None]
        return bool(self._outlets)

    def _publish(self, picture: bytes) -> None:
        self.picture = picture
        for outlet in self._outlets or ():
            outlet(picture)

    def _write_file(self, picture: bytes) -> None:
        write_whole(cast(Path, self.path), lambda part: part.write_bytes(picture))

    def _notebook(self) -> Callable[[bytes], None] | None:
        """Shows pictures in place in the running cell; None where there is no notebook to show them in."""
        if "IPython" not in sys.modules:
            return None
        from IPython import get_ipython

        if not hasattr(get_ipython(), "kernel"):  # a terminal would print the object's name
            return None
        from IPython.display import Image, Markdown, display

        handle = display(Markdown("training: the first steps are running"), display_id=True)

        def show(picture: bytes) -> None:
            alt = f"training curves; the numbers are in the history table; {self.headline}"
            handle.update(Image(picture, format="png", width=8 * DPI, alt=alt))

        return show

    def _safely(self, draw: Callable, *args):
        """A picture must never end a training: say once what went wrong, and draw no more."""
        try:
            return draw(*args)
        except Exception:
            log.warning("LivePlot could not draw and stays silent from now on.", exc_info=True)
            self._outlets = []
            return False


def _running(source: Any, n_rows: int) -> dict[str, float]:
    """The loss terms of a trainer's last step as a row within the epoch that runs; empty where nothing is known."""
    terms, per_epoch = getattr(source, "terms", None), getattr(source, "steps_per_epoch", None)
    if not terms or not callable(per_epoch):
        return {}
    epochs = source.step / per_epoch()
    if epochs <= n_rows:  # an epoch is just over
        return {}
    losses = {f"train_{name}": float(value) for name, value in terms.items()}
    return {"epoch": epochs - 1, "train_loss": sum(losses.values()), **losses}


def duration(seconds: float) -> str:
    """Seconds in words: 0.8 s, 12 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# -- Lightning, and what is built on it (scvi-tools)


def lightning_callback(live: LivePlot):
    """A Lightning callback that shows `trainer.callback_metrics` of each epoch.

    Works for `lightning`, `pytorch_lightning`, and ``model.train(callbacks=[...])`` of scvi-tools. Patience is shown
    where the trainer stops early. Without either package it is a plain object with the same hooks.

    Returns
    -------
    A callback whose `rows` holds one row per epoch.
    """

    class LightningLive(*_lightning_bases()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.live = live
            self.rows: list[dict] = []

        def on_train_start(self, trainer, module) -> None:
            self.rows = []
            self.live.update(self.rows, source=_LightningRun(trainer))

        def on_train_epoch_end(self, trainer, module) -> None:
            row = {"epoch": getattr(trainer, "current_epoch", len(self.rows))}
            self.rows.append(row | row_from_metrics(trainer.callback_metrics))
            self.live.update(self.rows, source=_LightningRun(trainer))

        def on_train_end(self, trainer, module) -> None:
            self.live.finish(self.rows, source=_LightningRun(trainer, "finished"))

        def on_exception(self, trainer, module, exception) -> None:
            status = "stopped" if isinstance(exception, KeyboardInterrupt) else "failed"
            self.live.finish(self.rows, source=_LightningRun(trainer, status))

    return LightningLive()


class _LightningRun:
    """What a picture asks about a training, answered by a Lightning trainer."""

    def __init__(self, trainer, status: str = "running") -> None:
        stopper = getattr(trainer, "early_stopping_callback", None)
        most = getattr(trainer, "max_epochs", None)
        self.status, self.step = status, getattr(trainer, "global_step", None)
        self.max_epochs = most if most and most > 0 else None  # -1: without end
        self.monitor = None if stopper is None else _column(stopper.monitor)
        self.patience = None if stopper is None else stopper.patience


def _lightning_bases() -> tuple[type, ...]:
    """Callback classes of the packages in use: a trainer takes only those of its own."""
    packages = ("lightning.pytorch", "pytorch_lightning")
    loaded = [sys.modules[name].Callback for name in packages if name in sys.modules]
    if loaded:
        return tuple(loaded)
    for name in packages:
        try:
            return (import_module(name).Callback,)
        except ImportError:
            continue
    return (object,)


def row_from_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metric names as columns of our history: `elbo_validation` and `val_elbo_epoch` become `val_elbo`.

    Per-step values are left out.
    """
    return {_column(name): float(value) for name, value in metrics.items() if not name.endswith("_step")}


def _column(name: str) -> str:
    name = name.removesuffix("_epoch")
    for word, kind in (("validation", "val"), ("valid", "val"), ("val", "val"), ("train", "train")):
        if name.startswith(f"{word}_"):
            return f"{kind}_{name.removeprefix(f'{word}_')}"
        if name.endswith(f"_{word}"):
            return f"{kind}_{name.removesuffix(f'_{word}')}"
    return name
