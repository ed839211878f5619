"""Counts of a moved cell that keep what is the cell's own: what the decoder adds or takes away, given the observed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .likelihood import COUNTS_PER_CELL, MIN_MEAN, NegativeBinomial


@dataclass(frozen=True, eq=False)
class Remainder:
    """What a prediction is known to miss of the cells of a group.

    Attributes
    ----------
    level : ndarray
        (gene,) change of the cells' mean level (:func:`levels`).
    growth : float
        Change of the log of the mean number of counts of a cell, on top of that of its levels: cells that hold
        more RNA, or more of it in the modelled genes.
    """

    level: np.ndarray
    growth: float = 0.0

    def __add__(self, other: Remainder) -> Remainder:
        """What a combination misses: the sum over its parts."""
        return Remainder(self.level + other.level, self.growth + other.growth)


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
    return torch.log1p(x * (COUNTS_PER_CELL / library).unsqueeze(-1))


def counts_at(level: Tensor, library: Tensor) -> Tensor:
    """Counts (cell, gene) at expression levels: the inverse of :func:`levels`; a level below 0 is 0."""
    return torch.expm1(level.clamp_min(0.0)) * (library / COUNTS_PER_CELL).unsqueeze(-1)


class Observed:
    r"""Cells as they were observed, from which every move starts; what no move changes is worked out once.

    .. math::
        x \mid g \sim \mathrm{Poisson}(\mu_0 g), \quad g \sim \mathrm{Gamma}(r, r)
        \;\Rightarrow\; E[x' \mid x] = x + (\mu_1 - \mu_0) \frac{r + x}{r + \mu_0}
        \;\text{ if } \mu_1 > \mu_0, \quad x\, \mu_1 / \mu_0 \;\text{ otherwise}

    New molecules are added in proportion to the cell's own factor g, as the observed count tells it; lost ones are
    thinned. If x follows `before`, the mean of x' is that of `after`; if x departs from the model (a program that the
    latent does not hold, a gene that the decoder misjudges, the cell's noise), x' departs in the same way. Where
    nothing changes, x' = x.

    The library size stays what was observed, but for the remainder's growth: counts are scaled so that all measured
    genes sum to it, of which those not modelled one by one are what the others leave.

    Parameters
    ----------
    x
        (cell, gene) observed counts.
    library
        (cell,) library sizes of the cells.
    before
        Their distribution (cell, gene) by the decoder, at these library sizes.

    References
    ----------
    Kingman (1993), Poisson Processes, sections 2.2 (superposition) and 5.1 (thinning); the posterior of the
    gamma-Poisson mixture is conjugate (Gelman et al. 2013, Bayesian Data Analysis, section 2.6).
    """

    def __init__(self, x: Tensor, library: Tensor, before: NegativeBinomial):
        self.x, self.library, self._start = x, library, before.mean.clamp_min(MIN_MEAN)
        self._gain = (before.r + x) / (before.r + self._start)
        self._kept = x / self._start
        self._others, self._others_start = (self._missing(part) for part in (x, self._start))

    def mean(self, after: NegativeBinomial, remainder: Remainder | None = None) -> Tensor:
        """Expected counts (cell, gene) of the moved cells, given what was observed of them.

        Parameters
        ----------
        after
            Distribution (cell, gene) after the move, with the inverse dispersion r of the one before.
        remainder
            What is known to be missed: added to the level of every cell, then the counts of every cell grow;
            nothing where None.
        """
        end = after.mean.clamp_min(MIN_MEAN)
        change = end - self._start
        # x itself where nothing changes; sums of both signs, for torch.where takes twenty times as long
        moved = torch.addcmul(self.x, change.clamp_min(0.0), self._gain)
        moved = moved.addcmul_(change.clamp_max(0.0), self._kept).clamp_min_(0.0)
        if remainder is not None:
            level = torch.as_tensor(remainder.level).to(moved)
            moved = torch.where(
                level == 0, moved, counts_at(levels(moved, self.library) + level, self.library)
            )
        total = moved.sum(-1) + self._other_genes(end)
        stays = (moved - self.x).abs_().amax(-1) == 0
        scale = torch.where(stays, 1.0, self.library / total.clamp_min(MIN_MEAN))
        growth = 1.0 if remainder is None else math.exp(remainder.growth)
        return moved * (scale * growth).unsqueeze(-1)

    def _missing(self, part: Tensor) -> Tensor:
        """(cell,) what the modelled genes leave of the library."""
        return (self.library - part.sum(-1)).clamp_min(0.0)

    def _other_genes(self, end: Tensor) -> Tensor:
        """(cell,) counts after the move of the genes not modelled one by one; their sum has no own factor."""
        observed, first, last = self._others, self._others_start, self._missing(end)
        return torch.where(last > first, observed + last - first, observed * last / first.clamp_min(MIN_MEAN))


def carry_counts(mean: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Whole counts (cell, gene) with the expectations of :meth:`Observed.mean`, by unbiased rounding.

    .. math:: n = \lfloor x' + u \rfloor, \quad u \sim U(0, 1)

    The noise of the observed count stands for that of the moved one: drawing anew would add it twice.
    """
    uniform = torch.rand(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return torch.floor(mean + uniform)
