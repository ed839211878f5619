"""Counts of many cells, in memory, on disk or on a GPU, and minibatches of them as tensors, straight from CSR."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from ..errors import DataError, LabelError, did_you_mean, three_beats
from .contract import (
    block_check,
    check_names,
    check_values,
    count_slot,
    counts,
    keys_of,
    library_size,
    obs_column,
    obs_labels,
)
from .on_disk import PASS, Check, RowReader, is_on_disk

PART = 16_384
"""Cells that a shuffled window of a file holds at a time: about 30 MB at 200 genes a cell."""


Order = Callable[[int, torch.Generator], Tensor]
"""(number of rows, generator) to a permutation (row,)."""


def full_shuffle(n: int, generator: torch.Generator) -> Tensor:
    """Every order of the rows alike likely."""
    return torch.randperm(n, generator=generator)


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

    @cached_property
    def flat(self) -> Tensor:
        """Positions of the non-zeros in ``x.view(-1)``, (nonzero,) int64."""
        starts = torch.arange(len(self.index), device=self.columns.device) * self.n_genes
        return self.columns + torch.repeat_interleave(
            starts, self.indptr.diff(), output_size=len(self.columns)
        )

    @cached_property
    def x(self) -> Tensor:
        """Counts, (cell, gene) float32."""
        return self.spread(self.values)

    def spread(self, values: Tensor) -> Tensor:
        """Dense (cell, gene) array with `values` (nonzero,) at the non-zeros and 0 elsewhere."""
        dense = values.new_zeros(len(self) * self.n_genes)
        return dense.scatter_(0, self.flat, values).view(self.shape)

    def to(self, device: torch.device | str) -> CountBatch:
        """The same batch on another device."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) for name, value in parts.items() if isinstance(value, Tensor)}
        codes = {key: code.to(device) for key, code in self.covariates.items()}
        return CountBatch(**(parts | moved | {"covariates": codes}))


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

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Cut `rows` (cell,) into parts, each with its counts in memory (cell, gene)."""
        for start in range(0, len(rows), PASS):
            part = rows[start : start + PASS]
            yield part, self.csr[part]

    def loader(self, rows: np.ndarray | None = None, **settings) -> CountLoader:
        """Minibatches of these counts, as :class:`CountLoader` takes its settings."""
        return CountLoader(self, rows, **settings)

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> CountBatch:
        """Cells `rows` (cell,) as tensors on `device`; only the non-zeros travel there."""
        part = self.csr[rows]
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        return CountBatch(
            n_genes=self.shape[1],
            library=sent(self.library[index], device),
            index=sent(index, device),
            covariates={key: sent(code[index], device) for key, code in self.covariates.items()},
            indptr=sent(torch.from_numpy(part.indptr.astype(np.int64)), device),
            columns=sent(torch.from_numpy(part.indices.astype(np.int64)), device),
            values=sent(torch.from_numpy(part.data), device),
        )


def sent(value: Tensor, device: torch.device | str) -> Tensor:
    """`value` on the device; to a GPU from pinned memory, so that the host does not wait until it is there."""
    if value.device.type == "cpu" and torch.device(device).type == "cuda":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


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
    order
        How a pass is shuffled.
    share
        (k, n): give out every n-th cell of each batch, from the k-th; n loaders with equal generators then share
        each pass. A last batch of fewer than n cells is left out.

    Attributes
    ----------
    joint_size
        Cells of the whole batch that the last one given out is a share of.
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
        order: Order = full_shuffle,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.matrix, self.batch_size, self.share, self.joint_size = matrix, int(batch_size), share, 0
        self.shuffle, self.drop_last, self.order = shuffle, drop_last, order
        if self.batch_size < 1:
            raise DataError(
                three_beats("batch_size of at least 1", str(batch_size), "pass a positive number")
            )
        self.rows = _rows(rows, len(matrix))
        self.generator = generator or torch.Generator().manual_seed(0)
        self.device = device

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (rest >= self.share[1] and not self.drop_last)

    def pass_rows(self) -> np.ndarray:
        """Rows of the next pass in their order, (cell,)."""
        if not self.shuffle:
            return self.rows
        return self.rows[self.order(len(self.rows), self.generator).numpy()]

    def shares(self) -> Iterator[tuple[int, np.ndarray]]:
        """Size of each whole batch of the next pass, and the rows of this loader's share of it."""
        rows, (first, step) = self.pass_rows(), self.share
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            joint = rows[start : start + self.batch_size]
            yield len(joint), joint[first::step]

    def __iter__(self) -> Iterator[CountBatch]:
        for joint_size, rows in self.shares():
            self.joint_size = joint_size
            yield self.matrix.batch(rows, self.device)


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


