"""The planned mean response: closed forms against loops, planted responses, weights, size, intervals; the carry to it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from cellop_nb.analysis import plan as planning
from cellop_nb.analysis.means import Means
from cellop_nb.analysis.metrics import log1p_cp10k
from cellop_nb.analysis.plan import (
    LINEAR,
    MEAN_SHIFT,
    MOVED,
    NEAR,
    NO_CHANGE,
    Measured,
    combination_evidence,
    estimates,
    evidence,
    factors,
    foresee,
    linear,
    near_mean_shift,
    plan,
    plan_combination,
    stretch,
    weigh,
)
from cellop_nb.data.groups import Groups
from cellop_nb.errors import ModelError
from cellop_nb.models.carry import balanced_counts, carry_to_mean, whole_levels
from cellop_nb.models.likelihood import levels

from . import screens

GENES = 200


def screen(seed=0, n=8, noise=0.0, slope=1.0, moved_error=None, spread=0.3, genes=GENES):
    """Contexts whose responses are linear in their mean control cells, and one target: measured, its m, its change."""
    rng = np.random.default_rng(seed)
    control = rng.normal(size=(n + 1, 3)) @ rng.normal(size=(3, genes))
    common = rng.normal(size=genes) * (rng.random(genes) < 0.3)
    effect = (
        common
        + slope * spread * control @ np.outer(rng.normal(size=genes), rng.normal(size=genes)) / genes**0.5
    )
    measured = effect + noise * rng.normal(size=effect.shape)
    moved = None if moved_error is None else effect + moved_error * rng.normal(size=effect.shape)
    variance = np.full((n, genes), noise**2)
    names = tuple(f"context {k}" for k in range(n))
    own = None if moved is None else moved[:n]
    data = Measured(names, control[:n], measured[:n], variance, own)
    return data, control[n], effect[n], None if moved is None else moved[n]


def relative(estimate, truth):
    return float(np.square(estimate - truth).sum() / np.square(truth).sum())


# -- estimators ---------------------------------------------------------------------------------------------------------


def test_near_mean_shift_is_the_weighted_sum():
    data, target, _, _ = screen(noise=0.2)
    distance = [sum((a - b) ** 2 for a, b in zip(target, row, strict=True)) ** 0.5 for row in data.control]
    weight = [d**-4.0 for d in distance]
    expected = sum(w * row for w, row in zip(weight, data.change, strict=True)) / sum(weight)
    np.testing.assert_allclose(
        near_mean_shift(data.control, data.change, target, 4.0).change, expected, rtol=1e-9
    )


def test_power_zero_is_the_mean_shift():
    data, target, _, _ = screen(noise=0.2)
    estimate = near_mean_shift(data.control, data.change, target, 0.0)
    np.testing.assert_allclose(estimate.change, data.change.mean(0))
    np.testing.assert_allclose(estimate.left_out[0], data.change[1:].mean(0))


@pytest.mark.parametrize("estimator", ["near", "linear"])
def test_left_out_in_closed_form_is_the_loop(estimator):
    data, target, _, _ = screen(noise=0.2)
    ridge, n = 0.3, len(data)
    centred = data.control - data.control.mean(0)
    absolute = ridge * np.square(centred).sum() / n  # the same ridge in every fold
    if estimator == "near":
        left_out = near_mean_shift(data.control, data.change, target).left_out
    else:
        left_out = linear(data.control, data.change, target, data.noise.sum(1), (ridge,))[0].left_out
    for c, name in enumerate(data.contexts):
        rest = data.without(name)
        if estimator == "near":
            alone = near_mean_shift(rest.control, rest.change, data.control[c]).change
        else:
            own = np.square(rest.control - rest.control.mean(0)).sum() / (n - 1)
            alone = linear(rest.control, rest.change, data.control[c], rest.noise.sum(1), (absolute / own,))[
                0
            ].change
        np.testing.assert_allclose(left_out[c], alone, rtol=1e-7, atol=1e-9)


def test_linear_is_the_normal_equation():
    data, target, _, _ = screen(noise=0.2)
    centre, ridge = data.control.mean(0), 0.1
    x = data.control - centre
    penalty = ridge * np.trace(x @ x.T) / len(x)
    coefficients = np.linalg.solve(
        x.T @ x + penalty * np.eye(GENES), x.T @ (data.change - data.change.mean(0))
    )
    expected = data.change.mean(0) + (target - centre) @ coefficients
    estimate, chosen = linear(data.control, data.change, target, data.noise.sum(1), (ridge,))
    np.testing.assert_allclose(estimate.change, expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(estimate.shares @ data.change, expected, rtol=1e-6, atol=1e-9)
    assert chosen == ridge and estimate.shares.sum() == pytest.approx(1)


def test_a_response_linear_in_the_control_profile_is_recovered():
    data, target, truth, _ = screen(n=12, noise=0.02, spread=6.0)
    estimate, ridge = linear(data.control, data.change, target, data.noise.sum(1))
    assert relative(estimate.change, truth) < 0.05 < relative(data.change.mean(0), truth)
    assert ridge <= 0.1


def test_without_a_difference_between_contexts_the_ridge_is_infinite_more_often_than_not():
    ridges = [linear(*_noise_only(seed))[1] for seed in range(20)]
    assert np.median(ridges) >= 3


def _noise_only(seed):
    data, target, _, _ = screen(seed, noise=0.3, slope=0.0)
    return data.control, data.change, target, data.noise.sum(1)


# -- weights ------------------------------------------------------------------------------------------------------------


def test_weights_are_a_mixture_and_those_of_the_better_estimators():
    data, target, _, moved = screen(noise=0.1, moved_error=0.15)
    seen = evidence(data, estimates(data, target, moved)[0])
    weights = dict(zip(seen.names, weigh(seen), strict=True))
    assert sum(weights.values()) == pytest.approx(1) and min(weights.values()) >= 0
    assert weights[MOVED] > weights[MEAN_SHIFT] and weights[NO_CHANGE] < 0.02


@pytest.mark.parametrize("seed", range(10))
def test_the_simplex_solution_is_that_of_a_grid(seed):
    rng = np.random.default_rng(seed)
    root, start = rng.normal(size=(3, 3)), rng.dirichlet(np.ones(3))
    products = root @ root.T
    grid = np.array([(a, b, 1 - a - b) for a in np.linspace(0, 1, 51) for b in np.linspace(0, 1 - a, 51)])

    def loss(w):
        return np.einsum("...i,ij,...j", w, products, w) + 0.2 * np.square(w - start).sum(-1)

    assert loss(planning._nearest_on_simplex(products, start, 0.2)) <= loss(grid).min() + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_where_contexts_tell_nothing_the_moved_cells_are_not_spoilt(seed):
    """Responses that differ between contexts, but not by their controls: only the moved cells see them."""
    rng = np.random.default_rng(seed)
    control, effect = rng.normal(size=(6, GENES)), rng.normal(size=(6, GENES))
    moved = effect + 0.3 * rng.normal(size=effect.shape)
    data = Measured(tuple("abcde"), control[:5], effect[:5], np.full((5, GENES), 1e-4), moved[:5])
    result = plan(data, control[5], moved[5])
    assert result.weights[MOVED] > 0.8
    best = min(relative(moved[5], effect[5]), relative(effect[:5].mean(0), effect[5]))
    assert relative(result.change, effect[5]) <= 1.5 * best


@pytest.mark.parametrize("seed", range(5))
def test_linear_has_no_weight_where_it_carries_nothing(seed):
    """A shift that all contexts share, and noise: what looks linear is chance."""
    data, target, truth, moved = screen(seed, n=6, noise=0.4, slope=0.0, moved_error=0.1)
    result = plan(data, target, moved)
    simple = relative(data.change.mean(0), truth)
    assert relative(result.change, truth) <= 1.05 * max(min(simple, relative(moved, truth)), 0.02)


def test_noise_alone_is_planned_as_nearly_nothing():
    rng = np.random.default_rng(0)
    control, change = rng.normal(size=(9, GENES)), rng.normal(size=(8, GENES))
    others = (change.sum(0) - change) / 7  # what operators without a context would learn, at best
    data = Measured(tuple("abcdefgh"), control[:8], change, np.ones((8, GENES)), others)
    result = plan(data, control[8], change.mean(0))
    assert np.square(result.change).mean() < np.square(change.mean(0)).mean()
    assert np.isnan(result.explained)


def test_evidence_of_other_perturbations_is_added():
    data, target, _, moved = screen(n=3, noise=0.1, moved_error=0.1)
    more = [
        evidence(d, estimates(d, m, x)[0])
        for d, m, _, x in (screen(s, 6, 0.1, moved_error=0.1) for s in range(1, 6))
    ]
    both = more[0] + more[1]
    np.testing.assert_allclose(both.without(more[1]).products, more[0].products)
    assert more[0].without(more[0]) is None
    pooled = more[0] + more[1] + more[2] + more[3] + more[4]
    assert pooled.n_contexts > 20
    assert plan(data, target, moved, also=pooled).weights.sum() == pytest.approx(1)
    assert (
        plan(data.without("context 0").without("context 1"), target, moved, also=pooled).weights[NO_CHANGE]
        < 0.05
    )


# -- the plan -----------------------------------------------------------------------------------------------------------


def test_the_plan_beats_its_estimators_on_planted_screens():
    left = {name: [] for name in ("plan", MEAN_SHIFT, NEAR, LINEAR, MOVED)}
    for seed in range(20):
        data, target, truth, moved = screen(seed, n=7, noise=0.2, moved_error=0.25)
        result = plan(data, target, moved)
        left["plan"].append(relative(result.change, truth))
        for name in left:
            if name != "plan":
                left[name].append(relative(result.estimates[name], truth))
    means = {name: np.mean(values) for name, values in left.items()}
    assert min(means, key=means.get) == "plan"


def test_size_follows_the_contexts_where_averages_are_too_short():
    rng = np.random.default_rng(0)
    direction, strength = rng.normal(size=GENES), np.linspace(0.5, 2.0, 8)
    control = np.outer(strength, rng.normal(size=GENES))
    change = np.outer(strength, direction)
    short = 0.7 * change
    data = Measured(tuple("abcdefg"), control[:7], change[:7], np.full((7, GENES), 1e-6), short[:7])
    result = plan(data, control[7], short[7])
    assert result.size >= 1 and result.extrapolated
    assert relative(result.change, change[7]) < 0.02
    longer, of_measured = stretch(short[7], short[:7], control[:7], change[:7], control[7])
    np.testing.assert_allclose([longer, *of_measured], 1 / 0.7, rtol=0.05)


def test_nothing_is_made_smaller():
    data, target, _, moved = screen(noise=0.1, moved_error=0.1)
    longer, of_measured = stretch(3 * moved, 3 * data.moved, data.control, data.change, target)
    assert longer == 1 and (of_measured == 1).all()


def test_explained_and_rival_are_measured_on_contexts_left_out():
    data, target, _, moved = screen(n=8, noise=0.1, moved_error=0.05)
    result = plan(data, target, moved)
    assert 0.9 < result.explained <= 1.02 and result.rival == LINEAR
    assert set(result.left_out["estimator"]) == {NO_CHANGE, MEAN_SHIFT, NEAR, LINEAR, MOVED, "plan"}
    assert result.left_out.query("estimator == 'no change'")["left"].mean() == pytest.approx(1, abs=0.05)


def test_what_is_foreseen_of_a_context_has_not_seen_it():
    """Another response of context 3 changes what is foreseen of the others, and nothing of its own."""
    data, _, _, _ = screen(n=6, noise=0.1, moved_error=0.05)
    other = Measured(data.contexts, data.control, data.change.copy(), data.noise, data.moved)
    other.change[3] = np.random.default_rng(1).normal(size=GENES)
    before, after = foresee(data), foresee(other)
    assert set(before) == {NO_CHANGE, MEAN_SHIFT, NEAR, LINEAR, MOVED, "plan"}
    for name in (MEAN_SHIFT, NEAR, MOVED):
        np.testing.assert_allclose(before[name][3], after[name][3])
    assert relative(before["plan"][3], data.change[3]) < 0.2 and not np.allclose(
        before["plan"][2], after["plan"][2]
    )
    assert foresee(data.without("context 0").without("context 1")) != {} == foresee(screen(n=1)[0])


def test_a_plan_is_the_weighted_mean_at_its_size():
    data, target, _, moved = screen(noise=0.1, moved_error=0.1)
    result = plan(
        data, target, moved, genes=[f"gene {k}" for k in range(GENES)], context="new", perturbation="drug"
    )
    np.testing.assert_allclose(
        result.change, result.size * result.estimates.to_numpy() @ result.weights.to_numpy()
    )
    assert list(result.table()) == [NO_CHANGE, MEAN_SHIFT, NEAR, LINEAR, MOVED, "planned", "low", "high"]
    assert "drug" in result._repr_html_() and (result.low <= result.change).all()


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_measured_contexts_are_planned(n):
    data, target, _, moved = screen(n=n, noise=0.1, moved_error=0.1)
    result = plan(data, target, moved)
    assert np.isfinite(result.change).all() and result.weights.sum() == pytest.approx(1)
    assert np.isnan(result.explained) == (n == 1) and np.isnan(result.error).all() == (n == 1)


def test_without_another_context_the_moved_cells_are_the_plan():
    data, target, _, moved = screen(moved_error=0.1)
    for name in data.contexts:
        data = data.without(name)
    result = plan(data, target, moved)
    np.testing.assert_array_equal(result.change, moved)
    assert result.weights.to_dict() == {MOVED: 1.0} and np.isnan(result.explained)
    with pytest.raises(ModelError, match="'drug' measured in another context than 'B', or moved cells"):
        plan(data, target, context="B", perturbation="drug")


def test_a_measured_group_is_drawn_towards_the_plan_by_its_noise():
    data, target, truth, moved = screen(noise=0.1, moved_error=0.1)
    rng = np.random.default_rng(1)
    own = truth + 0.5 * rng.normal(size=GENES)
    both = plan(data, target, moved, own_change=own, own_noise=np.full(GENES, 0.25))
    exact = plan(data, target, moved, own_change=truth, own_noise=np.full(GENES, 1e-9))
    assert both.measured and relative(both.change, truth) < min(relative(own, truth), 0.5)
    np.testing.assert_allclose(exact.change, truth, atol=1e-3)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_intervals_cover_what_they_say(noise):
    inside = []
    for seed in range(30):
        data, target, truth, moved = screen(seed, n=7, noise=noise, moved_error=0.2)
        result = plan(data, target, moved)
        inside.append(((truth >= result.low) & (truth <= result.high)).mean())
    assert 0.92 <= np.mean(inside) <= 0.98


def test_the_quantile_of_an_interval_is_that_of_contexts_left_out(monkeypatch):
    """Split conformal prediction: as large a share of the errors of contexts, each scaled by what the others say, is
    below the quantile as the level says; nothing else says it, and the context itself does not."""
    data, _, _, _ = screen(n=6, noise=0.3)
    residuals = np.random.default_rng(1).normal(size=data.change.shape)
    heard = []

    def errors(squares, noise, predicted, planned, settings):
        heard.append((squares, planned))
        return np.full(GENES, 2.0)

    monkeypatch.setattr(planning, "_gene_errors", errors)
    error, quantile = planning.errors_of_genes(data, data.change[0], residuals, planning.PlanSettings())
    ratios = np.sort((np.abs(residuals) / np.sqrt(2.0 + 0.3**2)).ravel())
    below = (ratios <= quantile).sum()
    assert below - 1 <= planning.PlanSettings().level * (ratios.size - 1) <= below
    np.testing.assert_array_equal(error, np.full(GENES, 2.0**0.5))
    assert len(heard) == 7
    for c, (others, planned) in enumerate(heard[:6]):
        np.testing.assert_array_equal(others, np.delete(residuals**2, c, axis=0))
        np.testing.assert_array_equal(planned, np.square(data.change[c] - residuals[c]))
    np.testing.assert_array_equal(heard[6][0], residuals**2)
    np.testing.assert_array_equal(heard[6][1], np.square(data.change[0]))


def test_genes_without_a_count_have_no_change_and_no_error():
    data, target, _, moved = screen(noise=0.1, moved_error=0.1)
    for array in (data.control, data.change, data.noise, data.moved):
        array[:, :5] = 0
    target[:5] = moved[:5] = 0
    result = plan(data, target, moved)
    assert (result.change[:5] == 0).all() and (result.error[:5] == 0).all() and (result.error[5:] > 0).all()


def doubles(seed, additive_error, moved_error, n=5):
    """Changes of combinations, their noise, and two ways to foresee them."""
    rng = np.random.default_rng(seed)
    change = rng.normal(size=(n, GENES))
    ways = [change + error * rng.normal(size=change.shape) for error in (additive_error, moved_error)]
    return change, np.full(change.shape, 1e-4), *ways


@pytest.mark.parametrize(("additive_error", "moved_error"), [(0.2, 1.0), (0.5, 0.5), (1.0, 0.2)])
def test_a_combination_is_hardly_ever_worse_than_additive(additive_error, moved_error):
    """Each double in turn, by weights of the others: as additive where that is best, better where moved cells are."""
    left = {"plan": 0.0, "additive": 0.0}
    for seed in range(4):
        change, noise, added, moved = doubles(seed, additive_error, moved_error)
        for c in range(len(change)):
            others = np.arange(len(change)) != c
            seen = combination_evidence(change[others], noise[others], added[others], moved[others])
            said = plan_combination([part_of(added[c])], moved[c], seen, perturbation="A+B")
            left["plan"] += relative(said.change, change[c])
            left["additive"] += relative(added[c], change[c])
    assert left["plan"] <= (1.05 if additive_error < moved_error else 0.7) * left["additive"]


def part_of(change):
    """A measured plan that says `change`."""
    data, target, _, moved = screen(moved_error=0.1)
    return plan(data, target, moved, own_change=change, own_noise=np.full(GENES, 1e-12))


def test_without_a_measured_combination_the_plan_is_additive():
    parts = [part_of(np.arange(GENES) / GENES), part_of(np.ones(GENES))]
    said = plan_combination(parts, np.full(GENES, 5.0), None, perturbation="A+B")
    np.testing.assert_allclose(said.change, np.arange(GENES) / GENES + 1, atol=1e-6)


def test_shapes_are_refused_in_three_beats():
    data, target, _, moved = screen(moved_error=0.1)
    with pytest.raises(ModelError, match="200 genes everywhere"):
        plan(data, target, moved[:10])
    with pytest.raises(ModelError, match="a row per measured context"):
        Measured(("a",), data.control, data.change, data.noise)
    with pytest.raises(ModelError, match="not finite in 'change'"):
        Measured(data.contexts, data.control, data.change * np.nan, data.noise)


# -- cells carried to the planned mean ---------------------------------------------------------------------------------


def cells(seed=0, n=300, genes=120):
    generator = torch.Generator().manual_seed(seed)
    rate = torch.exp(1.5 * torch.randn(genes, generator=generator)) * 0.5
    own = torch.rand(n, 1, generator=generator) + 0.5
    return torch.poisson(rate * own, generator=generator).float().clamp_min(0), generator


@pytest.mark.parametrize("whole", [True, False])
def test_the_carry_hits_the_mean_and_keeps_library_sizes(whole):
    x, generator = cells()
    x = x if whole else x * 0.9 + 0.05
    library = x.sum(1)
    change = torch.exp(0.7 * torch.randn(x.shape[1], generator=generator))
    there = x * change * (library / (x * change).sum(1))[:, None]
    start, wanted = (whole_levels(each, library)[0].mean(0) for each in (x, there))
    carried = carry_to_mean(x, library, wanted, iterations=60)
    gap = whole_levels(carried, library)[0].mean(0) - wanted
    torch.testing.assert_close(carried.sum(1), library)
    assert gap.abs().median() < 0.003  # the loudest genes give or take what the counts do not allow
    assert gap.square().mean().sqrt() < 0.1 * (start - wanted).square().mean().sqrt()
    counts = balanced_counts(carried, generator)
    assert (levels(counts, counts.sum(1)).mean(0) - wanted).abs().mean() < 0.02


def test_levels_that_need_too_many_counts_are_missed_by_the_loudest_genes():
    x, _ = cells()
    library = x.sum(1)
    now = whole_levels(x, library)[0].mean(0)
    gap = whole_levels(carry_to_mean(x, library, now + 0.1, iterations=60), library)[0].mean(0) - now - 0.1
    loud = x.sum(0).argsort(descending=True)
    assert gap[loud[0]] < -0.2 and (gap[loud[:3]] < -0.03).all() and gap[loud[20:]].abs().mean() < 0.02


def test_a_gene_that_takes_nearly_all_counts_leaves_finite_cells():
    """Levels that the cells cannot hold together: no gene grows without bound, and no library changes."""
    rng = np.random.default_rng(0)
    share = np.concatenate([[0.8], rng.dirichlet(np.ones(79)) * 0.2])
    library = torch.tensor(rng.lognormal(5.5, 0.4, 120), dtype=torch.float32).round()
    x = torch.tensor(rng.poisson(library.numpy()[:, None] * share), dtype=torch.float32)
    library = x.sum(1)
    for lift in (-3.0, 1.0, 3.0):
        change = torch.tensor(rng.normal(size=80) * abs(lift), dtype=torch.float32)
        change[0] = lift
        carried = carry_to_mean(x, library, whole_levels(x, library)[0].mean(0) + change)
        assert torch.isfinite(carried).all() and (carried >= 0).all()
        torch.testing.assert_close(carried.sum(1), library, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", [1, 3])
def test_more_steps_never_lead_away_from_the_levels(seed):
    """A gene that goes from hardly any to a quarter of the counts of small, uneven cells: plain steps swing for long."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(120, 0.3))
    share[0] = 0.003
    risen = np.concatenate([[0.25], 0.75 * share[1:] / share[1:].sum()])
    x, there = (
        torch.tensor(
            rng.poisson(np.round(rng.lognormal(*size, 300)).clip(5)[:, None] * p), dtype=torch.float32
        )
        for size, p in (((4.5, 0.9), share / share.sum()), ((4.9, 1.05), risen))
    )
    library = x.sum(1).clamp_min(1)
    wanted = whole_levels(there, there.sum(1).clamp_min(1))[0].mean(0)

    def missed(steps):
        carried = carry_to_mean(x, library, wanted, iterations=steps)
        return float((whole_levels(carried, library)[0].mean(0) - wanted).square().mean().sqrt())

    misses = [missed(steps) for steps in (2, 4, 8, 16, 60)]
    assert misses[2] < 0.2 and misses[-1] < 0.03
    assert all(later <= 1.1 * earlier for earlier, later in zip(misses, misses[1:], strict=False))


