"""Simple predictions that every table carries. They beat most published models, so they are first-class code.

A baseline is a function ``(training: Screen, target: Target) -> Prediction``. It raises
:class:`~cellop_nb.analysis.formulas.Undefined` where the training cells do not determine it; it never falls
back to something else. All of them add or average in log1p-CP10k space; :func:`latent_shift` does so in
latent space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from anndata import AnnData

from ..data.contract import context_labels, obs_labels, perturbation_parts
from ..errors import DataError, LabelError, ModelError, did_you_mean, three_beats
from .formulas import Undefined
from .library import measured_totals
from .space import EvaluationSpace


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a method says about one group.

    Attributes
    ----------
    method : name shown in tables
    mean : (gene,) predicted mean in log1p-CP10k, or None where nothing could be predicted
    cells : (cell, gene) predicted cells in log1p-CP10k, or None for a method that predicts a mean only
    counts : (cell, gene) predicted counts, or None for a method that predicts no counts
    library : (cell,) predicted counts over all measured genes, where the table holds only some of them
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
                found = f"{int((~np.isfinite(value)).sum())} NaN or infinite values"
                fix = "find out where the model breaks; they are not replaced"
                raise DataError(three_beats(f"a finite {name} predicted by {self.method!r}", found, fix))

    @property
    def mean_only(self) -> bool:
        """Whether the method predicts a mean and no cells: metrics of clouds are then undefined."""
        return self.mean is not None and self.cells is None

    @classmethod
    def of_cells(cls, method: str, cells: np.ndarray, counts=None, library=None) -> Prediction:
        """From predicted cells (cell, gene) in log1p-CP10k."""
        return cls(method, np.asarray(cells).mean(axis=0, dtype=np.float64), cells, counts, library)

    @classmethod
    def of_counts(cls, method: str, counts, space: EvaluationSpace, library=None) -> Prediction:
        """From predicted counts (cell, gene) over the genes of `space`."""
        return cls.of_cells(method, space.transform(counts), counts, library)


@dataclass(frozen=True, eq=False)
class Screen:
    """Training cells as an array with their labels; `cells` may be log1p-CP10k or latents.

    Attributes
    ----------
    cells : (cell, gene)
    contexts, perturbations : (cell,) labels
    control : the label of unperturbed cells
    adata : the training cells themselves, for methods that need more
    """

    cells: np.ndarray = field(repr=False)
    contexts: np.ndarray = field(repr=False)
    perturbations: np.ndarray = field(repr=False)
    control: str = "control"
    adata: AnnData | None = field(default=None, repr=False)
    _means: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        adata: AnnData,
        cells: np.ndarray,
        *,
        perturbation_key: str = "perturbation",
        context_key: str | Sequence[str] | None = "cell_type",
        control: str = "control",
    ) -> Screen:
        """Label the rows of `cells` (cell, gene) by columns of `adata.obs`; an unknown control is refused."""
        perturbations = obs_labels(adata, perturbation_key).to_numpy()
        if control not in set(perturbations):
            hint = did_you_mean(control, np.unique(perturbations))
            found = f"no such label in obs[{perturbation_key!r}]"
            raise LabelError(
                three_beats(f"control cells labelled {control!r}", found, f"pass control=... ({hint})")
            )
        return cls(cells, context_labels(adata, context_key).to_numpy(), perturbations, control, adata)

    def rows(self, context: str, perturbation: str) -> np.ndarray:
        """(cell,) boolean mask of a group."""
        return (self.contexts == context) & (self.perturbations == perturbation)

    def mean(self, context: str, perturbation: str) -> np.ndarray:
        """(gene,) mean of a group; Undefined where it has no cells."""
        key = (context, perturbation)
        if key not in self._means:
            rows = self.rows(*key)
            if not rows.any():
                raise Undefined(f"no training cells of {perturbation!r} in {context!r}")
            self._means[key] = self.cells[rows].mean(axis=0, dtype=np.float64)
        return self._means[key]

    def shift(self, context: str, perturbation: str) -> np.ndarray:
        """(gene,) perturbed mean minus control mean inside one context."""
        return self.mean(context, perturbation) - self.mean(context, self.control)

    def measured(self) -> list[tuple[str, str]]:
        """Perturbed (context, perturbation) groups that also have controls, sorted."""
        groups = sorted(set(zip(self.contexts, self.perturbations, strict=True)))
        with_controls = {context for context, name in groups if name == self.control}
        return [(c, p) for c, p in groups if p != self.control and c in with_controls]

    def others(self, target: Target) -> list[str]:
        """Other contexts where the perturbation of `target` was measured; Undefined where there is none."""
        found = [c for c, p in self.measured() if p == target.perturbation and c != target.context]
        if not found:
            raise Undefined(f"no other training context has both {target.perturbation!r} and control cells")
        return found


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
    space: EvaluationSpace | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.control) == 0:
            raise Undefined(f"there are no control cells in {self.context!r} to start from")

    @property
    def library(self) -> np.ndarray | None:
        """(cell,) counts of the control cells over all measured genes; None where no gene was left out."""
        return None if self.adata is None else measured_totals(self.adata)


Baseline = Callable[[Screen, Target], Prediction]


def no_change(training: Screen, target: Target) -> Prediction:
    """The control cells themselves."""
    return Prediction.of_cells("no change", target.control, target.counts, target.library)


def control_mean(training: Screen, target: Target) -> Prediction:
    """The mean of the control cells (a mean only)."""
    return Prediction("control mean", target.control.mean(axis=0, dtype=np.float64))


def mean_of_perturbed(training: Screen, target: Target) -> Prediction:
    """The mean of the perturbed centroids (a mean only): of this context, else of all contexts.

    References
    ----------
    Viñas Torné et al. 2025, Nat Biotechnol (Systema), "perturbed mean".
    """
    groups = training.measured()
    chosen = [group for group in groups if group[0] == target.context] or groups
    if not chosen:
        raise Undefined("there are no perturbed training cells")
    return Prediction("mean of perturbed", np.mean([training.mean(*group) for group in chosen], axis=0))


def _shifted(method: str, target: Target, shift: np.ndarray) -> Prediction:
    return Prediction.of_cells(method, target.control + shift)


def mean_shift(training: Screen, target: Target) -> Prediction:
    """Control cells plus this perturbation's mean shift over the other contexts (each counts once)."""
    shifts = [training.shift(context, target.perturbation) for context in training.others(target)]
    return _shifted("mean shift", target, np.mean(shifts, axis=0))


