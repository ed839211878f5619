"""Figures that judge a prediction: energy distances beside baselines and floor, genes, where the error sits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cellop_nb.notebook.figures import style as s
from cellop_nb.notebook.figures.tables import group_labels, need

_ENERGY = "energy distance (Euclidean, U-statistic)"


def energy_bars(
    table: pd.DataFrame, *, methods: Sequence[str] | None = None, value: str = "energy", unit: str = _ENERGY
) -> Figure:
    """Energy distance to the real perturbed cells per group, methods side by side, the noise floor drawn in.

    Parameters
    ----------
    table
        Columns `method`, `energy`, the group (as `group`, or `context` and `perturbation`), and on request `floor`.
        Several rows for one group and method (seeds) become a bar at the mean with a dot for each.
    methods
        Order of the methods; that of the table by default.
    value, unit
        Another column to draw, and its axis label.
    """
    need(table, "method", value)
    table = table.assign(group=group_labels(table))
    methods = list(methods or dict.fromkeys(table["method"]))
    groups = list(dict.fromkeys(table["group"]))
    thick = 0.82 / len(methods)
    fig, (ax,) = s.canvas(height=1.3 + len(groups) * max(0.34, 0.15 * len(methods)))
    for i, method in enumerate(methods):
        _method_bars(ax, table[table["method"] == method], groups, value, i, thick, -0.41 + thick * (i + 0.5))
    handles = [
        Patch(facecolor=s.OKABE_ITO[i % 8], hatch=s.HATCHES[i % 6], edgecolor="white", label=s.safe(method))
        for i, method in enumerate(methods)
    ]
    if "floor" in table:
        floors = table.groupby("group", sort=False)["floor"].mean().reindex(groups)
        y = np.arange(len(groups))
        handles.append(ax.vlines(floors, y - 0.45, y + 0.45, color=s.INK, linewidth=1.8, label="noise floor"))
    ax.axvline(0, color=s.QUIET, linewidth=0.8)
    _maybe_symlog(ax, table[value])
    s.long_names(ax, groups, "y")
    ax.set_ylim(len(groups) - 0.45, -0.55)
    s.legend(ax, *handles, outside=True)
    return s.label(ax, "Distance to the real perturbed cells (shorter is better)", unit).get_figure()


def _method_bars(
    ax, rows: pd.DataFrame, groups: list, value: str, i: int, thick: float, offset: float
) -> None:
    means = rows.groupby("group")[value].mean().reindex(groups)
    y = np.arange(len(groups)) + offset
    ax.barh(
        y,
        means,
        height=thick * 0.94,
        color=s.OKABE_ITO[i % 8],
        hatch=s.HATCHES[i % 6],
        edgecolor="white",
        linewidth=0.3,
    )
    if rows["group"].duplicated().any():
        place = rows["group"].map({name: row for name, row in zip(groups, y, strict=True)})
        ax.plot(rows[value], place, linestyle="", marker="o", markersize=2.5, color=s.INK)


def _maybe_symlog(ax, values: pd.Series) -> None:
    """Logarithmic only when a linear axis would hide the small groups."""
    sizes = values.abs()[values.abs() > 0]
    if len(sizes) and sizes.max() > 40 * sizes.median():
        s.energy_scale(ax, values)
    else:
        s.few_ticks(ax, "x", 6)


def error_budget(table: pd.DataFrame, *, stages: Sequence[str] | None = None) -> Figure:
    """Where the error sits: the energy distance after each stage of the way, one row per group.

    Parameters
    ----------
    table
        Columns `stage`, `energy` and the group (as `group`, or `context` and `perturbation`). Stages are, say,
        "noise floor", "reconstructed controls", "oracle latents", "operator", "no change".
    stages
        Order in the legend; that of the table by default.
    """
    need(table, "stage", "energy")
    table = table.assign(group=group_labels(table))
    stages = list(stages or dict.fromkeys(table["stage"]))
    wide = table.pivot_table(index="group", columns="stage", values="energy", sort=False).reindex(
        columns=stages
    )
    fig, (ax,) = s.canvas(height=1.4 + 0.3 * max(len(wide), 3))
    y = np.arange(len(wide))
    ax.hlines(y, wide.min(axis=1), wide.max(axis=1), color=s.FAINT, linewidth=4)
    for i, stage in enumerate(stages):
        ax.plot(
            wide[stage],
            y,
            linestyle="",
            markersize=7,
            markeredgecolor="white",
            label=s.safe(stage),
            **s.mark(i),
        )
    _maybe_symlog(ax, table["energy"])
    ax.axvline(0, color=s.QUIET, linewidth=0.8, linestyle=":")
    s.long_names(ax, wide.index, "y")
    ax.set_ylim(len(wide) - 0.4, -0.6)
    s.legend(ax, outside=True, handlelength=0.8)
    return s.label(ax, "Where the error sits", _ENERGY).get_figure()


def predicted_vs_true(
    table: pd.DataFrame, *, n_names: int = 8, columns: int = 3, max_groups: int = 9
) -> Figure:
    """Predicted against true expression change of every gene, the largest true changes named.

    Parameters
    ----------
    table
        Columns `gene`, `true`, `predicted` (change of mean log1p expression, perturbed minus control); on request the
        group (as `group`, or `context` and `perturbation`) for one panel each, and `is_de` (bool) for marked genes.
    n_names
        Genes named per panel.
    """
    need(table, "gene", "true", "predicted")
    has_groups = {"group", "context", "perturbation"} & set(table.columns)
    table = table.assign(group=group_labels(table) if has_groups else "all cells")
    names = list(dict.fromkeys(table["group"]))[:max_groups]
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    fig, axes = s.canvas(
        rows, columns, height=(2.7 if columns > 1 else 4.5) * rows, width=8 if columns > 1 else 5.5
    )
    for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
        _changes(ax, table[table["group"] == name], n_names)
        x = "true change (log1p)" if i >= len(names) - columns else ""
        s.label(ax, s.safe(name), x, "" if i % columns else "predicted change (log1p)")
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    return fig


def _changes(ax, rows: pd.DataFrame, n_names: int) -> None:
    both = rows[["true", "predicted"]].to_numpy(dtype=float)
    low, high = np.nanmin(both, initial=0.0), np.nanmax(both, initial=0.0)
    pad = 0.08 * (high - low) or 1.0
    ax.set(xlim=(low - pad, high + 2.2 * pad), ylim=(low - pad, high + 2.2 * pad), aspect="equal")
    ax.plot([low, high], [low, high], color=s.QUIET, linewidth=0.8)
    marked = rows["is_de"].to_numpy(dtype=bool) if "is_de" in rows else np.zeros(len(rows), dtype=bool)
    dots = {"linestyle": "", "rasterized": True, "markersize": 3}
    ax.plot(*both[~marked].T, alpha=0.5, **dots | {"color": s.QUIET, "marker": "o"})
    ax.plot(*both[marked].T, **dots | s.mark(3) | {"markersize": 3.5})
    top = rows.reindex(rows["true"].abs().sort_values(ascending=False).index)[:n_names]
    spread_names(
        ax, top["true"].to_numpy(), top["predicted"].to_numpy(), [s.safe(gene, 14) for gene in top["gene"]]
    )
    s.few_ticks(ax, n=4)
    if len(rows) > 2:
        s.note(ax, 0.03, 0.98, f"r = {np.corrcoef(both.T)[0, 1]:.2f}, {len(rows):,} genes")


def spread_names(ax, x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> None:
    """Names beside their points, pushed apart downwards where they would overlap."""
    low, high = ax.get_ylim()
    left, right = ax.get_xlim()
    height = (high - low) * s.SMALL * 1.25 / 72 / (ax.get_position().height * ax.get_figure().get_figheight())
    last = np.inf
    for i in np.argsort(-y):
        place = min(y[i], last - height)
        last = place
        near_edge = x[i] > left + 0.72 * (right - left)
        shift = 0.02 * (right - left) * (-1 if near_edge else 1)
        ax.annotate(
            names[i],
            (x[i], y[i]),
            (x[i] + shift, place),
            fontsize=s.SMALL - 1,
            color=s.INK,
            va="center",
            ha="right" if near_edge else "left",
            arrowprops={"arrowstyle": "-", "color": s.QUIET, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 1},
        )
