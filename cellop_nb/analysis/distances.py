"""How far clouds of cells lie apart: effects beside their noise, the permutation E-test, moved against real cells."""

from __future__ import annotations

import logging
import math

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scipy.cluster import hierarchy
from scipy.spatial.distance import cdist
from scipy.stats import false_discovery_control
from torch import Tensor

from ..data.contract import counts
from ..data.groups import Groups
from ..display import Distances
from ..errors import LabelError, checked, did_you_mean
from ..models.energy import energies_of_sums, energy_distance, noise_floor, noise_limit, self_distance
from ..models.operators import OperatorModel
from .metrics import EvaluationSpace, log1p_cp10k

__all__ = [
    "etest",
    "group_energies",
    "screen_effects",
    "transport_scores",
]

logger = logging.getLogger("cellop_nb")

NO_CHANGE, OWN_MEAN, OPERATOR = "no change", "own mean", "operator"

TIE = 1e-10
"""Statistics nearer than this (in units of the mean distance) are one value: sums round differently."""

MANY = 100
"""Groups beyond which p-values are adjusted by Benjamini and Hochberg, where nothing else is said."""

_ALIKE = 0.5  # cosine distance up to which mean effects are one cluster
_MOST_ALIKE = 1000  # groups that are compared with each other
_FEWEST_COUNTS = 10  # of a target in the controls of a context, below which a loss cannot be seen
_EXCEEDANCES = 10  # permuted values at least as large as the statistic that make a p-value without a model
_TAIL = 250  # largest permuted values that a tail is fitted to, at most an eighth of all
_TAIL_PERMUTATIONS = 400


@checked
def group_energies(groups: Groups, *, seed: int = 0) -> pd.DataFrame:
    """Effect of every group: its energy distance to the controls of its context, beside its noise.

    Returns
    -------
    DataFrame
        A row per group: ``context, perturbation, group, cells, energy, floor`` (:func:`noise_floor` of the group),
        ``limit`` (:func:`noise_limit`: an effect below it cannot be told from noise). Energy distances are Euclidean,
        U-statistic, per group.
    """
    own = {context: self_distance(cells) for context, cells in groups.control.items()}
    rows = []
    for group in groups:
        energy = energy_distance(group.cells, groups.control[group.context], y_self=own[group.context])
        noise = noise_floor(group.cells, seed=seed), noise_limit(group.cells, seed=seed)
        rows.append((group.context, group.perturbation, group.label, len(group), float(energy), *noise))
    return pd.DataFrame(
        rows, columns=["context", "perturbation", "group", "cells", "energy", "floor", "limit"]
    )


@checked
@torch.no_grad()
def transport_scores(
    adata: AnnData, operators: OperatorModel, *, split: str = "test", use_rep: str = "X_nbvae", seed: int = 0
) -> Distances:
    """Energy distance of moved training controls to held-out perturbed cells of each group, in the latent space.

    "own mean" adds the difference of the group's training means to every control cell: it is told the group's own
    answer, an oracle, so a contextual operator must do at least as well.

    Parameters
    ----------
    adata
        A screen that was set up, with latents in ``obsm[use_rep]`` and ``obs["split"]``.
    operators
        Fitted operators.
    split
        Whose perturbed cells are compared.

    Returns
    -------
    Distances
        A row per group and method: ``context, perturbation, group, cells, method, energy, floor, limit``; the methods
        are "no change", "own mean" and "operator", energy distances Euclidean, U-statistic. Floor and limit are those of
        the group's training cells, the limit of as many as were held out.
    """
    training = Groups(adata, use_rep=use_rep, split="train")
    held_out = Groups(adata, use_rep=use_rep, split=split, control_split="train")
    by_label = {group.label: group.cells for group in training}
    rows = []
    for group in held_out:
        source, own = held_out.control[group.context], by_label[group.label]
        operator = operators.operator(group.condition(operators.conditions.perturbations))
        clouds = {
            NO_CHANGE: source,
            OWN_MEAN: source + own.mean(0) - source.mean(0),
            OPERATOR: operator(source),
        }
        noise = noise_floor(own, seed=seed), noise_limit(own, len(group), seed=seed)
        for method, moved in clouds.items():
            energy = float(energy_distance(moved, group.cells))
            rows.append((group.context, group.perturbation, group.label, len(group), method, energy, *noise))
    columns = ["context", "perturbation", "group", "cells", "method", "energy", "floor", "limit"]
    return Distances(rows, columns=columns)


# -- does a perturbation do anything at all? ------------------------------------------------------------------------


