"""Watch a training while it runs: one picture, drawn often enough to be alive and rarely enough to cost nothing.

As a callback of our trainers, of Lightning and of scvi-tools, or fed with rows of any training. The picture is drawn by
Agg, without pyplot, in the thread that trains: it moves the curves over panels that stand still, and only a panel whose
limits change is painted anew.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image as Pixels

from ..files import write_whole
from ..training.callbacks import Callback
from . import style as s

log = logging.getLogger("cellop_nb")

A_MINUTE = 60.0
"""Seconds: a shorter training may spend as much on pictures as one of this length."""
_SOON = 0.3  # seconds until the first picture: what ends before gets the last one alone
_OF_THE_TIME = 6.0  # while a training is young, the next picture comes after this part of its time
_MOST_REST = 1.5  # an old one rests so many times as long as the budget asks for

# -- which panels a history asks for

_SKIPPED = {"epoch", "seconds", "step"}
_KINDS = {"train": "training", "val": "validation"}
_ENERGY_OF_GROUP = re.compile(r"^(?:val_|train_)?energy\[(.*)\]$")
_TITLES = {
    "loss": "loss (sum of terms)",
    "reconstruction": "reconstruction (nats per cell)",
    "kl": "KL (nats per cell)",
    "energy": "energy (mean of groups)",
    "grad_norm": "gradient norm",
    "operator_norm": "largest operator norm",
    "lr": "learning rate",
    "cells_per_s": "cells per second",
}
_LAST = ("grad_norm", "operator_norm", "lr", "cells_per_s")


@dataclass(frozen=True)
class Panel:
    """One panel: `columns` maps a column of the history to the name of its line."""

    title: str
    columns: tuple[tuple[str, str], ...]
    groups: bool = False


def pick_panels(columns: Iterable[str], constant: Iterable[str] = ()) -> list[Panel]:
    """Panels for a history with these columns: loss, its terms, everything else, energy per group last.

    A new loss term (`train_x`, `val_x`) or any other number gets a panel by itself; numbers of the settings
    (loss weights) only once they change, so `constant` ones are left out.
    """
    groups: list[tuple[str, str]] = []
    terms: dict[str, list[tuple[str, str]]] = {}
    single = []
    for name in map(str, columns):
        kind, _, term = name.partition("_")
        if match := _ENERGY_OF_GROUP.match(name):
            groups.append((name, match.group(1)))
        elif kind in _KINDS and term:
            terms.setdefault(term, []).append((name, _KINDS[kind]))
        elif name in _TITLES or name not in {*constant, *_SKIPPED}:
            single.append(name)
    single.sort(key=lambda name: _LAST.index(name) if name in _LAST else -1)
    panels = [Panel(_title(term), tuple(terms[term])) for term in sorted(terms, key=lambda t: t != "loss")]
    panels += [Panel(_title(name) + " (weight)" * (name in terms), ((name, name),)) for name in single]
    if groups:
        panels.append(Panel("energy distance per group (validation)", tuple(groups), groups=True))
    return panels


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


# -- the numbers


class Columns:
    """Rows as growing columns; a row is read once, however often the picture is drawn.

    Numbers of the epoch that is `running` stand behind the rows until the next ones come.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.running: Mapping[str, float] = {}
        self.n_rows = 0

    def extend(
        self, rows: Sequence[Mapping[str, object]], running: Mapping[str, float] | None = None
    ) -> None:
        """Append the rows that are new; a shorter list starts again."""
        if len(rows) < self.n_rows:
            self.values, self.n_rows = {}, 0
        for row in rows[self.n_rows :]:
            for name in row:
                self.values.setdefault(name, [np.nan] * self.n_rows)
            for name, past in self.values.items():
                past.append(_number(row.get(name)))
            self.n_rows += 1
        self.running = running or {}

    def __getitem__(self, name: str) -> np.ndarray:
        past = np.asarray(self.values[name], dtype=float)
        return np.append(past, self.running.get(name, np.nan)) if self.running else past

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def names(self) -> list[str]:
        """Columns that hold at least one finite number."""
        return [name for name, past in self.values.items() if np.isfinite(past).any()]

    def constant(self) -> set[str]:
        """Columns whose finite values are all the same."""
        return {name for name in self.names() if np.unique(self[name][np.isfinite(self[name])]).size == 1}

    def epochs(self) -> np.ndarray:
        """The running epoch numbers, or 0, 1, ... where the rows do not say."""
        return self["epoch"] if "epoch" in self else np.arange(self.n_rows + bool(self.running), dtype=float)

    def best_epoch(self, monitor: str) -> float | None:
        """Epoch of the smallest finite value of `monitor`; None where there is none."""
        if monitor not in self.names():
            return None
        values = np.asarray(self.values[monitor], dtype=float)
        return float(self.epochs()[np.nanargmin(np.where(np.isfinite(values), values, np.nan))])

    def default_monitor(self) -> str:
        """`val_loss`, else `train_loss`, whichever holds numbers."""
        return "val_loss" if "val_loss" in self.names() else "train_loss"


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


