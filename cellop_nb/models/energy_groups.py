"""How ragged groups of cells are cut into batches of padded groups, and put back."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import host

_BATCH_PAIRS = 1 << 17  # padded pairs of one batch of groups: they should stay in the cache
_DEVICE_BATCH_PAIRS = 1 << 22  # of a device, whose calls each cost as much as thousands of pairs
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

    def mask(self) -> Tensor:
        """(group, cell) mask of padding on the host, where there is none too."""
        return torch.zeros(self.shape, dtype=torch.bool) if self.pad is None else self.pad.cpu()

    def filled(self, value: Tensor | float) -> Tensor:
        """The value of each group (group,), or of all, for each of its cells: (group, cell) float64, 0 for padding; on
        the host."""
        values = torch.as_tensor(value, dtype=torch.float64).cpu().reshape(-1, 1).expand(self.shape)
        return values.masked_fill(self.mask(), 0)

    def gather(self, x: Tensor) -> Tensor:
        """Padded groups (group, cell, d) of the rows (cell, d)."""
        if isinstance(self.rows, slice):
            return x[self.rows].unflatten(0, self.shape)
        cells = x[self.rows]
        return cells if self.pad is None else cells.masked_fill_(self.pad.unsqueeze(-1), 0)

    def scatter(self, force: Tensor, grad: Tensor) -> None:
        """Write padded groups (group, cell, d) to the rows of `grad` that they came from."""
        force = force.to(grad.dtype)
        if isinstance(self.rows, slice):
            grad[self.rows].unflatten(0, self.shape).copy_(force)
        elif self.pad is None:
            grad[self.rows] = force
        else:
            grad[self.rows[~self.pad]] = force[~self.pad]


@dataclass(frozen=True)
class Signs:
    """Factors of the distances from the cells x, and from the cells y, to the stack of x and y of their group.

    (cell,) where groups are alike, else (group, cell); zero for padding.

    Attributes
    ----------
    sum_x, sum_y
        In the energy distance: of the stack for x, of y alone for y.
    pull_x, pull_y
        In the gradients: of the stack for both.
    own_x, own
        One number, or (group,) float64: what undoes a 1 for the distance of each cell x, of each cell, to itself.
    """

    sum_x: Tensor
    sum_y: Tensor
    pull_x: Tensor
    pull_y: Tensor
    own_x: Tensor | float
    own: Tensor | float


@dataclass(frozen=True, eq=False)
class Batch:
    """Groups that are computed together: their positions, and the places of their cells x and y."""

    groups: slice | Tensor
    x: Place
    y: Place

    @functools.cached_property
    def pad(self) -> Tensor | None:
        """(group, cell) mask of padding in the stack of x and y; None where there is none."""
        given = self.y.pad if self.x.pad is None else self.x.pad
        if given is None:
            return None
        return torch.cat([self.x.mask(), self.y.mask()], 1).to(given.device)

    @functools.lru_cache(maxsize=256)  # noqa: B019 (batches are remembered anyway)
    def signs(self, estimator: str, dtype: torch.dtype, device: torch.device) -> Signs:
        """The signs of an energy distance."""
        across = 2 / (self.x.counts * self.y.counts)
        in_x, in_y = -2 / self.x.pairs(estimator), -2 / self.y.pairs(estimator)
        pull_x = torch.cat([self.x.filled(in_x), self.y.filled(across)], 1)
        pull_y = torch.cat([self.x.filled(across), self.y.filled(in_y)], 1)
        sum_x = torch.cat([self.x.filled(in_x / 2), self.y.filled(across)], 1)
        parts = [part.to(device, dtype) for part in (sum_x, self.y.filled(in_y / 2), pull_x, pull_y)]
        alike = not isinstance(across, Tensor)
        own_x, own_y = -self.x.counts * in_x / 2, -self.y.counts * in_y / 2
        sum_x, sum_y, pull_x, pull_y = (part[0] if alike else part for part in parts)
        return Signs(sum_x, sum_y, pull_x, pull_y, own_x, own_x + own_y)


@functools.lru_cache(maxsize=64)
def batches(x_sizes: tuple[int, ...], y_sizes: tuple[int, ...], device: torch.device) -> tuple[Batch, ...]:
    """The groups' cut into batches; remembered, since training asks for the same sizes in every step."""
    starts_x, starts_y = _starts(x_sizes), _starts(y_sizes)
    most = _BATCH_PAIRS if host.looks_are_free(device) else _DEVICE_BATCH_PAIRS
    return tuple(
        Batch(
            _index(chosen, device),
            _place(x_sizes, starts_x, chosen, device),
            _place(y_sizes, starts_y, chosen, device),
        )
        for chosen in _cut(x_sizes, y_sizes, most)
    )


def _cut(x_sizes: tuple[int, ...], y_sizes: tuple[int, ...], most: int) -> Iterator[list[int]]:
    """Groups of similar size, of at most so many padded pairs, with little padding."""
    batch: list[int] = []
    wide = tall = real = 0
    for g in sorted(range(len(x_sizes)), key=lambda g: (x_sizes[g] * y_sizes[g], x_sizes[g])):
        pairs = x_sizes[g] * y_sizes[g]
        wide, tall, real = max(wide, x_sizes[g]), max(tall, y_sizes[g]), real + pairs
        if batch and wide * tall * (len(batch) + 1) > min(most, _PADDING * real):
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
