"""Tensors for training: minibatches of counts straight from CSR (groups of latents come from `groups`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from ..errors import DataError, LabelError, did_you_mean, three_beats
from .checks import check_values
from .contract import counts, obs_labels
from .groups import Group, Groups, GroupSample, groups

__all__ = [
    "CountBatch",
    "CountLoader",
    "CountMatrix",
    "Group",
    "GroupSample",
    "Groups",
    "category_codes",
    "count_matrix",
    "covariate_categories",
    "gene_positions",
    "groups",
]


TOTAL_KEY = "total_counts"
"""Column of ``obs`` with the counts of all measured genes, as scanpy's ``calculate_qc_metrics`` names it."""


@dataclass(frozen=True)
class CountBatch:
    """Some cells' counts, dense and by their non-zeros.

    Attributes
    ----------
    x : Tensor
        Counts, (cell, gene) float32.
    library : Tensor
        Library sizes, (cell,) float32, at least 1.
    index : Tensor
        Rows of the cells in the AnnData object, (cell,) int64.
    covariates : dict
        Category codes per covariate, (cell,) int64 each.
    indptr, columns, values : Tensor
        The non-zeros of `x` in CSR form: (cell + 1,) int64, (nonzero,) int64, (nonzero,) float32.
    flat : Tensor
        Positions of the non-zeros in `x.view(-1)`, (nonzero,) int64.
    """

    x: Tensor
    library: Tensor
    index: Tensor
    covariates: dict[str, Tensor]
    indptr: Tensor
    columns: Tensor
    values: Tensor
    flat: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> CountBatch:
        """The same batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(
            self, **moved, covariates={key: code.to(device) for key, code in self.covariates.items()}
        )


class CountMatrix:
    """Counts of all cells in CSR form, from which any rows come out as a :class:`CountBatch`.

    Parameters
    ----------
    matrix
        Counts, (cell, gene), sparse or dense.
    library
        Library sizes (cell,); by default the counts of each cell summed over the genes of `matrix`.
    covariates
        Category codes per covariate, (cell,) each.
    """

    def __init__(self, matrix, *, library=None, covariates: Mapping[str, np.ndarray] | None = None) -> None:
        csr = _canonical(matrix)
        self.csr = csr.astype(np.float32, copy=False)
        self.shape = csr.shape
        sums = csr.sum(axis=1) if library is None else library
        # A cell that is empty on the chosen genes still needs a finite log library.
        self.library = torch.from_numpy(np.maximum(np.asarray(sums, dtype=np.float32).ravel(), 1.0))
        self.covariates = {
            key: torch.as_tensor(code, dtype=torch.int64) for key, code in (covariates or {}).items()
        }

    def __len__(self) -> int:
        return self.shape[0]

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> CountBatch:
        """Cells `rows` (cell,) as tensors on `device`; only the non-zeros travel there."""
        part = self.csr[rows]
        columns = torch.from_numpy(part.indices.astype(np.int64)).to(device)
        values = torch.from_numpy(part.data).to(device)
        indptr = torch.from_numpy(part.indptr.astype(np.int64)).to(device)
        starts = torch.arange(len(rows), device=device) * self.shape[1]
        flat = columns + torch.repeat_interleave(starts, indptr.diff(), output_size=len(columns))
        x = torch.zeros(len(rows) * self.shape[1], device=device).scatter_(0, flat, values)
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        return CountBatch(
            x=x.view(len(rows), self.shape[1]),
            library=self.library[index].to(device),
            index=index.to(device),
            covariates={key: code[index].to(device) for key, code in self.covariates.items()},
            indptr=indptr,
            columns=columns,
            values=values,
            flat=flat,
        )


class CountLoader:
    """Seeded minibatches of counts; each pass visits every chosen cell exactly once.

    Parameters
    ----------
    matrix
        The counts of all cells.
    rows
        The cells to visit, (cell,) integers or a boolean mask; by default all.
    batch_size
        Cells per minibatch; the last one may be smaller, and is dropped only with `drop_last`.
    shuffle
        Draw a new order on each pass from `generator`.
    generator
        Source of the order; its state is all that a resumed run needs.
    device
        Where the tensors go.
    """

    def __init__(
        self,
        matrix: CountMatrix,
        rows: np.ndarray | None = None,
        *,
        batch_size: int = 256,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.matrix, self.batch_size, self.shuffle, self.drop_last = (
            matrix,
            int(batch_size),
            shuffle,
            drop_last,
        )
        if self.batch_size < 1:
            raise DataError(
                three_beats("batch_size of at least 1", str(batch_size), "pass a positive number")
            )
        self.rows = _rows(rows, len(matrix))
        self.generator = generator or torch.Generator().manual_seed(0)
        self.device = device

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[CountBatch]:
        rows = self.rows
        if self.shuffle:
            rows = rows[torch.randperm(len(rows), generator=self.generator).numpy()]
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self.matrix.batch(rows[start : start + self.batch_size], self.device)


def count_matrix(
    adata: AnnData,
    *,
    layer: str | None = None,
    genes: Sequence[str] | None = None,
    covariate_keys: Sequence[str] = (),
    categories: Mapping[str, Sequence[str]] | None = None,
    total_key: str | None = None,
) -> CountMatrix:
    """Counts of `adata` ready for minibatches.

    Parameters
    ----------
    layer
        Layer of raw counts; None for `X`.
    genes
        Gene names to keep, in this order; None for all.
    covariate_keys
        Columns of `obs` that become category codes.
    categories
        Known categories per covariate, as :func:`covariate_categories` gives them for the training data.
    total_key
        Column of `obs` with each cell's counts over all measured genes. What the chosen genes leave of it becomes
        the last column of the counts.

    Raises
    ------
    DataError, LabelError
        If genes, columns or categories are unknown, or totals are smaller than the counts of the chosen genes.
    """
    matrix = counts(adata, layer)
    if genes is not None:
        matrix = matrix[:, gene_positions(adata, genes)]
    known = categories or covariate_categories(adata, covariate_keys)
    codes = {key: category_codes(adata, key, known[key]) for key in covariate_keys}
    if total_key is not None:
        matrix = sparse.hstack([sparse.csr_matrix(matrix), _other_genes(adata, matrix, total_key)], "csr")
    return CountMatrix(matrix, covariates=codes)


def model_counts(adata: AnnData, model, *, layer: str | None = None) -> CountMatrix:
    """Counts of the genes and covariates that `model` (``.genes``, ``.covariates``) was made for, of all cells.

    Raises
    ------
    DataError, LabelError
        If genes are missing, a covariate has a category that the model does not know, or the values are no raw
        counts.
    """
    known = model.covariates
    check_values(adata, layer)
    return count_matrix(
        adata,
        layer=layer,
        genes=model.genes,
        covariate_keys=list(known),
        categories=known,
        total_key=model.total_key,
    )


def has_other_genes(adata: AnnData, *, layer: str | None = None, total_key: str = TOTAL_KEY) -> bool:
    """Whether ``obs[total_key]`` says that genes were measured which `adata` no longer has."""
    return total_key in adata.obs and bool(_other_genes(adata, counts(adata, layer), total_key).nnz)


def _other_genes(adata: AnnData, matrix, total_key: str) -> sparse.csr_matrix:
    """(cell, 1) counts of the genes outside `matrix`: the totals in `obs` less its row sums."""
    if total_key not in adata.obs:
        expected = f"each cell's counts over all genes in obs[{total_key!r}], as the model was trained with"
        fix = f"set adata.obs[{total_key!r}] = adata.X.sum(1) before genes are left out"
        raise LabelError(three_beats(expected, "no such column", fix))
    total = pd.to_numeric(adata.obs[total_key], errors="coerce").to_numpy(np.float64)
    rest = total - np.asarray(matrix.sum(1), dtype=np.float64).ravel()
    wrong = ~(rest > -0.5)  # NaN too; half a count forgives rounding
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        found = f"{total[row]:g} against {total[row] - rest[row]:g} counts in cell {adata.obs_names[row]!r}"
        fix = "set the column to the counts of all genes, or pass total_key=None"
        raise DataError(
            three_beats(f"totals in obs[{total_key!r}] of at least the cell's counts", found, fix)
        )
    return sparse.csr_matrix(np.maximum(rest, 0.0).astype(np.float32)[:, None])


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


def _canonical(matrix) -> sparse.csr_matrix:
    """CSR without duplicate or zero entries; the caller's matrix is left as it is."""
    csr = sparse.csr_matrix(matrix)
    if not csr.has_canonical_format or (csr.data == 0).any():
        csr = csr.copy()
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return csr


def _rows(rows: np.ndarray | None, n_cells: int) -> np.ndarray:
    if rows is None:
        return np.arange(n_cells)
    rows = np.asarray(rows)
    rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
    if not len(rows):
        raise DataError(three_beats("at least one cell", "none", "check the split or the mask"))
    return rows
