"""The figures of the package, `co.pl`: a table or cells in, matplotlib's own Axes or Figure out.

Each function takes its data first, and three keywords that mean the same everywhere:

ax
    Axes to draw into (where a figure has one panel); those of a new figure by default.
show
    True shows the figure at once and returns nothing; by default it shows itself where it is the last line of a cell.
save
    File to write: vector (``.svg``, ``.pdf``) or ``.png``.

Control cells are grey, real perturbed cells orange, predictions blue, in every figure; categories differ in marker,
line or hatch too. Labels from data are shortened. With hundreds of groups the strongest and the weakest are named, and
the others summarised between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from scipy import sparse

from ..errors import LabelError, did_you_mean, three_beats
from . import style as s
from .curves import Columns, Dashboard, Marks, changes_of_history, pick_panels

__all__ = [
    "condition_similarity",
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


# -- what figures need from a table


def _need(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table without `columns`, naming the first missing one and the closest one there is."""
    for column in columns:
        if column not in table:
            expected = f"a table with the columns {', '.join(columns)}"
            problem = f"no column {column!r} among {list(map(str, table.columns))}"
            raise LabelError(
                three_beats(expected, problem, f"rename or add it; {did_you_mean(column, table.columns)}")
            )


def _group_labels(table: pd.DataFrame) -> pd.Series:
    """One label per row: column `group`, or `context, perturbation`, or whichever of the two is there."""
    if "group" in table:
        return table["group"].astype(str)
    parts = [table[name].astype(str) for name in ("context", "perturbation") if name in table]
    if not parts:
        return pd.Series(table.index.map(str), index=table.index)
    return parts[0].str.cat(parts[1:], sep=", ") if len(parts) > 1 else parts[0]


def _ends(ranked: Sequence[str], most: int) -> dict[str, str]:
    """Group to the name that it is shown under, strongest first: those in the middle share one name if too many."""
    if len(ranked) <= most:
        return {name: name for name in ranked}
    n_weak = most // 3
    first, last = most - 1 - n_weak, len(ranked) - n_weak
    others = f"{last - first} others (median)"
    return {name: others if first <= i < last else name for i, name in enumerate(ranked)}


