"""A matrix stored by cells in an h5ad or zarr file: runs of its rows, straight from the arrays that hold it."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def is_stored_by_cells(slot) -> bool:
    """Whether a matrix is a CSR matrix in a file, as anndata opens it."""
    return hasattr(slot, "group") and getattr(slot, "format", "") == "csr"


class StoredRows:
    """Runs of neighbouring rows, as CSR in memory and of the stored type.

    anndata's own slices look up the installed version of scipy each time (2 ms): for the short runs of a shuffled
    pass ten times as long as reading them.

    Parameters
    ----------
    slot
        CSR or dense matrix (cell, gene) in a file.
    """

    def __init__(self, slot) -> None:
        self.shape = tuple(int(size) for size in slot.shape)
        self._dense, self._starts = slot, None
        if is_stored_by_cells(slot):
            self._starts = np.asarray(slot.group["indptr"][...])
            self._values, self._genes = slot.group["data"], slot.group["indices"]

    def read(self, firsts: np.ndarray, lasts: np.ndarray) -> sparse.csr_matrix:
        """The rows of all runs, one run below the other; `lasts` (run,) are not among them."""
        if self._starts is None:
            runs = [sparse.csr_matrix(self._dense[a:b]) for a, b in zip(firsts, lasts, strict=True)]
            return runs[0] if len(runs) == 1 else sparse.vstack(runs, "csr")
        begin, end = self._starts[firsts], self._starts[lasts]
        if len(firsts) == 1:
            parts = self._values[begin[0] : end[0]], self._genes[begin[0] : end[0]]
            indptr = self._starts[firsts[0] : lasts[0] + 1] - begin[0]
            return sparse.csr_matrix((*parts, indptr), (len(indptr) - 1, self.shape[1]))
        at = np.concatenate([[0], np.cumsum(end - begin)])
        values, genes = np.empty(at[-1], self._values.dtype), np.empty(at[-1], np.int32)
        for run, (a, b) in enumerate(zip(begin, end, strict=True)):
            values[at[run] : at[run + 1]] = self._values[a:b]
            genes[at[run] : at[run + 1]] = self._genes[a:b]
        sizes = [np.diff(self._starts[a : b + 1]) for a, b in zip(firsts, lasts, strict=True)]
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
        return sparse.csr_matrix((values, genes, indptr), (len(indptr) - 1, self.shape[1]))
