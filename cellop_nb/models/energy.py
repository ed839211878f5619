"""Energy distance between clouds of cells: exact, tiled, its gradient accumulated in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .energy_checks import as_list, check_cloud, check_estimator, check_pair
from .energy_groups import batches, count_pairs, gather, scatter
from .energy_kernels import Exact, cross_sums, joint_energy, scale_of, self_sums

SMALL_PAIRS = 640_000  # up to here the number of calls counts, not the number of pairs


def energy_distance(
    x: Tensor,
    y: Tensor,
    *,
    estimator: str = "U",
    tile: int | None = None,
    y_self: Tensor | float | None = None,
    validate: bool = True,
) -> Tensor:
    r"""Energy distance between two clouds, with the Euclidean norm.

    .. math:: E(X, Y) = 2\, E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|

    Exact, in memory O(n d + tile^2): value and gradient come from one pass over the tiles and are the same
    for every tile size. Coincident points have distance 0 and a zero (sub)gradient.

    Parameters
    ----------
    x, y
        (cell, d) clouds. They need not be paired nor of one size.
    estimator
        "U": unbiased, pairs of a point with itself are left out (may be slightly negative).
        "V": they are counted, as in dcor, pertpy and cell-eval (biased upwards, never negative).
    tile
        Side of a tile in cells; sized to the cache where None.
    y_self
        0-d, :func:`self_distance` of `y`, where it is known; `y` is then a constant.
    validate
        Refuse NaN and infinity. Otherwise they end in a non-finite value.

    Returns
    -------
    0-d tensor, in the units of the latent space, differentiable once with respect to `x` and `y`.

    Raises
    ------
    ModelError
        Empty or non-finite clouds, fewer than 2 cells with "U", different dimensions, unknown estimator.

    References
    ----------
    Szekely and Rizzo (2013), Energy statistics: a class of statistics based on distances, Journal of
    Statistical Planning and Inference 143:1249.
    """
    known = None if y_self is None else torch.as_tensor(y_self, device=x.device).reshape(1)
    options = {"estimator": estimator, "y_self": known, "validate": validate, "tile": tile}
    return grouped_energy_distance(x, y, [len(x)], [len(y)], **options).squeeze(0)


def grouped_energy_distance(
    x: Tensor,
    y: Tensor,
    x_sizes: Sequence[int] | Tensor,
    y_sizes: Sequence[int] | Tensor,
    *,
    estimator: str = "U",
    y_self: Tensor | None = None,
    tile: int | None = None,
    validate: bool = True,
) -> Tensor:
    """Energy distance of each of many pairs of clouds of unequal sizes, in one call.

    Groups of similar size are padded and computed together; large groups are tiled one by one. Value and
    gradient are those of :func:`energy_distance` on each pair of groups.

    Parameters
    ----------
    x, y
        (cell, d) clouds, the groups one after the other.
    x_sizes, y_sizes
        Cells of each group in `x` and in `y`; they sum to the number of rows.
    estimator, tile, validate
        As in :func:`energy_distance`.
    y_self
        (group,) result of :func:`self_distance` for `y`, where it is known; `y` is then a constant.

    Returns
    -------
    (group,) tensor, differentiable once with respect to `x` and `y`.

    Raises
    ------
    ModelError
        As :func:`energy_distance`; also where sizes and rows disagree.
    """
    x_sizes, y_sizes = as_list(x_sizes), as_list(y_sizes)
    check_estimator(estimator)
    check_cloud("x", x, x_sizes, 2 if estimator == "U" else 1, validate)
    check_cloud("y", y, y_sizes, 2 if estimator == "U" and y_self is None else 1, validate)
    check_pair(x, y, x_sizes, y_sizes, y_self)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return _GroupedEnergy.apply(x.to(dtype), y.to(dtype), x_sizes, y_sizes, estimator, tile, y_self)


def self_distance(
    y: Tensor, sizes: Sequence[int] | Tensor | None = None, estimator: str = "U", *, tile: int | None = None
) -> Tensor:
    """Mean distance within a cloud, E||Y - Y'||: the constant term of an energy distance to fixed cells.

    Parameters
    ----------
    y
        (cell, d) cloud, or several one after the other.
    sizes
        Cells of each group, where there are several.
    estimator
        "U" leaves the pairs of a cell with itself out, "V" counts them.

    Returns
    -------
    0-d tensor, or (group,) with `sizes`, without gradient.
    """
    groups = [len(y)] if sizes is None else as_list(sizes)
    check_estimator(estimator)
    check_cloud("y", y, groups, 2 if estimator == "U" else 1, True)
    y = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    out = y.new_empty(len(groups))
    with torch.autocast(y.device.type, enabled=False):
        for batch in batches(groups, groups):
            cloud, _, pad = gather(y, groups, batch)
            moved = _moved(cloud, _mean(cloud, pad), pad)
            scale = scale_of(moved)
            total, _ = self_sums(moved.div_(scale), (cloud, cloud, scale), want=False, tile=tile, pad=pad)
            out[batch] = (total * scale.flatten() / count_pairs(groups, batch, estimator, y.device)).to(
                y.dtype
            )
    return out.squeeze(0) if sizes is None else out


class _GroupedEnergy(torch.autograd.Function):
    """(group,) energy distances; the forward pass keeps nothing but the gradients of x and y."""

    @staticmethod
    def forward(ctx, x, y, x_sizes, y_sizes, estimator, tile, y_self):
        want_x, want_y = ctx.needs_input_grad[:2]
        with torch.autocast(x.device.type, enabled=False):
            found = None
            if len(x_sizes) == 1 and tile is None and (len(x) + len(y)) ** 2 <= SMALL_PAIRS:
                found = _small(x, y, estimator, want_x, want_y, y_self)
            if found is None:
                found = _grouped(x, y, x_sizes, y_sizes, estimator, tile, y_self, want_x, want_y)
        value, grad_x, grad_y = found
        ctx.sizes = x_sizes, y_sizes
        ctx.save_for_backward(grad_x, grad_y)
        return value.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        grads = []
        for grad, sizes in zip(ctx.saved_tensors, ctx.sizes, strict=True):
            per_cell = upstream if len(sizes) == 1 else _repeat(upstream, sizes)
            grads.append(None if grad is None else grad * per_cell.unsqueeze(-1))
        return *grads, None, None, None, None, None


def _small(x, y, estimator, want_x, want_y, y_self):
    """Value (1,) and gradients of one pair of small clouds, or None where cells are too close for it."""
    n, m, known = len(x), len(y), y_self is not None
    pairs_x, pairs_y = (k * (k - (estimator == "U")) for k in (n, m))
    found = joint_energy(x, y, pairs_x, 0 if known else pairs_y, want=want_x or want_y)
    if found is None:
        return None
    value, grad = found
    value = value.view(1) - y_self if known else value.view(1)
    return value, grad[:n] if want_x else None, grad[n:] if want_y else None


def _grouped(x, y, x_sizes, y_sizes, estimator, tile, y_self, want_x, want_y):
    """Values (group,) and gradients, batch by batch of similar groups."""
    grad_x = torch.zeros_like(x) if want_x else None
    grad_y = torch.zeros_like(y) if want_y else None
    value = x.new_empty(len(x_sizes), dtype=torch.float64)
    for batch in batches(x_sizes, y_sizes):
        known = None if y_self is None else y_self[batch]
        clouds = gather(x, x_sizes, batch), gather(y, y_sizes, batch)
        pairs = tuple(count_pairs(sizes, batch, estimator, x.device) for sizes in (x_sizes, y_sizes))
        value[batch], force_x, force_y = _energies(*clouds, pairs, want_x, want_y, tile, known)
        scatter(grad_x, force_x, clouds[0])
        scatter(grad_y, force_y, clouds[1])
    return value, grad_x, grad_y


def _energies(cloud_x, cloud_y, pairs, want_x, want_y, tile, y_self):
    """Energy distances (group,) float64 of a batch of padded groups, with the gradients (group, cell, d)."""
    (given_x, _, pad_x), (given_y, _, pad_y) = cloud_x, cloud_y
    centre = (_mean(given_x, pad_x) + _mean(given_y, pad_y)) / 2
    x, y = _moved(given_x, centre, pad_x), _moved(given_y, centre, pad_y)
    scale = scale_of(x, y)
    x, y = x.div_(scale), y.div_(scale)
    options = {"want_x": want_x, "want_y": want_y, "tile": tile, "pad_x": pad_x, "pad_y": pad_y}
    counts = _count(x, pad_x) * _count(y, pad_y)
    cross, cross_x, cross_y = cross_sums(x, y, (given_x, given_y, scale), **options)
    within_x, self_x = _within(x, (given_x, given_x, scale), want_x, tile, pad_x)
    energy = 2 * cross / counts - within_x / pairs[0]
    force_x = _combine(cross_x, counts, self_x, pairs[0])
    if y_self is not None:
        return energy * scale.flatten() - y_self, force_x, None
    within_y, self_y = _within(y, (given_y, given_y, scale), want_y, tile, pad_y)
    energy = (energy - within_y / pairs[1]) * scale.flatten()
    return energy, force_x, _combine(cross_y, counts, self_y, pairs[1])


def _combine(cross: Tensor | None, counts, within: Tensor | None, pairs) -> Tensor | None:
    """2 cross / counts - 2 within / pairs, in place: sums of unit vectors become the gradient."""
    if cross is None:
        return None
    factors = [2 / number for number in (counts, pairs)]
    if isinstance(counts, int):  # groups of one size
        return cross.mul_(factors[0]).sub_(within, alpha=factors[1])
    factors = [torch.as_tensor(factor, dtype=cross.dtype, device=cross.device) for factor in factors]
    cross.mul_(factors[0].view(-1, 1, 1))
    return cross.sub_(within.mul_(factors[1].view(-1, 1, 1)))


def _within(
    x: Tensor, exact: Exact, want: bool, tile: int | None, pad: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """:func:`self_sums` of clouds that are first centred on themselves."""
    return self_sums(_moved(x, _mean(x, pad), pad), exact, want=want, tile=tile, pad=pad)


def _count(x: Tensor, pad: Tensor | None) -> Tensor | int:
    return x.shape[1] if pad is None else (~pad).sum(1, dtype=torch.float64)


def _mean(x: Tensor, pad: Tensor | None) -> Tensor:
    if pad is None:
        return x.mean(1, keepdim=True)
    return x.sum(1, keepdim=True) / _count(x, pad).to(x.dtype)[:, None, None]


def _moved(x: Tensor, centre: Tensor, pad: Tensor | None) -> Tensor:
    moved = x - centre
    return moved if pad is None else moved.masked_fill_(pad.unsqueeze(-1), 0)


def _repeat(per_group: Tensor, sizes: list[int]) -> Tensor:
    counts = torch.tensor(sizes, device=per_group.device)
    return per_group.repeat_interleave(counts, output_size=sum(sizes))
