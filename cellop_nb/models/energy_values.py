"""Sums of Euclidean distances where nobody asks for a gradient: a root and a sum a tile instead of a second product.

Tiles, padding and close pairs are those of :mod:`~cellop_nb.models.energy_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .energy_kernels import Exact, close_pairs, left_rows, no_padding, pieces, product, right_rows, tiles


def cross_total(
    x: Tensor, y: Tensor, exact: Exact, *, tile: int | None, pad_x: Tensor | None, pad_y: Tensor | None
) -> Tensor:
    """Sum over all pairs of |x_i - y_j|, (group,) float64; arguments as of ``cross_sums``."""
    if pad_x is not None or pad_y is not None:  # then both need the column
        pad_x, pad_y = (no_padding(z) if pad is None else pad for z, pad in ((x, pad_x), (y, pad_y)))
    d, left_x, left_y = x.shape[-1], left_rows(x, pad_x), left_rows(y, pad_y)
    right, sums = right_rows(left_x, d), x.new_zeros(x.shape[:2])
    close = close_pairs(exact, left_x[..., d], left_y[..., d])
    for i, j, d2 in tiles(pieces(x.shape[1], tile, x), pieces(y.shape[1], tile, x), x):
        product(right[:, i], left_y[:, j].mT, d2)
        close.take_out(d2, i, j, weight=1, left=0.0)
        sums[:, i] += d2.sqrt_().sum(-1)
    return _of_real_rows(sums, pad_x, pad_y) + close.total


def self_total(x: Tensor, exact: Exact, *, tile: int | None, pad: Tensor | None) -> Tensor:
    """Sum over ordered pairs i != j of |x_i - x_j|, (group,) float64; arguments as of ``self_sums``."""
    d, left = x.shape[-1], left_rows(x, pad)
    right, sums = right_rows(left, d), x.new_zeros(x.shape[:2])
    close = close_pairs(exact, left[..., d], left[..., d])
    blocks = pieces(x.shape[1], tile, x)
    for i, j, d2 in tiles(blocks, blocks, x):
        product(right[:, i], left[:, j].mT, d2)
        diagonal = d2.diagonal(dim1=-2, dim2=-1) if i is j else None
        if diagonal is not None:
            diagonal.fill_(torch.inf)  # no close pairs
        close.take_out(d2, i, j, weight=1 if i is j else 2, left=0.0)
        if diagonal is not None:
            diagonal.fill_(0.0)
        sums[:, i] += d2.sqrt_().sum(-1)
        if i is not j:
            sums[:, j] += d2.sum(-2)
    return _of_real_rows(sums, pad, pad) + close.total


def _of_real_rows(sums: Tensor, pad_x: Tensor | None, pad_y: Tensor | None) -> Tensor:
    """(group,) float64 sum over real rows, without the padding columns, each at distance 1."""
    if pad_x is None or pad_y is None:
        return sums.sum(-1, dtype=torch.float64)
    total = sums.masked_fill(pad_x, 0).sum(-1, dtype=torch.float64)
    return total - pad_y.sum(-1) * (~pad_x).sum(-1)
