"""The metrics of perturbation prediction on plain arrays: one formula, one function.

Notation, per group: ``real`` and ``predicted`` are mean profiles (gene,) in log1p-CP10k space, ``control``
is the mean of the *same* control cells on both sides, and the changes are real - control and predicted -
control.
"""

from __future__ import annotations

import numpy as np
import torch

from ..errors import CellopError
from ..models.energy import energy_distance

CONSTANT = 1e-7  # a change that varies less than this over the genes is rounding, not a prediction


class Undefined(CellopError):
    """A number that cannot be known here; tables show NaN and this reason instead of a stand-in value."""


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation; a constant prediction `x` scores 0, a constant truth `y` is undefined."""
    if len(y) < 2 or np.ptp(y) < CONSTANT:
        raise Undefined(f"the real change is constant over {len(y)} genes, so no correlation exists")
    if np.ptp(x) < CONSTANT:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def pearson_delta(predicted: np.ndarray, real: np.ndarray, reference: np.ndarray, genes=None) -> float:
    r"""Correlation of the predicted with the real change.

    .. math:: \mathrm{pearson}(\hat\mu - c,\; \mu - c)

    A prediction of no change has no direction and scores 0 (not NaN, which a mean over groups would skip).

    Parameters
    ----------
    predicted, real, reference : (gene,)
        Means in log1p-CP10k. `reference` is the control mean; with the mean of the perturbed centroids it is
        the score of Systema, from which the shift that all perturbations share is removed.
    genes : index, optional
        Restrict to these genes, e.g. the most differential ones.

    Raises
    ------
    Undefined
        The real change is constant.

    References
    ----------
    Roohani et al. 2024, Nat Biotechnol 42:927 (GEARS); Viñas Torné et al. 2025, Nat Biotechnol (Systema).
    """
    chosen = slice(None) if genes is None else genes
    return _pearson((predicted - reference)[chosen], (real - reference)[chosen])


def mae(predicted: np.ndarray, real: np.ndarray) -> float:
    r"""Mean absolute error of the means, :math:`\frac1G\sum_g |\hat\mu_g - \mu_g|` (log1p-CP10k)."""
    return float(np.abs(predicted - real).mean())


def rmse(predicted: np.ndarray, real: np.ndarray) -> float:
    r"""Root mean squared error, :math:`\sqrt{\frac1G\sum_g (\hat\mu_g - \mu_g)^2}` of means (log1p-CP10k)."""
    return float(np.sqrt(np.square(predicted - real).mean()))


def l2_top_expressed(
    predicted: np.ndarray, real: np.ndarray, control: np.ndarray, n_genes: int = 1000
) -> float:
    r"""Euclidean error :math:`\|\hat\mu - \mu\|_2` on the genes most expressed in control cells.

    References
    ----------
    Ahlmann-Eltze, Huber, Anders 2025, Nat Methods 22:1657.
    """
    top = np.argsort(-control, kind="stable")[:n_genes]
    return float(np.linalg.norm((predicted - real)[top]))


def coefficient_of_determination(predicted: np.ndarray, real: np.ndarray) -> float:
    r"""R2 as CPA reports it, :math:`1 - \sum(\mu-\hat\mu)^2 / \sum(\mu-\bar\mu)^2`; may be negative."""
    total = np.square(real - real.mean()).sum()
    if total < CONSTANT:
        raise Undefined("the real mean profile is constant, so R2 is undefined")
    return float(1.0 - np.square(real - predicted).sum() / total)


def squared_pearson(predicted: np.ndarray, real: np.ndarray) -> float:
    r"""R2 as scGen reports it, :math:`\mathrm{pearson}(\hat\mu, \mu)^2`, of means and not of changes."""
    return _pearson(predicted, real) ** 2


def e_distance(x: np.ndarray, y: np.ndarray) -> float:
    r"""Energy distance of two clouds, Euclidean norm, U-statistic.

    .. math:: 2\,E\|X-Y\| - E\|X-X'\| - E\|Y-Y'\|

    Parameters
    ----------
    x, y : (cell, dimension)
        At least two cells each, in memory n x m. Around 0 (also below) when the distributions are the same.

    References
    ----------
    Székely and Rizzo 2013, J Stat Plan Inference 143:1249; Peidli et al. 2024, Nat Methods 21:531.
    """
    if min(len(x), len(y)) < 2:
        raise Undefined(f"the U-statistic needs two cells a side; there are {len(x)} and {len(y)}")
    clouds = (torch.from_numpy(np.array(cells, dtype=np.float64)) for cells in (x, y))
    return float(energy_distance(*clouds))


def direction_match(predicted_lfc: np.ndarray, real_lfc: np.ndarray, significant: np.ndarray) -> float:
    """Share of the `significant` genes (mask) whose predicted log fold change has the right sign."""
    if not significant.any():
        raise Undefined("no gene is differential in the real cells")
    return float((np.sign(predicted_lfc) == np.sign(real_lfc))[significant].mean())


def lfc_spearman(predicted_lfc: np.ndarray, real_lfc: np.ndarray, significant: np.ndarray) -> float:
    """Spearman correlation of log fold changes over the `significant` genes (mask; ties averaged)."""
    from scipy.stats import rankdata

    if significant.sum() < 3:
        raise Undefined(
            f"{significant.sum()} genes are differential in the real cells; a rank correlation needs 3"
        )
    return _pearson(rankdata(predicted_lfc[significant]), rankdata(real_lfc[significant]))


def _ranked(lfc: np.ndarray, significant: np.ndarray) -> np.ndarray:
    """Indices of the significant genes, largest absolute log fold change first."""
    chosen = np.flatnonzero(significant)
    return chosen[np.argsort(-np.abs(lfc[chosen]), kind="stable")]


def precision_at_k(
    predicted_lfc, predicted_significant, real_lfc, real_significant, k: int | None = 50
) -> float:
    r"""Share of the top predicted genes that are among the top real ones.

    .. math:: |P_{k'} \cap R_{k'}| / k', \quad k' = \min(k, |P|)

    P and R hold the differential genes of prediction and truth, ordered by absolute log fold change; no
    predicted gene scores 0. Arguments are (gene,) arrays, the masks boolean.

    References
    ----------
    Adduri et al. 2025, State (cell-eval, ``precision_at_k``).
    """
    if not real_significant.any():
        raise Undefined("no gene is differential in the real cells")
    top, truth = _ranked(predicted_lfc, predicted_significant), _ranked(real_lfc, real_significant)
    k = len(top) if k is None else min(k, len(top))
    return float(len(np.intersect1d(top[:k], truth[:k])) / k) if k else 0.0


def de_score(predicted_lfc, predicted_significant, real_lfc, real_significant) -> float:
    r"""Differential expression score: share of the real DE genes found, with no more guesses than there are.

    .. math:: |P_{n} \cap R| / n, \quad n = |R|

    References
    ----------
    Roohani et al. 2025, Cell 188:3370 (Virtual Cell Challenge); cell-eval ``overlap_at_N``.
    """
    if not real_significant.any():
        raise Undefined("no gene is differential in the real cells")
    truth = np.flatnonzero(real_significant)
    top = _ranked(predicted_lfc, predicted_significant)[: len(truth)]
    return float(len(np.intersect1d(top, truth)) / len(truth))


def perturbation_discrimination(predicted: np.ndarray, real: np.ndarray, left_out=None) -> np.ndarray:
    r"""PDS: is a predicted change nearer (L1) to its own real change than to those of the other
    perturbations?

    .. math:: 1 - \mathrm{rank}_p / N

    with rank 0 for the nearest of the N real changes; ties count in full against the prediction.

    Parameters
    ----------
    predicted, real : (perturbation, gene)
        Changes against control, rows in the same order.
    left_out : sequence of int arrays, optional
        Genes to leave out for each perturbation: its targets, which a model is told.

    Returns
    -------
    (perturbation,), 1 is best; chance is about one half.

    References
    ----------
    Wu et al. 2024, PerturBench; cell-eval ``discrimination_score_l1``.
    """
    scores = np.empty(len(real))
    for p, row in enumerate(predicted):
        distance = np.abs(real - row)
        if left_out is not None:
            distance[:, left_out[p]] = 0.0
        distance = distance.sum(axis=1)
        scores[p] = 1.0 - ((distance <= distance[p]).sum() - 1) / len(real)
    return scores


def spearman_brown(half: float) -> float:
    r"""Reliability of a whole from the correlation of halves, :math:`2r/(1+r)` (Spearman, Brown 1910)."""
    if half <= -1.0:
        raise Undefined("the halves correlate with -1")
    return 2.0 * half / (1.0 + half)


def ratio_of_means(predicted: np.ndarray, real: np.ndarray) -> float:
    """Mean counts of the predicted over those of the real cells, both (cell,); 1 is right."""
    if not real.any():
        raise Undefined("the real cells hold no counts")
    return float(np.mean(predicted, dtype=np.float64) / np.mean(real, dtype=np.float64))


def zero_fraction_difference(predicted_counts, real_counts) -> float:
    """Share of zeros in the predicted minus that in the real (cell, gene) counts; 0 is right."""
    nonzero = [(counts != 0).sum() / np.prod(counts.shape) for counts in (predicted_counts, real_counts)]
    return float(nonzero[1] - nonzero[0])
