"""The energy distance between clouds of cells: exact, with its gradient in closed form, for many ragged groups at once.

The gradient is a sum of unit vectors, which comes out of the same pass over the pairs of cells as the value, so that
nothing of size (cell, cell) is kept. Groups of similar size are padded to batches. A small batch is computed as whole
matrices (:func:`_joint`), a large one tile by tile (:func:`_pair_sums`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError, check_values, did_you_mean
from . import host

ESTIMATORS = ("U", "V")

CONVENTIONS = {
    "cellop": ("U", 1, 1.0),
    "pertpy": ("V", 1, 1.0),
    "cell-eval": ("V", 1, 1.0),
    "scperturb": ("U", 2, 1.0),
    "geomloss": ("V", 1, 0.5),
}
"""Name of a package: which estimator, power of the Euclidean norm and factor its energy distance has by default."""

CLOSE = 1e-3
"""Pairs with d^2 below this share of |x|^2 + |y|^2 come from differences; above it, d is good to 1e-4."""

NEAREST = 2.0**-46
"""On a device, in float64: the least d^2 as a share of the largest squared norm. Pairs closer than 1.2e-7 of the clouds'
radius pull in proportion to their distance, where others pull with one unit."""

SAFE = (1e-30, 1e30)
"""Largest squared norm of a group for which squares neither overflow nor vanish; else the tiles scale first."""

SMALL_PAIRS = 800_000  # distances of a batch up to which the number of calls counts, not that of pairs
_BATCH_PAIRS = 1 << 17  # padded pairs of one batch of groups: they should stay in the cache
_TILE_BYTES = 1 << 20  # a tile is visited four times, so it has to stay in the cores' own cache
_DEVICE_SMALL_PAIRS = 1 << 23
_DEVICE_BATCH_PAIRS = 1 << 22  # of a device, whose calls each cost as much as thousands of pairs
_DEVICE_TILE_BYTES = 1 << 27  # of a device, large enough to keep it busy while the host makes the next calls
_PADDING = 1.4  # largest ratio of padded to real pairs in one batch
_PAIRS_AT_ONCE = 1 << 15
_WHOLE_MATRIX = 4000  # cells whose matrix of distances is held at once: 128 MB

Energies = tuple[Tensor, Tensor | None, Tensor | None]
"""Energy distances (group,) float64, and the gradients (group, cell, d) of x and y, None where nobody wants them."""


def energy_distance(
    x: Tensor,
    y: Tensor,
    *,
    estimator: str | None = None,
    convention: str = "cellop",
    tile: int | None = None,
    y_self: Tensor | float | None = None,
) -> Tensor:
    r"""Energy distance between two clouds, with the Euclidean norm.

    .. math:: E(X, Y) = 2\, E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|

    Exact, in memory O(n d + tile^2): value and gradient come from one pass over the tiles and are the same
    for every tile size. Coincident points have distance 0 and a zero (sub)gradient.

    Parameters
    ----------
    x, y
        (cell, d) clouds, tensors or numpy arrays. They need not be paired nor of one size.
    estimator
        "U": unbiased, pairs of a point with itself are left out (may be slightly negative).
        "V": they are counted, as in dcor, pertpy and cell-eval (biased upwards, never negative).
        None: that of the convention.
    convention
        Whose number to reproduce. "cellop": U. "pertpy", "cell-eval": V. "geomloss": one half of V. "scperturb": U of the
        *squared* norm, ``2 |mean x - mean y|^2`` less its sampling noise, which sees neither spread nor shape.
    tile
        Side of a tile in cells; sized to the cache where None.
    y_self
        0-d, :func:`self_distance` of `y`, where it was computed before; `y` is then a constant.

    Returns
    -------
    0-d tensor, in the units of the latent space, differentiable once with respect to `x` and `y`.

    Raises
    ------
    ModelError
        Empty or non-finite clouds, fewer than 2 cells with "U", different dimensions, unknown estimator or convention; a
        gradient
        that is to be differentiated again (``create_graph=True``).

    References
    ----------
    Szekely and Rizzo (2013), Energy statistics: a class of statistics based on distances, Journal of
    Statistical Planning and Inference 143:1249. Peidli et al. (2024), scPerturb, Nature Methods 21:531.
    """
    x, y = (torch.from_numpy(cloud) if isinstance(cloud, np.ndarray) else cloud for cloud in (x, y))
    check_values({"tile": tile})
    default, power, factor = _convention(convention, y_self)
    estimator = default if estimator is None else estimator
    if power == 2:
        _check(x, y, ((len(x),), (len(y),)), estimator, None)
        return _squared_energy(x, y, estimator)
    if factor != 1:
        return factor * energy_distance(x, y, estimator=estimator, tile=tile, y_self=y_self)
    y_self = None if y_self is None else torch.as_tensor(y_self, device=x.device).reshape(1)
    energies = _small_pair(x, y, estimator, y_self) if tile is None else None
    if energies is not None:
        value, *gradients = (None if part is None else part[0] for part in energies)
        return _Energy.apply(value.to(x.dtype), gradients, ((len(x),), (len(y),)), x, y)
    return grouped_energy_distance(
        x, y, [len(x)], [len(y)], estimator=estimator, y_self=y_self, tile=tile
    ).squeeze(0)


def grouped_energy_distance(
    x: Tensor,
    y: Tensor,
    x_sizes: Sequence[int] | Tensor,
    y_sizes: Sequence[int] | Tensor,
    *,
    estimator: str = "U",
    y_self: Tensor | None = None,
    tile: int | None = None,
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
    estimator, tile
        As in :func:`energy_distance`.
    y_self
        (group,) result of :func:`self_distance` for `y`, where it was computed before; `y` is then a constant.

    Returns
    -------
    (group,) tensor, differentiable once with respect to `x` and `y`.

    Raises
    ------
    ModelError
        As :func:`energy_distance`; also where sizes and rows disagree.
    """
    sizes = _check(x, y, (x_sizes, y_sizes), estimator, y_self)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    want_x, want_y = (torch.is_grad_enabled() and cloud.requires_grad for cloud in (x, y))
    value = x.new_empty(len(sizes[0]), dtype=torch.float64)
    grad_x, grad_y = torch.empty_like(x) if want_x else None, torch.empty_like(y) if want_y else None
    host.keep_freed_memory()
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for batch in batches(*sizes, x.device):
            clouds = batch.x.gather(x), batch.y.gather(y)
            value[batch.groups], *forces = _energies(
                *clouds, batch, estimator, want_x=want_x, want_y=want_y, tile=tile, y_self=y_self
            )
            for rows, force, grad in zip((batch.x, batch.y), forces, (grad_x, grad_y), strict=True):
                if grad is not None:
                    rows.scatter(force, grad)
    return _Energy.apply(value.to(dtype), (grad_x, grad_y), sizes, x, y)


