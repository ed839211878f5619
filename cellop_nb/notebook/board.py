"""A figure of panels that is drawn again and again: what stands still is painted once, what moves is laid over it.

Plain matplotlib, drawn by Agg without pyplot, so that it may live in any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image as Pixels

from . import style as s

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels of the page, from the figure's top left corner."""


class Board:
    """A white figure of `width` x `height` pixels of the page, painted at twice that size; its `views` are the panels."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        size = (width / s.DPI, height / s.DPI)
        self.figure = s.NotebookFigure(figsize=size, dpi=2 * s.DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        self.views: list[View] = []
        self.ground: Any = None  # what stands still, as it was painted; None: to be painted anew
        self._stale: list[View] = []
        self._texts: list[Text] = []

    def text(self, x: int, y: int, **style: Any) -> Text:
        """Words at a pixel that may change with every picture."""
        text = self.figure.text(x / self.width, 1 - y / self.height, "", animated=True)
        text.update({"fontsize": s.TEXT, "color": s.INK, "va": "center", "fontfamily": s.families()} | style)
        self._texts.append(text)
        return text

    def stale(self, view: View) -> None:
        """Paint this panel's ground anew with the next picture."""
        self._stale.append(view)

    def png(self, *, small: bool = False) -> bytes:
        """The picture as PNG; `small` takes longer for fewer bytes, for the picture that stays in the notebook."""
        canvas = self.canvas
        if self.ground is None:
            canvas.draw()
            self.ground = canvas.copy_from_bbox(self.figure.bbox)
        else:
            canvas.restore_region(self.ground)
            self._repaint()
        self._stale = []
        for view in self.views:
            for artist in view.moving:
                view.ax.draw_artist(artist)
        for text in self._texts:
            self.figure.draw_artist(text)
        picture, file = Pixels.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), BytesIO()
        if small:
            return s.small_png(picture)
        picture.save(file, format="png", compress_level=1)
        return file.getvalue()

    def _repaint(self) -> None:
        """Paint stale panels, the others stay as they are."""
        if not self._stale:
            return
        pixels = np.asarray(self.canvas.buffer_rgba())
        for view in dict.fromkeys(self._stale):
            left, top, right, low = (2 * max(edge, 0) for edge in view.place)
            pixels[top:low, left:right] = 255
            view.ax.draw(self.canvas.get_renderer())
        self.ground = self.canvas.copy_from_bbox(self.figure.bbox)


class View:
    """A panel of a board: its axes, and the artists that move.

    `above`, `below` and `beside` are pixels around the axes that belong to it, besides 50 to the left.
    """

    def __init__(
        self,
        board: Board,
        box: Box,
        title: str,
        x: str = "",
        *,
        above: int = 22,
        below: int = 34,
        beside: int = 14,
    ) -> None:
        (left, top, width, height), w, h = box, board.width, board.height
        self.board = board
        self.moving: list = []
        self.place = (left - 50, top - above, left + width + beside, top + height + below)
        bounds = (left / w, 1 - (top + height) / h, width / w, height / h)
        self.ax: Axes = s.plain_axes(board.figure.add_axes(bounds))
        style = {"fontsize": s.TEXT, "color": s.INK, "fontfamily": s.families()}
        self.ax.set_title(title, loc="left", pad=4, y=1.0).update(style)
        self.ax.set_xlabel(x, fontsize=s.SMALL, color=s.INK)
        # fixed positions: to find them, matplotlib would measure every tick
        self.ax.xaxis.set_label_coords(0.5, -20 / height)
        self.ax.yaxis.set_label_coords(-8 / width, 0.5)
        board.views.append(self)

    def line(self, look: Mapping[str, Any] = MappingProxyType({}), **style: Any) -> Line2D:
        """A line that moves."""
        (line,) = self.ax.plot([], [], animated=True)
        line.update({**look, **style})
        self.moving.append(line)
        return line

    def text(self, x: float, y: float, **style: Any) -> Text:
        """Words that move, at a position in parts of the panel unless told."""
        text = self.ax.text(x, y, "", animated=True, fontsize=s.SMALL, color=s.INK, fontfamily=s.families())
        text.update({"transform": self.ax.transAxes} | style)
        self.moving.append(text)
        return text

    def key(self, *handles: Any, columns: int = 1, corner: tuple[float, float] | None = None) -> None:
        """The legend, which stands still: beside the panel, or upwards from a corner in parts of it."""
        drawn = s.legend(self.ax, *handles, outside=True, columns=columns, handlelength=1.2)
        if corner is not None:
            drawn.set_loc("lower left")
            drawn.set_bbox_to_anchor(corner, self.ax.transAxes)
        for text in drawn.get_texts():
            text.set_fontfamily(s.families())
        self.board.stale(self)
