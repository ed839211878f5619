"""Operator health: what happens when an affine operator is repeated, reversed, or taken at part strength."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch

from ..errors import ModelError
from ..models.affine import AffineOperator
from ..models.operators import Condition

FEW, STEPS, DOUBLINGS = 10, 100, 10  # applications: few, one by one, and on to 100 * 2**10
MAX_CONDITION = 1e7  # the limit of AffineOperator.inverse
GROWING = 1e-6  # by how much more than all others the logarithm of the last norm is that of a growing power
SLOW_GROWTH = 1.05  # spectral radius that ten applications turn into a factor of 1.6


def affine_health(A, b, *, max_norm: float = 3.0) -> dict:
    r"""Numbers that say how far an affine operator :math:`K(z) = A z + b` can be trusted.

    Parameters
    ----------
    A
        Matrix (d, d).
    b
        Shift (d,), in units of the latent.
    max_norm
        Spectral norm above which one application is called too large; training penalises the same number.

    Returns
    -------
    Dictionary with

    - ``spectral_norm``: largest stretch of one application; ``spectral_radius``: growth per application in
      the long run; ``condition_number`` of A
    - ``real_logarithm``: whether a real principal logarithm L exists (part strengths are defined)
    - ``growth_rate``: spectral abscissa of L; ``numerical_abscissa``: the logarithmic norm
      :math:`\omega = \lambda_{max}((L+L^T)/2)`, with :math:`\|e^{tL}\| \le e^{t\omega}`; ``numerical_low``:
      the other end of the numerical range on the real axis
    - ``growth_10``: :math:`\|A^{10}\|_2`; ``growth_bound``: :math:`\sup_{k \ge 0} \|A^k\|_2`, or infinity
    - ``drift_10``: how far ten applications move the origin
    - ``bounded``: whether any number of applications keeps all cells in a bounded region
    - ``verdict``: green, amber or red, and ``advice``

    References
    ----------
    Trefethen and Embree (2005), Spectra and Pseudospectra, chapters 14 to 17.
    Culver (1966), Proc. Amer. Math. Soc. 17:1146.
    """
    A, b = np.asarray(A, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not (np.isfinite(A).all() and np.isfinite(b).all()):
        nothing = dict.fromkeys(_NUMBERS, math.nan) | {"real_logarithm": False, "bounded": False}
        advice = "the operator is not finite: load the last finite state"
        return nothing | {"verdict": "red", "advice": advice}
    singular = np.linalg.svd(A, compute_uv=False)
    powers = _powers(A)
    tenth = _log_norms(*(part[FEW - 1 : FEW] for part in powers))  # empty where it vanishes
    whole = _homogeneous(A, b)
    health = {
        "spectral_norm": float(singular[0]),
        "spectral_radius": float(np.abs(np.linalg.eigvals(A)).max()),
        "condition_number": float(singular[0] / singular[-1]) if singular[-1] > 0 else math.inf,
        **_generator(A, b),
        "growth_10": _exp(tenth.max(initial=-math.inf)),
        "growth_bound": _supremum(*powers),
        "drift_10": _drift(A, b),
        "bounded": _is_bounded(*_powers(whole)),
    }
    verdict, advice = _verdict(health, max_norm)
    return health | {"verdict": verdict, "advice": advice}


_NUMBERS = (
    "spectral_norm",
    "spectral_radius",
    "condition_number",
    "growth_rate",
    "numerical_abscissa",
    "numerical_low",
    "growth_10",
    "growth_bound",
    "drift_10",
)


def operator_health(
    operator_model, conditions: Sequence[Condition] | None = None, *, max_norm: float = 3.0
) -> pd.DataFrame:
    """:func:`affine_health` of every condition.

    Parameters
    ----------
    operator_model
        :class:`cellop_nb.OperatorModel`, trained or not.
    conditions
        Which ones; by default each perturbation in each context.
    max_norm
        As in :func:`affine_health`.

    Returns
    -------
    One row per condition. :func:`compare_health` sets the tables of several models side by side (before and
    after training, with and without the penalty).
    """
    asked = _all_conditions(operator_model) if conditions is None else list(conditions)
    rows = {}
    for condition in asked:
        operator = operator_model.operator(condition)
        A, b = (tensor.detach().double().cpu().numpy() for tensor in (operator.matrix, operator.shift))
        rows[str(condition)] = affine_health(A, b, max_norm=max_norm)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("condition")


def compare_health(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Worst condition of each of several :func:`operator_health` tables, one row per name.

    Returns
    -------
    Columns ``spectral_norm``, ``spectral_radius``, ``condition_number``, ``growth_10`` (each the largest over
    conditions), and the number of ``green``, ``amber`` and ``red`` conditions.
    """
    rows = {}
    for name, table in tables.items():
        worst = table[["spectral_norm", "spectral_radius", "condition_number", "growth_10"]].max()
        colours = {colour: int((table["verdict"] == colour).sum()) for colour in ("green", "amber", "red")}
        rows[name] = {**worst, **colours}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


