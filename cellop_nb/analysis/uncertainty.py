"""How sure is a hold-out's prediction: intervals of its metrics and of every gene's change, and their coverage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from scipy.stats import norm
from tqdm.auto import tqdm

from ..data.contract import context_labels, obs_labels
from ..errors import HoldoutError, three_beats
from .baselines import Prediction
from .holdout import OPERATORS, Holdout
from .intervals import Interval, change_error, gene_change, pool
from .scores import FDR, Truth, differential, known_metrics, score

LEVELS = (0.5, 0.8, 0.9, 0.95)


@dataclass(frozen=True, eq=False)
class _Sides:
    """One held-out group in the space of its metrics: cells (cell, gene) in log1p-CP10k, and their counts."""

    context: str
    perturbation: str
    fits: list[np.ndarray] = field(repr=False)
    fit_counts: list = field(repr=False)
    real: np.ndarray = field(repr=False)
    real_counts: Any = field(repr=False)
    control: np.ndarray = field(repr=False)

    @property
    def group(self) -> str:
        return f"{self.context}, {self.perturbation}"


def _sides(result: Holdout, layer, perturbation_key: str, context_key) -> Iterator[_Sides]:
    space = result.space

    def rows(adata, context: str, perturbation: str | None = None) -> np.ndarray:
        inside = (context_labels(adata, context_key) == context).to_numpy()
        if perturbation is not None:
            inside = inside & (obs_labels(adata, perturbation_key) == perturbation).to_numpy()
        return np.flatnonzero(inside)

    groups = result.table[["context", "perturbation"]].drop_duplicates()
    for context, perturbation in groups.itertuples(index=False, name=None):
        predicted = result.predictions[rows(result.predictions, context, perturbation)]
        if not predicted.n_obs:
            continue  # its reason stands in the table
        parts = [
            space.select(predicted[predicted.obs["fit"] == fit]) for fit in predicted.obs["fit"].unique()
        ]
        real = space.select(result.real[rows(result.real, context, perturbation)], layer)
        control = space.select(result.control[rows(result.control, context)], layer)
        cells = [space.transform(part) for part in parts]
        sides = (cells, parts, space.transform(real), real, space.transform(control))
        yield _Sides(context, perturbation, *sides)


# -- metrics


def metric_intervals(
    result: Holdout,
    *,
    metrics: Iterable[str] | None = None,
    n_replicates: int = 100,
    level: float = 0.95,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    max_cells: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Bootstrap interval of every metric of the operators' prediction, over cells and over the seeds' fits.

    In each replicate the fits are drawn again, and so are each fit's predicted cells, the real cells and the
    control cells. Resampling adds noise to both sides, so replicates are moved by their mean's distance to the
    estimate: the interval says how far the value may lie from that of other samples of the same size.

    Parameters
    ----------
    result
        Of :func:`holdout`, with ``n_seeds`` above 1 for the spread between fits.
    metrics
        Names; those of the result's table where None. Metrics of differential genes cost a Wilcoxon test per
        replicate.
    n_replicates, level
        Bootstrap samples, and the nominal coverage.
    max_cells
        Cells a side of the E-distance.

    Returns
    -------
    DataFrame
        ``group, metric, value, low, high, level, reason``.

    References
    ----------
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 10.
    """
    names = known_metrics(result.table["metric"].unique() if metrics is None else metrics)
    rows = []
    for number, sides in enumerate(_sides(result, layer, perturbation_key, context_key)):
        truth = Truth(sides.real, sides.control, result.space, max_cells=max_cells, seed=seed)
        rng = np.random.default_rng([seed, number])
        draws = range(n_replicates)
        bar = tqdm(draws, desc=f"bootstrap {sides.group}", disable=not progress)
        others = [name for name in names if name != "e_distance"]
        values = (
            pd.DataFrame([_redrawn(sides, truth, others, rng) for _ in bar]) if others else pd.DataFrame()
        )
        scored = result.table[(result.table["group"] == sides.group) & (result.table["method"] == OPERATORS)]
        known = scored.set_index("metric")[["value", "reason"]]
        for name in names:
            estimate, reason = known.loc[name]
            labels = {"group": sides.group, "metric": name, "value": estimate}
            if np.isfinite(estimate):
                replicates = (
                    _energy_replicates(sides, truth, n_replicates, rng)
                    if name == "e_distance"
                    else values[name].dropna().to_numpy()
                )
                if len(replicates):
                    centred = Interval.of(estimate, replicates - replicates.mean() + estimate, level)
                    labels |= {"low": float(centred.low), "high": float(centred.high)}
                else:
                    reason = "needs the training cells, which the result does not keep"
            rows.append({"low": np.nan, "high": np.nan, **labels, "level": level, "reason": reason})
    columns = ["group", "metric", "value", "low", "high", "level", "reason"]
    return pd.DataFrame(rows, columns=columns)


