"""The two networks of the VAE: encoder (counts to a latent) and decoder (latent to logits), with bounded outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from . import host
from .counts import SparseCounts
from .gene_linear import GeneLinear, LogNormalised
from .likelihood import nb_log_likelihood_logits
from .nb_head import nb_log_likelihood_head

LOGVAR_BOUND = 10.0
MIN_DISPERSION = 1e-4
MAX_DISPERSION = 1e6


class _Bounded(torch.autograd.Function):
    """Clamp in the forward pass, identity in the backward pass (straight-through)."""

    @staticmethod
    def forward(ctx, value: Tensor, low: float, high: float) -> Tensor:
        # An infinite input is a fault, not a large number: it must surface, not be clamped away.
        return torch.where(value.isinf(), torch.nan, value.clamp(low, high))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None, None


def bounded(value: Tensor, low: float, high: float) -> Tensor:
    """`value` limited to [low, high], with gradients that still flow from outside the interval.

    A plain ``clamp`` has zero gradient outside, so that a parameter that once left could never return.
    Infinite entries become NaN, so that the non-finite guard sees them.
    """
    return _Bounded.apply(value, low, high)


def _mlp(n_in: int, n_hidden: int, n_layers: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer in range(n_layers):
        layers += [nn.Linear(n_in if layer == 0 else n_hidden, n_hidden), *_after(n_hidden, dropout)]
    return nn.Sequential(*layers)


def _after(n_hidden: int, dropout: float) -> list[nn.Module]:
    """What follows each linear layer."""
    layers: list[nn.Module] = [nn.LayerNorm(n_hidden), nn.ReLU()]
    return [*layers, nn.Dropout(dropout)] if dropout else layers


class Encoder(nn.Module):
    r"""log1p of library-normalised counts to a Normal over the latent, by a linear path beside an MLP.

    .. math:: y = \log(1 + 10^4 x / l), \quad \mu_z = W_0 y + W_1 f(y, c) + a, \quad \log \sigma_z^2 = V f(y, c) + b

    The layer norm of f limits how far the MLP alone can reach, so that responses stronger than any that was
    trained on would be pressed together; the linear path, which starts at zero, lets them through.

    Parameters
    ----------
    n_genes, n_latent, n_hidden, n_layers
        Sizes of the network.
    n_covariates
        Width of the one-hot covariates that are appended to the input; 0 for none.
    dropout
        Share of hidden units dropped while training.

    References
    ----------
    Lopez, Regier, Cole, Jordan and Yosef (2018), Nat. Methods 15:1053 (the encoder of log counts); He, Zhang, Ren and
    Sun (2016), CVPR, 770 (a path around the nonlinear layers).
    """

    def __init__(
        self,
        n_genes: int,
        n_latent: int,
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_covariates: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        first = GeneLinear(n_genes, n_hidden, n_covariates=n_covariates)
        deeper = _mlp(n_hidden, n_hidden, n_layers - 1, dropout)
        self.body = nn.Sequential(first, *_after(n_hidden, dropout), *deeper)
        self.linear = GeneLinear(n_genes, n_latent, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.mean = nn.Linear(n_hidden, n_latent)
        self.log_variance = nn.Linear(n_hidden, n_latent)

    def forward(self, x: Tensor | SparseCounts, library: Tensor, covariates: Tensor | None = None) -> Normal:
        """Posterior of shape (cell, latent) for counts (cell, gene) and library sizes (cell,)."""
        scaled = LogNormalised(x, library, covariates)
        mean, deviation = self.after_genes(self.body[0](scaled), self.linear(scaled))
        return Normal(mean, deviation, validate_args=False)

    def after_genes(self, first: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (cell, latent) from the first layer (cell, hidden) and the linear path."""
        hidden = first
        for layer in list(self.body)[1:]:
            hidden = layer(hidden)
        log_variance = bounded(self.log_variance(hidden), -LOGVAR_BOUND, LOGVAR_BOUND)
        return linear + self.mean(hidden), torch.exp(0.5 * log_variance)


class DecoderNB(nn.Module):
    r"""Latent to the logits of gene proportions, by a linear path beside an MLP, with gene-wise dispersion.

    .. math:: \mu = l \cdot \mathrm{softmax}(W z + f(z, c) + C c + a), \quad r = e^{\rho}

    The linear path keeps the decoder sensible for latents outside the training clouds, which is where
    predictions of unseen conditions live.

    Parameters
    ----------
    n_latent, n_genes, n_hidden, n_layers
        Sizes of the network.
    n_covariates
        Width of the one-hot covariates c that are appended to the latent; 0 for none.
    dropout
        Share of hidden units dropped while training.

    References
    ----------
    Lopez, Regier, Cole, Jordan and Yosef (2018), Nat. Methods 15:1053 (the negative-binomial decoder).
    """

    def __init__(
        self,
        n_latent: int,
        n_genes: int,
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_covariates: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.linear = nn.Linear(n_latent + n_covariates, n_genes)
        self.body = _mlp(n_latent + n_covariates, n_hidden, n_layers, dropout)
        self.output = nn.Linear(n_hidden, n_genes, bias=False)
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes))

    def forward(self, z: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Logits (cell, gene) of the expected proportions."""
        given, hidden = self.features(z, covariates)
        return self.linear(given) + self.output(hidden)

    def features(self, z: Tensor, covariates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inputs of the two last linear layers: latent with covariates, and (cell, hidden)."""
        given = z if covariates is None else torch.cat([z, covariates], -1)
        return given, self.body(given)

    def log_likelihood(
        self, counts: SparseCounts, library: Tensor, z: Tensor, covariates: Tensor | None = None
    ) -> Tensor:
        """(cell,) log-likelihood of counts (cell, gene), whose library sizes are (cell,), at latents (cell, latent)."""
        if not host.looks_are_free(z.device) or torch.is_autocast_enabled(
            "cpu"
        ):  # products in another precision
            logits = self(z, covariates).to(library.dtype)
            return nb_log_likelihood_logits(counts, logits, library, self.dispersion)
        given, hidden = self.features(z, covariates)
        layers = {"linear": (given, self.linear.weight), "output": (hidden, self.output.weight)}
        return nb_log_likelihood_head(counts, library, self.dispersion, bias=self.linear.bias, **layers)

    @property
    def dispersion(self) -> Tensor:
        """(gene,) inverse dispersion r, inside [1e-4, 1e6]."""
        low, high = math.log(MIN_DISPERSION), math.log(MAX_DISPERSION)
        return torch.exp(bounded(self.log_dispersion, low, high))
