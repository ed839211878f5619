"""Colours, empty panels, labels and files of all figures.

Every property is set on the artist itself: `matplotlib.rcParams` is neither read for colours nor changed, and pyplot
is not used. A live picture is drawn in a worker thread, and a change of a global there would reach the user's figures.

References
----------
Okabe and Ito (2008), Color universal design.
"""

from __future__ import annotations

import logging
import unicodedata
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image as Pixels

from ..errors import three_beats
from ..files import write_whole

logger = logging.getLogger(__name__)

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
INK, QUIET, FAINT = "#222222", "#6b6b6b", "#e4e4e4"
CATEGORIES = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, "#000000", YELLOW)
"""Colours of categories without a meaning of their own, by index; black and pale yellow carry no thin line well."""
CONTROL, REAL, PREDICTED = QUIET, ORANGE, BLUE
"""Control cells (and "no change"), real perturbed cells, and what a model predicts: the same in every figure."""
_BASELINES = {"near mean": PURPLE, "mean shift": GREEN, "linear": SKY}
RISE, FALL, RANGE, DIVERGING = VERMILION, SKY, "cividis", "RdBu_r"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")
DPI, WIDTH = 96, 8.0
TITLE, TEXT, SMALL = 10.0, 9.0, 8.0
_FALLBACKS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "PingFang SC",
    "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "SimHei", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS", "Last Resort High-Efficiency",
)  # fmt: skip


# -- figures and panels


class _Shown:
    """Shows its figure at the end of a notebook cell: PNG at twice the size on the page, with words for who sees none."""

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        figure: Any = self
        figure = figure if isinstance(figure, Figure) else figure_of(figure)
        width, height = (round(float(inches) * DPI) for inches in figure.get_size_inches())
        about = {"width": width, "height": height, "alt": described(figure)}
        return {"image/png": b64encode(png(figure)).decode("ascii")}, {"image/png": about}


class NotebookFigure(_Shown, Figure):
    """A matplotlib figure that shows itself at the end of a cell, without pyplot."""


class NotebookAxes(_Shown, Axes):
    """Axes of such a figure, which show the whole of it."""


