"""Colours, canvases and labels shared by every figure.

Every property is set on the artist itself. `matplotlib.rcParams` is neither read for colours nor changed: a
live picture is drawn in a worker thread, and a temporary change of a global there would reach the
user's figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from PIL import Image as Pixels

from cellop_nb.files import write_whole

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.axes import Axes

# Okabe and Ito (2008), black and the pale yellow last: neither carries a thin line well.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")
RANGE, DIVERGING = "cividis", "RdBu_r"
INK, QUIET, FAINT = "#222222", "#6b6b6b", "#e4e4e4"
DPI, WIDTH = 96, 8.0
TITLE, TEXT, SMALL = 10.0, 9.0, 8.0


class NotebookFigure(Figure):
    """A matplotlib figure that shows itself as PNG at the end of a cell, without pyplot."""

    def _repr_png_(self) -> bytes:
        return png(self)


def canvas(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float | None = None, **grid
) -> tuple[NotebookFigure, list[Axes]]:
    """A white figure with `rows * columns` panels, laid out so that no label is clipped.

    Parameters
    ----------
    width, height
        Inches; 8 inches are 768 pixels. The default height gives panels of 2.5 inches.
    grid
        Passed to `Figure.subplots` (`sharex`, `sharey`, `width_ratios`, ...).

    Returns
    -------
    The figure and its axes in reading order.
    """
    size = (width, height or 2.5 * rows)
    fig = NotebookFigure(figsize=size, dpi=DPI, facecolor="white", edgecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    ratios = {key: grid.pop(key) for key in ("width_ratios", "height_ratios") if key in grid}
    axes = fig.subplots(rows, columns, squeeze=False, gridspec_kw=ratios, **grid).ravel()
    return fig, [plain_axes(ax) for ax in axes]


def plain_axes(ax: Axes) -> Axes:
    """Two quiet spines, small ticks, white ground."""
    ax.set_facecolor("white")
    ax.set_prop_cycle(color=OKABE_ITO)
    ax.grid(False)
    for side, spine in ax.spines.items():
        spine.set(visible=side in {"left", "bottom"}, color=QUIET, linewidth=0.8)
    ax.tick_params(which="both", colors=QUIET, labelcolor=INK, labelsize=SMALL, width=0.8, length=3)
    ax.tick_params(which="minor", length=1.5, labelsize=SMALL)
    return ax


def label(ax: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    """Title and axis labels in our own words (not from data: those go through `safe`)."""
    ax.set_title(title, fontsize=TITLE, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=TEXT, color=INK)
    ax.set_ylabel(y, fontsize=TEXT, color=INK)
    return ax


def figure_of(ax: Axes) -> Figure:
    """The whole figure that the axes stand in."""
    figure = ax.get_figure(root=True)
    assert figure is not None, "axes that were taken out of their figure"
    return figure


def safe(text: object, limit: int = 32) -> str:
    """A label from data: no mathtext, no line break, no hidden legend entry, at most `limit` letters."""
    words = " ".join(str(text).split())
    words = words if len(words) <= limit else words[: limit - 1] + "…"
    # matplotlib leaves legend entries out whose label begins with an underscore
    words = " " + words if words.startswith("_") else words
    return words.replace("$", r"\$")


def note(ax: Axes, x: float, y: float, text: str, **kwargs):
    """Small text at a place given as fractions of the panel."""
    options = {"fontsize": SMALL, "color": INK, "va": "top", "transform": ax.transAxes} | kwargs
    return ax.text(x, y, text, **options)


def mark(index: int) -> dict[str, str]:
    """Colour and marker of category `index`; the pair repeats only after 56 categories."""
    return {"color": OKABE_ITO[index % len(OKABE_ITO)], "marker": MARKERS[index % len(MARKERS)]}


def line(index: int) -> dict[str, str]:
    """Colour and line style of category `index`."""
    return {"color": OKABE_ITO[index % 7], "linestyle": LINES[index % len(LINES)]}


def legend(ax: Axes, *handles, outside: bool = False, columns: int = 1, title: str | None = None, **kwargs):
    """A legend without a frame; `outside` puts it to the right of the panel, where it hides no data."""
    options = {
        "fontsize": SMALL,
        "labelcolor": INK,
        "ncols": columns,
        "title": title,
        "title_fontsize": SMALL,
    }
    options |= {"frameon": not outside, "framealpha": 0.85, "edgecolor": "none", "facecolor": "white"}
    options |= {"handlelength": 1.6, "borderaxespad": 0.3, "labelspacing": 0.35}
    if outside:
        options |= {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    options |= kwargs
    return ax.legend(handles=list(handles), **options) if handles else ax.legend(**options)


def long_names(ax: Axes, names: Sequence[object], axis: str = "x") -> None:
    """Categories as ticks: turned when they would overlap."""
    shown = [safe(name, 40) for name in names]
    (ax.set_xticks if axis == "x" else ax.set_yticks)(range(len(shown)), shown)
    if axis == "x":
        figure, place = figure_of(ax), ax.get_subplotspec()
        width = (ax.get_position() if place is None else place.get_position(figure)).width
        room = figure.get_figwidth() * width * 12
        if sum(len(name) + 2 for name in shown) > room:
            ax.tick_params(axis="x", labelrotation=40)
            for tick in ax.get_xticklabels():
                tick.set(ha="right", rotation_mode="anchor")
    ax.tick_params(axis=axis, length=0)


def compact(value: float, _position: int | None = None) -> str:
    """A tick in few letters: 1500 as 1.5k, 0.0001 as 1e-4."""
    size = abs(value)
    if size == 0 or not np.isfinite(value):
        return "0" if size == 0 else ""
    if size >= 1e9 or size < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def few_ticks(ax: Axes, axis: str = "both", n: int = 5) -> None:
    """At most `n` compact ticks on a linear axis."""
    for name in ("x", "y") if axis == "both" else (axis,):
        side = ax.xaxis if name == "x" else ax.yaxis
        side.set_major_locator(MaxNLocator(n, min_n_ticks=2))
        side.set_major_formatter(FuncFormatter(compact))


def log_ticks(ax: Axes, axis: str = "y") -> None:
    """Compact ticks on the logarithmic axis, no minor labels."""
    side = ax.xaxis if axis == "x" else ax.yaxis
    side.set_major_formatter(FuncFormatter(compact))
    side.set_minor_formatter(FuncFormatter(lambda *_: ""))


def linear_threshold(values) -> float:
    """Power of ten below which an energy axis is linear; all negative values lie there."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    top = float(np.abs(values).max(initial=0.0)) or 1.0
    typical = float(np.median(np.abs(values))) if values.size else top
    least = 10.0 ** np.floor(np.log10(max(typical / 3, top / 1e3)))
    negative = -float(values.min(initial=0.0))
    return float(max(least, 10.0 ** np.ceil(np.log10(negative)))) if negative > 0 else float(least)


