"""Energy distance of clouds moved by one affine map per group, its gradient formed for the maps directly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .energy_batch import energies
from .energy_checks import as_sizes, check_cloud, check_estimator, check_pair
from .energy_groups import batches
from .memory import keep_freed_memory


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
    validate: bool = True,
) -> Tensor:
    r"""Energy distance of each group between cells moved by the group's map and fixed cells: the training path.

    .. math:: E(\{A_g z_i + b_g\}, \{y_j\})

    Value and gradient are those of :func:`~cellop_nb.models.energy.grouped_energy_distance` of the moved cells.
    With :math:`F_i` the gradient at moved cell i, :math:`\partial E / \partial A = \sum_i F_i z_i^\top` and
    :math:`\partial E / \partial b = \sum_i F_i` are summed in the forward pass: nothing per cell is kept.

    Parameters
    ----------
    z, y
        (cell, d) cells to move and cells to match, the groups one after the other; both are constants.
    z_sizes, y_sizes
        Cells of each group.
    matrices, shifts
        A (group, d, d) and b (group, d).
    estimator, y_self, validate
        As in :func:`~cellop_nb.models.energy.grouped_energy_distance`.

    Returns
    -------
    (group,) tensor, differentiable once with respect to `matrices` and `shifts`.

    Raises
    ------
    ModelError
        As :func:`~cellop_nb.models.energy.grouped_energy_distance`.
    """
    z_sizes, y_sizes = as_sizes(z_sizes), as_sizes(y_sizes)
    check_estimator(estimator)
    check_cloud("z", z, z_sizes, 2 if estimator == "U" else 1, validate)
    check_cloud("y", y, y_sizes, 2 if estimator == "U" and y_self is None else 1, validate)
    check_pair(z, y, z_sizes, y_sizes, y_self)
    dtype = torch.promote_types(torch.promote_types(z.dtype, matrices.dtype), torch.float32)
    clouds, maps = (z.detach().to(dtype), y.detach().to(dtype)), (matrices.to(dtype), shifts.to(dtype))
    return _MovedEnergy.apply(*clouds, *maps, z_sizes, y_sizes, estimator, y_self)


class _MovedEnergy(torch.autograd.Function):
    """(group,) energy distances; what is kept are the gradients of the maps."""

    @staticmethod
    def forward(ctx, z, y, matrices, shifts, z_sizes, y_sizes, estimator, y_self):
        keep_freed_memory()
        to_matrices, to_shifts = torch.empty_like(matrices), torch.empty_like(shifts)
        value = z.new_empty(len(z_sizes), dtype=torch.float64)
        options = {"estimator": estimator, "y_self": y_self, "want_x": True, "want_y": False}
        with torch.autocast(z.device.type, enabled=False):
            for batch in batches(z_sizes, y_sizes, z.device):
                cells, groups, pad = batch.x.gather(z), batch.groups, batch.x.pad
                moved = torch.baddbmm(shifts[groups].unsqueeze(1), cells, matrices[groups].mT)
                if pad is not None:
                    moved.masked_fill_(pad.unsqueeze(2), 0)
                value[groups], force, _ = energies(moved, batch.y.gather(y), batch, **options)
                force = force.to(cells.dtype)
                force = force if pad is None else force.masked_fill(pad.unsqueeze(2), 0)
                to_matrices[groups] = torch.bmm(force.mT, cells)
                to_shifts[groups] = force.sum(1)
        ctx.save_for_backward(to_matrices, to_shifts)
        return value.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        to_matrices, to_shifts = ctx.saved_tensors
        grads = upstream[:, None, None] * to_matrices, upstream[:, None] * to_shifts
        return None, None, *grads, None, None, None, None