def canvas(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = WIDTH,
    height: float | None = None,
    sharey: bool = False,
    width_ratios: Sequence[float] | None = None,
) -> tuple[NotebookFigure, list[Axes]]:
    """A white figure with `rows * columns` panels, laid out so that no label is clipped, and its panels in order.

    Width and height are inches, of 96 pixels of a page; panels are 2.5 inches high by default.
    """
    size = (width, height or 2.5 * rows)
    fig = NotebookFigure(figsize=size, dpi=DPI, facecolor="white", edgecolor="white", layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(
        rows, columns, squeeze=False, sharey=sharey, width_ratios=width_ratios,
        subplot_kw={"axes_class": NotebookAxes},
    )  # fmt: skip
    return fig, [plain_axes(ax) for ax in axes.ravel()]


def axes_of(ax: Axes | None, *, width: float = WIDTH, height: float) -> Axes:
    """The user's axes, in our style, or those of a new figure."""
    return canvas(width=width, height=height)[1][0] if ax is None else plain_axes(ax)


def plain_axes(ax: Axes) -> Axes:
    """Two quiet spines, small ticks, white ground."""
    ax.set_facecolor("white")
    ax.grid(False)
    for side, spine in ax.spines.items():
        spine.set(visible=side in {"left", "bottom"}, color=QUIET, linewidth=0.8)
    ax.tick_params(which="both", colors=QUIET, labelcolor=INK, labelsize=SMALL, width=0.8, length=3)
    ax.tick_params(which="minor", length=1.5, labelsize=SMALL)
    return ax


def figure_of(ax: Axes) -> Figure:
    """The whole figure that the axes stand in."""
    figure = ax.get_figure(root=True)
    assert figure is not None, "axes that were taken out of their figure"
    return figure


# -- words


def safe(text: object, limit: int = 32) -> str:
    """A label from data: short, no mathtext, no hidden legend entry."""
    letters = short(drawable(text), limit)
    # matplotlib leaves legend entries out whose label begins with an underscore
    letters = " " + letters if letters.startswith("_") else letters
    return letters.replace("$", r"\$")


def drawable(text: object) -> str:
    """The text with a number such as U+5E72 for each letter that no font of this machine has; said once."""
    letters = str(text)
    missing = sorted({c for c in letters if c.isprintable() and ord(c) > 126} - _drawn_letters())
    if missing:
        _say_missing(families()[0])
        for letter in missing:
            letters = letters.replace(letter, f"U+{ord(letter):04X} ")
    return letters


@cache
def _drawn_letters() -> frozenset[str]:
    """Letters that one of our font families has."""
    paths = {
        findfont(FontProperties(family=name)) for name in families() if not name.startswith("Last Resort")
    }
    return frozenset(chr(code) for path in paths for code in get_font(path).get_charmap())


@cache
def _say_missing(family: str) -> None:
    fix = "install a font such as Noto Sans CJK (Debian: apt install fonts-noto-cjk) and start Python anew"
    problem = (
        f"labels with letters that {family} and the other fonts here lack; they show as numbers (U+5E72)"
    )
    logger.warning(three_beats("a font for every letter of the labels", problem, fix))


def short(text: object, limit: int = 32) -> str:
    """One line of at most `limit` letters; a Chinese, Japanese or Korean letter is as wide as two others."""
    letters = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    widths = np.cumsum([1 + (unicodedata.east_asian_width(letter) in "WF") for letter in letters])
    if len(widths) and widths[-1] > limit:
        letters = letters[: int(np.searchsorted(widths, limit - 1, side="right"))] + "…"
    return letters


def label(ax: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    """Title and axis labels in our own words (those from data go through `safe`)."""
    ax.set_title(title, fontsize=TITLE, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=TEXT, color=INK)
    ax.set_ylabel(y, fontsize=TEXT, color=INK)
    return ax


def note(ax: Axes, x: float, y: float, text: str, **style) -> Text:
    """Small text at a position given as fractions of the panel."""
    text_artist = ax.text(x, y, text, fontsize=SMALL, color=INK, va="top", transform=ax.transAxes)
    text_artist.update(style)
    return text_artist


def sample(name: str, look: Mapping[str, Any]) -> Line2D:
    """The sample of a line or marker in a legend."""
    line = Line2D([], [], label=name)
    line.update(look)
    return line


def legend(
    ax: Axes | Figure, *handles, outside: bool = False, columns: int = 1, loc: str = "best", **options
):
    """A legend without a frame; `outside` puts it to the right of the panel, where it hides no data."""
    style = {
        "fontsize": SMALL, "labelcolor": INK, "ncols": columns, "frameon": not outside, "framealpha": 0.85,
        "edgecolor": "none", "facecolor": "white", "handlelength": 1.6, "borderaxespad": 0.3, "labelspacing": 0.35,
        "loc": loc, "title_fontsize": SMALL,
    }  # fmt: skip
    style |= {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if outside else {}
    style |= {"handles": list(handles)} if handles else {}
    return ax.legend(**style | options)


def colour_bar(ax: Axes, image, title: str = "", **options):
    """A quiet colour bar of `image` beside `ax`."""
    options = {"fraction": 0.04, "pad": 0.02, "format": FuncFormatter(compact)} | options
    bar = figure_of(ax).colorbar(image, ax=ax, **options)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, labelcolor=INK, colors=QUIET)
    bar.set_label(title, fontsize=SMALL, color=INK)
    return bar


# -- how categories look


def mark(index: int) -> dict[str, str]:
    """Colour and marker of category `index`; the pair repeats only after 56 categories."""
    return {"color": CATEGORIES[index % len(CATEGORIES)], "marker": MARKERS[index % len(MARKERS)]}


def line(index: int) -> dict[str, str]:
    """Colour and line style of category `index`."""
    return {"color": CATEGORIES[index % 7], "linestyle": LINES[index % len(LINES)]}


def of_method(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour, marker and hatch of each method: controls, predictions, real cells and baselines keep their colours.

    Methods of one colour differ in marker and hatch.
    """
    meanings = {
        "floor": INK, "no change": CONTROL, "control": CONTROL, "no operator": CONTROL, "measured": REAL, "real": REAL,
        "oracle": REAL, "operator": PREDICTED, "cellop": PREDICTED, "moved": PREDICTED, "predict": PREDICTED,
    } | _BASELINES  # fmt: skip
    looks, others = {}, cycle((VERMILION, YELLOW, "#000000"))
    for i, name in enumerate(names):
        colour = next((colour for part, colour in meanings.items() if part in str(name).lower()), None)
        colour = colour or next(others)
        looks[name] = {
            "color": colour,
            "marker": MARKERS[i % len(MARKERS)],
            "hatch": HATCHES[i % len(HATCHES)],
        }
    return looks


# -- axes


def long_names(
    ax: Axes, names: Sequence[object], axis: str = "x", limit: int = 40, first: float = 0.0
) -> None:
    """Categories as ticks from `first` on, shortened, and turned when they would overlap."""
    shown = [safe(name, limit) for name in names]
    (ax.set_xticks if axis == "x" else ax.set_yticks)(np.arange(len(shown)) + first, shown)
    if axis == "x":
        figure, position = figure_of(ax), ax.get_subplotspec()
        width = (ax.get_position() if position is None else position.get_position(figure)).width
        if sum(len(name) + 2 for name in shown) > figure.get_figwidth() * width * 12:
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
    for side in [ax.xaxis] * (axis != "y") + [ax.yaxis] * (axis != "x"):
        side.set_major_locator(MaxNLocator(n, min_n_ticks=2))
        side.set_major_formatter(FuncFormatter(compact))


def log_ticks(ax: Axes, axis: str = "y", most: int = 6) -> None:
    """A few compact ticks on the logarithmic axis, within its present limits."""
    side, limits = (ax.xaxis, ax.get_xlim()) if axis == "x" else (ax.yaxis, ax.get_ylim())
    side.set_major_locator(FixedLocator(decades(min(limits), max(limits), most)))
    side.set_major_formatter(FuncFormatter(compact))
    side.set_minor_locator(NullLocator())


def decades(low: float, high: float, most: int) -> np.ndarray:
    """At most `most` of the numbers 1, 2, 5, 10, 20, ... between two positive ends; even steps in a short range."""
    steps = np.array([base * 10.0**power for power in range(-12, 13) for base in (1, 2, 5)])
    steps = steps[(steps >= low) & (steps <= high)]
    if len(steps) < 2:
        steps = np.asarray(MaxNLocator(3).tick_values(low, high))
        return steps[(steps >= low) & (steps <= high)]
    if len(steps) > most:
        steps = steps[np.isclose(np.log10(steps), np.round(np.log10(steps)))]
    return steps[:: -(-len(steps) // most)]


def rounded(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 6, 8, 10 in the value's decade."""
    decade = 10.0 ** np.floor(np.log10(max(value, 1e-3)))
    return float(next(step * decade for step in (1, 1.5, 2, 3, 4, 6, 8, 10, 15) if step * decade >= value))


def linear_threshold(values) -> float:
    """Power of ten below which an energy axis is linear; all negative values lie there."""
    values = np.asarray(values, dtype=float).ravel()
    values = values[np.isfinite(values) & (values != 0)]
    if not values.size:
        return 1.0
    least = 10.0 ** np.floor(np.log10(max(np.median(np.abs(values)) / 3, np.abs(values).max() / 1e3)))
    return float(max(least, 10.0 ** np.ceil(np.log10(-values.min()))) if values.min() < 0 else least)


def energy_scale(ax: Axes, values, axis: str = "x") -> None:
    """Logarithmic above the noise and linear around zero, where a U-statistic may well be negative."""
    set_scale, side = (ax.set_xscale, ax.xaxis) if axis == "x" else (ax.set_yscale, ax.yaxis)
    set_scale("symlog", linthresh=linear_threshold(values), linscale=0.6)
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(compact))


# -- pictures and files


@cache
def families() -> list[str]:
    """Font families of this machine, tried in order for each letter."""
    present = {font.name for font in fontManager.ttflist}
    return [name for name in _FALLBACKS if name in present] or ["sans-serif"]


def finish(drawn: Any, show: bool = False, save: str | Path | None = None) -> Any:
    """What every figure ends with: letters of all scripts, a file, and the picture now where it is asked for."""
    for text in drawn.findobj(Text):
        text.set_fontfamily(families())
    figure = drawn if isinstance(drawn, Figure) else figure_of(drawn)
    if save is not None:
        write_whole(save, lambda part: figure.savefig(part, dpi=2 * DPI, facecolor="white"))
    if show:
        from IPython.display import display

        display(drawn if isinstance(drawn, _Shown) else figure)
        return None
    return drawn


def png(figure: Figure, *, dpi: float = 2 * DPI, colours: int = 256) -> bytes:
    """The figure as PNG, at twice the size of its place on the page; a palette of `colours` keeps a notebook small."""
    raw = BytesIO()
    figure.savefig(raw, format="png", dpi=dpi, facecolor="white")
    with Pixels.open(raw) as picture:
        return small_png(picture.convert("RGB"), colours)


def small_png(picture: Pixels.Image, colours: int = 256) -> bytes:
    """PNG in a palette, our colours among it: one by frequency alone would merge thin lines and grey the ground."""
    codes = (*CATEGORIES, INK, QUIET)
    ours = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in codes], dtype=float)
    tints = [255 + (ours - 255) * share for share in (1.0, 0.75, 0.5, 0.25, 0.0)]
    fixed = np.unique(np.round(np.concatenate(tints)).astype(np.uint8), axis=0)
    common = picture.quantize(
        colours - len(fixed), method=Pixels.Quantize.MEDIANCUT, dither=Pixels.Dither.NONE
    )
    others: np.ndarray = np.asarray(common.getpalette(), dtype=np.uint8).reshape(-1, 3)
    others = others[~((others > 245).all(axis=1) & (others < 255).any(axis=1))]
    palette, small = Pixels.new("P", (1, 1)), BytesIO()
    palette.putpalette(np.concatenate([fixed, others]).ravel().tolist())
    picture.quantize(palette=palette, dither=Pixels.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def described(figure: Figure) -> str:
    """What stands in a figure in words: its title, and each panel's title, axes and legend."""
    keys = [", ".join(text.get_text() for text in key.get_texts()) for key in figure.legends]
    edges = [
        f"{axis}: {text}"
        for axis, text in (("x", figure.get_supxlabel()), ("y", figure.get_supylabel()))
        if text
    ]
    parts = [figure.get_suptitle(), *(_panel(ax) for ax in figure.axes if ax.get_visible()), *edges, *keys]
    return " | ".join(" ".join(part.split()) for part in parts if part).replace(r"\$", "$")


def _panel(ax: Axes) -> str:
    titles = [ax.get_title(loc) for loc in ("left", "center", "right")]
    named = [f"{axis}: {text}" for axis, text in (("x", ax.get_xlabel()), ("y", ax.get_ylabel())) if text]
    legend = ax.get_legend()
    entries = [text.get_text() for text in legend.get_texts()] if legend else []
    return "; ".join([title for title in titles if title] + named + [", ".join(entries)] * bool(entries))
