"""Where predictions are scored: log1p-CP10k over fixed genes, and components of the training cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from anndata import AnnData
from scipy import sparse

from ..data.contract import counts as raw_counts
from ..data.contract import keys_of
from ..data.genes import TARGET_SUM
from ..errors import DataError, LabelError, did_you_mean, three_beats


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
        return sparse.csr_matrix(sparse.diags(scale) @ counts).log1p().astype(np.float32)
    return np.log1p(np.asarray(counts) * scale[:, None]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class EvaluationSpace:
    """log1p-CP10k over `genes` (library size over these genes too), and its principal components.

    Attributes
    ----------
    genes : (gene,) names
    centre : (gene,) mean of the training cells
    components : (component, gene) orthonormal rows
    n_cells : training cells behind it
    """

    genes: np.ndarray
    centre: np.ndarray = field(repr=False)
    components: np.ndarray = field(repr=False)
    n_cells: int

    @classmethod
    def fit(
        cls,
        training: AnnData,
        *,
        genes: Sequence[str] | None = None,
        n_components: int = 20,
        seed: int = 0,
    ) -> EvaluationSpace:
        """Fit the principal components on training cells only (fewer than `n_components` where rank is
        short).

        Raises
        ------
        LabelError
            A gene is not in the data.
        DataError
            Fewer than three cells.
        """
        from sklearn.decomposition import PCA

        names = np.asarray(training.var_names if genes is None else list(genes), dtype=object)
        if training.n_obs < 3:
            problem = f"{training.n_obs}"
            raise DataError(three_beats("at least 3 training cells", problem, "loosen the hold-out"))
        cells = _dense(log1p_cp10k(_select(training, names))).astype(np.float64)
        rank = min(n_components, len(cells) - 1, len(names))
        # exact where the gene x gene matrix is small; the solver would otherwise change with the number of
        # cells
        solver = "covariance_eigh" if len(names) <= 2000 else "auto"
        pca = PCA(rank, svd_solver=solver, random_state=seed).fit(cells)
        return cls(names, pca.mean_, pca.components_, len(cells))

    def select(self, adata: AnnData, slot: str | None = None):
        """Raw counts (cell, gene) of the genes of this space, in its order; a missing gene is refused.

        They are taken from ``X`` where `slot` says so, as predicted cells have them, else from where the screen was
        set up.
        """
        return _select(adata, self.genes, slot)

    def transform(self, counts) -> np.ndarray:
        """Raw counts (cell, gene) over the genes of this space to log1p-CP10k, float32."""
        if counts.shape[1] != len(self.genes):
            problem = f"{counts.shape[1]} columns"
            raise DataError(
                three_beats(f"counts of {len(self.genes)} genes", problem, "use space.select(adata)")
            )
        return _dense(log1p_cp10k(counts))

    def project(self, cells: np.ndarray) -> np.ndarray:
        """log1p-CP10k cells (cell, gene) to principal components (cell, component), float64."""
        return (np.asarray(cells, dtype=np.float64) - self.centre) @ self.components.T


def _select(adata: AnnData, genes: np.ndarray, slot: str | None = None):
    column = adata.var_names.get_indexer(genes)
    if (column < 0).any():
        missing = [str(gene) for gene in genes[column < 0]]
        hint = did_you_mean(missing[0], adata.var_names)
        problem = f"{len(missing)} missing, first {missing[:5]} ({hint})"
        raise LabelError(
            three_beats(f"the {len(genes)} genes of the evaluation", problem, "give data with these genes")
        )
    counts = raw_counts(adata, None if slot == "X" else keys_of(adata).layer)
    return counts[:, column]


def _dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)
