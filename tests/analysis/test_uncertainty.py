"""Intervals: known standard errors, no bias of repeats, calibration that can fail, refits that hold the planted maps."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from cellop_nb.analysis.uncertainty import (
    Interval,
    bootstrap,
    bootstrap_energy,
    bootstrap_operators,
    calibration,
    change_error,
    coverage,
    gene_change,
    operator_interval,
    operator_intervals,
    pool,
    support_distance,
)
from cellop_nb.data.contract import Keys
from cellop_nb.data.groups import Groups
from cellop_nb.data.splits import split
from cellop_nb.errors import DataError, ModelError
from cellop_nb.models.operators import Condition
from cellop_nb.training.operators import Penalties, new_operators


def clouds(n=60, shift=1.0, seed=0, d=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(shift, 1, size=(n + 10, d))


def test_width_of_a_mean_is_that_of_theory():
    x = np.random.default_rng(0).normal(3, 2, size=(400, 1))
    found = bootstrap(lambda cells: cells.mean(), x, n_replicates=2000)
    assert found.estimate == x.mean()
    assert found.high - found.low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.08)


def test_same_seed_same_interval_other_seed_other_interval():
    x, y = clouds()

    def low(seed):
        return bootstrap(lambda a, b: a.mean() - b.mean(), x, y, n_replicates=50, seed=seed).low

    assert low(1) == low(1) != low(2)


def test_each_sample_is_resampled_on_its_own():
    x, y = clouds()
    found = bootstrap(lambda a, b: np.array([len(a), len(b)]), x, y, n_replicates=3)
    np.testing.assert_array_equal(found.low, [60, 70])


def test_energy_replicates_equal_a_naive_weighted_loop():
    x, y = np.array([[0.0], [1.0], [3.0]]), np.array([[2.0], [5.0]])
    found = bootstrap_energy(x, y, n_replicates=4, seed=5)
    rng = np.random.default_rng(5)
    w, v = (rng.multinomial(n, np.full(n, 1 / n), size=4) for n in (3, 2))
    for b in range(4):
        a, c = np.repeat(x, w[b], axis=0), np.repeat(y, v[b], axis=0)
        within = [sum(abs(p - q)[0] for p in s for q in s) / (len(s) - 1) ** 2 for s in (a, c)]
        between = np.mean([abs(p - q)[0] for p in a for q in c])
        assert found.replicates[b] == pytest.approx(2 * between - sum(within))


def test_energy_replicates_centre_on_the_u_statistic_where_plain_resampling_does_not():
    x, y = clouds(n=30, shift=0.3)
    found = bootstrap_energy(x, y, n_replicates=4000)

    def plain(a, b):
        distance = [np.linalg.norm(p[:, None] - q[None], axis=2) for p, q in ((a, b), (a, a), (b, b))]
        n, m = len(a), len(b)
        return 2 * distance[0].mean() - distance[1].sum() / n / (n - 1) - distance[2].sum() / m / (m - 1)

    assert found.estimate == pytest.approx(plain(x, y))
    assert found.replicates.mean() == pytest.approx(float(found.estimate), abs=0.01)
    biased = bootstrap(plain, x, y, n_replicates=200)
    assert biased.replicates.mean() > biased.estimate + 0.1


def test_gene_change_equals_resampling_of_means():
    x, y = clouds(n=200)
    fast = gene_change(y, x, n_replicates=3000)
    slow = bootstrap(lambda a, b: a.mean(axis=0) - b.mean(axis=0), y, x, n_replicates=3000, seed=1)
    np.testing.assert_allclose(fast.estimate, slow.estimate)
    np.testing.assert_allclose(fast.low, slow.low, atol=0.02)
    np.testing.assert_allclose(fast.high, slow.high, atol=0.02)


def test_intervals_of_changes_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=500)
    cells, control = rng.normal(size=(150, 500)) + truth, rng.normal(size=(150, 500))
    table = calibration(gene_change(cells, control, n_replicates=500), truth)
    np.testing.assert_allclose(table["coverage"], table["level"], atol=0.05)


def test_calibration_shows_intervals_that_are_too_narrow():
    rng = np.random.default_rng(0)
    cells, control = rng.normal(0.5, 1, size=(150, 300)), rng.normal(size=(150, 300))
    table = calibration(gene_change(cells, control), np.zeros(300)).set_index("level")
    assert table.loc[0.95, "coverage"] < 0.1


def test_error_of_the_measurement_is_part_of_the_coverage():
    rng = np.random.default_rng(0)
    cells, control = rng.normal(size=(2, 200, 400))
    real, start = rng.normal(size=(2, 50, 400))
    measured, error = real.mean(axis=0) - start.mean(axis=0), change_error(real, start)
    interval = gene_change(cells, control, n_replicates=400)
    assert coverage(interval, measured) < 0.75
    assert coverage(interval, measured, error) == pytest.approx(0.95, abs=0.03)


def test_pool_holds_the_spread_between_members():
    members = [gene_change(*clouds(seed=s)[::-1]) for s in range(3)]
    shifted = [Interval.of(m.estimate + s, m.replicates + s) for s, m in enumerate(members)]
    pooled = pool(shifted)
    np.testing.assert_allclose(pooled.estimate, np.mean([m.estimate for m in shifted], axis=0))
    assert (pooled.high - pooled.low > 1.5).all()
    with pytest.raises(DataError, match="as many replicates"):
        pool([members[0], gene_change(*clouds(), n_replicates=10)])


def test_nested_levels():
    interval = gene_change(*clouds())
    inner = interval.at(0.5)
    assert (inner.low >= interval.low).all() and (inner.high <= interval.high).all()
    with pytest.raises(DataError, match="between 0 and 1"):
        interval.at(95)


def test_one_cell_is_refused():
    with pytest.raises(DataError, match="two cells or more"):
        gene_change(np.zeros((1, 3)), np.zeros((5, 3)))


def contexts(offsets, n=40, seed=0):
    rng = np.random.default_rng(seed)
    points = np.concatenate([rng.normal(size=(n, 2)) + offset for offset in offsets])
    return points, np.repeat([f"c{i}" for i in range(len(offsets))], n)


def test_context_inside_the_support_is_not_flagged_and_one_far_away_is():
    training, labels = contexts([(0, 0), (4, 0), (0, 4), (4, 4)])
    rng = np.random.default_rng(1)
    near = support_distance(rng.normal(size=(40, 2)) + (2, 2), training, labels)
    far = support_distance(rng.normal(size=(40, 2)) + (40, 0), training, labels)
    assert not near["outlier"] and near["reason"] == ""
    assert near["spacing"] == pytest.approx(4, rel=0.15) and near["relative"] < 1
    assert far["outlier"] and far["nearest"] == "c1" and "spacings from 'c1'" in far["reason"]
    assert far["mean_distance"] == pytest.approx(36, abs=0.5)


def test_one_training_context_is_measured_in_cell_spreads():
    training, labels = contexts([(0, 0)])
    found = support_distance(np.random.default_rng(1).normal(size=(40, 2)) + (20, 0), training, labels)
    assert np.isnan(found["relative"]) and found["outlier"]
    assert found["cell_spread"] == pytest.approx(20 / np.sqrt(2), rel=0.2)


# -- operators


@pytest.fixture(scope="module")
def planted():
    """One context, six perturbations whose affine maps are known; true latents."""
    rng = np.random.default_rng(1)
    d, n, names = 4, 150, [f"p{k}" for k in range(6)]
    maps = {name: (np.eye(d) + 0.15 * rng.normal(size=(d, d)), rng.normal(size=d)) for name in names}
    z, obs = [rng.normal(size=(n, d)) + 1.0], ["control"] * n
    for name, (A, b) in maps.items():
        z.append((rng.normal(size=(n, d)) + 1.0) @ A.T + b)
        obs += [name] * n
    adata = ad.AnnData(
        obs=pd.DataFrame({"perturbation": obs}, index=[str(i) for i in range(len(obs))]),
        obsm={"X_nbvae": np.concatenate(z).astype(np.float32)},
    )
    Keys(context_key=None).write(adata)
    split(adata, test_fraction=0.0)
    return adata, maps


def family(adata, rank=None):
    return new_operators(adata, rank=rank, context_rank=None)


@pytest.mark.parametrize("rank", [0, None])
def test_intervals_of_the_operators_cover_the_planted_ones(planted, rank):
    adata, maps = planted
    members = bootstrap_operators(
        adata,
        family(adata, rank),
        n_replicates=20 if rank == 0 else 10,
        max_epochs=1,
        penalties=Penalties(ridge=1e-3),
        progress=False,
    )
    table = operator_intervals(adata, members, level=0.9)
    mean = np.ones(4)  # of the control population
    moves = table[table["quantity"].str.startswith("move")]
    truth = np.concatenate([(A - np.eye(4)) @ mean + b for A, b in maps.values()])
    inside = (moves["low"] <= truth) & (truth <= moves["high"])
    assert 0.75 <= inside.mean() <= 1.0
    narrow = operator_intervals(Groups(adata, use_rep="X_nbvae"), members, level=0.2)
    narrow = narrow[narrow["quantity"].str.startswith("move")]
    assert ((narrow["low"] <= truth) & (truth <= narrow["high"])).mean() < 0.6


def test_entries_of_a_shift_are_certain_where_the_form_fixes_them(planted):
    adata, _ = planted
    members = bootstrap_operators(adata, family(adata, 0), n_replicates=3, progress=False)
    entries = operator_interval([m.operator(Condition(("p0",))) for m in members])
    assert (entries.high - entries.low)[:4, :4].max() == 0 and (entries.high - entries.low)[:4, 4].min() > 0


def test_one_refit_is_refused(planted):
    with pytest.raises(ModelError, match="two refits"):
        bootstrap_operators(planted[0], family(planted[0]), n_replicates=1)


def test_members_differ_and_torch_seeds_do_not_leak(planted):
    state = torch.random.get_rng_state()
    members = bootstrap_operators(planted[0], family(planted[0], 0), n_replicates=2, progress=False)
    assert not torch.equal(members[0].axis_shift, members[1].axis_shift)
    assert torch.equal(state, torch.random.get_rng_state())


def test_quantities_are_those_of_the_operators_one_by_one(planted):
    adata, _ = planted
    members = bootstrap_operators(adata, family(adata, 0), n_replicates=2, resample=False, progress=False)
    table = operator_intervals(adata, members).set_index(["perturbation", "quantity"])["estimate"]
    start = Groups(adata, use_rep="X_nbvae").control["all"].mean(0)
    for name in ("p0", "p5"):
        operator = members[0].operator(Condition((name,), "all"))
        move = operator(start[None])[0] - start
        assert table[name, "move[2]"] == pytest.approx(float(move[2]), abs=1e-5)
        assert table[name, "length"] == pytest.approx(float(move.norm()), rel=1e-4)
        assert table[name, "norm"] == pytest.approx(operator.norm, rel=1e-5)
