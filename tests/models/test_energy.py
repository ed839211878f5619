"""Energy distance against closed forms, a double loop, dcor, and the defects that it must not have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from anndata import AnnData
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.measure import counts
from cellop_nb.errors import ModelError
from cellop_nb.models import energy
from cellop_nb.models.energy import (
    energy_distance,
    grouped_energy_distance,
    moved_energy_distance,
    noise_floor,
    noise_limit,
    self_distance,
    split_energies,
)

from .clouds import clouds, double_loop, value_and_gradient


@pytest.mark.parametrize("estimator", ["U", "V"])
@pytest.mark.parametrize("d", [1, 2, 32])
def test_equals_the_double_loop(estimator, d):
    x, y = clouds(13, 21, d)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = energy_distance(x.to(dtype), y.to(dtype), estimator=estimator, tile=8)
        assert found.dtype == dtype and found.dim() == 0
        assert float(found.detach()) == pytest.approx(
            double_loop(x, y, estimator), rel=tolerance, abs=tolerance
        )


def test_v_equals_dcor():
    import dcor  # compiles for seconds: not while tests are collected

    x, y = clouds(150, 130, 8, grad=False)
    expected = dcor.energy_distance(x.numpy(), y.numpy())
    assert float(energy_distance(x, y, estimator="V")) == pytest.approx(expected, rel=1e-10)
    found = float(energy_distance(x.float(), y.float(), estimator="V"))
    assert found == pytest.approx(expected, rel=1e-5)


def test_two_piles_of_points():
    a, b = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 0.0])
    x, y = a.repeat(40, 1).requires_grad_(), b.repeat(30, 1)
    for estimator in "UV":
        value = energy_distance(x, y, estimator=estimator)
        assert float(value) == pytest.approx(2 * 3.0, rel=1e-6)
        (gradient,) = torch.autograd.grad(value, x)
        assert torch.allclose(gradient.sum(0), 2 * a / 3, atol=1e-6)


def test_gaussians_have_a_closed_form():
    """In one dimension E|N(m, v)| is known; the sample value is within a few standard errors."""

    def mean_abs(m, s):
        return s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / (2 * s**2)) + m * math.erf(
            m / (s * math.sqrt(2))
        )

    rng, shift, spread = np.random.default_rng(0), 1.0, 1.5
    expected = (
        2 * mean_abs(shift, math.hypot(1, spread))
        - mean_abs(0, math.sqrt(2))
        - mean_abs(0, spread * math.sqrt(2))
    )
    x, y = rng.normal(size=(2000, 1)), shift + spread * rng.normal(size=(2000, 1))
    assert float(energy_distance(torch.tensor(x), torch.tensor(y))) == pytest.approx(expected, abs=0.08)


def test_isotropic_gaussians_in_many_dimensions():
    """E||X - X'|| = sqrt(2) E chi_d, for the constant term."""
    d, cells = 32, torch.randn(3000, 32, generator=torch.Generator().manual_seed(0))
    expected = math.sqrt(2) * math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    assert float(self_distance(cells)) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("estimator", ["U", "V"])
@pytest.mark.parametrize("tile", [None, 3])
def test_gradcheck(estimator, tile):
    x, y = clouds(7, 5, 3)
    assert torch.autograd.gradcheck(
        lambda a, b: energy_distance(a, b, estimator=estimator, tile=tile), (x, y)
    )
    assert torch.autograd.gradcheck(
        lambda a: energy_distance(a, y.detach(), estimator=estimator, tile=tile), (x,)
    )
    assert torch.autograd.gradcheck(
        lambda b: energy_distance(x.detach(), b, estimator=estimator, tile=tile), (y,)
    )


def last_tile_only(x, y, tile):
    """Defect 1 of the report: a chunked distance that keeps the gradient of the last block alone."""
    blocks = list(x.split(tile))
    kept = [block.detach() for block in blocks[:-1]] + blocks[-1:]
    cross = sum(torch.cdist(block, y).sum() for block in kept) / (len(x) * len(y))
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return 2 * cross - within[0] - within[1]


