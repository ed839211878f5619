"""A sheet of small plots in pixel coordinates: the fast ground of the live picture.

matplotlib's `Axes` take 20 to 50 ms each to make and to draw, nearly all of it for ticks. A live picture
has up to ten panels and may cost 2 % of a training, so its panels are drawn with plain lines and texts, and
what stands still is drawn once and copied from then on.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.lines import Line2D
from matplotlib.markers import TICKDOWN, TICKLEFT
from matplotlib.scale import SymmetricalLogTransform
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D
from PIL import Image as Pixels
from PIL import ImageDraw, ImageFont

from cellop_nb.notebook.figures.quick_png import quick_png

from .. import style as s


class Sheet:
    """A white figure of `width` x `height` pixels; positions are pixels from the top left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.fig = s.NotebookFigure(figsize=(width / s.DPI, height / s.DPI), dpi=s.DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.fig)
        self.pixels = Affine2D().translate(0, -height).scale(1 / width, -1 / height) + self.fig.transFigure
        self.still: list = []
        self.moving: list = []
        self.stale = True
        self._ground = None

    def line(self, x=(), y=(), *, moving: bool = False, **style) -> Line2D:
        """A line through pixels; `moving` if it changes from picture to picture."""
        return self._add(Line2D(x, y, transform=self.pixels, **style), moving)

    def text(self, x: float, y: float, text: str = "", *, moving: bool = False, **style) -> Text:
        """Words at a pixel, vertically centred unless told."""
        options = {"fontsize": s.SMALL, "color": s.INK, "va": "center", "transform": self.pixels} | style
        return self._add(_Words(x, y, text, **options), moving)

    def area(self, **style) -> PolyCollection:
        """A filled area that moves; see `set_verts`."""
        return self._add(PolyCollection([], transform=self.pixels, linewidth=0, **style), True)

    def _add(self, artist, moving: bool):
        artist.set_zorder(2 if moving else 1)
        self.fig.add_artist(artist)
        (self.moving if moving else self.still).append(artist)
        return artist

    def png(self, *, small: bool = False) -> bytes:
        """The picture; `small` spends time to save bytes (for the one that stays in the notebook)."""
        self._paint()
        return quick_png(np.asarray(self.canvas.buffer_rgba()), 6 if small else 1)

    def _paint(self) -> None:
        renderer = self.canvas.get_renderer()
        self.canvas.renderer = renderer
        if self.stale or self._ground is None:
            renderer.clear()
            np.asarray(self.canvas.buffer_rgba())[:] = 255
            for artist in self.still:
                artist.draw(renderer)
            self._ground, self.stale = self.canvas.copy_from_bbox(self.fig.bbox), False
        else:
            self.canvas.restore_region(self._ground)
        for artist in self.moving:
            artist.draw(renderer)


class _Words(Text):
    """Text that is rendered once for each wording and copied from then on; matplotlib takes 2 ms a label."""

    def draw(self, renderer) -> None:
        """Lay the words over the renderer's pixels."""
        if not self.get_text() or not self.get_visible():
            return
        font, place = self.get_fontproperties(), (self.get_ha(), self.get_rotation())  # type: ignore[attr-defined]
        colour, left, top = _raster(
            self.get_text(), font.get_size(), font.get_weight(), self.get_color(), *place
        )
        pixels = np.asarray(renderer.buffer_rgba())
        x, y = self.get_transform().transform(self.get_position())
        column, row = round(x) + left, len(pixels) - round(y) + top
        rows, columns = (
            _overlap(a, n, size)
            for a, n, size in zip((row, column), colour.shape[:2], pixels.shape[:2], strict=True)
        )
        part = pixels[rows[0], columns[0], :3]
        ink = colour[rows[1], columns[1]]
        part[:] = part + (ink[..., :3] - part.astype(float)) * ink[..., 3:]
        self.stale = False


def _overlap(start: int, length: int, size: int) -> tuple[slice, slice]:
    """Where `length` pixels from `start` fall on a side of `size`: there, and among themselves."""
    first, last = max(start, 0), max(min(start + length, size), 0)
    return slice(first, last), slice(first - start, max(last - start, 0))


_MIDDLE = 0.26  # of a letter's size, from the baseline up to the middle of a line


@lru_cache(maxsize=16)
def _font(size: float, weight) -> ImageFont.FreeTypeFont:
    """matplotlib's own font, in points; basic layout gives the same pixels on every machine."""
    path = findfont(FontProperties(family="DejaVu Sans", weight=weight))
    return ImageFont.truetype(path, size * s.DPI / 72, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def _raster(text: str, size: float, weight, colour, ha: str, turn: float) -> tuple[np.ndarray, int, int]:
    """Pixels (row, column, RGB and opacity) of a text, and where its corner lies from the text's own place.

    A text is centred upwards; `turn` is 0 or 90 degrees, and a turned text is centred both ways.
    """
    font, words = _font(size, weight), text.replace(r"\$", "$")
    left, top, right, bottom = map(round, font.getbbox(words, anchor="ls"))
    if right <= left or bottom <= top:
        return np.zeros((0, 0, 4)), 0, 0
    ink = Pixels.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), words, fill=255, font=font, anchor="ls")
    left -= round(font.getlength(words) * {"left": 0.0, "center": 0.5, "right": 1.0}[ha])
    top += round(_MIDDLE * size * s.DPI / 72)
    alpha = np.asarray(ink)
    if turn:
        alpha, left, top = np.rot90(alpha), top, -(left + alpha.shape[1])
    pixels = np.empty((*alpha.shape, 4))
    pixels[..., :3], pixels[..., 3] = 255 * np.array(to_rgb(colour)), alpha / 255
    return pixels, left, top


