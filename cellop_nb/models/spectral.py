"""The stability penalty: how far operators stretch, by their spectral norms."""

from __future__ import annotations

import torch
from torch import Tensor

from . import host


def spectral_excess(matrices: Tensor, max_norm: float) -> Tensor:
    r"""Stability penalty of operators (condition, d, d), averaged over conditions.

    .. math:: \frac1n \sum_\theta \max(0, \|A_\theta\|_2 - \rho)^2

    It acts on the operators of the conditions themselves; bounding the norms of their parts apart would not
    bound their sum. The norm is the exact largest singular value; on a CPU the decomposition is left out where
    :math:`1 + \|A_\theta - I\|_F` or :func:`norm_bound` already is below rho.
    """
    if host.looks_are_free(matrices.device):
        departure = matrices.detach() - identity_like(matrices)
        if 1 + float(departure.flatten(1).norm(dim=1).amax()) <= max_norm:
            return matrices.new_zeros(())
        bound = norm_bound(matrices.detach())
        if bool(bound.isnan().any()):
            return matrices.sum() * torch.nan  # the decomposition would raise; the guard names what it sees
        beyond = bound > max_norm
        if not bool(beyond.any()):
            return matrices.new_zeros(())
        excess = (torch.linalg.matrix_norm(matrices[beyond], 2) - max_norm).clamp_min(0)
        return excess.square().sum() / len(matrices)
    return (_largest_singular_value(matrices) - max_norm).clamp_min(0).square().mean()


def identity_like(matrices: Tensor) -> Tensor:
    """I (d, d) for matrices (..., d, d)."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def _largest_singular_value(matrices: Tensor, doublings: int = 12) -> Tensor:
    r"""Spectral norms (condition,) by products alone: a decomposition makes the host wait for its outcome.

    .. math:: \|A\|_2 \approx \|A v\| / \|v\|, \qquad v = (A^\top A)^{2^{12}} w

    with w the column of largest norm; low by a share of at most :math:`\log(d) / 2^{13}`, five digits or more where
    the second singular value is a per cent smaller.
    """
    with torch.no_grad():
        power = _of_size_one(torch.bmm(matrices.mT, matrices))
        for doubling in range(1, doublings + 1):
            power = torch.bmm(power, power)
            if doubling % 3 == 0 or doubling == doublings:  # entries of at most 1 have grown to at most d^7
                power = _of_size_one(power)
        largest = power.square().sum(1).argmax(1)
        vector = power.gather(2, largest.view(-1, 1, 1).expand(-1, power.shape[1], 1))
        vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
    return torch.bmm(matrices, vector).norm(dim=(1, 2))


def _of_size_one(matrices: Tensor) -> Tensor:
    """Matrices (condition, d, d) scaled so that the largest entry of each is 1 (or 0)."""
    return matrices / matrices.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(matrices.dtype).tiny)


def norm_bound(matrices: Tensor) -> Tensor:
    r"""Upper bound (condition,) of the spectral norms of (condition, d, d), by products alone.

    .. math:: \|A\|_2 \le \|(A^\top A)^4\|_F^{1/8} \le d^{1/16}\, \|A\|_2

    NaN where a matrix is not finite; infinity where its powers overflow.
    """
    size = matrices.flatten(1).norm(dim=1)
    gram = torch.bmm(matrices.mT, matrices)
    for _ in range(2):
        gram = torch.bmm(gram, gram)
    bound = gram.flatten(1).norm(dim=1).pow(1 / 8)
    return torch.where(size.isfinite(), torch.where(bound.isnan(), torch.inf, bound), torch.nan)
