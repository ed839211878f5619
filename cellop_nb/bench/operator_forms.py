"""The three forms of an operator step that the benchmark compares: before, the report's fix, and ours.

All three minimise the same loss, the mean over groups of the energy distance (Euclidean, U-statistic) between
moved controls and perturbed cells, and make the same step of the same optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from ..models.energy import moved_energy_distance, self_distance
from ..models.operators import Condition, OperatorModel
from ..models.vae import NBVAE
from .vae import screen

LATENT = 32
SIZES = {"groups": 16, "cells": 128, "genes": 2_000, "hidden": 512}
QUICK = {"groups": 16, "cells": 64, "genes": 500, "hidden": 128}
TINY = {"groups": 4, "cells": 16, "genes": 60, "hidden": 16}
BEFORE, FIX, OURS, WHOLE = "before", "report's fix", "cellop_nb", "cellop_nb, OperatorTrainer"


def problem(groups: int, cells: int, genes: int, hidden: int, *, seed: int = 0) -> SimpleNamespace:
    """VAE, operators, control counts and perturbed latents of one step, groups one after the other."""
    torch.manual_seed(seed)
    vae = NBVAE(genes, n_latent=LATENT, n_hidden=hidden).eval()
    adata = screen(groups * cells, genes, seed=seed)
    names = [f"P{k}" for k in range(max(1, groups // 4))]
    contexts = [f"T{k}" for k in range(-(-groups // len(names)))]
    conditions = [Condition((p,), context=c) for c in contexts for p in names][:groups]
    model = OperatorModel(LATENT, names, contexts)
    model.axis_left.data.normal_(std=0.1)
    x = torch.from_numpy(adata.X.toarray())
    library = x.sum(1).clamp_min(1)
    with torch.no_grad():
        z = vae.encode(x, library).loc
    target, own = z.roll(1, 0) + 0.3 * torch.randn_like(z), [cells] * groups
    return SimpleNamespace(
        vae=vae,
        model=model,
        design=model.conditions.design(conditions),
        x=x,
        library=library,
        latents=z,
        target=target,
        target_self=self_distance(target, own),
        sizes=own,
    )


def dense_energy(moved: Tensor, target: Tensor, sizes: list[int]) -> Tensor:
    """Mean over groups of the energy distance, by autograd through all pairs of cells of the batch."""
    groups, cells = len(sizes), sizes[0]

    def own(a: Tensor, b: Tensor) -> Tensor:
        blocks = torch.cdist(a, b).view(groups, cells, groups, cells)
        return blocks.diagonal(dim1=0, dim2=2).sum((0, 1))

    pairs = cells * (cells - 1)
    cross, within = own(moved, target) / cells**2, own(moved, moved) + own(target, target)
    return (2 * cross - within / pairs).mean()


def loss_before(p: SimpleNamespace) -> Tensor:
    """Encoder with its graph in every step, a copy of the operator for each cell, one dense distance."""
    z = p.vae.encode(p.x, p.library).loc
    matrices, shifts = p.model.affine(p.design)
    per_cell = matrices.repeat_interleave(p.sizes[0], 0)
    moved = (per_cell * z.unsqueeze(1)).sum(-1) + shifts.repeat_interleave(p.sizes[0], 0)
    return dense_energy(moved, p.target, p.sizes)


def loss_fix(p: SimpleNamespace) -> Tensor:
    """The encoder still runs in every step but keeps no graph, and no copy per cell is kept."""
    with torch.no_grad():
        z = p.vae.encode(p.x, p.library).loc
    return dense_energy(p.model(z, p.sizes, *p.model.affine(p.design)), p.target, p.sizes)


def loss_ours(p: SimpleNamespace) -> Tensor:
    """Cached latents, one operator per group, all groups' distances in one call with closed-form gradient.

    The distances within the perturbed cells are a constant, computed before.
    """
    options = {"y_self": p.target_self, "validate": False}
    maps = p.model.affine(p.design)
    return moved_energy_distance(p.latents, p.target, p.sizes, p.sizes, *maps, **options).mean()


LOSSES: dict[str, Callable[[SimpleNamespace], Tensor]] = {
    BEFORE: loss_before,
    FIX: loss_fix,
    OURS: loss_ours,
}


def stepper(variant: str, p: SimpleNamespace) -> Callable[[], Tensor]:
    """Loss, gradient and one step of the optimiser at each call."""
    optimizer = torch.optim.AdamW(p.model.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        if variant == BEFORE:  # the others send it no gradient
            p.vae.zero_grad()
        loss = LOSSES[variant](p)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