def moved_energy_distance(
    z: Tensor,
    y: Tensor,
    z_sizes: Sequence[int] | Tensor,
    y_sizes: Sequence[int] | Tensor,
    matrices: Tensor,
    shifts: Tensor,
    *,
    estimator: str = "U",
    y_self: Tensor | None = None,
) -> Tensor:
    r"""Energy distance of each group between cells moved by the group's map and fixed cells: the training path.

    .. math:: E(\{A_g z_i + b_g\}, \{y_j\})

    Value and gradient are those of :func:`grouped_energy_distance` of the moved cells. With :math:`F_i` the gradient
    at moved cell i, :math:`\partial E / \partial A = \sum_i F_i z_i^\top` and :math:`\partial E / \partial b = \sum_i
    F_i` are summed in the forward pass: nothing per cell is kept. NaN is not refused but ends in a value that is not
    finite: the training loop says where it came from.

    Parameters
    ----------
    z, y
        (cell, d) cells to move and cells to match, the groups one after the other; both are constants.
    z_sizes, y_sizes
        Cells of each group.
    matrices, shifts
        A (group, d, d) and b (group, d).
    estimator, y_self
        As in :func:`grouped_energy_distance`.

    Returns
    -------
    (group,) tensor, differentiable once with respect to `matrices` and `shifts`.

    Raises
    ------
    ModelError
        As :func:`grouped_energy_distance`.
    """
    sizes = _check(z, y, (z_sizes, y_sizes), estimator, y_self, finite=False)
    dtype = torch.promote_types(torch.promote_types(z.dtype, matrices.dtype), torch.float32)
    z, y, matrices, shifts = z.to(dtype), y.to(dtype), matrices.to(dtype), shifts.to(dtype)
    value = z.new_empty(len(sizes[0]), dtype=torch.float64)
    by_matrices, by_shifts = torch.empty_like(matrices), torch.empty_like(shifts)
    host.keep_freed_memory()
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        for batch in batches(*sizes, z.device):
            cells, groups, pad = batch.x.gather(z), batch.groups, batch.x.pad
            moved = torch.baddbmm(shifts[groups].unsqueeze(1), cells, matrices[groups].mT)
            if pad is not None:
                moved.masked_fill_(pad.unsqueeze(2), 0)
            value[groups], force, _ = _energies(
                moved, batch.y.gather(y), batch, estimator, want_x=True, want_y=False, y_self=y_self
            )
            force = force.to(dtype) if pad is None else force.to(dtype).masked_fill(pad.unsqueeze(2), 0)
            by_matrices[groups], by_shifts[groups] = torch.bmm(force.mT, cells), force.sum(1)
    one_each = (1,) * len(sizes[0])
    gradients = by_matrices, by_shifts
    return _Energy.apply(value.to(dtype), gradients, (one_each, one_each), matrices, shifts)


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
    groups = (len(y),) if sizes is None else _as_integers(sizes)
    _check_estimator(estimator)
    _check_cloud("y", y, groups, 2 if estimator == "U" else 1)
    y = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    out = y.new_empty(len(groups))
    with torch.autocast(y.device.type, enabled=False):
        for batch in batches(groups, groups, y.device):
            mean, _ = _mean_within(_precise(batch.y.gather(y)), batch.y, estimator, False, tile)
            out[batch.groups] = mean.to(y.dtype)
    return out.squeeze(0) if sizes is None else out


