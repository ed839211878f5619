"""Figures that judge a prediction: distances beside baselines and floor, genes, where the error sits."""

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
    table: pd.DataFrame,
    *,
    methods: Sequence[str] | None = None,
    value: str = "energy",
    unit: str = _ENERGY,
    target: str = "the real perturbed cells",
) -> Figure:
    """Energy distance to the real perturbed cells per group, methods side by side, the noise floor drawn in.

    Parameters
    ----------
    table
        Columns `method`, `energy`, the group (as `group`, or `context` and `perturbation`), perhaps `floor`.
        Several rows for one group and method (seeds) become a bar at the mean with a dot for each.
    methods
        Order of the methods; that of the table by default.
    value, unit
        Another column to draw, and its axis label.
    target
        What the distances lead to.
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
        handles.append(ax.vlines(floors, y - 0.45, y + 0.45, color=s.INK, linewidth=2.2, label="noise floor"))
    ax.spines["left"].set_visible(False)  # it would hide the floors, which lie near zero
    _maybe_symlog(ax, table[value])
    s.long_names(ax, groups, "y")
    ax.set_ylim(len(groups) - 0.45, -0.55)
    s.legend(ax, *handles, outside=True)
    return s.figure_of(s.label(ax, f"Distance to {target} (shorter is better)", unit))


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
        place = rows["group"].map(dict(zip(groups, y, strict=True)))
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
        Columns `stage`, `energy` and the group (as `group`, or `context` and `perturbation`). Stages are
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
    return s.figure_of(s.label(ax, "Where the error sits", _ENERGY))


def predicted_vs_true(
    table: pd.DataFrame, *, n_names: int = 8, columns: int = 3, max_groups: int = 9
) -> Figure:
    """Predicted against true expression change of every gene, the largest true changes named.

    Parameters
    ----------
    table
        Columns `gene`, `true`, `predicted` (change of mean log1p expression, perturbed minus control); on
        request the group (as `group`, or `context` and `perturbation`) for one panel each, `is_de` (bool) for
        marked genes, and `low`, `high` for the interval of each marked gene's prediction
        (:func:`cellop_nb.change_intervals` gives all of them).
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
        rows, columns, height=(2.35 if columns > 1 else 4.5) * rows, width=8 if columns > 1 else 5.5
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
    low, high = float(np.nanmin(both, initial=0.0)), float(np.nanmax(both, initial=0.0))
    span = (high - low) or 1.0
    pad = 0.06 * span
    ax.set(
        xlim=(low - pad, high + (0.5 * span if n_names else pad)),
        ylim=(low - pad, high + pad),
        aspect="equal",
    )
    ax.plot([low, high], [low, high], color=s.QUIET, linewidth=0.8)
    marked = rows["is_de"].to_numpy(dtype=bool) if "is_de" in rows else np.zeros(len(rows), dtype=bool)
    dots = {"linestyle": "", "rasterized": True, "markersize": 3}
    ax.plot(*both[~marked].T, alpha=0.5, **dots | {"color": s.QUIET, "marker": "o"})
    if {"low", "high"} <= set(rows):
        ends = rows.loc[marked, ["low", "high"]].to_numpy(dtype=float).T
        ax.vlines(both[marked, 0], *ends, color=s.mark(3)["color"], alpha=0.35, linewidth=0.9)
    ax.plot(*both[marked].T, **dots | s.mark(3) | {"markersize": 3.5})
    top = rows.iloc[np.argsort(-rows["true"].abs().to_numpy(), kind="stable")[:n_names]]
    genes = [s.safe(gene, 12) for gene in top["gene"]]
    names_beside(ax, top["true"].to_numpy(), top["predicted"].to_numpy(), genes, high + 0.1 * span)
    s.few_ticks(ax, n=4)
    if len(rows) > 2:
        words = f"r = {np.corrcoef(both.T)[0, 1]:.2f}, {len(rows):,} genes"
        s.note(ax, 0.03, 0.98, words + (f"\n{marked.sum():,} differential" if marked.any() else ""))


def names_beside(ax, x: np.ndarray, y: np.ndarray, names: Sequence[str], edge: float) -> None:
    """Names in a column at `edge`, in the order of their points, far enough apart to be read."""
    low, high = ax.get_ylim()
    lines = ax.get_position().height * s.figure_of(ax).get_figheight() * 72 / (s.SMALL * 1.15)
    order = np.argsort(y)
    places = _apart(y[order], (high - low) / lines, low, high)
    for i, place in zip(order, places, strict=True):
        line = {"arrowstyle": "-", "color": s.QUIET, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 1}
        text = {"fontsize": s.SMALL - 1, "color": s.INK, "va": "center", "ha": "left"}
        ax.annotate(
            names[i], (x[i], y[i]), (edge, place), arrowprops=line, annotation_clip=False, **text
        ).set_in_layout(False)


def _apart(places: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Rising places at least `gap` apart: pushed up from below, then down from the top."""
    steps = gap * np.arange(len(places))
    up = np.maximum.accumulate(places - steps) + steps
    down = np.minimum.accumulate((np.minimum(up, high - steps[::-1]) - steps)[::-1])[::-1] + steps
    return np.maximum(down, low + steps) if len(places) else places


def coverage(table: pd.DataFrame, *, names: Sequence[str] | None = None) -> Figure:
    """How often intervals hold the truth against how often they claim to: below the diagonal they are too narrow.

    Parameters
    ----------
    table
        Columns `level`, `coverage` and the group (:func:`~cellop_nb.analysis.gene_intervals.coverage_table`).
    names
        Which groups, at most seven; those of the table by default.
    """
    need(table, "level", "coverage")
    table = table.assign(group=group_labels(table))
    fig, (ax,) = s.canvas(width=5.8, height=3.4)
    ax.plot([0, 1], [0, 1], color=s.QUIET, linewidth=0.9, linestyle=":", label="as claimed")
    for i, name in enumerate(list(names or dict.fromkeys(table["group"]))[:7]):
        rows = table[table["group"] == name].sort_values("level")
        ax.plot(rows["level"], rows["coverage"], label=s.safe(name), markersize=5, **s.mark(i) | s.line(i))
    ax.set(xlim=(0.4, 1.0), ylim=(0.0, 1.02))
    ax.set_xticks(sorted(table["level"].unique()))
    s.few_ticks(ax, "y", 5)
    s.legend(ax, outside=True)
    return s.figure_of(s.label(ax, "Do the intervals hold?", "claimed coverage", "genes inside"))
