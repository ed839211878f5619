"""Counts of a moved cell that keep what is the cell's own: negative-binomial counts coupled to observed ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .likelihood import MIN_MEAN, NegativeBinomial


def carry_counts(
    x: Tensor, start: NegativeBinomial, end: NegativeBinomial, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw counts of `end` that are coupled to the counts observed under `start`.

    .. math::
        x \mid g \sim \mathrm{Poisson}(\mu_0 g), \quad g \sim \mathrm{Gamma}(r, r)
        \;\Rightarrow\; g \mid x \sim \mathrm{Gamma}(r + x,\, r + \mu_0)

    .. math::
        x' = x + \mathrm{Poisson}\big((\mu_1 - \mu_0)\, g\big) \;\text{ if } \mu_1 > \mu_0, \qquad
        x' \sim \mathrm{Binomial}(x, \mu_1 / \mu_0) \;\text{ otherwise}

    If x follows `start`, then x' follows `end` exactly; if x departs from the model (a program that the latent
    does not hold, a gene that varies more than it should), x' departs in the same way. No change of the mean
    leaves every count as it is, so that a decoder's error is not added to what the operator does.

    Parameters
    ----------
    x
        (cell, gene) observed counts.
    start, end
        Distributions (cell, gene) before and after, with the same inverse dispersion r.

    Returns
    -------
    Tensor (cell, gene) of counts.

    References
    ----------
    Kingman (1993), Poisson Processes, sections 2.2 (superposition) and 5.1 (thinning); the posterior of the
    gamma-Poisson mixture is conjugate (Gelman et al. 2013, Bayesian Data Analysis, section 2.6).
    """
    before, after = _means(start, end)
    own = torch._standard_gamma(start.r + x, generator=generator) / (start.r + before)
    more = torch.poisson((after - before).clamp_min(0) * own, generator=generator)
    fewer = torch.binomial(x, (after / before).clamp_max(1), generator=generator)
    return torch.where(after > before, x + more, fewer)


def carried_mean(x: Tensor, start: NegativeBinomial, end: NegativeBinomial) -> Tensor:
    r"""Expectation of :func:`carry_counts` given x, (cell, gene).

    .. math::
        E[x' \mid x] = x + (\mu_1 - \mu_0) \frac{r + x}{r + \mu_0} \;\text{ if } \mu_1 > \mu_0, \quad
        x \mu_1 / \mu_0 \;\text{ otherwise}
    """
    before, after = _means(start, end)
    more = x + (after - before) * (start.r + x) / (start.r + before)
    return torch.where(after > before, more, x * after / before)


def _means(start: NegativeBinomial, end: NegativeBinomial) -> tuple[Tensor, Tensor]:
    """Means before and after, bounded below: a softmax may underflow to 0, and 0 / 0 is no ratio."""
    return start.mean.clamp_min(MIN_MEAN), end.mean.clamp_min(MIN_MEAN)
