"""Effects beside their noise, moved against real cells, and the E-test: exact p-values, known answers, nulls."""

from __future__ import annotations

import time
from itertools import combinations
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cellop_nb.analysis.distances import (
    CORRECTIONS,
    etest,
    group_energies,
    holm,
    screen_effects,
    tail_probability,
    transport_scores,
)
from cellop_nb.data.contract import Keys
from cellop_nb.data.groups import Groups
from cellop_nb.data.splits import split
from cellop_nb.data.synthetic import planted_operator, synthetic
from cellop_nb.errors import DataError, LabelError
from cellop_nb.models.affine import AffineOperator
from cellop_nb.models.energy import energy_distance, split_energies

from . import screens


def naive_energy(x, y):
    def mean(a, b, same):
        kept = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not same or i != j]
        return np.mean([np.linalg.norm(p - q) for p, q in kept])

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


def labelled(points, contexts, perturbations):
    obs = pd.DataFrame({"cell_type": contexts, "perturbation": perturbations})
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(np.zeros((len(points), 1), dtype=np.float32), obs=obs, obsm={"X_rep": points})
    Keys().write(adata)
    return adata


def real(path, **keys):
    adata = ad.read_h5ad(path)
    Keys(**keys).write(adata)
    return adata


def distance_and_p(x, y, n_permutations, seed=0):
    """Energy distance and p-value of one perturbation with cells `x` against controls `y`."""
    labels = ["control"] * len(y) + ["a"] * len(x)
    data = labelled(np.concatenate([y, x]), ["T"] * len(labels), labels)
    row = etest(data, use_rep="X_rep", n_permutations=n_permutations, seed=seed).iloc[0]
    return row["e_distance"], row["p"]


def test_p_agrees_with_all_splits_of_a_tiny_sample():
    x, y = np.array([[0.0], [0.2], [0.5]]), np.array([[2.0], [2.3], [0.4], [3.0]])
    pooled = np.concatenate([x, y])
    every = []
    for chosen in combinations(range(7), 3):
        rest = [i for i in range(7) if i not in chosen]
        every.append(naive_energy(pooled[list(chosen)], pooled[rest]))
    exact = np.mean(np.array(every) >= naive_energy(x, y) - 1e-9)
    statistic, p = distance_and_p(x, y, 20000, seed=3)
    assert statistic == pytest.approx(naive_energy(x, y), rel=1e-5)
    assert p == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("points", [np.zeros((12, 3)), np.full((12, 2), 7.3), np.array([[0.1], [0.7]] * 2)])
def test_ties_are_not_lost_to_rounding(points):
    """Every split of {a, b, a, b} has one of two values, each reached by several orders of the same sum."""
    half = len(points) // 2
    assert distance_and_p(points[:half], points[half:], 999)[1] == 1.0


def test_p_is_uniform_under_the_null():
    clouds = np.random.default_rng(0).normal(size=(200, 2, 15, 2))
    values = np.array([distance_and_p(x, y, 99, seed=i)[1] for i, (x, y) in enumerate(clouds)])
    assert 0.4 < values.mean() < 0.6
    assert (values <= 0.05).mean() < 0.1


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
    np.testing.assert_allclose(CORRECTIONS["bh"](np.array(p)), step_up, atol=1e-12)


def test_table_names_the_group_that_differs():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(150, 3))
    points[50:100] = points[:50]  # the same cloud, not a draw that may be unlucky
    points[100:] += 3.0
    perturbations = ["control"] * 50 + ["nothing"] * 50 + ["strong"] * 50
    table = etest(labelled(points, ["T"] * 150, perturbations), use_rep="X_rep", n_permutations=299)
    assert list(table["perturbation"]) == ["nothing", "strong"]
    assert list(table["different"]) == [False, True]
    again = etest(labelled(points, ["T"] * 150, perturbations), use_rep="X_rep", n_permutations=299)
    pd.testing.assert_frame_equal(table, again)


def test_group_of_one_cell_has_a_reason_and_does_not_count_as_a_test():
    points = np.random.default_rng(0).normal(size=(41, 2))
    data = labelled(points, ["T"] * 41, ["control"] * 20 + ["a"] * 20 + ["b"])
    table = etest(data, use_rep="X_rep", n_permutations=49).set_index("perturbation")
    assert np.isnan(table.loc["b", "p"]) and "1 perturbed" in table.loc["b", "reason"]
    assert not table.loc["b", "different"]
    assert table.loc["a", "p_adjusted"] == table.loc["a", "p"]


