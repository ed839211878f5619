"""A panel with axes on a :class:`Sheet`, in pixels, and the limits that suit what it shows."""

from __future__ import annotations

import numpy as np
from matplotlib.markers import TICKDOWN, TICKLEFT
from matplotlib.ticker import MaxNLocator

from .. import style as s
from .sheet import Sheet


class Frame:
    """A panel with linear axes on a sheet: a frame, a few ticks, and where values lie in pixels."""

    _TICKS = 6

    def __init__(self, sheet: Sheet, box, title: str, x: str = "", y: str = "", *, ticks: str = "xy") -> None:
        self.sheet, self.box, self._ticks = sheet, box, ticks
        left, top, width, height = box
        self.title = sheet.text(left, top - 12, title, fontsize=s.TEXT)
        self._limits = (0.0, 1.0, 0.0, 1.0)
        corners = ([left, left, left + width], [top, top + height, top + height])
        sheet.line(*corners, color=s.QUIET, linewidth=0.8)
        sheet.text(left + width / 2, top + height + 13 + 13 * ("x" in ticks), x, ha="center")
        sheet.text(left - 12, top + height / 2, y, ha="center", rotation=90)
        marks = {"linestyle": "", "color": s.QUIET, "markersize": 3}
        self._marks = (sheet.line(marker=TICKDOWN, **marks), sheet.line(marker=TICKLEFT, **marks))
        self._texts = [sheet.text(0, top + height + 11, ha="center") for _ in range(self._TICKS)]
        self._texts += [sheet.text(left - 6, 0, ha="right") for _ in range(self._TICKS)]

    def limit(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        """Set the limits; ticks are written anew only where they change."""
        limits = (*x, *y)
        if limits != self._limits:
            self._limits, self.sheet.stale = limits, True
            for axis, place, texts in zip(
                "xy", (self.x, self.y), (self._texts[:6], self._texts[6:]), strict=True
            ):
                self._write(axis, place, texts)

    def _write(self, axis: str, place, texts) -> None:
        left, top, _, height = self.box
        low, high = self._limits[:2] if axis == "x" else self._limits[2:]
        ticks = np.asarray(MaxNLocator(4).tick_values(low, high) if axis in self._ticks else [])
        ticks = ticks[(ticks >= low) & (ticks <= high)][: self._TICKS]
        at = place(ticks)
        fixed = np.full(len(ticks), top + height if axis == "x" else left)
        self._marks[axis == "y"].set_data(*((at, fixed) if axis == "x" else (fixed, at)))
        for i, text in enumerate(texts):
            text.set_text(s.compact(ticks[i]) if i < len(ticks) else "")
            if i < len(ticks):
                (text.set_x if axis == "x" else text.set_y)(at[i])

    def x(self, values) -> np.ndarray:
        """Values as pixels from the left; cut at the frame."""
        low, high = self._limits[:2]
        share = (np.asarray(values, dtype=float) - low) / (high - low)
        return self.box[0] + self.box[2] * np.clip(share, 0, 1)

    def y(self, values) -> np.ndarray:
        """Values as pixels from the top; cut at the frame."""
        low, high = self._limits[2:]
        share = (np.asarray(values, dtype=float) - low) / (high - low)
        return self.box[1] + self.box[3] * (1 - np.clip(share, 0, 1))

    def holds(self, points: np.ndarray) -> np.ndarray:
        """Which points (point, 2) lie inside."""
        low, high = np.array(self._limits).reshape(2, 2).T
        return ((points >= low) & (points <= high)).all(1)


def say(sheet: Sheet, text, words: str) -> None:
    """Change words that seldom change: they belong to the ground, which is then painted anew."""
    if text.get_text() != words:
        text.set_text(words)
        sheet.stale = True


def rounded(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 6, 8, 10 in the value's decade."""
    decade = 10.0 ** np.floor(np.log10(max(value, 1e-3)))
    return float(next(step * decade for step in (1, 1.5, 2, 3, 4, 6, 8, 10, 15) if step * decade >= value))


def bar(zero: float, end: float, y: float, half: float = 6.5) -> list[tuple[float, float]]:
    """Corners of a bar from zero to its end, in pixels."""
    return [(zero, y - half), (end, y - half), (end, y + half), (zero, y + half)]


def span(values: np.ndarray) -> tuple[float, float]:
    """Limits that hold 99 % of the cells, with a margin."""
    low, high = np.quantile(values, [0.005, 0.995])
    margin = 0.08 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def equal(x: tuple[float, float], y: tuple[float, float], ratio: float):
    """The same limits, widened so that one unit is as long upwards as sideways."""
    wide, high = x[1] - x[0], y[1] - y[0]
    if wide < high * ratio:
        middle, wide = sum(x) / 2, high * ratio
        return (middle - wide / 2, middle + wide / 2), y
    middle, high = sum(y) / 2, wide / ratio
    return x, (middle - high / 2, middle + high / 2)