def split_energies(distance: Tensor, first: Tensor) -> Tensor:
    r"""Energy distance (split,) (Euclidean, U-statistic) of many splits of one pooled sample, from its distances alone.

    .. math:: T(s) = \frac{2\,s^\top D(1-s)}{nm} - \frac{s^\top D s}{n(n-1)} - \frac{(1-s)^\top D(1-s)}{m(m-1)}

    with the (cell, cell) distances D of the pooled cells, and `first` (split, cell): 1 for the n cells of the first
    sample, 0 for the m others; n is the same in every split.
    """
    to_first = first @ distance
    return energies_of_sums(
        (to_first * first).sum(1), to_first.sum(1), distance.sum(), first[0].sum(), len(distance)
    )


def energies_of_sums(
    within: Tensor, from_first: Tensor, total: Tensor, n: Tensor | int, cells: int
) -> Tensor:
    """Energy distances (split,) of n cells to the others, from sums of distances: among them, from them to all `cells`,
    and of all pairs."""
    m = cells - n
    between, rest = from_first - within, total - 2 * from_first + within
    return 2 * between / (n * m) - within / (n * (n - 1)) - rest / (m * (m - 1))


def noise_floor(cells: Tensor, *, n_splits: int = 10, seed: int = 0) -> float:
    """The noise floor of a group of cells (cell, d): mean energy distance between random halves; NaN for fewer than 4.

    It is what a perfect prediction scores on average. The U-statistic has no bias, so it lies about 0, below or above;
    how far a single perfect prediction may lie from 0 is what :func:`noise_limit` says.
    """
    values = _between_parts(cells, len(cells) // 2, n_splits, seed)
    return float("nan") if values is None else float(values.mean())


def noise_limit(
    cells: Tensor, n_cells: int | None = None, *, quantile: float = 0.95, n_splits: int = 20, seed: int = 0
) -> float:
    """An energy distance that two samples of one cloud stay below in 95 of 100 draws: what noise alone can show.

    It is a quantile of the distances of random splits of `cells` (cell, d) into `n_cells` (half where None) and the
    others; NaN where a sample would have fewer than 2 cells.
    """
    first = len(cells) // 2 if n_cells is None else min(n_cells, len(cells) - 2)
    values = _between_parts(cells, first, n_splits, seed)
    return float("nan") if values is None else float(values.quantile(quantile))


def _between_parts(cells: Tensor, first: int, n_splits: int, seed: int) -> Tensor | None:
    """(split,) energy distances between `first` random cells and the others; None where a part has fewer than 2."""
    if min(first, len(cells) - first) < 2:
        return None
    cells, generator = cells.detach().cpu(), torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(cells), generator=generator) for _ in range(n_splits)]
    if len(cells) > _WHOLE_MATRIX:
        return torch.stack([energy_distance(cells[order[:first]], cells[order[first:]]) for order in orders])
    centred = cells.double() - cells.double().mean(0)  # products then lose nothing that counts
    distance = torch.cdist(centred, centred, compute_mode="use_mm_for_euclid_dist").fill_diagonal_(0.0)
    chosen = [torch.zeros(len(cells)).index_fill(0, order[:first], 1.0) for order in orders]
    return split_energies(distance, torch.stack(chosen).double())


class _Energy(torch.autograd.Function):
    """A value, 0-d or (group,), that was computed with its `gradients` by the inputs, whose rows belong to the groups
    by `sizes`."""

    @staticmethod
    def forward(ctx, value, gradients, sizes, *inputs):
        ctx.sizes = sizes
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @host.differentiable_once("the energy distance")
    def backward(ctx, upstream):
        saved = zip(ctx.saved_tensors, ctx.sizes, strict=True)
        return None, None, None, *(g if g is None else _weighted(g, upstream, sizes) for g, sizes in saved)