# -- counts that stay on disk -------------------------------------------------------------------------------------
#
# A file is read fastest in runs of neighbouring rows, and a batch must be a random sample of all cells. Both are had by
# shuffling short blocks of rows, reading a window of many blocks at a time, and shuffling inside it.

BLOCK = 64
"""Neighbouring cells that stay together on the way to a window."""


def chunked_order(block: int = BLOCK, window: int = PART) -> Order:
    """A shuffle whose windows lie in few blocks of neighbouring rows, so that a file is read in runs.

    Parameters
    ----------
    block
        Neighbouring rows that are read together.
    window
        Rows that are mixed with each other.
    """

    def order(n: int, generator: torch.Generator) -> Tensor:
        blocks = torch.arange(n).split(block)
        places = torch.cat([blocks[k] for k in torch.randperm(len(blocks), generator=generator)])
        parts = places.split(window)
        return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])

    return order


def require_in_memory(adata: AnnData) -> None:
    """Refuse counts on disk where many fits share them.

    Raises
    ------
    DataError
        With what to do instead.
    """
    if is_on_disk(count_slot(adata, keys_of(adata).layer)):
        fix = "pass adata.to_memory(), or fewer cells: adata[chosen].to_memory()"
        raise DataError(three_beats("counts in memory, for all fits", "counts that lie on disk", fix))


class DiskCounts:
    """Counts of all cells in a file, with the face of :class:`CountMatrix`.

    Parameters
    ----------
    slot, genes, check
        As in :class:`RowReader`.
    covariates
        Category codes per covariate, (cell,) each.
    """

    def __init__(
        self,
        slot,
        *,
        genes: np.ndarray | None = None,
        covariates: Mapping | None = None,
        check: Check | None = None,
    ) -> None:
        self.slot, self.reader = slot, RowReader(slot, genes=genes, check=check)
        self.shape = self.reader.shape
        self.covariates = {
            key: torch.as_tensor(code, dtype=torch.int64) for key, code in (covariates or {}).items()
        }

    @cached_property
    def sums(self) -> np.ndarray:
        """(cell,) float64 counts of each cell; a pass through the file, made when they are first asked for."""
        parts = [part.sum(axis=1) for _, part in self.blocks(np.arange(len(self)))]
        return np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in parts])

    @cached_property
    def library(self) -> Tensor:
        """(cell,) float32 library sizes, at least 1; from :attr:`sums`."""
        return torch.from_numpy(np.maximum(self.sums.astype(np.float32), 1.0))

    def __len__(self) -> int:
        return self.reader.shape[0]

    def with_rest(self, rest: np.ndarray) -> DiskCounts:
        """The same counts with a last column `rest` (cell,): what the genes kept leave of each cell's total."""
        more = copy.copy(self)
        settings = {"genes": self.reader.genes, "rest": rest, "check": self.reader.check}
        more.reader = RowReader(self.slot, **settings)
        more.shape, more.sums = more.reader.shape, self.sums + rest
        vars(more).pop("library", None)  # of the sums before
        return more

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Cut `rows` (cell,) into parts, each with its counts in memory (cell, gene)."""
        for start in range(0, len(rows), PASS):
            part = rows[start : start + PASS]
            yield part, self.reader.read(part)

    def held(self, rows: np.ndarray) -> CountMatrix:
        """The cells `rows` (cell,) in memory, in this order."""
        codes = {key: code[torch.from_numpy(rows)] for key, code in self.covariates.items()}
        return CountMatrix(self.reader.read(rows), covariates=codes)

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> CountBatch:
        """Cells `rows` (cell,) as tensors on `device`."""
        batch = self.held(np.asarray(rows)).batch(np.arange(len(rows)), device)
        return replace(batch, index=sent(torch.from_numpy(np.asarray(rows, dtype=np.int64)), device))

    def loader(self, rows: np.ndarray | None = None, **settings) -> DiskLoader:
        """Minibatches, shuffled by chunks; settings as in :class:`CountLoader`."""
        settings = {"order": chunked_order()} | settings
        return DiskLoader(self, rows, **settings)  # type: ignore[arg-type]  # it asks for no more


class DiskLoader(CountLoader):
    """A :class:`CountLoader` that reads a window of cells at a time; any order is right, a chunked one is fast."""

    def __iter__(self) -> Iterator[CountBatch]:
        shares = list(self.shares())
        per_window = max(1, (PART if self.shuffle else PASS) // self.batch_size)
        for start in range(0, len(shares), per_window):
            yield from self._window(shares[start : start + per_window])

    def _window(self, shares: list[tuple[int, np.ndarray]]) -> Iterator[CountBatch]:
        """Some batches, whose cells are read together; nothing of them is held when the next ones are read."""
        held, at = self.matrix.held(np.concatenate([rows for _, rows in shares])), 0  # type: ignore[attr-defined]
        for joint_size, rows in shares:
            self.joint_size = joint_size
            batch = held.batch(np.arange(at, at := at + len(rows)), self.device)
            yield replace(batch, index=sent(torch.from_numpy(rows.astype(np.int64)), self.device))


# -- counts that stay on a GPU: a batch travels there as its rows, and is gathered on the spot --------------------------

SHARE = 0.25
"""Largest share of the device's free memory that the counts may take."""

