"""The figures of the package, `co.pl`: a table or cells in, matplotlib's own Axes or Figure out.

Control cells are grey, real perturbed cells orange, predictions blue, in every figure; categories differ in marker,
line or hatch too. Labels from data are shortened. With hundreds of groups the strongest and the weakest are named, and
the others summarised between them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from scipy import sparse

from ..errors import LabelError, counted, did_you_mean
from . import style as s
from .live import Columns, Dashboard, Marks, changes_of_history, pick_panels

__all__ = [
    "embedding",
    "energy_bars",
    "error_budget",
    "gradient_map",
    "group_counts",
    "library_sizes",
    "noise_floor",
    "predicted_vs_true",
    "predictive_checks",
    "response_axes",
    "response_genes",
    "screen_effects",
    "shapes",
    "spectra",
    "strength_curves",
    "training_curves",
    "transport",
]

_ENERGY = "energy distance (Euclidean, U-statistic)"
_SHARED = {
    "max_groups": "With more groups the strongest and the weakest are named, the median of the others between them.",
    "ax": "Axes to draw into; those of a new figure by default.",
    "show": "True shows the figure now and returns nothing; else it shows itself where it is the last line of a cell.",
    "save": "File to write: vector (``.svg``, ``.pdf``) or ``.png``.",
}
"""Parameters that mean the same in every figure."""
_RESULTS = {
    "Axes": "The panel, in its figure.",
    "Figure": "A new one of several panels, which are its ``axes``; so it takes no `ax`.",
}

Draws = TypeVar("Draws", bound=Callable)


def _figure(draw: Draws) -> Draws:
    """Complete a figure's help by what every figure takes and gives."""
    signature, doc = inspect.signature(draw), inspect.cleandoc(draw.__doc__ or "")
    names = [name for name in _SHARED if name in signature.parameters and f"\n{name}\n" not in doc]
    shared = "".join(f"{name}\n    {_SHARED[name]}\n" for name in names)
    parameters, raises, more = doc.partition("\n\nRaises\n")
    returns = (
        f"\nReturns\n-------\n{signature.return_annotation}\n    {_RESULTS[signature.return_annotation]}"
    )
    draw.__doc__ = f"{parameters}\n{shared}{returns}{raises}{more}"
    return draw


# -- what figures need from a table


