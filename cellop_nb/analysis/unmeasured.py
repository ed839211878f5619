"""The mean response of a perturbation that was never measured, from descriptors and what the measured ones did.

Unlike ways to go from descriptors to effects are averaged, with weights found by leaving perturbations out; the mean of
the perturbed is one of them, so that descriptors that carry nothing do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import cdist

from ..data.groups import Groups
from ..errors import LabelError, ModelError, did_you_mean
from ..models.affine import AffineOperator
from ..models.operators import Condition, OperatorModel
from .features import described
from .means import Means
from .plan import (
    LEAST_RELIABILITY,
    NO_CHANGE,
    Estimate,
    Evidence,
    Measured,
    Plan,
    PlanSettings,
    errors_of_genes,
    products_left_out,
    reliability_and_size,
    weigh,
)

MEAN, RIDGE, KERNEL, NEAREST = "mean of perturbed", "linear map", "kernel map", "nearest described"
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, np.inf)
NEIGHBOURS = (1, 2, 3, 5, 10, 20)
FEWEST = 3
"""Measured and described perturbations that a map from descriptors to effects needs."""
MOST_ERRORS = 64
MOST_DIRECTIONS = 64
"""Perturbations left out from which errors of genes are found, and directions of effects that choose ridges."""


class Described:
    """Perturbations that were never measured, foreseen in each context by its own :class:`EffectMap`.

    Parameters
    ----------
    features
        (perturbation, descriptor); a row of NaN marks a perturbation without one.
    means
        What was measured. Where a perturbation was not measured in a context, the mean of its other contexts stands in.
    """

    def __init__(self, features: pd.DataFrame, means: Means) -> None:
        self.names, self.columns = described(features), [str(column) for column in features]
        self.marked = [str(name) for name in features.index[features.isna().all(axis=1)]]
        self._row = dict(zip(self.names, features.dropna(how="all").to_numpy(dtype=float), strict=True))
        self._means = means
        self._maps: dict[str, EffectMap] = {}
        self._measured = [name for name in self.names if len(means.of_perturbation(name))]

    def map(self, context: str) -> EffectMap:
        """Effects in a context as a function of descriptors."""
        if context not in self._maps:
            if len(self._measured) < FEWEST:
                expected = f"{FEWEST} measured perturbations with descriptors"
                fix = "describe more of the measured perturbations, or measure more"
                raise ModelError(expected, f"{len(self._measured)}", fix)
            rows = [self._means.near(context, name) for name in self._measured]
            change, noise = (np.stack(part) for part in zip(*rows, strict=True))
            descriptors = np.stack([self._row[name] for name in self._measured])
            self._maps[context] = EffectMap(Measured(tuple(self._measured), descriptors, change, noise))
        return self._maps[context]

    def plan(self, context: str, perturbation: str, genes: Sequence[str]) -> Plan:
        """The planned effect of a perturbation that was never measured."""
        return self.map(context).plan(
            self._row[perturbation], genes=genes, context=context, perturbation=perturbation
        )

    def near(self, context: str, perturbation: str) -> pd.DataFrame:
        """A row per measured perturbation: ``perturbation, distance, response``, distances in units of the spacing."""
        effects, descriptor = self.map(context), self._row[perturbation]
        table = effects.measured.near(descriptor).assign(distance=effects.distances(descriptor))
        return table.rename(columns={"context": "perturbation"})


def check_described(features: pd.DataFrame, groups: Groups) -> None:
    """Refuse features that lack a measured perturbation which was not marked as one without a descriptor."""
    described(features)
    rows = set(features.index.map(str))
    parts = dict.fromkeys(part for label in groups.perturbations for part in groups.parts(label))
    lacking = [part for part in parts if part not in rows and not set(part.split("+")) <= rows]
    if lacking:
        fix = f"see co.features.cover(features, adata, missing=...) ({did_you_mean(lacking[0], rows)})"
        raise LabelError("features of every perturbation in training", f"none of {lacking[:5]}", fix)


@torch.no_grad()
def borrowed_operator(
    operators: OperatorModel, context: str | None, shares: Mapping[str, float], label: str
) -> AffineOperator:
    """The operator that departs from the identity as measured ones do, in these shares (perturbation to share)."""
    names = tuple(name for name in shares if name in operators.conditions.perturbations)
    condition = Condition(names, context, tuple(float(shares[name]) for name in names))
    design = operators.conditions.design([condition])
    matrices, shifts = operators.affine(replace(design, pairs=torch.zeros_like(design.pairs)))
    return AffineOperator(matrices[0].cpu(), shifts[0].cpu(), label)


def verdict(said: Plan, name: str) -> str:
    """What to trust of a plan of :class:`EffectMap`, in a sentence with numbers."""
    if not np.isfinite(said.explained):
        return f"{name}: never measured, and cannot be known; the measured effects of the others are noise."
    wide = said.left_out.pivot(index="context", columns="estimator", values="left")
    weight = said.left_out.groupby("context")["reliability"].first()
    gain = (wide[MEAN] - wide["plan"]) * weight / weight.mean()
    doubtful = gain.mean() <= gain.sem()
    numbers = (
        f"predictions of held-out perturbations explained {100 * said.explained:.0f} % of their squared mean response, "
        f"the {MEAN} {100 * said.rival_explained:.0f} %"
    )
    if said.explained <= 0:
        return f"{name}: never measured, and cannot be known; {numbers}."
    said_of_descriptors = (
        "the descriptors carry nothing, so the prediction is the average effect of perturbations"
        if doubtful
        else "predicted from its descriptor"
    )
    far = (
        f" It is extrapolated: the nearest measured perturbation is {said.nearest:.1f} times the usual distance away, "
        f"farther than measured ones are from each other."
        if said.extrapolated and not doubtful
        else ""
    )
    return f"{name}: never measured; {said_of_descriptors}: {numbers}.{far}"


@dataclass(frozen=True, eq=False)
class Way:
    """One way from descriptors to effects: as all of them it weighs the measured effects.

    Attributes
    ----------
    left_out : (n, gene) effect of each perturbation, from the others
    weights : of a new descriptor (k,) to the weights (n,) of the measured effects
    """

    left_out: np.ndarray
    weights: Callable[[np.ndarray], np.ndarray]


class EffectMap:
    r"""Effects as a function of descriptors, one for each context.

    .. math:: \hat d(f) = \sum_m u_m \sum_j w_{mj}(f)\, d_j

    with the weights w of the measured effects d by which each of the ways m foresees a perturbation with descriptor f:
    their mean, ridge regression, kernel ridge regression (Gaussian, of median width), and the mean of the nearest
    few; and weights u of the ways as in :func:`cellop_nb.analysis.plan.weigh`. Ridge and number of neighbours are
    chosen by leaving perturbations out; the error of each perturbation is taken at what the others choose.

    Parameters
    ----------
    measured
        Measured effects: `contexts` are the perturbations, `control` their descriptors (n, k).

    References
    ----------
    Allen (1974), Technometrics 16:125 (left-out errors in closed form); Saunders, Gammerman, Vovk (1998), ICML
    (kernel ridge regression); Ahlmann-Eltze, Huber, Anders (2025), Nat. Methods 22:1657 (linear maps of descriptors).
    """

    def __init__(self, measured: Measured) -> None:
        self.measured, change, n = measured, measured.change, len(measured)
        distance = cdist(measured.control, measured.control)
        width = float(np.median(distance[np.triu_indices(n, 1)])) or 1.0
        apart = distance + np.diag(np.full(n, np.inf))
        scale = float(np.sqrt(measured.control.var(0).sum())) or 1.0
        self._spacing = float(np.median(apart.min(1))) or scale
        self._to_nearest = apart.min(1) / self._spacing
        directions, sizes, _ = np.linalg.svd(
            change, full_matrices=False
        )  # ridges are compared along the main ones
        scores, nothing = directions[:, :MOST_DIRECTIONS] * sizes[:MOST_DIRECTIONS], np.zeros(n)
        self.ways = {
            NO_CHANGE: Way(np.zeros_like(change), lambda _: nothing),
            MEAN: Way((change.sum(0) - change) / (n - 1), lambda _: np.full(n, 1 / n)),
            RIDGE: _ridge(measured, lambda a, b: a @ b.T, scores),
            KERNEL: _ridge(measured, lambda a, b: np.exp(-np.square(cdist(a, b) / width) / 2), scores),
            NEAREST: _nearest(measured, apart, scores),
        }
        estimates = {name: Estimate(nothing, way.left_out, nothing) for name, way in self.ways.items()}
        names, self._products, self._reliability = products_left_out(measured, estimates)
        self.evidence = Evidence(names, self._products.sum(0), float(self._reliability.sum()))
        self._planned, self._table = self._left_out()

    def plan(self, descriptor: np.ndarray, *, genes: Sequence[str], context: str, perturbation: str) -> Plan:
        """The planned effect of a perturbation with this descriptor (k,), with intervals that widen with its distance."""
        measured = self.measured
        names, nearest = self.evidence.names, float(self.distances(descriptor).min())
        weights = weigh(self.evidence)
        by_way = {name: way.weights(descriptor) for name, way in self.ways.items()}
        shares = sum(u * by_way[name] for name, u in zip(names, weights, strict=True))
        rows = np.linspace(0, len(measured) - 1, min(len(measured), MOST_ERRORS)).round().astype(int)
        some = Measured(
            tuple(measured.contexts[k] for k in rows),
            measured.control[rows],
            measured.change[rows],
            measured.noise[rows],
        )
        change = shares @ measured.change
        error, quantile = errors_of_genes(
            some, change, (measured.change - self._planned)[rows], PlanSettings()
        )
        return Plan(
            context=context,
            perturbation=perturbation,
            genes=np.asarray(genes, dtype=object),
            estimates=pd.DataFrame({name: w @ measured.change for name, w in by_way.items()}, index=genes),
            weights=pd.Series(weights, index=list(names)),
            size=1.0,
            change=change,
            error=error * self.widening(descriptor),
            quantile=quantile,
            left_out=self._table,
            explained=_explained(self._table, "plan"),
            rival=MEAN,
            rival_explained=_explained(self._table, MEAN),
            shares=pd.Series(shares, index=list(measured.contexts), dtype=float),
            nearest=nearest,
            extrapolated=nearest > self.farthest,
            across="perturbations",
        )

    def _left_out(self) -> tuple[np.ndarray, pd.DataFrame]:
        """(n, gene) planned effect of each perturbation by weights that have not seen it, and what is left of each."""
        names, products, reliability = self.evidence.names, self._products, self._reliability
        change, noise = self.measured.change, self.measured.noise.sum(1)
        total, n = self.evidence.products, self.evidence.n_contexts
        planned = np.empty_like(change)
        for k in range(len(change)):
            seen = Evidence(names, total - products[k], n - float(reliability[k]))
            weights = weigh(seen)
            planned[k] = sum(u * self.ways[name].left_out[k] for name, u in zip(names, weights, strict=True))
        by_name = {name: way.left_out for name, way in self.ways.items()} | {"plan": planned}
        size = reliability_and_size(change, noise)[1]
        tables = []
        for name, rows in by_name.items():
            left = (np.square(change - rows).sum(1) - noise) / size
            columns = {"context": self.measured.contexts, "estimator": name, "left": left}
            tables.append(pd.DataFrame(columns).assign(reliability=reliability))
        return planned, pd.concat(tables, ignore_index=True)

    @property
    def farthest(self) -> float:
        """The largest distance of a measured perturbation to its nearest one, in units of the spacing."""
        return float(self._to_nearest.max())

    def distances(self, descriptor: np.ndarray) -> np.ndarray:
        """(n,) distances of a descriptor (k,) to the measured ones, in units of the median one between nearest."""
        return cdist(descriptor[None], self.measured.control)[0] / self._spacing

    def widening(self, descriptor: np.ndarray) -> float:
        r"""Factor, 1 or more, on the errors at a descriptor (k,).

        .. math:: \sqrt{\max(1, (a + b d^2) / \overline{e^2})} \; \max(1, d / d_\text{far})

        with the squared errors e of perturbations left out regressed on their squared distance d to the nearest other
        one (b at least 0), and beyond the farthest of these in proportion to the distance.
        """
        residuals = self.measured.change - self._planned
        squares = np.maximum(np.square(residuals).sum(1) - self.measured.noise.sum(1), 0.0)
        d2 = np.square(self._to_nearest)
        spread = float(np.square(d2 - d2.mean()).sum())
        slope = max(float((d2 - d2.mean()) @ squares) / spread, 0.0) if spread > 0 else 0.0
        d = float(self.distances(descriptor).min())
        inside = min(d, self.farthest) ** 2
        growth = 1 + slope * (inside - d2.mean()) / max(float(squares.mean()), np.finfo(float).tiny)
        return float(np.sqrt(max(growth, 1.0)) * max(1.0, d / max(self.farthest, np.finfo(float).tiny)))


def _best_of_others(errors: np.ndarray) -> np.ndarray:
    """(n,) the row of (setting, n) errors with the smallest sum over the other perturbations; the last of equal ones."""
    others = errors.sum(1, keepdims=True) - errors
    return len(errors) - 1 - np.argmin(others[::-1], axis=0)


def _ridge(measured: Measured, kernel: Callable, scores: np.ndarray) -> Way:
    r"""Ridge regression on the features of a kernel, with a constant.

    .. math:: w(f) = 1/n + (K + \lambda s I)^{-1} k(f), \quad s = \mathrm{tr} K / n

    with the kernel matrix K and the vector k centred over the measured perturbations. A left-out effect is
    :math:`(H d - h d)_j / (1 - h_j)` with the hat matrix H and its diagonal h; an infinite ridge gives the mean.
    """
    x, change = measured.control - measured.control.mean(0), measured.change
    n = len(x)
    raw = kernel(x, x)
    centred = raw - raw.mean(0) - raw.mean(1)[:, None] + raw.mean()
    values, vectors = np.linalg.eigh(centred)
    values = np.maximum(values, 0.0)
    scale = max(float(values.sum()) / n, np.finfo(float).tiny)

    def without(ridge: float, effects: np.ndarray) -> np.ndarray:
        share = values / (values + ridge * scale)
        own = (1 / n + np.square(vectors) @ share)[:, None]
        fitted = effects.mean(0) + vectors @ (share[:, None] * (vectors.T @ effects))
        return (fitted - own * effects) / np.maximum(1 - own, 1e-9)

    errors = np.stack([np.square(scores - without(ridge, scores)).sum(1) for ridge in RIDGES])
    chosen = _best_of_others(errors)
    left_out = np.empty_like(change)
    for k in np.unique(chosen):
        left_out[chosen == k] = without(RIDGES[k], change)[chosen == k]
    ridge = RIDGES[len(RIDGES) - 1 - int(np.argmin(errors.sum(1)[::-1]))]

    def weights(descriptor: np.ndarray) -> np.ndarray:
        k = kernel((descriptor - measured.control.mean(0))[None], x)[0]
        k = k - k.mean() - raw.mean(0) + raw.mean()
        return 1 / n + vectors @ ((vectors.T @ k) / (values + ridge * scale))

    return Way(left_out, weights)


def _nearest(measured: Measured, apart: np.ndarray, scores: np.ndarray) -> Way:
    """The mean effect of the nearest few perturbations."""
    change, n = measured.change, len(measured)
    counts = [count for count in NEIGHBOURS if count < n]
    order = np.argsort(apart, axis=1, kind="stable")[:, : max(counts)]
    errors = np.stack([np.square(scores - scores[order[:, :m]].mean(1)).sum(1) for m in counts])
    left_out = np.stack(
        [change[order[j, : counts[k]]].mean(0) for j, k in enumerate(_best_of_others(errors))]
    )
    count = counts[len(counts) - 1 - int(np.argmin(errors.sum(1)[::-1]))]

    def weights(descriptor: np.ndarray) -> np.ndarray:
        near = np.argsort(cdist(descriptor[None], measured.control)[0], kind="stable")[:count]
        return np.bincount(near, minlength=n) / count

    return Way(left_out, weights)


def _explained(table: pd.DataFrame, name: str) -> float:
    """Share of the response of perturbations left out that a way explains; NaN where what was measured is noise."""
    if table["reliability"].mean() < LEAST_RELIABILITY:
        return float("nan")
    left = (table["left"] * table["reliability"]).groupby(table["estimator"]).sum()
    return 1 - float(left[name] / left[NO_CHANGE])
