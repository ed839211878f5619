"""Figures of a sweep: a heat map of two parameters, parallel coordinates of many, the effect of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from . import style as s


def sweep_map(table: pd.DataFrame, varied: Sequence[str], metric: str, *, best: str = "min") -> Figure:
    """The metric over the parameters: points for one, a heat map for two with few values, else lines.

    Parameters
    ----------
    table
        One row per run with the columns `varied`, `metric` and ``status``.
    varied
        Parameters that vary; over ``seed`` the mean is taken where there is a choice.
    best
        ``"min"`` or ``"max"``: what is good.
    """
    done = table[table["status"] == "done"].dropna(subset=[metric])
    shown = [name for name in varied if name != "seed"] or list(varied)
    few = all(done[name].nunique() <= 12 for name in shown)
    if len(shown) == 1:
        return _points(done, shown[0], metric)
    if len(shown) == 2 and few:
        return _heat_map(done, shown, metric, best)
    return parallel_coordinates(done, shown, metric, best=best)


def _points(done: pd.DataFrame, name: str, metric: str) -> Figure:
    """Every run as a point, the mean of each value as a line."""
    fig, (ax,) = s.canvas(height=3.0)
    positions, names = _places(done[name])
    ax.plot(positions, done[metric], linestyle="", alpha=0.6, markersize=5, **s.mark(0), label="run")
    means = done.groupby(positions)[metric].mean()
    ax.plot(means.index, means, color=s.CATEGORIES[3], linewidth=1.4, label="mean")
    _ticks(ax, "x", names)
    if names is None and _spans_decades(done[name]):
        ax.set_xscale("log")
        s.log_ticks(ax, "x")
    s.few_ticks(ax, "y")
    s.legend(ax, outside=True)
    return s.figure_of(s.label(ax, f"{s.safe(metric)} of each run", s.safe(name), s.safe(metric)))


def _heat_map(done: pd.DataFrame, names: Sequence[str], metric: str, best: str) -> Figure:
    wide = done.pivot_table(index=names[1], columns=names[0], values=metric, aggfunc="mean")
    rows, columns = wide.shape
    fig, (ax,) = s.canvas(height=1.4 + 0.45 * rows, width=min(s.WIDTH, 3.2 + 0.8 * columns))
    image = ax.imshow(wide, cmap=s.RANGE, aspect="auto", origin="lower")
    middle = (np.nanmin(wide) + np.nanmax(wide)) / 2
    for (row, column), value in np.ndenumerate(wide.to_numpy()):
        if np.isfinite(value):
            colour = "white" if value < middle else "black"
            ax.text(column, row, f"{value:.4g}", ha="center", va="center", fontsize=s.SMALL, color=colour)
    row, column = divmod(int((np.nanargmin if best == "min" else np.nanargmax)(wide.to_numpy())), columns)
    ax.plot(column, row, marker="s", markersize=26, markerfacecolor="none", markeredgecolor=s.CATEGORIES[3],
            markeredgewidth=2)  # fmt: skip
    s.long_names(ax, list(wide.columns), "x")
    s.long_names(ax, list(wide.index), "y")
    bar = fig.colorbar(image, ax=ax)
    bar.ax.tick_params(labelsize=s.SMALL)
    title = f"{s.safe(metric)}, mean over runs; best in the frame"
    return s.figure_of(s.label(ax, title, s.safe(names[0]), s.safe(names[1])))


def parallel_coordinates(
    table: pd.DataFrame, names: Sequence[str], metric: str, *, best: str = "min"
) -> Figure:
    """One line per run across the parameters to the metric, coloured by the metric, the best on top.

    A scale that spans two decades is logarithmic.
    """
    fig, (ax,) = s.canvas(height=3.6)
    columns = [*names, metric]
    scales = [_unit(table[name]) for name in columns]
    norm = Normalize(table[metric].min(), table[metric].max())
    order = table[metric].to_numpy().argsort()[:: -1 if best == "min" else 1]
    for rank, row in enumerate(order):
        top = rank >= len(order) - 3
        ax.plot(
            range(len(columns)), [scale[0][row] for scale in scales], linewidth=2.4 if top else 1.0,
            color=colormaps[s.RANGE](norm(table[metric].iloc[row])), alpha=1.0 if top else 0.55,
        )  # fmt: skip
    for x, (_, ticks) in enumerate(scales):
        ax.axvline(x, color=s.QUIET, linewidth=0.8, zorder=0)
        for y, text in ticks:
            side = -1 if x < len(names) else 1
            ax.annotate(
                text, (x, y), xytext=(4 * side, 0), textcoords="offset points", va="center", fontsize=s.SMALL,
                ha="right" if side < 0 else "left", color=s.INK,
                bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.5},
            )  # fmt: skip
    ax.set_xticks(range(len(columns)), [s.safe(name) for name in columns])
    ax.set_xlim(-0.35, len(columns) - 0.75)
    ax.set_yticks([])
    ax.spines[["left", "bottom"]].set_visible(False)
    bar = fig.colorbar(ScalarMappable(norm, s.RANGE), ax=ax, label=s.safe(metric))
    bar.ax.tick_params(labelsize=s.SMALL)
    return s.figure_of(s.label(ax, "Each line is a run; the three best are thick"))


def sweep_effects(effects: pd.DataFrame, metric: str) -> Figure:
    """Effect of each value of each parameter, 95 % interval over seeds where there is one.

    Parameters
    ----------
    effects
        Columns ``parameter, value, effect, low, high``.
    """
    names = list(dict.fromkeys(effects["parameter"]))
    fig, axes = s.canvas(1, max(1, len(names)), height=2.8, sharey=True)
    for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
        part = effects[effects["parameter"] == name]
        positions = np.arange(len(part))
        measured = part["low"].notna()
        ax.axhline(0, color=s.QUIET, linewidth=0.8, linestyle=":")
        ax.vlines(
            positions[measured],
            part["low"][measured],
            part["high"][measured],
            color=s.CATEGORIES[i % 7],
            linewidth=1.8,
        )
        ax.plot(positions, part["effect"], linewidth=0.8, markersize=6, **s.mark(i % 7))
        s.long_names(ax, list(part["value"]), "x")
        ax.set_xlim(-0.5, len(part) - 0.5)
        s.few_ticks(ax, "y")
        s.label(ax, "", s.safe(name), f"change of {s.safe(metric)}" if i == 0 else "")
    return fig


def _places(values: pd.Series) -> tuple[np.ndarray, list | None]:
    """Numbers at their value, anything else and few whole numbers side by side with their names."""
    if pd.api.types.is_float_dtype(values) and values.nunique() > 8:
        return values.to_numpy(), None
    names = sorted(values.unique(), key=lambda value: (isinstance(value, str), value))
    return values.map({name: i for i, name in enumerate(names)}).to_numpy(), names


def _spans_decades(values: pd.Series) -> bool:
    return bool(values.min() > 0 and values.max() / values.min() >= 100)


def _ticks(ax, axis: str, names: list | None) -> None:
    if names is None:
        s.few_ticks(ax, axis)
    else:
        s.long_names(ax, names, axis)


def _unit(values: pd.Series) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Values between 0 and 1, and the ticks (place, text) of their axis."""
    positions, names = _places(values)
    positions = np.log10(positions) if names is None and _spans_decades(values) else positions.astype(float)
    low, span = positions.min(), (positions.max() - positions.min()) or 1.0
    if names is None or len(names) > 12:
        ends = [values.min(), values.max()] if names is None else [names[0], names[-1]]
        return (positions - low) / span, [(0.0, _text(ends[0])), (1.0, _text(ends[1]))]
    return (positions - low) / span, [((i - low) / span, _text(name)) for i, name in enumerate(names)]


def _text(value: object) -> str:
    return (
        s.compact(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool)
        else s.safe(value, 16)
    )