def _need(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table without `columns`, naming the first missing one and the closest one there is."""
    for column in columns:
        if column not in table:
            expected = f"a table with the columns {', '.join(columns)}"
            problem = f"no column {column!r} among {list(map(str, table.columns))}"
            raise LabelError(expected, problem, f"rename or add it; {did_you_mean(column, table.columns)}")


def _group_labels(table: pd.DataFrame) -> pd.Series:
    """One label per row: column `group`, or `context, perturbation`, or whichever of the two is there."""
    if "group" in table:
        return table["group"].astype(str)
    parts = [table[name].astype(str) for name in ("context", "perturbation") if name in table]
    if not parts:
        return pd.Series(table.index.map(str), index=table.index)
    return parts[0].str.cat(parts[1:], sep=", ") if len(parts) > 1 else parts[0]


def _ends(ranked: Sequence[str], most: int, others: str = "others (median)") -> dict[str, str]:
    """Group to the name that it is shown under, strongest first: those in the middle share one name if too many."""
    if len(ranked) <= most:
        return {name: name for name in ranked}
    first, last = most - 1 - most // 3, len(ranked) - most // 3
    middle = f"{last - first} {others}"
    return {name: middle if first <= i < last else name for i, name in enumerate(ranked)}


def _named(strength: pd.Series, most: int) -> list[str]:
    """All groups in their own order; the strongest and the weakest where there are more."""
    ranked = strength.sort_values(ascending=False, kind="stable").index
    shown = strength.index if len(strength) <= most else ranked
    return [name for name in shown if _ends(ranked, most)[name] == name]


def _few_groups(
    table: pd.DataFrame, value: str, most: int, by: Sequence[str] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """The table with a column `group` of at most `most` groups, and their order: that of the table, or strongest first.

    The median (for each value of the columns `by`) stands for all groups but the strongest and the weakest.
    """
    table = table.assign(group=_group_labels(table))
    strength = table[value].abs().groupby(table["group"], sort=False).mean()
    if len(strength) <= most:
        return table, list(strength.index)
    names = _ends(strength.sort_values(ascending=False, kind="stable").index, most)
    shown = table.assign(group=table["group"].map(names))
    middle = shown["group"] != table["group"]
    medians = shown[middle].groupby(["group", *by], sort=False).median(numeric_only=True).reset_index()
    return pd.concat([shown[~middle], medians], ignore_index=True), list(dict.fromkeys(names.values()))


def _few_rows(wide: pd.DataFrame, most: int) -> pd.DataFrame:
    """Rows with the largest and the smallest sums, and the median of the others between them."""
    if len(wide) <= most:
        return wide
    ranked = wide.loc[wide.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    names = pd.Index(list(_ends(list(map(str, ranked.index)), most).values()), name=wide.index.name)
    return ranked.groupby(names, sort=False).median()


def _draw(n: int, most: int, seed: int = 0) -> np.ndarray:
    """At most so many of `n` rows, in random order."""
    return np.random.default_rng(seed).permutation(n)[:most]


# -- what figures are made of


def _grid(
    n: int, columns: int, *, row_height: float, width: float = s.WIDTH, x: str = "", y: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure of `n` panels, so many beside each other, with the words of all axes at its edges."""
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    fig, axes = s.canvas(rows, columns, height=row_height * rows, width=width)
    for ax in axes[n:]:
        ax.set_visible(False)
    fig.supxlabel(x, fontsize=s.TEXT, color=s.INK)
    fig.supylabel(y, fontsize=s.TEXT, color=s.INK)
    return fig, axes[:n]


def _room_below(names: Sequence[object]) -> float:
    """Inches that turned names take."""
    return 0.05 * max(len(s.short(name, 28)) for name in names)


def _heatmap(ax: Axes, table: pd.DataFrame, norm: Normalize, cmap: str, texts: pd.DataFrame | None) -> None:
    """The table as coloured cells, `texts` in them; what is missing is grey."""
    ax.set_facecolor(s.FAINT)
    bare = table.set_axis(range(len(table)), axis=0).set_axis(range(table.shape[1]), axis=1)
    sns.heatmap(
        bare, ax=ax, norm=norm, cmap=cmap, annot=texts, fmt="", annot_kws={"size": s.SMALL}, cbar=False
    )
    s.long_names(ax, table.columns, "x", 28, first=0.5)
    s.long_names(ax, table.index, "y", 28, first=0.5)
    ax.tick_params(axis="y", labelrotation=0)


def _spans(ax: Axes | None, wide: pd.DataFrame, title: str) -> Axes:
    """Energy distances (group, stage) as marks on one line per group."""
    ax = s.axes_of(ax, height=1.4 + 0.28 * max(len(wide), 3))
    y = np.arange(len(wide))
    ax.hlines(y, wide.min(axis=1), wide.max(axis=1), color=s.FAINT, linewidth=4)
    for stage, look in s.of_method(list(wide.columns)).items():
        style = {"linestyle": "", "markersize": 7, "markeredgecolor": "white"}
        ax.plot(wide[stage], y, label=s.safe(stage), color=look["color"], marker=look["marker"])[0].update(
            style
        )
    _log_if_wide(ax, wide.to_numpy())
    ax.axvline(0, color=s.QUIET, linewidth=0.8, linestyle=":")
    s.long_names(ax, wide.index, "y")
    ax.set_ylim(len(wide) - 0.4, -0.6)
    s.legend(ax, outside=True, handlelength=0.8)
    return s.label(ax, title, _ENERGY)


def _log_if_wide(ax: Axes, values: Any) -> None:
    """Logarithmic only when a linear axis would hide the small groups."""
    sizes = np.abs(np.asarray(values, dtype=float)).ravel()
    sizes = sizes[sizes > 0]
    if len(sizes) and sizes.max() > 40 * np.median(sizes):
        s.energy_scale(ax, values)
    else:
        s.few_ticks(ax, "x", 6)


def _kinds(labels: pd.Series, most: int) -> tuple[pd.Series, dict[str, dict[str, str]]]:
    """Labels with one name for the rare ones, and how each looks: the `most` frequent have colours of their own."""
    names = labels.value_counts().index
    looks = {name: s.mark(i) for i, name in enumerate(sorted(names[:most]))}
    if len(names) > most:
        others = f"{len(names) - most} others"
        labels = labels.where(labels.isin(list(looks)), others)
        looks[others] = {"color": s.FAINT, "marker": "o"}
    return labels, looks


def _dots(
    ax: Axes, points: np.ndarray, kinds: Any, looks: Mapping[str, Mapping[str, str]], size: float
) -> None:
    """Cells (cell, 2) in the colour and marker of their kind, in random order, so that no kind hides the others."""
    order = _draw(len(points), len(points))
    colours = {kind: look["color"] for kind, look in looks.items()}
    markers = {kind: look["marker"] for kind, look in looks.items()}
    kinds = np.asarray(kinds)[order]
    x, y = points[order, 0], points[order, 1]
    sns.scatterplot(
        x=x, y=y, hue=kinds, style=kinds, palette=colours, markers=markers, s=size, alpha=0.7, linewidth=0,
        rasterized=True, legend=False, ax=ax,
    )  # fmt: skip


def _keys(looks: Mapping[str, Mapping[str, str]]) -> list:
    """What a legend shows of dots."""
    return [
        s.sample(s.safe(kind, 22), {**look, "linestyle": "", "markersize": 5}) for kind, look in looks.items()
    ]


# -- data: cells per group, depth, and the noise that no model can beat


@_figure
def library_sizes(
    sizes: np.ndarray,
    groups: Sequence[object],
    *,
    max_groups: int = 24,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Library size per group: violins on a logarithmic axis, median and quartiles marked.

    Parameters
    ----------
    sizes
        Total counts, (cell,).
    groups
        Group label of each cell, (cell,).
    max_groups
        With more groups those of the deepest and the shallowest cells are named, and the others are one violin.
    """
    table = pd.DataFrame({"size": np.asarray(sizes, dtype=float), "group": np.asarray(groups).astype(str)})
    table = table[table["size"] > 0]
    depth = table.groupby("group")["size"].median().sort_values(ascending=False, kind="stable")
    shown = _ends(list(depth.index), max_groups, "others")
    table["group"] = table["group"].map(shown)
    names = list(dict.fromkeys(shown.values())) if len(depth) > max_groups else sorted(shown)
    cells = table["group"].value_counts()
    ax = s.axes_of(ax, height=max(2.2, 0.9 + 0.3 * len(names)))
    sns.violinplot(
        table, x="size", y="group", order=names, log_scale=(True, False), density_norm="width", color=s.FAINT,
        linecolor=s.INK, linewidth=0.8, cut=0, ax=ax,
    )  # fmt: skip
    s.long_names(ax, [f"{s.short(name, 28)} (n = {cells[name]:,})" for name in names], "y")
    s.log_ticks(ax, "x", 8)
    return s.finish(
        s.label(ax, "Library size per group", "library size (counts per cell, log scale)"), show, save
    )


@_figure
def group_counts(
    table: pd.DataFrame,
    *,
    min_cells: int = 10,
    max_names: int = 30,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Cells per (context, perturbation) as a heat map with the numbers written in.

    Parameters
    ----------
    table
        One row per group, with columns `context`, `perturbation`, `cells`.
    min_cells
        Groups below this number are framed: too few to fit or to judge.
    max_names
        With more perturbations (or contexts) those with most and with fewest cells are named, the median of the others
        between them.
    """
    _need(table, "context", "perturbation", "cells")
    named = table.astype({"context": str, "perturbation": str})
    every = named.pivot_table("cells", "context", "perturbation", aggfunc="sum", sort=False).fillna(0)
    wide = _few_rows(_few_rows(every, max_names).T, max_names).T
    n_rows, n_columns = wide.shape
    height = 1.3 + 0.32 * max(n_rows, 2) + _room_below(wide.columns)
    ax = s.axes_of(ax, height=height, width=min(s.WIDTH, max(4.5, 2.6 + 0.75 * n_columns)))
    norm = AsinhNorm(1, vmin=0, vmax=wide.to_numpy().max(initial=1.0))
    _heatmap(ax, wide, norm, s.RANGE, wide.map("{:,.0f}".format) if n_columns <= 14 else None)
    for row, column in np.argwhere(wide.to_numpy() < min_cells):
        ax.add_patch(
            Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, fill=False, color=s.VERMILION, linestyle="--")
        )
    ticks = [tick for tick in (0, 1, 10, 100, 1_000, 10_000, 100_000) if tick <= norm.vmax]
    s.colour_bar(ax, ax.collections[0], "cells (log scale)").set_ticks(ticks)
    few = int((every.to_numpy() < min_cells).sum())
    warning = f"\nframed: fewer than {min_cells} ({few:,} of {every.size:,} groups)" if few else ""
    return s.finish(s.label(ax, f"Cells per context and perturbation{warning}"), show, save)


@_figure
def noise_floor(
    table: pd.DataFrame,
    *,
    max_groups: int = 40,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Per group: the energy distance to its controls beside the split-half floor of the group itself.

    Parameters
    ----------
    table
        One row per group: `energy` (to the controls), `floor` (between two random halves of the group), and
        the group as `group`, or as `context` and `perturbation`. Energy distances are Euclidean, U-statistic.
    """
    _need(table, "energy", "floor")
    rows = table.sort_values("energy", ascending=False, kind="stable")
    rows, names = _few_groups(rows, "energy", max_groups)
    names_of = {"floor": "floor: halves of the group", "energy": "measured effect"}
    wide = rows.groupby("group")[list(names_of)].mean().loc[names].rename(columns=names_of)
    return s.finish(_spans(ax, wide, "Effect against noise floor"), show, save)


@_figure
def screen_effects(
    table: pd.DataFrame,
    *,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Strength of every effect against the cells that show it, beside the smallest one that so many cells can show.

    Parameters
    ----------
    table
        One row per group, as of :func:`cellop_nb.distances.screen_effects` or ``etest``: ``n_perturbed, e_distance,
        detectable, different``.
    """
    _need(table, "n_perturbed", "e_distance", "detectable", "different")
    rows = table.assign(group=_group_labels(table)).dropna(subset="e_distance")
    differs = rows["different"].astype(bool)
    looks = {
        "differs from controls": {"color": s.REAL, "marker": "o"},
        "like controls": {"color": s.QUIET, "marker": "X"},
    }
    ax = s.axes_of(ax, height=3.4)
    _dots(ax, rows[["n_perturbed", "e_distance"]].to_numpy(), np.where(differs, *looks), looks, 20)
    least = rows.groupby("n_perturbed")["detectable"].median()
    dotted = {"color": s.INK, "linewidth": 1.2, "linestyle": (0, (1, 2))}
    ax.plot(least.index, least)[0].update(dotted)
    s.energy_scale(ax, [*rows["e_distance"], *least], "y")
    if rows["n_perturbed"].max() > 20 * rows["n_perturbed"].min():
        ax.set_xscale("log")
        s.log_ticks(ax, "x")
    named: list[float] = []
    for row in rows[differs].nlargest(8, "e_distance").itertuples():
        across = ax.transAxes.inverted().transform(ax.transData.transform((row.n_perturbed, 1.0)))[0]
        if all(abs(across - other) >= 0.25 for other in named):
            named.append(across)
            name = s.safe(row.group, 24)
            text, side = (f"  {name}", "left") if across < 0.7 else (f"{name}  ", "right")
            at = (row.n_perturbed, row.e_distance)
            ax.annotate(text, at, ha=side, va="center", fontsize=s.SMALL)
    s.legend(ax, *_keys(looks), s.sample("smallest to be seen", dotted), outside=True, handlelength=1.2)
    title = f"{int(differs.sum())} of {len(rows)} groups differ from their controls"
    return s.finish(s.label(ax, title, "perturbed cells", _ENERGY), show, save)


# -- cells: what the decoder reproduces, where cells lie, where operators carry them


@_figure
def predictive_checks(
    observed: Any, sampled: Any, *, show: bool = False, save: str | Path | None = None
) -> Figure:
    """Counts sampled from the model beside the observed ones: zeros, mean-variance, library size.

    Parameters
    ----------
    observed, sampled
        Counts, (cell, gene), dense or sparse; the same genes, cells need not be the same.
    """
    genes = _draw(observed.shape[1], 3000)  # points enough
    parts = {"observed": _moments(observed, genes), "sampled": _moments(sampled, genes)}
    fig, (zeros, variance, depth) = s.canvas(1, 3, height=2.9)
    dots = {"linestyle": "", "markersize": 2.4, "alpha": 0.6, "rasterized": True}
    looks = {"observed": {"color": s.REAL, "marker": "s"}, "sampled": {"color": s.PREDICTED, "marker": "o"}}
    zeros.plot([0, 1], [0, 1], color=s.QUIET, linewidth=0.8)
    zeros.plot(*(part["zeros"] for part in parts.values()))[0].update(dots | looks["sampled"])
    zeros.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    gap = np.mean(np.abs(parts["observed"]["zeros"] - parts["sampled"]["zeros"]))
    s.note(zeros, 0.04, 0.97, f"mean gap {gap:.3f}")
    s.label(zeros, "Zeros per gene", "observed fraction", "sampled fraction")
    for name, part in parts.items():
        keep = (part["mean"] > 0) & (part["variance"] > 0)
        variance.plot(part["mean"][keep], part["variance"][keep], label=name)[0].update(dots | looks[name])
        steps = {"color": looks[name]["color"], "linestyle": "-" if name == "observed" else "--"}
        sizes = part["size"][part["size"] > 0]
        sns.histplot(
            x=sizes, bins=40, stat="density", element="step", fill=False, log_scale=True, color=steps["color"],
            linestyle=steps["linestyle"], ax=depth,
        )  # fmt: skip
        depth.plot([], [], label=name)[0].update(steps)
    low, high = variance.get_xlim()
    line = [max(low, 1e-4), high]
    variance.plot(line, line, color=s.QUIET, linewidth=0.8, label="Poisson")
    variance.set(xscale="log", yscale="log")
    s.log_ticks(variance, "x")
    s.log_ticks(variance, "y")
    s.legend(variance, loc="upper left", markerscale=2.5)
    s.label(variance, "Mean and variance per gene", "mean count", "variance")
    s.few_ticks(depth, "y", 4)
    s.log_ticks(depth, "x", 5)
    depth.set_ylim(0, depth.get_ylim()[1] * 1.35)
    s.legend(depth, loc="upper left")
    s.label(depth, "Library size", "counts per cell (log scale)", "density")
    return s.finish(fig, show, save)


def _moments(counts: Any, genes: np.ndarray) -> dict[str, np.ndarray]:
    """Zero fraction, mean and variance per gene; library size per cell over all genes."""
    part = sparse.csc_matrix(counts)[:, genes].astype(float)
    mean, square = part.mean(axis=0).A1, part.multiply(part).mean(axis=0).A1
    size = np.asarray(counts.sum(axis=1)).ravel()
    return {"zeros": 1 - (part > 0).mean(axis=0).A1, "mean": mean, "variance": square - mean**2, "size": size}


@_figure
def embedding(
    adata: Any,
    color: str | Sequence[str],
    *,
    basis: str = "X_umap",
    max_names: int = 24,
    seed: int = 0,
    show: bool = False,
    save: str | Path | None = None,
) -> Figure:
    """Cells in two dimensions, one panel for each column of `obs`; text gets colour *and* marker.

    Of more than 20,000 cells so many are drawn, at random (seeded).

    Parameters
    ----------
    color
        Columns of ``obs``: text and categories have a legend, numbers a colour bar.
    basis
        Coordinates in ``obsm``, (cell, 2).
    max_names
        Labels with a colour of their own, the most frequent; the others are grey.
    """
    names = [color] if isinstance(color, str) else list(color)
    _need(adata.obs, *names)
    coords = np.asarray(adata.obsm[basis], dtype=float)[:, :2]
    cells = _draw(len(coords), 20_000, seed)
    fig, axes = _grid(len(names), 2, row_height=3.1 if len(names) > 1 else 4.2)
    size = float(np.clip(300 / np.sqrt(len(cells)), 1.5, 16.0))
    axis = basis.removeprefix("X_").upper()
    for ax, name in zip(axes, names, strict=True):
        values = adata.obs[name].iloc[cells]
        number = pd.api.types.is_numeric_dtype(values) and not isinstance(values.dtype, pd.CategoricalDtype)
        if number and values.nunique() > 2:
            low, high = np.nanquantile(values, [0.01, 0.99])
            points = ax.scatter(*coords[cells].T, c=values, s=size, cmap=s.RANGE, norm=Normalize(low, high))
            points.set(linewidth=0, rasterized=True)
            s.colour_bar(ax, points, extend="both")
        else:
            kinds, looks = _kinds(values.astype(str), max_names)
            _dots(ax, coords[cells], kinds, looks, size)
            s.legend(ax, *_keys(looks), outside=True, columns=2 if len(looks) > 14 else 1, handlelength=0.8)
        s.label(ax, s.safe(name), f"{axis} 1", f"{axis} 2").set(xticks=[], yticks=[])
        ax.set_aspect("equal", adjustable="datalim")
    return s.finish(fig, show, save)


@_figure
def transport(
    control: Mapping[str, np.ndarray],
    moved: Mapping[str, np.ndarray],
    real: Mapping[str, np.ndarray],
    *,
    notes: Mapping[str, str] | None = None,
    axis: str = "PC",
    max_groups: int = 9,
    show: bool = False,
    save: str | Path | None = None,
) -> Figure:
    """Per group: control cells, the same cells moved by the operator, and the real perturbed cells.

    Each panel has its own limits, one unit being as long upwards as sideways; large marks are the means of all cells,
    of which at most 400 are drawn.

    Parameters
    ----------
    control, moved, real
        Group label -> coordinates in a common projection, (cell, 2). Group order is that of `moved`.
    notes
        Group label -> a short text in its panel (the energy distance, say).
    axis
        Name of the projection's axes.
    max_groups
        Of more groups those that move most and least are shown.
    """
    shift = {name: np.linalg.norm(np.mean(moved[name], 0) - np.mean(control[name], 0)) for name in moved}
    names = _named(pd.Series(shift), max_groups)
    fig, axes = _grid(len(names), 3, row_height=2.5, x=f"{axis} 1", y=f"{axis} 2")
    looks = {
        "control": {"color": s.CONTROL, "marker": "X"},
        "real perturbed": {"color": s.REAL, "marker": "s"},
        "control moved": {"color": s.PREDICTED, "marker": "o"},
    }
    big = {"markersize": 9, "markeredgecolor": "white", "markeredgewidth": 1.4}
    for ax, name in zip(axes, names, strict=True):
        clouds = [np.asarray(cloud[name], dtype=float) for cloud in (control, real, moved)]
        some = [cloud[_draw(len(cloud), 400)] for cloud in clouds]
        _dots(ax, np.concatenate(some), np.repeat(list(looks), [len(cells) for cells in some]), looks, 7)
        for cloud, look in zip(clouds, looks.values(), strict=True):
            ax.plot(*cloud.mean(axis=0))[0].update(look | big)
        s.label(ax, s.safe(name)).set(xticks=[], yticks=[])
        ax.set_aspect("equal", adjustable="datalim")
        s.note(ax, 0.02, 0.99, s.safe((notes or {}).get(name, ""), 60))
    few = (
        None if len(names) == len(moved) else f"{len(names)} of {len(moved)}: those that move most and least"
    )
    s.legend(fig, *_keys(looks), loc="outside upper center", columns=3, handlelength=0.8, title=few)
    return s.finish(fig, show, save)


@_figure
def shapes(
    clouds: Mapping[str, np.ndarray],
    kinds: Mapping[str, Sequence[object]],
    *,
    notes: Mapping[str, str] | None = None,
    max_kinds: int = 8,
    show: bool = False,
    save: str | Path | None = None,
) -> Figure:
    """Clouds of cells side by side on common axes, coloured by what each cell is: does every kind go its own way?

    A right mean is not enough: where kinds of cells respond in their own ways, one shift for all gives a cloud of the
    wrong shape.

    Parameters
    ----------
    clouds
        Panel title -> coordinates in a common projection, (cell, 2), such as real, shifted and predicted cells.
    kinds
        Panel title -> what each cell is, (cell,).
    notes
        Panel title -> a short text in its panel (the energy distance of the centred cloud, say).
    max_kinds
        Kinds with a colour of their own, the most frequent; the others are grey.
    """
    every = {name: pd.Series(np.asarray(kinds[name]).astype(str)) for name in clouds}
    labels, looks = _kinds(pd.concat(every), max_kinds)
    points = {name: np.asarray(cells, dtype=float)[:, :2] for name, cells in clouds.items()}
    low, high = np.quantile(np.concatenate(list(points.values())), [0.002, 0.998], axis=0)
    pad = 0.06 * (high - low)
    fig, axes = _grid(len(clouds), 3, row_height=3.3, x="PC 1", y="PC 2")
    for ax, (name, cells) in zip(axes, points.items(), strict=True):
        some = _draw(len(cells), 600)
        _dots(ax, cells[some], labels[name].iloc[some], looks, 11)
        s.label(ax, s.safe(name)).set(xticks=[], yticks=[])
        ax.set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + 2.5 * pad[1]))
        s.note(ax, 0.02, 0.99, s.safe((notes or {}).get(name, ""), 60))
    s.legend(fig, *_keys(looks), loc="outside upper center", columns=4, handlelength=0.8)
    return s.finish(fig, show, save)