def test_the_carry_leaves_cells_that_are_there_already():
    x, _ = cells()
    library = x.sum(1)
    torch.testing.assert_close(carry_to_mean(x, library, whole_levels(x, library)[0].mean(0)), x)


def test_a_falling_gene_keeps_its_zeros_and_a_silent_one_can_rise():
    x, _ = cells()
    x[:, 0] = 0
    library, wanted = x.sum(1), whole_levels(x, x.sum(1))[0].mean(0)
    wanted[0], wanted[1], wanted[2] = 0.5, 0.5 * wanted[1], 0.0
    carried = carry_to_mean(x, library, wanted, iterations=60)
    assert (carried[:, 1][x[:, 1] == 0] == 0).all() and carried[:, 2].abs().max() < 1e-3
    assert whole_levels(carried, library)[0].mean(0)[0] == pytest.approx(0.5, abs=0.01)


def test_other_genes_keep_their_room():
    x, _ = cells()
    others = torch.full((len(x),), 40.0)
    library = x.sum(1) + others
    wanted = whole_levels(x, library)[0].mean(0) + 0.2
    carried = carry_to_mean(x, library, wanted, others=others)
    torch.testing.assert_close(carried.sum(1) + others, library)


def test_balanced_counts_are_unbiased_and_keep_the_genes_totals():
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(50, 20, generator=generator) * 3
    draws = torch.stack([balanced_counts(mean, generator) for _ in range(400)])
    assert (draws.sum(1) - mean.sum(0)).abs().max() < 1
    assert ((draws - mean) > -1).all() and ((draws - mean) < 1).all()
    torch.testing.assert_close(draws.mean(0), mean, atol=0.12, rtol=0)
    spread = (
        torch.stack([(mean + torch.rand(mean.shape, generator=generator)).floor() for _ in range(400)])
        .sum(1)
        .std(0)
    )
    assert (draws.sum(1).std(0) < 0.5 * spread).all()


