"""The training path by non-zeros gives what dense products and the plain likelihood give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellop_nb.models import host, nb_rows
from cellop_nb.models.counts import SparseCounts
from cellop_nb.models.gene_linear import GeneLinear, LogNormalised
from cellop_nb.models.likelihood import nb_log_likelihood, nb_log_likelihood_logits
from cellop_nb.models.nb_head import nb_log_likelihood_head
from cellop_nb.models.stirling import count_constant
from cellop_nb.models.vae import NBVAE, elbo_loss

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
    counts = SparseCounts.from_dense(counts_of())
    starts, cells, values = counts.by_gene(counts.values)
    turned = torch.zeros(13, 9, dtype=torch.float64)
    turned[torch.arange(13).repeat_interleave(starts.diff()), cells] = values
    assert torch.equal(turned, counts.dense().T)
    assert torch.equal(counts.totals(), counts.dense().sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_that_are_looked_up_are_those_of_the_formula(dtype):
    x = torch.tensor(
        [[1, 0, 2, 7], [255, 256, 40_000, 0], [0.5, 254.5, 300.25, 1], [0, 0, 0, 0]], dtype=dtype
    )
    expected = torch.stack([count_constant(row[row > 0]).sum() for row in x])
    torch.testing.assert_close(SparseCounts.from_dense(x).constant, expected, rtol=1e-6, atol=0)


def head_inputs(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
    cells, genes = x.shape

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(x.dtype).requires_grad_()

    given = {"z": normal(cells, 2), "h": normal(cells, 5), "w": normal(genes, 2), "v": normal(genes, 5)}
    given |= {"a": normal(genes), "r": (normal(genes).detach().exp() + 0.1).requires_grad_()}
    return given | {"library": x.sum(1).clamp_min(1).requires_grad_()}


def both_forms(x, g):
    counts = SparseCounts.from_dense(x)
    head = nb_log_likelihood_head(
        counts, g["library"], g["r"], bias=g["a"], linear=(g["z"], g["w"]), output=(g["h"], g["v"])
    )
    logits = g["z"] @ g["w"].T + g["h"] @ g["v"].T + g["a"]
    return head, nb_log_likelihood(x, g["library"].unsqueeze(1) * logits.softmax(1), g["r"])


@some
@given(st.integers(0, 2**31), st.sampled_from([1.0, 10.0, 300.0]), st.sampled_from([1, 40, 1 << 19]))
def test_the_head_is_the_plain_likelihood(seed, largest, turn):
    """Counts below and above the table's end, one cell or all cells a turn, unequal upstream gradients."""
    x = counts_of(seed=seed, largest=largest)
    inputs, weights = head_inputs(x), torch.linspace(-1, 2, 9, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nb_rows, "_TURN", turn)
        head, plain = both_forms(x, inputs)
        torch.testing.assert_close(head, plain, rtol=1e-10, atol=1e-10)
        found = torch.autograd.grad((weights * head).sum(), list(inputs.values()))
        expected = torch.autograd.grad((weights * plain).sum(), list(inputs.values()))
    for name, a, b in zip(inputs, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=name)


def test_counts_that_are_no_integers_take_the_deviance_form():
    x = counts_of()
    x[x > 0] += 0.37
    torch.testing.assert_close(*both_forms(x, head_inputs(x)), rtol=1e-10, atol=1e-10)


def test_float32_stays_close_at_large_counts_and_dispersions():
    x = counts_of(largest=3e4)
    inputs = head_inputs(x)
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
        head, _ = both_forms(x, head_inputs(x))
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
    constant = SparseCounts.from_dense(broken, validate=False).constant
    assert not constant[1].isfinite()
    others = torch.arange(len(x)) != 1
    torch.testing.assert_close(constant[others], SparseCounts.from_dense(x).constant[others])
