"""Clouds moved by one affine map per group: as if each were moved first, and the short way of one pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellop_nb.bench.count import counts
from cellop_nb.models import energy_batch, energy_joint
from cellop_nb.models.energy import energy_distance, grouped_energy_distance, self_distance
from cellop_nb.models.energy_groups import batches
from cellop_nb.models.energy_moved import moved_energy_distance

from .clouds import clouds, double_loop


def maps(groups, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrices = (
        torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(groups, d, d, generator=generator).double()
    )
    shifts = torch.randn(groups, d, generator=generator).double()
    return matrices.requires_grad_(), shifts.requires_grad_()


def move(z, sizes, matrices, shifts):
    parts = zip(z.split(sizes), matrices, shifts, strict=True)
    return torch.cat([cells @ matrix.T + shift for cells, matrix, shift in parts])


@pytest.mark.parametrize(
    "sizes", [([6, 6, 6], [5, 5, 5]), ([4, 9, 5], [7, 3, 8]), ([600, 4, 30], [500, 5, 30])]
)
def test_moved_equals_moving_and_grouped(sizes):
    x_sizes, y_sizes = sizes
    x, y = clouds(sum(x_sizes), sum(y_sizes), 4, grad=False)
    given, weights = maps(3, 4), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    known = self_distance(y, y_sizes)
    expected = grouped_energy_distance(move(x, x_sizes, *given), y, x_sizes, y_sizes)
    for options in ({}, {"y_self": known}):
        found = moved_energy_distance(x, y, x_sizes, y_sizes, *given, **options)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        grads = (
            torch.autograd.grad((v * weights).sum(), given, retain_graph=True) for v in (found, expected)
        )
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_gradcheck_of_the_maps():
    x, y = clouds(11, 9, 3, grad=False)
    sizes = [5, 6], [5, 4]
    assert torch.autograd.gradcheck(lambda a, b: moved_energy_distance(x, y, *sizes, a, b), maps(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_matrices_and_tiles_agree(dtype, monkeypatch):
    """The two forms, for padded groups, with every combination of wanted gradients."""
    x_sizes, y_sizes = [40, 37, 3], [41, 30, 5]
    x, y = clouds(80, 76, 6, dtype=dtype)
    results = []
    for limit in (energy_batch.SMALL_PAIRS, 0):
        monkeypatch.setattr(energy_batch, "SMALL_PAIRS", limit)
        both = grouped_energy_distance(x, y, x_sizes, y_sizes)
        first = grouped_energy_distance(x, y.detach(), x_sizes, y_sizes)
        second = grouped_energy_distance(x.detach(), y, x_sizes, y_sizes)
        grads = torch.autograd.grad(both.sum(), (x, y))
        grads += torch.autograd.grad(first.sum(), x) + torch.autograd.grad(second.sum(), y)
        results.append((both, first, second, *grads))
    rtol, atol = (1e-9, 1e-11) if dtype == torch.float64 else (1e-3, 3e-6)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_clouds_too_close_for_products_are_left_to_the_tiles():
    x, y = clouds(30, 20, 4, grad=False)
    (batch,) = batches((30,), (20,), x.device)
    assert energy_joint.joint_energies(x[None], y[None], batch, "U") is not None
    x[3] = x[5] + 1e-4
    assert energy_joint.joint_energies(x[None], y[None], batch, "U") is None
    assert energy_joint.joint_energies(x[None] * 1e-20, y[None] * 1e-20, batch, "U") is None
    assert float(energy_distance(x, y)) == pytest.approx(double_loop(x, y, "U"), rel=1e-10)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 60), m=st.integers(2, 60), estimator=st.sampled_from("UV"),
       wanted=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]))  # fmt: skip
def test_the_short_way_of_one_pair_is_that_of_many_groups(n, m, estimator, wanted):
    x, y = clouds(n, m, 5, seed=n * 61 + m)
    x, y = x.requires_grad_(wanted[0]), y.requires_grad_(wanted[1])
    leaves = [z for z in (x, y) if z.requires_grad]
    ways = [energy_distance(x, y, estimator=estimator)]
    ways += [
        grouped_energy_distance(x, y, [n], [m], estimator=estimator)[0],
        energy_distance(x, y, estimator=estimator, tile=16),
    ]
    if not y.requires_grad:
        ways.append(energy_distance(x, y, estimator=estimator, y_self=self_distance(y, None, estimator)))
    for other in ways[1:]:
        torch.testing.assert_close(ways[0], other, rtol=1e-10, atol=1e-12)
        assert other.requires_grad == bool(leaves)
        grads = zip(*(torch.autograd.grad(3 * way, leaves, retain_graph=True) for way in (ways[0], other)),
                    strict=True) if leaves else ()  # fmt: skip
        for a, b in grads:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_small_pair_takes_few_calls_and_makes_no_gradient_that_nobody_wants():
    x, y = clouds(200, 200, 32, dtype=torch.float32)
    y = y.detach()
    known = self_distance(y)
    made = {
        "both": lambda: torch.autograd.grad(energy_distance(x, y), x),
        "known": lambda: torch.autograd.grad(energy_distance(x, y, y_self=known), x),
        "value": lambda: energy_distance(x.detach(), y),
    }
    found = {}
    for name, call in made.items():
        call()  # the factors of these sizes are kept
        found[name] = counts(call)
    assert found["both"].calls <= 36  # torch.cdist with autograd: 40
    assert found["known"].calls < found["both"].calls and found["value"].calls < found["both"].calls
    pairs = {"both": 3 + 2, "known": 2 + 2, "value": 3}  # distances, and the gradient
    for name, number in pairs.items():
        assert found[name].operations == 2 * 32 * 200 * 200 * number
