"""Energy distance between clouds of cells: exact, tiled, its gradient accumulated in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import host
from .energy_batch import Found, energies, is_small, joint, mean_within
from .energy_checks import ESTIMATORS, as_sizes, check_cloud, check_estimator, check_pair
from .energy_groups import batches
from .memory import keep_freed_memory

_PLAIN = (torch.float32, torch.float64)


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
    found = _small_pair(x, y, estimator, known) if tile is None else None
    if found is not None:
        return _Found.apply(x, y, *found)
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
    x_sizes, y_sizes = as_sizes(x_sizes), as_sizes(y_sizes)
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
    groups = (len(y),) if sizes is None else as_sizes(sizes)
    check_estimator(estimator)
    check_cloud("y", y, groups, 2 if estimator == "U" else 1, True)
    y = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    out = y.new_empty(len(groups))
    with torch.autocast(y.device.type, enabled=False):
        for batch in batches(groups, groups, y.device):
            place = batch.y
            mean = mean_within(place.gather(y), place.pad, place.pairs(estimator), tile)
            out[batch.groups] = mean.to(y.dtype)
    return out.squeeze(0) if sizes is None else out


def _small_pair(x: Tensor, y: Tensor, estimator: str, y_self: Tensor | None) -> Found | None:
    """Energy distance and gradients of two small clouds, without the detours that many groups need.

    None for all that is large, close, unusual or to be refused: the general way decides.
    """
    plain = x.dim() == y.dim() == 2 and x.dtype == y.dtype in _PLAIN and x.shape[1] == y.shape[1]
    plain = plain and estimator in ESTIMATORS and min(len(x), len(y)) > 1 and host.looks_are_free(x.device)
    if not plain or not is_small(1, len(x), len(y), x.device) or (y_self is not None and y.requires_grad):
        return None
    keep_freed_memory()
    (batch,) = batches((len(x),), (len(y),), x.device)
    wanted = torch.is_grad_enabled() and x.requires_grad, torch.is_grad_enabled() and y.requires_grad
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        found = joint(x[None], y[None], batch, estimator, *wanted, y_self)
    return None if found is None else tuple(part if part is None else part[0] for part in found)


class _Found(torch.autograd.Function):
    """A value that is known, with its gradients."""

    @staticmethod
    def forward(ctx, x, y, value, grad_x, grad_y):
        ctx.save_for_backward(grad_x, grad_y)
        return value.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *(None if grad is None else grad * upstream for grad in ctx.saved_tensors), None, None, None


class _GroupedEnergy(torch.autograd.Function):
    """(group,) energy distances; the forward pass keeps nothing but the gradients of x and y."""

    @staticmethod
    def forward(ctx, x, y, x_sizes, y_sizes, estimator, tile, y_self):
        keep_freed_memory()
        want_x, want_y = ctx.needs_input_grad[:2]
        grad_x, grad_y = torch.empty_like(x) if want_x else None, torch.empty_like(y) if want_y else None
        value = x.new_empty(len(x_sizes), dtype=torch.float64)
        options = {"estimator": estimator, "tile": tile, "y_self": y_self}
        with torch.autocast(x.device.type, enabled=False):
            for batch in batches(x_sizes, y_sizes, x.device):
                clouds = batch.x.gather(x), batch.y.gather(y)
                found = energies(*clouds, batch, want_x=want_x, want_y=want_y, **options)
                value[batch.groups] = found[0]
                for place, force, grad in ((batch.x, found[1], grad_x), (batch.y, found[2], grad_y)):
                    if grad is not None:
                        place.scatter(force, grad)
        ctx.sizes = x_sizes, y_sizes
        ctx.save_for_backward(grad_x, grad_y)
        return value.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        grads = []
        for grad, sizes in zip(ctx.saved_tensors, ctx.sizes, strict=True):
            grads.append(None if grad is None else _weighted(grad, upstream, sizes))
        return *grads, None, None, None, None, None


def _weighted(grad: Tensor, upstream: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Rows of each group times the group's number, in new memory."""
    if min(sizes) == max(sizes):
        return (grad.unflatten(0, (len(sizes), -1)) * upstream[:, None, None]).view_as(grad)
    counts = torch.tensor(sizes, device=grad.device)
    return grad * upstream.repeat_interleave(counts, output_size=len(grad)).unsqueeze(-1)
