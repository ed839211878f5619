"""Perturbations that were never measured: planted descriptors are used, useless ones ignored, and distance is said."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.kernel_ridge import KernelRidge

import cellop_nb as co
from cellop_nb.analysis import uncertainty
from cellop_nb.analysis.baselines import Target, Training, linear_features
from cellop_nb.analysis.metrics import EvaluationSpace, Undefined
from cellop_nb.analysis.plan import Measured
from cellop_nb.analysis.uncertainty import choose, gaussian, median_distance
from cellop_nb.analysis.unmeasured import KERNEL, MEAN, NEAREST, RIDGE, EffectMap, verdict
from cellop_nb.data.contract import Keys
from cellop_nb.errors import LabelError, ModelError

from .screens import screen, tiny

GENES = [f"g{k}" for k in range(40)]


def planted(useful: float, n: int = 24, *, shared: float = 1.0, noise: float = 0.3, seed: int = 0):
    """Effects of which the share `useful` is linear in 5 descriptors: a map of the first n, and 40 further ones."""
    rng = np.random.default_rng(seed)
    descriptors, own = rng.normal(size=(n + 40, 5)), rng.normal(size=(n + 40, len(GENES)))
    linear = descriptors @ rng.normal(size=(5, len(GENES))) / np.sqrt(5)
    effects = shared * rng.normal(size=len(GENES)) + useful * linear + (1 - useful) * own
    measured = effects[:n] + noise * rng.normal(size=(n, len(GENES)))
    names = tuple(f"p{k}" for k in range(n))
    data = Measured(names, descriptors[:n], measured, np.full(measured.shape, noise**2))
    return EffectMap(data), descriptors[n:], effects[n:]


def plans(effect_map, descriptors):
    return [effect_map.plan(x, genes=GENES, context="c", perturbation="new") for x in descriptors]


def errors(effect_map, descriptors, effects) -> tuple[float, float]:
    """Squared error of the plans as a share of that of the mean of the perturbed, and coverage of the intervals."""
    said = plans(effect_map, descriptors)
    mean = effect_map.measured.change.mean(0)
    left = sum(np.square(plan.change - d).sum() for plan, d in zip(said, effects, strict=True))
    inside = [(plan.low <= d) & (d <= plan.high) for plan, d in zip(said, effects, strict=True)]
    return left / np.square(mean - effects).sum(), float(np.mean(inside))


@pytest.mark.parametrize(
    ("useful", "at_most"), [(1.0, 0.1), (0.7, 0.4), (0.3, 1.0), (0.0, 1.01)], ids="{:g}".format
)
def test_useful_descriptors_are_used_and_useless_ones_do_no_harm(useful, at_most):
    shares, inside = zip(*(errors(*planted(useful, seed=seed)) for seed in range(3)), strict=True)
    assert np.mean(shares) < at_most
    assert 0.9 < np.mean(inside) < 0.99


def test_effects_that_bend_are_foreseen_by_the_kernel_or_the_nearest():
    rng = np.random.default_rng(1)
    x = rng.uniform(-2, 2, size=(60, 1))
    effects = np.sin(2 * x) @ rng.normal(size=(1, len(GENES)))
    data = Measured(tuple(map(str, range(60))), x, effects, np.full(effects.shape, 1e-4))
    plan = plans(EffectMap(data), np.array([[0.5]]))[0]
    assert plan.weights[[KERNEL, NEAREST]].sum() > 0.9
    np.testing.assert_allclose(plan.change, np.sin(1.0) * effects[0] / np.sin(2 * x[0, 0]), atol=0.2)


def test_a_plan_is_a_weighted_sum_of_measured_effects():
    effect_map, descriptors, _ = planted(0.7)
    plan = plans(effect_map, descriptors[:1])[0]
    np.testing.assert_allclose(plan.shares @ effect_map.measured.change, plan.change)
    np.testing.assert_allclose(plan.estimates.to_numpy() @ plan.weights, plan.change)
    assert plan.weights.sum() == pytest.approx(1) and plan.across == "perturbations" and not plan.measured
    np.testing.assert_allclose(plan.estimates[MEAN], effect_map.measured.change.mean(0))


def test_left_out_effects_are_those_of_a_map_that_has_not_seen_them():
    """Closed forms beside scikit-learn's kernel ridge, fitted again without the perturbation."""
    effect_map, _, _ = planted(0.7, n=8)
    data, left = effect_map.measured, effect_map.ways[RIDGE].left_out
    centre = data.control.mean(0)
    scale = np.square(data.control - centre).sum() / 8
    rest = np.arange(8) != 3
    x, y = data.control[rest] - data.control[rest].mean(0), data.change[rest]
    candidates = [
        y.mean(0) + KernelRidge(alpha=ridge * scale).fit(x, y - y.mean(0)).predict(
            (data.control[3] - data.control[rest].mean(0))[None]
        )[0]
        for ridge in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    ]  # fmt: skip
    assert min(np.abs(left[3] - row).max() for row in candidates) < 1e-8


