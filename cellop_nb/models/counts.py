"""A count matrix by its non-zeros, as encoder and likelihood visit them."""

from __future__ import annotations

from functools import cached_property

import torch
from scipy import sparse
from torch import Tensor

from ..errors import ModelError, three_beats
from .host import looks_are_free
from .stirling import count_constant


class SparseCounts:
    """Non-zeros of a count matrix (cell, gene) in CSR form.

    Parameters
    ----------
    shape
        (cells, genes).
    indptr, columns
        (cell + 1,) and (nonzero,) int64: where each cell's non-zeros start, and their genes.
    values
        (nonzero,) counts > 0, floating.
    constant
        (cell,) sum of :func:`count_constant` over the non-zeros of each cell. It never changes, so a trainer
        computes it once; computed at first use where None.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        indptr: Tensor,
        columns: Tensor,
        values: Tensor,
        constant: Tensor | None = None,
    ):
        self.shape, self.indptr, self.columns, self.values = tuple(shape), indptr, columns, values
        if constant is not None:
            self.constant = constant

    @classmethod
    def of(cls, batch, constant: Tensor | None = None) -> SparseCounts:
        """The counts of a batch with ``shape``, ``indptr``, ``columns`` and ``values``."""
        return cls(batch.shape, batch.indptr, batch.columns, batch.values, constant)

    @classmethod
    def from_dense(cls, x: Tensor, *, validate: bool = True) -> SparseCounts:
        """Non-zeros of the dense counts x (cell, gene). Negative counts are refused."""
        rows, columns = x.nonzero(as_tuple=True)
        values = x[rows, columns]
        if validate:
            refuse_negative(values)
        ends = torch.bincount(rows, minlength=len(x)).cumsum(0)
        return cls(tuple(x.shape), torch.cat([ends.new_zeros(1), ends]), columns, values)

    @cached_property
    def constant(self) -> Tensor:
        """(cell,) part of each cell's log-likelihood that no parameter enters, with its sign turned."""
        return self.values.new_zeros(self.shape[0]).index_add_(0, self.rows, _constants(self.values))

    @cached_property
    def rows(self) -> Tensor:
        """(nonzero,) int64 cell of each non-zero."""
        return torch.repeat_interleave(self.indptr.diff(), output_size=len(self.values))

    @cached_property
    def flat(self) -> Tensor:
        """(nonzero,) positions in the row-major dense matrix."""
        return torch.add(self.columns, self.rows, alpha=self.shape[1])

    def by_gene(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`values` (nonzero,) gene by gene, on a CPU: (gene + 1,) int32 starts, (nonzero,) int32 cells, the values."""
        # Narrow indices: scipy would look through wide ones first, and narrow them itself.
        indices = (self.columns.int().numpy(), self.indptr.int().numpy())
        csc = sparse.csr_matrix((values.numpy(), *indices), self.shape).tocsc()
        starts, cells, sorted_values = (
            torch.from_numpy(part) for part in (csc.indptr, csc.indices, csc.data)
        )
        return starts, cells, sorted_values

    def dense(self) -> Tensor:
        """Dense counts (cell, gene)."""
        return self.spread(self.values)

    def spread(self, values: Tensor) -> Tensor:
        """Dense (cell, gene) array with `values` (nonzero,) at the non-zeros and 0 elsewhere."""
        cells, genes = self.shape
        return values.new_zeros(cells * genes).scatter_(0, self.flat, values).view(cells, genes)

    def to(self, *args, **kwargs) -> SparseCounts:
        """The same counts on another device or in another floating dtype."""
        moved = self.values.to(*args, **kwargs)
        indptr, columns = self.indptr.to(moved.device), self.columns.to(moved.device)
        constant = self.__dict__.get("constant")
        return SparseCounts(
            self.shape, indptr, columns, moved, None if constant is None else constant.to(moved)
        )

    def totals(self) -> Tensor:
        """(cell,) counts of each cell."""
        return self.values.new_zeros(self.shape[0]).index_add_(0, self.rows, self.values)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"SparseCounts({self.shape[0]} cells, {self.shape[1]} genes, {len(self.values)} non-zeros)"


_TABLE = 255


def _constants(values: Tensor) -> Tensor:
    """:func:`count_constant` of each value; small whole counts, nearly all of them, are looked up on a CPU."""
    if not looks_are_free(values.device):
        return count_constant(values)
    places = values.int().clamp_(0, _TABLE)  # NaN and whatever else is not in the table find a place, too
    table = count_constant(torch.arange(_TABLE + 1, dtype=values.dtype).clamp_min_(1))
    found, other = table.index_select(0, places), (places != values).nonzero().view(-1)
    found[other] = count_constant(values[other])
    return found


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
