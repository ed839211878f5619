"""Figures about the data: cells per group, depth, and the noise that no model can beat."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cellop_nb.notebook.figures import style as s
from cellop_nb.notebook.figures.tables import group_labels, need, wide_counts


def library_sizes(sizes, groups, *, unit: str = "counts per cell", max_groups: int = 24) -> Figure:
    """Library size per group: violins on a logarithmic axis, median and quartiles marked.

    Parameters
    ----------
    sizes
        Total counts, (cell,).
    groups
        Group label of each cell, (cell,).
    max_groups
        The largest groups are shown when there are more.
    """
    table = pd.DataFrame({"size": np.asarray(sizes, dtype=float), "group": np.asarray(groups).astype(str)})
    table = table[table["size"] > 0]
    order = table["group"].value_counts().index[:max_groups]
    names = sorted(order)
    logs = [np.log10(table.loc[table["group"] == name, "size"].to_numpy()) for name in names]
    fig, (ax,) = s.canvas(height=max(2.2, 0.9 + 0.3 * len(names)))
    for row, values in enumerate(logs):
        _violin(ax, values, row)
    s.long_names(ax, [f"{name} (n = {len(v):,})" for name, v in zip(names, logs, strict=True)], "y")
    ax.invert_yaxis()
    _decades(ax, np.concatenate(logs) if logs else np.zeros(1))
    return s.figure_of(s.label(ax, "Library size per group", f"library size ({unit}, log scale)"))


def _violin(ax, values: np.ndarray, row: int) -> None:
    """One horizontal violin with its quartiles; a flat or tiny group is shown as points."""
    if len(values) > 5 and np.ptp(values) > 0:
        body = ax.violinplot(
            [values], positions=[row], orientation="horizontal", widths=0.85, showextrema=False
        )
        for part in body["bodies"]:
            part.set(facecolor=s.OKABE_ITO[5], edgecolor=s.OKABE_ITO[0], alpha=0.7, linewidth=0.8)
    else:
        ax.plot(values, np.full(len(values), row), linestyle="", markersize=3, **s.mark(0))
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    ax.hlines(row, low, high, color=s.INK, linewidth=2.5)
    ax.plot(middle, row, marker="o", color="white", markeredgecolor=s.INK, markersize=5)


def _decades(ax, logs: np.ndarray) -> None:
    """Ticks at 1, 2 and 5 in each decade of an axis that holds log10 values."""
    steps = np.array([base * 10.0**power for power in range(-1, 10) for base in (1, 2, 5)])
    low, high = logs.min() - 0.05, logs.max() + 0.05
    ticks = steps[(np.log10(steps) >= low) & (np.log10(steps) <= high)]
    ticks = ticks if len(ticks) <= 8 else [tick for tick in ticks if f"{tick:.0e}"[0] == "1"]
    ax.set_xticks(np.log10(ticks), [s.compact(tick) for tick in ticks])
    ax.set_xlim(low, high)


def group_counts(table: pd.DataFrame, *, min_cells: int = 10) -> Figure:
    """Cells per (context, perturbation) as a heat map with the numbers written in.

    Parameters
    ----------
    table
        Long, with columns `context`, `perturbation`, `cells`; or wide, one row per context and one column per
        perturbation.
    min_cells
        Groups below this number are framed: too few to fit or to judge.
    """
    wide = wide_counts(table)
    n_rows, n_columns = wide.shape
    fig, (ax,) = s.canvas(
        height=1.3 + 0.32 * max(n_rows, 2), width=min(s.WIDTH, max(4.5, 2.6 + 0.75 * n_columns))
    )
    values = wide.to_numpy(dtype=float)
    # log1p: groups differ by orders of magnitude
    shades = ax.imshow(np.log1p(values), cmap=s.RANGE, aspect="auto", vmin=0)
    s.long_names(ax, wide.columns)
    s.long_names(ax, wide.index, "y")
    if n_columns <= 16:
        _write_counts(ax, values)
    for row, column in np.argwhere(values < min_cells):
        ax.add_patch(_frame(row, column))
    bar = fig.colorbar(shades, ax=ax, fraction=0.04, pad=0.02)
    _count_bar(bar, values.max(initial=1.0))
    few = int((values < min_cells).sum())
    warning = f"\nframed: {few} with fewer than {min_cells}" if few else ""
    return s.figure_of(s.label(ax, f"Cells per context and perturbation{warning}"))


def _write_counts(ax, values: np.ndarray) -> None:
    bright = np.log1p(values) > 0.6 * np.log1p(values.max(initial=1.0))
    for (row, column), cells in np.ndenumerate(values):
        colour = "black" if bright[row, column] else "white"
        ax.text(column, row, f"{cells:,.0f}", ha="center", va="center", fontsize=s.SMALL, color=colour)


def _frame(row: int, column: int):
    from matplotlib.patches import Rectangle

    corner = (column - 0.46, row - 0.46)
    return Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=s.OKABE_ITO[1], linewidth=2, linestyle="--")


def _count_bar(bar, top: float) -> None:
    ticks = [tick for tick in (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000) if tick <= top]
    bar.set_ticks(np.log1p(ticks), labels=[s.compact(tick) for tick in ticks])
    bar.ax.tick_params(labelsize=s.SMALL, labelcolor=s.INK, colors=s.QUIET)
    bar.outline.set_visible(False)
    bar.set_label("cells (log scale)", fontsize=s.SMALL, color=s.INK)


def noise_floor(table: pd.DataFrame, *, max_groups: int = 40) -> Figure:
    """Per group: the energy distance to its controls beside the split-half floor of the group itself.

    Parameters
    ----------
    table
        One row per group: `energy` (to the controls), `floor` (between two random halves of the group), and
        the group as `group`, or as `context` and `perturbation`. Energy distances are Euclidean, U-statistic.
    """
    need(table, "energy", "floor")
    rows = table.assign(group=group_labels(table)).sort_values("energy", ascending=False).head(max_groups)
    fig, (ax,) = s.canvas(height=1.3 + 0.26 * max(len(rows), 3))
    y = np.arange(len(rows))
    ax.hlines(y, rows["floor"], rows["energy"], color=s.FAINT, linewidth=4)
    ax.plot(
        rows["floor"],
        y,
        linestyle="",
        label="floor: two halves of the group",
        markerfacecolor="white",
        markersize=6,
        **s.mark(1),
    )
    ax.plot(rows["energy"], y, linestyle="", label="effect: perturbed to control", markersize=6, **s.mark(0))
    s.energy_scale(ax, [*rows["energy"], *rows["floor"]])
    ax.axvline(0, color=s.QUIET, linewidth=0.8, linestyle=":")
    s.long_names(ax, rows["group"], "y")
    ax.invert_yaxis()
    # above the panel: no corner is free of groups in every screen
    s.legend(ax, loc="lower right", bbox_to_anchor=(1.0, 1.0), columns=2, handlelength=0.8)
    return s.figure_of(s.label(ax, "Effect against noise floor", "energy distance (Euclidean, U-statistic)"))
