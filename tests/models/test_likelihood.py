"""Negative binomial against high precision, scipy and finite differences; training path against plain."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellop_nb.errors import ModelError
from cellop_nb.models import host, likelihood
from cellop_nb.models.likelihood import (
    GeneLinear,
    LogNormalised,
    NegativeBinomial,
    SparseCounts,
    count_constant,
    nb_log_likelihood,
    nb_log_likelihood_logits,
    stirling,
)
from cellop_nb.models.vae import NBVAE, elbo_loss

SCALES = [1e-6, 1e-3, 0.1, 1.0, 3.3, 9.99, 1e2, 1e4, 1e6 - 3, 1e6]
COUNTS = [0, 1, 2, 9, 50, 12345, 10**6]


def reference(x, mu, r):
    """(log p, d log p / d mu, d log p / d r) with 60 digits."""
    with mpmath.workdps(60):
        x, mu, r = mpmath.mpf(x), mpmath.mpf(mu), mpmath.mpf(r)
        gamma = mpmath.loggamma(x + r) - mpmath.loggamma(r) - mpmath.loggamma(x + 1)
        value = gamma + r * mpmath.log(r / (r + mu)) + x * mpmath.log(mu / (r + mu))
        slope = mpmath.digamma(x + r) - mpmath.digamma(r) + mpmath.log(r / (r + mu)) + (mu - x) / (r + mu)
        return float(value), float(x / mu - (x + r) / (r + mu)), float(slope)


def one(x, mu, r, dtype=torch.float64):
    x, mu, r = (torch.tensor([[float(z)]], dtype=dtype) for z in (x, mu, r))
    mu.requires_grad_(), r.requires_grad_()
    value = nb_log_likelihood(x, mu, r)
    value.sum().backward()
    return value.item(), mu.grad.item(), r.grad.item()


def problem(cells=5, genes=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.poisson(
        4 * torch.rand(cells, genes, generator=generator, dtype=torch.float64) ** 3, generator=generator
    )
    logits = torch.randn(cells, genes, generator=generator, dtype=torch.float64)
    r = 0.1 + 3 * torch.rand(genes, generator=generator, dtype=torch.float64)
    library = x.sum(1).clamp_min(1)
    return x.to(dtype), logits.to(dtype).requires_grad_(), library.to(dtype), r.to(dtype).requires_grad_()


@pytest.mark.parametrize("x", COUNTS)
def test_agrees_with_high_precision(x):
    for mu in SCALES:
        for r in SCALES:
            value, by_mu, by_r = one(x, mu, r)
            expected = reference(x, mu, r)
            assert value == pytest.approx(expected[0], rel=1e-12), (mu, r)
            assert by_mu == pytest.approx(expected[1], rel=1e-9, abs=1e-15), (mu, r)
            # the slope in r vanishes as 1 / r^2: compare what an optimiser of log r sees
            assert r * by_r == pytest.approx(r * expected[2], rel=1e-8, abs=1e-8), (mu, r)


def test_textbook_form_loses_what_ours_keeps():
    """lgamma(x + r) - lgamma(r) in float32 at r = 1e6: off by more than a nat, ours by less than 1e-4."""
    x, mu, r = (torch.tensor([[z]]) for z in (50.0, 45.0, 1e6))
    textbook = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1) + r * (r / (r + mu)).log()
    textbook = textbook + x * (mu / (r + mu)).log()
    expected = reference(50, 45, 1e6)[0]
    assert abs(textbook.item() - expected) > 0.1
    assert one(50, 45, 1e6, torch.float32)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("x", COUNTS)
def test_float32_is_close_and_finite(x):
    for mu in SCALES:
        for r in [1e-12, *SCALES, 1e12]:
            at = [float(torch.tensor(z, dtype=torch.float32)) for z in (mu, r)]
            value, by_mu, by_r = one(x, *at, torch.float32)
            assert value == pytest.approx(reference(x, *at)[0], rel=1e-5), (mu, r)
            assert math.isfinite(by_mu) and math.isfinite(by_r)


def test_agrees_with_scipy():
    rng = np.random.default_rng(0)
    x, mu, r = rng.poisson(3, (20, 30)), rng.gamma(2, 2, (20, 30)) + 0.01, rng.gamma(2, 2, 30) + 0.05
    expected = scipy.stats.nbinom.logpmf(x, r, r / (r + mu)).sum(1)
    found = nb_log_likelihood(*(torch.tensor(z, dtype=torch.float64) for z in (x, mu, r)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(("mu", "r"), [(3.0, 0.5), (0.01, 2.0), (20.0, 1e4)])
def test_sums_to_one(mu, r):
    x = torch.arange(1000, dtype=torch.float64).unsqueeze(1)
    log_p = nb_log_likelihood(x, torch.full_like(x, mu), torch.tensor([r], dtype=torch.float64))
    assert log_p.exp().sum().item() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("counts", [0.0, 1.0, None])
def test_gradcheck(counts):
    """All zeros, no zeros, and both."""
    x, logits, library, r = problem()
    x = x if counts is None else torch.full_like(x, counts)
    mu = (library.unsqueeze(1) * logits.softmax(1)).detach().requires_grad_()
    own = (r * mu.detach().sqrt()).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nb_log_likelihood(x, a, b), (mu, r))
    assert torch.autograd.gradcheck(lambda a, b: nb_log_likelihood(x, a, b), (mu, own))
    library = library.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b, c: nb_log_likelihood_logits(x, a, b, c), (logits, library, r)
    )


def test_training_path_is_the_same_likelihood():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        x, logits, library, r = problem(40, 60, dtype=dtype)
        weights = torch.linspace(-1, 2, 40, dtype=dtype)
        plain = nb_log_likelihood(x, library.unsqueeze(1) * logits.softmax(1), r)
        expected = torch.autograd.grad((weights * plain).sum(), (logits, r))
        for counts in (x, SparseCounts.from_dense(x)):
            fused = nb_log_likelihood_logits(counts, logits, library, r)
            found = torch.autograd.grad((weights * fused).sum(), (logits, r))
            for a, b in zip((fused, *found), (plain, *expected), strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_means_that_underflow_keep_a_gradient():
    x = torch.tensor([[5.0, 0.0, 1.0]])
    logits = torch.tensor([[-300.0, 300.0, 0.0]], requires_grad=True)
    value = nb_log_likelihood_logits(x, logits, torch.tensor([6.0]), torch.ones(3))
    value.sum().backward()
    assert torch.isfinite(value).all() and logits.grad[0, 0] > 4 and logits.grad[0, 1] < -4


def test_sparse_counts():
    x = problem()[0]
    x[2] = 0
    counts = SparseCounts.from_dense(x)
    assert counts.shape == (5, 7) and torch.equal(counts.spread(counts.values), x) and counts.constant[2] == 0
    single = counts.to(torch.float32)
    assert single.values.dtype == single.constant.dtype == torch.float32 and single.rows.dtype == torch.int64


def test_stirling_remainders():
    z = torch.tensor([1e-12, 1e-3, 0.5, 1.0, 7.5, 1e3, 1e9], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        value, slope = stirling(z.to(dtype))
        for point, h, h1 in zip(z.to(dtype).tolist(), value.tolist(), slope.tolist(), strict=True):
            with mpmath.workdps(40):
                point = mpmath.mpf(point)
                expected = mpmath.loggamma(point) - point * mpmath.log(point) + point
                slope_expected = mpmath.digamma(point) - mpmath.log(point)
            assert h == pytest.approx(float(expected), rel=tolerance, abs=tolerance)
            assert h1 == pytest.approx(float(slope_expected), rel=tolerance, abs=tolerance)
    x = torch.tensor([3.0], dtype=torch.float64)
    assert count_constant(x).item() == pytest.approx(math.log(6) - 3 * math.log(3) + 3)


def test_samples_have_the_moments():
    mean, r = torch.full((20_000, 3), 4.0), torch.tensor([0.5, 5.0, 1e4])
    counts = NegativeBinomial(mean, r)
    x = counts.sample(torch.Generator().manual_seed(0))
    assert torch.allclose(x.mean(0), mean[0], rtol=0.05)
    assert torch.allclose(x.var(0), counts.variance[0], rtol=0.08)
    assert torch.equal(x, counts.sample(torch.Generator().manual_seed(0)))
    assert x.min() >= 0 and torch.equal(x, x.round())
    assert repr(counts) == "NegativeBinomial(mean: (20000, 3), r: (3,), torch.float32)"
    torch.testing.assert_close(counts.log_prob(x), nb_log_likelihood(x, mean, r))


BAD = {
    "negative count": (-1.0, 1.0, 1.0, r"counts x >= 0. Found -1 at index \(0, 1\)"),
    "negative mean": (1.0, -1.0, 1.0, "means mu >= 0"),
    "r = 0": (1.0, 1.0, 0.0, "inverse dispersion r > 0"),
    "r < 0": (1.0, 1.0, -1e-30, "inverse dispersion r > 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    x, mu, r, message = BAD[case]
    x, mu, r = torch.tensor([[1.0, x]]), torch.tensor([[1.0, mu]]), torch.tensor([1.0, r])
    with pytest.raises(ModelError, match=message):
        nb_log_likelihood(x, mu, r)


def test_negative_count_is_refused_in_training_too():
    with pytest.raises(ModelError, match="raw counts"):
        nb_log_likelihood_logits(torch.tensor([[-1.0, 2.0]]), torch.zeros(1, 2), torch.ones(1), torch.ones(2))


def test_tiny_dispersion_is_bounded_not_nan():
    """Defect 4 of the report: r = 1e-30 gave NaN."""
    for r in (1e-30, 1e-12):
        assert all(map(math.isfinite, one(3, 2.0, r, torch.float32)))
    assert one(3, 2.0, 1e-30)[0] == one(3, 2.0, 1e-12)[0]


def test_nan_parameters_reach_the_guard():
    value = nb_log_likelihood(torch.ones(1, 2), torch.tensor([[1.0, math.nan]]), torch.ones(2))
    assert torch.isnan(value).all()


def test_twice_differentiating_is_refused():
    x, logits, library, r = problem()
    for value in (
        nb_log_likelihood_logits(x, logits, library, r),
        nb_log_likelihood(x, library.unsqueeze(1) * logits.softmax(1), r),
        both_forms(x, decoder_inputs(x) | {"r": r})[0],
    ):
        for loss in (value.sum(), value.square().sum()):
            with pytest.raises(ModelError, match="one differentiation of the likelihood.*create_graph=True"):
                torch.autograd.grad(loss, r, create_graph=True, retain_graph=True)


# -- the training path by non-zeros gives what dense products and the plain likelihood give --------------


some = settings(deadline=None, max_examples=25)


def counts_of(cells=9, genes=13, seed=0, largest=4.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rate = largest * torch.rand(cells, genes, generator=generator, dtype=torch.float64) ** 4
    x = torch.poisson(rate, generator=generator)
    x[2], x[:, 3] = 0, 0  # an empty cell and a gene that nobody has
    return x.to(dtype)


@pytest.mark.parametrize("n_covariates", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sparse_layer_is_the_dense_one(n_covariates, dtype):
    x, tolerance = counts_of(dtype=dtype), 1e-5 if dtype == torch.float32 else 1e-12
    layer = GeneLinear(13, 6, n_covariates=n_covariates).to(dtype)
    library, given = (
        x.sum(1).clamp_min(1),
        torch.randn(9, n_covariates, dtype=dtype) if n_covariates else None,
    )
    outs, grads = [], []
    for form in (x, SparseCounts.from_dense(x)):
        outs.append(layer(LogNormalised(form, library, given)))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), list(layer.parameters())))
    plain = (1e4 * x / library.unsqueeze(1)).log1p() @ layer.weight + layer.bias
    plain = plain if given is None else plain + given @ layer.covariates
    for out in outs:
        torch.testing.assert_close(out, plain, rtol=tolerance, atol=tolerance)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert not grads[1][0][3].any()


def test_counts_by_gene_are_the_transpose():
    x = counts_of()
    counts = SparseCounts.from_dense(x)
    starts, cells, values = counts.by_gene(counts.values)
    turned = torch.zeros(13, 9, dtype=torch.float64)
    turned[torch.arange(13).repeat_interleave(starts.diff()), cells] = values
    assert torch.equal(turned, counts.spread(counts.values).T)
    assert torch.equal(counts.totals(), x.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_that_are_looked_up_are_those_of_the_formula(dtype):
    x = torch.tensor(
        [[1, 0, 2, 7], [255, 256, 40_000, 0], [0.5, 254.5, 300.25, 1], [0, 0, 0, 0]], dtype=dtype
    )
    expected = torch.stack([count_constant(row[row > 0]).sum() for row in x])
    torch.testing.assert_close(SparseCounts.from_dense(x).constant, expected, rtol=1e-6, atol=0)


def decoder_inputs(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    cells, genes = x.shape

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(x.dtype).requires_grad_()

    given = {"z": normal(cells, 2), "h": normal(cells, 5), "w": normal(genes, 2), "v": normal(genes, 5)}
    given |= {"a": normal(genes), "r": (normal(genes).detach().exp() + 0.1).requires_grad_()}
    return given | {"library": x.sum(1).clamp_min(1).requires_grad_()}


def both_forms(x, g):
    def logits():
        return g["z"] @ g["w"].T + g["h"] @ g["v"].T + g["a"]

    ours = nb_log_likelihood_logits(SparseCounts.from_dense(x), logits(), g["library"], g["r"])
    return ours, nb_log_likelihood(x, g["library"].unsqueeze(1) * logits().softmax(1), g["r"])


@some
@given(st.integers(0, 2**31), st.sampled_from([1.0, 10.0, 300.0]), st.sampled_from([1, 40, 1 << 19]))
def test_the_training_path_is_the_plain_likelihood(seed, largest, turn):
    """Counts below and above the table's end, one cell or all cells a turn, unequal upstream gradients."""
    x = counts_of(seed=seed, largest=largest)
    inputs, weights = decoder_inputs(x), torch.linspace(-1, 2, 9, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "_TURN", turn)
        head, plain = both_forms(x, inputs)
        torch.testing.assert_close(head, plain, rtol=1e-10, atol=1e-10)
        found = torch.autograd.grad((weights * head).sum(), list(inputs.values()))
        expected = torch.autograd.grad((weights * plain).sum(), list(inputs.values()))
    for name, a, b in zip(inputs, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=name)


