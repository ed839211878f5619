"""Figures of cells: what the decoder reproduces, where cells lie, where operators carry them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import sparse

from cellop_nb.notebook.figures import style as s

_MOST_NAMES, _LAYERS = 24, 12


def predictive_checks(observed, sampled, *, n_points: int = 3000, seed: int = 0) -> Figure:
    """Counts sampled from the model beside the observed ones: zeros, mean-variance, library size.

    Parameters
    ----------
    observed, sampled
        Counts, (cell, gene), dense or sparse; the same genes, cells need not be the same.
    n_points
        At most this many genes are drawn.
    """
    genes = _some(np.arange(observed.shape[1]), n_points, seed)
    real, drawn = _moments(observed, genes), _moments(sampled, genes)
    fig, (zeros, variance, depth) = s.canvas(1, 3, height=2.9)
    dots = {"linestyle": "", "markersize": 2.2, "alpha": 0.5, "rasterized": True}
    zeros.plot([0, 1], [0, 1], color=s.QUIET, linewidth=0.8)
    zeros.plot(real["zeros"], drawn["zeros"], **dots | s.mark(0))
    zeros.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    gap = np.mean(np.abs(real["zeros"] - drawn["zeros"]))
    s.note(zeros, 0.04, 0.97, f"mean gap {gap:.3f}")
    s.label(zeros, "Zeros per gene", "observed fraction", "sampled fraction")
    for index, (name, part) in enumerate((("observed", real), ("sampled", drawn))):
        keep = (part["mean"] > 0) & (part["variance"] > 0)
        style = dots | s.mark(index) | ({"markerfacecolor": "none"} if index else {})
        variance.plot(part["mean"][keep], part["variance"][keep], label=name, **style)
        depth.hist(
            np.log10(part["size"][part["size"] > 0]),
            bins=40,
            density=True,
            histtype="step",
            linewidth=1.6,
            label=name,
            **s.line(index),
        )
    low, high = variance.get_xlim()
    variance.plot(
        [max(low, 1e-4), high], [max(low, 1e-4), high], color=s.QUIET, linewidth=0.8, label="Poisson"
    )
    variance.set(xscale="log", yscale="log")
    s.log_ticks(variance, "x")
    s.log_ticks(variance, "y")
    s.legend(variance, loc="upper left", markerscale=2.5)
    s.label(variance, "Mean and variance per gene", "mean count", "variance")
    s.few_ticks(depth, "y", 4)
    _powers(depth)
    s.legend(
        depth,
        *(Line2D([], [], label=name, **s.line(i)) for i, name in enumerate(("observed", "sampled"))),
        loc="upper left",
    )
    depth.set_ylim(0, depth.get_ylim()[1] * 1.25)
    s.label(depth, "Library size", "counts per cell (log scale)", "density")
    return fig


def _moments(counts, genes: np.ndarray) -> dict[str, np.ndarray]:
    """Zero fraction, mean and variance per gene; library size per cell over all genes."""
    size = np.asarray(counts.sum(axis=1)).ravel()
    if sparse.issparse(counts):
        part = counts.tocsc()[:, genes].astype(float)
        mean = np.asarray(part.mean(axis=0)).ravel()
        zeros = 1 - np.asarray((part > 0).mean(axis=0)).ravel()
        square = np.asarray(part.multiply(part).mean(axis=0)).ravel()
    else:
        part = np.asarray(counts)[:, genes].astype(float)
        mean, zeros, square = part.mean(axis=0), (part == 0).mean(axis=0), (part**2).mean(axis=0)
    return {"zeros": zeros, "mean": mean, "variance": square - mean**2, "size": size}


def _powers(ax) -> None:
    """Counts as tick labels on an axis that holds log10 values."""
    low, high = ax.get_xlim()
    steps = np.array([base * 10.0**power for power in range(9) for base in (1, 2, 5)])
    ticks = steps[(np.log10(steps) >= low) & (np.log10(steps) <= high)]
    ticks = ticks if len(ticks) <= 5 else ticks[:: -(-len(ticks) // 5)]
    ax.set_xticks(np.log10(ticks), [s.compact(tick) for tick in ticks])


def _some(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    return rows if len(rows) <= n else np.sort(np.random.default_rng(seed).choice(rows, n, replace=False))


def embedding(
    coords,
    labels: pd.DataFrame,
    *,
    axis: str = "UMAP",
    columns: int | None = None,
    size: float | None = None,
    max_cells: int = 20_000,
    seed: int = 0,
) -> Figure:
    """Cells in two dimensions, one panel for each column of `labels`.

    Parameters
    ----------
    coords
        (cell, 2).
    labels
        One column per panel; text and categories get colour *and* marker, numbers a colour bar.
    axis
        Name of the projection, for the axis labels.
    max_cells
        More are thinned at random (seeded), all panels alike.
    """
    coords, names = np.asarray(coords, dtype=float), list(labels.columns)
    keep = _some(np.arange(len(coords)), max_cells, seed)
    shuffled = np.random.default_rng(seed).permutation(keep)  # no group lies on top by order alone
    columns = columns or min(2, len(names))
    rows = -(-len(names) // columns)
    fig, axes = s.canvas(rows, columns, height=(3.1 if columns > 1 else 4.2) * rows)
    size = size or float(np.clip(300 / np.sqrt(len(keep)), 1.5, 16.0))
    for ax, name in zip(axes, names, strict=False):
        values = labels[name].iloc[shuffled]
        number = pd.api.types.is_numeric_dtype(values) and not isinstance(values.dtype, pd.CategoricalDtype)
        (_by_number if number and values.nunique() > 2 else _by_name)(ax, coords[shuffled], values, size)
        _map_axes(ax, axis, s.safe(name))
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    return fig


def _map_axes(ax, axis: str, title: str) -> None:
    s.label(ax, title, f"{axis} 1", f"{axis} 2").set(xticks=[], yticks=[])
    ax.set_aspect("equal", adjustable="datalim")


def _by_number(ax, coords: np.ndarray, values: pd.Series, size: float) -> None:
    numbers = values.to_numpy(dtype=float)
    low, high = np.nanquantile(numbers, [0.01, 0.99])
    dots = ax.scatter(
        *coords.T, c=numbers, s=size, cmap=s.RANGE, vmin=low, vmax=high, linewidths=0, rasterized=True
    )
    bar = s.figure_of(ax).colorbar(dots, ax=ax, fraction=0.045, pad=0.02, extend="both")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=s.SMALL, labelcolor=s.INK, colors=s.QUIET)


def _by_name(ax, coords: np.ndarray, values: pd.Series, size: float) -> None:
    texts = values.astype(str)
    order = sorted(texts.unique()) if len(texts.unique()) <= _MOST_NAMES else list(texts.value_counts().index)
    handles = []
    for i, name in enumerate(order[:_MOST_NAMES]):
        style = s.mark(i)
        here = np.flatnonzero(texts == name)
        # in layers, category by category in each, so that the last category does not hide the others
        for layer, some in enumerate(np.array_split(here, _LAYERS)):
            dots = {"s": size, "alpha": 0.75, "linewidths": 0, "rasterized": True}
            ax.scatter(*coords[some].T, zorder=1 + layer / _LAYERS, **dots, **style)
        handles.append(Line2D([], [], linestyle="", markersize=5, label=s.safe(name, 22), **style))
    rest = texts.isin(order[_MOST_NAMES:]).to_numpy()
    if rest.any():
        ax.scatter(*coords[rest].T, s=size, color=s.FAINT, linewidths=0, rasterized=True, zorder=0)
        more = f"{len(order) - _MOST_NAMES} more"
        handles.append(Line2D([], [], linestyle="", marker="o", color=s.FAINT, markersize=5, label=more))
    s.legend(ax, *handles, outside=True, columns=2 if len(handles) > 14 else 1, handlelength=0.8)


def transport(
    control: Mapping[str, np.ndarray],
    moved: Mapping[str, np.ndarray],
    real: Mapping[str, np.ndarray],
    *,
    notes: Mapping[str, str] | None = None,
    axis: str = "PC",
    columns: int = 3,
    max_groups: int = 9,
    max_cells: int = 400,
    seed: int = 0,
) -> Figure:
    """Per group: control cells, the same cells moved by the operator, and the real perturbed cells.

    Parameters
    ----------
    control, moved, real
        Group label -> coordinates in a common projection, (cell, 2). Group order is that of `moved`.
    notes
        Group label -> a short text in its panel (the energy distance, say).
    max_cells
        Cells per cloud and panel, drawn at random (seeded). Large marks are the means of all cells. Each
        panel has its own limits, one unit being as long upwards as sideways.
    """
    names = list(moved)[:max_groups]
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    fig, axes = s.canvas(rows, columns, height=2.45 * rows + 0.4)
    clouds = (
        ("control", control, 6, 0.45),
        ("real perturbed", real, 1, 0.55),
        ("control moved", moved, 0, 0.55),
    )
    for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
        # the smallest cloud last, so that it is not hidden
        for _, cells, index, alpha in sorted(clouds, key=lambda cloud: -len(cloud[1][name])):
            _cloud(ax, np.asarray(cells[name], dtype=float), s.mark(index), alpha, max_cells, seed)
        s.label(
            ax,
            s.safe(name),
            f"{axis} 1" if i >= len(names) - columns else "",
            "" if i % columns else f"{axis} 2",
        )
        ax.set(xticks=[], yticks=[])
        ax.set_aspect("equal", adjustable="datalim")
        s.note(ax, 0.02, 0.99, s.safe((notes or {}).get(name, ""), 60))
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    handles = [
        Line2D([], [], linestyle="", markersize=6, label=label, **s.mark(index))
        for label, _, index, _ in clouds
    ]
    s.legend(fig, *handles, loc="outside upper center", columns=3, handlelength=0.8)
    return fig


def _cloud(ax, cells: np.ndarray, style: dict[str, str], alpha: float, n: int, seed: int) -> None:
    ax.scatter(
        *cells[_some(np.arange(len(cells)), n, seed)].T,
        s=7,
        alpha=alpha,
        linewidths=0,
        rasterized=True,
        **style,
    )
    ax.plot(
        *cells.mean(axis=0), markersize=9, markeredgecolor="white", markeredgewidth=1.4, zorder=3, **style
    )
