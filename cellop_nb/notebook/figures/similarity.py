"""Conditions against conditions: which responses are alike, in an order that shows the families."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cellop_nb.errors import LabelError, three_beats
from cellop_nb.notebook.figures import style as s

_MOST = 60


def condition_similarity(table: pd.DataFrame, *, unit: str = "cosine of the responses") -> Figure:
    """Similarity of conditions as a heat map, clustered, with the tree beside it.

    Parameters
    ----------
    table
        (condition, condition), symmetric, -1 to 1 (:func:`~cellop_nb.analysis.profiles.response_similarity`).
        Conditions without a response (NaN) stand last, in grey. At most 60 are drawn: the most alike to others.
    unit
        Label of the scale.
    """
    shown = _chosen(table)
    known = shown.index[~np.isnan(np.diag(shown.to_numpy()))]
    order, tree = _clustered(shown.loc[known, known])
    names = [*order, *shown.index.difference(known, sort=False)]
    values = shown.loc[names, names]
    size = len(names)
    side = min(s.WIDTH, 2.4 + 0.24 * size)
    fig, (left, ax) = s.canvas(1, 2, width=side + 1.0, height=side, width_ratios=(1, 7))
    _draw_tree(left, tree, size)
    colours = mpl.colormaps[s.DIVERGING].with_extremes(bad=s.FAINT)
    image = ax.imshow(values, cmap=colours, vmin=-1, vmax=1, aspect="auto")
    s.long_names(ax, names, "y")
    s.long_names(ax, names, "x")
    ax.yaxis.tick_right()
    for spine in ax.spines.values():
        spine.set_visible(False)
    if size <= 12:
        _write_values(ax, values.to_numpy())
    bar = fig.colorbar(image, ax=ax, fraction=0.035, pad=0.02, location="top", aspect=40)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=s.SMALL, labelcolor=s.INK, colors=s.QUIET)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    bar.set_label(f"which responses are alike: {unit}", fontsize=s.SMALL, color=s.INK)
    return fig


def _chosen(table: pd.DataFrame) -> pd.DataFrame:
    if list(table.index) != list(table.columns):
        fix = "pass the square table of response_similarity"
        raise LabelError(three_beats("the same conditions as rows and columns", f"shape {table.shape}", fix))
    if len(table) <= _MOST:
        return table
    alike = table.abs().mean().nlargest(_MOST).index
    kept = [name for name in table.index if name in set(alike)]
    return table.loc[kept, kept]


def _clustered(table: pd.DataFrame) -> tuple[list, np.ndarray | None]:
    """Average linkage on 1 - cosine, leaves ordered so that neighbours are alike (Bar-Joseph et al. 2001)."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    if len(table) < 2:
        return list(table.index), None
    distance = squareform(np.clip(1 - table.to_numpy(), 0, 2), checks=False)
    tree = optimal_leaf_ordering(linkage(distance, "average"), distance)
    return [table.index[i] for i in leaves_list(tree)], tree


def _draw_tree(ax, tree: np.ndarray | None, size: int) -> None:
    """The tree, its leaves level with the rows of the heat map."""
    from scipy.cluster.hierarchy import dendrogram

    ax.set(ylim=(size - 0.5, -0.5), yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    if tree is None:
        ax.set_visible(False)
        return
    drawn = dendrogram(tree, no_plot=True)
    for leaves, heights in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        ax.plot(heights, (np.array(leaves) - 5) / 10, color=s.QUIET, linewidth=0.9)
    ax.invert_xaxis()
    s.few_ticks(ax, "x", 2)
    ax.set_xlabel("1 - cos", fontsize=s.SMALL, color=s.INK)


def _write_values(ax, values: np.ndarray) -> None:
    for row, column in np.argwhere(~np.isnan(values)):
        ink = "white" if abs(values[row, column]) > 0.6 else s.INK
        text = f"{values[row, column]:.2f}"
        ax.text(column, row, text, ha="center", va="center", fontsize=s.SMALL, color=ink)
