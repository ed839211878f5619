"""Counts of many cells, in memory, on disk or on a GPU, and minibatches of them as tensors, straight from CSR."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from ..errors import DataError, LabelError, did_you_mean
from ..models.likelihood import SparseCounts
from .contract import (
    block_check,
    cell_sums,
    check_names,
    check_values,
    count_slot,
    counts,
    keys_of,
    library_size,
    obs_column,
    obs_labels,
)
from .on_disk import PASS, RowReader, is_on_disk


@dataclass(frozen=True)
class CountBatch:
    """Some cells' counts by their non-zeros, and dense where asked.

    Attributes
    ----------
    n_genes : int
        Number of genes.
    library : Tensor
        Library sizes, (cell,) float32, at least 1.
    index : Tensor
        Rows of the cells in the AnnData object, (cell,) int64.
    covariates : dict
        Category codes per covariate, (cell,) int64 each.
    indptr, columns, values : Tensor
        The non-zeros in CSR form: (cell + 1,) int64, (nonzero,) int64, (nonzero,) float32.
    """

    n_genes: int
    library: Tensor
    index: Tensor
    covariates: dict[str, Tensor]
    indptr: Tensor
    columns: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """(cells, genes)."""
        return len(self.index), self.n_genes

    @property
    def counts(self) -> SparseCounts:
        """The non-zeros as encoder and likelihood visit them."""
        return SparseCounts.of(self)

    @cached_property
    def x(self) -> Tensor:
        """Counts, (cell, gene) float32."""
        return self.counts.spread(self.values)


class CountMatrix:
    """Counts of all cells, in memory or in a file, from which any rows come out as a :class:`CountBatch`.

    `source` has the counts (cell, gene): sparse or dense, or the :class:`RowReader` of a file; `covariates` the category
    codes of each, (cell,). `csr` has them in memory, None where they lie in a file.
    """

    def __init__(self, source, *, covariates: Mapping[str, np.ndarray | Tensor] | None = None) -> None:
        self.reader = source if isinstance(source, RowReader) else None
        self.csr: Any = None if self.reader else _canonical(source)
        self.shape: tuple[int, int] = source.shape
        codes = covariates or {}
        self.covariates = {key: torch.as_tensor(code, dtype=torch.int64) for key, code in codes.items()}

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def sums(self) -> np.ndarray:
        """(cell,) float64 counts of each cell; of a file made in one pass, when they are first asked for."""
        return np.concatenate([cell_sums(part) for _, part in self.blocks(np.arange(len(self)))])

    @cached_property
    def library(self) -> Tensor:
        """(cell,) float32 library sizes, at least 1; from :attr:`sums`."""
        return _library(self.sums)

    def with_rest(self, rest: np.ndarray) -> CountMatrix:
        """The same counts with a last column `rest` (cell,): what the genes kept leave of each cell's total."""
        if self.reader is None:
            more = CountMatrix(sparse.hstack([self.csr, sparse.csr_matrix(rest[:, None])], "csr"))
        else:
            more = CountMatrix(self.reader.with_rest(rest))
        more.covariates, more.sums = self.covariates, self.sums + rest
        return more

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Cells `rows` (cell,) in memory, in this order: (cell, gene) float32."""
        return self.csr[rows] if self.reader is None else _canonical(self.reader.read(rows))

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Cut `rows` (cell,) into parts, each with its counts in memory (cell, gene)."""
        for start in range(0, len(rows), PASS):
            part = rows[start : start + PASS]
            yield part, self.read(part)

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> CountBatch:
        """Cells `rows` (cell,) as tensors on `device`; only the non-zeros travel there."""
        return self._sent(self.read(rows), np.asarray(rows), device)

    def batches(self, parts: Sequence[np.ndarray], device: torch.device | str) -> Iterator[CountBatch]:
        """A batch of each part; of a file all are read together, and none is held when the next ones are read."""
        if self.reader is None:
            yield from (self.batch(rows, device) for rows in parts)
            return
        held, end = self.read(np.concatenate(parts)), 0
        for rows in parts:
            yield self._sent(held[end : (end := end + len(rows))], rows, device)

    def _sent(self, counts: sparse.csr_matrix, rows: np.ndarray, device: torch.device | str) -> CountBatch:
        index = torch.from_numpy(rows.astype(np.int64))
        library = self.library[index] if self.reader is None else _library(cell_sums(counts))
        return CountBatch(
            n_genes=self.shape[1],
            library=sent(library, device),
            index=sent(index, device),
            covariates={key: sent(code[index], device) for key, code in self.covariates.items()},
            indptr=sent(torch.from_numpy(counts.indptr.astype(np.int64)), device),
            columns=sent(torch.from_numpy(counts.indices.astype(np.int64)), device),
            values=sent(torch.from_numpy(counts.data), device),
        )