def test_counts_that_are_no_integers_take_the_deviance_form():
    x = counts_of()
    x[x > 0] += 0.37
    torch.testing.assert_close(*both_forms(x, decoder_inputs(x)), rtol=1e-10, atol=1e-10)


def test_float32_stays_close_at_large_counts_and_dispersions():
    x = counts_of(largest=3e4)
    inputs = decoder_inputs(x)
    inputs["r"] = torch.full((13,), 1e6, dtype=torch.float64)
    exact = both_forms(x, inputs)[1]
    single = {name: value.detach().float() for name, value in inputs.items()}
    torch.testing.assert_close(
        both_forms(x.float(), single)[0].double(), exact.detach(), rtol=1e-5, atol=1e-2
    )


def test_the_form_for_other_devices_is_the_same(monkeypatch):
    """There every non-zero takes the deviance form, since a look at the counts would wait for the device."""
    x = counts_of(largest=30.0)
    library, r = x.sum(1).clamp_min(1), torch.full((13,), 0.7, dtype=torch.float64).requires_grad_()
    logits = torch.randn(9, 13, dtype=torch.float64).requires_grad_()
    results = []
    for table in (True, False):
        if not table:
            monkeypatch.setattr(host, "looks_are_free", lambda device: False)
        value = nb_log_likelihood_logits(x, logits, library, r)
        results.append((value, *torch.autograd.grad(value.sum(), (logits, r))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_nothing_keeps_the_arrays_of_a_step_alive():
    import gc
    import weakref

    x = counts_of()
    gc.disable()
    try:
        head, _ = both_forms(x, decoder_inputs(x))
        watched = weakref.ref(head.grad_fn)
        del head
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("encode_covariates", [False, True])
def test_the_whole_bound_dense_and_sparse(encode_covariates):
    torch.manual_seed(0)
    vae = NBVAE(13, n_latent=3, n_hidden=8, covariates={"b": ["1", "2"]}, encode_covariates=encode_covariates)
    torch.nn.init.normal_(vae.encoder.linear.weight)
    x, codes, results = counts_of(dtype=torch.float32), {"b": torch.arange(9) % 2}, []
    for form in (x, SparseCounts.from_dense(x)):
        noise = torch.Generator().manual_seed(0)
        loss = sum(elbo_loss(*vae(form, x.sum(1).clamp_min(1), codes, generator=noise)).values())
        results.append((loss, *torch.autograd.grad(loss, list(vae.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -2.0])
def test_a_count_that_is_none_reaches_the_loss_for_the_guard_to_name(value):
    x = counts_of()
    broken = x.clone()
    broken[1, 0] = value
    rows, columns = broken.nonzero(as_tuple=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), rows.bincount(minlength=len(x)).cumsum(0)])
    constant = SparseCounts(x.shape, starts, columns, broken[rows, columns]).constant
    assert not constant[1].isfinite()
    others = torch.arange(len(x)) != 1
    torch.testing.assert_close(constant[others], SparseCounts.from_dense(x).constant[others])