class _Redrawn(Truth):
    """Resampled real and control cells that keep the gene ranking of the whole."""

    def __init__(self, whole: Truth, real, control, counts, shift) -> None:
        options = {"shared_shift": shift, "max_cells": whole.max_cells, "seed": whole.seed}
        super().__init__(real, control, whole.space, counts=counts, **options)
        self.whole = whole

    @property
    def top_genes(self) -> np.ndarray:
        return self.whole.top_genes


def _redrawn(sides: _Sides, truth: Truth, names: list[str], rng: np.random.Generator) -> dict[str, float]:
    """The metrics of one bootstrap sample."""
    fits = rng.integers(len(sides.fits), size=len(sides.fits))
    chosen = [(fit, rng.integers(len(sides.fits[fit]), size=len(sides.fits[fit]))) for fit in fits]
    cells = np.concatenate([sides.fits[fit][rows] for fit, rows in chosen])
    counts = np.concatenate([_dense(sides.fit_counts[fit][rows]) for fit, rows in chosen])
    real = rng.integers(len(sides.real), size=len(sides.real))
    control = rng.integers(len(sides.control), size=len(sides.control))
    sample = (sides.real[real], sides.control[control], _dense(sides.real_counts[real]))
    again = _Redrawn(truth, *sample, truth.shared_shift)
    scored = score(Prediction.of_cells(OPERATORS, cells, counts), again, names)
    return {row["metric"]: row["value"] for row in scored}


def _dense(counts) -> np.ndarray:
    return counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)


def _energy_replicates(sides: _Sides, truth: Truth, n_replicates: int, rng) -> np.ndarray:
    """E-distances with multinomial weights on the cells; those of the predicted cells also redraw the fits.

    As in :func:`~cellop_nb.analysis.intervals.bootstrap_energy`; drawing fits makes weights correlate, which
    moves the mean (the caller centres) and widens the spread (which is what is asked).
    """
    most = max(1, truth.max_cells // len(sides.fits))
    parts = [truth.space.project(cells[rng.permutation(len(cells))[:most]]) for cells in sides.fits]
    x, y = np.concatenate(parts), truth.real_points
    fits = rng.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=n_replicates)
    sizes = [len(part) for part in parts]
    w = np.concatenate(
        [_multinomial(size * fits[:, k], size, rng) for k, size in enumerate(sizes)], axis=1
    )  # (replicate, cell)
    v = _multinomial(np.full(n_replicates, len(y)), len(y), rng)
    n, m = w.sum(axis=1), len(y)
    between = 2 * _form(w, cdist(x, y), v) / (n * m)
    return between - _form(w, cdist(x, x), w) / (n - 1) ** 2 - _form(v, cdist(y, y), v) / (m - 1) ** 2


def _multinomial(draws: np.ndarray, size: int, rng) -> np.ndarray:
    return rng.multinomial(draws, np.full(size, 1 / size)).astype(float)


def _form(w: np.ndarray, distance: np.ndarray, v: np.ndarray) -> np.ndarray:
    return ((w @ distance) * v).sum(axis=1)


# -- genes