def _canonical(matrix) -> sparse.csr_matrix:
    """CSR float32 without duplicate or zero entries; the caller's matrix is left as it is."""
    csr = sparse.csr_matrix(matrix)
    if not csr.has_canonical_format or (csr.data == 0).any():
        csr = csr.copy()
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return csr.astype(np.float32, copy=False)


def _library(sums: np.ndarray) -> Tensor:
    # A cell that is empty on the chosen genes still needs a finite log library.
    return torch.from_numpy(np.maximum(sums.astype(np.float32), 1.0))


def sent(value: Tensor, device: torch.device | str) -> Tensor:
    """`value` on the device; to a GPU from pinned memory, so that the host does not wait until it is there."""
    if value.device.type == "cpu" and torch.device(device).type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


class CountLoader:
    """Seeded minibatches of counts; each pass visits every chosen cell exactly once.

    Parameters
    ----------
    matrix, rows
        The counts of all cells, and the cells to visit, (cell,); by default all.
    batch_size, shuffle, generator
        Cells per minibatch, the last of which may be smaller; whether each pass has a new order, drawn from the
        generator, whose state is all that a resumed run needs.
    device
        Where the tensors go.
    share
        (k, n): give out every n-th cell of each batch, from the k-th; n loaders with equal generators then share
        each pass. A last batch of fewer than n cells is left out.

    Attributes
    ----------
    order, joint_size
        How a pass is shuffled (of a file a chunked order is fast); cells of the whole batch that the last one given
        out is a share of.
    """

    def __init__(
        self,
        matrix: CountMatrix | ResidentCounts,
        rows: np.ndarray | None = None,
        *,
        batch_size: int = 256,
        shuffle: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.matrix, self.batch_size, self.share, self.joint_size = matrix, int(batch_size), share, 0
        self.shuffle, self.device = shuffle, device
        if self.batch_size < 1:
            fix = "pass a positive number"
            raise DataError("batch_size of at least 1", str(batch_size), fix)
        self.rows = np.arange(len(matrix)) if rows is None else rows.astype(np.int64)
        self.generator = generator or torch.Generator().manual_seed(0)
        self.order: Order = chunked_order() if matrix.reader else full_shuffle

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (rest >= self.share[1])

    def shares(self) -> list[tuple[int, np.ndarray]]:
        """Size of each whole batch of the next pass, and the rows of this loader's share of it."""
        rows, (first, step) = self.rows, self.share
        if self.shuffle:
            rows = rows[self.order(len(rows), self.generator).numpy()]
        joint = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return [(len(batch), batch[first::step]) for batch in joint[: len(self)]]

    def __iter__(self) -> Iterator[CountBatch]:
        shares = self.shares()
        size = max(1, (PART if self.shuffle else PASS) // self.batch_size)
        for start in range(0, len(shares), size):
            window = shares[start : start + size]
            batches: Iterator[Any] = self.matrix.batches([rows for _, rows in window], self.device)
            for (self.joint_size, _), batch in zip(window, batches, strict=True):
                yield batch


# A file is read fastest in runs of neighbouring rows, and a batch must be a random sample of all cells. Both are had by
# shuffling short blocks of rows, reading a window of many blocks at a time, and shuffling inside it.

Order = Callable[[int, torch.Generator], Tensor]
"""(number of rows, generator) to a permutation (row,)."""

PART = 16_384
"""Cells that a shuffled window of a file holds at a time: about 30 MB at 200 genes a cell."""

BLOCK = 64
"""Neighbouring cells that stay together on the way to a window."""


def full_shuffle(n: int, generator: torch.Generator) -> Tensor:
    """Every order of the rows alike likely."""
    return torch.randperm(n, generator=generator)


def chunked_order(block: int = BLOCK, window: int = PART) -> Order:
    """A shuffle that keeps `block` neighbouring rows together and mixes `window` rows: a file is read in runs."""

    def order(n: int, generator: torch.Generator) -> Tensor:
        blocks = torch.arange(n).split(block)
        shuffled = torch.cat([blocks[k] for k in torch.randperm(len(blocks), generator=generator)])
        parts = shuffled.split(window)
        return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])

    return order


