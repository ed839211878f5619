"""The way of a GPU, taken on a CPU: the inner loop never looks at a value, and the numbers are those of a CPU."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from toy import small_operators, small_vae

import cellop_nb as co
from benchmarks.measure import counts
from cellop_nb.errors import ModelError, NonFiniteError
from cellop_nb.models.energy import energy_distance, grouped_energy_distance, self_distance
from cellop_nb.models.operators import spectral_excess

MAKE = {"vae": small_vae, "operators": small_operators}


@contextlib.contextmanager
def no_looks():
    """Python may not ask a tensor for its values."""

    def refuse(self, *args):
        raise AssertionError("the host looked at a value")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "cpu", "numpy", "tolist", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


@pytest.mark.parametrize("kind", MAKE)
def test_the_inner_loop_never_waits_for_a_device(kind, as_on_a_device, tmp_path):
    """Draw of cells apart, which is the host's own: loss, gradient, clipping, guard, optimiser, sums of terms."""
    trainer = MAKE[kind](None)
    trainer.model.train()
    batches = [batch for _ in range(3) for batch in trainer.batches()]
    trainer._run_step(batches[0])  # the guard's first copy
    for batch in batches[1:8]:
        with no_looks():
            found = counts(lambda batch=batch: trainer._run_step(batch))
        assert found.reads == ()
    assert trainer.guard.holds_back


@pytest.mark.parametrize("kind", MAKE)
def test_looks_are_seen(kind):
    """The count can fail: on a CPU the same steps do look."""
    trainer = MAKE[kind](None)
    trainer.model.train()
    batch = next(iter(trainer.batches()))
    trainer._run_step(batch)
    assert "_local_scalar_dense" in counts(lambda: trainer._run_step(batch)).reads
    with no_looks(), pytest.raises(AssertionError, match="looked"):
        trainer._run_step(batch)


