"""Simple predictions that every table carries. They beat most published models, so they are first-class code.

A method is a function ``(training: Training, target: Target) -> Prediction``. It raises
:class:`~cellop_nb.analysis.metrics.Undefined` where the training cells do not determine it; it never falls back to
something else. All baselines add or average in log1p-CP10k space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ..data.counts import measured_totals
from ..data.groups import Groups
from ..errors import DataError, ModelError
from .metrics import EvaluationSpace, Undefined
from .plan import Measured, linear, near_mean_shift, near_power


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a method says of one group, in log1p-CP10k over the genes of the evaluation.

    Attributes
    ----------
    mean : (gene,) predicted mean; None where nothing is predicted
    cells : (cell, gene) predicted cells; None where the method predicts a mean only
    counts : (cell, gene) predicted counts
    library : (cell,) predicted counts over all measured genes, where some are not in the evaluation
    reason : why there is no prediction
    """

    method: str
    mean: np.ndarray | None = field(default=None, repr=False)
    cells: np.ndarray | None = field(default=None, repr=False)
    counts: Any = field(default=None, repr=False)
    library: np.ndarray | None = field(default=None, repr=False)
    reason: str = ""

    def __post_init__(self) -> None:
        for name in ("mean", "cells"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                problem = f"{int((~np.isfinite(value)).sum())} NaN or infinite values"
                fix = "find out where the model breaks; they are not replaced"
                raise DataError(f"a finite {name} predicted by {self.method!r}", problem, fix)

    @classmethod
    def of_cells(cls, method: str, cells: np.ndarray, counts=None, library=None) -> Prediction:
        """From predicted cells (cell, gene) in log1p-CP10k."""
        return cls(method, np.asarray(cells).mean(axis=0, dtype=np.float64), cells, counts, library)

    @classmethod
    def of_counts(cls, method: str, counts, space: EvaluationSpace, library=None) -> Prediction:
        """From predicted counts (cell, gene) over the genes of `space`."""
        return cls.of_cells(method, space.transform(counts), counts, library)

    @classmethod
    def of_adata(cls, method: str, adata: AnnData, space: EvaluationSpace) -> Prediction:
        """From virtual cells with counts in ``X``."""
        return cls.of_counts(method, space.select(adata, "X"), space, measured_totals(adata))


@dataclass(frozen=True, eq=False)
class Training:
    """Training cells in log1p-CP10k with the index of their groups.

    Attributes
    ----------
    cells : (cell, gene)
    groups : the index; ``groups.rows(context, perturbation)`` are rows of `cells`
    adata : the training cells themselves, for methods that need more
    """

    cells: np.ndarray = field(repr=False)
    groups: Groups
    adata: AnnData | None = field(default=None, repr=False)
    _means: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, adata: AnnData, space: EvaluationSpace) -> Training:
        """The cells of a screen that was set up, in `space`."""
        return cls(space.cells(adata), Groups(adata, min_cells=0), adata)

    @property
    def control(self) -> str:
        """The label of unperturbed cells."""
        return self.groups.keys.control

    def rows(self, context: str, perturbation: str) -> np.ndarray:
        """Rows of a group, (cell,)."""
        return self.groups.rows(context, perturbation)

    def mean(self, context: str, perturbation: str) -> np.ndarray:
        """(gene,) mean of a group; Undefined where it has no cells."""
        return self._moments(context, perturbation)[0]

    def _moments(self, context: str, perturbation: str) -> tuple[np.ndarray, np.ndarray]:
        """(gene,) mean of a group and the sampling variance of that mean."""
        key = (context, perturbation)
        if key not in self._means:
            rows = self.rows(*key)
            if not len(rows):
                raise Undefined(f"no training cells of {perturbation!r} in {context!r}")
            cells = self.cells[rows].astype(np.float64)
            self._means[key] = cells.mean(axis=0), cells.var(axis=0) / len(rows)
        return self._means[key]

    def shift(self, context: str, perturbation: str) -> np.ndarray:
        """(gene,) perturbed mean minus control mean inside one context."""
        return self.mean(context, perturbation) - self.mean(context, self.control)

    def shared_shift(self) -> np.ndarray | None:
        """(gene,) mean shift of all groups; None where nothing is perturbed."""
        pairs = self.groups.pairs
        return np.mean([self.shift(*pair) for pair in pairs], axis=0) if pairs else None

    def others(self, target: Target) -> list[str]:
        """Other contexts where the perturbation of `target` was measured; Undefined where there is none."""
        contexts = [c for c in self.groups.contexts_of(target.perturbation) if c != target.context]
        if not contexts:
            raise Undefined(f"no other training context has both {target.perturbation!r} and control cells")
        return contexts

    def measured(self, target: Target) -> Measured:
        """The response of the other contexts, with its noise."""
        contexts, p = self.others(target), target.perturbation
        noise = [self._moments(c, p)[1] + self._moments(c, self.control)[1] for c in contexts]
        control = np.stack([self.mean(c, self.control) for c in contexts])
        return Measured(
            tuple(contexts), control, np.stack([self.shift(c, p) for c in contexts]), np.stack(noise)
        )