@checked
def etest(
    data: AnnData | Groups,
    *,
    use_rep: str | None = None,
    n_permutations: int = 1999,
    correction: str | None = None,
    alpha: float = 0.05,
    max_cells: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Permutation E-test of every group against the controls of its context.

    A p-value below about 10 / B, B permutations, comes from a tail that is fitted to the permuted values
    (:func:`tail_probability`), so that many groups can be tested with few permutations.

    Parameters
    ----------
    data
        A screen that was set up, or its groups with a representation.
    use_rep
        Key of ``obsm``; None takes 20 principal components of log1p-CP10k over all genes. Permuting labels keeps the
        test valid, because the components are computed without them.
    n_permutations
        B; the same ones serve all groups of one size and context.
    correction
        Over all groups tested here: "holm" (the chance of any false positive), "bh" (their expected share); None takes
        Holm up to 100 groups and Benjamini-Hochberg beyond.
    alpha
        Level of the adjusted p up to which a group is called different.
    max_cells
        A side; more are subsampled (seeded).

    Returns
    -------
    DataFrame
        One row per group: ``context, perturbation, group, n_control, n_perturbed, e_distance`` (Euclidean,
        U-statistic), ``detectable`` (the distance that has p = alpha: smaller effects of so many cells are missed),
        ``p, p_adjusted, different, reason``. A group with fewer than two cells a side has NaN and a reason;
        ``attrs["correction"]`` names the one used.

    Raises
    ------
    LabelError
        Unknown correction, or data that were not set up.
    DataError
        A representation that is missing or not finite.

    References
    ----------
    Peidli et al. 2024, Nat Methods 21:531 (E-test).
    """
    if correction not in (None, *CORRECTIONS):
        hint = did_you_mean(correction, CORRECTIONS)
        raise LabelError("correction 'holm' or 'bh'", repr(correction), hint)
    groups = data if isinstance(data, Groups) else _groups_in(data, use_rep, seed)
    order = sorted(range(len(groups)), key=lambda k: (groups[k].context, len(groups[k])))
    rows: list[dict] = [{}] * len(groups)
    tests, context = None, None
    for k in order:
        group = groups[k]
        control = groups.control[group.context]
        if tests is None or context != group.context:
            tests, context = _AgainstControl(control, n_permutations, max_cells, seed), group.context
        rows[k] = {
            "context": group.context,
            "perturbation": group.perturbation,
            "group": group.label,
            "n_control": len(control),
            "n_perturbed": len(group),
            **tests.of(group.cells, alpha),
        }
    table = pd.DataFrame(rows)
    tested = table["p"].notna().to_numpy()
    if correction is None:
        correction = "holm" if tested.sum() <= MANY else "bh"
    few = n_permutations < _TAIL_PERMUTATIONS and tested.sum() / (1 + n_permutations) > alpha
    if correction == "holm" and few:
        problem = "etest: %d permutations are too few for Holm over %d groups at %g; raise n_permutations"
        logger.warning(problem, n_permutations, tested.sum(), alpha)
    adjusted = np.full(len(table), np.nan)
    adjusted[tested] = CORRECTIONS[correction](table.loc[tested, "p"].to_numpy())
    table = table.assign(p_adjusted=adjusted, different=adjusted <= alpha)
    table["reason"] = table.pop("reason")  # the last column
    table.attrs["correction"] = correction
    return table


@checked
def screen_effects(
    adata: AnnData, *, use_rep: str | None = None, alpha: float = 0.05, seed: int = 0
) -> pd.DataFrame:
    r"""Tell how many perturbations of a screen do anything, which are similar, and whether knock-downs worked.

    Parameters
    ----------
    adata
        A screen that was set up.
    use_rep, alpha, seed
        As in :func:`etest`.

    Returns
    -------
    DataFrame
        That of :func:`etest`, the strongest first, with ``knockdown`` (share of its expression in control cells that the
        target lost, where the perturbation is named like a gene that the controls express; negative where it rose) and
        ``alike`` (number of a cluster of effects, the largest is 1; 0 for a group of its own or one that is not called
        different; of more than 1,000 that are, the strongest are compared). ``attrs["summary"]`` says in a sentence how
        many do something, and how many could not have shown it.

        .. math:: k = 1 - \bar p_{\mathrm{perturbed}} / \bar p_{\mathrm{control}}, \qquad
            p = \mathrm{counts} / \mathrm{library}

    References
    ----------
    Replogle et al. 2022, Cell 185:2559 (clusters of effects, average linkage of correlations).
    """
    groups = _groups_in(adata, use_rep, seed)
    table = etest(groups, alpha=alpha, seed=seed).assign(knockdown=_knockdowns(adata, groups))
    different = np.flatnonzero(table["different"])
    strongest = table["e_distance"].to_numpy()[different].argsort()[::-1][:_MOST_ALIKE]
    table["alike"] = _clusters(groups, different[strongest])
    usual = float(table.loc[different, "e_distance"].median())
    blind = int((table["detectable"] > usual).sum())
    summary = (
        f"{len(different)} of {int(table['p'].notna().sum())} groups differ from their controls (adjusted p at most "
        f"{alpha:g}). Clusters of similar effects: {int(table['alike'].max())}."
    )
    if len(different):
        summary += f" Groups with too few cells to show an effect of the usual size ({usual:.2g}): {blind}."
    reached = table["knockdown"].dropna()
    if len(reached):
        summary += (
            f" Targets lost {100 * reached.median():.0f} % of their expression (median of {len(reached)})."
        )
    correction = table.attrs["correction"]
    table = table.sort_values("e_distance", ascending=False, ignore_index=True)
    table.attrs |= {"correction": correction, "summary": summary}
    return table


def _knockdowns(adata: AnnData, groups: Groups) -> np.ndarray:
    """(group,) share of the expression that the target lost; NaN where it is no gene, or controls hardly express it."""
    column = adata.var_names.get_indexer([group.perturbation for group in groups])
    targets, column_of = np.unique(column[column >= 0], return_inverse=True)
    lost = np.full(len(groups), np.nan)
    if not len(targets):
        return lost
    x = sparse.csr_matrix(counts(adata, groups.keys.layer))
    library = np.maximum(np.asarray(x.sum(1)).ravel(), 1)
    shares = sparse.csr_matrix(sparse.diags(1 / library) @ x[:, targets])
    control = {c: np.asarray(shares[rows].mean(0)).ravel() for c, rows in groups.control_rows.items()}
    seen = {c: np.asarray(x[rows][:, targets].sum(0)).ravel() for c, rows in groups.control_rows.items()}
    for k, at in zip(np.flatnonzero(column >= 0), column_of, strict=True):
        group = groups[k]
        if seen[group.context][at] >= _FEWEST_COUNTS:
            mine = shares[group.rows][:, [at]].sum() / len(group)
            lost[k] = 1 - mine / control[group.context][at]
    return lost


def _clusters(groups: Groups, chosen: np.ndarray) -> np.ndarray:
    """(group,) numbers of the clusters of the chosen groups' mean effects, largest first; 0 for the others."""
    numbers = np.zeros(len(groups), dtype=int)
    if len(chosen) < 2:
        return numbers
    means = {context: cells.mean(0) for context, cells in groups.control.items()}
    effects = (
        torch.stack([groups[k].cells.mean(0) - means[groups[k].context] for k in chosen]).double().numpy()
    )
    tree = hierarchy.linkage(effects, "average", metric="cosine")
    labels = hierarchy.fcluster(tree, _ALIKE, "distance")
    names, sizes = np.unique(labels, return_counts=True)
    order = [name for name, size in sorted(zip(names, sizes, strict=True), key=lambda x: -x[1]) if size > 1]
    numbers[chosen] = [order.index(label) + 1 if label in order else 0 for label in labels]
    return numbers


def _groups_in(adata: AnnData, use_rep: str | None, seed: int) -> Groups:
    """All groups, those of one cell too, in `use_rep` or in principal components of log1p-CP10k."""
    if use_rep is not None:
        return Groups(adata, use_rep=use_rep, min_cells=1)
    space = EvaluationSpace.fit(adata, seed=seed)
    return Groups(adata, use_rep=space.project(log1p_cp10k(space.select(adata))), min_cells=1)


class _AgainstControl:
    """Tests of many groups against the controls of one context.

    The permutations of n + m cells, and what they take of the distances among the m controls, are the same for all
    groups of n cells: beside them, a group costs B m n products.
    """

    def __init__(self, control: Tensor, n_permutations: int, max_cells: int, seed: int) -> None:
        self.n_permutations, self.max_cells, self.seed, self.size = n_permutations, max_cells, seed, 0
        self.control = self._some(control)
        self.within = torch.from_numpy(cdist(self.control, self.control))

    def _some(self, cells: Tensor) -> np.ndarray:
        order = np.random.default_rng([self.seed, len(cells)]).permutation(len(cells))
        return cells.cpu().double().numpy()[order[: self.max_cells]]

    def _permute(self, size: int) -> None:
        """Random choices of `size` cells as the first sample: of the group's (B, n), of the controls (B, m)."""
        self.size, m = size, len(self.control)
        labels = np.zeros((self.n_permutations, size + m))
        labels[:, :size] = 1.0
        np.random.default_rng([self.seed, size, m]).permuted(labels, axis=1, out=labels)
        both = torch.from_numpy(labels)
        self.of_group, self.of_control = both[:, :size].contiguous(), both[:, size:].contiguous()
        to_control = self.of_control @ self.within
        self.among_control, self.from_control = (to_control * self.of_control).sum(1), to_control.sum(1)

    def of(self, cells: Tensor, alpha: float) -> dict:
        """Statistic, the smallest one that is seen at alpha, p-value and reason of one group (cell, d)."""
        if min(len(cells), len(self.control)) < 2:
            reason = f"{len(self.control)} control and {len(cells)} perturbed cells"
            return {"e_distance": math.nan, "detectable": math.nan, "p": math.nan, "reason": reason}
        group = self._some(cells)
        if self.size != len(group):
            self._permute(len(group))
        n, m = len(group), len(self.control)
        among, across = (torch.from_numpy(cdist(group, other)) for other in (group, self.control))
        total = among.sum() + 2 * across.sum() + self.within.sum()
        shared = ((self.of_control @ across.T) * self.of_group).sum(1)
        within = ((self.of_group @ among) * self.of_group).sum(1) + 2 * shared + self.among_control
        from_group = self.of_group @ (among.sum(1) + across.sum(1))
        from_first = from_group + self.from_control + self.of_control @ across.sum(0)
        permuted = energies_of_sums(within, from_first, total, n, n + m).numpy()
        own = among.sum()
        statistic = float(energies_of_sums(own, own + across.sum(), total, n, n + m))
        tie = TIE * float(total) / (n + m) ** 2
        return {
            "e_distance": statistic,
            "detectable": float(np.quantile(permuted, 1 - alpha)),
            "p": tail_probability(statistic, permuted, n, m, tie=tie),
            "reason": "",
        }


def _share_as_large(value: float, permuted: np.ndarray) -> float:
    """(1 + number of permuted statistics that are at least `value`) / (1 + B)."""
    return float((1 + (permuted >= value).sum()) / (1 + len(permuted)))


def tail_probability(statistic: float, permuted: np.ndarray, n: int, m: int, *, tie: float = 0.0) -> float:
    r"""p-value of a statistic that hardly any permuted one reaches, by a generalised Pareto tail.

    With the N largest of B permuted statistics (B,), the threshold t below them, and shape and scale by their L-moments:

    .. math:: p = \frac{N}{B} \Big(1 + \frac{\xi (T - t)}{\sigma}\Big)^{-1/\xi}, \qquad \xi \ge 0

    The shape is not let below 0, where p could vanish: the energy distance of equal clouds is a weighted sum of
    chi-squared variables, with a tail no lighter than exponential. p is not below one over the number of splits that
    exist. Where ten permuted statistics or more are as large, or too few permutations or splits exist to fit a tail, p is
    :math:`(1 + \#\{T^* \ge T\}) / (1 + B)`, which is never 0, and 1 when all statistics are tied: nearer than `tie`. The
    two sides have n and m cells.

    References
    ----------
    Knijnenburg et al. 2009, Bioinformatics 25:i161; Hosking and Wallis 1987, Technometrics 29:339 (L-moments);
    Phipson and Smyth 2010, Stat Appl Genet Mol Biol 9:39 (never zero).
    """
    value = statistic - tie
    log_splits = math.lgamma(n + m + 1) - math.lgamma(n + 1) - math.lgamma(m + 1)
    few = len(permuted) < _TAIL_PERMUTATIONS or log_splits < math.log(100 * len(permuted))
    if few or (permuted >= value).sum() >= _EXCEEDANCES:
        return _share_as_large(value, permuted)
    size = min(_TAIL, len(permuted) // 8)
    largest = np.sort(permuted)[-size - 1 :]
    threshold = largest[:2].mean()
    excess = largest[1:] - threshold
    mean = excess.mean()
    if not mean > tie:
        return _share_as_large(value, permuted)
    weighted = (np.arange(size - 1, -1, -1) / (size - 1) * excess).mean()  # E[x (1 - F(x))]
    shape = max(2.0 - mean / (mean - 2 * weighted), 0.0)
    beyond = max(value - threshold, 0.0)
    if shape < 1e-6:
        log_survival = -beyond / mean
    else:
        scale = mean * (1 - shape)
        log_survival = -math.log1p(shape * beyond / scale) / shape
    return math.exp(max(math.log(size / len(permuted)) + log_survival, -log_splits, math.log(1e-300)))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjustment of p-values (test,): controls the chance of any false positive (Holm 1979)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


CORRECTIONS = {"holm": holm, "bh": lambda p: false_discovery_control(p) if len(p) else p}
