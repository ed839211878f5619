"""Extremes: finite values and gradients, or a refusal that says why."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cellop_nb.errors import ModelError
from cellop_nb.models.energy import energy_distance, grouped_energy_distance
from cellop_nb.models.likelihood import nb_log_likelihood, nb_log_likelihood_logits
from cellop_nb.models.operators import spectral_excess
from cellop_nb.models.vae import NBVAE, elbo_loss

quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**16)


def powers_of_ten(low: int, high: int):
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def finite(*tensors: Tensor | None) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor is not None)


def counts_of(n_cells: int, n_genes: int, library: float, seed: int) -> Tensor:
    """Counts with a zero cell, a zero gene and a constant gene where there is room."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.softmax(2 * torch.randn(n_genes, generator=generator), 0)
    x = torch.poisson(shares.expand(n_cells, -1) * library, generator=generator)
    if n_cells > 2:
        x[0] = 0
    if n_genes > 3:
        x[:, 0], x[:, 1] = 0, 1
    return x


# -- negative binomial ---------------------------------------------------------------------------


@quick
@given(powers_of_ten(-12, 12), powers_of_ten(0, 8), st.integers(1, 5), st.integers(1, 6), seeds)
def test_likelihood(theta, library, n_cells, n_genes, seed):
    x = counts_of(n_cells, n_genes, library, seed)
    mu = (x.mean(0) + 1e-3).expand_as(x).clone().requires_grad_()
    r = torch.full((n_genes,), theta, requires_grad=True)
    value = nb_log_likelihood(x, mu, r)
    value.sum().backward()
    assert finite(value, mu.grad, r.grad)
    assert (value <= 1e-3 * (1 + x.sum(1))).all()  # a probability is at most one


@quick
@given(powers_of_ten(-8, 8), powers_of_ten(0, 6), seeds)
def test_likelihood_in_float32_is_that_of_float64(theta, library, seed):
    x = counts_of(4, 5, library, seed)
    mu, r = x.mean(0).add(0.1).expand_as(x), torch.full((5,), theta)
    single = nb_log_likelihood(x, mu, r)
    double = nb_log_likelihood(x.double(), mu.double(), r.double())
    # lgamma of large counts cancels: what is lost is relative to the counts, not to the small difference
    torch.testing.assert_close(single.double(), double, rtol=2e-4, atol=2e-4)


@quick
@given(powers_of_ten(-12, 12), powers_of_ten(0, 8), st.floats(0, 200), seeds)
def test_likelihood_from_logits(theta, library, spread, seed):
    x = counts_of(4, 5, library, seed)
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(4, 5, generator=generator)).requires_grad_()
    r = torch.full((5,), theta, requires_grad=True)
    value = nb_log_likelihood_logits(x, logits, x.sum(1).clamp_min(1), r)
    value.sum().backward()
    assert finite(value, logits.grad, r.grad)


@pytest.mark.parametrize("wrong", [-1.0, -1e-9])
def test_what_no_likelihood_exists_for_is_refused(wrong):
    one = torch.ones(1, 1)
    with pytest.raises(ModelError):
        nb_log_likelihood(wrong * one, one, one[0])
    with pytest.raises(ModelError):
        nb_log_likelihood(one, wrong * one, one[0])
    with pytest.raises(ModelError):
        nb_log_likelihood(one, one, wrong * one[0])


# -- the bound of the VAE ------------------------------------------------------------------------