_ROUND = 256
_BYTES = 8  # of a non-zero: its gene and its count


@dataclass(frozen=True)
class ResidentBatch:
    """Some cells of counts that lie on a device.

    Attributes
    ----------
    matrix : ResidentCounts
        The counts of all cells.
    index : Tensor
        Rows of the cells, (cell,) int64, on the device.
    room : int
        Number of non-zeros that the gathered batch has places for.
    """

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
    """Counts of all cells on a device, from which any rows come out as a :class:`ResidentBatch`.

    Parameters
    ----------
    source
        The counts.
    device
        Where they go.
    """

    def __init__(self, source: CountMatrix, device: torch.device | str) -> None:
        self.source, self.device, self.shape = source, torch.device(device), source.shape
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

    def loader(self, rows: np.ndarray | None = None, **settings) -> CountLoader:
        """Minibatches of these counts, as :class:`CountLoader` takes its settings."""
        return CountLoader(self, rows, **settings)  # type: ignore[arg-type]  # it asks for no more

    def batch(self, rows: np.ndarray, device: torch.device | str | None = None) -> ResidentBatch:
        """Cells `rows` (cell,); they are where the counts are, whatever `device` says."""
        index = sent(torch.from_numpy(np.asarray(rows, dtype=np.int64)), self.device)
        return ResidentBatch(self, index, self._room(rows))

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


def resident(matrix, device: torch.device):
    """The counts on the device where it is a GPU that has the memory; else `matrix` as it is."""
    if not isinstance(matrix, CountMatrix) or device.type != "cuda":
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
    return _totals(adata, TOTAL_KEY) if TOTAL_KEY in adata.obs else None


def _totals(adata: AnnData, key: str) -> np.ndarray:
    """A column of totals, (cell,) float64; refuses what is no number."""
    column = obs_column(adata, key)
    total = pd.to_numeric(column.astype(str), errors="coerce").to_numpy(np.float64)
    wrong = ~np.isfinite(total)
    if wrong.any():
        problem = f"{str(column[wrong].iloc[0])!r} in cell {adata.obs_names[wrong][0]!r}"
        fix = "set the column to the counts of all genes, or delete it before training"
        raise DataError(three_beats(f"numbers as totals in obs[{key!r}]", problem, fix))
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
        raise LabelError(three_beats(expected, "no such column", fix))
    total = _totals(adata, total_key)
    rest = total - sums
    wrong = rest < -0.5  # half a count forgives rounding
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        problem = f"{total[row]:g} against {sums[row]:g} counts in cell {adata.obs_names[row]!r}"
        problem += "; these look like logarithms" if total.max() < 30 else ""
        fix = "set the column to the counts of all genes, or delete it before training"
        raise DataError(
            three_beats(f"totals in obs[{total_key!r}] of at least the cell's counts", problem, fix)
        )
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
        raise DataError(three_beats("all genes of the model in var_names", problem, fix))
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
