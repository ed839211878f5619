"""The picture of a running training: one figure that is kept, of which only what moved is drawn again.

Drawing ticks and words takes matplotlib ten times longer than drawing curves. So every panel keeps a copy of
its empty self (frame, ticks, title) and draws its curves onto that; the empty panel is drawn again only when its
limits change, and limits are rounded so that they change seldom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from PIL import Image as Pixels

from cellop_nb.notebook.figures import style as s
from cellop_nb.notebook.figures.panels import Columns, Panel

# pixels
_SIDE, _HEAD, _ROW, _GROUP_ROW, _FOOT = 256, 46, 136, 210, 34
_COLUMNS, _MOST_LINES, _WORST = 3, 6, 3
_BEST = s.OKABE_ITO[2]


@dataclass(frozen=True)
class Marks:
    """What a dashboard marks besides the curves."""

    headline: str = ""
    monitor: str = "val_loss"
    best_epoch: float | None = None
    patience: int | None = None
    floors: Mapping[str, float] = field(default_factory=dict)


class Dashboard:
    """Panels for a fixed list of columns; `update` moves the curves, `png` draws what has moved."""

    def __init__(self, panels: Sequence[Panel], *, monitor: str = "val_loss") -> None:
        small = [panel for panel in panels if not panel.groups]
        wide = [panel for panel in panels if panel.groups]
        rows = -(-len(small) // _COLUMNS)
        self.height = _HEAD + rows * _ROW + _FOOT * bool(small) + _GROUP_ROW * len(wide)
        self.fig = s.NotebookFigure(figsize=(s.WIDTH, self.height / s.DPI), dpi=s.DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.fig)
        self.views: list[_View] = []
        for i, panel in enumerate(small):
            lowest = i + _COLUMNS >= len(small)
            box = (i % _COLUMNS * _SIDE, _HEAD + i // _COLUMNS * _ROW, _SIDE, _ROW + _FOOT * lowest)
            self.views.append(_Curves(self._axes(box, _FOOT * lowest + 6), box, panel, monitor, lowest))
        for panel in wide:
            box = (0, self.height - _GROUP_ROW, _COLUMNS * _SIDE, _GROUP_ROW)
            self.views.append(_Groups(self._axes(box, _FOOT + 6, 2 * _SIDE), box, panel))
        self._headline = self._text(9, s.TEXT)
        self._key()

    def _axes(self, box: tuple[int, int, int, int], foot: int, width: int = _SIDE) -> Axes:
        """Axes inside a box of pixels from the top left, with room for title and ticks."""
        left, top, _, height = box
        place = (left + 50, self.height - top - height + foot, width - 64, height - foot - 30)
        scale = (s.WIDTH * s.DPI, self.height) * 2
        return s.plain_axes(
            self.fig.add_axes([part / whole for part, whole in zip(place, scale, strict=True)])
        )

    def _text(self, top: int, size: float):
        place = (9 / (s.WIDTH * s.DPI), 1 - top / self.height)
        return self.fig.text(*place, "", fontsize=size, color=s.INK, va="top", animated=True)

    def _key(self) -> None:
        """Line styles explained once, below the headline."""
        curves = next((view for view in self.views if isinstance(view, _Curves) and view.monitored), None)
        if curves:
            handles = [*curves.lines.values(), curves.star, curves.band]
            place = (4 / (s.WIDTH * s.DPI), 1 - 22 / self.height)
            options = {"loc": "upper left", "bbox_to_anchor": place, "borderpad": 0.1, "columnspacing": 1.4}
            s.legend(
                self.fig,
                *handles,
                outside=False,
                columns=4,
                **options | {"borderaxespad": 0, "framealpha": 0},
            )

    def update(self, columns: Columns, marks: Marks) -> None:
        """Move every curve to the values in `columns`."""
        self._headline.set_text(s.safe(marks.headline, 130))
        epochs = columns.epochs()
        for view in self.views:
            view.update(epochs, columns, marks)

    def still(self) -> s.NotebookFigure:
        """The figure for `savefig`, which draws moving artists in axes but not in the figure itself."""
        self._headline.set_animated(False)
        return self.fig

    def png(self, *, small: bool = False) -> bytes:
        """The picture; `small` spends time to save bytes (for the picture that stays in the notebook)."""
        self._paint()
        width = round(self.fig.bbox.width)
        picture = Pixels.frombuffer("RGBA", (width, self.height), self.canvas.buffer_rgba()).convert("RGB")
        if small:
            picture = s.palette_of(picture, 128)
        raw = BytesIO()
        picture.save(raw, format="png", compress_level=6 if small else 1)
        return raw.getvalue()

    def _paint(self) -> None:
        if any(view.empty is None for view in self.views) or not self.views:
            self.canvas.draw()  # leaves out what is animated: every curve
            self._head = self.canvas.copy_from_bbox(self._box((0, 0, _COLUMNS * _SIDE, 22)))
            for view in self.views:
                view.keep(self.canvas, self._box(view.box))
        self.canvas.restore_region(self._head)
        self._headline.draw(self.canvas.get_renderer())
        for view in self.views:
            view.paint(self.canvas, self._box(view.box))

    def _box(self, box: tuple[int, int, int, int]) -> Bbox:
        left, top, width, height = box
        return Bbox.from_bounds(left, self.height - top - height, width, height)


class _View:
    """One panel: artists that move, and a picture of the panel without them."""

    def __init__(self, ax: Axes, box: tuple[int, int, int, int], title: str, *, epochs: bool) -> None:
        self.ax, self.box, self.empty, self.stale = ax, box, None, True
        self.moving: list = []
        self._limits: tuple = ()
        # fixed places: searching for free ones takes matplotlib as long as drawing
        ax.set_title(title, fontsize=s.TEXT, color=s.INK, loc="left", y=1.0, pad=5)
        ax.xaxis.set_label_coords(0.5, -26 / ax.bbox.height)
        ax.yaxis.set_label_coords(0, 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.tick_params(axis="x", labelbottom=epochs)
        ax.set_xlabel("epoch" if epochs else "", fontsize=s.SMALL, color=s.INK, labelpad=0)

    def keep(self, canvas: FigureCanvasAgg, box: Bbox) -> None:
        self.empty, self.stale = canvas.copy_from_bbox(box), False

    def paint(self, canvas: FigureCanvasAgg, box: Bbox) -> None:
        renderer = canvas.get_renderer()
        if self.stale:
            corner = [round(part) for part in box.extents]
            np.asarray(canvas.buffer_rgba())[_rows(canvas, corner), corner[0] : corner[2]] = 255
            self.ax.draw(renderer)
            self.keep(canvas, box)
        else:
            canvas.restore_region(self.empty)
        for artist in self.moving:
            artist.draw(renderer)

    def limit(self, epochs: np.ndarray, values: np.ndarray, *, energy: bool = False) -> None:
        """Rounded limits and a scale that suits the values."""
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        first, last = (float(epochs[0]), _round_up(float(epochs[-1]))) if epochs.size else (0.0, 1.0)
        scale, low, high = _scale(low, high, energy)
        linear = s.linear_threshold(values) if scale == "symlog" else None
        limits = ((scale, linear), low, high, first, last)
        if limits != self._limits:
            if limits[:1] != self._limits[:1]:
                _set_scale(self.ax, scale, values)
            self.ax.set(ylim=(low, high), xlim=(first - 0.02 * (last - first), last))
            self._limits, self.stale = limits, True


class _Curves(_View):
    """Training solid, validation dashed; best epoch starred; patience shaded where monitored."""

    def __init__(self, ax: Axes, box, panel: Panel, monitor: str, epochs: bool) -> None:
        super().__init__(ax, box, s.safe(panel.title, 34), epochs=epochs)
        self.monitor, self.monitored = monitor, monitor in dict(panel.columns)
        self.lines = {
            column: ax.plot([], [], label=name, linewidth=1.4, markersize=3, animated=True, **s.line(i))[0]
            for i, (column, name) in enumerate(panel.columns)
        }
        self.best = ax.axvline(np.nan, color=_BEST, linestyle=":", linewidth=1.2, animated=True)
        (self.star,) = ax.plot([], [], "*", color=_BEST, markersize=9, label="best epoch", animated=True)
        self.band = ax.axvspan(0, 0, color=_BEST, alpha=0.15, linewidth=0, animated=True, label="patience")
        self.moving = [self.band, self.best, *self.lines.values(), self.star]

    def update(self, epochs: np.ndarray, columns: Columns, marks: Marks) -> None:
        shown = [columns[column] for column in self.lines]
        for drawn, values in zip(self.lines.values(), shown, strict=True):
            drawn.set_data(epochs, values)
            drawn.set_marker("o" if len(epochs) < 25 else "")
        self.limit(epochs, np.concatenate(shown))
        best = np.nan if marks.best_epoch is None else float(marks.best_epoch)
        self.best.set_xdata([best, best])
        self.band.set(x=best, width=min(marks.patience or 0, self._limits[4] - best), visible=self.monitored)
        if self.monitored:
            at = np.flatnonzero(epochs == best)
            self.star.set_data(epochs[at], columns[self.monitor][at])


class _Groups(_View):
    """Energy distance per group with its floor: each group when few, else median, bands and the worst."""

    def __init__(self, ax: Axes, box, panel: Panel) -> None:
        super().__init__(ax, box, panel.title, epochs=True)
        self.names = dict(panel.columns)
        self.few = len(self.names) <= _MOST_LINES
        count = len(self.names) if self.few else 1 + _WORST
        fill = {"color": s.OKABE_ITO[0], "linewidth": 0, "animated": True}
        self.bands = (
            [] if self.few else [ax.fill_between([], [], alpha=alpha, **fill) for alpha in (0.10, 0.18)]
        )
        self.lines = [
            ax.plot([], [], linewidth=1.4, markersize=3, animated=True, **s.line(i))[0] for i in range(count)
        ]
        self.floors = [
            ax.axhline(np.nan, color=drawn.get_color(), linewidth=1.0, linestyle=(0, (1, 2)), animated=True)
            for drawn in self.lines
        ]
        self.moving = [*self.bands, *self.floors, *self.lines]
        self._key: tuple = ()

    def update(self, epochs: np.ndarray, columns: Columns, marks: Marks) -> None:
        values = np.stack([columns[column] for column in self.names])
        names = list(self.names.values())
        floors = np.array([marks.floors.get(name, np.nan) for name in names], dtype=float)
        shown, labels, levels = (
            (values, names, floors) if self.few else self._summary(epochs, values, names, floors)
        )
        for drawn, level, y, floor in zip(self.lines, self.floors, shown, levels, strict=True):
            drawn.set_data(epochs, y)
            drawn.set_marker("o" if len(epochs) < 25 else "")
            level.set_ydata([floor, floor])
        self.limit(epochs, np.concatenate([values.ravel(), levels]), energy=True)
        self._legend(labels, np.isfinite(levels).any())

    def _summary(self, epochs, values, names, floors):
        """Median over groups and the groups that ended furthest above their floor."""
        ranked, n = np.sort(values, axis=0), len(values) - 1  # a NaN sorts to the top and leaves a gap
        for band, cut in zip(self.bands, (0.0, 0.1), strict=True):
            band.set_data(epochs, ranked[round(cut * n)], ranked[round((1 - cut) * n)])
        excess = values[:, -1] - np.nan_to_num(floors)
        worst = np.argsort(-np.nan_to_num(excess, nan=-np.inf), kind="stable")[:_WORST]
        typical = np.median(floors[np.isfinite(floors)]) if np.isfinite(floors).any() else np.nan
        labels = [f"median of {len(names)} (bands: 80 %, all)", *(names[i] for i in worst)]
        return np.vstack([ranked[n // 2], values[worst]]), labels, np.array([typical, *floors[worst]])

    def _legend(self, labels: Sequence[str], floors: bool) -> None:
        key = (*labels, floors)
        if key == self._key:
            return
        self._key, self.stale = key, True
        for drawn, text in zip(self.lines, labels, strict=True):
            drawn.set_label(s.safe(text, 36))
        self.floors[0].set_label("dotted: split-half noise floor")
        s.legend(self.ax, *self.lines, *self.floors[: int(floors)], outside=True, handlelength=2.2)


def _rows(canvas: FigureCanvasAgg, corner: Sequence[int]) -> slice:
    """Rows of the pixel buffer, which counts from the top."""
    height = round(canvas.figure.bbox.height)
    return slice(height - corner[3], height - corner[1])


def _round_up(last: float) -> float:
    """The next of 10, 15, 20, 30, 40, 60, 80, 100, ...: the axis of epochs grows in few steps."""
    decade = 10.0 ** np.floor(np.log10(max(last, 10.0)))
    return next(step * decade for step in (1, 1.5, 2, 3, 4, 6, 8, 10) if step * decade >= last)


def _scale(low: float, high: float, energy: bool) -> tuple[str, float, float]:
    """Scale and rounded limits: log over a factor of 20, symlog for energies that reach zero, else linear."""
    if low > 0 and high > 20 * low:
        return (
            "log",
            10 ** (np.floor(np.log10(low) * 4 - 0.5) / 4),
            10 ** (np.ceil(np.log10(high) * 4 + 0.5) / 4),
        )
    if energy and high > 0 and low < 0.05 * high:
        top = 10 ** (np.ceil(np.log10(high) * 4) / 4)
        return "symlog", -(10 ** np.ceil(np.log10(-low))) if low < 0 else 0.0, top
    if low == high == 0:
        return "linear", -0.05, 1.0
    span = (high - low) or abs(high)
    step = 10 ** np.floor(np.log10(span)) * (0.25 if span / 10 ** np.floor(np.log10(span)) < 4 else 0.5)
    return "linear", np.floor(low / step - 0.2) * step, np.ceil(high / step + 0.2) * step


def _set_scale(ax: Axes, scale: str, values: np.ndarray) -> None:
    if scale == "symlog":
        s.energy_scale(ax, values, "y")
    elif scale == "log":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(numticks=4))
        s.log_ticks(ax, "y")
    else:
        ax.set_yscale("linear")
        s.few_ticks(ax, "y", 3)
    ax.yaxis.set_minor_locator(NullLocator())
