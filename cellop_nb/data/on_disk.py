"""Counts that stay on disk: opened without being read, shuffled by chunks, given out as the same batches.

A file is read fastest in runs of neighbouring rows, and a batch must be a random sample of all cells. Both are
had by shuffling short blocks of rows, reading a window of many blocks at a time, and shuffling inside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import anndata
import h5py
import numpy as np
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from ..errors import DataError, three_beats
from .contract import count_slot
from .matrices import PART, PASS, CountBatch, CountLoader, CountMatrix, Order, sent
from .stored import StoredRows

BLOCK = 64
"""Neighbouring cells that stay together on the way to a window."""

Check = Callable[[sparse.csr_matrix, np.ndarray], None]

_GAP = 32  # rows that are read and thrown away rather than starting another read


def open_lazily(path: str | Path) -> AnnData:
    """An `.h5ad` or `.zarr` whose matrices (``X``, ``layers``) stay on disk; all else is read.

    Returns
    -------
    AnnData
        Rows taken from it (``adata[rows]``) are read when they are used. The file stays open as long as the object
        lives, and is never written to.

    Raises
    ------
    DataError
        If the file cannot be read.
    """
    path = Path(path)
    try:
        store = _zarr_group(path) if path.suffix == ".zarr" else h5py.File(path, "r")
        tables = {name: anndata.io.read_elem(store[name]) for name in _TABLES if name in store}
        layers = {name: _matrix(store["layers"][name]) for name in store.get("layers", ())}
        x = _matrix(store["X"]) if "X" in store else None
    except (OSError, KeyError, ValueError) as error:
        fix = "copy or make the file again"
        raise DataError(three_beats(f"a readable {path.suffix}", f"{path}: {error}", fix)) from error
    return AnnData(X=x, layers=layers, **tables)


_TABLES = ("obs", "var", "uns", "obsm", "varm")


def _zarr_group(path: Path):
    import zarr

    return zarr.open_group(path, mode="r")


def _matrix(stored):
    """A matrix of the file, left there."""
    is_sparse = str(stored.attrs.get("encoding-type", "")) in ("csr_matrix", "csc_matrix")
    return anndata.io.sparse_dataset(stored) if is_sparse else stored


def is_on_disk(slot) -> bool:
    """Whether a matrix (cell, gene) is still in its file."""
    return not (isinstance(slot, np.ndarray) or sparse.issparse(slot) or hasattr(slot, "iloc"))


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


def require_in_memory(adata: AnnData, layer: str | None = None) -> None:
    """Refuse counts on disk where many fits share them.

    Raises
    ------
    DataError
        With what to do instead.
    """
    if is_on_disk(count_slot(adata, layer)):
        fix = "pass adata.to_memory(), or fewer cells: adata[chosen].to_memory()"
        raise DataError(three_beats("counts in memory, for all fits", "counts that lie on disk", fix))


class RowReader:
    """Rows of a matrix on disk as CSR in memory, read in runs.

    Parameters
    ----------
    slot
        Sparse (CSR) or dense matrix of an h5ad or zarr file.
    genes
        Columns to keep, in this order; all where None.
    rest
        (cell,) a further last column: the counts of genes that the matrix does not hold.
    check
        Gets what was read, (cell, gene) as stored, and its rows (cell,), before it is used: to refuse values.

    Raises
    ------
    DataError
        If the matrix is stored by genes (CSC): every cell would cost a pass through the file.
    """

    def __init__(
        self,
        slot,
        *,
        genes: np.ndarray | None = None,
        rest: np.ndarray | None = None,
        check: Check | None = None,
    ) -> None:
        if getattr(slot, "format", "csr") == "csc":
            fix = "store it by cells once: adata.X = adata.X.tocsr(); adata.write_h5ad(...)"
            raise DataError(
                three_beats("counts stored by cells (CSR)", "a matrix stored by genes (CSC)", fix)
            )
        whole = genes is None or np.array_equal(genes, np.arange(slot.shape[1]))
        self.stored, self.genes, self.rest, self.check = (
            StoredRows(slot),
            None if whole else genes,
            rest,
            check,
        )
        columns = slot.shape[1] if whole else len(genes)
        self.shape = (slot.shape[0], columns + (rest is not None))

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Rows (cell,) in the order asked for, (cell, gene) float32."""
        wanted, back = np.unique(rows, return_inverse=True)
        cuts: np.ndarray = np.flatnonzero(np.diff(wanted) > _GAP) + 1
        firsts, lasts = wanted[np.r_[0, cuts]], wanted[np.r_[cuts, len(wanted)] - 1] + 1
        # In turns: the rows between, which nobody asked for, are gone before the next ones come.
        turn: np.ndarray = np.cumsum(lasts - firsts) // (2 * PASS)
        parts = [self._runs(firsts[turn == k], lasts[turn == k], wanted) for k in np.unique(turn)]
        found = parts[0] if len(parts) == 1 else sparse.vstack(parts, "csr")
        del parts
        found = found if np.array_equal(wanted, rows) else found[back]
        found = found if self.genes is None else found[:, self.genes]
        if self.rest is not None:
            found = sparse.hstack([found, sparse.csr_matrix(self.rest[rows, None])], "csr")
        return found.astype(np.float32, copy=False)

    def _runs(self, firsts: np.ndarray, lasts: np.ndarray, wanted: np.ndarray) -> sparse.csr_matrix:
        """The wanted rows of some runs, in the order of the file and as stored."""
        found = self.stored.read(firsts, lasts)
        held = np.concatenate([np.arange(a, b) for a, b in zip(firsts, lasts, strict=True)])
        if self.check is not None:
            self.check(found, held)
        kept = np.isin(held, wanted, assume_unique=True)
        return found if kept.all() else found[np.flatnonzero(kept)]


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
        given = {"genes": self.reader.genes, "rest": rest, "check": self.reader.check}
        more.reader = RowReader(self.slot, **given)
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
        return DiskLoader(self, rows, **{"order": chunked_order()} | settings)


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
