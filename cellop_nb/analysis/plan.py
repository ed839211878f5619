"""The mean response of a context in which a perturbation was not measured: estimators, their weights, size and error.

Everything is a change of mean log1p-CP10k per gene. Of one perturbation there are n *measured* contexts; the *target*
is another one, of which only control cells are known. Unlike estimators of its response are averaged, with weights
found by leaving each measured context out in turn; what that leaves of the response is also the error that is claimed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pandas as pd
from scipy.stats import t as student

from ..data.contract import JOINER
from ..display import card
from ..errors import ModelError

NO_CHANGE, MEAN_SHIFT, NEAR, LINEAR = "no change", "mean shift", "near mean shift", "linear"
MOVED, CORRECTED = "moved cells", "moved cells (corrected)"
ADDITIVE = "additive"
FACTORS = "factors"
ESTIMATORS = (NO_CHANGE, MEAN_SHIFT, NEAR, LINEAR, MOVED, CORRECTED)
SIMPLE = (MEAN_SHIFT, NEAR, LINEAR)
FACTOR_VARIANCES, INTERACTION_VARIANCES = (0.0, 0.1, 0.3, 1.0, 3.0), (0.1, 1.0)
LEAST_RELIABILITY = 0.2
"""Mean share of the measured changes that is not noise, below which there is no effect to explain."""


@dataclass(frozen=True)
class PlanSettings:
    """All that can be set about a plan; the same for every context and perturbation.

    Parameters
    ----------
    power
        How much more near contexts count than far ones in the near mean shift.
    ridges
        Ridge weights among which :func:`linear` chooses by leaving contexts out; the last one is infinite: the mean
        shift.
    trust
        Measured contexts that weigh as much as the belief that estimators count by their precision, see
        :func:`weigh`.
    least_error
        Left-out share of the response below which an estimator is not believed to be, however well few contexts fit.
    pseudo_contexts
        Contexts that weigh as much as the belief that the errors of genes follow from size and noise.
    level
        Nominal coverage of the intervals.
    """

    power: float = 4.0
    ridges: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, np.inf)
    trust: float = 2.0
    least_error: float = 0.05
    pseudo_contexts: float = 4.0
    level: float = 0.95


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of one perturbation: n contexts.

    Attributes
    ----------
    contexts : (n,) names
    control : (n, gene) mean control cell
    change : (n, gene) mean perturbed less mean control cell
    noise : (n, gene) sampling variance of `change`; :math:`s_1^2/n_1 + s_0^2/n_0`
    moved : (n, gene) mean change of the context's moved control cells, by operators (and a VAE) that have not seen its
        perturbed cells; None where there are none
    corrected : (n, gene) the same, corrected by what these operators miss of the contexts that they have seen
    levels : (n,) levels of each context's factors, such as (cell type, donor); None where contexts have one label
    """

    contexts: tuple[str, ...]
    control: np.ndarray = field(repr=False)
    change: np.ndarray = field(repr=False)
    noise: np.ndarray = field(repr=False)
    moved: np.ndarray | None = field(default=None, repr=False)
    corrected: np.ndarray | None = field(default=None, repr=False)
    levels: tuple[tuple[str, ...], ...] | None = field(default=None, repr=False)

    def __post_init__(self):
        names = ("control", "change", "noise", "moved", "corrected")
        shapes = {name: np.shape(rows) for name in names if (rows := getattr(self, name)) is not None}
        if any(shape != (len(self.contexts), *shape[1:]) or len(shape) != 2 for shape in shapes.values()):
            expected = f"arrays ({len(self.contexts)} contexts, gene)"
            raise ModelError(expected, f"{shapes}", "give a row per measured context")
        for name in shapes:
            if not np.isfinite(getattr(self, name)).all():
                problem = f"values that are not finite in {name!r}"
                raise ModelError("finite means and variances", problem, "leave such a context out")

    def __len__(self) -> int:
        return len(self.contexts)

    def without(self, context: str) -> Measured:
        """The other contexts."""
        keep = np.array([name != context for name in self.contexts])
        names = tuple(np.asarray(self.contexts, dtype=object)[keep])
        levels = None if self.levels is None else tuple(np.array(self.levels, dtype=object)[keep].tolist())
        moved, corrected = (None if rows is None else rows[keep] for rows in (self.moved, self.corrected))
        return Measured(
            names, self.control[keep], self.change[keep], self.noise[keep], moved, corrected, levels
        )

    def near(self, target: np.ndarray) -> pd.DataFrame:
        """A row per context: ``context, distance, response``.

        The distance of its mean control cell to the `target` (gene,) is in units of the usual (median) distance between
        nearest measured contexts, NaN where there is one alone; the response is the length of its measured change.
        """
        distance = _distances(np.asarray(target)[None], self.control)[0] / _spacing(self.control)
        response = np.sqrt(np.maximum(np.square(self.change).sum(1) - self.noise.sum(1), 0.0))
        return pd.DataFrame({"context": self.contexts, "distance": distance, "response": response})


# -- estimators: the target's change, and each measured context's from the others ------------------------------------


@dataclass(frozen=True, eq=False)
class Estimate:
    """What one estimator says.

    Attributes
    ----------
    change : (gene,) of the target
    left_out : (n, gene) of each measured context, from the others; no row where that cannot be
    shares : (n,) of which measured contexts' changes `change` is the weighted sum
    """

    change: np.ndarray
    left_out: np.ndarray
    shares: np.ndarray


