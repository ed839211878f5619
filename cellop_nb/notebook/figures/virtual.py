"""Figures of virtual cells: how far a dose carries them, and what it does to single genes."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from cellop_nb.notebook.figures import style as s
from cellop_nb.notebook.figures.tables import need


def strength_curves(
    table: pd.DataFrame, genes: pd.DataFrame | None = None, *, floor: float | None = None
) -> Figure:
    """The way from the control cells to the perturbed ones: distances and, on request, genes by strength.

    Parameters
    ----------
    table
        Columns `strength`, `energy` and `target` (what the moved cells are compared with).
    genes
        Columns `strength`, `gene`, `lfc`; `low` and `high` for a band. At most 7 genes are drawn.
    floor
        Noise floor of the distances.
    """
    need(table, "strength", "energy", "target")
    fig, axes = s.canvas(
        1, 1 if genes is None else 2, height=3.0, width=s.WIDTH if genes is not None else 4.6
    )
    for i, (target, rows) in enumerate(table.groupby("target", sort=False)):
        axes[0].plot(
            rows["strength"], rows["energy"], label=s.safe(target), markersize=4, **s.mark(i) | s.line(i)
        )
    if floor is not None:
        axes[0].axhline(floor, color=s.INK, linewidth=1.0, linestyle=(0, (1, 2)), label="noise floor")
    s.label(axes[0], "Distance of the moved cells", "strength (1: measured)", "energy distance (Euclid, U)")
    s.legend(axes[0])
    if genes is not None:
        need(genes, "strength", "gene", "lfc")
        for i, (gene, rows) in enumerate(list(genes.groupby("gene", sort=False))[:7]):
            axes[1].plot(
                rows["strength"], rows["lfc"], label=s.safe(gene), markersize=4, **s.mark(i) | s.line(i)
            )
            if {"low", "high"} <= set(rows):
                axes[1].fill_between(
                    rows["strength"], rows["low"], rows["high"], color=s.OKABE_ITO[i], alpha=0.15, linewidth=0
                )
        s.label(axes[1], "Genes", "strength (1: measured)", "log2 fold change")
        s.legend(axes[1], outside=True)
    for ax in axes:
        ax.axvline(1.0, color=s.QUIET, linewidth=0.8, linestyle="--")
        s.few_ticks(ax)
    return fig