def test_unknown_names_and_broken_latents_are_refused_with_help():
    data = labelled(np.zeros((4, 1)), ["T"] * 4, ["ctrl", "ctrl", "a", "a"])
    with pytest.raises(LabelError, match="did you mean 'ctrl'"):
        etest(data, use_rep="X_rep")
    Keys(control="ctrl").write(data)
    with pytest.raises(DataError, match="X_missing"):
        etest(data, use_rep="X_missing")
    with pytest.raises(LabelError, match="'holm' or 'bh'"):
        etest(data, correction="bonferoni")
    data.obsm["X_rep"][2] = np.nan
    with pytest.raises(DataError, match="finite latents"):
        etest(data, use_rep="X_rep")


def test_warns_when_holm_cannot_be_reached(caplog):
    data = labelled(np.random.default_rng(0).normal(size=(8, 1)), ["T"] * 8, ["control"] * 4 + ["a"] * 4)
    etest(data, use_rep="X_rep", n_permutations=9)
    assert "raise n_permutations" in caplog.text


@pytest.mark.parametrize("sizes", [(30, 30), (8, 45), (60, 12)])
def test_groups_that_share_permutations_are_tested_as_alone(sizes):
    """Other permutations, of one pooled sample each, against the shared ones of the table."""
    n, m = sizes
    points = np.random.default_rng(2).normal(size=(m + 2 * n, 2))
    points[m : m + n] += 0.35
    data = labelled(points, ["T"] * len(points), ["control"] * m + ["a"] * n + ["b"] * n)
    table = etest(data, use_rep="X_rep", n_permutations=4000).set_index("perturbation")
    for label, rows in (("a", slice(m, m + n)), ("b", slice(m + n, None))):
        statistic, p = distance_and_p(points[rows], points[:m], 4000, seed=9)
        assert table.loc[label, "e_distance"] == pytest.approx(statistic, rel=1e-5, abs=1e-7)
        assert table.loc[label, "p"] == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 2000) + 1e-3)


def test_groups_stand_in_place_of_the_data():
    adata = synthetic(n_contexts=2, n_perturbations=3, n_cells=40, n_genes=20, seed=1)
    table = etest(adata, use_rep="X_truth", n_permutations=499)
    pd.testing.assert_frame_equal(table, etest(Groups(adata, use_rep="X_truth"), n_permutations=499))
    assert table["different"].groupby(table["perturbation"]).any()["drug 1"]


def test_smaller_effects_than_detectable_are_those_that_are_missed():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(60, 2)), *(rng.normal(k / 10, 1, (30, 2)) for k in range(9))])
    labels = ["control"] * 60 + [f"p{k}" for k in range(9) for _ in range(30)]
    table = etest(labelled(points, ["T"] * len(points), labels), use_rep="X_rep", n_permutations=999)
    seen = table["p"] <= 0.05
    assert 0 < seen.sum() < 9
    assert (seen == (table["e_distance"] >= table["detectable"])).all()


# -- many groups: few permutations, a fitted tail


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.3), (1.0,) * 12])
def test_the_tail_agrees_with_many_permutations_on_nulls(weights):
    """p of values between 1e-3 and 1e-5, from 2,000 of 400,000 permuted values of two equal clouds: never much too small,
    and too large where many directions make the tail lighter than exponential."""
    rng = np.random.default_rng(0)
    pooled = rng.normal(size=(60, len(weights))) * weights
    distance = torch.cdist(torch.tensor(pooled), torch.tensor(pooled))
    first = np.zeros((400_000, 60), dtype=np.float32)
    first[:, :20] = 1.0
    rng.permuted(first, axis=1, out=first)
    parts = [
        split_energies(distance.float(), torch.from_numpy(part)).double() for part in np.split(first, 40)
    ]
    null = torch.cat(parts).numpy()
    for exact in (1e-3, 1e-4, 1e-5):
        value = np.quantile(null, 1 - exact)
        ratios = [
            tail_probability(value, null[k * 2000 : (k + 1) * 2000], 20, 40) / exact for k in range(100)
        ]
        assert 0.5 < np.median(ratios) < 8, exact
        assert np.mean(np.array(ratios) < 0.1) < 0.05, exact