def independent_of_tile(distance, x, y, tiles):
    values, gradients = zip(*((v, g) for v, g, *_ in (distance(x, y, tile) for tile in tiles)), strict=True)
    same_value = all(torch.allclose(v, values[0], rtol=1e-10) for v in values)
    return same_value and all(torch.allclose(g, gradients[0], rtol=1e-8, atol=1e-12) for g in gradients)


def test_a_broken_chunk_gradient_is_caught():
    x, y = clouds(12, 9, 3)

    def defective(a, b, tile):
        value = last_tile_only(a, b, tile)
        return value, *torch.autograd.grad(value, a)

    assert not independent_of_tile(defective, x, y, (4, 5, 12))
    assert not torch.autograd.gradcheck(lambda a: last_tile_only(a, y, 4), (x,), raise_exception=False)
    assert independent_of_tile(lambda a, b, tile: value_and_gradient(a, b, tile=tile), x, y, (4, 5, 12))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), m=st.integers(1, 40), tile=st.integers(1, 50), estimator=st.sampled_from("UV"))
@example(n=1, m=7, tile=64, estimator="V")
def test_every_tile_gives_the_same(n, m, tile, estimator):
    estimator = "V" if min(n, m) == 1 else estimator
    x, y = clouds(n, m, 4, seed=n * 41 + m)
    whole = value_and_gradient(x, y, estimator=estimator)
    tiled = value_and_gradient(x, y, estimator=estimator, tile=tile)
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=2, max_size=5),
    tile=st.integers(1, 25),
)
def test_every_tile_gives_the_same_for_groups_of_unequal_sizes(sizes, tile):
    n, m = (list(side) for side in zip(*sizes, strict=True))
    x, y = clouds(sum(n), sum(m), 3, seed=sum(n) + tile)
    a, b = x.detach().requires_grad_(), y.detach().requires_grad_()
    found = [grouped_energy_distance(a, b, n, m, tile=t) for t in (tile, 1000)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(value.sum(), (a, b)) for value in found), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(self_distance(y, m, tile=tile), self_distance(y, m), rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(2, 30), st.integers(2, 30)), min_size=1, max_size=4),
    tile=st.integers(1, 25),
    estimator=st.sampled_from("UV"),
    near=st.sampled_from([0.0, 1e-7, 1.0]),
)
@example(
    sizes=[(30, 7), (9, 22)], tile=4, estimator="U", near=0.0
)  # padding, several tiles, coincident cells
def test_without_a_gradient_the_value_is_the_same(sizes, tile, estimator, near):
    """It is found in another way; many pairs of cells are close or one point."""
    n, m = (list(side) for side in zip(*sizes, strict=True))
    x, y = (z.round() + near * z for z in clouds(sum(n), sum(m), 3, seed=tile, grad=False))
    expected = [double_loop(a, b, estimator) for a, b in zip(x.split(n), y.split(m), strict=True)]
    found = grouped_energy_distance(x, y, n, m, estimator=estimator, tile=tile)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    single = grouped_energy_distance(x.float(), y.float(), n, m, estimator=estimator, tile=tile)
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-4)
    with_gradient = grouped_energy_distance(x.requires_grad_(), y, n, m, estimator=estimator, tile=tile)
    torch.testing.assert_close(with_gradient.detach(), found, rtol=1e-9, atol=1e-9)


def test_default_tiles_cover_large_clouds():
    x, y = clouds(1100, 700, 3, dtype=torch.float32)
    exact = value_and_gradient(x.double(), y.double(), tile=300)
    for found, expected in zip(value_and_gradient(x, y), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-8)


