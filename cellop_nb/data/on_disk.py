"""Matrices that stay in their h5ad or zarr file: opened without being read, and read in runs of neighbouring rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
from anndata import AnnData
from scipy import sparse

from ..errors import DataError

PASS = 4_096
"""Cells that a pass over counts in their order holds at a time."""

Check = Callable[[sparse.csr_matrix, np.ndarray], None]

_GAP = 32  # rows that are read and thrown away rather than starting another read


def open_lazily(path: str | Path) -> AnnData:
    """An `.h5ad` or `.zarr` whose matrices (``X``, ``layers``) stay on disk; all else is read.

    Rows taken from it (``adata[rows]``) are read when they are used. The file stays open as long as the object lives, and
    is never written to.
    """
    import zarr

    path = Path(path)
    with readable(path):
        store: Any = zarr.open_group(path, mode="r") if path.suffix == ".zarr" else h5py.File(path, "r")
        if isinstance(store["obs"], h5py.Dataset):
            fix = f"write it anew once: anndata.read_h5ad({path.name!r}).write_h5ad({'new_' + path.name!r})"
            raise DataError("a file of anndata 0.7 or later", f"an older one, {path}", fix)
        names = ("obs", "var", "uns", "obsm", "varm")
        tables = {name: anndata.io.read_elem(store[name]) for name in names if name in store}
        layers = {name: _matrix(store["layers"][name]) for name in store.get("layers", ())}
        x = _matrix(store["X"]) if "X" in store else None
        return AnnData(X=x, layers=layers, **tables)


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn what h5py, zarr and anndata raise on files that they cannot read into one error that says what to do."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # of all kinds
        problem = f"{path}: {(str(error) or type(error).__name__).splitlines()[0]}"
        fix = "copy the file again, or write it with adata.write_h5ad"
        if "dtype float16" in problem:
            fix = "write its matrix in single precision where it was made: adata.X.astype('float32')"
        if "lock" in problem or "already open" in problem:
            fix = "close it in the program or notebook that has it open for writing"
        raise DataError(f"a readable {Path(path).suffix or 'matrix'}", problem, fix) from error


def part(slot, start: int, end: int):
    """Rows of a matrix, as it gives them; a damaged part of its file is refused."""
    with readable(_place(slot)):
        return slot[start:end]


def _place(slot) -> str:
    """File or folder of a matrix on disk."""
    stored = getattr(slot, "group", slot)
    folder = str(getattr(stored, "store_path", "")).removeprefix("file://")
    return folder or getattr(getattr(stored, "file", None), "filename", "the counts")


def _matrix(stored):
    """A matrix of the file, left there."""
    is_sparse = str(stored.attrs.get("encoding-type", "")) in ("csr_matrix", "csc_matrix")
    return anndata.io.sparse_dataset(stored) if is_sparse else stored


def is_on_disk(slot) -> bool:
    """Whether a matrix (cell, gene) is still in its file."""
    return not (isinstance(slot, np.ndarray) or sparse.issparse(slot) or hasattr(slot, "iloc"))


class RowReader:
    """Rows of a CSR or dense matrix of an h5ad or zarr file, as CSR in memory, read in runs.

    anndata's own slices look up the installed version of scipy each time (2 ms): for the short runs of a shuffled pass
    ten times as long as reading them. `genes` are the columns to keep, in this order; `check` gets what was read,
    (cell, gene) as stored, and its rows (cell,), before it is used. A matrix stored by genes (CSC) is refused: every
    cell would cost a pass through the file.
    """

    def __init__(self, slot, *, genes: np.ndarray | None = None, check: Check | None = None) -> None:
        if getattr(slot, "format", "csr") == "csc":
            fix = "store it by cells once: adata.X = adata.X.tocsr(); adata.write_h5ad(...)"
            raise DataError("counts stored by cells (CSR)", "a matrix stored by genes (CSC)", fix)
        self.slot, self.check, self.rest = slot, check, None
        self.genes = None if genes is None or np.array_equal(genes, np.arange(slot.shape[1])) else genes
        self.shape = (int(slot.shape[0]), int(slot.shape[1]) if self.genes is None else len(self.genes))
        self._starts = None
        if stored_format(slot) == "csr":
            with readable(_place(slot)):
                self._starts = np.asarray(slot.group["indptr"][...])
            self._values, self._genes = slot.group["data"], slot.group["indices"]

    def with_rest(self, rest: np.ndarray) -> RowReader:
        """The same rows with a further last column (cell,): the counts of genes that the matrix does not hold."""
        more = copy.copy(self)
        more.rest, more.shape = rest, (self.shape[0], self.shape[1] + 1)
        return more

    def read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Rows (cell,) in the order asked for, (cell, gene) float32."""
        distinct, back = np.unique(rows, return_inverse=True)
        cuts: np.ndarray = np.flatnonzero(np.diff(distinct) > _GAP) + 1
        firsts, lasts = distinct[np.r_[0, cuts]], distinct[np.r_[cuts, len(distinct)] - 1] + 1
        # In turns: the rows between, which nobody asked for, are gone before the next ones come.
        turn: np.ndarray = np.cumsum(lasts - firsts) // (2 * PASS)
        parts = [self._wanted(firsts[turn == k], lasts[turn == k], distinct) for k in np.unique(turn)]
        block = parts[0] if len(parts) == 1 else sparse.vstack(parts, "csr")
        del parts
        block = block if np.array_equal(distinct, rows) else block[back]
        block = block if self.genes is None else block[:, self.genes]
        if self.rest is not None:
            block = sparse.hstack([block, sparse.csr_matrix(self.rest[rows, None])], "csr")
        return block.astype(np.float32, copy=False)

    def _wanted(self, firsts: np.ndarray, lasts: np.ndarray, wanted: np.ndarray) -> sparse.csr_matrix:
        """The wanted rows of some runs, in the order of the file and as stored."""
        block = self.runs(firsts, lasts)
        held = np.concatenate([np.arange(a, b) for a, b in zip(firsts, lasts, strict=True)])
        if self.check is not None:
            self.check(block, held)
        kept = np.isin(held, wanted, assume_unique=True)
        return block if kept.all() else block[np.flatnonzero(kept)]

    def runs(self, firsts: np.ndarray, lasts: np.ndarray) -> sparse.csr_matrix:
        """Runs of neighbouring rows (cell, gene), of the stored type; `lasts` (run,) are not among them."""
        with readable(_place(self.slot)):  # a damaged part may be seen only now
            if self._starts is None:
                blocks = [sparse.csr_matrix(self.slot[a:b]) for a, b in zip(firsts, lasts, strict=True)]
                return blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, "csr")
            ends = list(zip(self._starts[firsts], self._starts[lasts], strict=True))
            values, genes = (
                np.concatenate([stored[a:b] for a, b in ends]) for stored in (self._values, self._genes)
            )
            sizes = [np.diff(self._starts[a : b + 1]) for a, b in zip(firsts, lasts, strict=True)]
            indptr = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
            return sparse.csr_matrix((values, genes, indptr), (len(indptr) - 1, self.slot.shape[1]))


def stored_format(slot) -> str:
    """How a sparse matrix lies in its file, as anndata opens it: "csr" or "csc"; empty for any other matrix."""
    return getattr(slot, "format", "") if hasattr(slot, "group") else ""


def blocks_by_genes(slot, size: int = 2**22) -> Iterator[tuple[int, sparse.csc_matrix]]:
    """A CSC matrix of a file in one pass: (first gene, (cell, gene)), of about `size` values or one gene each."""
    starts = np.asarray(slot.group["indptr"][...])
    first = 0
    while first < len(starts) - 1:
        last = max(int(np.searchsorted(starts, starts[first] + size, side="right")) - 1, first + 1)
        begin, end = starts[first], starts[last]
        parts = (
            slot.group["data"][begin:end],
            slot.group["indices"][begin:end],
            starts[first : last + 1] - begin,
        )
        yield first, sparse.csc_matrix(parts, (slot.shape[0], last - first))
        first = last
