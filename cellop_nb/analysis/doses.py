"""How strong a perturbation is at a dose: a monotone curve along its operator, chosen by leaving doses out."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from ..data.groups import Groups
from ..errors import ModelError
from .means import level_moments

FORMS = ("linear", "log", "saturating")
_SCALES = np.logspace(-3, 3, 49)


@dataclass(frozen=True, eq=False)
class DoseCurve:
    r"""Strength s of a dose t: 0 without any, 1 at the largest measured dose T, and monotone.

    .. math:: s(t) = \frac{f(t)}{f(T)}, \quad f(t) = t, \quad \log(1 + t/k), \quad \frac{t^h}{k^h + t^h}

    for the forms "linear", "log" and "saturating".

    Attributes
    ----------
    form : str
    smallest, largest : float
        Measured doses, between which the curve interpolates.
    scale, steepness : float
        k and h.
    table : DataFrame
        ``dose, measured, error``: the size of the response along that of the largest dose, and its standard error.

    References
    ----------
    Hill (1910), J. Physiol. 40:iv (the saturating form).
    """

    form: str
    smallest: float
    largest: float
    scale: float
    steepness: float
    table: pd.DataFrame

    def strength(self, dose):
        """Strength of a dose, or of an array of doses."""
        dose = np.asarray(dose, dtype=float)
        strength = _shape(self.form, dose / self.largest, self.scale / self.largest, self.steepness)
        return strength if dose.ndim else float(strength)

    def dose(self, strength: float) -> float:
        """The dose of a strength; infinite where the curve never reaches it."""
        if strength <= 0:
            return 0.0
        high = 1e6 * self.largest
        if self.strength(high) < strength:
            return float("inf")
        return float(brentq(lambda dose: self.strength(dose) - strength, 0.0, high, xtol=1e-9 * self.largest))

    def extrapolates(self, dose: float) -> bool:
        """Whether a dose lies beyond the measured ones."""
        return not self.smallest * (1 - 1e-6) <= dose <= self.largest * (1 + 1e-6)


def dose_curves(cells, groups: Groups, form: str = "chosen") -> dict[str, DoseCurve]:
    r"""The curve of every perturbation, from the mean responses :math:`d_{ct}` of the doses t in the contexts c.

    .. math:: y_t = \frac{\sum_c d_{ct}^\top d_{cT} - v_{c0}}{\sum_c \lVert d_{cT} \rVert^2 - v_{cT} - v_{c0}}

    with the sampling variances v, summed over genes, of the means that both sides share. Scale and steepness are least
    squares by the errors of :math:`y_t`; the form is the one that misses least of doses left out, linear where no dose
    can be.

    Parameters
    ----------
    cells
        Counts of the modelled genes.
    form
        "linear", "log", "saturating", or "chosen".
    """
    if form not in (*FORMS, "chosen"):
        fix = "set model.recipe.dose_curve to one of these"
        raise ModelError(f"one of {(*FORMS, 'chosen')} as the form of dose curves", repr(form), fix)
    (mean, control), (variance, control_variance) = level_moments(cells, groups)
    context = {name: k for k, name in enumerate(groups.contexts)}
    by_perturbation: dict[str, list[int]] = defaultdict(list)
    for k, group in enumerate(groups):
        by_perturbation[group.perturbation].append(k)
    curves = {}
    for perturbation, members in by_perturbation.items():
        doses = np.array([groups[k].dose for k in members])
        at = np.array([context[groups[k].context] for k in members])
        change, v0 = mean[members] - control[at], control_variance[at].sum(1)
        table = _sizes(doses, at, change, variance[members], v0)
        curves[perturbation] = _fitted(table, float(doses.min()), float(doses.max()), form)
    return curves


def _sizes(doses, at, change, variance, v0) -> pd.DataFrame:
    """``dose, measured, error`` of every dose but the largest."""
    top = {c: k for k, (c, dose) in enumerate(zip(at, doses, strict=True)) if dose == doses.max()}
    size = sum(np.square(change[k]).sum() - variance[k].sum() - v0[k] for k in top.values())
    rows = []
    for dose in np.unique(doses)[:-1]:
        pairs = [(k, top[at[k]]) for k in np.flatnonzero(doses == dose) if at[k] in top]
        if pairs and size > 0:
            along = sum(change[k] @ change[full] - v0[k] for k, full in pairs)
            noise = sum((variance[k] * np.square(change[full])).sum() for k, full in pairs)
            share = sum(np.square(change[full]).sum() - variance[full].sum() - v0[full] for _, full in pairs)
            if share > 0:
                rows.append((dose, along / share, np.sqrt(noise) / share))
    return pd.DataFrame(rows, columns=["dose", "measured", "error"])


def _shape(form: str, dose, scale: float, steepness: float):
    """f(t) / f(1)."""
    if form == "linear":
        return dose
    if form == "log":
        return np.log1p(dose / scale) / np.log1p(1 / scale)
    power = np.asarray(dose, dtype=float) ** steepness
    return power * (scale**steepness + 1) / (scale**steepness + power)


def _fitted(table: pd.DataFrame, smallest: float, largest: float, form: str) -> DoseCurve:
    dose, measured = table["dose"].to_numpy(float) / largest, table["measured"].to_numpy(float)
    weight = 1 / np.square(table["error"].to_numpy(float) + 0.01)
    forms = FORMS if form == "chosen" else (form,)
    if form == "chosen" and len(table) < 2:
        forms = ("saturating",) if len(table) else ("linear",)

    def left_out(name: str) -> float:
        """Squared miss of every dose by the curve of the others."""
        misses = 0.0
        for k in range(len(dose)):
            rest = np.arange(len(dose)) != k
            scale, steepness = _least_squares(name, dose[rest], measured[rest], weight[rest])
            misses += weight[k] * (_shape(name, dose[k], scale, steepness) - measured[k]) ** 2
        return misses

    best = min(forms, key=left_out) if len(forms) > 1 else forms[0]
    scale, steepness = _least_squares(best, dose, measured, weight)
    return DoseCurve(best, smallest, largest, scale * largest, steepness, table)


def _least_squares(form: str, dose, measured, weight) -> tuple[float, float]:
    if form == "linear" or not len(dose):
        return 1.0, 1.0
    grid = list(product(_SCALES, (1.0, 2.0, 4.0) if form == "saturating" and len(dose) > 2 else (1.0,)))
    misses = [(weight * np.square(_shape(form, dose, *point) - measured)).sum() for point in grid]
    return grid[int(np.argmin(misses))]