# -- counts that stay on a GPU: a batch travels there as its rows, and is gathered on the spot --------------------------

SHARE = 0.25
"""Largest share of the device's free memory that the counts may take."""

_ROUND = 256
_BYTES = 8  # of a non-zero: its gene and its count


@dataclass(frozen=True)
class ResidentBatch:
    """Cells of counts that lie on a device: their rows (cell,) there, and the places for their non-zeros."""

    matrix: ResidentCounts
    index: Tensor
    room: int

    def __len__(self) -> int:
        return len(self.index)

    def padded(self) -> CountBatch:
        """The cells with their counts, and behind them one that holds what is left of the room: ones of gene 0.

        All shapes follow from the numbers of cells and places: the host knows them without asking the device.
        """
        return self.matrix.gather(self.index, self.room)

    def whole(self) -> CountBatch:
        """The cells with their counts, as :meth:`CountMatrix.batch` gives them."""
        return self.matrix.source.batch(self.index.cpu().numpy(), self.index.device)


class ResidentCounts:
    """Counts of all cells on a device, from which any rows come out as a :class:`ResidentBatch`."""

    def __init__(self, source: CountMatrix, device: torch.device | str) -> None:
        self.source, self.device, self.shape, self.reader = source, torch.device(device), source.shape, None
        csr = source.csr
        self.starts = torch.from_numpy(csr.indptr.astype(np.int64)).to(device)
        self.columns = torch.from_numpy(csr.indices.astype(np.int32)).to(device)
        self.values = torch.from_numpy(csr.data).to(device)
        self.library = source.library.to(device)
        self.covariates = {key: code.to(device) for key, code in source.covariates.items()}
        self._lengths = np.diff(csr.indptr)
        self._mean, self._spread = float(self._lengths.mean()), float(self._lengths.std())

    def __len__(self) -> int:
        return self.shape[0]

    def batch(self, rows: np.ndarray) -> ResidentBatch:
        """Cells `rows` (cell,), where the counts are."""
        index = sent(torch.from_numpy(np.asarray(rows, dtype=np.int64)), self.device)
        return ResidentBatch(self, index, self._room(rows))

    def batches(self, parts: Sequence[np.ndarray], device: torch.device | str) -> Iterator[ResidentBatch]:
        """A batch of each part."""
        return map(self.batch, parts)

    def gather(self, rows: Tensor, room: int) -> CountBatch:
        """:meth:`ResidentBatch.padded` of the cells `rows` (cell,)."""
        start = self.starts.index_select(0, rows)
        length = self.starts.index_select(0, rows + 1) - start
        ends = length.cumsum(0)
        position = torch.arange(room, device=self.device)
        cell = torch.searchsorted(ends, position, right=True)  # the number of cells where none is left
        shift = torch.cat([start - ends + length, start.new_zeros(1)]).index_select(0, cell)
        real = cell < len(rows)
        at = torch.where(real, position + shift, 0)
        return CountBatch(
            n_genes=self.shape[1],
            library=_with_one(self.library.index_select(0, rows)),
            index=torch.cat([rows, rows[:1]]),
            covariates={
                key: _with_one(code.index_select(0, rows), 0) for key, code in self.covariates.items()
            },
            indptr=torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), room)]),
            columns=torch.where(real, self.columns.index_select(0, at).long(), 0),
            values=torch.where(real, self.values.index_select(0, at), 1.0),
        )

    def _room(self, rows: np.ndarray) -> int:
        """Places for batches of so many cells: the same for all but one random batch in a million, or more."""
        cells = len(rows)
        usual = _rounded(
            min(cells * self._mean + 6 * self._spread * math.sqrt(cells), self._lengths.max() * cells)
        )
        needed = int(self._lengths[rows].sum())
        return usual if needed <= usual else _rounded(needed)


def resident(matrix: CountMatrix, device: torch.device) -> CountMatrix | ResidentCounts:
    """The counts on the device where it is a GPU that has the memory; else `matrix` as it is."""
    if matrix.reader or device.type != "cuda":
        return matrix
    free, _ = torch.cuda.mem_get_info(device)
    return ResidentCounts(matrix, device) if _BYTES * matrix.csr.nnz <= SHARE * free else matrix


def _rounded(places: float) -> int:
    return max(1, math.ceil(places / _ROUND)) * _ROUND


def _with_one(values: Tensor, last: int = 1) -> Tensor:
    return torch.cat([values, values.new_full((1,), last)])