class Plot:
    """One panel on a sheet: a frame, rounded limits, few ticks, and where a value lies."""

    _TICKS = 5

    def __init__(
        self, sheet: Sheet, box: tuple[int, int, int, int], title: str, *, epochs: bool = True
    ) -> None:
        self.sheet, self.box, self.epochs = sheet, box, epochs
        left, top, width, height = box
        self._limits: tuple = ()
        self._place = lambda values: values
        sheet.text(left, top - 11, title, fontsize=s.TEXT)
        sheet.line(
            [left, left, left + width], [top, top + height, top + height], color=s.QUIET, linewidth=0.8
        )
        ticks = {"linestyle": "", "color": s.QUIET, "markersize": 3}
        self._x_marks = sheet.line(marker=TICKDOWN, **ticks)
        self._y_marks = sheet.line(marker=TICKLEFT, **ticks)
        self._x_texts = [sheet.text(0, top + height + 12, ha="center") for _ in range(self._TICKS * epochs)]
        self._y_texts = [sheet.text(left - 6, 0, ha="right") for _ in range(self._TICKS)]
        if epochs:
            sheet.text(left + width / 2, top + height + 27, "epoch", ha="center")

    def x(self, epochs) -> np.ndarray:
        """Epochs as pixels."""
        left, _, width, _ = self.box
        first, last = self._limits[-2:]
        return left + 3 + (np.asarray(epochs, dtype=float) - first) / (last - first) * (width - 3)

    def y(self, values) -> np.ndarray:
        """Values as pixels."""
        _, top, _, height = self.box
        return top + height * (1 - self._place(np.asarray(values, dtype=float)))

    @property
    def last_epoch(self) -> float:
        """Right end of the axis of epochs."""
        return self._limits[-1]

    def limit(self, epochs: np.ndarray, values: np.ndarray, *, energy: bool = False) -> None:
        """Choose scale and rounded limits; the ticks are written anew only when these change."""
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        scale, low, high = scale_for(low, high, energy)
        linear = s.linear_threshold(values) if scale == "symlog" else 0.0
        ends = (float(epochs[0]), round_up(float(epochs[-1]))) if epochs.size else (0.0, 10.0)
        limits = (scale, linear, low, high, *ends)
        if limits != self._limits:
            self._limits, self.sheet.stale = limits, True
            self._set_place(scale, linear, low, high)
            self._write_ticks(scale, linear, low, high, *ends)

    def _set_place(self, scale: str, linear: float, low: float, high: float) -> None:
        bend = {
            "linear": lambda values: values,
            "log": np.log10,
            "symlog": SymmetricalLogTransform(10, linear or 1.0, 0.6).transform_non_affine,
        }[scale]
        start, end = bend(np.array([low, high]))
        self._place = lambda values: (bend(values) - start) / (end - start)

    def _write_ticks(self, scale, linear, low, high, first, last) -> None:
        left, top, _, height = self.box
        x_ticks = _within(MaxNLocator(3, integer=True).tick_values(first, last), first, last)
        y_ticks = _thin(_within(_candidates(scale, linear, low, high), low, high), self._TICKS)
        self._x_marks.set_data(self.x(x_ticks), np.full(len(x_ticks), top + height))
        self._y_marks.set_data(np.full(len(y_ticks), left), self.y(y_ticks))
        _write(self._x_texts, x_ticks, self.x(x_ticks), Text.set_x)
        _write(self._y_texts, y_ticks, self.y(y_ticks), Text.set_y)


def _candidates(scale: str, linear: float, low: float, high: float) -> np.ndarray:
    if scale == "linear":
        return np.asarray(MaxNLocator(3, min_n_ticks=2).tick_values(low, high))
    start = linear if scale == "symlog" else low
    powers = 10.0 ** np.arange(np.ceil(np.log10(start) - 1e-9), np.floor(np.log10(high) + 1e-9) + 1)
    return powers if scale == "log" else np.concatenate([-powers[::-1], [0.0], powers])


def _within(ticks: np.ndarray, low: float, high: float) -> np.ndarray:
    slack = 1e-9 * (high - low)
    return ticks[(ticks >= low - slack) & (ticks <= high + slack)]


def _thin(ticks: np.ndarray, most: int) -> np.ndarray:
    """Every second or third tick, so that at most `most` are left; zero stays."""
    step = -(-len(ticks) // most)
    anchor = int(np.argmin(np.abs(ticks))) if (ticks == 0).any() else 0
    return ticks[anchor % step :: step] if len(ticks) else ticks


def _write(texts: list[Text], ticks: np.ndarray, places: np.ndarray, move) -> None:
    for i, text in enumerate(texts):
        shown = i < len(ticks)
        text.set_text(s.compact(ticks[i]) if shown else "")
        if shown:
            move(text, places[i])


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