def test_intervals_widen_with_distance_and_the_verdict_says_so():
    effect_map, descriptors, _ = planted(1.0, noise=0.1)
    near, far = plans(effect_map, [effect_map.measured.control[0], 20 * descriptors[0]])
    assert near.nearest == 0 and not near.extrapolated and far.extrapolated
    assert far.error.mean() > 3 * near.error.mean()
    assert "predicted from its descriptor" in verdict(near, "new") and "extrapolated" not in verdict(
        near, "new"
    )
    assert "extrapolated" in verdict(far, "new")
    useless = plans(*planted(0.0)[:2])[0]
    assert "the descriptors carry nothing" in verdict(useless, "new")
    assert f"{100 * useless.rival_explained:.0f} %" in verdict(useless, "new")
    noise = EffectMap(
        Measured(
            tuple("abcdefgh"), effect_map.measured.control[:8], 1e-3 * effect_map.measured.change[:8],
            np.ones((8, len(GENES))),
        )
    )  # fmt: skip
    assert "the measured effects of the others are noise" in verdict(plans(noise, descriptors[:1])[0], "new")


# -- in the predictor -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    """Perturbations lift their own third of the genes; "twin" has the descriptor of "a", "lone" that of none."""
    adata = screen(n=40, contexts=("B", "T"), perturbations=("a", "b", "c", "d", "e", "f"))
    table = pd.DataFrame(np.eye(6), index=list("abcdef"), columns=list("uvwxyz"))
    table.loc["twin"], table.loc["lone"] = table.loc["a"], 0.1
    table.loc["blank"] = np.nan
    return adata, table, tiny(adata, n_genes=None, features=table).fit(progress=False)


def test_the_predictor_carries_cells_to_the_foreseen_mean(fitted, tmp_path):
    adata, table, model = fitted
    assert {"twin", "lone"} <= set(model.perturbations) and "blank" not in model.perturbations
    cells = model.predict(context="B", perturbation="twin")
    assert set(cells.obs["perturbation"]) == {"twin"} and (cells.X.data % 1 == 0).all()
    support = model.support("B", "twin")
    assert support.iloc[0]["perturbation"] == "a" and support.iloc[0]["distance"] == 0
    assert model.verdict("B", "twin").startswith("twin in B: never measured")
    shares = model.plan("B", "twin").shares
    apart = {name: model.operator("B", name).matrix.numpy() - np.eye(4) for name in ("twin", *shares.index)}
    whole, parts = apart["twin"], sum(share * apart[name] for name, share in shares.items())
    assert np.linalg.norm(whole) > 1e-3
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    double = model.predict(context="B", perturbation="twin+b")
    assert set(double.obs["perturbation"]) == {"twin+b"}
    loaded = co.load(model.save(tmp_path / "model"), adata)
    pd.testing.assert_frame_equal(loaded.features, table)  # the mark of "blank", too
    np.testing.assert_array_equal(
        loaded.predict(context="B", perturbation="twin").X.toarray(), cells.X.toarray()
    )


def test_two_described_perturbations_are_too_few():
    table = pd.DataFrame(np.eye(3), index=["a", "b", "twin"])
    model = tiny(screen(n=20, contexts=("B", "T"), perturbations=("a", "b")), features=table)
    with pytest.raises(ModelError, match="3 measured perturbations with descriptors"):
        model.fit(progress=False).plan("B", "twin")


def test_a_measured_perturbation_does_not_depend_on_features(fitted):
    adata, _, model = fitted
    plain = tiny(adata, n_genes=None).fit(progress=False)
    ask = {"context": "B", "perturbation": "a"}
    np.testing.assert_array_equal(model.predict(**ask).X.toarray(), plain.predict(**ask).X.toarray())


def test_the_linear_baseline_is_the_published_one(fitted):
    """Normal equations solved anew by a Kronecker product."""
    adata, table, _ = fitted
    space = EvaluationSpace.fit(adata)
    training = Training.of(adata, space)
    rows = training.groups.controls("B")
    target = Target("B", "twin", training.cells[rows])
    said = linear_features(training, target, features=table).mean - target.mean
    y = np.stack([training.shift("B", p) for p in "abcdef"], axis=1)
    b = y.mean(1, keepdims=True)
    u, s, _ = np.linalg.svd(y - b, full_matrices=False)
    g, p = u * s, table.loc[list("abcdef")].to_numpy()
    gram = np.kron(g.T @ g + 0.1 * np.eye(6), p.T @ p + 0.1 * np.eye(6))
    w = np.linalg.solve(gram, (g.T @ (y - b) @ p).ravel()).reshape(6, 6)
    np.testing.assert_allclose(said, g @ w @ table.loc["twin"].to_numpy() + b[:, 0], atol=1e-5)
    with pytest.raises(Undefined, match="no descriptor, or it was measured"):
        linear_features(training, Target("B", "a", target.control), features=table)


