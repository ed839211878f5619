"""Counts that stay on a GPU: a batch travels there as its rows, and its counts are gathered on the spot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .matrices import CountBatch, CountLoader, CountMatrix, sent

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
        return CountLoader(self, rows, **settings)

    def batch(self, rows: np.ndarray, device: torch.device | str | None = None) -> ResidentBatch:
        """Cells `rows` (cell,); they are where the counts are, whatever `device` says."""
        index = sent(torch.from_numpy(np.asarray(rows, dtype=np.int64)), self.device)
        return ResidentBatch(self, index, self._room(rows))

    def gather(self, rows: Tensor, room: int) -> CountBatch:
        """:meth:`ResidentBatch.padded` of the cells `rows` (cell,)."""
        start = self.starts.index_select(0, rows)
        length = self.starts.index_select(0, rows + 1) - start
        ends = length.cumsum(0)
        place = torch.arange(room, device=self.device)
        cell = torch.searchsorted(ends, place, right=True)  # the number of cells where none is left
        shift = torch.cat([start - ends + length, start.new_zeros(1)]).index_select(0, cell)
        real = cell < len(rows)
        at = torch.where(real, place + shift, 0)
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
        wanted = int(self._lengths[rows].sum())
        return usual if wanted <= usual else _rounded(wanted)


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