# -- what was changed by hand


@dataclass(frozen=True)
class Change:
    """One mark: `at`, the epochs done until then (parts of one count), and the setting's new value."""

    at: float
    name: str
    value: float | str

    @property
    def text(self) -> str:
        """The change as it is written beside its mark."""
        is_text = isinstance(self.value, str)
        return str(self.value) if is_text else f"{self.name.replace('_', ' ')} {self.value:.3g}"


def changes_of_trainer(trainer: object) -> list[Change]:
    """What `trainer.changes` records, at its steps."""
    changes = getattr(trainer, "changes", None) or []
    per_epoch = getattr(trainer, "steps_per_epoch", None)
    steps = per_epoch() if changes and callable(per_epoch) else 0
    return joined(
        Change(c["step"] / steps if steps else c["epoch"] + 0.5, c["name"], c["value"]) for c in changes
    )


def changes_of_history(rows: Sequence[Mapping[str, object]]) -> list[Change]:
    """What the history's column `by_hand` tells; it knows the epoch, not where in it."""
    return joined(
        Change(_number(row.get("epoch", i)) + 0.5, name, float(value))
        for i, row in enumerate(rows)
        for name, value in re.findall(r"(\S+) (\S+) after step \d+", str(row.get("by_hand", "")))
    )


def joined(changes: Iterable[Change]) -> list[Change]:
    """Presses that follow each other within half an epoch are one change, to the last value."""
    kept: list[Change] = []
    for change in changes:
        if kept and kept[-1].name == change.name and change.at - kept[-1].at <= 0.5:
            kept.pop()
        kept.append(change)
    return kept


# -- the picture


@dataclass(frozen=True)
class Marks:
    """What a dashboard marks besides the curves; `best_epoch` as the history counts, from zero."""

    headline: str = ""
    monitor: str = "val_loss"
    best_epoch: float | None = None
    patience: int | None = None
    floors: Mapping[str, float] = field(default_factory=dict)
    changes: Sequence[Change] = ()


_SIDE, _HEAD, _ROW, _FOOT, _GROUP_ROW = 256, 46, 130, 34, 212  # pixels of the page
_COLUMNS, _MOST_LINES, _WORST, _MOST_CHANGES = 3, 6, 3, 3
_LOOKS = {
    "training": {"color": s.INK, "linestyle": "-"},
    "validation": {"color": s.VERMILION, "linestyle": "--"},
}
_STAR = {"marker": "*", "color": s.GREEN, "markersize": 9, "linestyle": ""}
_HAND = {"marker": "^", "color": s.PURPLE, "markersize": 6, "linestyle": ""}


Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels of the page, from the figure's top left corner."""