# -- how good a prediction is: distances beside baselines and floor, genes, where the error sits


@_figure
def energy_bars(
    table: pd.DataFrame,
    *,
    methods: Sequence[str] | None = None,
    target: str = "the real perturbed cells",
    max_groups: int = 16,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Energy distance to the real perturbed cells per group, methods side by side, the noise floor drawn in.

    Parameters
    ----------
    table
        One row per group and method: columns `method`, `energy`, the group (as `group`, or `context` and
        `perturbation`), perhaps `floor`. Several rows for one group and method (seeds) become a bar at the mean with a
        dot for each. Or ``holdout.scores``, whose energy distances are drawn.
    methods
        Methods and their order; those of the table by default.
    target
        What the distances lead to.
    """
    if "metric" in table:
        table = _energies_of(table)
    _need(table, "method", "energy")
    methods = list(methods or dict.fromkeys(table["method"]))
    table, groups = _few_groups(table[table["method"].isin(methods)], "energy", max_groups, ["method"])
    looks = s.of_method(methods)
    colours = {method: looks[method]["color"] for method in methods}
    ax = s.axes_of(ax, height=1.3 + len(groups) * max(0.34, 0.15 * len(methods)))
    sns.barplot(
        table, x="energy", y="group", hue="method", order=groups, hue_order=methods, palette=colours, errorbar=None,
        saturation=1, edgecolor="white", linewidth=0.3, legend=False, ax=ax,
    )  # fmt: skip
    for bars, method in zip(ax.containers, methods, strict=True):
        bars.set_label(s.safe(method))
        for bar in bars:
            bar.set_hatch(looks[method]["hatch"])
    if table.duplicated(["group", "method"]).any():
        dots = dict.fromkeys(methods, s.INK)
        sns.stripplot(
            table, x="energy", y="group", hue="method", order=groups, hue_order=methods, palette=dots, dodge=True,
            jitter=False, size=2.5, legend=False, ax=ax,
        )  # fmt: skip
    if "floor" in table:
        floors = table.groupby("group", sort=False)["floor"].mean().reindex(groups)
        y = np.arange(len(groups))
        ax.vlines(floors, y - 0.45, y + 0.45, color=s.INK, linewidth=2.2, label="noise floor")
    ax.spines["left"].set_visible(False)  # it would hide the floors, which lie near zero
    _log_if_wide(ax, table["energy"])
    s.long_names(ax, groups, "y")
    ax.set_ylim(len(groups) - 0.45, -0.55)
    s.legend(ax, outside=True)
    return s.finish(s.label(ax, f"Distance to {target} (shorter is better)", _ENERGY), show, save)


def _energies_of(scores: pd.DataFrame) -> pd.DataFrame:
    """Energy distances of a hold-out's scores, with the noise floor as a column."""
    rows = (
        scores[scores["metric"] == "e_distance"].rename(columns={"value": "energy"}).dropna(subset="energy")
    )
    noise = rows["method"].str.startswith("noise")
    floors = rows[noise].groupby("group")["energy"].mean()
    return rows[~noise].assign(floor=rows["group"].map(floors))


@_figure
def error_budget(
    table: pd.DataFrame,
    *,
    max_groups: int = 30,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Where the error sits: the energy distance after each stage of the way, one row per group.

    Parameters
    ----------
    table
        One row per group and stage: columns `stage`, `energy` and the group (as `group`, or `context` and
        `perturbation`). Stages are "noise floor", "reconstructed controls", "oracle latents", "operator", "no change".
    """
    _need(table, "stage", "energy")
    stages = list(dict.fromkeys(table["stage"]))
    table, groups = _few_groups(table, "energy", max_groups, ["stage"])
    wide = table.pivot_table("energy", "group", "stage", sort=False).reindex(index=groups, columns=stages)
    return s.finish(_spans(ax, wide, "Where the error sits"), show, save)


@_figure
def predicted_vs_true(
    table: pd.DataFrame,
    *,
    n_names: int = 8,
    max_groups: int = 9,
    show: bool = False,
    save: str | Path | None = None,
) -> Figure:
    """Predicted against true expression change of every gene, the largest true changes named.

    Parameters
    ----------
    table
        One row per gene and group: columns `gene`, `true`, `predicted` (change of mean log1p expression, perturbed
        minus control); if there, the group (as `group`, or `context` and `perturbation`) for one panel each, `is_de`
        (bool) for marked genes, and `low`, `high` for the interval of each marked gene's prediction.
    n_names
        Genes named per panel.
    max_groups
        Panels; of more groups those that change most and least have one, the last panel tells of all.
    """
    _need(table, "gene", "true", "predicted")
    has_groups = {"group", "context", "perturbation"} & set(table.columns)
    table = table.assign(group=_group_labels(table) if has_groups else "all cells")
    every = (table["true"] ** 2).groupby(table["group"], sort=False).sum()
    names = _named(every, max_groups)
    many = len(names) < len(every)
    n = len(names) + many
    fig, axes = _grid(
        n, 3, row_height=2.35 if n > 1 else 4.5, width=s.WIDTH if n > 1 else 5.5, x="true change (log1p)",
        y="predicted change (log1p)",
    )  # fmt: skip
    for ax, name in zip(axes, names, strict=False):
        _changes(ax, table[table["group"] == name], n_names)
        s.label(ax, s.safe(name))
    if many:
        both = table.groupby("group")[["true", "predicted"]]
        r = [np.corrcoef(rows.to_numpy(dtype=float).T)[0, 1] for _, rows in both if len(rows) > 2]
        axes[-1].hist(r, bins=20, range=(np.nanmin(r, initial=0.0), 1.0), color=s.PREDICTED)
        s.label(axes[-1], f"all {len(every)} groups", "r of predicted and true", "groups")
    return s.finish(fig, show, save)


def _changes(ax: Axes, rows: pd.DataFrame, n_names: int) -> None:
    both = rows[["true", "predicted"]].to_numpy(dtype=float)
    low, high = float(np.nanmin(both, initial=0.0)), float(np.nanmax(both, initial=0.0))
    span = (high - low) or 1.0
    pad = 0.06 * span
    right = high + (0.5 * span if n_names else pad)
    ax.set(xlim=(low - pad, right), ylim=(low - pad, high + pad), aspect="equal")
    ax.plot([low, high], [low, high], color=s.QUIET, linewidth=0.8)
    marked = rows["is_de"].to_numpy(dtype=bool) if "is_de" in rows else np.zeros(len(rows), dtype=bool)
    dots = {"linestyle": "", "rasterized": True}
    ax.plot(*both[~marked].T, alpha=0.5, markersize=3, color=s.QUIET, marker="o")[0].update(dots)
    if {"low", "high"} <= set(rows):
        ends = rows.loc[marked, ["low", "high"]].to_numpy(dtype=float).T
        ax.vlines(both[marked, 0], *ends, color=s.PREDICTED, alpha=0.35, linewidth=0.9)
    ax.plot(*both[marked].T, markersize=3.5, color=s.PREDICTED, marker="D")[0].update(dots)
    top = rows.iloc[np.argsort(-rows["true"].abs().to_numpy(), kind="stable")[:n_names]]
    _names_beside(ax, top, high + 0.1 * span)
    s.few_ticks(ax, n=4)
    if len(rows) > 2:
        text = f"r = {np.corrcoef(both.T)[0, 1]:.2f}, {counted(len(rows), 'gene')}"
        s.note(ax, 0.03, 0.98, text + (f"\n{marked.sum():,} differential" if marked.any() else ""))


def _names_beside(ax: Axes, rows: pd.DataFrame, edge: float) -> None:
    """Genes in a column at `edge`, in the order of their points, far enough apart to be read."""
    low, high = ax.get_ylim()
    lines = ax.get_position().height * s.figure_of(ax).get_figheight() * 72 / (s.SMALL * 1.15)
    rows = rows.sort_values("predicted")
    steps = (high - low) / lines * np.arange(len(rows))
    up = np.maximum.accumulate(rows["predicted"].to_numpy() - steps) + steps
    down = np.minimum.accumulate((np.minimum(up, high - steps[::-1]) - steps)[::-1])[::-1] + steps
    line = {"arrowstyle": "-", "color": s.QUIET, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 1}
    for row, height in zip(rows.itertuples(), np.maximum(down, low + steps), strict=True):
        name = ax.annotate(
            s.safe(row.gene, 12), (row.true, row.predicted), (edge, height), arrowprops=line, va="center",
            fontsize=s.SMALL - 1, color=s.INK, annotation_clip=False,
        )  # fmt: skip
        name.set_in_layout(False)


# -- operators: spectra, response axes and genes, gradients


@_figure
def spectra(
    table: pd.DataFrame,
    *,
    limit: float | None = None,
    max_conditions: int = 12,
    show: bool = False,
    save: str | Path | None = None,
) -> Figure:
    """Eigenvalues in the complex plane, and singular values, of the operator of each condition.

    Parameters
    ----------
    table
        One row per condition and index: `condition` (or `group`, or `context` and `perturbation`), `real` and
        `imag` parts of an eigenvalue, `singular_value`.
    limit
        Largest spectral norm that the stability penalty lets pass; drawn as a line.
    max_conditions
        Of more conditions those with the largest and the smallest norm are named, the others drawn in grey.
    """
    _need(table, "real", "imag", "singular_value")
    conditions = table["condition"].astype(str) if "condition" in table else _group_labels(table)
    norms = table["singular_value"].groupby(conditions, sort=False).max()
    named = _named(norms, max_conditions)
    others = [name for name in norms.index if name not in set(named)]
    fig, (plane, values) = s.canvas(1, 2, height=3.4, width_ratios=(1, 1.25))
    turn = np.linspace(0, 2 * np.pi, 200)
    plane.plot(np.cos(turn), np.sin(turn), color=s.QUIET, linewidth=0.8, linestyle="--")
    plane.axhline(0, color=s.FAINT, linewidth=0.8, zorder=0)
    quiet = {"color": s.FAINT, "marker": ".", "linestyle": "-", "linewidth": 0.6}
    looks: dict[str, Any] = dict.fromkeys(others, quiet)
    looks |= {name: s.mark(i) | s.line(i) | {"label": s.safe(name, 26)} for i, name in enumerate(named)}
    for name, look in looks.items():
        rows = table[conditions == name]
        plane.plot(rows["real"], rows["imag"], markersize=4.5, alpha=0.8)[0].update(look | {"linestyle": ""})
        sizes = np.sort(rows["singular_value"])[::-1]
        values.plot(np.arange(1, len(sizes) + 1), sizes, linewidth=1.2, markersize=4)[0].update(look)
    if others:
        values.plot([], [], color=s.FAINT, label=f"{len(others)} others")
    values.axhline(1, color=s.QUIET, linewidth=0.8, linestyle="--")
    if limit is not None:
        values.axhline(limit, color=s.VERMILION, linewidth=1.2, linestyle=":", label=f"limit {limit:g}")
    # around the eigenvalues and 1, not the whole circle: most operators lie near the identity
    real, imag = np.append(table["real"], 1.0), table["imag"].to_numpy()
    half = 0.6 * max(np.ptp(real), 2 * np.abs(imag).max(), 0.1)
    middle = (real.min() + real.max()) / 2
    plane.set(xlim=(middle - half, middle + half), ylim=(-half, half), aspect="equal")
    s.few_ticks(plane, n=5)
    s.few_ticks(values, "y", 6)
    values.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    s.label(plane, "Eigenvalues (dashed: unit circle)", "real part", "imaginary part")
    s.label(values, "Singular values (dashed: 1)", "rank", "singular value")
    s.legend(values, outside=True)
    return s.finish(fig, show, save)


@_figure
def response_axes(
    table: pd.DataFrame,
    *,
    n_top: int = 12,
    max_axes: int = 6,
    unit: str = "change of log expression",
    show: bool = False,
    save: str | Path | None = None,
) -> Figure:
    """The genes that each response axis moves most, signed.

    Parameters
    ----------
    table
        One row per axis and gene: columns `axis`, `gene`, `effect` (signed); if there, `uncertainty` (same unit) for
        error bars.
    n_top
        Genes per axis, by absolute effect.
    max_axes
        Axes shown, in the order of the table.
    unit
        Label of the effect.
    """
    _need(table, "axis", "gene", "effect")
    names = list(dict.fromkeys(table["axis"]))[:max_axes]
    width = s.WIDTH if len(names) > 1 else 5.0
    fig, axes = _grid(len(names), 3, row_height=0.9 + 0.19 * n_top, width=width, x=unit)
    for ax, name in zip(axes, names, strict=True):
        part = table[table["axis"] == name]
        top = part.loc[part["effect"].abs().nlargest(n_top).index].sort_values("effect")
        rises = top["effect"].to_numpy() > 0
        # falling genes are hatched, so that the sign shows without colour too
        colours, hatches = np.where(rises, s.RISE, s.FALL), np.where(rises, "", "////")
        ax.barh(
            range(len(top)), top["effect"], xerr=top.get("uncertainty"), color=colours, hatch=hatches.tolist(),
            edgecolor="white", linewidth=0.3, error_kw={"ecolor": s.INK, "elinewidth": 0.8},
        )  # fmt: skip
        ax.axvline(0, color=s.QUIET, linewidth=0.8)
        s.long_names(ax, top["gene"], "y", 14)
        s.few_ticks(ax, "x", 4)
        s.label(ax, s.safe(name if isinstance(name, str) else f"axis {name}"))
    return s.finish(fig, show, save)


@_figure
def response_genes(
    table: pd.DataFrame,
    *,
    n_top: int = 20,
    n_named: int = 10,
    max_groups: int = 16,
    ax: Axes | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Axes:
    """Change of the genes that lead, gene by group, with each gene's rank within its group.

    Parameters
    ----------
    table
        One row per gene and group: columns `gene`, `lfc` and the group (as `group`, or `context` and `perturbation`),
        with all genes of every group.
    n_top
        Genes shown: those with the largest mean absolute change.
    n_named
        Ranks up to this one are written into their cell.
    """
    _need(table, "gene", "lfc")
    genes = table["lfc"].abs().groupby(table["gene"]).mean().nlargest(n_top).index
    table, groups = _few_groups(table, "lfc", max_groups, ["gene"])
    every = table.pivot(index="gene", columns="group", values="lfc")
    change = every.loc[genes, groups]
    ranks = every.abs().rank(ascending=False, method="first").loc[genes, groups]
    texts = ranks.map("{:.0f}".format).where(ranks <= n_named, "")
    height = 1.2 + 0.2 * len(genes) + _room_below(groups)
    ax = s.axes_of(ax, height=height, width=min(s.WIDTH, 2.6 + 0.62 * len(groups)))
    top = float(np.nanmax(np.abs(change.to_numpy()))) or 1.0
    _heatmap(ax, change, Normalize(-top, top), s.DIVERGING, texts)
    s.colour_bar(ax, ax.collections[0], "log2 fold change")
    return s.finish(s.label(ax, f"Genes that lead the response (numbers: rank, up to {n_named})"), show, save)


@_figure
def gradient_map(table: pd.DataFrame, *, show: bool = False, save: str | Path | None = None) -> Figure:
    """Does the gradient reach every parameter: the part of it that is reached, and the norms.

    Parameters
    ----------
    table
        One row per parameter (and loss term, if there is a column `term`): `parameter`, `reached` (part of
        its elements with a gradient other than zero, 0 to 1), `grad_norm`; if there, `norm` of itself, and
        `status`, where "frozen" parameters are meant to have no gradient. Of more than 40 those that are reached
        least are shown.
    """
    _need(table, "parameter", "reached", "grad_norm")
    best = table.groupby("parameter", sort=False)["reached"].max()
    best = best if len(best) <= 40 else best.nsmallest(40)
    rows_of = {name: row for row, name in enumerate(best.index)}
    fig, (reach, norms) = s.canvas(
        1, 2, height=1.4 + 0.21 * max(len(best), 4), sharey=True, width_ratios=(1, 1.4)
    )
    reach.barh(range(len(best)), best, color=s.SKY, edgecolor="white", height=0.8)
    frozen = set(table.loc[table["status"] == "frozen", "parameter"]) if "status" in table else set()
    for name in best.index[best == 0]:
        text, colour = ("frozen", s.QUIET) if name in frozen else ("no gradient", s.VERMILION)
        reach.text(0.02, rows_of[name], text, fontsize=s.SMALL, va="center", color=colour)
    terms = "gradient of " + table["term"].map(s.safe) if "term" in table else len(table) * ["gradient"]
    grouped = table.set_index("parameter").groupby(list(terms), sort=False)["grad_norm"]
    series = {str(term): norms_of_term for term, norms_of_term in grouped}
    looks = [s.mark(i) for i in range(len(series))]
    if "norm" in table:
        series["parameter"] = table.groupby("parameter")["norm"].first()
        looks.append({"marker": "|", "color": s.INK})
    for (label, values), look in zip(series.items(), looks, strict=True):
        drawn = values[(values > 0) & values.index.isin(best.index)]
        y = drawn.index.map(rows_of)
        norms.plot(drawn, y, linestyle="", markersize=6, label=label)[0].update(look)
    norms.set_xscale("log")
    s.log_ticks(norms, "x")
    for stripe in range(0, len(best), 2):
        norms.axhspan(stripe - 0.5, stripe + 0.5, color=s.FAINT, alpha=0.4, linewidth=0, zorder=0)
    s.long_names(reach, best.index, "y")
    norms.tick_params(axis="y", length=0)
    reach.set(xlim=(0, 1), ylim=(len(best) - 0.5, -0.5))
    s.label(reach, "Elements reached", "fraction with gradient")
    s.label(norms, "Norms", "Euclidean norm (log scale)")
    s.legend(norms, outside=True, handlelength=0.8)
    return s.finish(fig, show, save)


# -- a training, and virtual cells


@_figure
def training_curves(
    history: pd.DataFrame,
    *,
    floors: Mapping[str, float] | None = None,
    monitor: str | None = None,
    patience: int | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Figure:
    """Every number of a training history, one panel each, with the best epoch and the changes by hand marked.

    Parameters
    ----------
    history
        One row per epoch, as `trainer.history`.
    floors
        Split-half noise floor by group label; drawn beside `val_energy[<group>]`.
    monitor
        Column whose minimum is the best epoch; `val_loss`, else `train_loss`.
    patience
        Epochs without improvement that early stopping allows, shaded behind the best epoch.
    """
    rows, columns = history.to_dict("records"), Columns()
    columns.extend(rows)
    monitor = monitor or columns.default_monitor()
    best = columns.best_epoch(monitor)
    ending = f", best epoch {best + 1:g} ({monitor})" if best is not None else ""
    title = f"{counted(len(rows), 'epoch')}{ending}"
    board = Dashboard(pick_panels(columns.names(), columns.constant()), monitor=monitor)
    board.update(columns, Marks(title, monitor, best, patience, floors or {}, changes_of_history(rows)))
    board.headline.set_animated(False)  # a figure that is saved leaves out what moves
    return s.finish(board.figure, show, save)


@_figure
def strength_curves(
    table: pd.DataFrame,
    genes: pd.DataFrame | None = None,
    *,
    floor: float | None = None,
    show: bool = False,
    save: str | Path | None = None,
) -> Figure:
    """How far a dose carries cells from the controls to the perturbed ones: distances and, if given, genes.

    Parameters
    ----------
    table
        One row per strength and target: columns `strength`, `energy` and `target` (what moved cells are compared with).
    genes
        One row per strength and gene: columns `strength`, `gene`, `lfc`; `low` and `high` for a band. The first seven
        genes are drawn.
    floor
        Noise floor of the distances.
    """
    _need(table, "strength", "energy", "target")
    panels = 1 if genes is None else 2
    fig, axes = s.canvas(1, panels, height=3.0, width=s.WIDTH if panels == 2 else 4.6)
    looks = s.of_method(list(dict.fromkeys(table["target"])))
    for i, (target, rows) in enumerate(table.groupby("target", sort=False)):
        look = s.line(i) | {name: looks[target][name] for name in ("color", "marker")}
        axes[0].plot(rows["strength"], rows["energy"], label=s.safe(target), markersize=4)[0].update(look)
    if floor is not None:
        axes[0].axhline(floor, color=s.INK, linewidth=1.0, linestyle=(0, (1, 2)), label="noise floor")
    s.label(axes[0], "Distance of the moved cells", "strength (1: measured)", "energy distance (Euclid, U)")
    s.legend(axes[0])
    if genes is not None:
        _need(genes, "strength", "gene", "lfc")
        for i, (gene, rows) in enumerate(list(genes.groupby("gene", sort=False))[:7]):
            look = s.mark(i) | s.line(i)
            axes[1].plot(rows["strength"], rows["lfc"], label=s.safe(gene, 20), markersize=4)[0].update(look)
            if {"low", "high"} <= set(rows):
                ends = rows["low"], rows["high"]
                axes[1].fill_between(rows["strength"], *ends, color=look["color"], alpha=0.15, linewidth=0)
        s.label(axes[1], "Genes", "strength (1: measured)", "log2 fold change")
        s.legend(axes[1], outside=True)
    for ax in axes:
        ax.axvline(1.0, color=s.QUIET, linewidth=0.8, linestyle="--")
        s.few_ticks(ax)
    return s.finish(fig, show, save)
