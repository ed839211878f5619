"""How ragged groups of cells are cut into batches of padded groups, and put back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BATCH_PAIRS = 1 << 18  # padded pairs of one batch of groups: they should stay in the cache
_PADDING = 1.4  # largest ratio of padded to real pairs in one batch


def batches(x_sizes: list[int], y_sizes: list[int]) -> Iterator[list[int]]:
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


def gather(x: Tensor, sizes: list[int], batch: list[int]) -> tuple[Tensor, Tensor | slice, Tensor | None]:
    """Padded groups (group, cell, d), the rows they came from, and which rows are padding (None: none)."""
    first, cells = batch[0], sizes[batch[0]]
    if batch == list(range(first, first + len(batch))) and all(sizes[g] == cells for g in batch):
        start = sum(sizes[:first])  # neighbours of one size: nothing has to be copied
        rows = slice(start, start + len(batch) * cells)
        return x[rows].unflatten(0, (len(batch), cells)), rows, None
    counts = torch.tensor(sizes)
    starts = (counts.cumsum(0) - counts)[batch]
    counts = counts[batch]
    position = torch.arange(int(counts.max()))
    pad = position >= counts[:, None]
    rows = torch.where(pad, 0, starts[:, None] + position).to(x.device)
    if not pad.any():
        return x[rows], rows, None
    pad = pad.to(x.device)
    return x[rows].masked_fill_(pad.unsqueeze(-1), 0), rows, pad


def scatter(grad: Tensor | None, force: Tensor | None, cloud: tuple) -> None:
    """Write the gradients of padded groups to the rows that they came from."""
    if grad is None:
        return
    _, rows, pad = cloud
    if pad is not None:
        grad[rows[~pad]] = force[~pad]
    else:
        grad[rows] = force.flatten(0, 1) if isinstance(rows, slice) else force


def count_pairs(sizes: list[int], batch: list[int], estimator: str, device: torch.device) -> Tensor | int:
    """Number of ordered pairs within each group: (group,) float64, one number where all sizes are equal."""
    counts = [sizes[g] * (sizes[g] - (estimator == "U")) for g in batch]
    if min(counts) == max(counts):
        return counts[0]
    return torch.tensor(counts, dtype=torch.float64, device=device)
