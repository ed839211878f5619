"""Energy distances of small groups in few calls, all groups at once and every matrix whole.

Both clouds of a group stand in one stack z about their common mean, so that the distances of x to all cells of its
group are one product. With the signs :math:`s_b = -2/|x|(|x| - 1)` for cells b of x and :math:`2/(|x| |y|)` for those
of y, the gradient is :math:`x_a \\sum_b s_b / d_{ab} - \\sum_b s_b z_b / d_{ab}`. Where y is a constant, the distances
within y are summed and no more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import host
from .energy_groups import Batch
from .energy_kernels import CLOSE, least_square

SAFE = (1e-30, 1e30)
"""Largest squared norm of a group for which squares neither overflow nor vanish; else the tiles scale first."""

Found = tuple[Tensor, Tensor | None, Tensor | None]


def joint_energies(
    x: Tensor,
    y: Tensor,
    batch: Batch,
    estimator: str,
    *,
    want_x: bool = True,
    want_y: bool = False,
    y_self: Tensor | None = None,
) -> Found | None:
    """Energy distances of the groups x (group, n, d) and y (group, m, d) of a batch, with their gradients.

    Parameters
    ----------
    want_x, want_y
        Which gradients are wanted; that of y comes with that of x.
    y_self
        (group,) mean distance within y, where it is known.

    Returns
    -------
    Values (group,) float64 and the gradients of x and y (None where not wanted); those of padding are undefined.
    None in all where two cells are so close that a product would blur their distance; on a device never, where
    products in float64 blur none.
    """
    n = x.shape[1]
    z, norms, widest = _stacked(x, y, batch)
    own, others = (z[:, :n], norms[:, :n]), (z[:, n:], norms[:, n:])
    signs, diagonal = batch.signs(estimator, x.dtype, x.device), widest.double().sqrt()
    d2 = _squares(own, (z, norms), widest)
    if d2 is None:
        return None
    force_x, force_y, across = None, None, None
    distances = d2.sqrt_()
    value = _sums(distances, signs.sum_x, batch.x.pad)
    if want_x:
        weights = distances.reciprocal_()  # one array of pairs lives at a time
        force_x = _force(own[0], weights, z, signs.pull_x)
        across = weights[:, :, n:].mT if want_y else None
    if y_self is not None:
        return value.sub_(y_self).add_(diagonal * signs.own_x), force_x, None
    d2 = _squares(others, others, widest)
    if d2 is None:
        return None
    if across is not None:
        weights = torch.cat([across, d2.rsqrt()], 2)
        force_y = _force(others[0], weights, z, signs.pull_y)
    value += _sums(d2.sqrt_(), signs.sum_y, batch.y.pad)
    return value.add_(diagonal * signs.own), force_x, force_y


def _stacked(x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """z (group, cell, d) about its mean in new memory, squared norms (group, cell), and the largest of a group.

    Padding stands in the middle with the largest norm: far from all, so that no pair with it looks close.
    """
    z = torch.cat([x, y], 1)
    if batch.pad is None:
        z.sub_(z.mean(1, keepdim=True))
        norms = z.square().sum(2)
        return z, norms, norms.amax(1)
    cells = (~batch.pad).sum(1, dtype=z.dtype)
    z.sub_(z.sum(1, keepdim=True) / cells[:, None, None]).masked_fill_(batch.pad.unsqueeze(2), 0)
    norms = z.square().sum(2)
    widest = norms.amax(1)
    return z, torch.where(batch.pad, widest.unsqueeze(1), norms), widest


def _squares(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], widest: Tensor) -> Tensor | None:
    """Squared distances (group, row, column), the largest norm on the diagonal; None where some are too close."""
    (a, of_a), (b, of_b) = rows, columns
    d2 = (of_a.unsqueeze(2) + of_b.unsqueeze(1)).baddbmm_(a, b.mT, alpha=-2)
    if not host.looks_are_free(d2.device):
        torch.maximum(d2, least_square(widest), out=d2)
        d2.diagonal(dim1=1, dim2=2).copy_(widest.clamp_min(1e-290).unsqueeze(1))
        return d2
    d2.diagonal(dim1=1, dim2=2).copy_(widest.unsqueeze(1))
    # Python compares a few numbers faster than torch is called.
    nearest = zip(d2.amin((1, 2)).tolist(), widest.tolist(), strict=True)
    return d2 if all(near > 2 * CLOSE * wide and SAFE[0] < wide < SAFE[1] for near, wide in nearest) else None


def _sums(distances: Tensor, signs: Tensor, pad: Tensor | None) -> Tensor:
    """(group,) float64 sum of signed distances over the rows that are no padding."""
    rows = _signed(distances, signs)
    return (rows if pad is None else rows.masked_fill_(pad, 0)).sum(1, dtype=torch.float64)


def _signed(matrices: Tensor, signs: Tensor) -> Tensor:
    """(group, row) sums of matrices (group, row, cell) times the signs of their columns."""
    # A batched product with one column is many times slower than either.
    return matrices @ signs if signs.dim() == 1 else torch.linalg.vecdot(matrices, signs.unsqueeze(1))


def _force(rows: Tensor, weights: Tensor, z: Tensor, signs: Tensor) -> Tensor:
    """Gradient z_a sum_b s_b w_ab - sum_b s_b w_ab z_b."""
    own = rows * _signed(weights, signs).unsqueeze(2)
    return torch.baddbmm(own, weights, z * signs.unsqueeze(-1), alpha=-1)