def near_mean_shift(
    control: np.ndarray, change: np.ndarray, target: np.ndarray, power: float = 4.0
) -> Estimate:
    r"""Mean change of the measured contexts, near ones first (inverse distance weighting).

    .. math:: \hat d = \sum_c w_c d_c, \quad w_c \propto \|m - m_c\|^{-p}

    Parameters
    ----------
    control, change
        (n, gene) mean control cells :math:`m_c` and changes :math:`d_c`.
    target
        (gene,) mean control cell m.
    power
        p; 0 is the mean shift.

    References
    ----------
    Shepard (1968), Proc. 23rd ACM National Conference, 517.
    """
    shares = _inverse_distance(_distances(target[None], control), power)[0]
    return Estimate(shares @ change, _near_left_out(control, change, power), shares)


def near_power(measured: Measured, powers: Sequence[float] = (0.0, 1.0, 2.0, 4.0, 8.0)) -> float:
    """The power of :func:`near_mean_shift` with the smallest error on contexts left out; 0 of fewer than three."""
    if len(measured) < 3:
        return 0.0
    noise = measured.noise.sum(1)

    def left(power: float) -> float:
        errors = measured.change - _near_left_out(measured.control, measured.change, power)
        return float(_shares_left(np.square(errors).sum(1), measured.change, noise)[0])

    return min(powers, key=left)