# -- contexts of several factors ----------------------------------------------------------------------------------------


def grid(n_types=5, n_donors=5, genes=30, *, interaction=0.1, noise=0.2, donor=1.0, seed=0):
    """Measured changes that are a sum over cell type and donor, and the noise-free changes."""
    rng = np.random.default_rng(seed)
    levels = tuple((f"t{i}", f"d{j}") for i in range(n_types) for j in range(n_donors))
    types, donors = rng.normal(size=(n_types, genes)), donor * rng.normal(size=(n_donors, genes))
    truth = np.stack([types[int(t[1:])] + donors[int(d[1:])] for t, d in levels])
    truth += rng.normal(size=genes) + interaction * rng.normal(size=truth.shape)
    change = truth + noise * rng.normal(size=truth.shape)
    return levels, change, truth, np.full(len(levels), genes * noise**2)


def of_pair(levels, change, noise, k):
    """The change of pair k from all other pairs, and the means of its type and of its donor there."""
    rest = [j for j in range(len(levels)) if j != k]
    names = [levels[j] for j in rest]
    margins = [change[[j for j in rest if levels[j][f] == levels[k][f]]].mean(0) for f in (0, 1)]
    return factors(names, change[rest], levels[k], noise[rest]).change, *margins


@pytest.mark.parametrize("donor", [1.0, 0.0])
def test_a_pair_that_was_never_seen_is_told_by_its_margins(donor):
    levels, change, truth, noise = grid(donor=donor)
    errors = np.array(
        [[np.square(said - truth[k]).sum() for said in of_pair(levels, change, noise, k)] for k in range(len(levels))]
    )  # fmt: skip
    of_factors, by_type, by_donor = errors.mean(0)
    assert of_factors < (0.15 if donor else 1.05) * min(by_type, by_donor)


