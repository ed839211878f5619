"""Does a perturbation do anything at all? A seeded permutation test of the energy distance per group."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from ..data.contract import context_labels, obs_labels
from ..errors import DataError, LabelError, did_you_mean, three_beats

logger = logging.getLogger("cellop_nb")

TIE = (
    1e-10  # statistics nearer than this (in units of the mean distance) are one value: sums round differently
)


def energy_of_splits(distance: np.ndarray, first: np.ndarray) -> np.ndarray:
    r"""Energy distance (Euclid, U) of many splits of one pooled sample, as quadratic forms of the label
    vectors.

    .. math:: T(s) = \frac{2\,s^\top D(1-s)}{nm} - \frac{s^\top D s}{n(n-1)} - \frac{(1-s)^\top
    D(1-s)}{m(m-1)}

    Parameters
    ----------
    distance : (cell, cell)
        Pairwise distances D of the pooled cells, zero diagonal.
    first : (split, cell)
        1 for the n cells of the first sample, 0 for the m others; n is the same in every split.

    Returns
    -------
    (split,)
    """
    n = first[0].sum()
    m = distance.shape[0] - n
    to_first = first @ distance
    within = (to_first * first).sum(axis=1)
    between = to_first.sum(axis=1) - within
    rest = distance.sum() - within - 2.0 * between
    return 2.0 * between / (n * m) - within / (n * (n - 1)) - rest / (m * (m - 1))


def permutation_test(
    x: np.ndarray, y: np.ndarray, *, n_permutations: int = 1999, seed: int = 0
) -> tuple[float, float]:
    r"""Energy distance of two clouds and its permutation p-value.

    .. math:: p = \frac{1 + \#\{T^* \ge T\}}{1 + B}

    so that p is never 0 and is 1 when all statistics are tied.

    Parameters
    ----------
    x, y : (cell, dimension)
        At least two cells each.

    Returns
    -------
    (statistic, p)

    References
    ----------
    Phipson and Smyth 2010, Stat Appl Genet Mol Biol 9:39; Székely and Rizzo 2013, J Stat Plan Inference
    143:1249.
    """
    from scipy.spatial.distance import cdist

    if min(len(x), len(y)) < 2:
        raise DataError(three_beats("two cells a side", f"{len(x)} and {len(y)}", "drop this group"))
    pooled = np.concatenate([x, y]).astype(np.float64)
    distance = cdist(pooled, pooled)
    labels = np.zeros(len(pooled))
    labels[: len(x)] = 1.0
    rng = np.random.default_rng(seed)
    splits = np.stack([labels, *(rng.permutation(labels) for _ in range(n_permutations))])
    statistic = energy_of_splits(distance, splits)
    as_large = statistic[1:] >= statistic[0] - TIE * distance.mean()
    return float(statistic[0]), float((1 + as_large.sum()) / (1 + n_permutations))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjustment of p-values (test,): controls the chance of any false positive (Holm 1979)."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjustment of p-values (test,) that controls the false discovery rate (Benjamini and Hochberg 1995)."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p, method="bh") if len(p) else np.asarray(p, dtype=float)


CORRECTIONS = {"holm": holm, "bh": benjamini_hochberg}


def etest(
    adata: AnnData,
    *,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    use_rep: str | None = None,
    n_permutations: int = 1999,
    correction: str = "holm",
    alpha: float = 0.05,
    max_cells: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Permutation E-test of every (context, perturbation) group against the controls of its context.

    Parameters
    ----------
    adata : AnnData
    use_rep : str or None
        Key of ``obsm``; None takes 20 principal components of log1p-CP10k over all genes of `adata`.
        Permuting labels keeps the test valid, because the components are computed without them.
    n_permutations : int
        B. The smallest p is 1/(1 + B): with many groups and Holm, B must exceed (number of groups)/alpha.
    correction : {"holm", "bh"}
        Over all groups tested here.
    alpha : float
        Level of the adjusted p below which a group is called different.
    max_cells : int
        A side; more are subsampled (seeded).

    Returns
    -------
    DataFrame
        One row per group: ``context, perturbation, n_control, n_perturbed, e_distance`` (Euclid,
        U-statistic), ``p, p_adjusted, different, reason``. A group with fewer than two cells a side has NaN and
        a reason.

    Raises
    ------
    LabelError
        Unknown key, control label or correction.

    References
    ----------
    Peidli et al. 2024, Nat Methods 21:531 (E-test).
    """
    if correction not in CORRECTIONS:
        hint = did_you_mean(correction, CORRECTIONS)
        raise LabelError(three_beats("correction 'holm' or 'bh'", repr(correction), hint))
    points = _representation(adata, use_rep, layer, seed)
    contexts = context_labels(adata, context_key).to_numpy()
    perturbations = obs_labels(adata, perturbation_key).to_numpy()
    _known_control(control, perturbations, perturbation_key)
    groups = sorted({(c, p) for c, p in zip(contexts, perturbations, strict=True) if p != control})
    rows = []
    for number, (context, perturbation) in enumerate(groups):
        inside = contexts == context
        x, y = (points[inside & (perturbations == name)] for name in (control, perturbation))
        row = {"context": context, "perturbation": perturbation, "n_control": len(x), "n_perturbed": len(y)}
        # one stream per group: a group's p-value does not depend on its neighbours' sizes
        rows.append(row | _test_group(x, y, n_permutations, max_cells, np.random.default_rng([seed, number])))
    table = pd.DataFrame(rows)
    return _adjusted(table, correction, alpha, n_permutations) if len(table) else table


def _test_group(x, y, n_permutations: int, max_cells: int, rng: np.random.Generator) -> dict:
    if min(len(x), len(y)) < 2:
        return {"e_distance": np.nan, "p": np.nan, "reason": f"{len(x)} control and {len(y)} perturbed cells"}
    x, y = (points[rng.permutation(len(points))[:max_cells]] for points in (x, y))
    statistic, p = permutation_test(x, y, n_permutations=n_permutations, seed=rng)
    return {"e_distance": statistic, "p": p, "reason": ""}


def _adjusted(table: pd.DataFrame, correction: str, alpha: float, n_permutations: int) -> pd.DataFrame:
    tested = table["p"].notna().to_numpy()
    if correction == "holm" and tested.sum() / (1 + n_permutations) > alpha:
        logger.warning(
            "etest: %d permutations are too few for Holm over %d groups at %g; raise n_permutations",
            n_permutations,
            tested.sum(),
            alpha,
        )
    table["p_adjusted"] = np.nan
    table.loc[tested, "p_adjusted"] = CORRECTIONS[correction](table.loc[tested, "p"].to_numpy())
    table["different"] = table["p_adjusted"] <= alpha
    names = [
        "context",
        "perturbation",
        "n_control",
        "n_perturbed",
        "e_distance",
        "p",
        "p_adjusted",
        "different",
    ]
    return table[[*names, "reason"]]


def _known_control(control: str, perturbations: np.ndarray, perturbation_key: str) -> None:
    if control not in set(perturbations):
        found = f"no such label in obs[{perturbation_key!r}]"
        hint = did_you_mean(control, np.unique(perturbations))
        raise LabelError(
            three_beats(f"control cells labelled {control!r}", found, f"pass control=... ({hint})")
        )


def _representation(adata: AnnData, use_rep: str | None, layer: str | None, seed: int) -> np.ndarray:
    if use_rep is None:
        from .space import EvaluationSpace

        space = EvaluationSpace.fit(adata, layer=layer, seed=seed)
        return space.project(space.transform(space.select(adata, layer)))
    if use_rep not in adata.obsm:
        hint = did_you_mean(use_rep, adata.obsm)
        fix = f"write it first, or pass use_rep=None for 20 PCs of log1p-CP10k ({hint})"
        raise LabelError(three_beats(f"obsm[{use_rep!r}]", "no such key", fix))
    return np.asarray(adata.obsm[use_rep], dtype=np.float64)
