"""Which genes to model: the most variable ones, chosen on training cells."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from anndata import AnnData
from scipy import sparse

from ..errors import LabelError, checked, did_you_mean
from ..packages import same_threads
from .contract import count_slot, counts, keys_of
from .on_disk import RowReader, is_on_disk
from .splits import rows_of

MAX_CELLS = 20_000
"""Cells on which genes are chosen where the counts lie on disk."""

TARGET_SUM = 1e4


@checked
@same_threads()
def select_genes(
    adata: AnnData,
    n_genes: int = 1000,
    *,
    flavor: str = "pearson_residuals",
    min_cells: int = 1,
    split: str | None = "train",
) -> list[str]:
    """Names of highly variable genes, chosen on training cells only: genes chosen with held-out cells in view leak
    their response.

    Parameters
    ----------
    adata
        A screen that was set up; nothing is written to it.
    n_genes
        How many; all that are left where there are fewer. Of more than 20,000 cells so many random ones rank them.
    flavor
        What genes are ranked by, as in scanpy's ``highly_variable_genes``: ``"pearson_residuals"``, the variance of
        their Pearson residuals (Lause et al.), or ``"seurat"``, the dispersion of log1p-CP10k within bins of the mean
        (Satija et al.), with which published hold-outs are made. On interferon-treated PBMC 1000 genes by the first
        hold 68 of the 100 most changed genes, by the second 25.
    min_cells
        Genes counted in fewer of the chosen cells are set aside before.
    split
        Use the cells of this split; None for all cells.

    Returns
    -------
    list of str
        In the order of `var_names`.

    Raises
    ------
    ModelError
        For a number of genes or cells that cannot be.
    LabelError
        If the data were not set up, the flavor is unknown, or `split` has no cells.

    References
    ----------
    Lause, Berens & Kobak, Genome Biol. 22:258 (2021); Satija et al., Nat. Biotechnol. 33:495 (2015).
    """
    if flavor not in FLAVORS:
        expected = f"a flavor of {sorted(FLAVORS)}"
        raise LabelError(expected, repr(flavor), did_you_mean(flavor, FLAVORS))
    rows = np.arange(adata.n_obs) if split is None else rows_of(adata, split)
    matrix = _counts_of(adata, rows)
    seen = np.flatnonzero(matrix.getnnz(axis=0) >= max(min_cells, 1))
    names = adata.var_names[seen]
    if len(seen) > n_genes:
        names = names[FLAVORS[flavor](AnnData(matrix[:, seen]), n_genes)]
    return [str(name) for name in names]


def _counts_of(adata: AnnData, rows: np.ndarray) -> sparse.csr_matrix:
    """Raw counts (cell, gene) of the cells, float32; of a sample where they are many."""
    layer = keys_of(adata).layer
    if len(rows) > MAX_CELLS:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:MAX_CELLS])
    if is_on_disk(count_slot(adata, layer)):
        matrix = RowReader(count_slot(adata, layer)).read(rows)
    else:
        matrix = counts(adata[rows], layer)
    matrix = sparse.csr_matrix(matrix, dtype=np.float32)
    matrix.eliminate_zeros()
    return matrix


def _by_pearson_residuals(cells: AnnData, n_genes: int) -> np.ndarray:
    import scanpy as sc

    cells = cells[np.asarray(cells.X.sum(axis=1)).ravel() > 0].copy()
    sc.experimental.pp.highly_variable_genes(cells, n_top_genes=n_genes, flavor="pearson_residuals")
    return cells.var["highly_variable"].to_numpy()


def _by_dispersion(cells: AnnData, n_genes: int) -> np.ndarray:
    import scanpy as sc

    sc.pp.normalize_total(cells, target_sum=TARGET_SUM)
    sc.pp.log1p(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=n_genes, flavor="seurat")
    rank = np.argsort(-np.nan_to_num(cells.var["dispersions_norm"].to_numpy()), kind="stable")
    chosen = np.zeros(cells.n_vars, dtype=bool)
    chosen[rank[:n_genes]] = True  # where several tie, its own column holds more
    return chosen


FLAVORS: dict[str, Callable[[AnnData, int], np.ndarray]] = {
    "pearson_residuals": _by_pearson_residuals,
    "seurat": _by_dispersion,
}