# -- from AnnData to counts ---------------------------------------------------------------------------------------

TOTAL_KEY = "total_counts"
"""Column of ``obs`` with the counts of all measured genes, as scanpy's ``calculate_qc_metrics`` names it."""


def count_matrix(
    adata: AnnData,
    *,
    genes: Sequence[str] | None = None,
    covariates: Mapping[str, Sequence[str]] | None = None,
    total_key: str | None = None,
    checked: bool = False,
) -> CountMatrix:
    """Counts of `adata` ready for minibatches, of the named `genes` in their order, or of all.

    `covariates` are columns of `obs` that become codes of these categories, as :func:`covariate_categories` gives them.
    `total_key` is a column of each cell's counts over all measured genes: what the chosen genes leave of it becomes the
    last column. With `checked`, what is no raw count is refused: at once in memory, on disk whenever it is read.
    """
    layer = keys_of(adata).layer
    slot = count_slot(adata, layer)
    if checked and not is_on_disk(slot):
        check_values(adata, layer)
    codes = {key: category_codes(adata, key, levels) for key, levels in (covariates or {}).items()}
    columns = None if genes is None else gene_positions(adata, genes)
    if is_on_disk(slot):
        source = RowReader(slot, genes=columns, check=block_check(adata, layer) if checked else None)
    else:
        source = counts(adata, layer) if columns is None else counts(adata, layer)[:, columns]
    matrix = CountMatrix(source, covariates=codes)
    return matrix if total_key is None else matrix.with_rest(_other_genes(adata, matrix.sums, total_key))


def model_counts(adata: AnnData, model) -> CountMatrix:
    """Counts of all cells for the genes and covariates of `model` (``.genes``, ``.covariates``), checked."""
    kept, totals = model.covariates, model.total_key
    return count_matrix(adata, genes=model.genes, covariates=kept, total_key=totals, checked=True)


def require_in_memory(adata: AnnData) -> None:
    """Refuse counts on disk where many fits share them."""
    if is_on_disk(count_slot(adata, keys_of(adata).layer)):
        fix = "pass adata.to_memory(), or fewer cells: adata[chosen].to_memory()"
        raise DataError("counts in memory, for all fits", "counts that lie on disk", fix)


def measured_totals(adata: AnnData) -> np.ndarray | None:
    """Counts (cell,) over all measured genes, as ``obs["total_counts"]`` tells; None where nothing tells."""
    return _totals(adata, TOTAL_KEY) if TOTAL_KEY in adata.obs else None


def _totals(adata: AnnData, key: str) -> np.ndarray:
    """A column of totals, (cell,) float64; refuses what is no number."""
    column = obs_column(adata, key)
    total = pd.to_numeric(column.astype(str), errors="coerce").to_numpy(np.float64)
    wrong = ~np.isfinite(total)
    if wrong.any():
        problem = f"{str(column[wrong].iloc[0])!r} in cell {adata.obs_names[wrong][0]!r}"
        fix = "set the column to the counts of all genes, or delete it before training"
        raise DataError(f"numbers as totals in obs[{key!r}]", problem, fix)
    return total


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
        raise LabelError(expected, "no such column", fix)
    total = _totals(adata, total_key)
    rest = total - sums
    wrong = rest < -0.5  # half a count forgives rounding
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        problem = f"{total[row]:g} against {sums[row]:g} counts in cell {adata.obs_names[row]!r}"
        problem += "; these look like logarithms" if total.max() < 30 else ""
        fix = "set the column to the counts of all genes, or delete it before training"
        raise DataError(f"totals in obs[{total_key!r}] of at least the cell's counts", problem, fix)
    return np.maximum(rest, 0.0).astype(np.float32)


def gene_positions(adata: AnnData, genes: Sequence[str]) -> np.ndarray:
    """Columns of the named genes, (gene,); refuses names that `adata` lacks."""
    if not adata.var_names.is_unique:
        check_names(adata)
    positions = adata.var_names.get_indexer(list(genes))
    missing = [gene for gene, position in zip(genes, positions, strict=True) if position < 0]
    if missing:
        problem = f"{len(missing)} of {len(genes)} missing, such as {missing[:3]}"
        fix = f"use data with the same genes and names ({did_you_mean(missing[0], adata.var_names)})"
        raise DataError("all genes of the model in var_names", problem, fix)
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
        raise LabelError(f"labels of obs[{key!r}] seen in training", repr(unknown), fix)
    return codes.astype(np.int64)
