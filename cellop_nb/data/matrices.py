"""Counts of many cells, and minibatches of them as tensors, straight from CSR."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..errors import DataError, three_beats

PART = 16_384
"""Cells that a shuffled window of a file holds at a time: about 30 MB at 200 genes a cell."""

PASS = 4_096
"""Cells that a pass over counts in their order holds at a time."""

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
