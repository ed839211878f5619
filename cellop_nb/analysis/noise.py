"""What a perfect prediction would score: noise floor and ceiling, from halves of the real cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..models.energy import noise_floor
from . import formulas
from .formulas import Undefined
from .scores import METRICS, Scored, Truth, known_metrics, value_of
from .targets import Prediction

FLOOR = "noise floor (split half)"
CEILING = "noise ceiling (Spearman-Brown)"


def noise(truth: Truth, metrics: Iterable[str] | None = None, *, n_splits: int = 10) -> list[dict]:
    r"""What a perfect prediction would score, from random halves of the real cells (mean over the splits).

    E-distance: :func:`~cellop_nb.models.energy.noise_floor` (about 0). Errors of means (mae, rmse, l2): half of the error
    between the halves, which is the error that the truth's own sampling leaves. Correlations of changes: Spearman-Brown
    :math:`2r/(1+r)`; the halves share the control cells, as prediction and truth do. Other metrics have no
    row.

    Returns
    -------
    rows ``method, metric, value, reason``, method being :data:`FLOOR` or :data:`CEILING`.
    """
    rows = []
    for name in known_metrics(metrics):
        if name not in _BOUNDS:
            continue
        method, bound = _BOUNDS[name]
        value, reason = value_of(lambda n=name, b=bound: b(_halves(truth, n, n_splits)))
        rows.append({"method": method, "metric": name, "value": value, "reason": reason})
    return rows


# what the score of one half against the other says about a perfect prediction
_BOUNDS: dict[str, tuple[str, Callable[[float], float]]] = {
    "e_distance": (FLOOR, float),
    **{name: (FLOOR, lambda half: half / 2) for name in ("mae", "rmse", "l2_top1000")},
    **{name: (CEILING, formulas.spearman_brown) for name in METRICS if name.startswith("pearson_")},
}


def _halves(truth: Truth, metric: str, n_splits: int) -> float:
    """Mean over splits of the metric with one half of the real cells as the prediction of the other."""
    if len(truth.real) < 4:
        raise Undefined(f"{len(truth.real)} real cells cannot be split in two clouds")
    if metric == "e_distance":
        return noise_floor(torch.from_numpy(truth.real_points), n_splits=n_splits, seed=truth.seed)
    rng, values = np.random.default_rng([truth.seed, 2]), []
    for _ in range(n_splits):
        first, second = np.array_split(rng.permutation(len(truth.real)), 2)
        half = _Half(truth, second)
        values.append(METRICS[metric](Scored(Prediction.of_cells("half", truth.real[first]), half)))
    return float(np.mean(values))


class _Half(Truth):
    """A truth of half the real cells that keeps the gene ranking of the whole."""

    def __init__(self, whole: Truth, rows: np.ndarray) -> None:
        options = {"shared_shift": whole.shared_shift, "max_cells": whole.max_cells, "seed": whole.seed}
        super().__init__(whole.real[rows], whole.control, whole.space, **options)
        self.whole = whole

    @property
    def top_genes(self) -> np.ndarray:
        return self.whole.top_genes
