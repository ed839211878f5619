"""How ragged groups of cells are cut into batches of padded groups, and put back."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BATCH_PAIRS = 1 << 18  # padded pairs of one batch of groups: they should stay in the cache
_PADDING = 1.4  # largest ratio of padded to real pairs in one batch


@dataclass(frozen=True)
class Place:
    """Where the cells of a batch of groups stand among all rows.

    Attributes
    ----------
    shape
        (groups, cells of the largest group).
    rows
        The rows themselves, (group, cell), 0 for padding; a slice where nothing has to be copied.
    pad
        (group, cell) mask of padding; None where there is none.
    counts
        (group,) cells, float64; one number where all groups have the same.
    """

    shape: tuple[int, int]
    rows: Tensor | slice
    pad: Tensor | None
    counts: Tensor | int

    def pairs(self, estimator: str) -> Tensor | int:
        """Number of ordered pairs within each group: without a cell and itself for "U"."""
        return self.counts * (self.counts - int(estimator == "U"))

    def gather(self, x: Tensor) -> Tensor:
        """Padded groups (group, cell, d) of the rows (cell, d)."""
        if isinstance(self.rows, slice):
            return x[self.rows].unflatten(0, self.shape)
        cells = x[self.rows]
        return cells if self.pad is None else cells.masked_fill_(self.pad.unsqueeze(-1), 0)

    def scatter(self, force: Tensor, grad: Tensor) -> None:
        """Write padded groups (group, cell, d) to the rows of `grad` that they came from."""
        if isinstance(self.rows, slice):
            grad[self.rows].unflatten(0, self.shape).copy_(force)
        elif self.pad is None:
            grad[self.rows] = force
        else:
            grad[self.rows[~self.pad]] = force[~self.pad]


@dataclass(frozen=True)
class Batch:
    """Groups that are computed together: their positions, and the places of their cells x and y."""

    groups: slice | Tensor
    x: Place
    y: Place


@functools.lru_cache(maxsize=64)
def batches(x_sizes: tuple[int, ...], y_sizes: tuple[int, ...], device: torch.device) -> tuple[Batch, ...]:
    """The groups' cut into batches; remembered, since training asks for the same sizes in every step."""
    starts_x, starts_y = _starts(x_sizes), _starts(y_sizes)
    return tuple(
        Batch(
            _index(chosen, device),
            _place(x_sizes, starts_x, chosen, device),
            _place(y_sizes, starts_y, chosen, device),
        )
        for chosen in _cut(x_sizes, y_sizes)
    )


def _cut(x_sizes: tuple[int, ...], y_sizes: tuple[int, ...]) -> Iterator[list[int]]:
    """Groups of similar size, few enough for the cache, with little padding."""
    batch: list[int] = []
    wide = tall = real = 0
    for g in sorted(range(len(x_sizes)), key=lambda g: (x_sizes[g] * y_sizes[g], x_sizes[g])):
        pairs = x_sizes[g] * y_sizes[g]
        wide, tall, real = max(wide, x_sizes[g]), max(tall, y_sizes[g]), real + pairs
        if batch and wide * tall * (len(batch) + 1) > min(_BATCH_PAIRS, _PADDING * real):
            yield batch
            batch, wide, tall, real = [], x_sizes[g], y_sizes[g], pairs
        batch.append(g)
    yield batch


def _starts(sizes: tuple[int, ...]) -> list[int]:
    counts = torch.tensor(sizes)
    return (counts.cumsum(0) - counts).tolist()


def _index(batch: list[int], device: torch.device) -> slice | Tensor:
    first = batch[0]
    if batch == list(range(first, first + len(batch))):
        return slice(first, first + len(batch))
    return torch.tensor(batch, device=device)


def _place(sizes: tuple[int, ...], starts: list[int], batch: list[int], device: torch.device) -> Place:
    cells, begin = [sizes[g] for g in batch], [starts[g] for g in batch]
    most, even = max(cells), min(cells) == max(cells)
    shape, counts = (
        (len(batch), most),
        most if even else torch.tensor(cells, dtype=torch.float64, device=device),
    )
    if even and begin == list(range(begin[0], begin[0] + most * len(batch), most)):
        return Place(shape, slice(begin[0], begin[0] + most * len(batch)), None, counts)  # neighbours
    position = torch.arange(most)
    pad = position >= torch.tensor(cells)[:, None]
    rows = torch.where(pad, 0, torch.tensor(begin)[:, None] + position).to(device)
    return Place(shape, rows, None if even else pad.to(device), counts)