def _all_conditions(model) -> Iterable[Condition]:
    encoder = model.conditions
    contexts = encoder.contexts or [None]
    return [Condition((name,), context) for context in contexts for name in encoder.perturbations]


def _homogeneous(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    whole = np.eye(len(b) + 1)
    whole[:-1, :-1], whole[:-1, -1] = A, b
    return whole


def _powers(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M^k for k = 1..STEPS and then for doubled k, until they vanish: scaled (power, d, d), and log scales (power,)."""
    scale = np.abs(matrix).max() or 1.0
    base = power = matrix / scale
    logarithm = start = math.log(scale)
    powers, logarithms = [], []
    for step in range(STEPS + DOUBLINGS):
        size = float(np.abs(power).max())  # keeps the scale, so that nothing overflows
        if size == 0:
            break
        power, logarithm = power / size, logarithm + math.log(size)
        power[np.abs(power) < 1e-100] = 0.0  # far below rounding; its products would underflow
        powers.append(power)
        logarithms.append(logarithm)
        if step < STEPS - 1:
            power, logarithm = power @ base, logarithm + start
        else:
            power, logarithm = power @ power, 2 * logarithm
    return np.array(powers).reshape(-1, *matrix.shape), np.array(logarithms)


def _log_norms(powers: np.ndarray, logarithms: np.ndarray) -> np.ndarray:
    """log ||M^k||_2 of each power."""
    return logarithms + np.log(np.linalg.norm(powers, 2, axis=(1, 2)))


def _is_bounded(powers: np.ndarray, logarithms: np.ndarray) -> bool:
    """Whether the norms of all powers stay finite; most are settled by the last two."""
    before, last = _log_norms(powers[-2:], logarithms[-2:])
    return last <= max(before, 0.0) + GROWING or math.isfinite(_supremum(powers, logarithms))


def _supremum(powers: np.ndarray, logarithms: np.ndarray) -> float:
    """Largest norm of all powers, the zeroth included, or infinity where they are still growing at the end.

    The norms of those powers alone are found whose Frobenius norm says that they may count.
    """
    n, last = len(powers), -math.inf
    if n == STEPS + DOUBLINGS:  # otherwise the last ones vanish
        n, last = n - 1, float(_log_norms(powers[-1:], logarithms[-1:])[0])
    upper = logarithms[:n] + np.log(np.linalg.norm(powers[:n], axis=(1, 2)))
    if last > upper.max(initial=0.0) + GROWING:
        return math.inf
    widest = np.argsort(upper)[-1:]  # its own norm rules most of the others out
    highest = _log_norms(powers[widest], logarithms[widest]).max(initial=0.0)
    may = np.flatnonzero(upper > highest)
    highest = _log_norms(powers[may], logarithms[may]).max(initial=highest)
    return math.inf if last > highest + GROWING else _exp(max(highest, last))


def _exp(logarithm: float) -> float:
    return math.exp(logarithm) if logarithm < 709 else math.inf


def _generator(A: np.ndarray, b: np.ndarray) -> dict:
    unknown = {"growth_rate": math.nan, "numerical_abscissa": math.nan, "numerical_low": math.nan}
    try:
        whole = AffineOperator(torch.as_tensor(A), torch.as_tensor(b)).generator()
    except ModelError:
        return {"real_logarithm": False, **unknown}
    linear = whole[:-1, :-1]
    if not np.isfinite(linear).all():
        return {"real_logarithm": False, **unknown}
    field_of_values = np.linalg.eigvalsh((linear + linear.T) / 2)
    return {
        "real_logarithm": True,
        "growth_rate": float(np.linalg.eigvals(linear).real.max()),
        "numerical_abscissa": float(field_of_values[-1]),
        "numerical_low": float(field_of_values[0]),
    }


def _drift(A: np.ndarray, b: np.ndarray) -> float:
    place = np.zeros_like(b)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(FEW):
            place = A @ place + b
        size = float(np.linalg.norm(place))
    return size if math.isfinite(size) else math.inf


def _verdict(health: dict, max_norm: float) -> tuple[str, str]:
    norm, radius = health["spectral_norm"], health["spectral_radius"]
    if norm > max_norm:
        fix = "fit with a larger stability_weight or ridge"
        return "red", f"one application stretches a direction {norm:.3g} times (limit {max_norm:g}): {fix}"
    warnings = []
    if radius > SLOW_GROWTH:
        steps = math.log(10) / math.log(radius)
        warnings.append(f"grows {radius:.3g}-fold each time: do not repeat it more than {steps:.0f} times")
    if not health["condition_number"] <= MAX_CONDITION:
        number = health["condition_number"]
        warnings.append(f"not reversible (condition number {number:.1e}): fit with a larger ridge")
    if not health["real_logarithm"]:
        warnings.append("no real logarithm: only the full strength is defined, not parts of it")
    if warnings:
        return "amber", "; ".join(warnings)
    return "green", "safe to repeat, to reverse and to scale"