def test_sums_over_tiles_are_kept_in_double_precision():
    """An energy distance is a small difference of large sums: of cells in float32, its seventh digit is right, too."""
    errors = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(1500, 3, generator=generator), torch.randn(1400, 3, generator=generator)
        exact = energy_distance(x.double(), y.double(), tile=256)
        errors.append(abs(float(energy_distance(x, y, tile=256)) - float(exact)))
    assert np.mean(errors) < 5e-8


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(2, 30), st.integers(2, 30)), min_size=1, max_size=12),
       estimator=st.sampled_from("UV"))  # fmt: skip
def test_grouped_equals_the_loop(sizes, estimator):
    x_sizes, y_sizes = map(list, zip(*sizes, strict=True))
    x, y = clouds(sum(x_sizes), sum(y_sizes), 3)
    weights = torch.linspace(0.5, 2, len(sizes), dtype=torch.float64)
    together = grouped_energy_distance(x, y, x_sizes, y_sizes, estimator=estimator)
    pairs = zip(x.split(x_sizes), y.split(y_sizes), strict=True)
    alone = torch.stack([energy_distance(a, b, estimator=estimator) for a, b in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    found, expected = (torch.autograd.grad((v * weights).sum(), (x, y)) for v in (together, alone))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_groups_of_very_unequal_size():
    x_sizes, y_sizes = [600, 2, 64, 64, 700], [3, 800, 64, 63, 650]
    x, y = clouds(sum(x_sizes), sum(y_sizes), 5)
    together = grouped_energy_distance(x, y, torch.tensor(x_sizes), y_sizes)
    pairs = zip(x.split(x_sizes), y.split(y_sizes), strict=True)
    torch.testing.assert_close(together, torch.stack([energy_distance(a, b) for a, b in pairs]))


@pytest.mark.parametrize("estimator", ["U", "V"])
def test_cached_constant_changes_nothing(estimator):
    x_sizes, y_sizes = [5, 8, 20], [6, 9, 2]
    x, y = clouds(33, 17, 3)
    known = self_distance(y, y_sizes, estimator)
    found = grouped_energy_distance(x, y.detach(), x_sizes, y_sizes, estimator=estimator, y_self=known)
    expected = grouped_energy_distance(x, y, x_sizes, y_sizes, estimator=estimator)
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad(v.sum(), x) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_cells_have_distance_zero_and_finite_gradient(dtype):
    x = torch.full((6, 4), 3.3, dtype=dtype, requires_grad=True)
    value = energy_distance(x, x.detach().clone())
    (gradient,) = torch.autograd.grad(value, x)
    assert float(value) == 0 and torch.equal(gradient, torch.zeros_like(x))


def test_identical_clouds():
    x, _ = clouds(200, 2, 8)
    biased, gradient = energy_distance(x, x.detach(), estimator="V"), None
    (gradient,) = torch.autograd.grad(biased, x)
    assert abs(float(biased)) < 1e-12 and gradient.abs().max() < 1e-12
    # U leaves the zero pairs out of two of its three terms: -2 E||X - X'|| / n
    assert float(energy_distance(x, x)) == pytest.approx(-2 * float(self_distance(x)) / 200, rel=1e-9)


def test_unbiased_under_the_null():
    """Section 1 of the field notes: with n = 50, d = 32, V is about 0.35 where U is about 0."""
    values = {"U": [], "V": []}
    for seed in range(40):
        x, y = clouds(50, 50, 32, seed=seed, grad=False)
        for estimator, found in values.items():
            found.append(float(energy_distance(x, y - 0.3, estimator=estimator)))
    assert abs(np.mean(values["U"])) < 0.02 and np.mean(values["V"]) == pytest.approx(0.32, abs=0.05)


@pytest.mark.parametrize(
    ("spread", "offset"), [(1e-3, 1e4), (1e-3, 1e2), (1.0, 1e6), (1e20, 0.0), (1e-25, 0.0)]
)
def test_float32_far_from_the_origin_and_at_extreme_scales(spread, offset):
    x, y = (z * spread + offset for z in clouds(300, 200, 8, dtype=torch.float32, grad=False))
    exact = value_and_gradient(x.double().requires_grad_(), y.double().requires_grad_())
    found = value_and_gradient(x.requires_grad_(), y.requires_grad_())
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-5)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-3, atol=1e-7)