def test_p_values_of_a_tail_are_never_zero_nor_below_one_split():
    null = np.random.default_rng(0).gamma(1.0, size=1999)
    assert tail_probability(1e9, null, 30, 500) >= 1e-300
    assert tail_probability(1e9, null, 8, 8) == 1 / 2000  # 12,870 splits are too few for a tail
    assert tail_probability(1e9, null, 12, 12) == pytest.approx(1 / 2_704_156)
    assert tail_probability(np.median(null), null, 30, 500) == pytest.approx(0.5, abs=0.01)
    assert tail_probability(5.0, np.zeros(1999), 30, 500) == 1 / 2000
    assert tail_probability(20.0, null, 30, 500) < tail_probability(15.0, null, 30, 500) < 1e-4


def test_two_thousand_groups_of_thirty_cells_within_a_minute():
    """Five effects among 2,000 groups: out of reach of 999 permutations alone, found with the tail."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(500 + 2000 * 30, 10)).astype(np.float32)
    points[500:650] += 1.0
    labels = ["control"] * 500 + [f"p{k}" for k in range(2000) for _ in range(30)]
    data = labelled(points, ["T"] * len(points), labels)
    start = time.process_time()
    table = etest(data, use_rep="X_rep", n_permutations=999)
    assert time.process_time() - start < 60
    assert table.attrs["correction"] == "bh" and len(table) == 2000
    planted = table["perturbation"].isin([f"p{k}" for k in range(5)])
    assert table.loc[planted, "different"].all() and table.loc[planted, "p"].max() < 1 / 1000
    assert table.loc[~planted, "different"].sum() <= 3
    null = table.loc[~planted, "p"]
    assert stats.kstest(null, "uniform").pvalue > 1e-3 and null.min() > 1e-6
    holm_too = etest(data[:1100], use_rep="X_rep", correction="holm")
    assert holm_too["different"].sum() == 5


# -- screens whose answer is known


def test_null_screen_shows_no_more_effects_than_it_has(mcfaline_file):
    data = real(mcfaline_file)
    table = etest(data, n_permutations=999)
    assert len(table) == 27
    assert table["different"].sum() <= 1
    assert set(table.loc[table["different"], "perturbation"]) <= {"TGFBR2"}


def test_false_positives_on_shuffled_labels_are_as_rare_as_promised(mcfaline_file):
    """Labels are shuffled inside each cell line, so that every null hypothesis is true: 8 families of 27 tests."""
    data = real(mcfaline_file)
    rng, p, families = np.random.default_rng(0), [], 0
    for seed in range(8):
        labels = data.obs["perturbation"].astype(str)
        shuffled = labels.groupby(data.obs["cell_type"], observed=True).transform(rng.permutation)
        data.obs["shuffled"] = shuffled.to_numpy()
        Keys(perturbation_key="shuffled").write(data)
        table = etest(data, n_permutations=599, seed=seed)
        p += table["p"].tolist()
        families += table["different"].any()
    assert (np.array(p) <= 0.05).sum() <= stats.binom.ppf(0.999, len(p), 0.05)
    assert 0.4 < np.mean(p) < 0.6
    assert families <= stats.binom.ppf(0.999, 8, 0.05)


def test_null_screen_under_the_false_discovery_rate_too(mcfaline_file):
    assert etest(real(mcfaline_file), n_permutations=499, correction="bh")["different"].sum() <= 1


def test_interferon_acts_on_every_cell_type(kang_file):
    data = real(kang_file)
    few = data[data.obs["cell_type"].isin(["B", "DC", "NK"])].copy()
    table = etest(few, n_permutations=199, max_cells=100)
    assert table["different"].all()
    assert (table["e_distance"] > 4).all()


# -- effects beside their noise, and moved against real cells


class Planted:
    conditions = SimpleNamespace(perturbations=["drug 1", "drug 2", "drug 3"])

    """The planted operators, where a fitted model would stand."""

    def __init__(self, adata):
        self.adata = adata

    def operator(self, condition):
        matrix, shift = planted_operator(self.adata, condition.label, condition.context)
        return AffineOperator(torch.as_tensor(matrix).float(), torch.as_tensor(shift).float())


class Identity:
    conditions = SimpleNamespace(perturbations=["drug 1", "drug 2", "drug 3"])

    def operator(self, condition):
        return AffineOperator(torch.eye(6), torch.zeros(6))


@pytest.fixture(scope="module")
def screen():
    adata = synthetic(n_contexts=2, n_perturbations=3, n_cells=200, n_genes=20, seed=1)
    split(adata, test_fraction=0.3)
    return adata


def test_the_planted_operators_reach_the_floor(screen):
    scores = transport_scores(screen, Planted(screen), use_rep="X_truth")
    wide = scores.pivot_table(index="perturbation", columns="method", values="energy")
    limit = scores["limit"].mean()
    assert abs(scores["floor"].mean()) < 0.2 * limit
    assert set(wide.columns) == {"no change", "own mean", "operator"}
    assert wide.loc["drug 1", "no change"] > 5 * limit
    assert wide["operator"].abs().max() < 2 * limit
    assert abs(wide.loc["drug 3", "no change"]) < 2 * limit, "the last drug does nothing"


def test_doing_nothing_is_no_change(screen):
    scores = transport_scores(screen, Identity(), use_rep="X_truth")
    wide = scores.pivot_table(index="group", columns="method", values="energy")
    np.testing.assert_allclose(wide["operator"], wide["no change"], rtol=1e-5)
    assert set(scores["cells"]) == {60}


def test_effects_stand_beside_their_floor(screen):
    data = Groups(screen, use_rep="X_truth", split="train")
    table = group_energies(data)
    first = data[0]
    expected = energy_distance(data.control[first.context], first.cells)
    assert table.loc[0, "energy"] == pytest.approx(float(expected), rel=1e-5)
    assert (table["energy"] > table["limit"]).groupby(table["perturbation"]).all()["drug 1"]


def test_screen_effects_count_knockdowns_and_clusters():
    """Two kinds of effect planted, one group inert, and targets that lose three quarters of their counts."""
    rng, genes = np.random.default_rng(0), [f"g{k}" for k in range(60)]
    labels = ["control"] * 120 + [name for name in ("g0", "g1", "g2", "g3", "g4", "other") for _ in range(40)]
    up = {"g0": slice(10, 20), "g1": slice(10, 20), "g2": slice(30, 40), "g3": slice(30, 40)}
    means = np.full((len(labels), 60), 4.0)
    for row, name in enumerate(labels):
        if name in up:
            means[row, genes.index(name)] /= 4
            means[row, up[name]] *= 3
    adata = ad.AnnData(
        rng.poisson(means).astype("f4"),
        obs=pd.DataFrame({"perturbation": labels}, index=[f"c{k}" for k in range(len(labels))]),
    )
    adata.var_names = genes
    Keys(context_key=None).write(adata)
    table = screen_effects(adata).set_index("perturbation")
    assert table["different"].to_dict() == {
        "g0": True,
        "g1": True,
        "g2": True,
        "g3": True,
        "g4": False,
        "other": False,
    }
    assert table.loc[["g0", "g1", "g2", "g3"], "knockdown"].between(0.72, 0.9).all()
    assert abs(table.loc["g4", "knockdown"]) < 0.25 and np.isnan(table.loc["other", "knockdown"])
    alike = table["alike"]
    assert alike["g0"] == alike["g1"] and alike["g2"] == alike["g3"] and {alike["g0"], alike["g2"]} == {1, 2}
    assert alike["g4"] == alike["other"] == 0
    assert "4 of 6 groups differ" in table.attrs["summary"] and "similar effects: 2" in table.attrs["summary"]
    assert table["e_distance"].is_monotonic_decreasing


def test_a_target_that_controls_hardly_express_has_no_knockdown():
    data = screens.screen(n=30, contexts=("T",), perturbations=("g0", "g1"))
    counts, control = data.X.toarray(), (data.obs["perturbation"] == "control").to_numpy()
    counts[control, 1] = 0
    counts[control.argmax(), 1] = 9
    counts[control, 0] = 2
    data.X = counts
    table = screen_effects(data).set_index("perturbation")["knockdown"]
    assert np.isfinite(table["g0"]) and np.isnan(table["g1"])
