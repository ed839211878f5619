"""Sums of Euclidean distances and their gradients, tile by tile or group by group.

With the augmented rows :math:`L_j = [y_j, |y_j|^2, 1]` and :math:`R_i = [-2 x_i, 1, |x_i|^2]` one product
gives :math:`d_{ij}^2 = R_i L_j`; with :math:`w_{ij} = 1/d_{ij}` a second, :math:`G_i = \\sum_j w_{ij} L_j`,
gives both the row's sum of distances, :math:`R_i G_i = \\sum_j w_{ij} d_{ij}^2`, and its gradient,
:math:`x_i \\sum_j w_{ij} - \\sum_j w_{ij} y_j`. Between the two products a tile is passed over twice.

The product form loses digits where two points are close compared with their norms: clouds are centred first,
and pairs that are still close are taken out of the tile (:data:`CLOSE`) and computed from their differences. On a
device the host would have to wait to find them: there the products are float64, which blurs no pair that counts
(:class:`_Softened`).

All clouds here are (group, cell, d); tiling is for one group, padding for many.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import host

CLOSE = 1e-3
"""Pairs with d^2 below this share of |x|^2 + |y|^2 come from differences; above it, d is good to 1e-4."""

NEAREST = 2.0**-46
"""On a device, in float64: the least d^2 as a share of the largest squared norm. Pairs closer than 1.2e-7 of the clouds'
radius pull in proportion to their distance, where others pull with one unit."""

Exact = tuple[Tensor, Tensor, Tensor]
"""Clouds x and y as given, and the scale (group, 1, 1): centring may round small differences away."""

_PAIRS_AT_ONCE = 1 << 15
_TILE_BYTES = 1 << 20  # a tile is visited four times, so it has to stay in the cores' own cache
_DEVICE_TILE_BYTES = 1 << 27  # of a device, large enough to keep it busy while the host makes the next calls


def scale_of(*clouds: Tensor) -> Tensor:
    """(group, 1, 1) power of two above every norm: dividing by it is exact, and norms are below 1."""
    norms = [cloud.abs().amax((-2, -1), keepdim=True) for cloud in clouds]
    bound = functools.reduce(torch.maximum, norms) * math.sqrt(clouds[0].shape[-1])
    return torch.exp2(torch.frexp(bound).exponent.to(bound.dtype))


def pieces(n: int, tile: int | None, like: Tensor) -> list[slice]:
    """Even pieces of range(n), no longer than the tile; a tile of cache size where None."""
    most = _TILE_BYTES if host.looks_are_free(like.device) else _DEVICE_TILE_BYTES
    side = tile or math.isqrt(most // like.dtype.itemsize)
    step = math.ceil(n / math.ceil(n / side))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def left_rows(z: Tensor, pad: Tensor | None) -> Tensor:
    """The augmented rows L."""
    norms = z.square().sum(-1, keepdim=True)
    if pad is None:
        return torch.cat([z, norms, torch.ones_like(norms)], -1)
    # A padding row is at distance 1 from every other row and adds nothing to a gradient.
    pad = pad.unsqueeze(-1)
    return torch.cat([z, norms.masked_fill(pad, 1), (~pad).to(z.dtype), pad.to(z.dtype)], -1)


def no_padding(z: Tensor) -> Tensor:
    """The mask of clouds (..., cell, d) that are full: False (..., cell)."""
    return torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device)


@functools.lru_cache(maxsize=32)
def _form(d: int, padded: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix M with R = L M, so that d^2 = L_i M L_j."""
    form = torch.diag(torch.tensor([-2.0] * d + [0.0, 0.0] + [1.0] * padded, dtype=dtype, device=device))
    form[d, d + 1] = form[d + 1, d] = 1
    return form


def right_rows(left: Tensor, d: int) -> Tensor:
    """The augmented rows R of the same points."""
    return left @ _form(d, left.shape[-1] == d + 3, left.dtype, left.device)


