"""Figures of the operators themselves: spectra, response axes, gradients, planted against learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cellop_nb.notebook.figures import style as s
from cellop_nb.notebook.figures.tables import group_labels, need

_MOST_CONDITIONS = 12


def spectra(table: pd.DataFrame, *, limit: float | None = None) -> Figure:
    """Eigenvalues in the complex plane, and singular values, of the operator of each condition.

    Parameters
    ----------
    table
        One row per condition and index: `condition` (or `group`, or `context` and `perturbation`), `real` and
        `imag` parts of an eigenvalue, `singular_value`. At most 12 conditions are drawn.
    limit
        Largest spectral norm that the stability penalty lets pass; drawn as a line.
    """
    need(table, "real", "imag", "singular_value")
    names = table["condition"].astype(str) if "condition" in table else group_labels(table)
    shown = list(dict.fromkeys(names))[:_MOST_CONDITIONS]
    fig, (plane, values) = s.canvas(1, 2, height=3.4, width_ratios=(1, 1.25))
    turn = np.linspace(0, 2 * np.pi, 200)
    plane.plot(np.cos(turn), np.sin(turn), color=s.QUIET, linewidth=0.8, linestyle="--")
    plane.axhline(0, color=s.FAINT, linewidth=0.8, zorder=0)
    for i, name in enumerate(shown):
        rows = table[names == name]
        plane.plot(rows["real"], rows["imag"], linestyle="", markersize=4.5, alpha=0.8, **s.mark(i))
        sizes = np.sort(rows["singular_value"])[::-1]
        values.plot(
            np.arange(1, len(sizes) + 1),
            sizes,
            linewidth=1.2,
            markersize=4,
            label=s.safe(name, 26),
            **s.mark(i) | s.line(i),
        )
    values.axhline(1, color=s.QUIET, linewidth=0.8, linestyle="--")
    if limit is not None:
        values.axhline(limit, color=s.OKABE_ITO[3], linewidth=1.2, linestyle=":", label=f"limit {limit:g}")
    _around(plane, table[names.isin(shown)])
    s.few_ticks(plane, n=5)
    s.few_ticks(values, n=6)
    s.label(plane, "Eigenvalues (dashed: unit circle)", "real part", "imaginary part")
    s.label(values, "Singular values (dashed: 1)", "rank", "singular value")
    s.legend(values, outside=True)
    return fig


def _around(plane, rows: pd.DataFrame) -> None:
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
    columns: int = 3,
    max_axes: int = 6,
    unit: str = "change of log expression",
) -> Figure:
    """The genes that each response axis moves most, signed.

    Parameters
    ----------
    table
        Columns `axis`, `gene`, `effect` (signed); on request `uncertainty` (same unit) for error bars.
    n_top
        Genes per axis, by absolute effect.
    """
    need(table, "axis", "gene", "effect")
    names = list(dict.fromkeys(table["axis"]))[:max_axes]
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    fig, axes = s.canvas(
        rows, columns, height=rows * (0.9 + 0.19 * n_top), width=s.WIDTH if columns > 1 else 5.0
    )
    for i, (ax, name) in enumerate(zip(axes, names, strict=False)):
        part = table[table["axis"] == name]
        top = part.reindex(part["effect"].abs().sort_values(ascending=False).index)[:n_top].sort_values(
            "effect"
        )
        _signed_bars(ax, top)
        title = name if isinstance(name, str) else f"axis {name}"
        s.label(ax, s.safe(title), unit if i >= len(names) - columns else "")
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    return fig


def _signed_bars(ax, top: pd.DataFrame) -> None:
    """Up in vermilion, down in blue and hatched, so that the sign shows without colour too."""
    effect, y = top["effect"].to_numpy(dtype=float), np.arange(len(top))
    errors = top["uncertainty"].to_numpy(dtype=float) if "uncertainty" in top else None
    for up, colour, hatch in ((True, s.OKABE_ITO[3], ""), (False, s.OKABE_ITO[0], "////")):
        here = (effect > 0) == up
        ax.barh(
            y[here], effect[here], color=colour, hatch=hatch, edgecolor="white", linewidth=0.3, height=0.8
        )
    if errors is not None:
        ax.errorbar(effect, y, xerr=errors, linestyle="", color=s.INK, linewidth=0.8)
    ax.axvline(0, color=s.QUIET, linewidth=0.8)
    s.long_names(ax, top["gene"], "y")
    s.few_ticks(ax, "x", 4)


def gradient_map(table: pd.DataFrame, *, max_rows: int = 40) -> Figure:
    """Does the gradient reach every parameter: the part of it that is reached, and the norms.

    Parameters
    ----------
    table
        One row per parameter (and loss term, if there is a column `term`): `parameter`, `reached` (part of
        its elements with a gradient other than zero, 0 to 1), `grad_norm`; on request `norm` of itself, and
        `status`, where "frozen" parameters are meant to have no gradient.
    """
    need(table, "parameter", "reached", "grad_norm")
    names = list(dict.fromkeys(table["parameter"]))[:max_rows]
    place = {name: row for row, name in enumerate(names)}
    table = table[table["parameter"].isin(names)]
    terms = list(dict.fromkeys(table["term"])) if "term" in table else [None]
    fig, (reach, norms) = s.canvas(
        1, 2, height=1.4 + 0.21 * max(len(names), 4), sharey=True, width_ratios=(1, 1.4)
    )
    best = table.groupby("parameter")["reached"].max().reindex(names)
    reach.barh(range(len(names)), best, color=s.OKABE_ITO[5], edgecolor="white", height=0.8)
    frozen = set(table.loc[table["status"] == "frozen", "parameter"]) if "status" in table else set()
    for row in np.flatnonzero(best.to_numpy() == 0):
        words, style = "no gradient", {"color": s.OKABE_ITO[3], "fontweight": "bold"}
        if names[row] in frozen:
            words, style = "frozen", {"color": s.QUIET}
        reach.text(0.02, row, words, fontsize=s.SMALL, va="center", **style)
    for i, term in enumerate(terms):
        rows = table if term is None else table[table["term"] == term]
        rows = rows[rows["grad_norm"] > 0]
        norms.plot(
            rows["grad_norm"],
            rows["parameter"].map(place),
            linestyle="",
            markersize=5,
            label="gradient" if term is None else f"gradient of {s.safe(term)}",
            **s.mark(i),
        )
    if "norm" in table:
        sizes = table.groupby("parameter")["norm"].first().reindex(names)
        sizes = sizes[sizes > 0]
        norms.plot(
            sizes,
            sizes.index.map(place),
            linestyle="",
            marker="|",
            markersize=9,
            color=s.INK,
            label="parameter",
        )
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
    return fig


def planted_vs_learned(
    planted: Mapping[str, np.ndarray] | Sequence[np.ndarray] | np.ndarray,
    learned: Mapping[str, np.ndarray] | Sequence[np.ndarray] | np.ndarray,
    *,
    max_conditions: int = 4,
    names: Sequence[str] = ("planted", "learned", "difference"),
) -> Figure:
    """Planted and learned operators (or any two matrices) and their difference on one diverging scale.

    Parameters
    ----------
    planted, learned
        Condition -> matrix (row, column), a list of matrices, or one matrix; in the same basis.
    names
        Titles of the three columns.
    """
    left, right = _named(planted), _named(learned)
    shown = list(left)[:max_conditions]
    top = max(float(np.abs(np.stack([left[name], right[name]])).max()) for name in shown) or 1.0
    fig, axes = s.canvas(len(shown), 3, height=2.15 * len(shown) + 0.35, width=7.2)
    for row, name in enumerate(shown):
        a, b = np.asarray(left[name], dtype=float), np.asarray(right[name], dtype=float)
        for column, matrix in enumerate((a, b, b - a)):
            ax = axes[3 * row + column]
            image = ax.imshow(matrix, cmap=s.DIVERGING, vmin=-top, vmax=top)
            ax.set(xticks=[], yticks=[])
            s.label(ax, names[column] if row == 0 else "", y=s.safe(name) if column == 0 else "")
        error = np.linalg.norm(b - a) / (np.linalg.norm(a) or 1.0)
        axes[3 * row + 2].set_xlabel(f"relative error {error:.1%}", fontsize=s.SMALL, color=s.INK)
    bar = fig.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=s.SMALL, labelcolor=s.INK, colors=s.QUIET)
    bar.set_label("matrix entry", fontsize=s.SMALL, color=s.INK)
    return fig


def _named(matrices) -> dict[str, np.ndarray]:
    if isinstance(matrices, Mapping):
        return {str(name): np.asarray(matrix) for name, matrix in matrices.items()}
    stack = np.asarray(matrices, dtype=float)
    return {"": stack} if stack.ndim == 2 else {f"condition {i}": matrix for i, matrix in enumerate(stack)}