def bound(model: NBVAE, x: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return elbo_loss(*model(x, x.sum(1).clamp_min(1), generator=generator))


@quick
@given(powers_of_ten(0, 8), st.integers(1, 5), st.integers(1, 6), powers_of_ten(-12, 12), seeds)
def test_elbo(library, n_cells, n_genes, theta, seed):
    torch.manual_seed(seed)
    model = NBVAE(n_genes, n_latent=2, n_hidden=4)
    with torch.no_grad():
        model.decoder.log_dispersion.fill_(math.log(theta))
    terms = bound(model, counts_of(n_cells, n_genes, library, seed))
    sum(terms.values()).backward()
    assert finite(*terms.values(), *(p.grad for p in model.parameters()))
    assert float(terms["kl"].detach()) >= -1e-5


@pytest.mark.parametrize("scale", [0.0, 30.0, 1e3])
def test_elbo_with_wild_weights(scale):
    torch.manual_seed(0)
    model = NBVAE(6, n_latent=2, n_hidden=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    terms = bound(model, counts_of(5, 6, 100.0, 0))
    sum(terms.values()).backward()
    assert finite(*terms.values(), *(p.grad for p in model.parameters()))


def test_elbo_in_float32_and_bfloat16_is_that_of_float64():
    torch.manual_seed(0)
    model, x = NBVAE(20, n_latent=3, n_hidden=8), counts_of(30, 20, 500.0, 0)
    model.eval()

    def total(model, x):
        posterior = model.encode(x, x.sum(1).clamp_min(1))
        logits = model.decoder(posterior.loc)
        return nb_log_likelihood_logits(x, logits, x.sum(1).clamp_min(1), model.decoder.dispersion).mean()

    single = float(total(model, x).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = total(model, x)
    half.backward()
    assert finite(half, *(p.grad for p in model.parameters()))
    double = float(total(model.double(), x.double()).detach())
    assert single == pytest.approx(double, rel=1e-5)
    assert float(half.detach()) == pytest.approx(double, rel=2e-2)  # bfloat16 has 8 bits


# -- energy distance -----------------------------------------------------------------------------


def cloud(n: int, d: int, scale: float, seed: int) -> Tensor:
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), powers_of_ten(-12, 12), seeds)
def test_energy(n, m, d, scale, seed):
    x, y = cloud(n, d, scale, seed).requires_grad_(), cloud(m, d, scale, seed + 1)
    for estimator in ("U", "V"):
        if estimator == "U" and min(n, m) < 2:
            with pytest.raises(ModelError, match="2"):
                energy_distance(x, y, estimator=estimator)
            continue
        value = energy_distance(x, y, estimator=estimator)
        (slope,) = torch.autograd.grad(value, x)
        assert finite(value, slope)
        assert estimator == "U" or float(value.detach()) >= -1e-5 * scale
        double = energy_distance(x.detach().double(), y.double(), estimator=estimator)
        assert float(value.detach()) == pytest.approx(float(double), abs=2e-5 * scale * d)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_energy_of_identical_cells_is_zero_with_a_finite_gradient(n):
    x = torch.full((n, 4), 3.7, requires_grad=True)
    value = energy_distance(x, torch.full((n + 1, 4), 3.7))
    (slope,) = torch.autograd.grad(value, x)
    assert float(value.detach()) == 0 and finite(slope) and bool((slope == 0).all())


def test_energy_of_a_cloud_with_itself_is_zero_in_v_form():
    x = cloud(40, 3, 1.0, 0)
    assert float(energy_distance(x, x, estimator="V")) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_energy_far_from_the_origin(offset):
    x, y = cloud(50, 3, 1.0, 0).double() + offset, cloud(60, 3, 1.0, 1).double() + offset + 1
    near = energy_distance(x - offset, y - offset)
    torch.testing.assert_close(energy_distance(x, y), near, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_energy_of_non_finite_cells_is_refused_with_a_reason(bad):
    x = cloud(5, 2, 1.0, 0)
    x[3, 1] = bad
    with pytest.raises(ModelError, match="finite|NaN"):
        energy_distance(x, cloud(5, 2, 1.0, 1))


def test_empty_clouds_are_refused_not_zero():
    with pytest.raises(ModelError):
        energy_distance(torch.zeros(0, 3), torch.zeros(4, 3), estimator="V")
    with pytest.raises(ModelError):
        grouped_energy_distance(torch.zeros(4, 3), torch.zeros(4, 3), [4, 0], [2, 2], estimator="V")


def test_energy_under_bfloat16_autocast_keeps_its_precision():
    x, y = cloud(60, 3, 1.0, 0).requires_grad_(), cloud(60, 3, 1.0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = energy_distance(x, y)
    (slope,) = torch.autograd.grad(value, x)
    assert finite(slope)
    assert float(value.detach()) == pytest.approx(float(energy_distance(x.detach(), y)), rel=1e-4, abs=1e-5)


# -- spectral penalty ----------------------------------------------------------------------------


@quick
@given(st.integers(1, 6), powers_of_ten(-12, 12), seeds)
def test_spectral_penalty(d, scale, seed):
    matrices = cloud(2 * d, d, scale, seed).view(2, d, d).requires_grad_()
    value = spectral_excess(matrices, 2.0)
    expected = (torch.linalg.matrix_norm(matrices.detach().double(), 2) - 2).clamp_min(0).square().mean()
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-4, atol=1e-6)
    if value.requires_grad:
        (slope,) = torch.autograd.grad(value, matrices)
        assert finite(slope)


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3), torch.eye(3), 5 * torch.eye(3), torch.ones(3, 3) * 4])
def test_spectral_penalty_at_repeated_and_zero_singular_values(matrix):
    matrices = matrix.unsqueeze(0).clone().requires_grad_()
    value = spectral_excess(matrices, 2.0)
    assert finite(value)
    if value.requires_grad:
        assert finite(torch.autograd.grad(value, matrices)[0])
