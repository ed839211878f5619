"""The VAE: distributions in and out, bounds that keep learning, and an ELBO checked cell by cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import Normal, kl_divergence

from cellop_nb.errors import LabelError
from cellop_nb.models.likelihood import NegativeBinomial, SparseCounts
from cellop_nb.models.vae import (
    LOGVAR_BOUND,
    MAX_DISPERSION,
    MIN_DISPERSION,
    NBVAE,
    DecoderNB,
    Encoder,
    bounded,
    elbo_loss,
    kl_to_standard_normal,
    moment_dispersion,
    sample_z,
)

CELLS, GENES, LATENT = 7, 11, 3
some = settings(deadline=None, max_examples=30)
BATCHES = {"batch": ["b1", "b2", "b3"]}


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    return torch.as_tensor(rng.negative_binomial(1, 0.3, (CELLS, GENES)), dtype=torch.float32)


def small_vae(**settings):
    torch.manual_seed(0)
    return NBVAE(GENES, n_latent=LATENT, n_hidden=8, **settings)


def double_posterior(seed=0):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(CELLS, LATENT, generator=g, dtype=torch.float64)
    scale = torch.rand(CELLS, LATENT, generator=g, dtype=torch.float64) + 0.1
    return Normal(mean, scale)


def set_log_variance(encoder, value):
    """Make the encoder answer one log-variance for every cell."""
    with torch.no_grad():
        encoder.log_variance.weight.zero_()
        encoder.log_variance.bias.fill_(value)


# -- shapes and meaning ----------------------------------------------------------------------------------


def test_encode_gives_a_normal_over_the_latent(counts):
    posterior = small_vae().encode(counts)
    assert isinstance(posterior, Normal)
    assert posterior.loc.shape == posterior.scale.shape == (CELLS, LATENT)


def test_decode_gives_a_negative_binomial_over_the_genes(counts):
    vae = small_vae()
    given = vae.decode(torch.randn(CELLS, LATENT), counts.sum(1))
    assert isinstance(given, NegativeBinomial)
    assert given.mean.shape == (CELLS, GENES)
    assert given.r.shape == (GENES,)


def test_genes_are_named_or_numbered():
    assert NBVAE(["ISG15", "MX1"], n_latent=2).genes == ["ISG15", "MX1"]
    assert NBVAE(2, n_latent=2).genes == ["gene_0", "gene_1"]


def test_config_rebuilds_the_model(counts):
    vae = small_vae(covariates=BATCHES, encode_covariates=True, n_layers=2)
    again = NBVAE(**vae.config)
    again.load_state_dict(vae.state_dict())
    codes = {"batch": torch.arange(CELLS) % 3}
    assert torch.equal(again.encode(counts, covariates=codes).loc, vae.encode(counts, covariates=codes).loc)


def test_library_size_scales_the_mean(counts):
    vae, z = small_vae(), torch.randn(CELLS, LATENT)
    once, thrice = (vae.decode(z, factor * counts.sum(1)).mean for factor in (1, 3))
    torch.testing.assert_close(thrice, 3 * once)
    torch.testing.assert_close(once.sum(1), counts.sum(1))


def test_the_encoder_does_not_see_sequencing_depth(counts):
    vae = small_vae()
    torch.testing.assert_close(vae.encode(counts).loc, vae.encode(5 * counts).loc)


def test_an_empty_cell_is_finite(counts):
    vae = small_vae()
    log_likelihood, posterior = vae(torch.zeros_like(counts), torch.ones(CELLS))
    assert log_likelihood.isfinite().all()
    assert vae.encode(torch.zeros_like(counts)).loc.isfinite().all()


def test_start_from_gives_the_gene_means(counts):
    vae = small_vae()
    with torch.no_grad():
        vae.decoder.output.weight.zero_()
    proportions = counts.sum(0) / counts.sum()
    proportions[0] = 0.0  # a gene that no training cell counts: a tenth of the rarest one
    vae.start_from(proportions, torch.full((GENES,), 2.0))
    at_origin = vae.decode(torch.zeros(1, LATENT), torch.ones(1)).mean[0]
    expected = proportions.clamp_min(0.1 * proportions[proportions > 0].min())
    torch.testing.assert_close(at_origin, expected / expected.sum())
    torch.testing.assert_close(vae.decoder.dispersion, torch.full((GENES,), 2.0))


@some
@given(st.floats(0.5, 50), st.floats(0.2, 50))
def test_moment_dispersion_inverts_the_variance(mean, r):
    mean, r = torch.tensor([mean], dtype=torch.float64), torch.tensor([r], dtype=torch.float64)
    torch.testing.assert_close(moment_dispersion(mean, mean + mean**2 / r), r)


# -- bounds ----------------------------------------------------------------------------------------------


@some
@given(st.floats(-1e6, 1e6), st.floats(-10, 10))
def test_bounded_clamps_forward_and_passes_the_gradient(value, upstream):
    x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    y = bounded(x, -10.0, 10.0)
    y.backward(torch.tensor(upstream, dtype=torch.float64))
    assert y.item() == min(max(value, -10.0), 10.0)
    assert x.grad.item() == upstream


@pytest.mark.parametrize("value", [-1e3, -11.0, 11.0, 1e3])
def test_logvar_is_bounded_and_learns_its_way_back(counts, value):
    encoder = Encoder(GENES, LATENT, n_hidden=8)
    set_log_variance(encoder, value)
    posterior = encoder(counts, counts.sum(1))
    logvar = 2 * posterior.scale.log()
    torch.testing.assert_close(logvar, torch.full_like(logvar, LOGVAR_BOUND if value > 0 else -LOGVAR_BOUND))
    kl_to_standard_normal(posterior).mean().backward()
    # The divergence pulls a variance that is too large down, and one that is too small up.
    assert (encoder.log_variance.bias.grad * value > 0).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_logvar_that_is_not_finite_is_not_hidden(counts, value):
    encoder = Encoder(GENES, LATENT, n_hidden=8)
    set_log_variance(encoder, value)
    assert encoder(counts, counts.sum(1)).scale.isnan().all()


@pytest.mark.parametrize("value", [-1e3, 1e3])
def test_dispersion_is_bounded_and_its_gradient_alive(value):
    decoder = DecoderNB(LATENT, GENES)
    with torch.no_grad():
        decoder.log_dispersion.fill_(value)
    r = decoder.dispersion
    bound = MIN_DISPERSION if value < 0 else MAX_DISPERSION
    torch.testing.assert_close(r, torch.full_like(r, bound))
    r.sum().backward()
    assert (decoder.log_dispersion.grad > 0).all()


# -- the ELBO --------------------------------------------------------------------------------------------


def test_kl_is_that_of_torch():
    posterior = double_posterior()
    standard = Normal(torch.zeros_like(posterior.loc), torch.ones_like(posterior.scale))
    torch.testing.assert_close(
        kl_to_standard_normal(posterior), kl_divergence(posterior, standard).sum(-1), rtol=1e-12, atol=0
    )


@some
@given(st.integers(0, 2**31))
def test_kl_is_never_negative(seed):
    assert (kl_to_standard_normal(double_posterior(seed)) >= 0).all()


def test_kl_of_the_prior_is_zero():
    assert (kl_to_standard_normal(Normal(torch.zeros(2, 3), torch.ones(2, 3))) == 0).all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_elbo_terms_are_costs_whose_sum_is_the_loss(weight):
    posterior, log_likelihood = double_posterior(), torch.tensor([-3.0, -5.0], dtype=torch.float64)
    terms = elbo_loss(log_likelihood, posterior, weight)
    assert list(terms) == ["reconstruction", "kl"]
    assert terms["reconstruction"].item() == 4.0
    torch.testing.assert_close(terms["kl"], weight * kl_to_standard_normal(posterior).mean())
    # A wider posterior far from the prior must cost more: the sign of the divergence.
    wider = elbo_loss(log_likelihood, Normal(10 * posterior.loc, posterior.scale), 1.0)
    assert wider["kl"] > terms["kl"]


@pytest.mark.parametrize("sparse", [False, True])
def test_elbo_equals_a_loop_over_cells_and_genes(counts, sparse):
    vae, library, weight = small_vae().double(), counts.double().sum(1), 0.7
    x = counts.double()
    given = SparseCounts.from_dense(x) if sparse else x
    log_likelihood, posterior = vae(given, library, generator=torch.Generator().manual_seed(3))
    loss = sum(elbo_loss(log_likelihood, posterior, weight).values())

    noise = torch.randn(CELLS, LATENT, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = 0.0
    for cell in range(CELLS):
        mean = posterior.loc[cell].detach()
        variance = posterior.scale[cell].detach() ** 2
        logits = vae.decoder((mean + variance.sqrt() * noise[cell])[None])[0].detach().numpy()
        share = np.exp(logits) / np.exp(logits).sum()
        for gene in range(GENES):
            mu, r = share[gene] * library[cell].item(), vae.decoder.dispersion[gene].item()
            expected -= stats.nbinom.logpmf(x[cell, gene].item(), r, r / (r + mu))
        for m, v in zip(mean.tolist(), variance.tolist(), strict=True):
            expected += weight * (-0.5) * (1 + np.log(v) - m**2 - v)
    assert loss.item() == pytest.approx(expected / CELLS, rel=1e-9)


def test_gradient_of_the_elbo_matches_finite_differences(counts):
    vae = NBVAE(4, n_latent=2, n_hidden=3).double()
    x = counts[:3, :4].double() + 1
    names = [name for name, _ in vae.named_parameters()]

    def loss(*parameters):
        given = dict(zip(names, parameters, strict=True))
        noise = torch.Generator().manual_seed(0)
        out = torch.func.functional_call(vae, given, (x, x.sum(1)), {"generator": noise})
        return sum(elbo_loss(*out).values())

    start = tuple(p.detach().clone().requires_grad_() for p in vae.parameters())
    assert torch.autograd.gradcheck(loss, start, atol=1e-6)


@pytest.mark.parametrize("encode_covariates", [False, True])
def test_the_elbo_reaches_every_parameter(counts, encode_covariates):
    vae = small_vae(covariates=BATCHES, encode_covariates=encode_covariates)
    codes = {"batch": torch.arange(CELLS) % 3}
    sum(elbo_loss(*vae(counts, counts.sum(1), codes)).values()).backward()
    dead = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


# -- samples ---------------------------------------------------------------------------------------------


def test_samples_have_the_posteriors_moments():
    posterior = Normal(torch.tensor([1.0, -2.0]).expand(20000, 2), torch.tensor([0.5, 3.0]).expand(20000, 2))
    z = sample_z(posterior, torch.Generator().manual_seed(0))
    # Four standard errors.
    torch.testing.assert_close(z.mean(0), torch.tensor([1.0, -2.0]), atol=4 * 3 / 20000**0.5, rtol=0)
    torch.testing.assert_close(z.std(0), torch.tensor([0.5, 3.0]), rtol=4 / 40000**0.5, atol=0)


def test_samples_follow_the_seed_and_carry_gradients():
    posterior = Normal(torch.zeros(4, 2, requires_grad=True), torch.ones(4, 2))
    one, same, other = (sample_z(posterior, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    one.sum().backward()
    assert (posterior.loc.grad == 1).all()


# -- covariates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode_covariates", [False, True])
def test_covariates_enter_the_decoder_and_on_request_the_encoder(counts, encode_covariates):
    vae, z = small_vae(covariates=BATCHES, encode_covariates=encode_covariates), torch.zeros(CELLS, LATENT)
    first, second = ({"batch": torch.full((CELLS,), code)} for code in (0, 1))
    decoded = [vae.decode(z, counts.sum(1), codes).mean for codes in (first, second)]
    encoded = [vae.encode(counts, covariates=codes).loc for codes in (first, second)]
    assert not torch.allclose(*decoded)
    assert torch.allclose(*encoded) == (not encode_covariates)


def test_a_missing_covariate_is_refused(counts):
    vae = small_vae(covariates=BATCHES)
    with pytest.raises(LabelError, match=r"Expected the covariates \['batch'\].*Found \[\]"):
        vae.decode(torch.zeros(CELLS, LATENT), counts.sum(1))
    with pytest.raises(LabelError, match=r"Found \['donor'\].*codes of \['batch'\]"):
        vae(counts, counts.sum(1), {"donor": torch.zeros(CELLS, dtype=torch.long)})


def test_repr_says_what_it_is():
    assert "11 genes -> 3 latent" in repr(small_vae())