def test_tight_clusters_inside_a_wide_cloud():
    """Half of the pairs are a million times closer than the others: the product form would lose them."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(60, 4, generator=generator) * 1e-4 + torch.arange(60)[:, None] % 2 * 100 for _ in "xy"
    )
    exact = value_and_gradient(x.double().requires_grad_(), y.double().requires_grad_())
    found = value_and_gradient(x.requires_grad_(), y.requires_grad_())
    assert abs(float(found[0] - exact[0])) < 1e-5 * float(self_distance(x))
    wide = [cloud.detach().double().requires_grad_() for cloud in (x, y)]
    between, *within = (
        torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").sum()
        for a, b in ((wide[0], wide[1]), (wide[0], wide[0]), (wide[1], wide[1]))
    )
    naive = torch.autograd.grad(2 * between / 60**2 - sum(within) / (60 * 59), wide)
    for gradient, expected, plain in zip(found[1:], exact[1:], naive, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(expected, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize(("n", "d"), [(10, 2), (300, 2), (50, 8), (300, 32)])
def test_tight_clusters_far_from_each_other(n, d, tile):
    """Each cloud is one cluster of spread 1e-4, at +100 and at -100: the pulls within a cloud are those of its cells."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, d, generator=generator) * 1e-4 + centre for centre in (100, -100))
    exact = textbook_gradient(x.double(), y.double())
    value = energy_distance(x.requires_grad_(), y, tile=tile)
    (gradient,) = torch.autograd.grad(value, x)
    error = (gradient - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.max()) < 1e-3


def textbook_gradient(x, y):
    """By x, from the differences of all pairs, in float64; "U"."""

    def pulls(a, b):
        differences = a[:, None] - b[None]
        return torch.nn.functional.normalize(differences, dim=-1, eps=1e-300).sum(1)

    return 2 * pulls(x, y) / (len(x) * len(y)) - 2 * pulls(x, x) / (len(x) * (len(x) - 1))


