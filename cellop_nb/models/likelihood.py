"""Negative-binomial log-likelihood of counts: accurate at the extremes, with closed-form gradients.

The textbook form subtracts numbers of size r log r. Here every term is small where the answer is small:

.. math::
    \\log p(x) = r \\log(1 + t) + x \\log(1 - t r / x) + h(x + r) - h(r) - c(x), \\quad
    t = (x - \\mu)/(r + \\mu)

with :math:`h(z) = \\log\\Gamma(z) - z \\log z + z` and :math:`c(x) = \\log x! - x \\log x + x`, both of the
size of log z (remainders of Stirling's series). At x = 0 only :math:`-r \\log(1 + \\mu/r)` is left, so the
special functions are needed at the non-zeros alone: about a tenth of a single-cell count matrix.

References
----------
Loader (2000), Fast and accurate computation of binomial probabilities (the deviance form);
Abramowitz and Stegun, 6.1.41 and 6.3.18 (Stirling's series).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ModelError, three_beats
from .counts import SparseCounts, refuse_negative
from .nb_rows import MIN_INVERSE_DISPERSION, MIN_MEAN, at_nonzeros, log_of_ratio, softmax_nb
from .stirling import count_constant, stirling


def _refuse_parameters(mu: Tensor, r: Tensor) -> None:
    if r.numel() and r.amin() <= 0:
        found = f"a smallest r of {r.amin():g}"
        raise ModelError(three_beats("inverse dispersion r > 0", found, "pass r = exp(log_r), bounded below"))
    if mu.numel() and mu.amin() < 0:
        found = f"a smallest mean of {mu.amin():g}"
        raise ModelError(three_beats("means mu >= 0", found, "pass library size times softmax proportions"))


class _NBLogLikelihood(torch.autograd.Function):
    """Log-likelihood per cell with the closed-form gradient with respect to mu and r."""

    @staticmethod
    def forward(ctx, x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
        ctx.r_shape, ctx.mu_shape = r.shape, mu.shape
        mu = mu.clamp_min(MIN_MEAN).expand_as(x)
        r = r.clamp_min(MIN_INVERSE_DISPERSION)
        flat = x.reshape(-1).nonzero().squeeze(-1)
        terms = (-r * (mu / r).log1p()).contiguous()
        at = r.expand_as(x).reshape(-1)[flat]
        given = x.reshape(-1)[flat]
        value, _, _ = at_nonzeros(given, mu.reshape(-1)[flat], at)
        reached, start = stirling(given + at), stirling(r)
        terms.view(-1)[flat] = (
            value + reached[0] - start[0].expand_as(x).reshape(-1)[flat] - count_constant(given)
        )
        ctx.save_for_backward(x, mu, r, flat, reached[1] - start[1].expand_as(x).reshape(-1)[flat])
        return terms.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        x, mu, r, flat, step = ctx.saved_tensors
        upstream = upstream.unsqueeze(-1)
        t = (x - mu) / (r + mu)
        grad_mu = grad_r = None
        if ctx.needs_input_grad[1]:
            grad_mu = (upstream * (r / mu) * t).sum_to_size(ctx.mu_shape)
        if ctx.needs_input_grad[2]:
            slope = log_of_ratio(t, (x + r) / (r + mu)) - t
            slope.view(-1)[flat] += step
            grad_r = (upstream * slope).sum_to_size(ctx.r_shape)
        return None, grad_mu, grad_r


def nb_log_likelihood(x: Tensor, mu: Tensor, r: Tensor, *, validate: bool = True) -> Tensor:
    r"""Log-likelihood of counts under NB(mu, r), summed over genes.

    .. math::
        \log p = \log\Gamma(x+r) - \log\Gamma(r) - \log x! + r \log\frac{r}{r+\mu} + x \log\frac{\mu}{r+\mu}

    Parameters
    ----------
    x
        (cell, gene) counts >= 0.
    mu
        (cell, gene) means >= 0; bounded below by :data:`MIN_MEAN`.
    r
        (gene,) or (cell, gene) inverse dispersions > 0, variance = mu + mu^2 / r; bounded below by
        :data:`MIN_INVERSE_DISPERSION`. Below the bounds the gradient is the one at the bound, not zero.
    validate
        Refuse negative counts and negative parameters (three reductions).

    Returns
    -------
    (cell,) log-likelihood in nats, differentiable once with respect to `mu` and `r`. NaN in `mu` or `r`
    stays NaN, for the non-finite guard of the training loop to see.

    Raises
    ------
    ModelError
        Where a count or a mean is negative, or r is not positive.

    References
    ----------
    Lopez et al. (2018), Nature Methods 15:1053, equation 2 of the supplement; Loader (2000) for the form.
    """
    if validate:
        refuse_negative(x)
        _refuse_parameters(mu, r)
    return _NBLogLikelihood.apply(x.to(mu.dtype), mu, r)


class _NBFromLogits(torch.autograd.Function):
    """Log-likelihood per cell of mu = library * softmax(logits), softmax and NB in one gradient."""

    @staticmethod
    def forward(ctx, counts: SparseCounts, logits: Tensor, library: Tensor, r: Tensor) -> Tensor:
        ctx.counts = counts
        with torch.autocast(logits.device.type, enabled=False):
            at = r.clamp_min(MIN_INVERSE_DISPERSION)
            value, ctx.found = softmax_nb(logits.clone(), counts, library, at)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        found, (_, logits, library, r) = ctx.found, ctx.needs_input_grad
        return (
            None,
            found.by_logits * upstream.unsqueeze(-1) if logits else None,
            found.by_library * upstream if library else None,
            found.by_r(upstream, ctx.counts.rows) if r else None,
        )


def nb_log_likelihood_logits(
    counts: Tensor | SparseCounts, logits: Tensor, library: Tensor, r: Tensor, *, validate: bool = True
) -> Tensor:
    r"""Log-likelihood of counts under NB(library * softmax(logits), r): the training path.

    Same value and gradient as ``nb_log_likelihood(x, library[:, None] * softmax(logits, -1), r)``, in fewer
    passes over (cell, gene), since

    .. math:: \frac{\partial \log p}{\partial \log \mu} = \frac{r (x - \mu)}{r + \mu}

    stays bounded however small mu becomes.

    Parameters
    ----------
    counts
        (cell, gene) counts, dense or as :class:`SparseCounts` (fastest: nothing has to be searched).
    logits
        (cell, gene) of the decoder.
    library
        (cell,) library sizes > 0.
    r
        (gene,) inverse dispersions > 0.
    validate
        Refuse negative counts in a dense `counts`.

    Returns
    -------
    (cell,) log-likelihood in nats, differentiable once with respect to `logits`, `library` and `r`.

    References
    ----------
    Lopez et al. (2018), Nature Methods 15:1053.
    """
    if isinstance(counts, Tensor):
        counts = SparseCounts.from_dense(counts, validate=validate)
    dtype = torch.promote_types(torch.promote_types(logits.dtype, library.dtype), torch.float32)
    given = counts if counts.values.dtype == dtype else counts.to(dtype)
    return _NBFromLogits.apply(given, logits.to(dtype), library.to(dtype), r.to(dtype))


class NegativeBinomial:
    """Negative-binomial distribution of counts (cell, gene).

    Parameters
    ----------
    mean
        (cell, gene) means.
    r
        (gene,) or (cell, gene) inverse dispersions; variance = mean + mean^2 / r.
    """

    def __init__(self, mean: Tensor, r: Tensor):
        self.mean, self.r = mean, r

    @property
    def variance(self) -> Tensor:
        """(cell, gene) mean + mean^2 / r."""
        return self.mean + self.mean.square() / self.r

    def log_prob(self, x: Tensor) -> Tensor:
        """(cell,) log-likelihood of counts x (cell, gene), summed over genes."""
        return nb_log_likelihood(x, self.mean, self.r)

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(cell, gene) counts drawn from the Gamma-Poisson mixture, without gradient."""
        shape = self.r.expand_as(self.mean).contiguous()
        rate = torch._standard_gamma(shape, generator=generator) * (self.mean / self.r)
        return torch.poisson(rate, generator=generator)

    def __repr__(self) -> str:
        return (
            f"NegativeBinomial(mean: {tuple(self.mean.shape)}, r: {tuple(self.r.shape)}, {self.mean.dtype})"
        )