def _few_groups(
    table: pd.DataFrame, strength: pd.Series, most: int, by: str | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """A table of at most `most` groups, and their order: that of the table, else strongest first.

    The median (for each value of the column `by`) stands for all groups but the strongest and the weakest.
    """
    if len(strength) <= most:
        return table, list(dict.fromkeys(table["group"]))
    names = _ends(list(strength.sort_values(ascending=False, kind="stable").index), most)
    shown = table.assign(group=table["group"].map(names))
    middle = shown["group"].str.endswith(" others (median)") & (shown["group"] != table["group"])
    numbers = [column for column in shown.columns if pd.api.types.is_numeric_dtype(shown[column])]
    keys = ["group"] if by is None else ["group", by]
    numbers = [column for column in numbers if column not in keys]
    medians = shown[middle].groupby(keys, sort=False)[numbers].median().reset_index()
    return pd.concat([shown[~middle], medians], ignore_index=True), list(dict.fromkeys(names.values()))


def _grid(
    n: int, columns: int, *, row_height: float, width: float = s.WIDTH
) -> tuple[Figure, list[Axes], int]:
    """A figure of `n` panels in at most so many columns: figure, panels, columns."""
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    fig, axes = s.canvas(rows, columns, height=row_height * rows, width=width)
    s.hide(axes[n:])
    return fig, axes, columns


def _room_below(names: Sequence[object]) -> float:
    """Inches that turned names take."""
    return 0.05 * max(len(s.short(name, 28)) for name in names)


def _some(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    return rows if len(rows) <= n else np.sort(np.random.default_rng(seed).choice(rows, n, replace=False))


def _log_if_wide(ax: Axes, values: pd.Series) -> None:
    """Logarithmic only when a linear axis would hide the small groups."""
    sizes = values.abs()[values.abs() > 0]
    if len(sizes) and sizes.max() > 40 * sizes.median():
        s.energy_scale(ax, values)
    else:
        s.few_ticks(ax, "x", 6)


# -- data: cells per group, depth, and the noise that no model can beat


def library_sizes(
    sizes: np.ndarray,
    groups: Sequence[object],
    *,
    unit: str = "counts per cell",
    max_groups: int = 24,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Library size per group: violins on a logarithmic axis, median and quartiles marked.

    Parameters
    ----------
    sizes
        Total counts, (cell,).
    groups
        Group label of each cell, (cell,).
    unit
        What is counted.
    max_groups
        With more groups those of the deepest and the shallowest cells are named, and the others are one violin.

    Returns
    -------
    Axes
    """
    table = pd.DataFrame({"size": np.asarray(sizes, dtype=float), "group": np.asarray(groups).astype(str)})
    table = table[table["size"] > 0]
    depth = table.groupby("group")["size"].median().sort_values(ascending=False, kind="stable")
    shown = _ends(list(depth.index), max_groups)
    many = len(depth) > max_groups
    table["group"] = table["group"].map(
        {k: v.replace(" (median)", "") if many else v for k, v in shown.items()}
    )
    names = list(dict.fromkeys(table["group"].to_numpy()[np.argsort(-table["group"].map(depth).to_numpy())]))
    names = names if many else sorted(names)
    logs = [np.log10(table.loc[table["group"] == name, "size"].to_numpy()) for name in names]
    ax = s.axes_of(ax, height=max(2.2, 0.9 + 0.3 * len(names)))
    for row, values in enumerate(logs):
        _violin(ax, values, row)
    s.long_names(
        ax, [f"{s.short(name, 28)} (n = {len(v):,})" for name, v in zip(names, logs, strict=True)], "y"
    )
    ax.invert_yaxis()
    every = np.concatenate(logs) if logs else np.zeros(1)
    ticks = s.decades(10 ** (every.min() - 0.05), 10 ** (every.max() + 0.05), 8)
    ax.set_xticks(np.log10(ticks), [s.compact(tick) for tick in ticks])
    return s.finish(s.label(ax, "Library size per group", f"library size ({unit}, log scale)"), show, save)


def _violin(ax: Axes, values: np.ndarray, row: int) -> None:
    """One horizontal violin with its quartiles; a flat or tiny group is shown as points."""
    if len(values) > 5 and np.ptp(values) > 0:
        body = ax.violinplot(
            [values], positions=[row], orientation="horizontal", widths=0.85, showextrema=False
        )
        for part in body["bodies"]:
            part.set(facecolor=s.FAINT, edgecolor=s.QUIET, alpha=1.0, linewidth=0.8)
    else:
        ax.plot(values, np.full(len(values), row), linestyle="", marker="o", markersize=3, color=s.QUIET)
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    ax.hlines(row, low, high, color=s.INK, linewidth=2.5)
    ax.plot(middle, row, marker="o", color="white", markeredgecolor=s.INK, markersize=5)


def group_counts(
    table: pd.DataFrame,
    *,
    min_cells: int = 10,
    max_names: int = 30,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Cells per (context, perturbation) as a heat map with the numbers written in.

    Parameters
    ----------
    table
        One row per group, with columns `context`, `perturbation`, `cells`; or wide, one row per context and one column
        per perturbation.
    min_cells
        Groups below this number are framed: too few to fit or to judge.
    max_names
        With more perturbations (or contexts) those with most and with fewest cells are named, the median of the others
        between them.

    Returns
    -------
    Axes
    """
    every = _wide_counts(table)
    wide = _few_rows(_few_rows(every, max_names).T, max_names).T
    n_rows, n_columns = wide.shape
    height = 1.3 + 0.32 * max(n_rows, 2) + _room_below(wide.columns)
    ax = s.axes_of(ax, height=height, width=min(s.WIDTH, max(4.5, 2.6 + 0.75 * n_columns)))
    values = wide.to_numpy(dtype=float)
    # log1p: groups differ by orders of magnitude
    shades = ax.imshow(np.log1p(values), cmap=s.RANGE, aspect="auto", vmin=0)
    s.long_names(ax, wide.columns, "x", 28)
    s.long_names(ax, wide.index, "y", 28)
    if n_columns <= 14:
        bright = np.log1p(values) > 0.6 * np.log1p(values.max(initial=1.0))
        _write(ax, values, "{:,.0f}", np.where(bright, "black", "white"))
    for row, column in np.argwhere(values < min_cells):
        frame = {"fill": False, "edgecolor": s.VERMILION, "linewidth": 1.6, "linestyle": "--"}
        ax.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, **frame))
    s.without_spines(ax)
    bar = s.colour_bar(ax, shades, "cells (log scale)")
    ticks = [
        tick for tick in (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000) if tick <= values.max(initial=1.0)
    ]
    bar.set_ticks(np.log1p(ticks), labels=[s.compact(tick) for tick in ticks])
    few = int((every.to_numpy() < min_cells).sum())
    warning = f"\nframed: fewer than {min_cells} ({few:,} of {every.size:,} groups)" if few else ""
    return s.finish(s.label(ax, f"Cells per context and perturbation{warning}"), show, save)


def _wide_counts(table: pd.DataFrame) -> pd.DataFrame:
    """Cells as (context, perturbation), from the long or the wide form; groups without cells become 0."""
    if {"context", "perturbation"} <= set(table.columns):
        _need(table, "context", "perturbation", "cells")
        table = table.astype({"context": str, "perturbation": str})
        table = table.pivot_table(
            index="context", columns="perturbation", values="cells", aggfunc="sum", sort=False
        )
    return table.fillna(0)


def _few_rows(wide: pd.DataFrame, most: int) -> pd.DataFrame:
    """Rows with the largest and the smallest sums, and the median of the others between them."""
    if len(wide) <= most:
        return wide
    ranked = wide.loc[wide.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    names = pd.Index(list(_ends(list(map(str, ranked.index)), most).values()), name=wide.index.name)
    return ranked.groupby(names, sort=False).median()


def _write(ax: Axes, values: np.ndarray, form: str, inks: np.ndarray) -> None:
    """Finite numbers of a matrix, each in its cell."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            style = {"ha": "center", "va": "center", "fontsize": s.SMALL, "color": str(inks[row, column])}
            ax.text(column, row, form.format(value), **style)


def noise_floor(
    table: pd.DataFrame,
    *,
    max_groups: int = 40,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Per group: the energy distance to its controls beside the split-half floor of the group itself.

    Parameters
    ----------
    table
        One row per group: `energy` (to the controls), `floor` (between two random halves of the group), and
        the group as `group`, or as `context` and `perturbation`. Energy distances are Euclidean, U-statistic.
    max_groups
        With more groups the strongest and the weakest are named, the median of the others between them.

    Returns
    -------
    Axes
    """
    _need(table, "energy", "floor")
    rows = table.assign(group=_group_labels(table)).sort_values("energy", ascending=False, kind="stable")
    rows, names = _few_groups(rows, rows.groupby("group")["energy"].max(), max_groups)
    rows = rows.set_index("group").loc[names]
    ax = s.axes_of(ax, height=1.3 + 0.26 * max(len(rows), 3))
    y = np.arange(len(rows))
    ax.hlines(y, rows["floor"], rows["energy"], color=s.FAINT, linewidth=4)
    hollow = {"marker": "s", "markersize": 6, "color": s.INK, "markerfacecolor": "white"}
    ax.plot(rows["floor"], y, linestyle="", label="floor: two halves\nof the group")[0].update(hollow)
    effect = {"marker": "o", "markersize": 6, "color": s.REAL}
    ax.plot(rows["energy"], y, linestyle="", label="effect: perturbed\nto control")[0].update(effect)
    s.energy_scale(ax, [*rows["energy"], *rows["floor"]])
    ax.axvline(0, color=s.QUIET, linewidth=0.8, linestyle=":")
    s.long_names(ax, names, "y")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    s.legend(ax, outside=True, handlelength=0.8)
    return s.finish(s.label(ax, "Effect against noise floor", _ENERGY), show, save)


def screen_effects(
    table: pd.DataFrame,
    *,
    n_named: int = 8,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Strength of every effect against the cells that show it, beside the smallest one that so many cells can show.

    Parameters
    ----------
    table
        One row per group, as of :func:`cellop_nb.distances.screen_effects` or ``etest``: ``n_perturbed, e_distance,
        detectable, different``.
    n_named
        Strongest groups that are named, where their names do not meet.

    Returns
    -------
    Axes
    """
    _need(table, "n_perturbed", "e_distance", "detectable", "different")
    rows = table.assign(group=_group_labels(table)).dropna(subset="e_distance")
    ax = s.axes_of(ax, height=3.4)
    called = rows["different"].astype(bool)
    quiet = {"marker": "o", "markersize": 3, "markerfacecolor": "white", "color": s.QUIET}
    ax.plot(
        "n_perturbed",
        "e_distance",
        data=rows[~called],
        linestyle="",
        label="not told from\ncontrols",
        **quiet,
    )
    strong = {"marker": "o", "markersize": 4, "color": s.REAL}
    ax.plot(
        "n_perturbed", "e_distance", data=rows[called], linestyle="", label="differs from\ncontrols", **strong
    )
    least = rows.groupby("n_perturbed")["detectable"].median()
    ax.plot(
        least.index,
        least,
        color=s.INK,
        linewidth=1.2,
        linestyle=(0, (1, 2)),
        label="smallest that\ncan be seen",
    )
    named: list[float] = []
    for row in rows[called].nlargest(n_named, "e_distance").itertuples():
        if any(abs(row.n_perturbed - x) < 0.15 * rows["n_perturbed"].max() for x in named):
            continue  # its name would lie on another
        named.append(row.n_perturbed)
        style = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": s.SMALL}
        ax.annotate(s.short(row.group, 24), (row.n_perturbed, row.e_distance), **style)
    s.energy_scale(ax, [*rows["e_distance"], *least], "y")
    if rows["n_perturbed"].max() > 20 * rows["n_perturbed"].min():
        ax.set_xscale("log")
    s.legend(ax, outside=True, handlelength=1.2)
    title = f"{int(called.sum())} of {len(rows)} groups differ from their controls"
    return s.finish(s.label(ax, title, "perturbed cells", _ENERGY), show, save)


# -- cells: what the decoder reproduces, where cells lie, where operators carry them


def predictive_checks(
    observed: Any,
    sampled: Any,
    *,
    n_points: int = 3000,
    seed: int = 0,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Counts sampled from the model beside the observed ones: zeros, mean-variance, library size.

    Parameters
    ----------
    observed, sampled
        Counts, (cell, gene), dense or sparse; the same genes, cells need not be the same.
    n_points
        At most this many genes are drawn.

    Returns
    -------
    Figure
    """
    genes = _some(np.arange(observed.shape[1]), n_points, seed)
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
        hollow = {"markerfacecolor": "none"} if name == "sampled" else {}
        variance.plot(part["mean"][keep], part["variance"][keep], label=name)[0].update(
            dots | looks[name] | hollow
        )
        sizes = np.log10(part["size"][part["size"] > 0])
        style = {"color": looks[name]["color"], "linestyle": "--" if hollow else "-", "linewidth": 1.6}
        depth.hist(sizes, bins=40, density=True, histtype="step", **style)
        depth.plot([], [], label=name)[0].update(style)
    low, high = variance.get_xlim()
    line = [max(low, 1e-4), high]
    variance.plot(line, line, color=s.QUIET, linewidth=0.8, label="Poisson")
    variance.set(xscale="log", yscale="log")
    s.log_ticks(variance, "x")
    s.log_ticks(variance, "y")
    s.legend(variance, loc="upper left", markerscale=2.5)
    s.label(variance, "Mean and variance per gene", "mean count", "variance")
    s.few_ticks(depth, "y", 4)
    low, high = 10.0 ** np.array(depth.get_xlim())
    ticks = s.decades(low, high, 5)
    depth.set_xticks(np.log10(ticks), [s.compact(tick) for tick in ticks])
    depth.set_ylim(0, depth.get_ylim()[1] * 1.35)
    s.legend(depth, loc="upper left")
    s.label(depth, "Library size", "counts per cell (log scale)", "density")
    return s.finish(fig, show, save)


def _moments(counts: Any, genes: np.ndarray) -> dict[str, np.ndarray]:
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


def embedding(
    adata: Any,
    color: str | Sequence[str],
    *,
    basis: str = "X_umap",
    max_cells: int = 20_000,
    max_names: int = 24,
    seed: int = 0,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Cells in two dimensions, one panel for each column of `obs`; text gets colour *and* marker.

    Parameters
    ----------
    color
        Columns of ``obs``: text and categories have a legend, numbers a colour bar.
    basis
        Coordinates in ``obsm``, (cell, 2).
    max_cells
        More are thinned at random (seeded), all panels alike.
    max_names
        Labels with a colour of their own, the most frequent; the others are grey.

    Returns
    -------
    Figure
    """
    names = [color] if isinstance(color, str) else list(color)
    _need(adata.obs, *names)
    coords = np.asarray(adata.obsm[basis], dtype=float)[:, :2]
    # no group lies on top by order alone
    cells = np.random.default_rng(seed).permutation(_some(np.arange(len(coords)), max_cells, seed))
    fig, axes, columns = _grid(len(names), 2, row_height=3.1 if len(names) > 1 else 4.2)
    size = float(np.clip(300 / np.sqrt(len(cells)), 1.5, 16.0))
    axis = basis.removeprefix("X_").upper()
    for ax, name in zip(axes, names, strict=False):
        values = adata.obs[name].iloc[cells]
        number = pd.api.types.is_numeric_dtype(values) and not isinstance(values.dtype, pd.CategoricalDtype)
        if number and values.nunique() > 2:
            _by_number(ax, coords[cells], values, size)
        else:
            _by_name(ax, coords[cells], values.astype(str), size, max_names)
        s.label(ax, s.safe(name), f"{axis} 1", f"{axis} 2").set(xticks=[], yticks=[])
        ax.set_aspect("equal", adjustable="datalim")
    return s.finish(fig, show, save)


def _by_number(ax: Axes, coords: np.ndarray, values: pd.Series, size: float) -> None:
    numbers = values.to_numpy(dtype=float)
    low, high = np.nanquantile(numbers, [0.01, 0.99])
    style = {"cmap": s.RANGE, "vmin": low, "vmax": high, "linewidths": 0, "rasterized": True}
    s.colour_bar(ax, ax.scatter(*coords.T, c=numbers, s=size, **style), extend="both")


def _by_name(ax: Axes, coords: np.ndarray, texts: pd.Series, size: float, most: int) -> None:
    order = sorted(texts.unique()) if texts.nunique() <= most else list(texts.value_counts().index)
    dots = {"s": size, "linewidths": 0, "rasterized": True}
    handles, layers = [], 12
    for i, name in enumerate(order[:most]):
        look = s.mark(i)
        here = np.flatnonzero(texts == name)
        # in layers, category by category in each, so that the last category does not hide the others
        for layer, some in enumerate(np.array_split(here, layers)):
            ax.scatter(*coords[some].T, alpha=0.75, zorder=1 + layer / layers, **dots, **look)
        handles.append(s.sample(s.safe(name, 22), look | {"linestyle": "", "markersize": 5}))
    rest = ~texts.isin(order[:most]).to_numpy()
    if rest.any():
        ax.scatter(*coords[rest].T, color=s.FAINT, zorder=0, **dots)
        more = f"{len(order) - most} others"
        handles.append(Line2D([], [], linestyle="", marker="o", color=s.FAINT, markersize=5, label=more))
    s.legend(ax, *handles, outside=True, columns=2 if len(handles) > 14 else 1, handlelength=0.8)


def transport(
    control: Mapping[str, np.ndarray],
    moved: Mapping[str, np.ndarray],
    real: Mapping[str, np.ndarray],
    *,
    notes: Mapping[str, str] | None = None,
    axis: str = "PC",
    max_groups: int = 9,
    max_cells: int = 400,
    seed: int = 0,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Per group: control cells, the same cells moved by the operator, and the real perturbed cells.

    Each panel has its own limits, one unit being as long upwards as sideways; large marks are the means of all cells.

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
    max_cells
        Cells per cloud and panel, drawn at random (seeded).

    Returns
    -------
    Figure
    """
    shift = {name: np.linalg.norm(np.mean(moved[name], 0) - np.mean(control[name], 0)) for name in moved}
    names = list(moved)
    if len(names) > max_groups:
        ranked = sorted(names, key=lambda name: -shift[name])
        names = [*ranked[: max_groups - max_groups // 3], *ranked[len(ranked) - max_groups // 3 :]]
    fig, axes, columns = _grid(len(names), 3, row_height=2.5)
    clouds = {
        "control": (control, s.CONTROL, "X", 0.45),
        "real perturbed": (real, s.REAL, "s", 0.55),
        "control moved": (moved, s.PREDICTED, "o", 0.55),
    }
    for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
        # the smallest cloud last, so that it is not hidden
        for cells, colour, marker, alpha in sorted(clouds.values(), key=lambda cloud: -len(cloud[0][name])):
            points = np.asarray(cells[name], dtype=float)
            some = points[_some(np.arange(len(points)), max_cells, seed)]
            ax.scatter(*some.T, s=7, alpha=alpha, linewidths=0, rasterized=True, color=colour, marker=marker)
            middle = {"markersize": 9, "markeredgecolor": "white", "markeredgewidth": 1.4, "zorder": 3}
            ax.plot(*points.mean(axis=0), color=colour, marker=marker)[0].update(middle)
        x, y = f"{axis} 1" if i >= len(names) - columns else "", "" if i % columns else f"{axis} 2"
        s.label(ax, s.safe(name), x, y).set(xticks=[], yticks=[])
        ax.set_aspect("equal", adjustable="datalim")
        s.note(ax, 0.02, 0.99, s.safe((notes or {}).get(name, ""), 60))
    handles = [
        Line2D([], [], linestyle="", markersize=6, label=label, color=colour, marker=marker)
        for label, (_, colour, marker, _) in clouds.items()
    ]
    chosen = (
        "" if len(names) == len(moved) else f"{len(names)} of {len(moved)}: those that move most and least"
    )
    s.legend(fig, *handles, loc="outside upper center", columns=3, handlelength=0.8, title=chosen or None)
    return s.finish(fig, show, save)


def shapes(
    clouds: Mapping[str, np.ndarray],
    kinds: Mapping[str, Sequence[object]],
    *,
    notes: Mapping[str, str] | None = None,
    axis: str = "PC",
    max_cells: int = 600,
    max_kinds: int = 8,
    seed: int = 0,
    show: bool | None = None,
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
    axis
        Name of the projection's axes.
    max_cells
        Cells drawn in a panel, at random (seeded).
    max_kinds
        Kinds with a colour of their own, the most frequent; the others are grey.

    Returns
    -------
    Figure
    """
    labels = {name: np.asarray(kinds[name]).astype(str) for name in clouds}
    frequent = list(pd.Series(np.concatenate(list(labels.values()))).value_counts().index[:max_kinds])
    looks = {kind: s.mark(i) for i, kind in enumerate(sorted(frequent))}
    fig, axes, columns = _grid(len(clouds), 3, row_height=3.3)
    points = {name: np.asarray(cells, dtype=float)[:, :2] for name, cells in clouds.items()}
    every = np.concatenate(list(points.values()))
    low, high = np.quantile(every, [0.002, 0.998], axis=0)
    pad = 0.06 * (high - low)
    for i, (ax, name) in enumerate(zip(axes, points, strict=False)):
        some = np.random.default_rng(seed).permutation(len(points[name]))[:max_cells]
        for kind in [*looks, None]:
            here = some[labels[name][some] == kind] if kind else some[~np.isin(labels[name][some], frequent)]
            look = looks.get(kind, {"color": s.FAINT, "marker": "o"})
            ax.scatter(*points[name][here].T, s=11, alpha=0.7, linewidths=0, rasterized=True, **look)
        x, y = f"{axis} 1" if i >= len(points) - columns else "", "" if i % columns else f"{axis} 2"
        s.label(ax, s.safe(name), x, y).set(xticks=[], yticks=[])
        ax.set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + 2.5 * pad[1]))
        s.note(ax, 0.02, 0.99, s.safe((notes or {}).get(name, ""), 60))
    handles = [Line2D([], [], linestyle="", markersize=6, label=s.safe(k, 22), **v) for k, v in looks.items()]
    rows = -(-len(handles) * max((len(handle.get_label()) + 6 for handle in handles), default=1) // 110)
    s.legend(fig, *handles, loc="outside lower center", columns=-(-len(handles) // rows), handlelength=0.8)
    return s.finish(fig, show, save)


# -- how good a prediction is: distances beside baselines and floor, genes, where the error sits


def energy_bars(
    table: pd.DataFrame,
    *,
    methods: Sequence[str] | None = None,
    value: str = "energy",
    unit: str = _ENERGY,
    target: str = "the real perturbed cells",
    max_groups: int = 16,
    ax: Axes | None = None,
    show: bool | None = None,
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
    value, unit
        Another column to draw, and its axis label.
    target
        What the distances lead to.
    max_groups
        With more groups the strongest and the weakest are named, the median of the others between them.

    Returns
    -------
    Axes
    """
    if "metric" in table:
        table = _energies_of(table)
    _need(table, "method", value)
    table = table.assign(group=_group_labels(table))
    methods = list(methods or dict.fromkeys(table["method"]))
    table = table[table["method"].isin(methods)]
    table, groups = _few_groups(table, table.groupby("group")[value].max(), max_groups, "method")
    looks, thick = s.of_method(methods), 0.82 / len(methods)
    ax = s.axes_of(ax, height=1.3 + len(groups) * max(0.34, 0.15 * len(methods)))
    handles: list = []
    for i, method in enumerate(methods):
        rows, y = table[table["method"] == method], np.arange(len(groups)) - 0.41 + thick * (i + 0.5)
        look = {"facecolor": looks[method]["color"], "hatch": looks[method]["hatch"], "edgecolor": "white"}
        means = rows.groupby("group")[value].mean().reindex(groups)
        ax.barh(y, means, height=thick * 0.94, linewidth=0.3, **look)
        if rows["group"].duplicated().any():
            height = rows["group"].map(dict(zip(groups, y, strict=True)))
            ax.plot(rows[value], height, linestyle="", marker="o", markersize=2.5, color=s.INK)
        handles.append(Patch(label=s.safe(method), **look))
    if "floor" in table:
        floors = table.groupby("group", sort=False)["floor"].mean().reindex(groups)
        y = np.arange(len(groups))
        handles.append(ax.vlines(floors, y - 0.45, y + 0.45, color=s.INK, linewidth=2.2, label="noise floor"))
    ax.spines["left"].set_visible(False)  # it would hide the floors, which lie near zero
    _log_if_wide(ax, table[value])
    s.long_names(ax, groups, "y")
    ax.set_ylim(len(groups) - 0.45, -0.55)
    s.legend(ax, *handles, outside=True)
    return s.finish(s.label(ax, f"Distance to {target} (shorter is better)", unit), show, save)


def _energies_of(scores: pd.DataFrame) -> pd.DataFrame:
    """Energy distances of a hold-out's scores, with the noise floor as a column."""
    rows = (
        scores[scores["metric"] == "e_distance"].rename(columns={"value": "energy"}).dropna(subset="energy")
    )
    noise = rows["method"].str.startswith("noise")
    floors = rows[noise].groupby("group")["energy"].mean()
    return rows[~noise].assign(floor=rows["group"].map(floors))


def error_budget(
    table: pd.DataFrame,
    *,
    stages: Sequence[str] | None = None,
    max_groups: int = 30,
    ax: Axes | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Where the error sits: the energy distance after each stage of the way, one row per group.

    Parameters
    ----------
    table
        One row per group and stage: columns `stage`, `energy` and the group (as `group`, or `context` and
        `perturbation`). Stages are "noise floor", "reconstructed controls", "oracle latents", "operator", "no change".
    stages
        Order in the legend; that of the table by default.
    max_groups
        With more groups the strongest and the weakest are named, the median of the others between them.

    Returns
    -------
    Axes
    """
    _need(table, "stage", "energy")
    table = table.assign(group=_group_labels(table))
    stages = list(stages or dict.fromkeys(table["stage"]))
    table, groups = _few_groups(table, table.groupby("group")["energy"].max(), max_groups, "stage")
    wide = table.pivot_table(index="group", columns="stage", values="energy", sort=False)
    wide = wide.reindex(index=groups, columns=stages)
    ax = s.axes_of(ax, height=1.4 + 0.3 * max(len(wide), 3))
    y = np.arange(len(wide))
    ax.hlines(y, wide.min(axis=1), wide.max(axis=1), color=s.FAINT, linewidth=4)
    for stage, look in s.of_method(stages).items():
        style = {"linestyle": "", "markersize": 7, "markeredgecolor": "white"}
        ax.plot(wide[stage], y, label=s.safe(stage), color=look["color"], marker=look["marker"], **style)
    _log_if_wide(ax, table["energy"])
    ax.axvline(0, color=s.QUIET, linewidth=0.8, linestyle=":")
    s.long_names(ax, groups, "y")
    ax.set_ylim(len(wide) - 0.4, -0.6)
    s.legend(ax, outside=True, handlelength=0.8)
    return s.finish(s.label(ax, "Where the error sits", _ENERGY), show, save)


def predicted_vs_true(
    table: pd.DataFrame,
    *,
    n_names: int = 8,
    max_groups: int = 9,
    show: bool | None = None,
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

    Returns
    -------
    Figure
    """
    _need(table, "gene", "true", "predicted")
    has_groups = {"group", "context", "perturbation"} & set(table.columns)
    table = table.assign(group=_group_labels(table) if has_groups else "all cells")
    every = list(dict.fromkeys(table["group"]))
    size = (table["true"] ** 2).groupby(table["group"]).sum()
    ranked = list(size.reindex(every).sort_values(ascending=False, kind="stable").index)
    shown = every if len(every) <= max_groups else list(_ends(ranked, max_groups).items())
    names = [
        name if isinstance(name, str) else name[0]
        for name in shown
        if isinstance(name, str) or name[0] == name[1]
    ]
    many, n = len(every) > max_groups, len(names) + (len(every) > max_groups)
    fig, axes, columns = _grid(n, 3, row_height=2.35 if n > 1 else 4.5, width=s.WIDTH if n > 1 else 5.5)
    for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
        _changes(ax, table[table["group"] == name], n_names)
        x = "true change (log1p)" if i >= len(names) - columns else ""
        s.label(ax, s.safe(name), x, "" if i % columns else "predicted change (log1p)")
    if many:
        both = table.groupby("group")[["true", "predicted"]]
        r = [np.corrcoef(rows.to_numpy(dtype=float).T)[0, 1] for _, rows in both if len(rows) > 2]
        axes[len(names)].hist(r, bins=20, range=(np.nanmin(r, initial=0.0), 1.0), color=s.PREDICTED)
        s.label(axes[len(names)], f"all {len(every)} groups", "r of predicted and true", "groups")
    return s.finish(fig, show, save)


def _changes(ax: Axes, rows: pd.DataFrame, n_names: int) -> None:
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
    dots = {"linestyle": "", "rasterized": True}
    ax.plot(*both[~marked].T, alpha=0.5, markersize=3, color=s.QUIET, marker="o")[0].update(dots)
    if {"low", "high"} <= set(rows):
        ends = rows.loc[marked, ["low", "high"]].to_numpy(dtype=float).T
        ax.vlines(both[marked, 0], *ends, color=s.PREDICTED, alpha=0.35, linewidth=0.9)
    ax.plot(*both[marked].T, markersize=3.5, color=s.PREDICTED, marker="D")[0].update(dots)
    top = rows.iloc[np.argsort(-rows["true"].abs().to_numpy(), kind="stable")[:n_names]]
    genes = [s.safe(gene, 12) for gene in top["gene"]]
    _names_beside(ax, top["true"].to_numpy(), top["predicted"].to_numpy(), genes, high + 0.1 * span)
    s.few_ticks(ax, n=4)
    if len(rows) > 2:
        text = f"r = {np.corrcoef(both.T)[0, 1]:.2f}, {len(rows):,} genes"
        s.note(ax, 0.03, 0.98, text + (f"\n{marked.sum():,} differential" if marked.any() else ""))


def _names_beside(ax: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], edge: float) -> None:
    """Names in a column at `edge`, in the order of their points, far enough apart to be read."""
    low, high = ax.get_ylim()
    lines = ax.get_position().height * s.figure_of(ax).get_figheight() * 72 / (s.SMALL * 1.15)
    order = np.argsort(y)
    heights = _apart(y[order], (high - low) / lines, low, high)
    for i, height in zip(order, heights, strict=True):
        line = {"arrowstyle": "-", "color": s.QUIET, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 1}
        text = {"fontsize": s.SMALL - 1, "color": s.INK, "va": "center", "ha": "left"}
        ax.annotate(
            names[i], (x[i], y[i]), (edge, height), arrowprops=line, annotation_clip=False, **text
        ).set_in_layout(False)


def _apart(heights: np.ndarray, gap: float, low: float, high: float) -> np.ndarray:
    """Rising heights at least `gap` apart: pushed up from below, then down from the top."""
    steps = gap * np.arange(len(heights))
    up = np.maximum.accumulate(heights - steps) + steps
    down = np.minimum.accumulate((np.minimum(up, high - steps[::-1]) - steps)[::-1])[::-1] + steps
    return np.maximum(down, low + steps) if len(heights) else heights


# -- operators: spectra, response axes and genes, gradients, planted against learned, families


def spectra(
    table: pd.DataFrame,
    *,
    limit: float | None = None,
    max_conditions: int = 12,
    show: bool | None = None,
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

    Returns
    -------
    Figure
    """
    _need(table, "real", "imag", "singular_value")
    names = table["condition"].astype(str) if "condition" in table else _group_labels(table)
    norms = table["singular_value"].groupby(names, sort=False).max()
    ranked = list(norms.sort_values(ascending=False, kind="stable").index)
    few = len(ranked) <= max_conditions
    named = list(norms.index) if few else [a for a, b in _ends(ranked, max_conditions).items() if a == b]
    fig, (plane, values) = s.canvas(1, 2, height=3.4, width_ratios=(1, 1.25))
    turn = np.linspace(0, 2 * np.pi, 200)
    plane.plot(np.cos(turn), np.sin(turn), color=s.QUIET, linewidth=0.8, linestyle="--")
    plane.axhline(0, color=s.FAINT, linewidth=0.8, zorder=0)
    for name in (name for name in ranked if name not in named):
        rows = table[names == name]
        plane.plot(
            rows["real"], rows["imag"], linestyle="", marker=".", markersize=3, color=s.FAINT, zorder=1
        )
        sizes = np.sort(rows["singular_value"])[::-1]
        values.plot(np.arange(1, len(sizes) + 1), sizes, linewidth=0.6, color=s.FAINT, zorder=1)
    for i, name in enumerate(named):
        rows = table[names == name]
        plane.plot(rows["real"], rows["imag"], linestyle="", markersize=4.5, alpha=0.8)[0].update(s.mark(i))
        sizes = np.sort(rows["singular_value"])[::-1]
        look = {"linewidth": 1.2, "markersize": 4, "label": s.safe(name, 26)}
        values.plot(np.arange(1, len(sizes) + 1), sizes)[0].update(look | s.mark(i) | s.line(i))
    if not few:
        values.plot([], [], color=s.FAINT, label=f"{len(ranked) - len(named)} others")
    values.axhline(1, color=s.QUIET, linewidth=0.8, linestyle="--")
    if limit is not None:
        values.axhline(limit, color=s.VERMILION, linewidth=1.2, linestyle=":", label=f"limit {limit:g}")
    _around(plane, table)
    s.few_ticks(plane, n=5)
    s.few_ticks(values, "y", 6)
    values.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    s.label(plane, "Eigenvalues (dashed: unit circle)", "real part", "imaginary part")
    s.label(values, "Singular values (dashed: 1)", "rank", "singular value")
    s.legend(values, outside=True)
    return s.finish(fig, show, save)


def _around(plane: Axes, rows: pd.DataFrame) -> None:
    """Limits around the eigenvalues and 1, not the whole circle: most operators lie near the identity."""
    real: np.ndarray = np.append(rows["real"], 1.0)
    imag: np.ndarray = np.append(rows["imag"], 0.0)
    half = 0.6 * max(np.ptp(real), 2 * np.abs(imag).max(), 0.1)
    middle = (real.min() + real.max()) / 2
    plane.set(xlim=(middle - half, middle + half), ylim=(-half, half), aspect="equal")


def response_axes(
    table: pd.DataFrame,
    *,
    n_top: int = 12,
    max_axes: int = 6,
    unit: str = "change of log expression",
    show: bool | None = None,
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

    Returns
    -------
    Figure
    """
    _need(table, "axis", "gene", "effect")
    names = list(dict.fromkeys(table["axis"]))[:max_axes]
    fig, axes, columns = _grid(
        len(names), 3, row_height=0.9 + 0.19 * n_top, width=s.WIDTH if len(names) > 1 else 5.0
    )
    for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
        part = table[table["axis"] == name]
        top = part.loc[part["effect"].abs().sort_values(ascending=False).index[:n_top]].sort_values("effect")
        effect, y = top["effect"].to_numpy(dtype=float), np.arange(len(top))
        # falling genes are hatched, so that the sign shows without colour too
        for up, colour, hatch in ((True, s.RISE, ""), (False, s.FALL, "////")):
            here = (effect > 0) == up
            style = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3, "height": 0.8}
            ax.barh(y[here], effect[here], **style)
        if "uncertainty" in top:
            ax.errorbar(effect, y, xerr=top["uncertainty"], linestyle="", color=s.INK, linewidth=0.8)
        ax.axvline(0, color=s.QUIET, linewidth=0.8)
        s.long_names(ax, top["gene"], "y", 14)
        s.few_ticks(ax, "x", 4)
        title = name if isinstance(name, str) else f"axis {name}"
        s.label(ax, s.safe(title), unit if i >= len(names) - columns else "")
    return s.finish(fig, show, save)


def response_genes(
    table: pd.DataFrame,
    *,
    n_top: int = 20,
    n_named: int = 10,
    unit: str = "log2 fold change",
    max_groups: int = 16,
    ax: Axes | None = None,
    show: bool | None = None,
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
    unit
        Label of the colours.
    max_groups
        With more groups the strongest and the weakest are named, the median of the others between them.

    Returns
    -------
    Axes
    """
    _need(table, "gene", "lfc")
    table = table.assign(group=_group_labels(table), size=table["lfc"].abs())
    genes = table.groupby("gene")["size"].mean().nlargest(n_top).index
    table = table[["group", "gene", "lfc", "size"]]
    table, groups = _few_groups(table, table.groupby("group")["size"].mean(), max_groups, "gene")
    table = table.assign(
        rank=table["lfc"].abs().groupby(table["group"]).rank(ascending=False, method="first")
    )
    change, rank = (
        table.pivot(index="gene", columns="group", values=name).loc[genes, groups] for name in ("lfc", "rank")
    )
    height = 1.2 + 0.2 * len(genes) + _room_below(groups)
    ax = s.axes_of(ax, height=height, width=min(s.WIDTH, 2.6 + 0.62 * len(groups)))
    top = float(np.nanmax(np.abs(change.to_numpy()))) or 1.0
    image = ax.imshow(change, cmap=s.DIVERGING, vmin=-top, vmax=top, aspect="auto")
    inks = np.where(np.abs(change.to_numpy()) / top > 0.55, "white", s.INK)
    _write(ax, rank.where(rank <= n_named).to_numpy(), "{:.0f}", inks)
    s.long_names(ax, groups, "x", 28)
    s.long_names(ax, list(genes), "y", 16)
    s.without_spines(ax)
    s.colour_bar(ax, image, unit)
    return s.finish(s.label(ax, f"Genes that lead the response (numbers: rank, up to {n_named})"), show, save)


def gradient_map(
    table: pd.DataFrame, *, max_rows: int = 40, show: bool | None = None, save: str | Path | None = None
) -> Figure:
    """Does the gradient reach every parameter: the part of it that is reached, and the norms.

    Parameters
    ----------
    table
        One row per parameter (and loss term, if there is a column `term`): `parameter`, `reached` (part of
        its elements with a gradient other than zero, 0 to 1), `grad_norm`; if there, `norm` of itself, and
        `status`, where "frozen" parameters are meant to have no gradient.
    max_rows
        Parameters shown, those that are reached least first where there are more.

    Returns
    -------
    Figure
    """
    _need(table, "parameter", "reached", "grad_norm")
    best = table.groupby("parameter", sort=False)["reached"].max()
    names = list((best if len(best) <= max_rows else best.sort_values(kind="stable")).index[:max_rows])
    rows_of = {name: row for row, name in enumerate(names)}
    table, best = table[table["parameter"].isin(names)], best.loc[names]
    terms = list(dict.fromkeys(table["term"])) if "term" in table else [None]
    fig, (reach, norms) = s.canvas(
        1, 2, height=1.4 + 0.21 * max(len(names), 4), sharey=True, width_ratios=(1, 1.4)
    )
    reach.barh(range(len(names)), best, color=s.SKY, edgecolor="white", height=0.8)
    frozen = set(table.loc[table["status"] == "frozen", "parameter"]) if "status" in table else set()
    for row in np.flatnonzero(best.to_numpy() == 0):
        meant = names[row] in frozen
        text, colour = ("frozen", s.QUIET) if meant else ("no gradient", s.VERMILION)
        reach.text(0.02, row, text, fontsize=s.SMALL, va="center", color=colour)
    for i, term in enumerate(terms):
        rows = table if term is None else table[table["term"] == term]
        rows = rows[rows["grad_norm"] > 0]
        text = "gradient" if term is None else f"gradient of {s.safe(term)}"
        y = rows["parameter"].map(rows_of)
        norms.plot(rows["grad_norm"], y, linestyle="", markersize=5, label=text)[0].update(s.mark(i))
    if "norm" in table:
        sizes = table.groupby("parameter")["norm"].first().reindex(names)
        sizes = sizes[sizes > 0]
        y = sizes.index.map(rows_of)
        norms.plot(sizes, y, label="parameter", linestyle="", marker="|", markersize=9, color=s.INK)
    norms.set_xscale("log")
    s.log_ticks(norms, "x")
    for stripe in range(0, len(names), 2):
        norms.axhspan(stripe - 0.5, stripe + 0.5, color=s.FAINT, alpha=0.4, linewidth=0, zorder=0)
    s.long_names(reach, names, "y")
    norms.tick_params(axis="y", length=0)
    reach.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
    s.label(reach, "Elements reached", "fraction with gradient")
    s.label(norms, "Norms", "Euclidean norm (log scale)")
    s.legend(norms, outside=True, handlelength=0.8)
    return s.finish(fig, show, save)


def condition_similarity(
    table: pd.DataFrame,
    *,
    unit: str = "cosine of the responses",
    max_conditions: int = 40,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Figure:
    """Similarity of conditions as a heat map, clustered, with the tree beside it.

    Leaves are ordered so that neighbours are alike.

    Parameters
    ----------
    table
        (condition, condition), symmetric, -1 to 1 (:func:`cellop_nb.genes.response_similarity`). Conditions without a
        response (NaN) stand last, in grey.
    unit
        Label of the scale.
    max_conditions
        Of more conditions those that are most alike to others are drawn.

    Returns
    -------
    Figure

    Raises
    ------
    LabelError
        Where rows and columns differ.

    References
    ----------
    Bar-Joseph, Gifford and Jaakkola (2001), Fast optimal leaf ordering for hierarchical clustering.
    """
    if list(table.index) != list(table.columns):
        fix = "pass the square table of response_similarity"
        raise LabelError(three_beats("the same conditions as rows and columns", f"shape {table.shape}", fix))
    kept = (
        set(table.abs().mean().nlargest(max_conditions).index)
        if len(table) > max_conditions
        else set(table.index)
    )
    shown = table.loc[[name in kept for name in table.index], [name in kept for name in table.columns]]
    responding = shown.index[~np.isnan(np.diag(shown.to_numpy()))]
    order, tree = _clustered(shown.loc[responding, responding])
    names = [*order, *shown.index.difference(responding, sort=False)]
    values, size = shown.loc[names, names].to_numpy(), len(names)
    side = min(s.WIDTH, 2.8 + 0.24 * size + _room_below(names))
    fig, (left, ax) = s.canvas(1, 2, width=min(s.WIDTH, side + 0.6), height=side, width_ratios=(1, 7))
    _draw_tree(left, tree, size)
    colours = mpl.colormaps[s.DIVERGING].with_extremes(bad=s.FAINT)
    image = ax.imshow(values, cmap=colours, vmin=-1, vmax=1, aspect="auto")
    s.long_names(ax, names, "y", 28)
    s.long_names(ax, names, "x", 28)
    ax.yaxis.tick_right()
    s.without_spines(ax)
    if size > 30:
        ax.tick_params(labelsize=s.SMALL * 30 / size)
    if size <= 12:
        _write(ax, values, "{:.2f}", np.where(np.abs(values) > 0.6, "white", s.INK))
    more = "" if size == len(table) else f" ({size} of {len(table)} conditions)"
    bar = s.colour_bar(ax, image, f"which responses are alike: {unit}{more}", location="top", aspect=40)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    return s.finish(fig, show, save)


def _clustered(table: pd.DataFrame) -> tuple[list, np.ndarray | None]:
    """Average linkage on 1 - cosine."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    if len(table) < 2:
        return list(table.index), None
    distance = squareform(np.clip(1 - table.to_numpy(), 0, 2), checks=False)
    tree = optimal_leaf_ordering(linkage(distance, "average"), distance)
    return [table.index[i] for i in leaves_list(tree)], tree


def _draw_tree(ax: Axes, tree: np.ndarray | None, size: int) -> None:
    """The tree, its leaves level with the rows of the heat map."""
    from scipy.cluster.hierarchy import dendrogram

    ax.set(ylim=(size - 0.5, -0.5), yticks=[])
    s.without_spines(ax)
    if tree is None:
        ax.set_visible(False)
        return
    drawn = dendrogram(tree, no_plot=True)
    for leaves, heights in zip(drawn["icoord"], drawn["dcoord"], strict=True):
        ax.plot(heights, (np.array(leaves) - 5) / 10, color=s.QUIET, linewidth=0.9)
    ax.invert_xaxis()
    s.few_ticks(ax, "x", 2)
    ax.set_xlabel("1 - cos", fontsize=s.SMALL, color=s.INK)


# -- a training, and virtual cells


def training_curves(
    history: pd.DataFrame,
    *,
    floors: Mapping[str, float] | None = None,
    monitor: str | None = None,
    patience: int | None = None,
    title: str = "",
    show: bool | None = None,
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
    title
        Words above the curves; the number of epochs and the best one by default.

    Returns
    -------
    Figure
    """
    rows, columns = history.to_dict("records"), Columns()
    columns.extend(rows)
    monitor = monitor or columns.default_monitor()
    best = columns.best_epoch(monitor)
    title = title or f"{len(rows)} epochs" + (
        f", best epoch {best + 1:g} ({monitor})" if best is not None else ""
    )
    board = Dashboard(pick_panels(columns.names(), columns.constant()), monitor=monitor)
    board.update(columns, Marks(title, monitor, best, patience, floors or {}, changes_of_history(rows)))
    return s.finish(board.figure, show, save)


def strength_curves(
    table: pd.DataFrame,
    genes: pd.DataFrame | None = None,
    *,
    floor: float | None = None,
    max_genes: int = 7,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Figure:
    """How far a dose carries cells from the controls to the perturbed ones: distances and, if given, genes.

    Parameters
    ----------
    table
        One row per strength and target: columns `strength`, `energy` and `target` (what moved cells are compared with).
    genes
        One row per strength and gene: columns `strength`, `gene`, `lfc`; `low` and `high` for a band.
    floor
        Noise floor of the distances.
    max_genes
        Genes drawn, in the order of the table.

    Returns
    -------
    Figure
    """
    _need(table, "strength", "energy", "target")
    panels = 1 if genes is None else 2
    fig, axes = s.canvas(1, panels, height=3.0, width=s.WIDTH if panels == 2 else 4.6)
    targets = s.of_method(list(dict.fromkeys(table["target"])))
    for i, (target, rows) in enumerate(table.groupby("target", sort=False)):
        look = {
            "color": targets[target]["color"],
            "marker": targets[target]["marker"],
            "linestyle": s.LINES[i % 4],
        }
        axes[0].plot(rows["strength"], rows["energy"], label=s.safe(target), markersize=4)[0].update(look)
    if floor is not None:
        axes[0].axhline(floor, color=s.INK, linewidth=1.0, linestyle=(0, (1, 2)), label="noise floor")
    s.label(axes[0], "Distance of the moved cells", "strength (1: measured)", "energy distance (Euclid, U)")
    s.legend(axes[0])
    if genes is not None:
        _need(genes, "strength", "gene", "lfc")
        for i, (gene, rows) in enumerate(list(genes.groupby("gene", sort=False))[:max_genes]):
            marks = {"label": s.safe(gene, 20), "markersize": 4} | s.mark(i) | s.line(i)
            axes[1].plot(rows["strength"], rows["lfc"])[0].update(marks)
            if {"low", "high"} <= set(rows):
                band = {"color": s.line(i)["color"], "alpha": 0.15, "linewidth": 0}
                axes[1].fill_between(rows["strength"], rows["low"], rows["high"], **band)
        s.label(axes[1], "Genes", "strength (1: measured)", "log2 fold change")
        s.legend(axes[1], outside=True)
    for ax in axes:
        ax.axvline(1.0, color=s.QUIET, linewidth=0.8, linestyle="--")
        s.few_ticks(ax)
    return s.finish(fig, show, save)