def change_intervals(
    result: Holdout,
    *,
    n_replicates: int = 200,
    level: float = 0.95,
    widen: float = 1.0,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    seed: int = 0,
) -> pd.DataFrame:
    """Interval of every gene's predicted change, from bootstrapped cells and the spread between fits.

    Parameters
    ----------
    result
        Of :func:`holdout`.
    n_replicates, level
        Bootstrap samples per fit, and the nominal coverage.
    widen
        Factor on the distance of both ends to the prediction; :func:`widening` measures it on contexts that
        were trained on. At 1 the interval holds sampling and seeds, and not the error of the model itself.

    Returns
    -------
    DataFrame
        A row per group and gene: ``group, gene, predicted, low, high, true, true_error`` (standard error of the
        measured change), ``is_de`` (Wilcoxon, Benjamini-Hochberg below 5 % in the real cells) and ``inside``
        (whether the measured change lies in the interval, allowing for its own error). Changes of mean
        log1p-CP10k against the control cells.
    """
    tables = []
    for sides in _sides(result, layer, perturbation_key, context_key):
        members = [
            gene_change(cells, sides.control, n_replicates=n_replicates, level=level, seed=seed + k)
            for k, cells in enumerate(sides.fits)
        ]
        interval = pool(members)
        true = sides.real.mean(0, dtype=np.float64) - sides.control.mean(0, dtype=np.float64)
        columns = {
            "group": sides.group,
            "gene": np.asarray(result.space.genes, dtype=str),
            "predicted": interval.estimate,
            "low": interval.estimate + widen * np.minimum(interval.low - interval.estimate, 0),
            "high": interval.estimate + widen * np.maximum(interval.high - interval.estimate, 0),
            "true": true,
            "true_error": change_error(sides.real, sides.control),
            "is_de": (differential(sides.real, sides.control)["fdr"] < FDR).to_numpy(),
        }
        tables.append(pd.DataFrame(columns))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(inside=_inside(table, level))


def _inside(table: pd.DataFrame, level: float) -> pd.Series:
    margin = norm.ppf((1 + level) / 2) * table["true_error"]
    below = np.hypot(table["predicted"] - table["low"], margin)
    above = np.hypot(table["high"] - table["predicted"], margin)
    return (table["true"] >= table["predicted"] - below) & (table["true"] <= table["predicted"] + above)


def coverage_table(result: Holdout, *, levels: Sequence[float] = LEVELS, **options) -> pd.DataFrame:
    """Nominal against empirical coverage of the genes' intervals: ``group, level, coverage, genes``.

    `options` as in :func:`change_intervals`; below nominal the intervals are too narrow.
    """
    rows = []
    for level in levels:
        table = change_intervals(result, level=level, **options)
        for group, genes in table.groupby("group", sort=False):
            rows.append((group, level, float(genes["inside"].mean()), len(genes)))
    return pd.DataFrame(rows, columns=["group", "level", "coverage", "genes"])


def widening(results: Iterable[Holdout], *, level: float = 0.95, **options) -> float:
    r"""The factor by which intervals of hold-outs with a known answer must be widened to cover as they say.

    Split-conformal: the smallest `widen` at which a share `level` of all genes of `results` is inside. Use
    hold-outs of *other* contexts than the one it is then applied to; with few of them it is a rough guide.

    References
    ----------
    Vovk, Gammerman, Shafer 2005, Algorithmic Learning in a Random World; Angelopoulos and Bates 2023, Found
    Trends Mach Learn 16:494 (normalised scores).
    """
    needed = []
    for result in results:
        table = change_intervals(result, level=level, **options)
        gap = table["true"] - table["predicted"]
        width = np.where(gap < 0, table["predicted"] - table["low"], table["high"] - table["predicted"])
        margin = norm.ppf((1 + level) / 2) * table["true_error"]
        excess = np.sqrt(np.maximum(gap**2 - margin**2, 0))
        needed.append(np.where(excess > 0, excess / np.maximum(width, 1e-12), 0.0))
    if not needed:
        raise HoldoutError(three_beats("hold-outs with a known answer", "none", "hold out training contexts"))
    values = np.concatenate(needed)
    rank = min(int(np.ceil((len(values) + 1) * level)), len(values))
    return float(np.sort(values)[rank - 1])