@pytest.mark.parametrize("kind", MAKE)
def test_a_fit_is_the_same(kind, monkeypatch, request):
    here = MAKE[kind](None, max_epochs=3).fit()
    request.getfixturevalue("as_on_a_device")
    there = MAKE[kind](None, max_epochs=3).fit()
    for column in ("train_loss", "val_loss", "grad_norm"):
        torch.testing.assert_close(
            *(torch.tensor(t[column].to_numpy()) for t in (here, there)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", MAKE)
def test_a_fault_holds_the_device_back_and_is_told_as_on_a_cpu(kind, as_on_a_device):
    """The step that brings the NaN is named, though the host looks later; no parameter has seen it."""
    trainer = MAKE[kind](None, max_epochs=4)
    plain, seen = trainer.loss_terms, {}

    def broken(batch):
        terms = plain(batch)
        if trainer.step == 7:
            seen.setdefault("weights", [p.detach().clone() for p in trainer.model.parameters()])
            terms = {name: term * math.nan for name, term in terms.items()}
        return terms

    trainer.loss_terms = broken
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    assert caught.value.step == 7
    assert caught.value.stage == "loss"
    kept = trainer.guard.last_finite.model
    named = dict(zip([name for name, _ in trainer.model.named_parameters()], seen["weights"], strict=True))
    assert all(torch.equal(kept[name], value) for name, value in named.items())


def test_a_norm_that_overflows_is_no_fault_and_no_step_is_lost(as_on_a_device):
    """Finite gradients whose squares overflow: the step is made again at once, and the ones after it too."""

    def losses(deferred):
        trainer = small_operators(None, max_epochs=2, clip_norm=1.0)
        trainer.guard.read_every = 10 if deferred else 1
        plain = trainer.loss_terms
        trainer.loss_terms = lambda batch: {
            name: term * (1e25 if trainer.step == 3 else 1.0) for name, term in plain(batch).items()
        }
        trainer.fit()
        return trainer.history["val_loss"].tolist(), trainer.guard.overflows

    assert losses(True) == losses(False)


@pytest.mark.parametrize("sizes", [([30, 20, 25], [20, 30, 25]), ([40], [70])])
@pytest.mark.parametrize(
    ("side", "small"), [(7, 0), (2048, 0), (2048, 1 << 20)], ids=["tiles", "one tile", "joint"]
)
def test_distances_of_float64_products_are_those_of_repaired_ones(sizes, side, small, monkeypatch, request):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(sum(n), 5, generator=generator) for n in sizes)
    y[:3] = x[:3]  # coincident, and close
    y[3:6] = x[3:6] + 1e-3

    def all_of():
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = grouped_energy_distance(a, b, *sizes)
        return value, *torch.autograd.grad(value.sum(), (a, b)), self_distance(y, sizes[1])

    expected = all_of()
    request.getfixturevalue("as_on_a_device")
    monkeypatch.setattr("cellop_nb.models.energy._DEVICE_TILE_BYTES", 8 * side**2)
    monkeypatch.setattr("cellop_nb.models.energy._DEVICE_SMALL_PAIRS", small)
    for found, wanted in zip(all_of(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("small", [0, 1 << 20], ids=["tiles", "joint"])
@pytest.mark.parametrize(("apart", "offset"), [(1e-3, 1e3), (1e-5, 0.0)])
def test_float64_products_keep_tight_clouds_apart(apart, offset, small, as_on_a_device, monkeypatch):
    """Each cloud is two piles `apart`, far from the origin, and some cells are one point."""
    monkeypatch.setattr("cellop_nb.models.energy._DEVICE_SMALL_PAIRS", small)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(60, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = (
        offset + (cloud * apart).where(torch.rand(60, 1, generator=generator) < 0.5, 1.0) for cloud in (x, y)
    )
    x, y = x.float().requires_grad_(), y.float()
    value = energy_distance(x, y)
    exact = dense_energy(x.detach().double().requires_grad_(), y.double())
    assert value.item() == pytest.approx(exact[0].item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0].double(), exact[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("small", [0, 1 << 20], ids=["tiles", "joint"])
def test_one_point_and_nan_on_a_device(small, as_on_a_device, monkeypatch):
    monkeypatch.setattr("cellop_nb.models.energy._DEVICE_SMALL_PAIRS", small)
    x = torch.full((5, 3), 7.0).requires_grad_()
    value = energy_distance(x, x.detach().clone())
    assert abs(value.item()) < 1e-12 and torch.equal(torch.autograd.grad(value, x)[0], torch.zeros(5, 3))
    broken = torch.cat([x.detach(), torch.full((1, 3), math.nan)])
    with pytest.raises(ModelError, match="row 5"):
        energy_distance(broken, x.detach())


def dense_energy(x, y):
    """Value and gradient from differences, pair by pair, by autograd."""

    def mean(a, b, pairs):
        squares = (a[:, None] - b[None]).square().sum(-1)
        return torch.where(squares > 0, squares, 1.0).sqrt().where(squares > 0, 0.0).sum() / pairs

    n, m = len(x), len(y)
    value = 2 * mean(x, y, n * m) - mean(x, x, n * (n - 1)) - mean(y, y, m * (m - 1))
    return value, torch.autograd.grad(value, x)[0]


def test_the_stability_penalty_is_that_of_the_decomposition(request):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 9, 9, generator=generator).double().requires_grad_()
    expected = torch.autograd.grad(spectral_excess(a, 3.0), a)[0], spectral_excess(a, 3.0)
    request.getfixturevalue("as_on_a_device")
    found = torch.autograd.grad(spectral_excess(a, 3.0), a)[0], spectral_excess(a, 3.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert float(spectral_excess(torch.zeros(2, 3, 3), 3.0)) == 0
    assert spectral_excess(torch.full((2, 3, 3), math.nan), 3.0).isnan()


def test_a_public_trainer_takes_the_way_by_itself(as_on_a_device):
    assert co.VAETrainer is not None
    assert small_vae(None).guard.holds_back
    assert not small_vae(None, on_nonfinite="rollback").guard.holds_back
