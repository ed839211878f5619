"""The permutation E-test: parity with loops, exact p-values, and screens whose answer is known."""

from __future__ import annotations

from itertools import combinations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cellop_nb.analysis.etest import benjamini_hochberg, energy_of_splits, etest, holm, permutation_test
from cellop_nb.errors import LabelError


def naive_energy(x, y):
    def mean(a, b, same):
        kept = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not same or i != j]
        return np.mean([np.linalg.norm(p - q) for p, q in kept])

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


def screen(points, contexts, perturbations):
    obs = pd.DataFrame({"cell_type": contexts, "perturbation": perturbations})
    obs.index = obs.index.astype(str)
    return ad.AnnData(np.zeros((len(points), 1), dtype=np.float32), obs=obs, obsm={"X_rep": points})


def test_quadratic_forms_equal_the_double_loop():
    rng = np.random.default_rng(0)
    pooled = rng.normal(size=(9, 3))
    distance = np.linalg.norm(pooled[:, None] - pooled[None], axis=2)
    splits = np.stack([rng.permutation([1.0] * 4 + [0.0] * 5) for _ in range(6)])
    expected = [naive_energy(pooled[s == 1], pooled[s == 0]) for s in splits]
    np.testing.assert_allclose(energy_of_splits(distance, splits), expected, rtol=1e-10)


def test_statistic_is_the_package_energy_distance():
    torch = pytest.importorskip("torch")
    from cellop_nb.models.energy import energy_distance

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 4)), rng.normal(0.4, 1, size=(20, 4))
    statistic, _ = permutation_test(x, y, n_permutations=5)
    assert statistic == pytest.approx(float(energy_distance(torch.tensor(x), torch.tensor(y))), rel=1e-8)


def test_p_agrees_with_all_splits_of_a_tiny_sample():
    x, y = np.array([[0.0], [0.2], [0.5]]), np.array([[2.0], [2.3], [0.4], [3.0]])
    pooled = np.concatenate([x, y])
    every = []
    for chosen in combinations(range(7), 3):
        rest = [i for i in range(7) if i not in chosen]
        every.append(naive_energy(pooled[list(chosen)], pooled[rest]))
    exact = np.mean(np.array(every) >= naive_energy(x, y) - 1e-9)
    _, p = permutation_test(x, y, n_permutations=20000, seed=3)
    assert p == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("points", [np.zeros((12, 3)), np.full((12, 2), 7.3)])
def test_all_ties_give_p_of_one(points):
    assert permutation_test(points[:5], points[5:], n_permutations=99) == (pytest.approx(0.0), 1.0)


def test_ties_of_a_symmetric_sample_are_not_lost_to_rounding():
    # every split of {a, b, a, b} has one of two values, each reached by several orders of the same sum
    x, y = np.array([[0.1], [0.7]]), np.array([[0.1], [0.7]])
    _, p = permutation_test(x, y, n_permutations=999)
    assert p == 1.0


def test_strong_effect_reaches_the_smallest_p():
    rng = np.random.default_rng(0)
    _, p = permutation_test(rng.normal(size=(40, 3)), rng.normal(5, 1, size=(40, 3)), n_permutations=199)
    assert p == 1 / 200


def test_p_is_uniform_under_the_null():
    rng = np.random.default_rng(0)
    clouds = rng.normal(size=(200, 2, 15, 2))
    values = [permutation_test(x, y, n_permutations=99, seed=i)[1] for i, (x, y) in enumerate(clouds)]
    assert 0.4 < np.mean(values) < 0.6
    assert np.mean(np.array(values) <= 0.05) < 0.1


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_corrections_match_their_definitions(p):
    ordered, n = sorted(p), len(p)
    step_down = [max(min(1.0, (n - j) * ordered[j]) for j in range(ordered.index(x) + 1)) for x in p]
    last = {x: n - ordered[::-1].index(x) for x in p}
    step_up = [min(min(1.0, n * ordered[j] / (j + 1)) for j in range(last[x] - 1, n)) for x in p]
    # equal p-values share the largest step
    step_down = [max(s for s, other in zip(step_down, p, strict=True) if other <= x) for x in p]
    np.testing.assert_allclose(holm(p), step_down, atol=1e-12)
    np.testing.assert_allclose(benjamini_hochberg(p), step_up, atol=1e-12)


