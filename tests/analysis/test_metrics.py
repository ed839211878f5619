"""Metrics: parity with scipy, sklearn and scanpy, naive loops, properties, honest tables."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import sparse, stats

from cellop_nb.analysis import formulas
from cellop_nb.analysis.baselines import BASELINES, Prediction, Screen, run
from cellop_nb.analysis.formulas import Undefined
from cellop_nb.analysis.metrics import evaluate, score_contexts, score_holdout, score_split
from cellop_nb.analysis.scores import CEILING, FLOOR, METRICS, Truth, differential, noise, score
from cellop_nb.analysis.space import EvaluationSpace, evaluation_genes, log1p_cp10k
from cellop_nb.errors import DataError, HoldoutError, LabelError

RNG = np.random.default_rng(0)
PROFILE = arrays(float, 12, elements=st.floats(0, 6, width=32))


def profiles(n=3, genes=40, seed=0):
    return np.random.default_rng(seed).gamma(1.0, 1.0, size=(n, genes))


def screen(n=60, genes=30, contexts=("B", "NK", "T"), perturbations=("ifn",), seed=0):
    """Poisson counts; every perturbation lifts its own third of the genes in all contexts."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(2.0, 1.5, size=genes)
    counts, obs = [], []
    for context in contexts:
        own = rate * rng.uniform(0.7, 1.4, size=genes)
        for number, name in enumerate(("control", *perturbations)):
            lift = np.ones(genes)
            if number:
                lift[np.random.default_rng(number).permutation(genes)[: genes // 3]] = 4.0
            counts.append(rng.poisson(own * lift, size=(n, genes)))
            obs += [(context, name)] * n
    table = pd.DataFrame(
        obs, columns=["cell_type", "perturbation"], index=[f"cell{i}" for i in range(len(obs))]
    )
    var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    return ad.AnnData(sparse.csr_matrix(np.concatenate(counts).astype(np.float32)), obs=table, var=var)


def rows(table, metric, method):
    return table[(table["metric"] == metric) & (table["method"] == method)]


# --- formulas against other people's code ---


def test_correlations_match_scipy():
    predicted, real, control = profiles()
    expected = stats.pearsonr(predicted - control, real - control)[0]
    assert formulas.pearson_delta(predicted, real, control) == pytest.approx(expected)
    top = [3, 5, 8, 13]
    expected = stats.pearsonr((predicted - control)[top], (real - control)[top])[0]
    assert formulas.pearson_delta(predicted, real, control, top) == pytest.approx(expected)
    assert formulas.squared_pearson(predicted, real) == pytest.approx(stats.pearsonr(predicted, real)[0] ** 2)


def test_errors_match_sklearn():
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    predicted, real, control = profiles()
    assert formulas.mae(predicted, real) == pytest.approx(mean_absolute_error(real, predicted))
    assert formulas.rmse(predicted, real) == pytest.approx(root_mean_squared_error(real, predicted))
    assert formulas.coefficient_of_determination(predicted, real) == pytest.approx(r2_score(real, predicted))
    top = sorted(range(40), key=lambda g: -control[g])[:7]
    expected = sum((predicted[g] - real[g]) ** 2 for g in top) ** 0.5
    assert formulas.l2_top_expressed(predicted, real, control, 7) == pytest.approx(expected)


def test_e_distance_equals_the_double_loop():
    x, y = RNG.normal(size=(7, 3)), RNG.normal(1, 1, size=(9, 3))

    def mean(a, b, same=False):
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not same or i != j]
        return np.mean([np.sqrt(((p - q) ** 2).sum()) for p, q in pairs])

    expected = 2 * mean(x, y) - mean(x, x, True) - mean(y, y, True)
    assert formulas.e_distance(x, y) == pytest.approx(expected)
    with pytest.raises(Undefined, match="two cells a side"):
        formulas.e_distance(x[:1], y)


def test_fold_change_metrics_match_scipy_and_loops():
    predicted, real = RNG.normal(size=(2, 50))
    significant = RNG.random(50) < 0.4
    expected = stats.spearmanr(predicted[significant], real[significant])[0]
    assert formulas.lfc_spearman(predicted, real, significant) == pytest.approx(expected)
    same = [predicted[g] * real[g] > 0 for g in range(50) if significant[g]]
    assert formulas.direction_match(predicted, real, significant) == pytest.approx(np.mean(same))


def test_gene_sets_by_hand():
    real = np.array([5.0, -4.0, 3.0, 2.0, 0.1, 0.0])
    real_mask = np.array([1, 1, 1, 0, 0, 0], dtype=bool)
    guess = np.array([1.0, -9.0, 0.1, 8.0, 7.0, 0.0])
    guess_mask = np.array([1, 1, 0, 1, 1, 0], dtype=bool)  # by size: 1, 3, 4, 0
    assert formulas.precision_at_k(guess, guess_mask, real, real_mask, k=2) == 0.5  # {1, 3} and {0, 1}
    assert formulas.precision_at_k(guess, guess_mask, real, real_mask, k=None) == 0.5  # {1, 3, 4, 0}
    assert formulas.de_score(guess, guess_mask, real, real_mask) == pytest.approx(1 / 3)  # {1, 3, 4}
    nothing = np.zeros(6, dtype=bool)
    assert formulas.precision_at_k(guess, nothing, real, real_mask) == 0.0
    for metric in (formulas.precision_at_k, formulas.de_score):
        with pytest.raises(Undefined, match="no gene is differential"):
            metric(guess, guess_mask, real, nothing)


def test_discrimination_matches_a_naive_ranking():
    real, predicted = RNG.normal(size=(2, 9, 6))
    left_out = [[p % 6] for p in range(9)]
    for p, value in enumerate(formulas.perturbation_discrimination(predicted, real, left_out)):
        kept = [g for g in range(6) if g != p % 6]
        order = np.argsort([np.abs(real[q, kept] - predicted[p, kept]).sum() for q in range(9)])
        assert value == pytest.approx(1 - list(order).index(p) / 9)
    assert (formulas.perturbation_discrimination(real, real) == 1).all()
    same = np.ones((9, 6))
    assert (formulas.perturbation_discrimination(same, same) <= 1 / 9 + 1e-12).all(), "ties must not flatter"


def test_differential_matches_scipy_and_scanpy():
    import scanpy as sc

    rates = RNG.gamma(1, 2, 12), 1.0
    cells, control = (log1p_cp10k(RNG.poisson(rate, size=(30, 12))) for rate in rates)
    found = differential(cells, control)
    p = [
        stats.mannwhitneyu(cells[:, g], control[:, g], use_continuity=False, method="asymptotic")[1]
        for g in range(12)
    ]
    np.testing.assert_allclose(found["p"], p, rtol=1e-5)
    np.testing.assert_allclose(found["fdr"], stats.false_discovery_control(p), rtol=1e-5)
    both = ad.AnnData(np.concatenate([cells, control]))
    both.obs["side"] = pd.Categorical(["a"] * 30 + ["b"] * 30)
    sc.tl.rank_genes_groups(both, "side", groups=["a"], reference="b", method="wilcoxon")
    lfc = sc.get.rank_genes_groups_df(both, "a").set_index("names")["logfoldchanges"]
    np.testing.assert_allclose(found["lfc"], lfc.loc[[str(g) for g in range(12)]], atol=1e-3)


def test_spearman_brown_predicts_the_correlation_of_wholes():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=20000)
    noisy = signal + rng.normal(size=(4, 20000)) * 2
    half = np.corrcoef(noisy[0], noisy[1])[0, 1]
    whole = np.corrcoef(noisy[:2].mean(axis=0), noisy[2:].mean(axis=0))[0, 1]
    assert formulas.spearman_brown(half) == pytest.approx(whole, abs=0.02)