class Dashboard:
    """Panels (:func:`pick_panels`): `update` moves the curves, and `png` draws them at twice the size of the page.

    The panel of the column `monitor` has the star of the best epoch, the patience and the names of the changes. What
    stands still (`ground`; None where it is to be painted anew) is painted once, and what moves is laid over it.
    """

    def __init__(self, panels: Sequence[Panel], *, monitor: str = "val_loss") -> None:
        small = [panel for panel in panels if not panel.groups]
        wide = [panel for panel in panels if panel.groups]
        foot = _HEAD + -(-len(small) // _COLUMNS) * _ROW + _FOOT * bool(small)
        self.width, self.height = _COLUMNS * _SIDE, foot + _GROUP_ROW * len(wide) + 4
        size = (self.width / s.DPI, self.height / s.DPI)
        self.figure = s.NotebookFigure(figsize=size, dpi=2 * s.DPI, facecolor="white")
        self.canvas, self.ground = FigureCanvasAgg(self.figure), None
        words = {"fontsize": s.TEXT, "color": s.INK, "va": "center", "fontfamily": s.families()}
        self.headline = self.figure.text(9 / self.width, 1 - 13 / self.height, "", animated=True)
        self.headline.update(words)
        self.views: list[_Curves | _Groups] = []
        self.stale: list[_View] = []
        for i, panel in enumerate(small):
            box = (i % _COLUMNS * _SIDE + 50, _HEAD + i // _COLUMNS * _ROW + 24, _SIDE - 64, _ROW - 38)
            _Curves(self, box, panel, monitor, last_row=i + _COLUMNS >= len(small))
        for panel in wide:
            _Groups(self, (50, foot + 26, 2 * _SIDE - 64, _GROUP_ROW - 64), panel)
        self._explained: bool | None = None

    def update(self, columns: Columns, marks: Marks) -> None:
        """Move every curve to the values in `columns`."""
        self.headline.set_text(s.safe(marks.headline, 130))
        done = columns.epochs() + 1  # people count from one
        for view in self.views:
            view.update(done, columns, marks)
        if self._explained != bool(marks.changes):
            self._explain(bool(marks.changes))

    def png(self, *, small: bool = False) -> bytes:
        """The picture as PNG; `small` takes longer for fewer bytes, for the picture that stays in the notebook."""
        canvas = self.canvas
        if self.ground is None:
            canvas.draw()
            self.ground = canvas.copy_from_bbox(self.figure.bbox)
        else:
            canvas.restore_region(self.ground)
            self._repaint()
        self.stale = []
        for view in self.views:
            for artist in view.moving:
                view.ax.draw_artist(artist)
        self.figure.draw_artist(self.headline)
        picture, file = Pixels.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), BytesIO()
        if small:
            return s.small_png(picture)
        picture.save(file, format="png", compress_level=1)
        return file.getvalue()

    def _repaint(self) -> None:
        """Paint stale panels, the others stay as they are."""
        if not self.stale:
            return
        pixels = np.asarray(self.canvas.buffer_rgba())
        for view in dict.fromkeys(self.stale):
            left, top, right, low = (2 * max(edge, 0) for edge in view.place)
            pixels[top:low, left:right] = 255
            view.ax.draw(self.canvas.get_renderer())
        self.ground = self.canvas.copy_from_bbox(self.figure.bbox)

    def _explain(self, changed: bool) -> None:
        """The styles of lines and marks, once below the headline."""
        self._explained, self.ground = changed, None
        view = next((view for view in self.views if isinstance(view, _Curves) and view.monitored), None)
        if view is None:
            return
        handles: list = [s.sample(name, _curve(look)) for name, look in view.looks.items()]
        handles += [s.sample("best epoch", _STAR)]
        handles += [Patch(color=s.GREEN, alpha=0.15, linewidth=0, label="patience")]
        handles += [s.sample("changed by hand", _HAND)] * changed
        for old in self.figure.legends:
            old.remove()
        corner = (0.003, 1 - 21 / self.height)
        s.legend(
            self.figure, *handles, columns=len(handles), frameon=False, loc="upper left", bbox_to_anchor=corner,
            columnspacing=1.4,
        )  # fmt: skip


def _curve(look: Mapping[str, Any]) -> dict[str, Any]:
    return {"linewidth": 1.4, "markersize": 3, **look}


class _View:
    """A panel over epochs, the artists in it that move, and the limits it has now.

    `beside` are pixels to the right of the axes that belong to it.
    """

    def __init__(self, board: Dashboard, box: Box, title: str, *, epochs: bool, beside: int = 14) -> None:
        (left, top, width, height), w, h = box, board.width, board.height
        self.board, self.moving = board, list[Any]()
        self.place = (left - 50, top - 22, left + width + beside, top + height + (34 if epochs else 10))
        bounds = (left / w, 1 - (top + height) / h, width / w, height / h)
        self.ax: Axes = s.plain_axes(board.figure.add_axes(bounds))
        style = {"fontsize": s.TEXT, "color": s.INK, "fontfamily": s.families()}
        self.ax.set_title(title, loc="left", pad=4, y=1.0).update(style)
        self.ax.set_xlabel("epoch" if epochs else "", fontsize=s.SMALL, color=s.INK)
        # fixed positions: to find them, matplotlib would measure every tick
        self.ax.xaxis.set_label_coords(0.5, -20 / height)
        self.ax.yaxis.set_label_coords(-8 / width, 0.5)
        self.ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        self.ax.tick_params(axis="x", labelbottom=epochs)
        self._limits: tuple = ()
        board.views.append(self)  # type: ignore[arg-type]

    def line(self, look: Mapping[str, Any] = MappingProxyType({}), **style: Any) -> Line2D:
        """A line that moves."""
        (line,) = self.ax.plot([], [], animated=True)
        line.update({**look, **style})
        self.moving.append(line)
        return line

    def text(self, x: float, y: float, **style: Any) -> Text:
        """Words that move."""
        text = self.ax.text(x, y, "", animated=True, fontsize=s.SMALL, color=s.INK, fontfamily=s.families())
        text.update(style)
        self.moving.append(text)
        return text

    def limit(self, epochs: np.ndarray, values: np.ndarray, *, energy: bool = False) -> None:
        """Choose scale and rounded limits; where they change, the panel is painted anew."""
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        scale, low, high = scale_for(low, high, energy)
        threshold = s.linear_threshold(values) if scale == "symlog" else 0.0
        first, last = (float(epochs[0]), float(epochs[-1])) if epochs.size else (0.0, 10.0)
        limits = (scale, threshold, low, high, min(first, 1.0), s.rounded(max(last, 10.0)))
        if limits == self._limits:
            return
        self._limits = limits
        self.board.stale.append(self)
        if scale == "symlog":
            s.energy_scale(self.ax, values, "y")
            self.ax.yaxis.get_major_locator().set_params(numticks=5)
        else:
            self.ax.set_yscale(scale)
        self.ax.set(xlim=limits[-2:], ylim=(low, high))
        if scale == "linear":
            s.few_ticks(self.ax, "y", 3)
        elif scale == "log":
            s.log_ticks(self.ax, "y", 4)


class _Curves(_View):
    """Training solid, validation dashed; best epoch starred; changes by hand marked at the axis.

    Where the monitored column is shown, patience is shaded and the last changes are named.
    """

    def __init__(self, board: Dashboard, box: Box, panel: Panel, monitor: str, *, last_row: bool) -> None:
        super().__init__(board, box, s.safe(panel.title, 34), epochs=last_row)
        ax = self.ax
        self.monitor, self.monitored = monitor, monitor in dict(panel.columns)
        across = ax.get_xaxis_transform()
        self.band = Rectangle(
            (0, 0), 0, 1, transform=across, color=s.GREEN, alpha=0.15, linewidth=0, animated=True
        )
        self.moving.append(ax.add_patch(self.band))
        self.best = self.line(color=s.GREEN, linestyle=":", linewidth=1.2, transform=across)
        self.looks = {name: _LOOKS.get(name, _LOOKS["training"]) for _, name in panel.columns}
        self.lines = {column: self.line(_curve(self.looks[name])) for column, name in panel.columns}
        self.star = self.line(_STAR)
        self.hand = self.line(_HAND, transform=across, clip_on=False)
        self.named = [
            self.text(0, 0.98 - 0.14 * i, va="top", transform=across)
            for i in range(_MOST_CHANGES * self.monitored)
        ]

    def update(self, epochs: np.ndarray, columns: Columns, marks: Marks) -> None:
        shown = [columns[column] for column in self.lines]
        self.limit(epochs, np.concatenate(shown))
        for line, values in zip(self.lines.values(), shown, strict=True):
            _move(line, epochs, values)
        best = None if marks.best_epoch is None else marks.best_epoch + 1
        self.best.set_data([] if best is None else [best] * 2, [] if best is None else [0, 1])
        if self.monitored:
            here = np.flatnonzero(epochs == best) if best is not None else []
            self.star.set_data(epochs[here], columns[self.monitor][here])
            end = self.ax.get_xlim()[1]
            self.band.set_x(best or 0)
            self.band.set_width(0 if best is None else min(marks.patience or 0, max(end - best, 0)))
        self._mark_changes(marks.changes)

    def _mark_changes(self, changes: Sequence[Change]) -> None:
        """A tick for each change at its step; the last ones are named, each on a line of its own."""
        first, last = self.ax.get_xlim()
        at = np.clip([change.at for change in changes], first, last)
        self.hand.set_data(at, np.full(len(changes), 0.03))
        shown = list(zip(at, changes, strict=True))[-len(self.named) or len(changes) :]
        for i, text in enumerate(self.named):
            text.set_text(s.safe(shown[i][1].text, 26) if i < len(shown) else "")
            if i < len(shown):
                text.set(x=shown[i][0], ha="right" if shown[i][0] > (first + last) / 2 else "left")


class _Groups(_View):
    """Energy distance per group with its floor: each group when few, else median, bands and the worst."""

    def __init__(self, board: Dashboard, box: Box, panel: Panel) -> None:
        super().__init__(board, box, panel.title, epochs=True, beside=_SIDE + 14)
        ax = self.ax
        self.columns = [column for column, _ in panel.columns]
        self.names = [name for _, name in panel.columns]
        self.few = len(self.names) <= _MOST_LINES
        count = len(self.names) if self.few else 1 + _WORST
        self.bands = []
        for alpha in () if self.few else (0.10, 0.18):
            colour = s.line(0)["color"]
            self.bands.append(
                ax.fill_between([], [], [], color=colour, alpha=alpha, linewidth=0, animated=True)
            )
        self.moving += self.bands
        dotted = {"linestyle": (0, (1, 2)), "linewidth": 1.0, "transform": ax.get_yaxis_transform()}
        self.floors = [self.line(dotted, color=s.line(i)["color"]) for i in range(count)]
        self.lines = [self.line(_curve(s.line(i))) for i in range(count)]
        self._names_shown: list[str] = []

    def update(self, epochs: np.ndarray, columns: Columns, marks: Marks) -> None:
        values = np.stack([columns[column] for column in self.columns])
        floors = np.array([marks.floors.get(name, np.nan) for name in self.names], dtype=float)
        self.limit(epochs, np.concatenate([values.ravel(), floors]), energy=True)
        shown, labels, levels = (values, self.names, floors)
        if not self.few:
            shown, labels, levels = self._summary(epochs, values, floors, columns.n_rows - 1)
        for line, floor, y, level in zip(self.lines, self.floors, shown, levels, strict=True):
            _move(line, epochs, y)
            floor.set_data([0, 1], [level, level])
        self._write_key(labels, bool(np.isfinite(levels).any()))

    def _summary(self, epochs: np.ndarray, values: np.ndarray, floors: np.ndarray, last: int):
        """Median over groups, and the groups that ended furthest above their floor."""
        ranked, n = np.sort(values, axis=0), len(values) - 1  # a NaN sorts to the top and leaves a gap
        for band, cut in zip(self.bands, (0.0, 0.1), strict=True):
            band.set_data(epochs, ranked[round(cut * n)], ranked[round((1 - cut) * n)])
        excess = values[:, last] - np.nan_to_num(floors)
        worst = np.argsort(-np.nan_to_num(excess, nan=-np.inf), kind="stable")[:_WORST]
        typical = np.median(floors[np.isfinite(floors)]) if np.isfinite(floors).any() else np.nan
        labels = [f"median of {n + 1} (bands: 80 %, all)", *(self.names[i] for i in worst)]
        return np.vstack([ranked[n // 2], values[worst]]), labels, np.array([typical, *floors[worst]])

    def _write_key(self, labels: Sequence[str], floors: bool) -> None:
        """Names beside the panel."""
        names = [*(s.safe(label, 34) for label in labels), *["split-half noise floor"] * floors]
        if names == self._names_shown:
            return
        self._names_shown = names
        handles = [s.sample(name, _curve(s.line(i))) for i, name in enumerate(names[: len(labels)])]
        dotted = {"color": s.INK, "linestyle": (0, (1, 2)), "linewidth": 1.0}
        handles += [s.sample(names[-1], dotted)] * floors
        for text in s.legend(self.ax, *handles, outside=True, handlelength=1.2).get_texts():
            text.set_fontfamily(s.families())
        self.board.stale.append(self)


def _move(line: Line2D, epochs: np.ndarray, values: np.ndarray) -> None:
    """Move a curve; a short one shows its points."""
    whole = np.isfinite(values)
    line.set_data(epochs[whole], values[whole])
    line.set_marker("o" if len(epochs) < 25 else "")


def scale_for(low: float, high: float, energy: bool) -> tuple[str, float, float]:
    """Scale and rounded limits: log over a factor of 20, symlog for energies that reach zero, else linear."""
    if low > 0 and high > 20 * low:
        first, last = np.floor(np.log10(low) * 4 - 0.5) / 4, np.ceil(np.log10(high) * 4 + 0.5) / 4
        return "log", float(10**first), float(10**last)
    if energy and high > 0 and low < 0.05 * high:
        bottom = -float(10 ** np.ceil(np.log10(-low))) if low < 0 else 0.0
        return "symlog", bottom, float(10 ** (np.ceil(np.log10(high) * 4) / 4))
    if high - low <= 2e-3 * max(
        -low, high
    ):  # constant, or so nearly that ticks of four digits would read alike
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    ticks = MaxNLocator(4).tick_values(low, high)
    return "linear", float(ticks[0]), float(ticks[-1])


# -- the callback


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
        affordable = self.cost_seconds + 2 * self._last_cost <= allowed
        return affordable and now - self._last >= max(self.every, rest)

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
        marks = Marks(self.headline, monitor, best, patience, floors, changes_of_trainer(source))
        board.update(self.columns, marks)
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
            text.append(f"{s.compact(float(f'{rate:.2g}'))} cells/s")
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
            handle.update(Image(picture, format="png", width=8 * s.DPI, alt=alt))

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
        self.patience = getattr(stopper, "patience", None)


def _lightning_bases() -> tuple[type, ...]:
    """Callback classes of the packages in use: a trainer takes only those of its own."""
    packages = ("lightning.pytorch", "pytorch_lightning")
    for name in packages:
        if not any(package in sys.modules for package in packages):
            with suppress(ImportError):
                import_module(name)
    loaded = [sys.modules[name].Callback for name in packages if name in sys.modules]
    return tuple(loaded) or (object,)


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