def nearest_context(training: Screen, target: Target) -> Prediction:
    """Control cells plus the shift seen in the context whose control mean is nearest (Euclid)."""
    start = target.control.mean(axis=0, dtype=np.float64)

    def distance(context: str) -> float:
        return float(np.linalg.norm(training.mean(context, training.control) - start))

    nearest = min(training.others(target), key=distance)
    return _shifted("nearest context", target, training.shift(nearest, target.perturbation))


def _single_shifts(training: Screen, target: Target) -> list[np.ndarray]:
    parts = perturbation_parts(target.perturbation)
    if len(parts) < 2:
        raise Undefined(f"{target.perturbation!r} is not a combination")
    return [training.shift(target.context, part) for part in parts]


def best_single(training: Screen, target: Target) -> Prediction:
    """For A+B: control cells plus the larger of the two single shifts, chosen without a look at the truth."""
    return _shifted("best single", target, max(_single_shifts(training, target), key=np.linalg.norm))


def additive(training: Screen, target: Target) -> Prediction:
    """For A+B: control cells plus the sum of the single shifts measured in this context.

    References
    ----------
    Ahlmann-Eltze, Huber, Anders 2025, Nat Methods 22:1657.
    """
    return _shifted("additive", target, np.sum(_single_shifts(training, target), axis=0))


def latent_shift(
    training: Screen, target: Target, *, latents: np.ndarray, start: np.ndarray, decode: Callable
) -> Prediction:
    r"""scGen's rule: move control latents by the mean latent shift of the other contexts, then decode.

    .. math:: \hat x = \mathrm{decode}\big(z + \tfrac1C \sum_c (\bar z_{c,p} - \bar z_{c,0})\big)

    Parameters
    ----------
    latents : (cell, latent)
        Of the training cells, in the order of ``training.cells``.
    start : (cell, latent)
        Of the control cells of the target, in the order of ``target.control``.
    decode : callable
        Latents (cell, latent) to *sampled* counts (cell, gene) over the genes of ``target.space``; row i is
        decoded at the library size of control cell i.

    References
    ----------
    Lotfollahi, Wolf, Theis 2019, Nat Methods 16:715 (contexts are balanced there by resampling, here by
    equal weight).
    """
    latent = Screen(latents, training.contexts, training.perturbations, training.control)
    shifts = [latent.shift(context, target.perturbation) for context in latent.others(target)]
    return Prediction.of_counts("latent shift", decode(start + np.mean(shifts, axis=0)), target.space)


BASELINES: Mapping[str, Baseline] = {
    "no change": no_change,
    "control mean": control_mean,
    "mean of perturbed": mean_of_perturbed,
    "mean shift": mean_shift,
    "nearest context": nearest_context,
    "best single": best_single,
    "additive": additive,
}


def run(method: str, rule: Baseline, training: Screen, target: Target) -> Prediction:
    """Apply `rule`; where it is undefined the prediction is empty and carries the reason.

    Raises
    ------
    ModelError
        Where it gives back something else than a prediction of the target's genes.
    """
    try:
        found = rule(training, target)
    except Undefined as refusal:
        return Prediction(method, reason=str(refusal))
    if not isinstance(found, Prediction):
        fix = "return Prediction.of_cells(name, cells) or Prediction.of_counts(name, counts, target.space)"
        raise ModelError(three_beats(f"a Prediction from {method!r}", type(found).__name__, fix))
    n_genes = target.control.shape[1]
    for value in (found.mean, found.cells, found.counts):
        if value is not None and value.shape[-1] != n_genes:
            fix = "predict all genes of target.space.genes, in this order"
            raise ModelError(
                three_beats(f"{n_genes} genes predicted by {method!r}", str(value.shape[-1]), fix)
            )
    return replace(found, method=method)