def test_counts_metrics():
    real, guess = sparse.csr_matrix([[0, 2.0], [4.0, 2.0]]), np.array([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    assert formulas.library_ratio(guess, real) == pytest.approx(2 / 4)
    assert formulas.zero_fraction_difference(guess, real) == pytest.approx(0.5 - 0.25)


# --- properties ---


@given(PROFILE, PROFILE, PROFILE, st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_pearson_delta_ignores_scale_and_stays_in_range(predicted, real, control, scale):
    if np.ptp(real - control) < 1e-3 or 0 < np.ptp(predicted - control) < 1e-3:
        return
    value = formulas.pearson_delta(predicted, real, control)
    assert -1 <= value <= 1
    scaled = control + (predicted - control) * scale
    assert formulas.pearson_delta(scaled, real, control) == pytest.approx(value, abs=1e-6)
    assert formulas.pearson_delta(real, real, control) == pytest.approx(1)


@given(PROFILE, PROFILE)
@settings(max_examples=40, deadline=None)
def test_errors_are_symmetric_and_zero_only_at_the_truth(x, y):
    for error in (formulas.mae, formulas.rmse):
        assert error(x, y) == error(y, x) >= 0
        assert error(x, x) == 0
    assert formulas.mae(x, y) <= formulas.rmse(x, y) + 1e-12


def test_no_change_scores_zero_and_a_constant_truth_is_undefined():
    control, real, _ = profiles()
    assert formulas.pearson_delta(control, real, control) == 0.0
    with pytest.raises(Undefined, match="constant"):
        formulas.pearson_delta(real, control, control)


# --- the evaluation space ---


def test_log1p_cp10k_matches_scanpy_and_leaves_empty_cells_at_zero():
    import scanpy as sc

    data = screen()
    found = log1p_cp10k(data.X)
    sc.pp.normalize_total(data, target_sum=1e4)
    sc.pp.log1p(data)
    np.testing.assert_allclose(found, data.X.toarray(), rtol=1e-5)
    assert (log1p_cp10k(np.zeros((2, 3))) == 0).all()


def test_components_come_from_training_cells_only_and_keep_the_gene_order():
    data = screen()
    training = data[data.obs["cell_type"] != "T"]
    genes = list(data.var_names[::-1][:15])
    space = EvaluationSpace.fit(training, genes=genes, n_components=5)
    cells = space.transform(space.select(training))
    np.testing.assert_allclose(cells, log1p_cp10k(training[:, genes].X), rtol=1e-6)
    points = space.project(cells)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-5)
    values, vectors = np.linalg.eigh(np.cov(cells.T.astype(float)))
    np.testing.assert_allclose(np.abs(space.components @ vectors[:, ::-1][:, :5]), np.eye(5), atol=1e-4)
    np.testing.assert_allclose(points.var(axis=0, ddof=1), values[::-1][:5], rtol=1e-4)


def test_space_refuses_other_genes():
    data = screen()
    space = EvaluationSpace.fit(data)
    with pytest.raises(LabelError, match="1 missing, first .*did you mean"):
        space.select(data[:, :-1])
    with pytest.raises(DataError, match="counts of 30 genes"):
        space.transform(data.X[:, :3])
    with pytest.raises(DataError, match="at least 3 training cells"):
        EvaluationSpace.fit(data[:2])


# --- tables ---


@pytest.fixture(scope="module")
def table():
    return score_holdout(screen(), context="T", perturbation="ifn")


def test_table_is_tidy_and_complete(table):
    assert list(table) == ["context", "perturbation", "group", "method", "metric", "value", "reason"]
    assert not table.duplicated(["group", "method", "metric"]).any()
    for method in BASELINES:
        assert set(table.loc[table["method"] == method, "metric"]) == {*METRICS, "discrimination"}
    assert (table["value"].isna() == (table["reason"] != "")).all()
    assert set(table["group"]) == {"T, ifn"}


def test_methods_stand_in_the_order_that_they_must(table):
    value = table.set_index(["metric", "method"])["value"]
    floor = value["e_distance", FLOOR]
    assert abs(floor) < 0.2 * value["e_distance", "no change"]
    assert value["e_distance", "mean shift"] < 0.3 * value["e_distance", "no change"]
    assert value["pearson_delta", "no change"] == 0 and value["pearson_delta", "mean shift"] > 0.8
    assert value["pearson_delta", "mean shift"] <= value["pearson_delta", CEILING] <= 1
    assert value["mae", FLOOR] < value["mae", "mean shift"]


def test_what_cannot_be_known_has_a_reason(table):
    assert "mean only" in rows(table, "e_distance", "control mean")["reason"].item()
    assert "not a combination" in rows(table, "mae", "additive")["reason"].item()
    assert "predicts none" in rows(table, "library_ratio", "mean shift")["reason"].item()
    assert "below 20" in rows(table, "discrimination", "mean shift")["reason"].item()


def test_same_seed_same_table(table):
    pd.testing.assert_frame_equal(table, score_holdout(screen(), context="T", perturbation="ifn"))


def test_held_out_cells_reach_neither_genes_nor_components():
    data = screen()
    loud = data.copy()
    held = ((loud.obs["cell_type"] == "T") & (loud.obs["perturbation"] == "ifn")).to_numpy()
    loud.X = sparse.csr_matrix(np.where(held[:, None], 50.0, loud.X.toarray()).astype(np.float32))
    seen = []

    def spy(training, target):
        seen.append((target.space, training.cells))
        return run("spy", BASELINES["mean shift"], training, target)

    for version in (data, loud):
        score_holdout(version, {"spy": spy}, context="T", perturbation="ifn", metrics=["mae"])
    np.testing.assert_array_equal(seen[0][0].genes, seen[1][0].genes)
    np.testing.assert_array_equal(seen[0][0].components, seen[1][0].components)
    np.testing.assert_array_equal(seen[0][1], seen[1][1])


def test_evaluate_agrees_with_the_same_cells_scored_in_a_holdout():
    data = screen()
    held = ((data.obs["cell_type"] == "T") & (data.obs["perturbation"] == "ifn")).to_numpy()
    training, real = data[~held], data[held]
    control = data[((data.obs["cell_type"] == "T") & (data.obs["perturbation"] == "control")).to_numpy()]
    space = EvaluationSpace.fit(training)
    predicted = control.copy()
    predicted.obs["perturbation"] = "ifn"
    table = evaluate(predicted, real, control, space=space, metrics=["e_distance", "mae"], method="no change")
    other = score_split(
        training, real, {"no change": BASELINES["no change"]}, space=space, metrics=["e_distance", "mae"]
    )
    pd.testing.assert_frame_equal(table, other)
    perfect = evaluate(real, real, control, space=space).set_index(["metric", "method"])["value"]
    assert perfect["mae", "prediction"] == 0 and perfect["library_ratio", "prediction"] == 1
    assert perfect["pearson_delta", "prediction"] == pytest.approx(1)
    assert perfect["de_score", "prediction"] == perfect["direction_match", "prediction"] == 1


def test_a_group_without_prediction_stays_in_the_table():
    data = screen(perturbations=("ifn", "tnf"), contexts=("T",))
    label = data.obs["perturbation"]
    control, real = data[(label == "control").to_numpy()], data[(label != "control").to_numpy()]
    predicted = data[(label == "ifn").to_numpy()]
    table = evaluate(predicted, real, control, space=EvaluationSpace.fit(data), metrics=["mae"])
    missing = table[(table["perturbation"] == "tnf") & (table["method"] == "prediction")]
    assert missing["value"].isna().all() and "no predicted cells" in missing["reason"].item()


def test_discrimination_with_enough_perturbations():
    names = tuple(f"p{i}" for i in range(21))
    data = screen(n=12, genes=60, contexts=("T",), perturbations=names)
    label = data.obs["perturbation"]
    control, real = data[(label == "control").to_numpy()], data[(label != "control").to_numpy()]
    space = EvaluationSpace.fit(data, n_components=3)
    table = evaluate(real, real, control, space=space, metrics=["discrimination"])
    assert len(table) == 21 and (table["value"] == 1).all()


def test_refusals():
    data = screen()
    with pytest.raises(HoldoutError, match="0 cells of 'ifb' in 'T'"):
        score_holdout(data, context="T", perturbation="ifb")
    with pytest.raises(HoldoutError, match="perturbed group"):
        score_holdout(data, context="T", perturbation="control")
    with pytest.raises(HoldoutError, match="cells in both"):
        score_split(data, data[:5])
    with pytest.raises(LabelError, match="did you mean 'pearson_delta'"):
        score_holdout(data, context="T", perturbation="ifn", metrics=["pearson_dleta"])
    with pytest.raises(HoldoutError, match="at least one group"):
        evaluate(data[:60], data[60:120], data[:60], space=EvaluationSpace.fit(data))
    with pytest.raises(HoldoutError, match="two contexts"):
        score_contexts(data[data.obs["cell_type"] == "T"], perturbation="ifn")
    held = ((data.obs["cell_type"] == "T") & (data.obs["perturbation"] == "ifn")).to_numpy()
    bare = data[(data.obs["cell_type"] != "T").to_numpy()]
    with pytest.raises(HoldoutError, match="0 training control cells in 'T'"):
        score_split(bare, data[held])


def test_floor_of_the_truth_against_itself_shrinks_with_cells():
    floors = []
    for n in (40, 400):
        data = screen(n=n, contexts=("T",))
        cells = log1p_cp10k(data.X)
        space = EvaluationSpace.fit(data)
        found = noise(Truth(cells[n:], cells[:n], space), ["e_distance", "rmse"])
        floors.append({row["metric"]: row["value"] for row in found})
    assert floors[1]["rmse"] == pytest.approx(floors[0]["rmse"] / np.sqrt(10), rel=0.3)
    assert abs(floors[1]["e_distance"]) < 0.2


def test_floor_of_errors_is_what_a_prediction_of_the_true_mean_scores():
    rng = np.random.default_rng(0)
    control, real = rng.normal(size=(2, 100, 300))
    space = EvaluationSpace(np.arange(300).astype(str), np.zeros(300), np.eye(300)[:5], 100)
    floor = {
        row["metric"]: row["value"] for row in noise(Truth(real, control, space), ["rmse", "l2_top1000"])
    }
    assert floor["rmse"] == pytest.approx(1 / np.sqrt(100), rel=0.1)
    assert floor["rmse"] == pytest.approx(formulas.rmse(np.zeros(300), real.mean(axis=0)), rel=0.15)
    assert floor["l2_top1000"] == pytest.approx(floor["rmse"] * np.sqrt(300))


def test_method_that_fails_is_not_hidden():
    def broken(training, target):
        raise ZeroDivisionError("a bug, not a refusal")

    with pytest.raises(ZeroDivisionError):
        score_holdout(screen(), {"broken": broken}, context="T", perturbation="ifn")


def test_mean_only_prediction_has_its_mean_metrics():
    data = screen(contexts=("T",))
    cells = log1p_cp10k(data.X)
    truth = Truth(cells[60:], cells[:60], EvaluationSpace.fit(data))
    flat = score(Prediction("flat", truth.mean), truth, ["mae", "e_distance"])
    found = pd.DataFrame(flat).set_index("metric")
    assert found.loc["mae", "value"] == 0 and np.isnan(found.loc["e_distance", "value"])
    assert Screen.of(data, cells).measured() == [("T", "ifn")]


# --- the numbers that earlier prototypes were scored by ---

PUBLISHED = {
    "no change": (8.9, 22.2, 6.1, 4.6, 12.6, 13.8, 6.0),
    "mean shift": (1.96, 10.3, 2.47, 3.39, 1.98, 2.55, 2.87),
}


def test_known_scores_of_held_out_cell_types(kang_file):
    data = ad.read_h5ad(kang_file)
    genes = evaluation_genes(
        data, 1000
    )  # over all cells, as those numbers were made; real use chooses on training cells
    data = data[data.obs["cell_type"] != "Mk"].copy()
    methods = {name: BASELINES[name] for name in PUBLISHED}
    found = score_contexts(
        data, methods, perturbation="IFNb", genes=genes, metrics=["e_distance", "pearson_delta"]
    )
    for method, expected in PUBLISHED.items():
        np.testing.assert_allclose(rows(found, "e_distance", method)["value"], expected, rtol=0.05)
    assert rows(found, "e_distance", "no change")["value"].mean() == pytest.approx(10.6, abs=0.1)
    assert rows(found, "e_distance", "mean shift")["value"].mean() == pytest.approx(3.65, abs=0.04)
    assert rows(found, "pearson_delta", "mean shift")["value"].mean() == pytest.approx(0.803, abs=0.002)