def test_table_names_the_group_that_differs():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(150, 3))
    points[50:100] = points[:50]  # the same cloud, not a draw that may be unlucky
    points[100:] += 3.0
    perturbations = ["control"] * 50 + ["nothing"] * 50 + ["strong"] * 50
    table = etest(screen(points, ["T"] * 150, perturbations), use_rep="X_rep", n_permutations=299)
    assert list(table["perturbation"]) == ["nothing", "strong"]
    assert list(table["different"]) == [False, True]
    again = etest(screen(points, ["T"] * 150, perturbations), use_rep="X_rep", n_permutations=299)
    pd.testing.assert_frame_equal(table, again)


def test_group_of_one_cell_has_a_reason_and_does_not_count_as_a_test():
    points = np.random.default_rng(0).normal(size=(41, 2))
    data = screen(points, ["T"] * 41, ["control"] * 20 + ["a"] * 20 + ["b"])
    table = etest(data, use_rep="X_rep", n_permutations=49).set_index("perturbation")
    assert np.isnan(table.loc["b", "p"]) and "1 perturbed" in table.loc["b", "reason"]
    assert not table.loc["b", "different"]
    assert table.loc["a", "p_adjusted"] == table.loc["a", "p"]


def test_unknown_names_are_refused_with_help():
    data = screen(np.zeros((4, 1)), ["T"] * 4, ["ctrl", "ctrl", "a", "a"])
    with pytest.raises(LabelError, match="did you mean 'ctrl'"):
        etest(data, use_rep="X_rep")
    with pytest.raises(LabelError, match="use_rep=None"):
        etest(data, control="ctrl", use_rep="X_missing")
    with pytest.raises(LabelError, match="'holm' or 'bh'"):
        etest(data, control="ctrl", correction="bonferoni")


def test_warns_when_holm_cannot_be_reached(caplog):
    data = screen(np.random.default_rng(0).normal(size=(8, 1)), ["T"] * 8, ["control"] * 4 + ["a"] * 4)
    etest(data, use_rep="X_rep", n_permutations=9)
    assert "raise n_permutations" in caplog.text


def test_null_screen_shows_no_more_effects_than_it_has(mcfaline_file):
    data = ad.read_h5ad(mcfaline_file)
    table = etest(data, n_permutations=999)
    assert len(table) == 27
    assert table["different"].sum() <= 1
    assert set(table.loc[table["different"], "perturbation"]) <= {"TGFBR2"}


def test_false_positives_on_shuffled_labels_are_as_rare_as_promised(mcfaline_file):
    """Labels are shuffled inside each cell line, so that every null hypothesis is true: 8 families of 27 tests."""
    data = ad.read_h5ad(mcfaline_file)
    rng, p, families = np.random.default_rng(0), [], 0
    for seed in range(8):
        labels = data.obs["perturbation"].astype(str)
        shuffled = labels.groupby(data.obs["cell_type"], observed=True).transform(rng.permutation)
        data.obs["shuffled"] = shuffled.to_numpy()
        table = etest(data, perturbation_key="shuffled", n_permutations=599, seed=seed)
        p += table["p"].tolist()
        families += table["different"].any()
    assert (np.array(p) <= 0.05).sum() <= stats.binom.ppf(0.999, len(p), 0.05)
    assert 0.4 < np.mean(p) < 0.6
    assert families <= stats.binom.ppf(0.999, 8, 0.05)


def test_null_screen_under_the_false_discovery_rate_too(mcfaline_file):
    assert etest(ad.read_h5ad(mcfaline_file), n_permutations=499, correction="bh")["different"].sum() <= 1


def test_interferon_acts_on_every_cell_type(kang_file):
    data = ad.read_h5ad(kang_file)
    few = data[data.obs["cell_type"].isin(["B", "DC", "NK"])].copy()
    table = etest(few, n_permutations=199, max_cells=100)
    assert table["different"].all()
    assert (table["e_distance"] > 4).all()
