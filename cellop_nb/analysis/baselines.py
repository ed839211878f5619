"""Simple predictions that every table carries. They beat most published models, so they are first-class code.

A baseline is a function ``(training: Screen, target: Target) -> Prediction``. It raises
:class:`~cellop_nb.analysis.formulas.Undefined` where the training cells do not determine it; it never falls
back to something else. All of them add or average in log1p-CP10k space; :func:`latent_shift` does so in
latent space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ..data.contract import perturbation_parts
from ..errors import ModelError, three_beats
from .formulas import Undefined
from .targets import Baseline, Prediction, Screen, Target


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
