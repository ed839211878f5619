"""Counts of a moved cell that keep what is the cell's own: what the decoder adds or takes away, given the observed."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..errors import ModelError
from .likelihood import COUNTS_PER_CELL, MIN_MEAN, NegativeBinomial, levels


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

    The library size stays what was observed: counts are scaled so that all measured
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

    def mean(self, after: NegativeBinomial) -> Tensor:
        """Expected counts (cell, gene) of the moved cells, given what was observed of them.

        Parameters
        ----------
        after
            Distribution (cell, gene) after the move, with the inverse dispersion r of the one before.
        """
        end = after.mean.clamp_min(MIN_MEAN)
        change = end - self._start
        # x itself where nothing changes; sums of both signs, for torch.where takes twenty times as long
        moved = torch.addcmul(self.x, change.clamp_min(0.0), self._gain)
        moved = moved.addcmul_(change.clamp_max(0.0), self._kept).clamp_min_(0.0)
        total = moved.sum(-1) + self._other_genes(end)
        stays = (moved - self.x).abs_().amax(-1) == 0
        scale = torch.where(stays, 1.0, self.library / total.clamp_min(MIN_MEAN))
        return moved * scale.unsqueeze(-1)

    def _missing(self, part: Tensor) -> Tensor:
        """(cell,) what the modelled genes leave of the library."""
        return (self.library - part.sum(-1)).clamp_min(0.0)

    def _other_genes(self, end: Tensor) -> Tensor:
        """(cell,) counts after the move of the genes not modelled one by one; their sum has no own factor."""
        observed, first, last = self._others, self._others_start, self._missing(end)
        return torch.where(last > first, observed + last - first, observed * last / first.clamp_min(MIN_MEAN))


MOST_LEVEL = math.log1p(COUNTS_PER_CELL) - 0.1
"""Mean level beyond which a gene would take nearly all counts of its cells."""


def whole_levels(expected: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
    r"""Expected level (cell, gene) of the whole counts that are made of expected ones, and its slope.

    .. math:: (1 - f)\, y(n) + f\, y(n + 1), \quad n = \lfloor x' \rfloor, \quad f = x' - n,
        \quad y(n) = \log(1 + 10^4 n / l)

    The level of the expected count itself is higher: the logarithm is concave, and most counts are 0 or 1.
    """
    whole = expected.floor()
    low = levels(whole, library)
    slope = levels(whole + 1, library).sub_(low)
    return torch.addcmul(low, slope, expected - whole), slope


def carry_to_mean(
    expected: Tensor,
    library: Tensor,
    target: Tensor,
    *,
    others: Tensor | None = None,
    iterations: int = 8,
) -> Tensor:
    r"""Expected counts (cell, gene) of cells that are carried to a mean level per gene, and stay the cells they are.

    Where the mean must fall, the gene's molecules are thinned; where it must rise, molecules are added in proportion to
    the cell's own factor (:class:`Observed`), one number t per gene:

    .. math:: x'' = (1 + t)\, x' \;\text{ if } -1 \le t < 0, \quad
        x' + t\, l\, p\, \frac{r + x'}{r + l\, p} \;\text{ if } t \ge 0

    with the gene's mean share p, and r by the moments of `expected`. The cells are then scaled to their library sizes. t
    is found by Newton's method, which cannot overshoot here: the mean level is concave and grows with t. A gene whose
    counts are all 0 can rise, too.

    Planned levels need not add up to the cells' counts. Genes then miss their level in proportion to the counts that it
    takes, which is the smallest miss (least squares over genes): the few loudest genes give or take the difference.

    Parameters
    ----------
    expected
        (cell, gene) expected counts of moved cells, as of :meth:`Observed.mean`, or whole counts.
    library
        (cell,) counts of each cell over all genes, `others` included.
    target
        (gene,) mean over the cells of the level of the *whole* counts that are made of the result
        (:func:`balanced_counts`); kept between 0 and :data:`MOST_LEVEL`.
    others
        (cell,) counts of the genes that are not among the columns; none where None.
    iterations
        At most so many steps, of which the one that misses the levels least is kept; done where every mean level is as
        near as 1e-4.

    Returns
    -------
    (cell, gene); its rows sum to ``library - others`` to within 1e-4.
    """
    x, size = expected.clamp_min(0.0), library.clamp_min(MIN_MEAN).unsqueeze(-1)
    aim = target.to(x).clamp(0.0, MOST_LEVEL)
    room = size if others is None else (size - others.unsqueeze(-1)).clamp_min(MIN_MEAN)
    share = ((x / size).mean(0)).clamp_min(0.1 / (COUNTS_PER_CELL * len(x)))
    mean = size * share
    excess = ((x - mean).square() - mean).mean(0).clamp_min(1e-8)
    dispersion = (mean.square().mean(0) / excess).clamp(0.1, 100.0)
    added = mean * (dispersion + x) / (dispersion + mean)
    t, carried, miss = torch.zeros_like(share), x, share.new_zeros(())
    best, least = x, math.inf
    for _ in range(iterations + 1):
        total = carried.sum(-1, keepdim=True).clamp_min(MIN_MEAN)
        # that of each cell; what all cells miss is left to the genes
        scale = room / total * (total.sum() / room.sum())
        cost = (carried * scale / size).mean(0)
        short = float(room.sum() / total.sum() - 1)
        excess = cost.sum() - (room / size).mean()
        # one gene may hold nearly all counts: what it gives or takes in a step is bounded
        miss = miss + (excess / cost.square().sum().clamp_min(MIN_MEAN)).clamp(-4.0, 4.0)
        level, slope = whole_levels(carried * scale, library)
        there = level.mean(0) + short * (slope * carried * scale).mean(0)  # once the cells are scaled
        missed = float((there - aim).square().sum())
        if missed < least:  # steps of the genes and of what they leave to each other may swing
            best, least = carried, missed
        gap = (aim - miss * cost).clamp(0.0, MOST_LEVEL) - level.mean(0)
        if gap.abs().max() <= 1e-4:
            break
        grown = (slope * torch.where(gap + t > 0, added, x) * scale).mean(0)
        t = (t + gap / grown.clamp_min(MIN_MEAN)).clamp_min(-1.0)
        carried = torch.addcmul(x * (1 + t.clamp_max(0.0)), added, t.clamp_min(0.0))
    return best * (room / best.sum(-1, keepdim=True).clamp_min(MIN_MEAN))


def carry_genes(
    x: sparse.csc_matrix, library: np.ndarray, change: np.ndarray, growth: float = 0.0, iterations: int = 8
) -> np.ndarray:
    r"""Expected counts (cell, gene) of whole counts `x` (cell, gene) whose genes each reach their level alone.

    As :func:`carry_to_mean`, but cells are not scaled: every gene's mean level changes by `change` (gene,), whatever
    that adds up to, while the log of the `library` (cell,) changes by `growth`. Logarithms are those of the non-zeros: a
    cell without a molecule has, as long as it is expected to gain less than one, a level in proportion to that.
    """
    before, size = library.clip(MIN_MEAN), math.exp(growth) * library.clip(MIN_MEAN)
    cell, n = x.indices, len(size)
    gene = np.repeat(np.arange(x.shape[1]), np.diff(x.indptr))
    value, one = math.exp(growth) * x.data, COUNTS_PER_CELL / size

    def mean(entries: np.ndarray) -> np.ndarray:
        """(gene,) mean over the cells."""
        return np.bincount(gene, entries, x.shape[1]) / n

    aim = mean(np.log1p(COUNTS_PER_CELL * x.data / before[cell])) + change
    aim = aim.clip(0.0, MOST_LEVEL)
    share = mean(value / size[cell]).clip(0.1 / (COUNTS_PER_CELL * n))
    moments = np.mean(size**2) * share**2
    excess = mean(value**2) - 2 * share * mean(value * size[cell]) + moments - np.mean(size) * share
    dispersion = (moments / excess.clip(1e-8)).clip(0.1, 100.0)
    of_zero = size[:, None] * share / (1 + size[:, None] * (share / dispersion))
    added = of_zero[cell, gene] * (1 + value / dispersion[gene])
    of_one, t = np.log1p(one), np.zeros(x.shape[1])
    rise = of_one @ of_zero / n - mean(of_zero[cell, gene] * of_one[cell])  # of cells without a molecule
    for _ in range(iterations):
        carried = value * (1 + t.clip(None, 0.0))[gene] + added * t.clip(0.0)[gene]
        whole = np.floor(carried)
        low = np.log1p(whole * one[cell])
        slope = np.log1p((whole + 1) * one[cell]) - low
        gap = aim - mean(low + slope * (carried - whole)) - rise * t.clip(0.0)
        if np.abs(gap).max(initial=0.0) <= 1e-4:
            break
        grown = np.where(gap + t > 0, mean(slope * added) + rise, mean(slope * value))
        t = (t + gap / grown.clip(MIN_MEAN)).clip(-1.0)
    result = of_zero * t.clip(0.0)
    steep = np.flatnonzero(result.max(0) >= 1)
    result[cell, gene] = value * (1 + t.clip(None, 0.0))[gene] + added * t.clip(0.0)[gene]
    if len(steep) and len(cell) < n * x.shape[1]:  # there every cell is looked at
        dense = x[:, steep].toarray().ravel("F")
        rows, starts = np.tile(np.arange(n), len(steep)), np.arange(0, n * len(steep) + 1, n)
        every = sparse.csc_matrix((dense, rows, starts), (n, len(steep)))
        result[:, steep] = carry_genes(every, library, change[steep], growth, iterations)
    return result


def balanced_counts(
    mean: Tensor, generator: torch.Generator | None = None, *, one_order: bool = False
) -> Tensor:
    r"""Whole counts (cell, gene) with given expectations whose sum over the cells is nearly that of the expectations.

    .. math:: n_c = \lfloor S_c + u \rfloor - \lfloor S_{c-1} + u \rfloor, \quad S_c = \sum_{c' \le c} x'_{c'}, \quad
        u \sim U(0, 1)

    for each gene, with its cells in random order: systematic sampling. Each count is the floor or the ceiling of its
    expectation, and the gene's total is off by less than 1. The noise of the observed count stands for that of the moved
    one: drawing anew would add it twice. In `one_order` of the cells for all genes, which saves the sorting of each,
    genes are as independent: u is their own.

    Raises
    ------
    ModelError
        Where an expectation is not finite, as of a model whose weights are not.

    References
    ----------
    Madow and Madow (1944), Annals of Mathematical Statistics 15:1.
    """
    broken = ~mean.isfinite().all(1)
    if broken.any():  # rounding would make counts of them
        problem = f"NaN or infinity in {int(broken.sum())} of {len(mean)} cells"
        raise ModelError(
            "finite expected counts of virtual cells", problem, "use a model whose weights are finite"
        )
    whole = mean.floor()
    chance = torch.rand(
        (len(mean), 1) if one_order else mean.shape,
        generator=generator,
        dtype=mean.dtype,
        device=mean.device,
    )
    order = chance.argsort(0).expand_as(mean)
    offset = torch.rand(mean.shape[1], generator=generator, dtype=mean.dtype, device=mean.device)
    steps = ((mean - whole).gather(0, order).double().cumsum(0) + offset).floor()
    return whole.scatter_add(0, order, steps.diff(dim=0, prepend=steps.new_zeros(1, mean.shape[1])).to(mean))