# -- what to measure next ---------------------------------------------------------------------------------------------


def after(chosen, measured, x, effects) -> float:
    """Squared error of the effects that were not measured."""
    rows = [*measured, *chosen]
    data = Measured(tuple(map(str, rows)), x[rows], effects[rows], np.full(effects[rows].shape, 0.01))
    rest = [k for k in range(len(x)) if k not in rows]
    said = [EffectMap(data).plan(x[k], genes=GENES, context="c", perturbation="p").change for k in rest]
    return float(np.square(said - effects[rest]).sum(1).mean())


def test_chosen_experiments_tell_more_than_random_ones():
    """Six kinds of perturbations, two of which were measured: one of each other kind is chosen."""
    shares = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        kind = np.repeat(np.arange(6), 5)
        x = 3 * rng.normal(size=(6, 4))[kind] + 0.2 * rng.normal(size=(30, 4))
        effects = rng.normal(size=(6, len(GENES)))[kind] + 0.1 * rng.normal(size=(30, len(GENES)))
        measured, rest = np.array([0, 1, 5, 6]), np.setdiff1d(np.arange(30), [0, 1, 5, 6])
        chosen, gains, left = choose([x], measured, rest, rest, 4, np.full(4, 0.05))
        assert {*kind[chosen]} == {2, 3, 4, 5}
        assert left == sorted(left, reverse=True) and gains[0] > gains[3] > 0
        by_chance = [after(rng.choice(rest, 4, replace=False), measured, x, effects) for _ in range(4)]
        shares.append(after(chosen, measured, x, effects) / np.mean(by_chance))
    assert max(shares) < 1 and np.mean(shares) < 0.9


def test_a_choice_is_conditioned_as_a_new_fit_would_be():
    """Variances left after two choices are those of one solve with both measured."""
    x = np.random.default_rng(0).normal(size=(12, 2))
    kernel, wanted = gaussian(x, x, median_distance(x)), np.arange(3, 12)
    chosen, gains, left = choose([x], np.arange(3), wanted, wanted, 2, np.full(3, 0.1))
    rows = [0, 1, 2, *chosen]
    again = kernel - kernel[:, rows] @ np.linalg.solve(
        kernel[np.ix_(rows, rows)] + 0.1 * np.eye(5), kernel[rows]
    )
    assert left[-1] == pytest.approx(np.diag(again)[3:].sum() / 9, rel=1e-6)


def test_experiments_are_chosen_for_a_model(fitted):
    adata, table, model = fitted
    said = co.next_experiments(model, [("B", "twin"), ("B", "lone"), ("T", "lone")], n=2)
    assert list(said) == ["context", "perturbation", "gain", "uncertainty"] and len(said) == 2
    assert said["gain"].is_monotonic_decreasing
    assert not said.duplicated(["context", "perturbation"]).any() and (said["uncertainty"] < 1).all()
    with pytest.raises(LabelError, match="'blank' in 'B'"):
        co.next_experiments(model, [("B", "blank")])
    assert said.equals(
        co.next_experiments(model, [(("B",), "twin"), ({"cell_type": "B"}, "lone"), ("T", "lone")], n=2)
    )
    for without in (tiny(adata), tiny(adata, features=table)):
        with pytest.raises(ModelError, match="knows descriptors"):
            co.next_experiments(without, [("B", "a")])


def test_nothing_is_chosen_twice_however_loud_the_noise():
    x = np.array([[0.0], [10.0], [30.0]])
    chosen, _, _ = choose([x], [0], [1, 2], [1, 2], 2, np.array([10.0]))
    assert sorted(chosen) == [1, 2]


def test_many_candidates_take_memory_in_proportion(monkeypatch):
    """3,000 candidates that are all wanted: a square of their covariances alone would take 288 MB."""
    rng = np.random.default_rng(0)
    names = [f"p{k}" for k in range(3000)]
    pairs = [("A", name) for name in names[:20]]
    means = SimpleNamespace(
        pairs=pairs, contexts=["A"], control=np.zeros((1, 3)),
        change=rng.normal(size=(20, 3)), noise=np.full((20, 3), 0.01),
    )  # fmt: skip
    features = pd.DataFrame(rng.normal(size=(3000, 2)), index=names)
    model = SimpleNamespace(features=features, members=[1], keys=Keys(), means=means)
    candidates = [("A", name) for name in names]
    tracemalloc.start()
    said = co.next_experiments(model, candidates, n=3)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert peak < 200 and len({*said["perturbation"]}) == 3 and not {*said["perturbation"]} & {*names[:20]}
    monkeypatch.setattr(uncertainty, "_MOST_WANTED", 3000)
    assert said["uncertainty"].to_numpy() == pytest.approx(
        co.next_experiments(model, candidates, n=3)["uncertainty"].to_numpy(), rel=0.1
    )
