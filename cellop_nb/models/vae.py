"""Negative-binomial variational autoencoder: counts to a latent space, and back to a count distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from ..display import card
from ..errors import LabelError
from .likelihood import (
    GeneLinear,
    LogNormalised,
    NegativeBinomial,
    SparseCounts,
    nb_log_likelihood_logits,
)

LOGVAR_BOUND = 10.0
MIN_DISPERSION = 1e-4
MAX_DISPERSION = 1e6

OTHER_GENES = "other genes"
"""Name of the column that stands for all measured genes that are not modelled one by one."""


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

    Covariates are one-hot, `n_covariates` wide, and appended to the input of the MLP.

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

    The covariates c are one-hot, `n_covariates` wide, and appended to the latent.

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
        inputs = z if covariates is None else torch.cat([z, covariates], -1)
        return self.linear(inputs) + self.output(self.body(inputs))

    @property
    def dispersion(self) -> Tensor:
        """(gene,) inverse dispersion r, inside [1e-4, 1e6]."""
        low, high = math.log(MIN_DISPERSION), math.log(MAX_DISPERSION)
        return torch.exp(bounded(self.log_dispersion, low, high))


def sample_z(posterior: Normal, generator: torch.Generator | None = None) -> Tensor:
    r"""Reparameterised sample of the latent.

    .. math:: z = \mu_z + \sigma_z \epsilon, \quad \epsilon \sim N(0, I)

    Both are (cell, latent); the noise is that of the global generator where None is given.

    References
    ----------
    Kingma and Welling (2014), Auto-Encoding Variational Bayes, section 2.4.
    """
    mean = posterior.loc
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + posterior.scale * noise


def kl_to_standard_normal(posterior: Normal) -> Tensor:
    r"""Kullback-Leibler divergence of the posterior from N(0, I), per cell, in nats.

    .. math:: KL = \tfrac12 \sum_j (\mu_j^2 + \sigma_j^2 - 1 - \log \sigma_j^2)

    References
    ----------
    Kingma and Welling (2014), appendix B.
    """
    log_variance = 2 * posterior.scale.log()
    return 0.5 * (posterior.loc.square() + torch.expm1(log_variance) - log_variance).sum(-1)


def elbo_loss(log_likelihood: Tensor, posterior: Normal, kl_weight: float = 1.0) -> dict[str, Tensor]:
    r"""Terms of the negative evidence lower bound, averaged over cells.

    .. math:: -\mathrm{ELBO} = -E_q \log p(x \mid z) + w\, KL(q(z \mid x) \,\|\, N(0, I))

    Parameters
    ----------
    log_likelihood
        (cell,) log p(x | z), summed over genes, in nats.
    posterior
        Normal of shape (cell, latent).
    kl_weight
        w, the weight of the divergence: 0 at the start of a warm-up, 1 for the bound itself.

    Returns
    -------
    Dictionary with the 0-d tensors ``reconstruction`` and ``kl`` (weighted); the loss is their sum.

    References
    ----------
    Kingma and Welling (2014), equation 3; Bowman et al. (2016) for the warm-up.
    """
    return {
        "reconstruction": -log_likelihood.mean(),
        "kl": kl_weight * kl_to_standard_normal(posterior).mean(),
    }


class NBVAE(nn.Module):
    r"""Negative-binomial variational autoencoder with library size and covariates.

    .. math:: z \sim N(0, I), \quad x_g \sim NB(l\, \rho_g(z, c),\ r_g)

    Parameters
    ----------
    genes
        Names of the modelled genes, in the order of the counts' columns; or their number.
    total_key
        Column of ``obs`` with each cell's counts over *all* measured genes. The counts then get one more column,
        :data:`OTHER_GENES`, with what the modelled genes leave of that total, and the library size is the total.
        A response of the modelled genes may then raise their sum, instead of pressing the other ones down.
    n_latent, n_hidden, n_layers
        Sizes of latent space and networks.
    covariates
        Name to categories, for example ``{"batch": ["b1", "b2"]}``. They enter the decoder.
    encode_covariates
        Whether they enter the encoder too.
    dropout
        Share of hidden units dropped while training.

    References
    ----------
    Lopez et al. (2018), Nature Methods 15:1053 (scVI); Kingma and Welling (2014).

    Notes
    -----
    The library size is the observed total (of the modelled genes where there is no `total_key`), not a latent
    variable.
    """

    def __init__(
        self,
        genes: Sequence[str] | int,
        *,
        n_latent: int = 32,
        n_hidden: int = 128,
        n_layers: int = 1,
        covariates: Mapping[str, Sequence[str]] | None = None,
        encode_covariates: bool = False,
        dropout: float = 0.0,
        total_key: str | None = None,
    ):
        super().__init__()
        names = [f"gene_{i}" for i in range(genes)] if isinstance(genes, int) else list(map(str, genes))
        self.covariates = {name: list(map(str, labels)) for name, labels in (covariates or {}).items()}
        self.config: dict[str, Any] = {
            "genes": names,
            "n_latent": n_latent,
            "n_hidden": n_hidden,
            "n_layers": n_layers,
            "covariates": self.covariates,
            "encode_covariates": encode_covariates,
            "dropout": dropout,
            "total_key": total_key,
        }
        n_columns, width = len(self.columns), sum(map(len, self.covariates.values()))
        self.encoder = Encoder(
            n_columns,
            n_latent,
            n_hidden=n_hidden,
            n_layers=n_layers,
            n_covariates=width * encode_covariates,
            dropout=dropout,
        )
        self.decoder = DecoderNB(
            n_latent, n_columns, n_hidden=n_hidden, n_layers=n_layers, n_covariates=width, dropout=dropout
        )

    def _repr_html_(self) -> str:
        c = self.config
        facts = {
            "genes": c["genes"],
            "latent dimensions": c["n_latent"],
            "layers": f"{c['n_layers']} hidden of {c['n_hidden']} units",
            "covariates": [f"{name} ({len(labels)})" for name, labels in self.covariates.items()] or None,
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
        }
        return card("Negative-binomial VAE: counts to latents and back", facts)

    @property
    def n_genes(self) -> int:
        return len(self.config["genes"])

    @property
    def genes(self) -> list[str]:
        return self.config["genes"]

    @property
    def total_key(self) -> str | None:
        return self.config["total_key"]

    @property
    def columns(self) -> list[str]:
        """Columns of the counts: the genes, and the other genes where there is a `total_key`."""
        return self.genes if self.total_key is None else [*self.genes, OTHER_GENES]

    @property
    def n_latent(self) -> int:
        return self.config["n_latent"]

    @torch.no_grad()
    def start_from(self, proportions: Tensor, dispersion: Tensor) -> NBVAE:
        """Set the decoder's bias and dispersion from the data, so that training starts at the gene means.

        Parameters
        ----------
        proportions
            (column,) mean share of a cell's counts; zeros are lifted to a tenth of the smallest positive share.
        dispersion
            (column,) inverse dispersion, for example of :func:`moment_dispersion`.
        """
        smallest = proportions[proportions > 0].min()
        self.decoder.linear.bias.copy_(torch.log(proportions.clamp_min(0.1 * smallest)))
        self.decoder.log_dispersion.copy_(torch.log(dispersion.clamp(MIN_DISPERSION, MAX_DISPERSION)))
        return self

    def one_hot(self, covariates: dict[str, Tensor] | None, n_cells: int) -> Tensor | None:
        """(cell, width) one-hot covariates in the model's order; None for a model without covariates."""
        if not self.covariates:
            return None
        covariates = covariates or {}
        missing = sorted(set(self.covariates) - set(covariates))
        if missing:
            expected = f"the covariates {sorted(self.covariates)}"
            fix = f"pass integer codes of {missing} too, one per cell"
            raise LabelError(expected, f"{sorted(covariates)}", fix)
        one_hot, labels = nn.functional.one_hot, self.covariates.items()
        columns = [one_hot(covariates[name], len(categories)) for name, categories in labels]
        return torch.cat(columns, -1).to(self.decoder.linear.weight.dtype)

    def encode(
        self,
        x: Tensor | SparseCounts,
        library: Tensor | None = None,
        covariates: dict[str, Tensor] | None = None,
    ) -> Normal:
        """Posterior over the latent.

        Parameters
        ----------
        x
            (cell, column) counts, dense or by their non-zeros (on a CPU several times faster).
        library
            (cell,) library size; the row sums of `x` where None.
        covariates
            Name to (cell,) integer codes.

        Returns
        -------
        Normal of shape (cell, latent).
        """
        if library is None:
            library = x.sum(-1) if isinstance(x, Tensor) else x.totals()
        one_hot = self.one_hot(covariates, len(x)) if self.config["encode_covariates"] else None
        return self.encoder(x, library, one_hot)

    def log_proportions(self, z: Tensor, one_hot: Tensor | None = None) -> Tensor:
        """(cell, gene) log share of the library of latents (cell, latent), with covariates `one_hot` (cell, width).

        The result lies where the latents lie; a model on another device works it out there.
        """
        device = self.decoder.linear.weight.device
        logits = self.decoder(z.to(device), None if one_hot is None else one_hot.to(device))
        return torch.log_softmax(logits, -1)[:, : self.n_genes].to(z.device)

    def decode(
        self, z: Tensor, library: Tensor, covariates: dict[str, Tensor] | None = None
    ) -> NegativeBinomial:
        """Count distribution (cell, gene) of latents (cell, latent) at library sizes (cell,), where the latents lie."""
        proportions = self.log_proportions(z, self.one_hot(covariates, len(z))).exp()
        r = self.decoder.dispersion[: self.n_genes]
        return NegativeBinomial(proportions * library.to(z.device).unsqueeze(-1), r.to(z.device))

    def forward(
        self,
        x: Tensor | SparseCounts,
        library: Tensor,
        covariates: dict[str, Tensor] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Normal]:
        """Log-likelihood (cell,) at one sampled latent, and the posterior: what :func:`elbo_loss` needs.

        Training passes `x` by its non-zeros, :class:`SparseCounts`: nothing else of it is then visited.
        """
        posterior, one_hot = self.encode(x, library, covariates), self.one_hot(covariates, len(x))
        counts = x if isinstance(x, SparseCounts) else SparseCounts.from_dense(x)
        z = sample_z(posterior, generator)
        logits = self.decoder(z, one_hot)
        return nb_log_likelihood_logits(counts, logits, library, self.decoder.dispersion), posterior

    def extra_repr(self) -> str:
        return f"{self.n_genes} genes -> {self.n_latent} latent, {sum(p.numel() for p in self.parameters()):,} parameters"


def moment_dispersion(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Inverse dispersion by moments, (gene,), limited to [0.1, 100].

    .. math:: r = \mu^2 / (\sigma^2 - \mu)
    """
    return (mean.square() / (variance - mean).clamp_min(1e-8)).clamp(0.1, 100.0)
