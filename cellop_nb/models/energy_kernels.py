"""Sums of Euclidean distances and their gradients, tile by tile or group by group.

With the augmented rows :math:`L_i = [x_i, |x_i|^2, 1]` and :math:`R_j = [-2 y_j, 1, |y_j|^2]` one product gives
:math:`d_{ij}^2 = L_i R_j`, and with :math:`w_{ij} = 1/d_{ij}` a second one, :math:`G_i = \\sum_j w_{ij} R_j`, gives
both the row's sum of distances, :math:`L_i G_i = \\sum_j w_{ij} d_{ij}^2`, and its gradient,
:math:`x_i \\sum_j w_{ij} - \\sum_j w_{ij} y_j`. Between the two products a tile is passed over twice.

The product form loses digits where two points are close compared with their norms: clouds are centred first, and
pairs that are still close are taken out of the tile (:data:`CLOSE`) and computed from their differences.

All clouds here are (group, cell, d); tiling is for one group, padding for many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CLOSE = 1e-3
"""Pairs with d^2 below this share of |x|^2 + |y|^2 are computed from differences: above it d is good to 1e-5."""

_PAIRS_AT_ONCE = 1 << 15
_TILE_BYTES = 1 << 20  # a tile is visited four times, so it has to stay in the cores' own cache


def scale_of(*clouds: Tensor) -> Tensor:
    """(group, 1, 1) power of two above every norm: dividing by it is exact, and norms are below 1."""
    largest = torch.stack([cloud.abs().amax((-2, -1), keepdim=True) for cloud in clouds]).amax(0)
    bound = largest * math.sqrt(clouds[0].shape[-1])
    return torch.ldexp(torch.ones_like(bound), torch.frexp(bound).exponent)


def pieces(n: int, tile: int | None, dtype: torch.dtype) -> list[slice]:
    """Even pieces of range(n), no longer than the tile; a tile of cache size where None."""
    side = tile or math.isqrt(_TILE_BYTES // dtype.itemsize)
    step = math.ceil(n / math.ceil(n / side))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _augmented(z: Tensor, factor: float, norm: int, one: int, pad: Tensor | None) -> Tensor:
    d = z.shape[-1]
    out = z.new_empty(*z.shape[:-1], d + 2 + (pad is not None))
    torch.mul(z, factor, out=out[..., :d])
    out[..., norm] = z.square().sum(-1)
    out[..., one] = 1
    if pad is not None:
        # A padding row is at distance 1 from every other row and adds nothing to a gradient.
        out[..., norm].masked_fill_(pad, 1)
        out[..., one].masked_fill_(pad, 0)
        out[..., d + 2] = pad
    return out


def _no_padding(z: Tensor) -> Tensor:
    return torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device)


def _left(x: Tensor, pad: Tensor | None) -> Tensor:
    return _augmented(x, 1.0, x.shape[-1], x.shape[-1] + 1, pad)


def _right(y: Tensor, pad: Tensor | None) -> Tensor:
    return _augmented(y, -2.0, y.shape[-1] + 1, y.shape[-1], pad)


def _product(a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> Tensor:
    """out = beta out + a b, for one group or many."""
    if len(a) == 1:
        torch.addmm(out[0], a[0], b[0], beta=beta, out=out[0])
    else:
        torch.baddbmm(out, a, b, beta=beta, out=out)
    return out


def _row_sums(rows: Tensor, gathered: Tensor, pad: Tensor | None) -> Tensor:
    """(group,) float64 sum over real rows of L_i G_i."""
    sums = (rows * gathered).sum(-1, dtype=torch.float64)
    return (sums if pad is None else sums.masked_fill(pad, 0)).sum(-1)


class _ClosePairs:
    """Distances and gradients of the pairs that the product form would blur."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y
        self.norms_x, self.norms_y = x.square().sum(-1), y.square().sum(-1)
        self.total = x.new_zeros(len(x), dtype=torch.float64)
        self.pull_x = self.pull_y = None

    def take_out(self, d2: Tensor, rows: slice, columns: slice, *, fill: float, weight: float = 1.0,
                 want_x: bool = False, want_y: bool = False) -> None:  # fmt: skip
        """Move the close pairs of the tile d2 (group, row, column) here, and leave `fill` in their places."""
        norms_x, norms_y = self.norms_x[:, rows], self.norms_y[:, columns]
        if not d2.amin() < CLOSE * (norms_x.amax() + norms_y.amax()):
            return
        near = (d2 < CLOSE * (norms_x.unsqueeze(-1) + norms_y.unsqueeze(-2))).nonzero()
        for group, i, j in (part.unbind(-1) for part in near.split(_PAIRS_AT_ONCE)):
            d2[group, i, j] = fill
            unit = self._add(group, i + rows.start, j + columns.start, weight)
            if want_x:
                self.pull_x = torch.zeros_like(self.x) if self.pull_x is None else self.pull_x
                self.pull_x.index_put_((group, i + rows.start), unit, accumulate=True)
            if want_y:
                self.pull_y = torch.zeros_like(self.y) if self.pull_y is None else self.pull_y
                self.pull_y.index_put_((group, j + columns.start), unit, accumulate=True)

    def _add(self, group: Tensor, i: Tensor, j: Tensor, weight: float) -> Tensor:
        difference = self.x[group, i] - self.y[group, j]
        distance = difference.double().norm(dim=-1)
        self.total.index_add_(0, group, weight * distance)
        # Coincident points pull nowhere: zero is the subgradient of least norm.
        unit = difference / distance.masked_fill(distance == 0, 1).unsqueeze(-1)
        return unit.to(difference.dtype)


