"""The metrics of perturbation prediction on plain arrays, one function each, and the space they are computed in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse

from ..data.contract import counts as raw_counts
from ..data.contract import keys_of, library_size
from ..data.counts import measured_totals
from ..data.genes import TARGET_SUM
from ..errors import CellopError, DataError, LabelError, did_you_mean
from ..models.energy import energy_distance

__all__ = [
    "classifier_auc",
    "coefficient_of_determination",
    "de_score",
    "direction_match",
    "e_distance",
    "l2_top_expressed",
    "lfc_spearman",
    "mae",
    "pearson_delta",
    "perturbation_discrimination",
    "precision_at_k",
    "ratio_of_means",
    "replicate_share",
    "rmse",
    "spearman_brown",
    "squared_pearson",
    "variance_ratio",
    "zero_error",
    "zero_fraction_difference",
]

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


def precision_at_k(predicted_lfc, predicted_significant, real_lfc, real_significant, k: int = 50) -> float:
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
    k = min(k, len(top))
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


def zero_error(predicted_counts, real_counts, genes) -> float:
    """Mean over `genes` of the absolute difference between the shares of cells that count none; (cell, gene) counts."""
    zeros = []
    for counts in (predicted_counts[:, genes], real_counts[:, genes]):
        zeros.append(1 - np.asarray((counts != 0).sum(axis=0), dtype=np.float64).ravel() / counts.shape[0])
    return float(np.abs(zeros[0] - zeros[1]).mean())


def variance_ratio(predicted: np.ndarray, real: np.ndarray, genes) -> float:
    """Median over `genes` of the variance of the predicted over that of the real cells (cell, gene); 1 is right.

    Decoded means have too little variance, cells of the wrong kinds too much.
    """
    if min(len(predicted), len(real)) < 2:
        raise Undefined("a variance needs two cells a side")
    spread = [np.var(cells[:, genes], axis=0, ddof=1, dtype=np.float64) for cells in (predicted, real)]
    there = spread[1] > CONSTANT
    if not there.any():
        raise Undefined("the real cells do not vary in these genes")
    return float(np.median(spread[0][there] / spread[1][there]))


def classifier_auc(predicted: np.ndarray, real: np.ndarray, n_folds: int = 5) -> float:
    r"""How well a logistic regression tells predicted from real cells: area under the curve, left-out folds pooled.

    1/2 where they cannot be told apart, 1 where they always can. Both sides have as many cells.

    Parameters
    ----------
    predicted, real : (cell, component)
        Principal components.

    References
    ----------
    Lopez-Paz and Oquab 2017, Revisiting classifier two-sample tests, ICLR.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = min(len(predicted), len(real))
    if n < 2 * n_folds:
        raise Undefined(f"{n} cells a side are too few for {n_folds} folds")
    cells, side = np.concatenate([predicted[:n], real[:n]]), np.repeat([1, 0], n)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=0)
    return float(
        roc_auc_score(side, cross_val_predict(model, cells, side, cv=folds, method="decision_function"))
    )


def replicate_share(value: float, baseline: float, floor: float) -> float:
    r"""Where an energy distance lies between the best simple baseline (0) and another half of the real cells (1).

    .. math:: (b - v) / (b - f)
    """
    return (baseline - value) / (baseline - floor)


def log1p_cp10k(counts, library: np.ndarray | None = None):
    r"""Scale every cell to 10,000 counts and take the logarithm, :math:`\log(1 + 10^4\, x / l)`; an empty cell stays 0.

    Parameters
    ----------
    counts : (cell, gene), sparse or dense
    library : (cell,), optional
        Counts over all measured genes; those of the given genes by default.

    Returns
    -------
    (cell, gene) float32, sparse where the counts are.
    """
    if library is None:
        library = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    scale = TARGET_SUM / np.where(library > 0, library, 1.0)
    if sparse.issparse(counts):
        csr = sparse.csr_matrix(counts)
        if not csr.has_canonical_format:  # counts in parts would have the logarithm of each
            csr = csr.copy() if csr is counts else csr
            csr.sum_duplicates()
        level = np.log1p(csr.data * np.repeat(scale, np.diff(csr.indptr))).astype(np.float32)
        return sparse.csr_matrix((level, csr.indices, csr.indptr), csr.shape)
    return np.log1p(np.asarray(counts) * scale[:, None]).astype(np.float32)


