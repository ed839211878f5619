"""Genes against groups: which genes lead a response, and whether they lead it everywhere."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cellop_nb.notebook.figures import style as s
from cellop_nb.notebook.figures.tables import group_labels, need

_MOST_GROUPS = 16


def response_genes(
    table: pd.DataFrame, *, n_top: int = 20, n_named: int = 10, unit: str = "log2 fold change"
) -> Figure:
    """Change of the genes that lead, gene by group, with each gene's rank within its group.

    Parameters
    ----------
    table
        Columns `gene`, `lfc` and the group (as `group`, or `context` and `perturbation`), with all genes of
        every group. At most 16 groups are drawn.
    n_top
        Genes shown: those with the largest mean absolute change.
    n_named
        Ranks up to this one are written into their cell.
    """
    need(table, "gene", "lfc")
    table = table.assign(group=group_labels(table), size=table["lfc"].abs())
    table = table.assign(rank=table.groupby("group")["size"].rank(ascending=False, method="first"))
    groups = list(dict.fromkeys(table["group"]))[:_MOST_GROUPS]
    table = table[table["group"].isin(groups)]
    genes = table.groupby("gene")["size"].mean().nlargest(n_top).index
    change, rank = (
        table.pivot(index="gene", columns="group", values=name).loc[genes, groups] for name in ("lfc", "rank")
    )
    fig, (ax,) = s.canvas(height=1.5 + 0.2 * len(genes), width=min(s.WIDTH, 2.6 + 0.62 * len(groups)))
    top = float(np.nanmax(np.abs(change.to_numpy()))) or 1.0
    image = ax.imshow(change, cmap=s.DIVERGING, vmin=-top, vmax=top, aspect="auto")
    _write_ranks(ax, change.to_numpy() / top, rank.to_numpy(), n_named)
    s.long_names(ax, groups, "x")
    s.long_names(ax, list(genes), "y")
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = fig.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=s.SMALL, labelcolor=s.INK, colors=s.QUIET)
    bar.set_label(unit, fontsize=s.SMALL, color=s.INK)
    s.label(ax, f"Genes that lead the response (numbers: rank, up to {n_named})")
    return fig


def _write_ranks(ax, shade: np.ndarray, rank: np.ndarray, n_named: int) -> None:
    for row, column in zip(*np.nonzero(rank <= n_named), strict=True):
        ink = "white" if abs(shade[row, column]) > 0.55 else s.INK
        text = f"{rank[row, column]:.0f}"
        ax.text(column, row, text, ha="center", va="center", fontsize=s.SMALL, color=ink)