def _near_left_out(control: np.ndarray, change: np.ndarray, power: float) -> np.ndarray:
    if len(control) < 2:
        return change[:0]
    distance = _distances(control, control)
    np.fill_diagonal(distance, np.inf)
    return _inverse_distance(distance, power) @ change


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(x, y) Euclidean distances, by differences: near contexts are told apart exactly."""
    return np.stack([np.linalg.norm(y - row, axis=1) for row in x])


def _inverse_distance(distance: np.ndarray, power: float) -> np.ndarray:
    nearest = np.maximum(distance.min(1, keepdims=True), np.finfo(np.float32).tiny)
    weight = np.where(np.isinf(distance), 0.0, np.maximum(distance / nearest, 1.0) ** -float(power))
    return weight / weight.sum(1, keepdims=True)


def linear(
    control: np.ndarray,
    change: np.ndarray,
    target: np.ndarray,
    noise: np.ndarray,
    ridges: Sequence[float] = PlanSettings.ridges,
) -> tuple[Estimate, float]:
    r"""Ridge regression of the change on the mean control cell, over contexts; it extrapolates, where weights cannot.

    .. math:: \hat d = \bar d + k^\top (K + \lambda s I)^{-1} (d - \bar d), \quad
        K_{cc'} = (m_c - \bar m)^\top (m_{c'} - \bar m), \quad k_c = (m_c - \bar m)^\top (m - \bar m), \quad
        s = \mathrm{tr} K / n

    The ridge is the one with the smallest error on contexts left out, in closed form with the hat matrix H:
    the error of context c is :math:`(d - H d)_c / (1 - H_{cc})`. An infinite one gives the mean shift.

    Parameters
    ----------
    control, change, target
        As in :func:`near_mean_shift`.
    noise
        (n,) sampling variance of each change, summed over genes.

    Returns
    -------
    The estimate, and the ridge.

    References
    ----------
    Hoerl and Kennard (1970), Technometrics 12:55; Allen (1974), Technometrics 16:125 (the closed form).
    """
    n = len(control)
    ridges = tuple(ridges) if n > 2 else (np.inf,)
    hats, pulls = _ridge_weights(control, target, ridges)
    if n < 2:
        return Estimate(pulls[0] @ change, change[:0], pulls[0]), float(ridges[0])
    own = np.diagonal(hats, axis1=1, axis2=2)
    left = (change - hats @ change) / np.maximum(1 - own, 1e-9)[:, :, None]
    errors = _shares_left(np.square(left).sum(2).T, change, noise)[0]
    best = len(ridges) - 1 - int(np.argmin(np.asarray(errors)[::-1] - 1e-9 * np.arange(len(ridges))[::-1]))
    return Estimate(pulls[best] @ change, change - left[best], pulls[best]), float(ridges[best])


def factors(
    levels: Sequence[Sequence[str]], change: np.ndarray, target: Sequence[str], noise: np.ndarray
) -> Estimate:
    r"""Changes as a sum over factors, such as cell type and donor: a pair never seen is told by its margins.

    .. math:: d_c = \mu + \sum_f a_{f, l_f(c)} + i_c + e_c, \quad
        \Sigma_{cc'} = \sum_f \tau_f\, [l_f(c) = l_f(c')] + (\tau_i + v_c)\, [c = c']

    with random effects a of the levels, the interaction i and the noise v of each context: the best linear prediction
    with an unknown mean. Variances are those of a grid with the smallest error on contexts left out; one factor alone,
    and none (a mean weighed by noise), are in it. The error of a context is :math:`(Q d)_c / Q_{cc}` with
    :math:`Q = \Sigma^{-1} - \Sigma^{-1} 1 1^\top \Sigma^{-1} / (1^\top \Sigma^{-1} 1)`.

    Parameters
    ----------
    levels, target
        Levels of the n measured contexts, and of the one that is asked for, a level per factor.
    change, noise
        (n, gene), and (n,) its sampling variance summed over genes.

    References
    ----------
    Robinson (1991), Statistical Science 6:15 (best linear unbiased prediction); Dubrule (1983), Math. Geology 15:687
    (errors left out in closed form).
    """
    n = len(levels)
    if n < 2:
        return Estimate(change.mean(0), change[:0], np.full(n, 1 / n))
    columns = [np.array(column, dtype=object) for column in zip(*levels, strict=True)]
    alike = np.stack([column[:, None] == column for column in columns]).astype(float)
    near = np.stack([column == level for column, level in zip(columns, target, strict=True)]).astype(float)
    signal = max(
        float(np.square(change - change.mean(0)).sum(1).mean() - noise.mean()), 0.1 * float(noise.mean())
    )
    signal = max(signal, np.finfo(float).tiny)
    best, least = (change, np.zeros(n)), np.inf
    for *taus, own in product(*[FACTOR_VARIANCES] * len(columns), INTERACTION_VARIANCES):
        shared = signal * np.asarray(taus)
        inverse = np.linalg.inv(np.tensordot(shared, alike, 1) + np.diag(signal * own + noise))
        ones = inverse.sum(0)
        projected = inverse - np.outer(ones, ones) / ones.sum()
        left = (projected @ change) / np.maximum(np.diag(projected), np.finfo(float).tiny)[:, None]
        error = float(_shares_left(np.square(left).sum(1), change, noise)[0])
        if error < least - 1e-9:
            least, best = error, (left, projected @ (shared @ near) + ones / ones.sum())
    left, shares = best
    return Estimate(shares @ change, change - left, shares)


def _shares_left(squares: np.ndarray, change: np.ndarray, noise: np.ndarray) -> tuple[float, np.ndarray]:
    """Share of the changes that is left, mean over contexts by their reliability, and (n,) weights of that mean.

    `squares` (n, ...) are squared errors against the measured changes, whose own noise is taken off.
    """
    reliability, size = reliability_and_size(change, noise)
    weight = reliability / reliability.sum() / size
    return np.tensordot(weight, squares - noise.reshape(-1, *[1] * (squares.ndim - 1)), 1), weight


def reliability_and_size(change: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) share of each change that is not noise, and (n,) squared size, neither of them 0."""
    raw = np.square(change).sum(1)
    size = np.maximum(raw - noise, 0.1 * max((raw - noise).mean(), 0.0))
    size = np.maximum(size, 0.1 * noise + np.finfo(float).tiny)
    return size / (size + noise), size


def estimates(
    measured: Measured,
    target: np.ndarray,
    moved: np.ndarray | None,
    corrected: np.ndarray | None = None,
    settings: PlanSettings = PlanSettings(),
    levels: Sequence[str] | None = None,
) -> tuple[dict[str, Estimate], float]:
    """What every estimator says of the target, by name, and the ridge of the linear one.

    Parameters
    ----------
    target
        (gene,) mean control cell.
    moved, corrected
        (gene,) mean change of the target's moved control cells, and the same corrected.
    levels
        Of the target's factors; a level that was never seen where None.
    """
    control, change = (np.asarray(x, dtype=np.float64) for x in (measured.control, measured.change))
    n = len(measured)
    everyone = np.full(n, 1 / n)
    result = {
        NO_CHANGE: Estimate(np.zeros_like(target), np.zeros_like(change), np.zeros(n)),
        MEAN_SHIFT: Estimate(change.mean(0), _near_left_out(control, change, 0.0), everyone),
        NEAR: near_mean_shift(control, change, target, settings.power),
    }
    result[LINEAR], ridge = linear(control, change, target, measured.noise.sum(1), settings.ridges)
    if measured.levels is not None:
        n = len(measured.levels[0])
        of_target = levels if levels is not None and len(levels) == n else ("",) * n
        result[FACTORS] = factors(measured.levels, change, of_target, measured.noise.sum(1))
    for name, said, left_out in (
        (MOVED, moved, measured.moved),
        (CORRECTED, corrected, measured.corrected),
    ):
        if said is not None:
            result[name] = Estimate(said, change[:0] if left_out is None else left_out, everyone)
    return result, ridge


# -- weights and size, by leaving contexts out -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Evidence:
    r"""What leaving contexts out says of the estimators; evidence of several perturbations can be added.

    Attributes
    ----------
    names : estimators, k of them
    products : (k, k) sum over contexts of :math:`r_c\,(e_{ci}^\top e_{cj} - v_c) / s_c`: products of the estimators'
        errors on the contexts left out less the noise of the measurement, as shares of the response, by reliability
    n_contexts : sum of the reliabilities :math:`r_c`
    """

    names: tuple[str, ...]
    products: np.ndarray
    n_contexts: float

    def __add__(self, other: Evidence) -> Evidence:
        if self.names != other.names:
            raise ModelError(f"evidence on {self.names}", f"{other.names}", "add alike evidence")
        return Evidence(self.names, self.products + other.products, self.n_contexts + other.n_contexts)

    def without(self, part: Evidence) -> Evidence | None:
        """The evidence less a part of it; None where nothing is left."""
        left = self.n_contexts - part.n_contexts
        return Evidence(self.names, self.products - part.products, left) if left > 1e-9 else None

    @property
    def errors(self) -> np.ndarray:
        """(k,) share of the response that each estimator leaves."""
        return np.diag(self.products) / self.n_contexts


def evidence(
    measured: Measured, by_name: Mapping[str, Estimate], rows: Sequence[int] | slice = slice(None)
) -> Evidence | None:
    """Errors of the estimators on the contexts left out, or on these `rows` of them; None where fewer than two contexts,
    or no estimator, tell them."""
    parts = products_left_out(measured, by_name)
    return None if parts is None else Evidence(parts[0], parts[1][rows].sum(0), float(parts[2][rows].sum()))


def products_left_out(measured: Measured, by_name: Mapping[str, Estimate]):
    """Names, (n, k, k) products of errors and (n,) reliabilities."""
    names = tuple(name for name, estimate in by_name.items() if len(estimate.left_out) == len(measured))
    if len(measured) < 2 or not names:
        return None
    noise = measured.noise.sum(1)
    reliability, size = reliability_and_size(measured.change, noise)
    errors = np.stack([measured.change - by_name[name].left_out for name in names], 1)
    products = errors @ errors.transpose(0, 2, 1) - noise[:, None, None]
    return names, products * (reliability / size)[:, None, None], reliability


def weigh(seen: Evidence, settings: PlanSettings = PlanSettings(), towards: str | None = None) -> np.ndarray:
    r"""Weights (k,) of the estimators: not negative, of sum one.

    .. math:: \min_w\; w^\top G w + \frac{n_0}{n} \Bigl(\sum_i w^0_i G_{ii}\Bigr) \|w - w^0\|^2, \quad
        w^0_i \propto 1 / G_{ii}^2

    with the mean products G of the errors left out. Contexts are few, so that the best combination of the n contexts
    seen (stacking) is drawn towards weights by precision alone, which are nearly equal for estimators that are
    equally good.

    Parameters
    ----------
    towards
        Name of an estimator that is trusted beforehand: :math:`w^0` is then this one alone.

    References
    ----------
    Wolpert (1992), Neural Networks 5:241; Breiman (1996), Machine Learning 24:49 (stacking); Bates and Granger
    (1969), Operational Research Quarterly 20:451 (weights by precision); Stock and Watson (2004), Journal of
    Forecasting 23:405 (combinations drawn towards equal weights).
    """
    products = seen.products / seen.n_contexts
    errors = np.maximum(np.diag(products), settings.least_error)
    start = errors**-2.0 if towards is None else np.array([float(name == towards) for name in seen.names])
    start /= start.sum()
    pull = settings.trust / max(seen.n_contexts, 1.0) * float(start @ errors)
    return _nearest_on_simplex(products, start, pull)


def _nearest_on_simplex(products: np.ndarray, start: np.ndarray, pull: float) -> np.ndarray:
    """The weights of :func:`weigh`: of each set of estimators that may be used the stationary point; the best of them."""
    k = len(start)
    used = (np.arange(1, 2**k)[:, None] >> np.arange(k)) & 1
    system = np.zeros((len(used), k + 1, k + 1))
    system[:, :k, :k] = used[:, :, None] * used[:, None, :] * (products + pull * np.eye(k)) + _diagonals(
        1 - used
    )
    system[:, :k, k] = system[:, k, :k] = used
    value = np.concatenate([pull * start * used, np.ones((len(used), 1))], 1)
    weights = (np.linalg.pinv(system) @ value[:, :, None])[:, :k, 0]
    allowed = (weights.min(1) > -1e-9) & np.isclose(weights.sum(1), 1)
    weights = np.maximum(weights[allowed], 0.0)
    losses = np.einsum("si,ij,sj->s", weights, products, weights) + pull * np.square(weights - start).sum(1)
    best = weights[np.argmin(losses)]
    return best / best.sum()


def _diagonals(values: np.ndarray) -> np.ndarray:
    """(m, k, k) diagonal matrices of (m, k) values."""
    return values[:, :, None] * np.eye(values.shape[1])


def stretch(
    average: np.ndarray,
    left_out: np.ndarray,
    control: np.ndarray,
    change: np.ndarray,
    target: np.ndarray,
    ridges: Sequence[float] = PlanSettings.ridges,
) -> tuple[float, np.ndarray]:
    r"""By how much averages are too short, never below 1: of the target, and (n,) of each context left out.

    .. math:: y_c = d_c^\top a / a^\top a, \quad
        \hat y = \sum_\lambda u_\lambda \bigl(\bar y + k^\top (K + \lambda s I)^{-1} (y - \bar y)\bigr), \quad
        u_\lambda \propto E_\lambda^{-n/2}

    An average of noisy directions is too short, and weights extrapolate nothing. The size of the measured responses along
    the average a, one number per context, is regressed on the mean control cells as in :func:`linear`; ridges are
    averaged by their errors E on contexts left out, to the power of a likelihood.

    Parameters
    ----------
    average
        (gene,) of the target.
    left_out
        (n, gene) of each measured context, from the others.
    """
    hats, pulls = _ridge_weights(control, target, ridges)
    own = np.diagonal(hats, axis1=1, axis2=2)
    towards = np.concatenate([average[None], left_out])  # the target, then the contexts
    along = np.square(towards).sum(1)
    y = change @ towards.T / np.where(along > 0, along, 1.0)  # (n, 1 + n)
    without = (hats @ y - own[:, :, None] * y) / np.maximum(1 - own, 1e-9)[:, :, None]  # (ridge, n, 1 + n)
    errors = np.square(without - y).mean(1)
    likelihood = (errors / np.maximum(errors.min(0), np.finfo(float).tiny) + 1e-12) ** (-len(change) / 2)
    likelihood /= likelihood.sum(0)
    size = likelihood[:, 0] @ (pulls @ y[:, 0])
    others = (likelihood[:, 1:] * np.diagonal(without[:, :, 1:], axis1=1, axis2=2)).sum(0)
    return float(max(size, 1.0)) if along[0] > 0 else 1.0, np.where(
        along[1:] > 0, np.maximum(others, 1.0), 1.0
    )


def _ridge_weights(
    control: np.ndarray, target: np.ndarray, ridges: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Hat matrices (ridge, n, n) of the regression over contexts, and weights (ridge, n) of them at the target."""
    n = len(control)
    centre = control.mean(0)
    centred = control - centre
    kernel = centred @ centred.T
    values, vectors = np.linalg.eigh(kernel)
    penalty = np.asarray(ridges, dtype=float)[:, None] * max(np.trace(kernel) / n, np.finfo(float).tiny)
    inverse = (vectors / (np.maximum(values, 0.0) + penalty)[:, None, :]) @ vectors.T
    pulls = inverse @ (centred @ (target - centre))
    return 1 / n + kernel @ inverse, 1 / n + pulls - pulls.mean(1, keepdims=True)


def _trust_in_stretch(average, stretched, measured: Measured, settings: PlanSettings) -> float:
    r"""How far the stretch is followed, in [0, 1]: least squares on the contexts left out, drawn towards following it."""
    added = (stretched - 1)[:, None] * average
    weight = _shares_left(np.zeros(len(measured)), measured.change, measured.noise.sum(1))[1]
    gain = weight @ ((measured.change - average) * added).sum(1)
    size = weight @ np.square(added).sum(1)
    if size <= 0:
        return 1.0
    prior = size * settings.trust / max(len(measured), 1)
    return float(np.clip((gain + prior) / (size + prior), 0.0, 1.0))


# -- the plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plan:
    """The planned mean response of a (context, perturbation), and where it comes from.

    Attributes
    ----------
    estimates : DataFrame (gene, estimator)
        Change of mean log1p-CP10k that each estimator says.
    weights : Series
        Of the estimators; not negative, of sum 1.
    size : float
        Factor on their weighted mean.
    change : (gene,)
        What is planned.
    error : (gene,)
        Standard error of `change`, from what plans of measured contexts missed; NaN where fewer than two contexts were
        measured, which tell nothing.
    quantile : float
        The interval is ``change +- quantile * error``.
    left_out : DataFrame
        Per measured context: ``context, estimator, left``: share of its squared response that the estimators, and the
        plan, leave when they have not seen it, less the noise of the measurement.
    explained : float
        Share of the squared response that plans of the measured contexts explained, each made without that context; NaN
        where fewer than two tell it, or where what was measured is noise (:data:`LEAST_RELIABILITY`).
    rival, rival_explained : str, float
        The simple rule that did best on them, and what it explained.
    shares : Series
        From which measured contexts the response is borrowed; of sum 1 (less where a share is "no change"). Moved cells
        borrow from all alike.
    nearest : float
        Distance of the mean control cell to the nearest measured context's, in units of the median distance of measured
        contexts to their nearest one; NaN where fewer than two were measured.
    extrapolated : bool
        Whether the planned response is larger than every measured one.
    measured : bool
        Whether the group itself was measured: `change` is then what was measured, drawn towards the plan by its noise.
    across : str
        What was left out to judge the plan: "contexts", or "perturbations" where descriptors tell the response. The
        names in `left_out` and `shares` are then those of perturbations, and distances are between descriptors.
    """

    context: str
    perturbation: str
    genes: np.ndarray = field(repr=False)
    estimates: pd.DataFrame = field(repr=False)
    weights: pd.Series
    size: float
    change: np.ndarray = field(repr=False)
    error: np.ndarray = field(repr=False)
    quantile: float
    left_out: pd.DataFrame = field(repr=False)
    explained: float
    rival: str
    rival_explained: float
    shares: pd.Series = field(repr=False)
    nearest: float
    extrapolated: bool
    measured: bool = False
    across: str = "contexts"

    @property
    def low(self) -> np.ndarray:
        """(gene,) lower end of the interval."""
        return self.change - self.quantile * self.error

    @property
    def high(self) -> np.ndarray:
        """(gene,) upper end of the interval."""
        return self.change + self.quantile * self.error

    def table(self) -> pd.DataFrame:
        """A row per gene: what each estimator says, and ``planned, low, high``."""
        return self.estimates.assign(planned=self.change, low=self.low, high=self.high)

    def _repr_html_(self) -> str:
        used = self.weights[self.weights > 0].map("{:.2f}".format).rename("weight").to_frame().to_html()
        largest = self.table().iloc[np.argsort(-np.abs(self.change))[:10]].round(2).to_html()
        title = f"Planned response: {self.perturbation} in {self.context}"
        return card(title, {"size": self.size, "measured": self.measured}) + used + largest


def plan(
    measured: Measured,
    target: np.ndarray,
    moved: np.ndarray | None = None,
    corrected: np.ndarray | None = None,
    *,
    genes: Iterable[str] | None = None,
    context: str = "target",
    perturbation: str = "perturbation",
    also: Evidence | None = None,
    own_change: np.ndarray | None = None,
    own_noise: np.ndarray | None = None,
    settings: PlanSettings = PlanSettings(),
) -> Plan:
    r"""Plan the mean response of a context from the contexts in which the perturbation was measured.

    .. math:: \hat d = s \sum_i w_i \hat d_i

    Parameters
    ----------
    measured
        What was measured of the perturbation in *other* contexts.
    target
        (gene,) mean control cell of the context that is asked for.
    moved
        (gene,) mean change of its moved control cells; operators that have not seen its perturbed cells.
    corrected
        (gene,) the same, corrected by what the operators miss of the measured contexts.
    also
        Evidence of other perturbations (:func:`evidence`), added to this one's: weights are then found on more than
        the few contexts of one perturbation.
    own_change, own_noise
        (gene,) what was measured of the group itself, and its sampling variance. It is then drawn towards the plan as
        far as its noise asks: :math:`(d / v + \hat d / s^2) / (1 / v + 1 / s^2)`.

    Returns
    -------
    Plan

    Raises
    ------
    ModelError
        Where nothing tells the response: it was measured in no other context, and there are no moved cells; or where
        shapes disagree.
    """
    target = np.asarray(target, dtype=np.float64)
    names = np.arange(len(target)).astype(str) if genes is None else np.asarray(list(genes), dtype=object)
    _check(measured, target, moved, names, context, perturbation)
    if len(measured):
        by_name, _ = estimates(measured, target, moved, corrected, settings, context.split(JOINER))
    else:
        by_name = {MOVED: Estimate(np.asarray(moved), np.zeros((0, len(target))), np.zeros(0))}
    parts = products_left_out(measured, by_name)
    weights = _weights(by_name, parts, also, settings)
    mixed, size, shares = _mix(measured, target, by_name, weights, settings)
    table, residuals = _leave_out(measured, by_name, parts, also, settings)
    error, quantile = errors_of_genes(measured, mixed, residuals, settings)
    explained, rival, rival_explained = _explained(table)
    planned, is_measured = mixed, own_change is not None
    if own_change is not None:
        planned, error = _drawn_towards(own_change, own_noise, mixed, error)
        quantile = float(student.ppf((1 + settings.level) / 2, 1000))
    largest = np.sqrt(max((np.square(measured.change).sum(1) - measured.noise.sum(1)).max(initial=0), 0))
    return Plan(
        context=context,
        perturbation=perturbation,
        genes=names,
        estimates=pd.DataFrame({name: e.change for name, e in by_name.items()}, index=names),
        weights=pd.Series(weights),
        size=size,
        change=planned,
        error=error,
        quantile=quantile,
        left_out=table,
        explained=explained,
        rival=rival,
        rival_explained=rival_explained,
        shares=pd.Series(shares, index=list(measured.contexts), dtype=float),
        nearest=float(measured.near(target)["distance"].min()),
        extrapolated=bool(len(measured) and np.linalg.norm(mixed) > largest),
        measured=is_measured,
    )


def combination_evidence(
    change: np.ndarray, noise: np.ndarray, additive: np.ndarray, moved: np.ndarray
) -> Evidence | None:
    """What measured combinations say of the two ways to foresee one; None of fewer than two.

    Parameters
    ----------
    change, noise
        (combination, gene) measured changes, and their sampling variance.
    additive
        Sums of the measured changes of the parts.
    moved
        Changes of the cells that operators moved which have seen no combination.
    """
    nothing = np.zeros(len(change))
    ways = {NO_CHANGE: np.zeros_like(change), ADDITIVE: additive, MOVED: moved}
    by_name = {name: Estimate(rows.mean(0), rows, nothing) for name, rows in ways.items()}
    names = tuple(map(str, range(len(change))))
    return evidence(Measured(names, np.zeros_like(change), change, noise), by_name)


def plan_combination(
    parts: Sequence[Plan],
    moved: np.ndarray,
    seen: Evidence | None,
    *,
    perturbation: str,
    settings: PlanSettings = PlanSettings(),
) -> Plan:
    r"""Plan a combination that was measured nowhere, from the plans of its parts and the moved cells.

    .. math:: \hat d = w_a \sum_p \hat d_p + w_m \hat d_m

    Parameters
    ----------
    parts
        Plans of the parts in the context that is asked for.
    moved
        (gene,) mean change of the context's moved control cells.
    seen
        Of :func:`combination_evidence`, which draws the weights away from the additive rule; that alone where None.

    References
    ----------
    Ahlmann-Eltze, Huber, Anders (2025), Nat. Methods 22:1657 (the additive rule).
    """
    first, added = parts[0], np.sum([part.change for part in parts], axis=0)
    ways = {NO_CHANGE: np.zeros_like(added), ADDITIVE: added, MOVED: np.asarray(moved)}
    weights = {NO_CHANGE: 0.0, ADDITIVE: 1.0, MOVED: 0.0}
    explained = rival = float("nan")
    left: dict[str, float] = {}
    if seen is not None:
        shares = weigh(seen, settings, towards=ADDITIVE)
        weights = dict(zip(seen.names, shares.tolist(), strict=True))
        left = dict(zip(seen.names, seen.errors.tolist(), strict=True))
        explained = 1 - float(shares @ seen.products @ shares) / seen.n_contexts / left[NO_CHANGE]
        rival = 1 - left[ADDITIVE] / left[NO_CHANGE]
    change = np.sum([weights[name] * way for name, way in ways.items()], axis=0)
    table = {
        "context": "combinations",
        "estimator": list(left),
        "left": list(left.values()),
        "reliability": 1.0,
    }
    return Plan(
        context=first.context,
        perturbation=perturbation,
        genes=first.genes,
        estimates=pd.DataFrame(ways, index=first.genes),
        weights=pd.Series(weights),
        size=1.0,
        change=change,
        error=np.sqrt(np.sum([np.square(part.error) for part in parts], axis=0)),
        quantile=max(part.quantile for part in parts),
        left_out=pd.DataFrame(table),
        explained=explained,
        rival=ADDITIVE,
        rival_explained=rival,
        shares=pd.Series(dtype=float),
        nearest=float("nan"),
        extrapolated=False,
    )


def _check(measured, target, moved, names, context, perturbation) -> None:
    if not len(measured) and moved is None:
        expected = f"{perturbation!r} measured in another context than {context!r}, or moved cells"
        fix = "measure it in one context, or give descriptors of perturbations so that operators can be asked for it"
        raise ModelError(expected, "neither", fix)
    shapes = {
        len(names),
        len(target),
        measured.control.shape[1],
        len(target) if moved is None else len(moved),
    }
    if len(shapes) > 1:
        raise ModelError(f"{len(target)} genes everywhere", f"{sorted(shapes)}", "use one list of genes")


def _weights(by_name, parts, also, settings, without: int | None = None) -> dict[str, float]:
    """Weight of every estimator, from the `parts` of :func:`products_left_out`; the context `without` tells nothing."""
    seen = None
    if parts is not None:
        names, products, reliability = parts
        keep = np.arange(len(products)) != (-1 if without is None else without)
        seen = Evidence(names, products[keep].sum(0), float(reliability[keep].sum()))
    if also is not None and set(also.names) <= set(by_name):
        seen = also if seen is None or seen.names != also.names else seen + also
    weights = dict.fromkeys(by_name, 0.0)
    if seen is None:  # nothing to leave out: the two unlike sources alike
        sources = [name for name in (LINEAR, MOVED) if name in by_name]
        return weights | dict.fromkeys(sources, 1 / len(sources))
    return weights | dict(zip(seen.names, weigh(seen, settings).tolist(), strict=True))


def _mix(measured, target, by_name, weights, settings) -> tuple[np.ndarray, float, np.ndarray]:
    """(gene,) weighted mean of the estimators at its size, the size, and (n,) shares of the measured contexts."""
    average = sum(weights[name] * estimate.change for name, estimate in by_name.items())
    shares = sum(weights[name] * estimate.shares for name, estimate in by_name.items())
    if LINEAR not in by_name or len(measured) < 2:
        return average, 1.0, shares
    without = _average_left_out(by_name, weights)
    longer, of_measured = stretch(
        average, without, measured.control, measured.change, target, settings.ridges
    )
    size = float(1 + _trust_in_stretch(without, of_measured, measured, settings) * (longer - 1))
    return size * average, size, shares


def _average_left_out(by_name, weights) -> np.ndarray:
    """(n, gene) weighted mean of what the estimators say of each measured context from the others."""
    return sum(
        weights[name] * e.left_out for name, e in by_name.items() if weights[name] > 0 and len(e.left_out)
    )


def foresee(
    measured: Measured, also: Evidence | None = None, settings: PlanSettings = PlanSettings()
) -> dict[str, np.ndarray]:
    """(n, gene) change of each measured context as the estimators, and the "plan", foresee it from the others.

    Empty where fewer than two contexts were measured.
    """
    moved, corrected = (
        None if rows is None else rows.mean(0) for rows in (measured.moved, measured.corrected)
    )
    by_name, _ = estimates(measured, measured.control.mean(0), moved, corrected, settings)
    parts = products_left_out(measured, by_name)
    if parts is None:
        return {}
    left_out = {name: by_name[name].left_out for name in parts[0]}
    return left_out | {"plan": _planned_left_out(measured, by_name, parts, also, settings)}


def _planned_left_out(measured, by_name, parts, also, settings) -> np.ndarray:
    """(n, gene) planned change of each measured context; the weights have not seen it."""
    planned = np.empty_like(measured.change, dtype=np.float64)
    for c, context in enumerate(measured.contexts):
        weights = _weights(by_name, parts, also, settings, without=c)
        average = _average_left_out(by_name, weights)
        stretched = stretch(
            average[c], average, measured.control, measured.change, measured.control[c], settings.ridges
        )[1]
        others = np.arange(len(measured)) != c
        rest = measured.without(context)
        trust = _trust_in_stretch(average[others], stretched[others], rest, settings)
        planned[c] = average[c] * (1 + trust * (stretched[c] - 1))
    return planned


def _leave_out(measured, by_name, parts, also, settings) -> tuple[pd.DataFrame, np.ndarray]:
    """What is left of each measured context, and (n, gene) measured less planned change."""
    columns = ["context", "estimator", "left", "reliability"]
    if parts is None:
        return pd.DataFrame(columns=columns), np.zeros((0, measured.change.shape[1]))
    noise = measured.noise.sum(1)
    reliability, size = reliability_and_size(measured.change, noise)
    residuals = measured.change - _planned_left_out(measured, by_name, parts, also, settings)
    rows = []
    for c, context in enumerate(measured.contexts):
        left = {name: measured.change[c] - e.left_out[c] for name, e in by_name.items() if len(e.left_out)}
        for name, residual in (left | {"plan": residuals[c]}).items():
            rows.append((context, name, (residual @ residual - noise[c]) / size[c], reliability[c]))
    return pd.DataFrame(rows, columns=columns), residuals


def _explained(table: pd.DataFrame) -> tuple[float, str, float]:
    """What the plan explained of the contexts left out, the best simple rule, and what that explained."""
    if table.empty:
        return float("nan"), "", float("nan")
    left = (table["left"] * table["reliability"]).groupby(table["estimator"]).sum()
    simple = left[[name for name in SIMPLE if name in left]]
    if table["reliability"].mean() < LEAST_RELIABILITY:  # shares of nothing
        return float("nan"), str(simple.idxmin()), float("nan")
    explained = 1 - left / left[NO_CHANGE]
    return float(explained["plan"]), str(simple.idxmin()), float(explained[simple.idxmin()])


def _spacing(control: np.ndarray) -> float:
    """Median distance between nearest contexts; NaN of one alone."""
    if len(control) < 2:
        return float("nan")
    between = _distances(control, control)
    np.fill_diagonal(between, np.inf)
    return max(float(np.median(between.min(1))), np.finfo(float).tiny)


def errors_of_genes(measured, planned, residuals, settings) -> tuple[np.ndarray, float]:
    r"""Standard error (gene,) of the plan, and the quantile that makes an interval of it.

    .. math:: s_g^2 = \frac{\sum_c \max(e_{cg}^2 - v_{cg}, 0) + n_0\, (\alpha u_g + \beta \hat d_g^2)}{n + n_0}

    with residuals e of n contexts left out, their noise v, the mean noise u of the gene, and the planned change; alpha
    and beta by least squares. The quantile is that of :math:`|e_{cg}| / \sqrt{s_g^2 + v_{cg}}` over all contexts and
    genes, each with the error that the other contexts say (split conformal prediction).

    References
    ----------
    Vovk, Gammerman, Shafer (2005), Algorithmic Learning in a Random World; Lei et al. (2018), JASA 113:1094.
    """
    n = len(residuals)
    if n < 2:
        return np.full(measured.change.shape[1], np.nan), float("nan")
    noise, squares = measured.noise, np.square(residuals)
    predicted = np.square(measured.change - residuals)
    ratios = []
    for c in range(n):
        others = np.arange(n) != c
        scale = _gene_errors(squares[others], noise[others], predicted[others], predicted[c], settings)
        ratios.append(np.sqrt(squares[c] / np.maximum(scale + noise[c], np.finfo(float).tiny)))
    quantile = float(np.quantile(np.concatenate(ratios), settings.level))
    return np.sqrt(_gene_errors(squares, noise, predicted, np.square(planned), settings)), quantile


def _gene_errors(squares, noise, predicted, planned, settings) -> np.ndarray:
    """(gene,) squared errors of a plan of squared size `planned`, from residuals (n, gene) of others."""
    extra = squares - noise
    typical = noise.mean(0)
    design = np.stack([np.broadcast_to(typical, extra.shape).ravel(), predicted.ravel()], 1)
    scale = design[:, 0] + 0.1 * design[:, 1]
    heard = scale > 0  # genes without a count tell nothing
    weight = np.divide(1.0, scale, out=np.zeros_like(scale), where=heard) ** 2
    alpha, beta = _two_not_negative(design, extra.ravel(), weight)
    prior = alpha * typical + beta * planned
    n, pseudo = len(squares), settings.pseudo_contexts
    return (np.maximum(extra, 0.0).sum(0) + pseudo * prior) / (n + pseudo)


def _two_not_negative(design: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted least squares with two coefficients that are not negative."""
    gram, moment = design.T @ (weight[:, None] * design), design.T @ (weight * y)
    both = np.linalg.pinv(gram) @ moment
    if both.min() >= 0:
        return both
    alone = np.maximum(moment / np.maximum(np.diag(gram), np.finfo(float).tiny), 0.0)
    better = int(np.argmax(alone * moment))
    return np.where(np.arange(2) == better, alone, 0.0)


def _drawn_towards(own: np.ndarray, noise: np.ndarray, planned: np.ndarray, error: np.ndarray):
    """What was measured, drawn towards the plan by its noise; its standard error."""
    own, noise = np.asarray(own, dtype=np.float64), np.maximum(noise, np.finfo(float).tiny)
    between = np.square(error)  # NaN where nothing tells it: what was measured then stands alone
    share = np.nan_to_num(between / (between + noise), nan=1.0)
    return planned + share * (own - planned), np.sqrt(share * noise)