def product(a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> None:
    """out = beta out + a b, for one group or many."""
    if len(a) == 1:
        torch.addmm(out[0], a[0], b[0], beta=beta, out=out[0])
    else:
        torch.baddbmm(out, a, b, beta=beta, out=out)


def _row_sums(right: Tensor, gathered: Tensor, pad: Tensor | None) -> Tensor:
    """(group,) float64 sum over real rows of R_i G_i."""
    sums = (right * gathered).sum(-1)
    return (sums if pad is None else sums.masked_fill(pad, 0)).sum(-1, dtype=torch.float64)


def _force(z: Tensor, gathered: Tensor) -> Tensor:
    """Row gradients z_i sum_j w_ij - sum_j w_ij z_j."""
    d = z.shape[-1]
    return torch.addcmul(-gathered[..., :d], z, gathered[..., d + 1 : d + 2])


class _ClosePairs:
    """Distances and gradients of the pairs that the product form would blur."""

    def __init__(self, exact: Exact, norms_x: Tensor, norms_y: Tensor):
        self.x, self.y, self.scale = exact
        self.norms_x, self.norms_y = norms_x, norms_y
        self.limit = CLOSE * float(norms_x.amax() + norms_y.amax())
        self.total: Tensor | float = 0.0
        self.pull_x: Tensor | None = None
        self.pull_y: Tensor | None = None

    def take_out(
        self, d2: Tensor, rows: slice, columns: slice, *, weight: int,
        want_x: bool = False, want_y: bool = False, left: float = math.inf,
    ) -> None:  # fmt: skip
        """Move the close pairs of the tile d2 (group, row, column) here; `left` is left in their places."""
        if not d2.amin() <= self.limit:  # equal where every cell is one point
            return
        norms = self.norms_x[:, rows].unsqueeze(-1) + self.norms_y[:, columns].unsqueeze(-2)
        for part in (d2 <= CLOSE * norms).nonzero().split(_PAIRS_AT_ONCE):
            group, i, j = part.unbind(-1)
            d2[group, i, j] = left
            i, j = i + rows.start, j + columns.start
            unit = self._add(group, i, j, weight)
            if want_x:
                self.pull_x = torch.zeros_like(self.x) if self.pull_x is None else self.pull_x
                self.pull_x.index_put_((group, i), unit, accumulate=True)
            if want_y:
                self.pull_y = torch.zeros_like(self.y) if self.pull_y is None else self.pull_y
                self.pull_y.index_put_((group, j), unit, accumulate=True)

    def _add(self, group: Tensor, i: Tensor, j: Tensor, weight: int) -> Tensor:
        difference = self.x[group, i].double() - self.y[group, j].double()
        distance = difference.norm(dim=-1)
        zeros = distance.new_zeros(len(self.x))
        self.total = self.total + zeros.index_add_(0, group, distance, alpha=weight) / self.scale.flatten()
        # Coincident points pull nowhere: zero is the subgradient of least norm.
        unit = difference / distance.masked_fill(distance == 0, 1).unsqueeze(-1)
        return unit.to(self.x.dtype)


class _Softened:
    """On a device: no pair counts as closer than :data:`NEAREST`, which is far above what float64 products blur.

    Nothing is looked at, so that the host does not wait.
    """

    total, pull_x, pull_y = 0.0, None, None

    def __init__(self, exact: Exact, norms_x: Tensor, norms_y: Tensor):
        self.least = least_square(torch.maximum(norms_x.amax(-1), norms_y.amax(-1)))

    def take_out(self, d2: Tensor, rows: slice, columns: slice, **_) -> None:
        """Bound the tile d2 (group, row, column) from below."""
        torch.maximum(d2, self.least, out=d2)


def least_square(widest: Tensor) -> Tensor:
    """Least d^2 (group, 1, 1) for clouds of the largest squared norms `widest` (group,)."""
    return (NEAREST * widest).clamp_min(1e-290)[:, None, None]


def close_pairs(exact: Exact, norms_x: Tensor, norms_y: Tensor) -> _ClosePairs | _Softened:
    """What becomes of the pairs that the product form would blur, where the clouds lie."""
    kind = _ClosePairs if host.looks_are_free(norms_x.device) else _Softened
    return kind(exact, norms_x, norms_y)


def tiles(rows: list[slice], columns: list[slice], like: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each (rows, columns) with its place in a reused buffer; the upper triangle where both are one list."""
    widest = (rows[0].stop - rows[0].start) * (columns[0].stop - columns[0].start)
    buffer = like.new_empty(len(like) * widest)
    for index, i in enumerate(rows):
        for j in columns[index:] if rows is columns else columns:
            shape = (len(like), i.stop - i.start, j.stop - j.start)
            yield i, j, buffer[: math.prod(shape)].view(shape)


def cross_sums(
    x: Tensor,
    y: Tensor,
    exact: Exact,
    *,
    want_x: bool,
    want_y: bool,
    tile: int | None = None,
    pad_x: Tensor | None = None,
    pad_y: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum over all pairs of |x_i - y_j|, (group,) float64, and its gradients in x, in y, or both.

    x (group, n, d) and y (group, m, d) have norms below 1; `pad_x` and `pad_y` mark padding rows.
    """
    if want_y and not want_x:
        total, grad_y, _ = cross_sums(
            y,
            x,
            (exact[1], exact[0], exact[2]),
            want_x=True,
            want_y=False,
            tile=tile,
            pad_x=pad_y,
            pad_y=pad_x,
        )
        return total, None, grad_y
    if pad_x is not None or pad_y is not None:  # then both need the column
        pad_x, pad_y = (no_padding(z) if pad is None else pad for z, pad in ((x, pad_x), (y, pad_y)))
    d, left_x, left_y = x.shape[-1], left_rows(x, pad_x), left_rows(y, pad_y)
    right = right_rows(left_x, d)
    close = close_pairs(exact, left_x[..., d], left_y[..., d])
    to_x = torch.zeros_like(left_x)
    to_y = torch.zeros_like(left_y) if want_y else None
    for i, j, d2 in tiles(pieces(x.shape[1], tile, x), pieces(y.shape[1], tile, x), x):
        product(right[:, i], left_y[:, j].mT, d2)
        close.take_out(d2, i, j, weight=1, want_x=True, want_y=want_y)
        product(d2.rsqrt_(), left_y[:, j], to_x[:, i], beta=1)
        if to_y is not None:
            product(d2.mT, left_x[:, i], to_y[:, j], beta=1)
    total = _row_sums(right, to_x, pad_x) + close.total
    if pad_x is not None:
        total -= pad_y.sum(-1) * (~pad_x).sum(-1)
    grad_x = _force(x, to_x)
    grad_y = _force(y, to_y) if to_y is not None else None
    if close.pull_x is not None:
        grad_x += close.pull_x
    if grad_y is not None and close.pull_y is not None:
        grad_y -= close.pull_y
    return total, grad_x, grad_y


def self_sums(
    x: Tensor, exact: Exact, *, tile: int | None = None, pad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over ordered pairs i != j of |x_i - x_j|, (group,) float64, and half its gradient.

    Each pair is computed once: a tile above the diagonal stands for its mirror image too.
    """
    d, left = x.shape[-1], left_rows(x, pad)
    right = right_rows(left, d)
    close = close_pairs(exact, left[..., d], left[..., d])
    gathered = torch.zeros_like(left)
    blocks = pieces(x.shape[1], tile, x)
    for i, j, d2 in tiles(blocks, blocks, x):
        twice = i is not j
        product(right[:, i], left[:, j].mT, d2)
        if not twice:
            d2.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
        close.take_out(d2, i, j, weight=1 + twice, want_x=True, want_y=twice)
        product(d2.rsqrt_(), left[:, j], gathered[:, i], beta=1)
        if twice:
            product(d2.mT, left[:, i], gathered[:, j], beta=1)
    total = _row_sums(right, gathered, pad) + close.total
    if pad is not None:
        total -= pad.sum(-1) * (~pad).sum(-1)
    force = _force(x, gathered)
    for pull, sign in ((close.pull_x, 1), (close.pull_y, -1)):
        force = force if pull is None else force.add_(pull, alpha=sign)
    return total, force
