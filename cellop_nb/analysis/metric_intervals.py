"""How sure are the metrics of a hold-out: bootstrap over cells and over the fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist
from tqdm.auto import tqdm

from .holdout import OPERATORS, Holdout
from .scores import Truth, known_metrics, score
from .sides import Sides, sides_of
from .targets import Prediction
from .uncertainty import Interval


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
    for number, sides in enumerate(sides_of(result, layer, perturbation_key, context_key)):
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
    scored = score(Prediction.of_cells(OPERATORS, cells, counts, library), again, names)
    return {row["metric"]: row["value"] for row in scored}


def _dense(counts) -> np.ndarray:
    return counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)


def _energy_replicates(sides: Sides, truth: Truth, n_replicates: int, rng) -> np.ndarray:
    """E-distances with multinomial weights on the cells; those of the predicted cells also redraw the fits.

    As in :func:`~cellop_nb.analysis.uncertainty.bootstrap_energy`; drawing fits makes weights correlate, which
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
