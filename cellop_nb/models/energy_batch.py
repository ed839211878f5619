"""Energy distances of one batch of padded groups: whole matrices where they are small, tiles where not."""

from __future__ import annotations

import torch
from torch import Tensor

from . import host
from .energy_groups import Batch
from .energy_joint import joint_energies
from .energy_kernels import Exact, cross_sums, scale_of, self_sums
from .energy_values import cross_total, self_total

SMALL_PAIRS = 800_000  # distances of a batch up to which the number of calls counts, not that of pairs
_DEVICE_SMALL_PAIRS = 1 << 23  # of a device

Found = tuple[Tensor, Tensor | None, Tensor | None]
"""Energy distances (group,) float64, and the gradients (group, cell, d) of x and y, None where not wanted."""


def energies(
    x: Tensor,
    y: Tensor,
    batch: Batch,
    *,
    estimator: str,
    want_x: bool,
    want_y: bool,
    tile: int | None = None,
    y_self: Tensor | None = None,
) -> Found:
    """Energy distances of a batch of groups x (group, n, d) and y (group, m, d), padded with zeros.

    Gradients of padding rows are undefined.
    """
    pairs = batch.x.pairs(estimator), batch.y.pairs(estimator)
    known = None if y_self is None else y_self[batch.groups]
    if tile is None and is_small(len(x), x.shape[1], y.shape[1], x.device):
        found = joint(x, y, batch, estimator, want_x, want_y, known)
        if found is not None:
            return found
    return _tiled(x, y, batch, pairs, want_x, want_y, tile, known)


def is_small(groups: int, n: int, m: int, device: torch.device) -> bool:
    """Whether the distances of groups of n and m cells are computed as whole matrices."""
    most = SMALL_PAIRS if host.looks_are_free(device) else _DEVICE_SMALL_PAIRS
    return groups * (n + m) * max(n, m) <= most


def joint(
    x: Tensor, y: Tensor, batch: Batch, estimator: str, want_x: bool, want_y: bool, y_self: Tensor | None
) -> Found | None:
    """Energies and gradients of small groups as one stack (:func:`joint_energies`); None where they are not small."""
    x, y = _precise(x), _precise(y)
    if want_y and not want_x:
        found = joint_energies(y, x, Batch(batch.groups, batch.y, batch.x), estimator)
        return None if found is None else (found[0], None, found[1])
    return joint_energies(x, y, batch, estimator, want_x=want_x, want_y=want_y, y_self=y_self)


def _tiled(given_x, given_y, batch: Batch, pairs, want_x, want_y, tile, y_self) -> Found:
    given_x, given_y = _precise(given_x), _precise(given_y)
    pad_x, pad_y, counts = batch.x.pad, batch.y.pad, batch.x.counts * batch.y.counts
    centre = (_mean(given_x, pad_x) + _mean(given_y, pad_y)) / 2
    x, y = _moved(given_x, centre, pad_x), _moved(given_y, centre, pad_y)
    scale = scale_of(x, y)
    x, y = x.div_(scale), y.div_(scale)
    exact, options = (given_x, given_y, scale), {"tile": tile, "pad_x": pad_x, "pad_y": pad_y}
    if want_x or want_y:
        cross, cross_x, cross_y = cross_sums(x, y, exact, want_x=want_x, want_y=want_y, **options)
    else:
        cross, cross_x, cross_y = cross_total(x, y, exact, **options), None, None
    within_x, self_x = _within(x, (given_x, given_x, scale), want_x, tile, pad_x)
    energy = 2 * cross / counts - within_x / pairs[0]
    force_x = _combine(cross_x, counts, self_x, pairs[0])
    if y_self is not None:
        return energy * scale.flatten() - y_self, force_x, None
    within_y, self_y = _within(y, (given_y, given_y, scale), want_y, tile, pad_y)
    energy = (energy - within_y / pairs[1]) * scale.flatten()
    return energy, force_x, _combine(cross_y, counts, self_y, pairs[1])


def mean_within(y: Tensor, pad: Tensor | None, pairs: Tensor | int, tile: int | None) -> Tensor:
    """(group,) float64 mean distance within groups (group, cell, d)."""
    y = _precise(y)
    moved = _moved(y, _mean(y, pad), pad)
    scale = scale_of(moved)
    total = self_total(moved.div_(scale), (y, y, scale), tile=tile, pad=pad)
    return total * scale.flatten() / pairs


def _combine(cross: Tensor | None, counts, within: Tensor | None, pairs) -> Tensor | None:
    """2 cross / counts - 2 within / pairs, in place: sums of unit vectors become the gradient."""
    if cross is None:
        return None
    factors = [2 / counts, 2 / pairs]
    if not isinstance(counts, Tensor) and not isinstance(pairs, Tensor):  # groups of one size
        return cross.mul_(factors[0]).sub_(within, alpha=factors[1])
    factors = [torch.as_tensor(factor, dtype=cross.dtype, device=cross.device) for factor in factors]
    cross.mul_(factors[0].view(-1, 1, 1))
    return cross.sub_(within.mul_(factors[1].view(-1, 1, 1)))


def _within(
    x: Tensor, exact: Exact, want: bool, tile: int | None, pad: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Sum of distances within clouds that are first centred on themselves, and half its gradient where wanted."""
    own = _moved(x, _mean(x, pad), pad)
    if want:
        return self_sums(own, exact, tile=tile, pad=pad)
    return self_total(own, exact, tile=tile, pad=pad), None


def _precise(x: Tensor) -> Tensor:
    """float64 on a device, where close pairs are not looked for."""
    return x if host.looks_are_free(x.device) else x.double()


def _mean(x: Tensor, pad: Tensor | None) -> Tensor:
    if pad is None:
        return x.mean(1, keepdim=True)
    return x.sum(1, keepdim=True) / (~pad).sum(1, dtype=x.dtype)[:, None, None]


def _moved(x: Tensor, centre: Tensor, pad: Tensor | None) -> Tensor:
    moved = x - centre
    return moved if pad is None else moved.masked_fill_(pad.unsqueeze(-1), 0)