def test_invariances():
    x, y = clouds(40, 30, 5, grad=False)
    value = float(energy_distance(x, y))
    rotation, _ = torch.linalg.qr(
        torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    assert float(energy_distance(x + 1000, y + 1000)) == pytest.approx(value, rel=1e-9)
    assert float(energy_distance(x @ rotation, y @ rotation)) == pytest.approx(value, rel=1e-9)
    assert float(energy_distance(3 * x, 3 * y)) == pytest.approx(3 * value, rel=1e-9)
    assert float(energy_distance(y, x)) == pytest.approx(value, rel=1e-9)


def test_one_cell():
    x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert float(energy_distance(x, y, estimator="V")) == pytest.approx(10)
    with pytest.raises(ModelError, match="at least 2 cell"):
        energy_distance(x, y)


def test_autocast_and_half_precision_inputs():
    x, y = clouds(30, 20, 4, dtype=torch.float32, grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(energy_distance(x, y)) == pytest.approx(
            float(energy_distance(x.double(), y.double())), rel=1e-5
        )
    half = energy_distance(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32 and torch.isfinite(half)


def test_twice_differentiating_is_refused():
    """Without a word, the gradient would be a constant: a penalty on it would train nothing."""
    x, y = clouds(5, 4, 2)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    matrices, shifts = maps(1, 2)
    moved = moved_energy_distance(x.detach(), y.detach(), [5], [4], matrices, shifts)
    for value, leaf in (
        (energy_distance(x, y), x),
        (weight * energy_distance(x, y), x),
        (energy_distance(x, y, tile=2), y),
        (grouped_energy_distance(x, y, [3, 2], [2, 2]).sum(), x),
        (moved.sum(), matrices),
    ):
        with pytest.raises(ModelError, match="one differentiation of the energy.*create_graph=True"):
            torch.autograd.grad(value, leaf, create_graph=True)


BAD = {
    "empty": (lambda x: energy_distance(x[:0], x), "at least 2 cell"),
    "empty, V": (lambda x: energy_distance(x[:0], x, estimator="V"), "at least 1 cell"),
    "one cell": (lambda x: energy_distance(x, x[:1]), "group 0 of y"),
    "dimensions": (lambda x: energy_distance(x, x[:, :2]), "one space"),
    "a vector": (lambda x: energy_distance(x[0], x), r"shape \(cell, d\)"),
    "NaN": (lambda x: energy_distance(x.index_fill(0, torch.tensor(3), math.nan), x), "row 3 of x"),
    "infinity": (lambda x: energy_distance(x, x * math.inf), "finite coordinates"),
    "estimator": (lambda x: energy_distance(x, x, estimator="u"), "did you mean 'U'"),
    "sizes": (lambda x: grouped_energy_distance(x, x, [2, 2], [3, 3]), "sum to 4"),
    "groups": (lambda x: grouped_energy_distance(x, x, [6], [3, 3]), "for each group"),
    "small group": (lambda x: grouped_energy_distance(x, x, [5, 1], [3, 3]), "group 1 of x"),
    "y_self": (
        lambda x: grouped_energy_distance(x, x, [3, 3], [3, 3], y_self=torch.zeros(3)),
        "y_self of shape",
    ),
    "y not constant": (lambda x: energy_distance(x, x.clone().requires_grad_(), y_self=1.0), "constant y"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ModelError, match=message):
        call(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))


def test_non_finite_maps_reach_the_value_for_the_guard_to_name():
    maps = torch.full((1, 2, 2), math.nan), torch.zeros(1, 2)
    assert not torch.isfinite(moved_energy_distance(torch.ones(4, 2), torch.zeros(3, 2), [4], [3], *maps))


# -- clouds moved by one map per group, and the short way of one pair ------------------------------------


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
    for limit in (energy.SMALL_PAIRS, 0):
        monkeypatch.setattr(energy, "SMALL_PAIRS", limit)
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
    (batch,) = energy.batches((30,), (20,), x.device)

    def whole(x, y):
        return energy._joint(x[None], y[None], batch, "U", want_x=True, want_y=False, y_self=None)

    assert whole(x, y) is not None
    x[3] = x[5] + 1e-4
    assert whole(x, y) is None
    assert whole(x * 1e-20, y * 1e-20) is None
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


# -- halves of one cloud: the noise floor and the noise limit


def test_splits_from_the_distances_alone_equal_the_double_loop():
    pooled, generator = torch.randn(9, 3, dtype=torch.float64), torch.Generator().manual_seed(0)
    orders = [torch.randperm(9, generator=generator) for _ in range(6)]
    splits = torch.stack([torch.zeros(9).index_fill(0, order[:4], 1.0) for order in orders]).double()
    expected = [double_loop(pooled[order[:4]], pooled[order[4:]], "U") for order in orders]
    np.testing.assert_allclose(split_energies(torch.cdist(pooled, pooled), splits), expected, rtol=1e-10)


@pytest.mark.parametrize("many", [False, True])
def test_floor_and_limit_are_mean_and_quantile_of_distances_between_parts(many, monkeypatch):
    if many:
        monkeypatch.setattr(energy, "_WHOLE_MATRIX", 10)
    cells, generator = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)), torch.Generator()
    for first in (25, 10):
        generator.manual_seed(3)
        orders = [torch.randperm(50, generator=generator) for _ in range(7)]
        values = torch.stack([energy_distance(cells[k[:first]], cells[k[first:]]) for k in orders])
        limit = noise_limit(cells, first, quantile=0.9, n_splits=7, seed=3)
        assert limit == pytest.approx(float(values.quantile(0.9)), abs=1e-5)
        if first == 25:
            assert noise_floor(cells, n_splits=7, seed=3) == pytest.approx(float(values.mean()), abs=1e-5)


def test_the_floor_is_about_nothing_and_the_limit_above_it():
    cells = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assert abs(noise_floor(cells, n_splits=20)) < 0.02 < noise_limit(cells)
    assert noise_floor(cells, n_splits=20) == noise_floor(cells, n_splits=20)
    assert math.isnan(noise_floor(cells[:3])) and math.isnan(noise_limit(cells[:3]))


def test_two_samples_of_one_cloud_lie_below_the_limit_19_times_out_of_20():
    generator, below = torch.Generator().manual_seed(3), []
    for _ in range(100):
        cells = torch.randn(80, 3, generator=generator)
        below.append(float(energy_distance(cells[:20], cells[20:])) < noise_limit(cells, 20, n_splits=40))
    assert 0.88 < np.mean(below) < 1.0


def test_the_limit_falls_with_more_cells():
    cells = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    assert noise_limit(cells) < noise_limit(cells[:40])


# --- conventions ---


def naive(x, y, power, within):
    """Double loops: 2 E|x - y|^p - E|x - x'|^p - E|y - y'|^p; `within` pairs of a cell with itself, or not."""

    def mean(a, b, same):
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if within or not same or i != j]
        return np.mean([np.sqrt(np.square(p - q).sum()) ** power for p, q in pairs])

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