@dataclass(frozen=True, eq=False)
class Target:
    """The group to predict, and the control cells to start from.

    Attributes
    ----------
    context, perturbation : labels of the group
    control : (cell, gene) control cells of that context in log1p-CP10k
    counts : (cell, gene) their counts, optional
    adata : the control cells themselves, for methods that need more
    space : the space in which `control` stands and predictions are scored
    """

    context: str
    perturbation: str
    control: np.ndarray = field(repr=False)
    counts: object = field(default=None, repr=False)
    adata: AnnData | None = field(default=None, repr=False)
    space: EvaluationSpace = field(default=None, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if len(self.control) == 0:
            raise Undefined(f"there are no control cells in {self.context!r} to start from")

    @property
    def mean(self) -> np.ndarray:
        """(gene,) mean control cell."""
        return self.control.mean(axis=0, dtype=np.float64)

    @property
    def library(self) -> np.ndarray | None:
        """(cell,) counts of the control cells over all measured genes; None where no gene was left out."""
        return None if self.adata is None else measured_totals(self.adata)


Method = Callable[[Training, Target], Prediction]


def no_change(training: Training, target: Target) -> Prediction:
    """The control cells themselves."""
    return Prediction.of_cells("no change", target.control, target.counts, target.library)


def control_mean(training: Training, target: Target) -> Prediction:
    """The mean of the control cells (a mean only)."""
    return Prediction("control mean", target.mean)


def mean_of_perturbed(training: Training, target: Target) -> Prediction:
    """The mean of the perturbed centroids (a mean only): of this context, else of all contexts.

    References
    ----------
    Viñas Torné et al. 2025, Nat Biotechnol (Systema), "perturbed mean".
    """
    pairs = training.groups.pairs
    if not pairs:
        raise Undefined("there are no perturbed training cells")
    chosen = [pair for pair in pairs if pair[0] == target.context] or pairs
    return Prediction("mean of perturbed", np.mean([training.mean(*pair) for pair in chosen], axis=0))


def _shifted(method: str, target: Target, shift: np.ndarray) -> Prediction:
    return Prediction.of_cells(method, target.control + shift)


def mean_shift(training: Training, target: Target) -> Prediction:
    """Control cells plus this perturbation's mean shift over the other contexts (each counts once)."""
    return _shifted("mean shift", target, training.measured(target).change.mean(0))


def nearest_context(training: Training, target: Target) -> Prediction:
    """Control cells plus the shift seen in the context whose control mean is nearest (Euclid)."""
    measured = training.measured(target)
    nearest = np.linalg.norm(measured.control - target.mean, axis=1).argmin()
    return _shifted("nearest context", target, measured.change[nearest])


def near_shift(training: Training, target: Target) -> Prediction:
    """Control cells plus the other contexts' shifts, near ones first, with a power chosen by leaving contexts out."""
    measured = training.measured(target)
    power = near_power(measured)
    shift = near_mean_shift(measured.control, measured.change, target.mean, power).change
    return _shifted("near mean shift", target, shift)


def linear_shift(training: Training, target: Target) -> Prediction:
    """Control cells plus a ridge regression of the shift on the mean control cell, over the other contexts."""
    measured = training.measured(target)
    estimate, _ = linear(measured.control, measured.change, target.mean, measured.noise.sum(1))
    return _shifted("linear", target, estimate.change)


def linear_features(training: Training, target: Target, *, features: pd.DataFrame) -> Prediction:
    """Control cells plus :func:`linear_map` of the descriptor of a perturbation that was never measured."""
    name, rows = target.perturbation, features.dropna(how="all")
    rows = rows.set_axis(rows.index.map(str), axis=0)
    if name not in rows.index or name in training.groups.perturbations:
        raise Undefined(f"{name!r} has no descriptor, or it was measured")
    measured = [p for p in training.groups.perturbations if p in rows.index]
    if len(measured) < 3:
        raise Undefined(f"{len(measured)} described perturbations were measured; a map needs 3")
    shifts = np.stack([_shift_near(training, target.context, p) for p in measured], axis=1)
    shift = linear_map(shifts, rows.loc[measured].to_numpy(dtype=float), rows.loc[name].to_numpy(dtype=float))
    return _shifted("linear features", target, shift)


def linear_map(y: np.ndarray, p: np.ndarray, new: np.ndarray) -> np.ndarray:
    r"""Shift (gene,) of a perturbation with the descriptor `new` (k,).

    .. math:: \hat d = G W f + b, \quad
        W = (G^\top G + \lambda I)^{-1} G^\top (Y - b) P (P^\top P + \lambda I)^{-1}

    with the shifts Y (gene, n) of measured perturbations, their mean b, the principal components G of Y - b, and
    descriptors P (n, k).

    References
    ----------
    Ahlmann-Eltze, Huber, Anders 2025, Nat Methods 22:1657 (ten components, a ridge of 0.1).
    """
    b, n_components, ridge = y.mean(1, keepdims=True), 10, 0.1
    u, s, _ = np.linalg.svd(y - b, full_matrices=False)
    g = u[:, :n_components] * s[:n_components]
    left = np.linalg.solve(g.T @ g + ridge * np.eye(g.shape[1]), g.T @ (y - b) @ p)
    w = np.linalg.solve(p.T @ p + ridge * np.eye(p.shape[1]), left.T).T
    return g @ w @ new + b[:, 0]


def _shift_near(training: Training, context: str, perturbation: str) -> np.ndarray:
    """(gene,) shift measured in a context, else the mean over those where it was."""
    contexts = training.groups.contexts_of(perturbation)
    chosen = [context] if context in contexts else contexts
    return np.mean([training.shift(c, perturbation) for c in chosen], axis=0)


def _single_shifts(training: Training, target: Target) -> list[np.ndarray]:
    parts = training.groups.parts(target.perturbation)
    if len(parts) < 2:
        raise Undefined(f"{target.perturbation!r} is not a combination of measured perturbations")
    return [training.shift(target.context, part) for part in parts]


def best_single(training: Training, target: Target) -> Prediction:
    """For A+B: control cells plus the larger of the two single shifts, chosen without a look at the truth."""
    return _shifted("best single", target, max(_single_shifts(training, target), key=np.linalg.norm))


def additive(training: Training, target: Target) -> Prediction:
    """For A+B: control cells plus the sum of the single shifts measured in this context.

    References
    ----------
    Ahlmann-Eltze, Huber, Anders 2025, Nat Methods 22:1657.
    """
    return _shifted("additive", target, np.sum(_single_shifts(training, target), axis=0))


BASELINES: Mapping[str, Method] = {
    "no change": no_change,
    "control mean": control_mean,
    "mean of perturbed": mean_of_perturbed,
    "mean shift": mean_shift,
    "nearest context": nearest_context,
    "near mean shift": near_shift,
    "linear": linear_shift,
    "best single": best_single,
    "additive": additive,
}


def run(method: str, rule: Method, training: Training, target: Target) -> Prediction:
    """Apply `rule`; where it is undefined the prediction is empty and carries the reason.

    Raises
    ------
    ModelError
        Where it gives back something else than a prediction of the target's genes.
    """
    try:
        prediction = rule(training, target)
    except Undefined as refusal:
        return Prediction(method, reason=str(refusal))
    if not isinstance(prediction, Prediction):
        fix = "return Prediction.of_cells(name, cells) or Prediction.of_counts(name, counts, target.space)"
        raise ModelError(f"a Prediction from {method!r}", type(prediction).__name__, fix)
    n_genes = target.control.shape[1]
    for value in (prediction.mean, prediction.cells, prediction.counts):
        if value is not None and value.shape[-1] != n_genes:
            fix = "predict all genes of target.space.genes, in this order"
            problem = str(value.shape[-1])
            raise ModelError(f"{n_genes} genes predicted by {method!r}", problem, fix)
    return replace(prediction, method=method)