def _tiles(rows: list[slice], columns: list[slice], like: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Every (rows, columns) with its place in one reused buffer; the upper triangle where both are one list."""
    widest = max(piece.stop - piece.start for piece in rows) * max(
        piece.stop - piece.start for piece in columns
    )
    buffer = like.new_empty(len(like) * widest)
    for index, i in enumerate(rows):
        for j in columns[index:] if rows is columns else columns:
            shape = (len(like), i.stop - i.start, j.stop - j.start)
            yield i, j, buffer[: math.prod(shape)].view(shape)


def cross_sums(
    x: Tensor,
    y: Tensor,
    *,
    want_x: bool,
    want_y: bool,
    tile: int | None = None,
    pad_x: Tensor | None = None,
    pad_y: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum over all pairs of |x_i - y_j|, (group,) float64, and its gradients with respect to x and y.

    x (group, n, d) and y (group, m, d) have norms below 1; `pad_x` and `pad_y` mark padding rows, or neither.
    """
    if want_y and not want_x:
        total, grad_y, _ = cross_sums(y, x, want_x=True, want_y=False, tile=tile, pad_x=pad_y, pad_y=pad_x)
        return total, None, grad_y
    if (
        pad_x is not None or pad_y is not None
    ):  # one cloud of a batch may need no padding, but both need the column
        pad_x, pad_y = (_no_padding(z) if pad is None else pad for z, pad in ((x, pad_x), (y, pad_y)))
    d, close = x.shape[-1], _ClosePairs(x, y)
    rows, columns = _left(x, pad_x), _right(y, pad_y)
    to_x = torch.zeros_like(rows) if want_x else None
    to_y = torch.zeros_like(columns) if want_y else None
    total = torch.zeros_like(close.total)
    for i, j, d2 in _tiles(pieces(x.shape[1], tile, x.dtype), pieces(y.shape[1], tile, x.dtype), x):
        _product(rows[:, i], columns[:, j].mT, d2)
        close.take_out(d2, i, j, fill=math.inf if want_x else 0.0, want_x=want_x, want_y=want_y)
        if not want_x:
            total += d2.sqrt_().sum((-2, -1))
            continue
        _product(d2.rsqrt_(), columns[:, j], to_x[:, i], beta=1)
        if want_y:
            _product(d2.mT, rows[:, i], to_y[:, j], beta=1)
    if pad_x is not None:
        padding = pad_y.sum(-1) * (~pad_x).sum(-1)
        total -= padding if want_x else math.prod(d2.shape[1:]) - (~pad_y).sum(-1) * (~pad_x).sum(-1)
    total = total + close.total + (_row_sums(rows, to_x, pad_x) if want_x else 0)
    grad_x = grad_y = None
    if want_x:
        grad_x = torch.addcmul(to_x[..., :d] / 2, x, to_x[..., d : d + 1])
        grad_x = grad_x if close.pull_x is None else grad_x.add_(close.pull_x)
    if want_y:
        grad_y = torch.addcmul(-to_y[..., :d], y, to_y[..., d + 1 : d + 2])
        grad_y = grad_y if close.pull_y is None else grad_y.sub_(close.pull_y)
    return total, grad_x, grad_y


def self_sums(
    x: Tensor, *, want: bool, tile: int | None = None, pad: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Sum over ordered pairs i != j of |x_i - x_j|, (group,) float64, and its gradient; each pair computed once."""
    d, close = x.shape[-1], _ClosePairs(x, x)
    rows, columns = _left(x, pad), _right(x, pad)
    to_x = torch.zeros_like(rows) if want else None
    total, fill = torch.zeros_like(close.total), math.inf if want else 0.0
    blocks = pieces(x.shape[1], tile, x.dtype)
    for i, j, d2 in _tiles(blocks, blocks, x):
        twice = i is not j
        _product(rows[:, i], columns[:, j].mT, d2)
        if not twice:
            d2.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
        close.take_out(d2, i, j, fill=fill, weight=1.0 + twice, want_x=want, want_y=want and twice)
        if not twice:
            d2.diagonal(dim1=-2, dim2=-1).fill_(fill)
        if not want:
            total += (1 + twice) * d2.sqrt_().sum((-2, -1))
            continue
        _product(d2.rsqrt_(), columns[:, j], to_x[:, i], beta=1)
        if twice:
            _product(d2.mT, columns[:, i], to_x[:, j], beta=1)
    if pad is not None:
        real, width = (~pad).sum(-1), pad.shape[-1]
        total -= real * (width - real) if want else width * (width - 1) - real * (real - 1)
    total += close.total
    if not want:
        return total, None
    total += _row_sums(rows, to_x, pad)
    grad = torch.addcmul(to_x[..., :d] / 2, x, to_x[..., d : d + 1])
    for pull, sign in ((close.pull_x, 1), (close.pull_y, -1)):
        grad = grad if pull is None else grad.add_(pull, alpha=sign)
    return total, grad.mul_(2)
