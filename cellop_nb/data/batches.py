"""From AnnData to counts that give minibatches, in memory or on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ..errors import DataError, LabelError, did_you_mean, three_beats
from .contract import block_check, check_values, count_slot, counts, keys_of, library_size, obs_labels
from .matrices import CountBatch, CountLoader, CountMatrix
from .on_disk import DiskCounts, is_on_disk

__all__ = [
    "CountBatch",
    "CountLoader",
    "CountMatrix",
    "category_codes",
    "count_matrix",
    "covariate_categories",
    "gene_positions",
]


TOTAL_KEY = "total_counts"
"""Column of ``obs`` with the counts of all measured genes, as scanpy's ``calculate_qc_metrics`` names it."""


def count_matrix(
    adata: AnnData,
    *,
    genes: Sequence[str] | None = None,
    covariate_keys: Sequence[str] = (),
    categories: Mapping[str, Sequence[str]] | None = None,
    total_key: str | None = None,
    checked: bool = False,
) -> CountMatrix | DiskCounts:
    """Counts of `adata` ready for minibatches.

    Parameters
    ----------
    genes
        Gene names to keep, in this order; None for all.
    covariate_keys
        Columns of `obs` that become category codes.
    categories
        Known categories per covariate, as :func:`covariate_categories` gives them for the training data.
    total_key
        Column of `obs` with each cell's counts over all measured genes. What the chosen genes leave of it becomes
        the last column of the counts.
    checked
        Refuse values that are no raw counts: at once in memory, those on disk whenever they are read.

    Raises
    ------
    DataError, LabelError
        If genes, columns or categories are unknown, or totals are smaller than the counts of the chosen genes.
    """
    layer = keys_of(adata).layer
    if checked and not is_on_disk(count_slot(adata, layer)):
        check_values(adata, layer)
    by_key = categories or covariate_categories(adata, covariate_keys)
    codes = {key: category_codes(adata, key, by_key[key]) for key in covariate_keys}
    positions = None if genes is None else gene_positions(adata, genes)
    slot = count_slot(adata, layer)
    if is_on_disk(slot):
        check = block_check(adata, layer) if checked else None
        disk = DiskCounts(slot, genes=positions, covariates=codes, check=check)
        return disk if total_key is None else disk.with_rest(_other_genes(adata, disk.sums, total_key))
    matrix = counts(adata, layer)
    matrix = matrix if positions is None else matrix[:, positions]
    if total_key is not None:
        rest = _other_genes(adata, np.asarray(matrix.sum(1), dtype=np.float64).ravel(), total_key)
        matrix = sparse.hstack([sparse.csr_matrix(matrix), sparse.csr_matrix(rest[:, None])], "csr")
    return CountMatrix(matrix, covariates=codes)


def model_counts(adata: AnnData, model) -> CountMatrix | DiskCounts:
    """Counts of the genes and covariates that `model` (``.genes``, ``.covariates``) was made for, of all cells.

    Raises
    ------
    DataError, LabelError
        If genes are missing, a covariate has a category that the model does not know, or the values are no raw
        counts.
    """
    return count_matrix(
        adata,
        genes=model.genes,
        covariate_keys=list(model.covariates),
        categories=model.covariates,
        total_key=model.total_key,
        checked=True,
    )


def measured_totals(adata: AnnData) -> np.ndarray | None:
    """Counts (cell,) over all measured genes, as ``obs["total_counts"]`` tells; None where nothing tells."""
    return adata.obs[TOTAL_KEY].to_numpy(np.float64) if TOTAL_KEY in adata.obs else None


def has_other_genes(adata: AnnData) -> bool:
    """Whether ``obs["total_counts"]`` says that genes were measured which `adata` no longer has."""
    if TOTAL_KEY not in adata.obs:
        return False
    return bool(_other_genes(adata, library_size(adata, keys_of(adata).layer), TOTAL_KEY).any())


def _other_genes(adata: AnnData, sums: np.ndarray, total_key: str) -> np.ndarray:
    """(cell,) counts of the genes that are not kept: the totals in `obs` less the sums (cell,) of those that are."""
    if total_key not in adata.obs:
        expected = f"each cell's counts over all genes in obs[{total_key!r}], as the model was trained with"
        fix = f"set adata.obs[{total_key!r}] = adata.X.sum(1) before genes are left out"
        raise LabelError(three_beats(expected, "no such column", fix))
    total = pd.to_numeric(adata.obs[total_key], errors="coerce").to_numpy(np.float64)
    rest = total - sums
    wrong = ~(rest > -0.5)  # NaN too; half a count forgives rounding
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        found = f"{total[row]:g} against {total[row] - rest[row]:g} counts in cell {adata.obs_names[row]!r}"
        fix = "set the column to the counts of all genes, or pass total_key=None"
        raise DataError(
            three_beats(f"totals in obs[{total_key!r}] of at least the cell's counts", found, fix)
        )
    return np.maximum(rest, 0.0).astype(np.float32)


def gene_positions(adata: AnnData, genes: Sequence[str]) -> np.ndarray:
    """Columns of the named genes, (gene,); refuses names that `adata` lacks."""
    positions = adata.var_names.get_indexer(list(genes))
    missing = [gene for gene, position in zip(genes, positions, strict=True) if position < 0]
    if missing:
        found = f"{len(missing)} of {len(genes)} missing, such as {missing[:3]}"
        fix = f"use data with the same genes and names ({did_you_mean(missing[0], adata.var_names)})"
        raise DataError(three_beats("all genes of the model in var_names", found, fix))
    return positions


def covariate_categories(adata: AnnData, keys: Sequence[str]) -> dict[str, list[str]]:
    """Sorted categories of each column of `obs`."""
    return {key: sorted(obs_labels(adata, key).unique()) for key in keys}


def category_codes(adata: AnnData, key: str, categories: Sequence[str]) -> np.ndarray:
    """Codes of `obs[key]` among `categories`, (cell,) int64; an unknown label is refused, never coded 0."""
    labels = obs_labels(adata, key)
    codes = pd.Index(categories).get_indexer(labels)
    if (codes < 0).any():
        unknown = labels[codes < 0].iloc[0]
        fix = f"use cells with known labels ({did_you_mean(unknown, categories)})"
        raise LabelError(three_beats(f"labels of obs[{key!r}] seen in training", repr(unknown), fix))
    return codes.astype(np.int64)
