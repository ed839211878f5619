"""The non-zeros of a count matrix, as the likelihood visits them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError, three_beats
from .stirling import count_constant


@dataclass
class SparseCounts:
    """Non-zeros of a count matrix (cell, gene), sorted by cell, as tensors.

    Attributes
    ----------
    shape
        (cells, genes).
    rows, columns
        (nonzero,) int64 indices.
    values
        (nonzero,) counts > 0, floating.
    constant
        (cell,) sum of :func:`count_constant` over the non-zeros of each cell. It never changes, so a loader
        computes it once; computed here where None.
    """

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    values: Tensor
    constant: Tensor | None = None

    def __post_init__(self):
        if self.constant is None:
            zeros = self.values.new_zeros(self.shape[0])
            self.constant = zeros.index_add_(0, self.rows, count_constant(self.values))

    @classmethod
    def from_dense(cls, x: Tensor, *, validate: bool = True) -> SparseCounts:
        """Non-zeros of the dense counts x (cell, gene). Negative counts are refused."""
        flat = x.reshape(-1).nonzero().squeeze(-1)
        values = x.reshape(-1)[flat]
        if validate:
            refuse_negative(values)
        rows = torch.div(flat, x.shape[1], rounding_mode="floor")
        return cls(tuple(x.shape), rows, flat - rows * x.shape[1], values)

    @property
    def flat(self) -> Tensor:
        """(nonzero,) positions in the row-major dense matrix."""
        return self.rows * self.shape[1] + self.columns

    def dense(self) -> Tensor:
        """Dense counts (cell, gene)."""
        x = self.values.new_zeros(self.shape)
        x.view(-1)[self.flat] = self.values
        return x

    def to(self, *args, **kwargs) -> SparseCounts:
        """The same counts on another device or in another floating dtype."""
        moved = self.values.to(*args, **kwargs)
        rows, columns = self.rows.to(moved.device), self.columns.to(moved.device)
        return SparseCounts(self.shape, rows, columns, moved, self.constant.to(moved))


def refuse_negative(x: Tensor) -> None:
    """Refuse a negative count, naming where it is."""
    if x.numel() and x.amin() < 0:
        cell = tuple(int(i) for i in (x == x.amin()).nonzero()[0])
        raise ModelError(
            three_beats(
                "counts x >= 0",
                f"{x.amin():g} at index {cell}",
                "pass raw counts, not log-normalised or scaled values",
            )
        )
