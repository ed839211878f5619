"""Pairs of clouds, and what their energy distance and its gradient are by the textbook."""

from __future__ import annotations

import math

import torch

from cellop_nb.models.energy import energy_distance


def clouds(n, m, d, seed=0, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(m, d, generator=generator, dtype=torch.float64) + 0.3
    return x.to(dtype).requires_grad_(grad), y.to(dtype).requires_grad_(grad)


def double_loop(x, y, estimator):
    """Textbook definition, one pair at a time."""
    x, y = (z.detach().double().numpy() for z in (x, y))

    def mean(a, b, within):
        total = sum(math.dist(p, q) for p in a for q in b)
        return total / (len(a) * (len(b) - (within and estimator == "U")))

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


def value_and_gradient(x, y, **options):
    value = energy_distance(x, y, **options)
    return value, *torch.autograd.grad(value, (x, y))
