"""Counts of a moved cell that keep what is the cell's own: expression levels shifted as the decoder shifts them."""

from __future__ import annotations

import torch
from torch import Tensor

LEVEL_SCALE = 1e4
"""Counts per cell at which expression levels log(1 + counts) are compared."""


def levels(x: Tensor, library: Tensor) -> Tensor:
    r"""Expression levels (cell, gene) of counts.

    .. math:: y = \log(1 + 10^4\, x / l)

    Parameters
    ----------
    x
        (cell, gene) counts, or expected counts.
    library
        (cell,) library sizes l.
    """
    return torch.log1p(x * (LEVEL_SCALE / library).unsqueeze(-1))


def carried_mean(
    x: Tensor, library: Tensor, before: Tensor, after: Tensor, remainder: Tensor | None = None
) -> Tensor:
    r"""Expected counts (cell, gene) of cells whose expression levels move as those of the decoder do.

    .. math::
        y' = \max\big(0,\; y(x) + y(\mu_1) - y(\mu_0) + e\big), \qquad x' = 10^{-4}\, l\, (\exp y' - 1)

    Each cell keeps its distance to what the decoder expects of it: a program that the latent does not hold, a gene
    that the decoder misjudges, its own noise. Where nothing changes, x' = x. Levels are added, not ratios
    multiplied, since the ratio of a silent gene's expected counts is the least certain number of a decoder,
    while its level is nearly 0 either way.

    Parameters
    ----------
    x
        (cell, gene) observed counts.
    library
        (cell,) library sizes l of the cells.
    before, after
        (cell, gene) counts that the decoder expects before and after the move, at the same library sizes.
    remainder
        (gene,) change of level e that the decoder is known to miss; none where None.

    References
    ----------
    The shift is that of the mean-shift rule, in the space where the field scores predictions (Lotfollahi et al.
    2019, Nat. Methods 16:715), with the decoder's own change for each cell in place of one for all.
    """
    change = levels(after, library) - levels(before, library)
    change = change if remainder is None else change + remainder
    moved = torch.expm1((levels(x, library) + change).clamp_min(0.0)) * (library / LEVEL_SCALE).unsqueeze(-1)
    return torch.where(change == 0, x, moved)


def carry_counts(mean: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Whole counts (cell, gene) with the expectations of :func:`carried_mean`, by unbiased rounding.

    .. math:: n = \lfloor x' + u \rfloor, \quad u \sim U(0, 1)

    The noise of the observed count stands for that of the moved one: drawing anew would add it twice.
    """
    uniform = torch.rand(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return torch.floor(mean + uniform)
