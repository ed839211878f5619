"""Sums of distances and their gradients from differences, pair by pair: on a device, where no value is looked at.

The products of :mod:`.energy_kernels` blur pairs that are close, and finding those means to wait for the device.
Here no pair has to be found: each distance comes from its difference. Only the gradient of pairs closer than about
1e-4 of the cloud's radius is rounded, in float32 by less than the unit pull of that one pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .energy_kernels import Exact, pieces

_SIDE = 2048  # of a tile: 16 MB of distances


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
    """As :func:`.energy_kernels.cross_sums`; `exact` is not needed."""
    total = x.new_zeros(len(x), dtype=torch.float64)
    force_x = torch.zeros_like(x) if want_x else None
    force_y = torch.zeros_like(y) if want_y else None
    for i in pieces(x.shape[1], tile or _SIDE, x.dtype):
        for j in pieces(y.shape[1], tile or _SIDE, x.dtype):
            near, far = x[:, i], y[:, j]
            distance = torch.cdist(near, far, compute_mode="donot_use_mm_for_euclid_dist")
            for pad, dim in (
                (None if pad_x is None else pad_x[:, i], 2),
                (None if pad_y is None else pad_y[:, j], 1),
            ):
                if pad is not None:
                    distance.masked_fill_(pad.unsqueeze(dim), 0)
            total += distance.sum((1, 2), dtype=torch.float64)
            # Coincident points pull nowhere, and padding neither.
            weight = torch.where(distance > 0, distance.reciprocal(), 0)
            if force_x is not None:
                force_x[:, i] += near * weight.sum(2, keepdim=True) - torch.bmm(weight, far)
            if force_y is not None:
                force_y[:, j] += far * weight.sum(1).unsqueeze(2) - torch.bmm(weight.mT, near)
    return total, force_x, force_y


def self_sums(
    x: Tensor, exact: Exact, *, want: bool, tile: int | None = None, pad: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As :func:`.energy_kernels.self_sums`; `exact` is not needed."""
    total, force, _ = cross_sums(x, x, exact, want_x=want, want_y=False, tile=tile, pad_x=pad, pad_y=pad)
    return total, force