def test_pairs_left_out_in_closed_form_are_those_of_a_fit_without_them():
    levels, change, _, noise = grid(3, 3)
    whole = factors(levels, change, ("t0", "new"), noise)
    assert whole.shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(whole.shares @ change, whole.change)
    for own in (0.1, 1.0):  # the variances that were chosen stand among those of the grid
        for taus in product((0.0, 0.1, 0.3, 1.0, 3.0), repeat=2):
            signal = np.square(change - change.mean(0)).sum(1).mean() - noise.mean()
            same = [np.array([[a[f] == b[f] for a in levels] for b in levels], float) for f in (0, 1)]
            sigma = signal * (taus[0] * same[0] + taus[1] * same[1] + own * np.eye(9)) + np.diag(noise)
            rest = np.arange(9) != 4
            inverse, k = np.linalg.inv(sigma[np.ix_(rest, rest)]), sigma[rest, 4]
            mean = inverse.sum(0) @ change[rest] / inverse.sum()
            if np.allclose(mean + k @ inverse @ (change[rest] - mean), whole.left_out[4]):
                return
    raise AssertionError("no variances of the grid give this left-out change")


def test_the_noise_of_a_change_is_that_of_both_means():
    data = screens.screen(n=20)
    means, groups = Means.of(data, Groups(data)), Groups(data)
    level = log1p_cp10k(data.X.toarray()).astype(np.float64)
    for pair, change, noise in zip(means.pairs, means.change, means.noise, strict=True):
        both = level[groups.rows(*pair)], level[groups.controls(pair[0])]
        np.testing.assert_allclose(change, both[0].mean(0) - both[1].mean(0), atol=1e-6)
        np.testing.assert_allclose(noise, sum(cells.var(0, ddof=1) / len(cells) for cells in both), rtol=1e-4)


def test_a_library_grows_by_the_sum_of_what_the_parts_do():
    zero = np.zeros((2, 3))
    means = Means(["x", "y"], zero, [("x", "A"), ("x", "B")], zero, zero, np.array([0.1, 0.2]), np.zeros(3))
    asked = [("x", "A"), ("y", "A"), ("x", "A+B"), ("x", "C")]
    assert [means.growth_of(*pair) for pair in asked] == pytest.approx([0.1, 0.1, 0.3, 0.0])