def _weighted(grad: Tensor, upstream: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Rows of each group times the group's number, in new memory."""
    if min(sizes) == max(sizes):
        return (grad.reshape(len(sizes), -1) * upstream.reshape(-1, 1)).view_as(grad)
    counts = torch.tensor(sizes, device=grad.device)
    return grad * upstream.repeat_interleave(counts, output_size=len(grad)).unsqueeze(-1)


def _squared_energy(x: Tensor, y: Tensor, estimator: str) -> Tensor:
    r"""The energy distance of the squared norm: :math:`2 |\bar x - \bar y|^2`, for "U" less :math:`2 v_x / (n - 1)` and
    :math:`2 v_y / (m - 1)` with the mean squared distances :math:`v` of the cells from their mean."""
    x, y = (cloud.to(torch.promote_types(cloud.dtype, torch.float32)) for cloud in (x, y))
    value = 2 * (x.mean(0) - y.mean(0)).square().sum()
    if estimator == "V":
        return value
    return value - sum(2 * cloud.var(0, correction=0).sum() / (len(cloud) - 1) for cloud in (x, y))


# -- what is refused ---------------------------------------------------------------------------------------


def _check(
    x: Tensor, y: Tensor, sizes: tuple, estimator: str, y_self: Tensor | None, finite: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Refuse pairs of clouds that have no energy distance; their sizes as plain integers."""
    x_sizes, y_sizes = map(_as_integers, sizes)
    _check_estimator(estimator)
    least = 2 if estimator == "U" else 1
    _check_cloud("x", x, x_sizes, least, finite)
    _check_cloud("y", y, y_sizes, least if y_self is None else 1, finite)
    if x.shape[1] != y.shape[1]:
        dimensions = f"dimensions {x.shape[1]} and {y.shape[1]}"
        raise ModelError("x and y in one space", dimensions, "embed both with one model")
    if len(x_sizes) != len(y_sizes):
        received = f"{len(x_sizes)} and {len(y_sizes)} groups"
        raise ModelError("a group of y for each group of x", received, "match the groups first")
    if y_self is not None and y.requires_grad:
        fix = "drop y_self, or detach y"
        raise ModelError("a constant y with y_self", "a y that requires a gradient", fix)
    if y_self is not None and tuple(y_self.shape) != (len(y_sizes),):
        expected, received = f"y_self of shape ({len(y_sizes)},)", f"shape {tuple(y_self.shape)}"
        raise ModelError(expected, received, "pass self_distance(y, y_sizes)")
    return x_sizes, y_sizes


def _as_integers(sizes: Sequence[int] | Tensor) -> tuple[int, ...]:
    return tuple(sizes.tolist() if isinstance(sizes, Tensor) else map(int, sizes))


def _convention(name: str, y_self) -> tuple[str, int, float]:
    if name not in CONVENTIONS:
        received = f"{name!r} ({did_you_mean(name, CONVENTIONS)})"
        raise ModelError(f"a convention of {[*CONVENTIONS]}", received, 'pass "cellop" for ours')
    if y_self is not None and CONVENTIONS[name][1] != 1:
        raise ModelError("no y_self with the squared norm", "y_self", "drop y_self")
    return CONVENTIONS[name]


def _check_estimator(estimator: str) -> None:
    if estimator not in ESTIMATORS:
        received = f"{estimator!r} ({did_you_mean(estimator, ESTIMATORS)})"
        raise ModelError('estimator "U" or "V"', received, 'pass "U" for an unbiased distance')


def _check_cloud(name: str, x: Tensor, sizes: Sequence[int], least: int, finite: bool = True) -> None:
    """Refuse a cloud (cell, d) that does not fit its sizes, has too few cells, or is not finite."""
    if x.dim() != 2:
        shape = f"shape {tuple(x.shape)}"
        raise ModelError(f"{name} of shape (cell, d)", shape, "pass one row per cell")
    if sum(sizes) != len(x) or not sizes:
        expected = f"as many rows in {name} as its groups have cells"
        received = f"{len(x)} rows and sizes that sum to {sum(sizes)} over {len(sizes)} groups"
        raise ModelError(expected, received, "pass matching sizes")
    if min(sizes) < least:
        received = f"{min(sizes)} in group {sizes.index(min(sizes))} of {name}"
        fix = "leave the group out" + (', or pass estimator="V" for one cell' if least == 2 else "")
        raise ModelError(f"at least {least} cell(s) in every group", received, fix)
    if finite and not math.isfinite(float(x.detach().sum())) and not torch.isfinite(x).all():
        received = f"NaN or infinity in row {int((~torch.isfinite(x)).any(-1).nonzero()[0])} of {name}"
        raise ModelError("finite coordinates", received, "look at the model that produced that cell")


# -- ragged groups as batches of padded ones -----------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Where the cells of a batch of groups stand among all rows."""

    shape: tuple[int, int]  # groups, cells of the largest one
    index: Tensor | slice  # (group, cell), 0 for padding; a slice where nothing has to be copied
    pad: Tensor | None  # (group, cell) mask of padding; None where there is none
    counts: Tensor | int  # (group,) cells, float64; one number where all groups have the same

    def pairs(self, estimator: str) -> Tensor | int:
        """Number of ordered pairs within each group: without a cell and itself for "U"."""
        return self.counts * (self.counts - int(estimator == "U"))

    def filled(self, value: Tensor | float) -> Tensor:
        """The value of each group (group,), or of all, for each of its cells: (group, cell) float64, 0 for padding."""
        values = torch.as_tensor(value, dtype=torch.float64).cpu().reshape(-1, 1).expand(self.shape)
        return values if self.pad is None else values.masked_fill(self.pad.cpu(), 0)

    def gather(self, x: Tensor) -> Tensor:
        """Padded groups (group, cell, d) of the rows (cell, d)."""
        if isinstance(self.index, slice):
            return x[self.index].unflatten(0, self.shape)
        cells = x[self.index]
        return cells if self.pad is None else cells.masked_fill_(self.pad.unsqueeze(-1), 0)

    def scatter(self, force: Tensor, grad: Tensor) -> None:
        """Write padded groups (group, cell, d) to the rows of `grad` that they came from."""
        force = force.to(grad.dtype)
        if isinstance(self.index, slice):
            grad[self.index].unflatten(0, self.shape).copy_(force)
        elif self.pad is None:
            grad[self.index] = force
        else:
            grad[self.index[~self.pad]] = force[~self.pad]


@dataclass(frozen=True)
class Signs:
    """Factors of the distances from the cells x, and from the cells y, to the stack of x and y of their group.

    (cell,) where groups are alike, else (group, cell); zero for padding.
    """

    sum_x: Tensor  # in the energy distance: of the stack for x
    sum_y: Tensor  # and of y alone for y
    pull_x: Tensor  # in the gradients: of the stack for both
    pull_y: Tensor
    own_x: Tensor | float  # (group,): what undoes a 1 for the distance of each cell x to itself
    own: Tensor | float  # and of each cell


@dataclass(frozen=True, eq=False)
class Batch:
    """Groups that are computed together: their positions, and the rows of their cells x and y."""

    groups: slice | Tensor
    x: Rows
    y: Rows

    @functools.cached_property
    def pad(self) -> Tensor | None:
        """(group, cell) mask of padding in the stack of x and y; None where there is none."""
        either = self.y.pad if self.x.pad is None else self.x.pad
        if either is None:
            return None
        return torch.cat([rows.filled(1) == 0 for rows in (self.x, self.y)], 1).to(either.device)

    @functools.lru_cache(maxsize=256)  # noqa: B019 (batches are remembered anyway)
    def signs(self, estimator: str, dtype: torch.dtype, device: torch.device) -> Signs:
        """The signs of an energy distance."""
        across = 2 / (self.x.counts * self.y.counts)
        in_x, in_y = -2 / self.x.pairs(estimator), -2 / self.y.pairs(estimator)
        pull_x = torch.cat([self.x.filled(in_x), self.y.filled(across)], 1)
        pull_y = torch.cat([self.x.filled(across), self.y.filled(in_y)], 1)
        sum_x = torch.cat([self.x.filled(in_x / 2), self.y.filled(across)], 1)
        parts = [part.to(device, dtype) for part in (sum_x, self.y.filled(in_y / 2), pull_x, pull_y)]
        own_x, own_y = -self.x.counts * in_x / 2, -self.y.counts * in_y / 2
        sum_x, sum_y, pull_x, pull_y = parts if isinstance(across, Tensor) else (part[0] for part in parts)
        return Signs(sum_x, sum_y, pull_x, pull_y, own_x, own_x + own_y)


@functools.lru_cache(maxsize=64)
def batches(x_sizes: tuple[int, ...], y_sizes: tuple[int, ...], device: torch.device) -> tuple[Batch, ...]:
    """The groups' cut into batches; remembered, since training asks for the same sizes in every step."""
    most = _BATCH_PAIRS if host.looks_are_free(device) else _DEVICE_BATCH_PAIRS
    chosen = list(_cut(x_sizes, y_sizes, most))
    positions = (_positions(batch, device) for batch in chosen)
    return tuple(map(Batch, positions, _rows(x_sizes, chosen, device), _rows(y_sizes, chosen, device)))


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


def _positions(batch: list[int], device: torch.device) -> slice | Tensor:
    first = batch[0]
    neighbours = batch == list(range(first, first + len(batch)))
    return slice(first, first + len(batch)) if neighbours else torch.tensor(batch, device=device)


def _rows(sizes: tuple[int, ...], chosen: list[list[int]], device: torch.device) -> Iterator[Rows]:
    """The rows of each batch of groups."""
    starts = [0, *itertools.accumulate(sizes)]
    for batch in chosen:
        cells, begin = [sizes[g] for g in batch], [starts[g] for g in batch]
        most, shape = max(cells), (len(batch), max(cells))
        even = min(cells) == most
        if even and begin == list(range(begin[0], begin[0] + most * len(batch), most)):  # neighbours
            yield Rows(shape, slice(begin[0], begin[0] + most * len(batch)), None, most)
            continue
        position = torch.arange(most)
        pad = position >= torch.tensor(cells)[:, None]
        index = torch.where(pad, 0, torch.tensor(begin)[:, None] + position).to(device)
        counts = most if even else torch.tensor(cells, dtype=torch.float64, device=device)
        yield Rows(shape, index, None if even else pad.to(device), counts)


# -- one batch -----------------------------------------------------------------------------------------------


def _small_pair(x: Tensor, y: Tensor, estimator: str, y_self: Tensor | None) -> Energies | None:
    """Energy distance and gradients of two small clouds, without the detours that many groups need.

    None for all that is large, close, unusual or to be refused: the general way decides.
    """
    plain = x.dim() == y.dim() == 2 and x.dtype == y.dtype in (torch.float32, torch.float64)
    plain = plain and x.shape[1] == y.shape[1] and estimator in ESTIMATORS and min(len(x), len(y)) > 1
    if not plain or not host.looks_are_free(x.device) or not _is_small(1, len(x), len(y), x.device):
        return None
    want_x, want_y = (torch.is_grad_enabled() and cloud.requires_grad for cloud in (x, y))
    if want_y and (y_self is not None or not want_x):
        return None
    host.keep_freed_memory()
    (batch,) = batches((len(x),), (len(y),), x.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return _joint(x[None], y[None], batch, estimator, want_x=want_x, want_y=want_y, y_self=y_self)


def _is_small(groups: int, n: int, m: int, device: torch.device) -> bool:
    """Whether the distances of groups of n and m cells are computed as whole matrices."""
    most = SMALL_PAIRS if host.looks_are_free(device) else _DEVICE_SMALL_PAIRS
    return groups * (n + m) * max(n, m) <= most


def _precise(x: Tensor) -> Tensor:
    """float64 on a device, where close pairs are not looked for."""
    return x if host.looks_are_free(x.device) else x.double()


def _energies(
    x: Tensor,
    y: Tensor,
    batch: Batch,
    estimator: str,
    *,
    want_x: bool,
    want_y: bool,
    tile: int | None = None,
    y_self: Tensor | None = None,
) -> Energies:
    """Energy distances of a batch of groups x (group, n, d) and y (group, m, d), padded with zeros.

    Gradients of padding rows are undefined.
    """
    if want_y and not want_x:
        turned = Batch(batch.groups, batch.y, batch.x)
        energy, force, _ = _energies(y, x, turned, estimator, want_x=True, want_y=False, tile=tile)
        return energy, None, force
    x, y = _precise(x), _precise(y)
    y_self = None if y_self is None else y_self[batch.groups]
    if tile is None and _is_small(len(x), x.shape[1], y.shape[1], x.device):
        energies = _joint(x, y, batch, estimator, want_x=want_x, want_y=want_y, y_self=y_self)
        if energies is not None:
            return energies
    centre = (_mean(x, batch.x.pad) + _mean(y, batch.y.pad)) / 2
    near_x, near_y = _moved(x, centre, batch.x.pad), _moved(y, centre, batch.y.pad)
    scale = _scale_of(near_x, near_y)
    near_x, near_y = near_x.div_(scale), near_y.div_(scale)
    pads, counts = (batch.x.pad, batch.y.pad), batch.x.counts * batch.y.counts
    cross, cross_x, cross_y = _pair_sums(near_x, near_y, (x, y, scale), pads, tile, want_x, want_y)
    within, self_x = _mean_within(x, batch.x, estimator, want_x, tile)
    energy = cross * scale.flatten() * 2 / counts - within
    force_x = _combined(cross_x, counts, self_x, batch.x.pairs(estimator))
    if y_self is not None:
        return energy - y_self, force_x, None
    within, self_y = _mean_within(y, batch.y, estimator, want_y, tile)
    return energy - within, force_x, _combined(cross_y, counts, self_y, batch.y.pairs(estimator))


def _mean_within(
    x: Tensor, rows: Rows, estimator: str, want: bool, tile: int | None
) -> tuple[Tensor, Tensor | None]:
    """(group,) float64 mean distance within groups (group, cell, d), and half the gradient of its sum where wanted.

    Centred on the cloud itself and from the cells as they came: a centre further away would round their differences.
    """
    own = _moved(x, _mean(x, rows.pad), rows.pad)
    scale = _scale_of(own)
    total, force, _ = _pair_sums(own.div_(scale), None, (x, x, scale), (rows.pad, rows.pad), tile, want, want)
    return total * scale.flatten() / rows.pairs(estimator), force


def _combined(cross: Tensor | None, counts, within: Tensor | None, pairs) -> Tensor | None:
    """2 cross / counts - 2 within / pairs, in place: sums of unit vectors become the gradient."""
    if cross is None:
        return None
    if not isinstance(counts, Tensor) and not isinstance(pairs, Tensor):  # groups of one size
        return cross.mul_(2 / counts).sub_(within, alpha=2 / pairs)
    by_counts, by_pairs = (
        torch.as_tensor(2 / n, dtype=torch.float64).to(cross).view(-1, 1, 1) for n in (counts, pairs)
    )
    return cross.mul_(by_counts).sub_(within.mul_(by_pairs))


def _mean(x: Tensor, pad: Tensor | None) -> Tensor:
    if pad is None:
        return x.mean(1, keepdim=True)
    return x.sum(1, keepdim=True) / (~pad).sum(1, dtype=x.dtype)[:, None, None]


def _moved(x: Tensor, centre: Tensor, pad: Tensor | None) -> Tensor:
    moved = x - centre
    return moved if pad is None else moved.masked_fill_(pad.unsqueeze(-1), 0)


def _scale_of(*clouds: Tensor) -> Tensor:
    """(group, 1, 1) power of two above every norm: dividing by it is exact, and norms are below 1."""
    norms = [cloud.abs().amax((-2, -1), keepdim=True) for cloud in clouds]
    bound = functools.reduce(torch.maximum, norms) * math.sqrt(clouds[0].shape[-1])
    return torch.exp2(torch.frexp(bound).exponent.to(bound.dtype))


def _least_square(widest: Tensor) -> Tensor:
    """On a device: least d^2 (group, 1, 1) for clouds of the largest squared norms `widest` (group,)."""
    return (NEAREST * widest).clamp_min(1e-290)[:, None, None]


# -- small groups: whole matrices, in few calls ---------------------------------------------------------------


def _joint(
    x: Tensor, y: Tensor, batch: Batch, estimator: str, *, want_x: bool, want_y: bool, y_self: Tensor | None
) -> Energies | None:
    r"""Energy distances of small groups x (group, n, d) and y (group, m, d), all at once and every matrix whole.

    Both clouds of a group stand in one stack z about their common mean. With the signs :math:`s_b = -2/|x|(|x| - 1)` for
    cells b of x and :math:`2/(|x| |y|)` for those of y, the gradient is :math:`x_a \sum_b s_b / d_{ab} - \sum_b s_b z_b /
    d_{ab}`. None where two cells are so close that a product would blur their distance (on a device never).
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
    value = _signed_sum(distances, signs.sum_x, batch.x.pad)
    if want_x:
        weights = distances.reciprocal_()  # one array of pairs lives at a time
        force_x = _signed_force(own[0], weights, z, signs.pull_x)
        across = weights[:, :, n:].mT if want_y else None
    if y_self is not None:
        return value.sub_(y_self).add_(diagonal * signs.own_x), force_x, None
    d2 = _squares(others, others, widest)
    if d2 is None:
        return None
    if across is not None:
        weights = torch.cat([across, d2.rsqrt()], 2)
        force_y = _signed_force(others[0], weights, z, signs.pull_y)
    value += _signed_sum(d2.sqrt_(), signs.sum_y, batch.y.pad)
    return value.add_(diagonal * signs.own), force_x, force_y


def _stacked(x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """z (group, cell, d) about its mean in new memory, squared norms (group, cell), and the largest of a group.

    Padding stands in the middle with the largest norm: far from all, so that no pair with it looks close.
    """
    z = torch.cat([x, y], 1)
    z.sub_(_mean(z, batch.pad))
    if batch.pad is not None:
        z.masked_fill_(batch.pad.unsqueeze(2), 0)
    norms = z.square().sum(2)
    widest = norms.amax(1)
    return z, norms if batch.pad is None else torch.where(batch.pad, widest.unsqueeze(1), norms), widest


def _squares(rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], widest: Tensor) -> Tensor | None:
    """Squared distances (group, row, column), the largest norm on the diagonal; None where some are too close."""
    (a, of_a), (b, of_b) = rows, columns
    d2 = (of_a.unsqueeze(2) + of_b.unsqueeze(1)).baddbmm_(a, b.mT, alpha=-2)
    if not host.looks_are_free(d2.device):
        torch.maximum(d2, _least_square(widest), out=d2)
        d2.diagonal(dim1=1, dim2=2).copy_(widest.clamp_min(1e-290).unsqueeze(1))
        return d2
    d2.diagonal(dim1=1, dim2=2).copy_(widest.unsqueeze(1))
    # Python compares a few numbers faster than torch is called.
    nearest = zip(d2.amin((1, 2)).tolist(), widest.tolist(), strict=True)
    return d2 if all(near > 2 * CLOSE * wide and SAFE[0] < wide < SAFE[1] for near, wide in nearest) else None


def _signed_sum(distances: Tensor, signs: Tensor, pad: Tensor | None) -> Tensor:
    """(group,) float64 sum of signed distances over the rows that are no padding."""
    rows = _times_signs(distances, signs)
    return (rows if pad is None else rows.masked_fill_(pad, 0)).sum(1, dtype=torch.float64)


def _times_signs(matrices: Tensor, signs: Tensor) -> Tensor:
    """(group, row) sums of matrices (group, row, cell) times the signs of their columns."""
    # A batched product with one column is many times slower than either.
    return matrices @ signs if signs.dim() == 1 else torch.linalg.vecdot(matrices, signs.unsqueeze(1))


def _signed_force(rows: Tensor, weights: Tensor, z: Tensor, signs: Tensor) -> Tensor:
    """Gradient z_a sum_b s_b w_ab - sum_b s_b w_ab z_b."""
    own = rows * _times_signs(weights, signs).unsqueeze(2)
    return torch.baddbmm(own, weights, z * signs.unsqueeze(-1), alpha=-1)


# -- large groups: tile by tile -------------------------------------------------------------------------------


def _pair_sums(
    x: Tensor,
    y: Tensor | None,
    exact: tuple[Tensor, Tensor, Tensor],
    pads: tuple[Tensor | None, ...],
    tile: int | None,
    want_x: bool,
    want_y: bool,
) -> Energies:
    r"""Sum over all pairs of |x_i - y_j|, (group,) float64, and its gradients in x and y where wanted.

    With y None: over the ordered pairs i != j of x, and half the gradient in x. A tile above the diagonal then stands
    for its mirror image too. x and y (group, cell, d) are centred and scaled to norms below 1; `exact` are the clouds as
    they came, and their scale: centring may round small differences away.

    With the augmented rows :math:`L_j = [y_j, |y_j|^2, 1]` and :math:`R_i = [-2 x_i, 1, |x_i|^2]` one product gives
    :math:`d_{ij}^2 = R_i L_j`; with :math:`w_{ij} = 1/d_{ij}` a second, :math:`G_i = \sum_j w_{ij} L_j`, gives both the
    row's sum of distances, :math:`R_i G_i`, and its gradient, :math:`x_i \sum_j w_{ij} - \sum_j w_{ij} y_j`.
    """
    within, d = y is None, x.shape[-1]
    y = x if within else y
    if any(pad is not None for pad in pads):  # then both need the column
        none = (torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device) for z in (x, y))
        pads = tuple(no_pad if pad is None else pad for no_pad, pad in zip(none, pads, strict=True))
    left_x = _left_rows(x, pads[0])
    left_y = left_x if within else _left_rows(y, pads[1])
    right = left_x @ _form(d, left_x.shape[-1] == d + 3, x.dtype, x.device)
    close = _ClosePairs(exact, left_x[..., d], left_y[..., d])
    to_x = torch.zeros_like(left_x) if want_x else None
    to_y = to_x if within else torch.zeros_like(left_y) if want_y else None
    sums = x.new_zeros(x.shape[:2])
    rows = _pieces(x.shape[1], tile, x)
    for i, j, d2 in _tiles(rows, rows if within else _pieces(y.shape[1], tile, x), x):
        both = want_y and not (within and i is j)
        _product(right[:, i], left_y[:, j].mT, d2)
        diagonal = d2.diagonal(dim1=-2, dim2=-1) if within and i is j else None
        if diagonal is not None:
            diagonal.fill_(math.inf)  # no close pairs
        close.take_out(d2, i, j, 1 + (within and i is not j), want_x, both)
        if to_x is not None:
            _product(d2.rsqrt_(), left_y[:, j], to_x[:, i], beta=1)
            if both and to_y is not None:
                _product(d2.mT, left_x[:, i], to_y[:, j], beta=1)
            continue
        if diagonal is not None:
            diagonal.fill_(0.0)
        sums[:, i] += d2.sqrt_().sum(-1)
        if within and i is not j:
            sums[:, j] += d2.sum(-2)
    sums = sums if to_x is None else (right * to_x).sum(-1)
    total = (sums if pads[0] is None else sums.masked_fill(pads[0], 0)).sum(-1, dtype=torch.float64)
    total = total + close.total
    if pads[0] is not None:  # each padding column was at distance 1
        total -= pads[1].sum(-1) * (~pads[0]).sum(-1)
    if to_x is None:
        return total, None, None
    force_x = _force(x, to_x)
    force_y = force_x if within else _force(y, to_y) if want_y else None
    for pull, force, sign in ((close.pull_x, force_x, 1), (close.pull_y, force_y, -1)):
        if pull is not None:
            force.add_(pull, alpha=sign)
    return total, force_x, force_y


def _pieces(n: int, tile: int | None, like: Tensor) -> list[slice]:
    """Even pieces of range(n), no longer than the tile; a tile of cache size where None."""
    most = _TILE_BYTES if host.looks_are_free(like.device) else _DEVICE_TILE_BYTES
    side = tile or math.isqrt(most // like.dtype.itemsize)
    step = math.ceil(n / math.ceil(n / side))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _tiles(rows: list[slice], columns: list[slice], like: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each (rows, columns) with its part of a reused buffer; the upper triangle where both are one list."""
    widest = (rows[0].stop - rows[0].start) * (columns[0].stop - columns[0].start)
    buffer = like.new_empty(len(like) * widest)
    for index, i in enumerate(rows):
        for j in columns[index:] if rows is columns else columns:
            shape = (len(like), i.stop - i.start, j.stop - j.start)
            yield i, j, buffer[: math.prod(shape)].view(shape)


def _left_rows(z: Tensor, pad: Tensor | None) -> Tensor:
    """The augmented rows L."""
    norms = z.square().sum(-1, keepdim=True)
    if pad is None:
        return torch.cat([z, norms, torch.ones_like(norms)], -1)
    # A padding row is at distance 1 from every other row and adds nothing to a gradient.
    pad = pad.unsqueeze(-1)
    return torch.cat([z, norms.masked_fill(pad, 1), (~pad).to(z.dtype), pad.to(z.dtype)], -1)


@functools.lru_cache(maxsize=32)
def _form(d: int, padded: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix M with R = L M, so that d^2 = L_i M L_j."""
    form = torch.diag(torch.tensor([-2.0] * d + [0.0, 0.0] + [1.0] * padded, dtype=dtype, device=device))
    form[d, d + 1] = form[d + 1, d] = 1
    return form


def _product(a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> None:
    """out = beta out + a b, for one group or many."""
    if len(a) == 1:
        torch.addmm(out[0], a[0], b[0], beta=beta, out=out[0])
    else:
        torch.baddbmm(out, a, b, beta=beta, out=out)


def _force(z: Tensor, gathered: Tensor) -> Tensor:
    """Row gradients z_i sum_j w_ij - sum_j w_ij z_j."""
    d = z.shape[-1]
    return torch.addcmul(-gathered[..., :d], z, gathered[..., d + 1 : d + 2])


class _ClosePairs:
    """The pairs that the product form would blur: on a CPU they are computed from their differences.

    On a device the host would have to wait to find them: there no pair counts as closer than :data:`NEAREST`, which is
    far above what float64 products blur.
    """

    def __init__(self, exact: tuple[Tensor, Tensor, Tensor], norms_x: Tensor, norms_y: Tensor):
        self.x, self.y, self.scale = exact
        self.norms_x, self.norms_y = norms_x, norms_y
        self.total: Tensor | float = 0.0
        self.pull_x: Tensor | None = None
        self.pull_y: Tensor | None = None
        self.least = self.limit = None
        if host.looks_are_free(norms_x.device):
            self.limit = CLOSE * float(norms_x.amax() + norms_y.amax())
        else:
            self.least = _least_square(torch.maximum(norms_x.amax(-1), norms_y.amax(-1)))

    def take_out(
        self, d2: Tensor, rows: slice, columns: slice, weight: int, want_x: bool, want_y: bool
    ) -> None:
        """Move the close pairs of the tile d2 (group, row, column) here; what they leave adds nothing."""
        if self.limit is None:
            torch.maximum(d2, self.least, out=d2)
            return
        if not d2.amin() <= self.limit:  # equal where every cell is one point
            return
        norms = self.norms_x[:, rows].unsqueeze(-1) + self.norms_y[:, columns].unsqueeze(-2)
        for part in (d2 <= CLOSE * norms).nonzero().split(_PAIRS_AT_ONCE):
            group, i, j = part.unbind(-1)
            d2[group, i, j] = math.inf if want_x else 0.0
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
