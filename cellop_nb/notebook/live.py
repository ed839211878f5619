"""Watch a training while it runs: one picture that is drawn rarely enough to cost nothing."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellop_nb.files import write_whole
from cellop_nb.notebook.figures import changes
from cellop_nb.notebook.figures.dashboard import Dashboard, Marks
from cellop_nb.notebook.figures.panels import Columns, pick_panels
from cellop_nb.notebook.figures.sheet import Sheet
from cellop_nb.notebook.figures.training import best_epoch, default_monitor
from cellop_nb.notebook.style import compact
from cellop_nb.training.callbacks import Callback

log = logging.getLogger("cellop_nb")


FIRST_COST = 0.2
"""Seconds that a picture is taken to cost before one was drawn; more on a machine that is slow or busy just now."""
_OF_A_LINE = 20
"""A picture costs about so many times as much as one line of text does."""


class LivePlot(Callback):
    """A picture of the history, updated in place while training runs; the last one stays in the notebook.

    Panels follow from the columns of the history: loss and its terms (training and validation), gradient
    norm, operator norm, learning rate, energy distance per group against its floor, and any other number. What
    was changed by hand is marked at its step, with the name of the setting.
    Give it to a trainer as a callback, or call :meth:`update` with rows of any kind and :meth:`finish` at
    the end. Outside a notebook nothing is shown; with `path` the picture goes to a file.

    Parameters
    ----------
    path
        PNG file for the picture, replaced as a whole at each drawing.
    every
        Seconds between drawings, at least.
    budget
        Largest part of the training time that drawing may take. The first picture comes with the first
        epoch and the last at the end; what they cost is saved in between.
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
        The last picture, PNG.
    """

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        every: float = 0.5,
        budget: float = 0.02,
        monitor: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        publish: Callable[[bytes], None] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.every, self.budget, self.monitor = every, budget, monitor
        self._clock, self._given_publish = clock, publish
        self._wanted, self._lock = threading.Event(), threading.RLock()
        self._begin()

    def _begin(self) -> None:
        self.columns, self.picture = Columns(), b""
        self.cost_seconds, self.n_drawn = 0.0, 0
        self._board: Dashboard | None = None
        self._board_key: tuple = ()
        self._start = self._last = self._last_row = self._clock()
        self._end: float | None = None
        self._expected = float("inf")  # seconds of the whole training, as far as they can be told
        self._first_cost = self._last_cost = FIRST_COST
        self._durations: list[float] = []
        self._outlets: list[Callable[[bytes], None]] | None = None
        self._wanted.clear()

    # -- as a callback

    def on_fit_start(self, trainer) -> None:
        """Take a place in the cell that runs; later pictures go there from any thread."""
        getattr(trainer, "floors", None)  # computed on first use: not while a picture is drawn
        self._begin()
        if not getattr(getattr(trainer, "fabric", None), "is_global_zero", True):
            self._outlets = []  # one picture, not one per process
        elif trainer.rows:
            self._draw(trainer, trainer.rows)
        else:
            self._safely(self._wait_for_first_row)

    def on_step_end(self, trainer) -> None:
        """Draw when asked to, and now and then during a long epoch, so that the step count moves."""
        if self._wanted.is_set() or (
            self._clock() - self._last_row > 2 and self._due() and self.columns.n_rows
        ):
            self._draw(trainer, trainer.rows)

    def on_epoch_end(self, trainer, row: dict) -> None:
        """Draw if it is time."""
        now = self._clock()
        self._durations.append(now - self._last_row)
        self._last_row = now
        per_epoch = (now - self._start) / len(self._durations)
        self._expected = per_epoch * (getattr(trainer, "max_epochs", None) or float("inf"))
        if self._wanted.is_set() or self._due():
            self._draw(trainer, trainer.rows)

    def on_fit_end(self, trainer) -> None:
        """Draw the picture that stays."""
        self._end = self._clock()
        self._draw(trainer, trainer.rows, last=True)

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
        if self._due() or self._wanted.is_set():
            self._draw(source, rows)

    def finish(self, rows: Sequence[Mapping[str, object]], *, source: object | None = None) -> None:
        """Draw the last picture of rows given to :meth:`update`."""
        self._end = self._clock()
        self._draw(source, rows, last=True)

    def draw_now(self, trainer: Any = None) -> None:
        """Ask for a picture: drawn by the training at the end of its step, or here if `trainer` rests."""
        self._wanted.set()
        if trainer is not None and getattr(trainer, "status", "running") != "running":
            self._draw(trainer, trainer.rows)

    @property
    def share(self) -> float:
        """Part of the training time that went into drawing, the last picture included."""
        return self.cost_seconds / max((self._end or self._clock()) - self._start, 1e-9)

    # -- drawing

    def _due(self) -> bool:
        """Not too soon after the last drawing, and with enough of the budget left for the one at the end."""
        now = self._clock()
        if self.n_drawn == 0:  # a run too short to afford two pictures gets the last one
            return self.budget * self._expected >= 2 * self._first_cost
        rested = now - self._last >= max(self.every, self._last_cost / self.budget)
        return rested and self.cost_seconds + 2 * self._last_cost <= self.budget * (now - self._start)

    def _draw(self, source, rows: Sequence[Mapping], *, last: bool = False) -> None:
        with self._lock:
            self._wanted.clear()
            if not self._ready() or not rows:
                return
            start = self._clock()
            built = self._safely(self._render, source, list(rows), last)
            now = self._clock()
            # a dashboard is made once or twice in a training: its cost says little about the next picture
            self._last_cost = (now - start) / (3.0 if built else 1.0)
            self.cost_seconds += now - start
            self._last, self.n_drawn = now, self.n_drawn + 1

    def _render(self, source, rows: list[Mapping], last: bool) -> bool:
        """Bring the dashboard up to date and publish it; whether it had to be made anew."""
        self.columns.extend(rows)
        monitor = self.monitor or getattr(source, "monitor", None) or default_monitor(self.columns)
        panels = pick_panels(self.columns.names(), self.columns.constant())
        key = (monitor, *panels)
        board, built = self._board, key != self._board_key
        if board is None or built:
            board = Dashboard(panels, monitor=monitor)
            self._board, self._board_key = board, key
        board.update(self.columns, self._marks(source, monitor, last))
        self._publish(board.png(small=last))
        return built

    def _marks(self, source, monitor: str, last: bool) -> Marks:
        patience = getattr(source, "patience", None)
        best = best_epoch(self.columns, monitor)
        words = self._headline(source, monitor, best, patience, last)
        floors, made = getattr(source, "floors", None) or {}, changes.of_trainer(source)
        return Marks(words, monitor, best, patience, floors, made)

    def _headline(self, source, monitor: str, best: float | None, patience: int | None, last: bool) -> str:
        epochs, total = self.columns.epochs(), getattr(source, "max_epochs", None)
        status = getattr(source, "status", "finished" if last else "running")
        words = [f"epoch {epochs[-1] + 1:g}" + (f" of {total}" if total else "")]
        if status != "running":
            words.insert(0, status)
        elif step := getattr(source, "step", None):
            words[0] += f", step {step:,}"
        if best is not None:
            value = self.columns[monitor][np.flatnonzero(epochs == best)[0]]
            words.append(f"best {best + 1:g} ({monitor} {value:.4g})")
            if patience:
                words.append(f"patience {epochs[-1] - best:g} of {patience}")
        if "cells_per_s" in self.columns:
            rate = self.columns["cells_per_s"][-1]
            words.append(f"{compact(float(f'{rate:.2g}'))} cells/s")
        words.append(self._time_words(epochs[-1] + 1, total, last))
        return " | ".join(word for word in words if word)

    def _time_words(self, done: float, total: int | None, last: bool) -> str:
        if last:
            return duration((self._end or self._clock()) - self._start)
        if not total or not self._durations:
            return ""
        return f"{duration(float(np.median(self._durations[-10:])) * max(total - done, 0))} left"

    # -- where pictures go

    def _ready(self) -> bool:
        if self._outlets is None:
            outlets = [self._given_publish or _notebook(), self._write_file if self.path else None]
            self._outlets = [outlet for outlet in outlets if outlet is not None]
        return bool(self._outlets)

    def _publish(self, picture: bytes) -> None:
        self.picture = picture
        for outlet in self._outlets or ():
            outlet(picture)

    def _write_file(self, picture: bytes) -> None:
        write_whole(self.path, lambda part: part.write_bytes(picture))

    def _wait_for_first_row(self) -> None:
        if self._ready():
            start = self._clock()
            sheet = Sheet(768, 26)
            sheet.text(9, 13, "training: the first epoch is running")
            self._publish(sheet.png())
            spent = self._clock() - start
            self.cost_seconds += spent
            self._first_cost = max(FIRST_COST, _OF_A_LINE * spent)

    def _safely(self, draw: Callable, *args):
        """A picture must never end a training: say once what went wrong, and draw no more."""
        try:
            return draw(*args)
        except Exception:
            log.warning("LivePlot could not draw and stays silent from now on.", exc_info=True)
            self._outlets = []
            return False


def duration(seconds: float) -> str:
    """Seconds in words: 0.8 s, 12 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _notebook() -> Callable[[bytes], None] | None:
    """Shows pictures in place in the running cell; None where there is no notebook to show them in."""
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    if not hasattr(get_ipython(), "kernel"):  # a terminal would print the object's name
        return None
    from IPython.display import Image, display

    words = "training curves; the numbers are in the history table"
    handle = None

    def show(picture: bytes) -> None:
        nonlocal handle
        image = Image(picture, format="png", alt=words)
        if handle is None:
            handle = display(image, display_id=True)
        else:
            handle.update(image)

    return show