def energy_scale(ax: Axes, values, axis: str = "x") -> None:
    """Logarithmic above the noise and linear around zero, where a U-statistic may well be negative."""
    set_scale, side = (ax.set_xscale, ax.xaxis) if axis == "x" else (ax.set_yscale, ax.yaxis)
    set_scale("symlog", linthresh=linear_threshold(values), linscale=0.6)
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(compact))


def png(fig: Figure, *, dpi: float | None = None, colours: int | None = 256) -> bytes:
    """The figure as PNG; a palette of `colours` keeps a notebook small (None: full colour)."""
    raw = BytesIO()
    fig.savefig(raw, format="png", dpi=dpi or fig.dpi, facecolor="white")
    if colours is None:
        return raw.getvalue()
    small = BytesIO()
    with Pixels.open(raw) as picture:
        palette_of(picture.convert("RGB"), colours).save(small, format="png", optimize=True)
    return small.getvalue()


def rgb(codes: Sequence[str]) -> np.ndarray:
    """(colour, 3) red, green and blue, 0 to 255, of codes such as "#0072B2"."""
    return np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in codes], dtype=float)


def palette_of(picture: Pixels.Image, colours: int) -> Pixels.Image:
    """The picture in `colours` colours, ours among them.

    A palette by frequency alone would merge thin lines of similar colour and grey the white ground.
    """
    ours = rgb((*OKABE_ITO, INK, QUIET))
    tints = [255 + (ours - 255) * share for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
    fixed = np.unique(np.round(np.concatenate(tints)).astype(np.uint8), axis=0)
    common = picture.quantize(
        colours - len(fixed), method=Pixels.Quantize.MEDIANCUT, dither=Pixels.Dither.NONE
    )
    found: np.ndarray = np.asarray(common.getpalette(), dtype=np.uint8).reshape(-1, 3)
    found = found[~((found > 245).all(axis=1) & (found < 255).any(axis=1))]
    palette = Pixels.new("P", (1, 1))
    palette.putpalette(np.concatenate([fixed, found]).ravel().tolist())
    return picture.quantize(palette=palette, dither=Pixels.Dither.NONE)


def show(
    fig: Figure, path: str | Path | None = None, *, alt: str | None = None, dpi: float | None = None
) -> Image:
    """The figure as an image for the end of a cell, also written to `path` if one is given.

    Parameters
    ----------
    fig
        Any matplotlib figure.
    path
        PNG file; missing folders are made.
    alt
        Words for those who cannot see the picture; those that stand in it (:func:`described`) where None.
    dpi
        Pixels per inch; the figure's own by default.

    Returns
    -------
    `IPython.display.Image`, so that the last line of a cell shows it.
    """
    from IPython.display import Image

    data = png(fig, dpi=dpi)
    if path is not None:
        write_whole(path, lambda part: part.write_bytes(data))
    return Image(data, format="png", alt=alt or described(fig))


def described(fig: Figure) -> str:
    """What stands in a figure in words: its title, and each panel's title, axes and legend."""
    parts = [fig.get_suptitle(), *map(_panel, fig.axes)]
    return " | ".join(" ".join(part.split()) for part in parts if part)


def _panel(ax: Axes) -> str:
    titles = [ax.get_title(loc) for loc in ("left", "center", "right")]
    named = [f"{axis}: {label}" for axis, label in (("x", ax.get_xlabel()), ("y", ax.get_ylabel())) if label]
    legend = ax.get_legend()
    entries = [text.get_text() for text in legend.get_texts()] if legend else []
    return "; ".join([title for title in titles if title] + named + [", ".join(entries)] * bool(entries))
