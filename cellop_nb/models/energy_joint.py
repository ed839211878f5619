"""Energy distances of small groups in few calls, all groups at once and every matrix whole.

The products are those of :mod:`.energy_kernels`. Cells y stand in rows and cells x in columns, so that nothing
is transposed on the way: distances are (group, y, x) and (group, x, x), and what is gathered for the cells x
comes out as (group, d + 2, x).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .energy_kernels import CLOSE

Pairs = Tensor | int
SAFE = (1e-30, 1e30)
"""Largest squared norm of a batch for which squares neither overflow nor vanish; else the tiles scale first."""


def joint_energies(
    x: Tensor,
    y: Tensor,
    pairs: tuple[Pairs, Pairs, Pairs],
    *,
    want_y: bool = False,
    y_self: Tensor | None = None,
    pad_x: Tensor | None = None,
    pad_y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Energy distances of groups x (group, d, n), cells in columns, and y (group, m, d), with their gradients.

    Parameters
    ----------
    pairs
        Number of pairs between x and y, within x, and within y: (group,) float64, or one for all groups.
    want_y
        Whether the gradient of y is wanted too.
    y_self
        (group,) mean distance within y, where it is known.
    pad_x, pad_y
        (group, cell) masks of padding, which holds zeros; both None where no group is padded.

    Returns
    -------
    Values (group,) float64 and the gradients of x (group, d, n) and y (group, m, d; None where not wanted).
    None in all where two cells are so close that a product would blur their distance.
    """
    x, y = _centred(x, y, pad_x, pad_y)
    norms_x, norms_y = x.square().sum(1, keepdim=True), y.square().sum(2, keepdim=True)
    largest = norms_x.amax((1, 2)).maximum(norms_y.amax((1, 2)))
    if not SAFE[0] < float(largest.amax()) < SAFE[1]:
        return None
    far = 2 * CLOSE * largest
    left, right = _augmented(x, norms_x, 1)
    rows, turned = _augmented(y, norms_y, 2)
    cross = _weights(torch.bmm(rows, right), far, pad_y, pad_x)
    own = _weights(_no_diagonal(torch.bmm(left.mT, right)), far, pad_x, pad_x)
    if cross is None or own is None:
        return None
    own = _scaled(torch.bmm(left, own), -1, pairs[1])
    both = _scaled(torch.bmm(rows.mT, cross), 2, pairs[0]).add_(own)
    value = (right * both).sum((1, 2), dtype=torch.float64)
    force_x, force_y = _force(right, both.add_(own), 1), None
    if y_self is not None:
        return value - y_self, force_x, None
    own = _weights(_no_diagonal(torch.bmm(rows, turned.mT)), far, pad_y, pad_y)
    if own is None:
        return None
    own = _scaled(torch.bmm(own, rows), -1, pairs[2])
    value += (turned * own).sum((1, 2), dtype=torch.float64)
    if want_y:
        both = _scaled(torch.bmm(cross, left.mT), 2, pairs[0]).add_(own, alpha=2)
        force_y = _force(turned, both, 2)
    return value, force_x, force_y


def _centred(x: Tensor, y: Tensor, pad_x: Tensor | None, pad_y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both clouds about the middle of their means, in new memory; padding stays at zero."""
    if pad_x is None:
        middle = (x.mean(2) + y.mean(1)).div_(2)
        return x - middle.unsqueeze(2), y - middle.unsqueeze(1)
    cells_x, cells_y = ((~pad).sum(1, keepdim=True, dtype=x.dtype) for pad in (pad_x, pad_y))
    middle = (x.sum(2) / cells_x + y.sum(1) / cells_y).div_(2)
    x, y = x - middle.unsqueeze(2), y - middle.unsqueeze(1)
    return x.masked_fill_(pad_x.unsqueeze(1), 0), y.masked_fill_(pad_y.unsqueeze(2), 0)


def _augmented(z: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """L = [z, |z|^2, 1] and R = [-2 z, 1, |z|^2] along `dim`, so that L . R is the squared distance."""
    ones = torch.ones_like(norms)
    return torch.cat([z, norms, ones], dim), torch.cat([z * -2, ones, norms], dim)


def _no_diagonal(d2: Tensor) -> Tensor:
    d2.diagonal(dim1=1, dim2=2).fill_(math.inf)
    return d2


def _weights(d2: Tensor, far: Tensor, pad_rows: Tensor | None, pad_columns: Tensor | None) -> Tensor | None:
    """1 / d in place of d^2, 0 for padding; None where cells of a group are closer than its `far`."""
    if pad_rows is not None:
        d2.masked_fill_(pad_rows.unsqueeze(2) | pad_columns.unsqueeze(1), math.inf)
    return d2.rsqrt_() if bool((d2.amin((1, 2)) > far).all()) else None


def _scaled(gathered: Tensor, factor: float, pairs: Pairs) -> Tensor:
    """`gathered` times factor / pairs of its group, in place."""
    if isinstance(pairs, Tensor):
        return gathered.mul_((factor / pairs).to(gathered.dtype)[:, None, None])
    return gathered.mul_(factor / pairs)


def _force(right: Tensor, gathered: Tensor, dim: int) -> Tensor:
    """Gradient z sum_j w_j - sum_j w_j z_j, from R = [-2 z, ...] and the gathered [z, |z|^2, 1]."""
    d = right.shape[dim] - 2
    twice, pulled, count = right.narrow(dim, 0, d), gathered.narrow(dim, 0, d), gathered.narrow(dim, d + 1, 1)
    return torch.addcmul(pulled, twice, count, value=0.5).neg_()
