"""The picture of a training: which curves stand where, and how they follow the history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.collections import PolyCollection

from cellop_nb.notebook.figures.changes import Change
from cellop_nb.notebook.figures.panels import Columns, Panel
from cellop_nb.notebook.figures.sheet import Plot, Sheet

from .. import style as s

# pixels
_SIDE, _HEAD, _ROW, _FOOT, _GROUP_ROW = 256, 46, 130, 34, 212
_COLUMNS, _MOST_LINES, _WORST, _MOST_CHANGES = 3, 6, 3, 3
_BEST = s.CATEGORIES[2]


@dataclass(frozen=True)
class Marks:
    """What a dashboard marks besides the curves; `best_epoch` as the history counts, from zero."""

    headline: str = ""
    monitor: str = "val_loss"
    best_epoch: float | None = None
    patience: int | None = None
    floors: Mapping[str, float] = field(default_factory=dict)
    changes: Sequence[Change] = ()


class Dashboard:
    """Panels for a fixed list of columns; `update` moves the curves, `png` draws them."""

    def __init__(self, panels: Sequence[Panel], *, monitor: str = "val_loss") -> None:
        small = [panel for panel in panels if not panel.groups]
        wide = [panel for panel in panels if panel.groups]
        rows = -(-len(small) // _COLUMNS)
        foot = _HEAD + rows * _ROW + _FOOT * bool(small)
        self.sheet = Sheet(_COLUMNS * _SIDE, foot + _GROUP_ROW * len(wide) + 4)
        self._headline = self.sheet.text(9, 13, moving=True, fontsize=s.TEXT)
        self.views: list[_Curves | _Groups] = []
        for i, panel in enumerate(small):
            box = (i % _COLUMNS * _SIDE + 50, _HEAD + i // _COLUMNS * _ROW + 24, _SIDE - 64, _ROW - 38)
            plot = Plot(self.sheet, box, s.safe(panel.title, 34), epochs=i + _COLUMNS >= len(small))
            self.views.append(_Curves(plot, panel, monitor))
        for panel in wide:
            plot = Plot(self.sheet, (50, foot + 26, 2 * _SIDE - 64, _GROUP_ROW - 64), panel.title)
            self.views.append(_Groups(plot, panel))
        self._key()

    def _key(self) -> None:
        """Line styles, explained once below the headline."""
        self._hand = None
        curves = next((view for view in self.views if isinstance(view, _Curves) and view.monitored), None)
        if curves is None:
            return
        x = 10
        for text, style in (*curves.styles, ("best epoch", _STAR), ("patience", _SHADE)):
            ends = [x + 12] if style is _STAR else [x, x + 24]
            self.sheet.line(ends, [31] * len(ends), **style)
            self.sheet.text(x + 30, 31, text)
            x += 48 + 7 * len(text)
        self._hand = self.sheet.line(moving=True, **_HAND), self.sheet.text(x + 24, 31, moving=True), x + 12

    @staticmethod
    def _explain_changes(mark, text, x: float, made: bool) -> None:
        mark.set_data([x], [31] if made else [np.nan])
        text.set_text("changed by hand" if made else "")

    def update(self, columns: Columns, marks: Marks) -> None:
        """Move every curve to the values in `columns`."""
        self._headline.set_text(s.safe(marks.headline, 130))
        done: np.ndarray = columns.epochs() + 1  # people count from one
        for view in self.views:
            view.update(done, columns, marks)
        if self._hand is not None:
            self._explain_changes(*self._hand, bool(marks.changes))

    def png(self, *, small: bool = False) -> bytes:
        """The picture as PNG; `small` takes longer and holds a third of the bytes."""
        return self.sheet.png(small=small)


_STAR = {"marker": "*", "color": _BEST, "markersize": 9, "linestyle": ""}
_SHADE = {"color": _BEST, "alpha": 0.15, "linewidth": 8, "solid_capstyle": "butt"}
_HAND = {"marker": "^", "color": s.CATEGORIES[3], "markersize": 6, "linestyle": ""}
_CURVE = {"linewidth": 1.4, "markersize": 3}


class _Curves:
    """Training solid, validation dashed; best epoch starred; changes by hand marked at the axis.

    Where the monitored column is shown, patience is shaded and the last changes are named.
    """

    def __init__(self, plot: Plot, panel: Panel, monitor: str) -> None:
        self.plot, self.monitor, self.monitored = plot, monitor, monitor in dict(panel.columns)
        sheet = plot.sheet
        self.band = sheet.area(color=_BEST, alpha=0.15) if self.monitored else None
        self.best = sheet.line(moving=True, color=_BEST, linestyle=":", linewidth=1.2)
        self.styles = [(name, _CURVE | s.line(i)) for i, (_, name) in enumerate(panel.columns)]
        self.lines = {
            column: sheet.line(moving=True, **style)
            for (column, _), (_, style) in zip(panel.columns, self.styles, strict=True)
        }
        self.star = sheet.line(moving=True, **_STAR)
        self.hand = sheet.line(moving=True, **_HAND)
        n_named = _MOST_CHANGES if self.monitored else 0
        self.named = [sheet.text(0, 0, moving=True, color=s.CATEGORIES[3]) for _ in range(n_named)]

    def update(self, epochs: np.ndarray, columns: Columns, marks: Marks) -> None:
        shown = [columns[column] for column in self.lines]
        self.plot.limit(epochs, np.concatenate(shown))
        for drawn, values in zip(self.lines.values(), shown, strict=True):
            _move(drawn, self.plot, epochs, values)
        best = None if marks.best_epoch is None else marks.best_epoch + 1
        _, top, _, height = self.plot.box
        at = [] if best is None else [float(self.plot.x(best))] * 2
        self.best.set_data(at, [top, top + height][: len(at)])
        if self.band is not None:
            here: list[int] = list(np.flatnonzero(epochs == best)) if best is not None else []
            self.star.set_data(self.plot.x(epochs[here]), self.plot.y(columns[self.monitor][here]))
            self._shade(self.band, best, marks.patience)
        self._mark_changes(marks.changes)

    def _mark_changes(self, changes: Sequence[Change]) -> None:
        """A tick for each change at its step; the last ones are named, each on a line of its own."""
        left, top, width, height = self.plot.box
        at = np.clip(self.plot.x([change.at for change in changes]), left + 3, left + width)
        self.hand.set_data(at, np.full(len(changes), top + height - 3))
        shown = list(zip(at, changes, strict=True))[-len(self.named) or len(changes) :]
        for i, text in enumerate(self.named):
            text.set_text(s.safe(shown[i][1].words, 26) if i < len(shown) else "")
            if i < len(shown):
                side = "right" if shown[i][0] > left + width / 2 else "left"
                text.set(x=shown[i][0], y=top + 4 + 12 * i, ha=side)

    def _shade(self, band: PolyCollection, best: float | None, patience: int | None) -> None:
        if best is None or not patience:
            band.set_verts([])
            return
        _, top, _, height = self.plot.box
        left, right = self.plot.x([best, min(best + patience, self.plot.last_epoch)])
        band.set_verts([[(left, top), (right, top), (right, top + height), (left, top + height)]])


class _Groups:
    """Energy distance per group with its floor: each group when few, else median, bands and the worst."""

    def __init__(self, plot: Plot, panel: Panel) -> None:
        self.plot, self.columns = plot, [column for column, _ in panel.columns]
        self.names = [name for _, name in panel.columns]
        self.few = len(self.names) <= _MOST_LINES
        count = len(self.names) if self.few else 1 + _WORST
        sheet = plot.sheet
        self.bands = (
            [] if self.few else [sheet.area(color=s.CATEGORIES[0], alpha=alpha) for alpha in (0.10, 0.18)]
        )
        dotted = {"linestyle": (0, (1, 2)), "linewidth": 1.0}
        self.floors = [sheet.line(moving=True, color=s.line(i)["color"], **dotted) for i in range(count)]
        self.lines = [sheet.line(moving=True, **_CURVE | s.line(i)) for i in range(count)]
        right, top = 2 * _SIDE, plot.box[1] + 8
        for i in range(count):
            sheet.line([right, right + 24], [top + 16 * i] * 2, **_CURVE | s.line(i))
        self._texts = [sheet.text(right + 31, top + 16 * i) for i in range(count + 1)]
        self._floor_key = sheet.line([], [top + 16 * count] * 0, color=s.INK, **dotted)
        self._floor_place = ([right, right + 24], [top + 16 * count] * 2)

    def update(self, epochs: np.ndarray, columns: Columns, marks: Marks) -> None:
        values = np.stack([columns[column] for column in self.columns])
        floors = np.array([marks.floors.get(name, np.nan) for name in self.names], dtype=float)
        self.plot.limit(epochs, np.concatenate([values.ravel(), floors]), energy=True)
        shown, labels, levels = (
            (values, self.names, floors) if self.few else self._summary(epochs, values, floors)
        )
        left, _, width, _ = self.plot.box
        for drawn, floor, y, level in zip(self.lines, self.floors, shown, levels, strict=True):
            _move(drawn, self.plot, epochs, y)
            floor.set_data([left, left + width], self.plot.y([level, level]))
        self._write_key(labels, bool(np.isfinite(levels).any()))

    def _summary(self, epochs: np.ndarray, values: np.ndarray, floors: np.ndarray):
        """Median over groups, and the groups that ended furthest above their floor."""
        ranked, n = np.sort(values, axis=0), len(values) - 1  # a NaN sorts to the top and leaves a gap
        x = self.plot.x(epochs)
        for band, cut in zip(self.bands, (0.0, 0.1), strict=True):
            low, high = (self.plot.y(ranked[round(part * n)]) for part in (cut, 1 - cut))
            band.set_verts([np.column_stack([np.append(x, x[::-1]), np.append(low, high[::-1])])])
        excess = values[:, -1] - np.nan_to_num(floors)
        worst = np.argsort(-np.nan_to_num(excess, nan=-np.inf), kind="stable")[:_WORST]
        typical = np.median(floors[np.isfinite(floors)]) if np.isfinite(floors).any() else np.nan
        labels = [f"median of {n + 1} (bands: 80 %, all)", *(self.names[i] for i in worst)]
        return np.vstack([ranked[n // 2], values[worst]]), labels, np.array([typical, *floors[worst]])

    def _write_key(self, labels: Sequence[str], floors: bool) -> None:
        words = [*(s.safe(label, 34) for label in labels), "split-half noise floor" if floors else ""]
        if words == [text.get_text() for text in self._texts]:
            return
        self.plot.sheet.stale = True
        for text, word in zip(self._texts, words, strict=True):
            text.set_text(word)
        self._floor_key.set_data(*(self._floor_place if floors else ([], [])))


def _move(drawn, plot: Plot, epochs: np.ndarray, values: np.ndarray) -> None:
    """Move a curve; a short one shows its points."""
    drawn.set_data(plot.x(epochs), plot.y(values))
    drawn.set_marker("o" if len(epochs) < 25 else "")