def theirs(name, x, y):
    """The number of the package itself, on clouds (cell, d)."""
    if name == "scperturb":
        package = pytest.importorskip("scperturb", reason="part of the extra benchmark")
        both = AnnData(np.zeros((len(x) + len(y), 1)), obsm={"X_pca": np.concatenate([x, y])})
        both.obs["perturbation"] = ["x"] * len(x) + ["y"] * len(y)
        return package.edist(both, obs_key="perturbation", obsm_key="X_pca", verbose=False).loc["x", "y"]
    if name == "geomloss":
        package = pytest.importorskip("geomloss", reason="part of the extra benchmark")
        return package.SamplesLoss("energy", backend="tensorized")(
            torch.from_numpy(x), torch.from_numpy(y)
        ).item()
    dcor = pytest.importorskip("dcor", reason="part of the extra test")  # what cell-eval computes
    return dcor.energy_distance(x, y)


SAMPLES = [np.random.default_rng(0).normal(0.3 * k, 1 + k, size=(40 + k, 5)) for k in (0, 1)]


@pytest.mark.parametrize(
    ("convention", "power", "within", "factor"),
    [
        ("cellop", 1, False, 1),
        ("pertpy", 1, True, 1),
        ("cell-eval", 1, True, 1),
        ("scperturb", 2, False, 1),
        ("geomloss", 1, True, 0.5),
    ],
)
def test_a_convention_is_its_double_loop(convention, power, within, factor):
    expected = factor * naive(*SAMPLES, power, within)
    assert float(energy_distance(*SAMPLES, convention=convention)) == pytest.approx(expected, rel=1e-10)
    other = energy_distance(*SAMPLES, convention=convention, estimator="U" if within else "V")
    assert float(other) == pytest.approx(factor * naive(*SAMPLES, power, not within), rel=1e-10)
    x, y = (torch.from_numpy(cloud).requires_grad_() for cloud in SAMPLES)
    torch.autograd.gradcheck(lambda *clouds: energy_distance(*clouds, convention=convention), (x, y))


@pytest.mark.parametrize("name", ["scperturb", "geomloss", "cell-eval"])
def test_a_convention_is_the_number_of_its_package(name):
    ours = float(energy_distance(*SAMPLES, convention=name))
    assert ours == pytest.approx(theirs(name, *SAMPLES), rel=1e-5)


def test_a_convention_that_is_not_known_is_refused():
    with pytest.raises(ModelError, match="a convention of.*'scpertub'.*did you mean 'scperturb'"):
        energy_distance(*SAMPLES, convention="scpertub")
    with pytest.raises(ModelError, match="no y_self with the squared norm"):
        energy_distance(*SAMPLES, convention="scperturb", y_self=1.0)