MOST_CELLS = 10_000
"""Cells that principal components are fitted to."""


@dataclass(frozen=True, eq=False)
class EvaluationSpace:
    """log1p-CP10k of `genes`, and its principal components.

    Attributes
    ----------
    genes : (gene,) names
    centre : (gene,) mean of the training cells
    components : (component, gene) orthonormal rows
    n_cells : training cells behind the components: at most 10,000, a seeded sample of more
    all_measured : whether 10,000 is the sum over all measured genes, as most packages normalise, or over `genes`
    """

    genes: np.ndarray
    centre: np.ndarray = field(repr=False)
    components: np.ndarray = field(repr=False)
    n_cells: int
    all_measured: bool = False

    @classmethod
    def fit(
        cls,
        training: AnnData,
        *,
        genes: Sequence[str] | None = None,
        n_components: int = 20,
        all_measured: bool = False,
        seed: int = 0,
    ) -> EvaluationSpace:
        """Fit the principal components on training cells only (fewer than `n_components` where rank is short)."""
        from sklearn.decomposition import PCA

        names = np.asarray(training.var_names if genes is None else list(genes), dtype=object)
        if training.n_obs < 3:
            problem = f"{training.n_obs}"
            raise DataError("at least 3 training cells", problem, "loosen the hold-out")
        if training.n_obs > MOST_CELLS:
            rows = np.random.default_rng([seed, 4]).permutation(training.n_obs)[:MOST_CELLS]
            training = training[np.sort(rows)]
        library = _totals(training) if all_measured else None
        cells = _dense(log1p_cp10k(_select(training, names), library)).astype(np.float64)
        rank = min(n_components, len(cells) - 1, len(names))
        # exact where the gene x gene matrix is small; the solver would otherwise change with the number of
        # cells
        solver = "covariance_eigh" if len(names) <= 2000 else "auto"
        pca = PCA(rank, svd_solver=solver, random_state=seed).fit(cells)
        return cls(names, pca.mean_, pca.components_, len(cells), all_measured)

    def select(self, adata: AnnData, slot: str | None = None):
        """Raw counts (cell, gene) of the genes of this space, in its order; a missing gene is refused.

        They are taken from ``X`` where `slot` says so, as predicted cells have them, else from where the screen was
        set up.
        """
        return _select(adata, self.genes, slot)

    def cells(self, adata: AnnData) -> np.ndarray:
        """Cells of a screen that was set up, (cell, gene) log1p-CP10k, float32."""
        return self.transform(self.select(adata), _totals(adata) if self.all_measured else None)

    def transform(self, counts, library: np.ndarray | None = None) -> np.ndarray:
        """Raw counts (cell, gene) over the genes of this space to log1p-CP10k, float32; `library` (cell,) their sum."""
        if counts.shape[1] != len(self.genes):
            problem = f"{counts.shape[1]} columns"
            raise DataError(f"counts of {len(self.genes)} genes", problem, "use space.select(adata)")
        return _dense(log1p_cp10k(counts, library))

    def project(self, cells: np.ndarray) -> np.ndarray:
        """log1p-CP10k cells (cell, gene), sparse or dense, to principal components (cell, component), float64."""
        if sparse.issparse(cells):
            return cells.astype(np.float64) @ self.components.T - self.centre @ self.components.T
        return (np.asarray(cells, dtype=np.float64) - self.centre) @ self.components.T


def _select(adata: AnnData, genes: np.ndarray, slot: str | None = None):
    column = adata.var_names.get_indexer(genes)
    if (column < 0).any():
        missing = [str(gene) for gene in genes[column < 0]]
        hint = did_you_mean(missing[0], adata.var_names)
        problem = f"{len(missing)} missing, first {missing[:5]} ({hint})"
        raise LabelError(f"the {len(genes)} genes of the evaluation", problem, "give data with these genes")
    counts = raw_counts(adata, None if slot == "X" else keys_of(adata).layer)
    return counts[:, column]


def _totals(adata: AnnData) -> np.ndarray:
    """Counts (cell,) over all measured genes."""
    totals = measured_totals(adata)
    return library_size(adata, keys_of(adata).layer) if totals is None else totals


def _dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)
