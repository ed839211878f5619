"""The picture of a training: which curves stand where, and how they follow the history.

Drawn on a :class:`Board` in the thread that trains: a picture moves the curves over panels that stand still, and only a
panel whose limits change is painted anew.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from . import style as s
from .board import Board, Box, View

# -- which panels a history asks for

_SKIPPED = {"epoch", "seconds", "step"}
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


def pick_panels(columns: Iterable[str], constant: Container[str] = ()) -> list[Panel]:
    """Panels for a history with these columns: loss, its terms, everything else, energy per group last.

    A new loss term (`train_x`, `val_x`) or any other number gets a panel by itself; numbers of the settings
    (loss weights) only once they change, so `constant` ones are left out.
    """
    names = [str(column) for column in columns]
    groups = tuple((name, match.group(1)) for name in names if (match := _ENERGY_OF_GROUP.match(name)))
    rest = [name for name in names if name not in {name for name, _ in groups} | _SKIPPED]
    terms = list(dict.fromkeys(_term(name) for name in rest if _term(name)))
    terms.sort(key=lambda term: term != "loss")
    panels = [_term_panel(term, rest) for term in terms]
    single = [name for name in rest if not _term(name) and (name in _TITLES or name not in constant)]
    single.sort(key=lambda name: _LAST.index(name) if name in _LAST else -1)
    panels += [Panel(_title(name) + " (weight)" * (name in terms), ((name, name),)) for name in single]
    return panels + ([Panel("energy distance per group (validation)", groups, groups=True)] if groups else [])


def _term(name: str) -> str:
    """`reconstruction` for `train_reconstruction` or `val_reconstruction`, else an empty string."""
    kind, _, term = name.partition("_")
    return term if kind in {"train", "val"} else ""


def _term_panel(term: str, names: Sequence[str]) -> Panel:
    pairs = ((f"{kind}_{term}", label) for kind, label in (("train", "training"), ("val", "validation")))
    return Panel(_title(term), tuple(pair for pair in pairs if pair[0] in names))


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


# -- the numbers


class Columns:
    """Rows as growing columns; a row is read once, however often the picture is drawn.

    Attributes
    ----------
    running
        Numbers of the epoch that runs; they stand behind the rows until the next ones come.
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
        return [
            name for name, past in self.values.items() if np.isfinite(np.asarray(past, dtype=float)).any()
        ]

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
        return (
            self.value if isinstance(self.value, str) else f"{self.name.replace('_', ' ')} {self.value:.3g}"
        )


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


class Dashboard(Board):
    """Panels for a fixed list of columns; `update` moves the curves, `png` draws them.

    Parameters
    ----------
    panels
        What :func:`pick_panels` gives.
    monitor
        Column whose panel has the star of the best epoch, the patience and the names of the changes.
    """

    def __init__(self, panels: Sequence[Panel], *, monitor: str = "val_loss") -> None:
        small = [panel for panel in panels if not panel.groups]
        wide = [panel for panel in panels if panel.groups]
        foot = _HEAD + -(-len(small) // _COLUMNS) * _ROW + _FOOT * bool(small)
        super().__init__(_COLUMNS * _SIDE, foot + _GROUP_ROW * len(wide) + 4)
        self.headline = self.text(9, 13)
        self.views: list[_Curves | _Groups] = []  # type: ignore[assignment]
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


class _View(View):
    """A panel over epochs, and the limits it has now."""

    def __init__(self, board: Board, box: Box, title: str, *, epochs: bool, beside: int = 14) -> None:
        super().__init__(
            board, box, title, "epoch" if epochs else "", below=34 if epochs else 10, beside=beside
        )
        self.ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        self.ax.tick_params(axis="x", labelbottom=epochs)
        self._limits: tuple = ()

    def limit(self, epochs: np.ndarray, values: np.ndarray, *, energy: bool = False) -> None:
        """Choose scale and rounded limits; where they change, the panel is painted anew."""
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        scale, low, high = scale_for(low, high, energy)
        threshold = s.linear_threshold(values) if scale == "symlog" else 0.0
        first, last = (float(epochs[0]), round_up(float(epochs[-1]))) if epochs.size else (0.0, 10.0)
        limits = (scale, threshold, low, high, min(first, 1.0), last)
        if limits == self._limits:
            return
        self._limits = limits
        self.board.stale(self)
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

    def __init__(self, board: Board, box: Box, panel: Panel, monitor: str, *, last_row: bool) -> None:
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

    def __init__(self, board: Board, box: Box, panel: Panel) -> None:
        super().__init__(board, box, panel.title, epochs=True, beside=_SIDE + 14)
        ax = self.ax
        self.columns = [column for column, _ in panel.columns]
        self.names = [name for _, name in panel.columns]
        self.few = len(self.names) <= _MOST_LINES
        count = len(self.names) if self.few else 1 + _WORST
        self.bands = []
        for alpha in () if self.few else (0.10, 0.18):
            band = ax.fill_between(
                [], [], [], color=s.line(0)["color"], alpha=alpha, linewidth=0, animated=True
            )
            self.bands.append(band)
            self.moving.append(band)
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
            low, high = ranked[round(cut * n)], ranked[round((1 - cut) * n)]
            whole = np.isfinite(low) & np.isfinite(high)
            ends = np.append(low[whole], high[whole][::-1])
            band.set_verts([np.column_stack([np.append(epochs[whole], epochs[whole][::-1]), ends])])
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
        self.key(*handles, outside=True)


def _move(line: Line2D, epochs: np.ndarray, values: np.ndarray) -> None:
    """Move a curve; a short one shows its points."""
    whole = np.isfinite(values)
    line.set_data(epochs[whole], values[whole])
    line.set_marker("o" if len(epochs) < 25 else "")


def round_up(last: float) -> float:
    """The next of 10, 15, 20, 30, 40, 60, 80, 100, ...: the axis of epochs grows in few steps."""
    decade = 10.0 ** np.floor(np.log10(max(last, 10.0)))
    return float(next(step * decade for step in (1, 1.5, 2, 3, 4, 6, 8, 10) if step * decade >= last))


def scale_for(low: float, high: float, energy: bool) -> tuple[str, float, float]:
    """Scale and rounded limits: log over a factor of 20, symlog for energies that reach zero, else linear."""
    if low > 0 and high > 20 * low:
        first, last = np.floor(np.log10(low) * 4 - 0.5) / 4, np.ceil(np.log10(high) * 4 + 0.5) / 4
        return "log", float(10**first), float(10**last)
    if energy and high > 0 and low < 0.05 * high:
        bottom = -float(10 ** np.ceil(np.log10(-low))) if low < 0 else 0.0
        return "symlog", bottom, float(10 ** (np.ceil(np.log10(high) * 4) / 4))
    if low == high == 0:
        return "linear", -0.05, 1.0
    span = (high - low) or abs(high)
    decade = 10 ** np.floor(np.log10(span))
    step = decade * (0.25 if span < 4 * decade else 0.5)
    return "linear", float(np.floor(low / step - 0.2) * step), float(np.ceil(high / step + 0.2) * step)
