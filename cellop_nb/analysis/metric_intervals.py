"""How sure are the metrics of a hold-out: bootstrap over cells and over the fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from tqdm.auto import tqdm

from ..data.contract import keys_of
from ..data.counts import measured_totals
from .baselines import Prediction
from .holdout import CELLOP, Holdout
from .scores import MAX_CELLS, Truth, known_metrics, rows_by_group, score
from .uncertainty import Interval


def metric_intervals(
    result: Holdout,
    *,
    metrics: Iterable[str] | None = None,
    n_replicates: int = 100,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Bootstrap interval of every metric of a prediction, over cells and over the seeds' fits.

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

    Returns
    -------
    DataFrame
        ``group, metric, value, low, high, level, reason``.

    References
    ----------
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 10.
    """
    names = known_metrics(result.scores["metric"].unique() if metrics is None else metrics)
    rows = []
    for number, sides in enumerate(sides_of(result)):
        truth = Truth(sides.real, sides.control, sides.space, max_cells=MAX_CELLS, seed=seed)
        rng = np.random.default_rng([seed, number])
        draws = range(n_replicates)
        bar = tqdm(draws, desc=f"bootstrap {sides.group}", disable=not progress)
        others = [name for name in names if name != "e_distance"]
        values = (
            pd.DataFrame([_redrawn(sides, truth, others, rng) for _ in bar]) if others else pd.DataFrame()
        )
        scored = result.scores[(result.scores["group"] == sides.group) & (result.scores["method"] == CELLOP)]
        by_metric = scored.groupby("metric")[["value", "reason"]].agg({"value": "mean", "reason": "first"})
        for name in names:
            estimate, reason = by_metric.loc[name]
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


@dataclass(frozen=True, eq=False)
class Sides:
    """One held-out group in the space of its metrics: cells (cell, gene) in log1p-CP10k, their counts, and their
    libraries (cell,) where genes were left out; predicted ones for each fit."""

    group: str
    space: Any = field(repr=False)
    fits: list[np.ndarray] = field(repr=False)
    fit_counts: list = field(repr=False)
    fit_libraries: list[np.ndarray] | None = field(repr=False)
    real: np.ndarray = field(repr=False)
    real_counts: Any = field(repr=False)
    real_library: np.ndarray | None = field(repr=False)
    control: np.ndarray = field(repr=False)


def sides_of(result: Holdout) -> Iterator[Sides]:
    """The groups of a hold-out that were predicted, one after the other, in the space of their first fit."""
    labels = result.scores[["question", "context", "perturbation", "group"]].drop_duplicates()
    for question, context, perturbation, group in labels.itertuples(index=False, name=None):
        fit = next(fit for fit in result.fits if fit.question == question)
        keys, space = keys_of(fit.real), fit.space
        cells = result.predictions[(result.predictions.obs["question"] == question).to_numpy()]
        predicted = cells[rows_by_group(cells, keys).get((context, perturbation), np.zeros(0, int))]
        if not predicted.n_obs:
            continue  # its reason stands in the table
        members = [
            predicted[(predicted.obs["seed"] == seed).to_numpy()] for seed in predicted.obs["seed"].unique()
        ]
        counts = [space.select(member, "X") for member in members]
        libraries = [measured_totals(member) for member in members]
        real = fit.real[rows_by_group(fit.real, keys)[context, perturbation]]
        control = fit.control[rows_by_group(fit.control, keys)[context, keys.control]]
        yield Sides(
            group,
            space,
            [space.transform(part) for part in counts],
            counts,
            None if libraries[0] is None else libraries,
            space.transform(space.select(real)),
            space.select(real),
            measured_totals(real),
            space.transform(space.select(control)),
        )


class _Redrawn(Truth):
    """Resampled real and control cells that keep the gene ranking of the whole."""

    def __init__(self, whole: Truth, real, control, counts, library) -> None:
        options = {"shared_shift": whole.shared_shift, "max_cells": whole.max_cells, "seed": whole.seed}
        super().__init__(real, control, whole.space, counts=counts, library=library, **options)
        self.whole = whole

    @property
    def top_genes(self) -> np.ndarray:
        return self.whole.top_genes


def _redrawn(sides: Sides, truth: Truth, names: list[str], rng: np.random.Generator) -> dict[str, float]:
    """The metrics of one bootstrap sample."""
    fits = rng.integers(len(sides.fits), size=len(sides.fits))
    chosen = [(fit, rng.integers(len(sides.fits[fit]), size=len(sides.fits[fit]))) for fit in fits]
    cells = np.concatenate([sides.fits[fit][rows] for fit, rows in chosen])
    counts = np.concatenate([_dense(sides.fit_counts[fit][rows]) for fit, rows in chosen])
    real = rng.integers(len(sides.real), size=len(sides.real))
    control = rng.integers(len(sides.control), size=len(sides.control))
    sample = (sides.real[real], sides.control[control], _dense(sides.real_counts[real]))
    library, measured = None, None if sides.real_library is None else sides.real_library[real]
    if sides.fit_libraries is not None:
        library = np.concatenate([sides.fit_libraries[fit][rows] for fit, rows in chosen])
    again = _Redrawn(truth, *sample, measured)
    scored = score(Prediction.of_cells(CELLOP, cells, counts, library), again, names)
    return {row["metric"]: row["value"] for row in scored}


def _dense(counts) -> np.ndarray:
    return counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)


def _energy_replicates(sides: Sides, truth: Truth, n_replicates: int, rng) -> np.ndarray:
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
