"""Metrics: parity with scipy, sklearn and scanpy, naive loops, properties, honest tables."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist, pdist
from scipy.stats import false_discovery_control, mannwhitneyu, spearmanr
from sklearn.metrics import r2_score

from cellop_nb.analysis import metrics as formulas
from cellop_nb.analysis.baselines import BASELINES, Prediction, Training
from cellop_nb.analysis.metrics import EvaluationSpace, log1p_cp10k
from cellop_nb.analysis.scores import CEILING, FLOOR, METRICS, Truth, evaluate, noise, score
from cellop_nb.data.contract import Keys
from cellop_nb.data.genes import select_genes
from cellop_nb.errors import HoldoutError, LabelError

from .screens import rows_of, scored, screen

IFN_IN_T = {"cell_type": "T", "perturbation": "ifn"}


def rows(table, metric, method):
    return table[(table["metric"] == metric) & (table["method"] == method)]


@pytest.fixture(scope="module")
def table():
    data = screen()
    return scored(data, rows_of(data, **IFN_IN_T))


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
    assert "predicts none" in rows(table, "counts_ratio", "mean shift")["reason"].item()
    assert "below 20" in rows(table, "discrimination", "mean shift")["reason"].item()


def test_every_metric_is_what_its_name_says():
    """One group by scipy and loops. What might be mixed up differs: controls, shared shift, library, groups' sizes."""
    rng, n_genes = np.random.default_rng(0), 40
    control = rng.gamma(2.0, 0.3, (60, n_genes)).astype(np.float32)
    change = np.where(np.arange(n_genes) < 14, rng.choice([-0.35, 0.7], n_genes), 0.0)
    real = np.maximum(rng.gamma(2.0, 0.3, (50, n_genes)) + change, 0.001).astype(np.float32)
    guess = np.maximum(rng.gamma(2.0, 0.33, (45, n_genes)) + 0.5 * change[::-1] + 0.5 * change, 0.001)
    guess, shared = guess.astype(np.float32), rng.normal(0, 0.3, n_genes)
    counts = {name: rng.poisson(1.5, cells.shape) for name, cells in (("real", real), ("guess", guess))}
    library = {name: rng.integers(100, 200, len(cells)) for name, cells in (("real", real), ("guess", guess))}
    axes = np.linalg.qr(rng.normal(size=(n_genes, 5)))[0].T
    space = EvaluationSpace(np.arange(n_genes).astype(str), rng.normal(size=n_genes), axes, 99)
    truth = Truth(real, control, space, counts=counts["real"], library=library["real"], shared_shift=shared)
    prediction = Prediction.of_cells("guess", guess, counts["guess"], library["guess"])
    value = {row["metric"]: row["value"] for row in score(prediction, truth)}

    m, p, c = (cells.mean(0, dtype=np.float64) for cells in (real, guess, control))
    tests = [
        mannwhitneyu(cells, control, use_continuity=False, method="asymptotic") for cells in (real, guess)
    ]
    sig, sig_p = (false_discovery_control(test.pvalue) < 0.05 for test in tests)
    top = np.argsort(-np.abs(tests[0].statistic - len(real) * len(control) / 2))
    lfc, lfc_p = (np.log2((np.expm1(mean) + 1e-9) / (np.expm1(c) + 1e-9)) for mean in (m, p))
    ranked, ranked_p = (
        [gene for gene in np.argsort(-np.abs(change)) if chosen[gene]]
        for change, chosen in ((lfc, sig), (lfc_p, sig_p))
    )

    def energy(x, y):
        x, y = ((cells.astype(np.float64) - space.centre) @ axes.T for cells in (x, y))
        return 2 * cdist(x, y).mean() - sum(pdist(cells).mean() for cells in (x, y))

    def correlation(x, y):
        return np.corrcoef(x, y)[0, 1]

    assert 3 <= sig.sum() < n_genes and 0 < sig_p.sum() != sig.sum() and (sig != sig_p).any()
    expected = {
        "e_distance": energy(guess, real),
        "e_distance_centred": energy(guess - p + m, real),
        "pearson_delta": correlation(p - c, m - c),
        "pearson_delta_de20": correlation((p - c)[top[:20]], (m - c)[top[:20]]),
        "pearson_delta_de100": correlation(p - c, m - c),
        "pearson_systema": correlation(p - c - shared, m - c - shared),
        "mae": np.mean(np.abs(p - m)),
        "rmse": np.mean((p - m) ** 2) ** 0.5,
        "l2_top1000": np.sum((p - m) ** 2) ** 0.5,
        "r2_determination": r2_score(m, p),
        "r2_pearson_squared": correlation(p, m) ** 2,
        "direction_match": np.mean([np.sign(lfc[g]) == np.sign(lfc_p[g]) for g in np.flatnonzero(sig)]),
        "lfc_spearman": spearmanr(lfc[sig], lfc_p[sig]).statistic,
        "precision_at_50": len({*ranked} & {*ranked_p}) / len(ranked_p),
        "de_score": len({*ranked} & {*ranked_p[: len(ranked)]}) / len(ranked),
        "library_ratio": library["guess"].mean() / library["real"].mean(),
        "counts_ratio": counts["guess"].sum(1).mean() / counts["real"].sum(1).mean(),
        "zero_fraction_difference": (counts["guess"] == 0).mean() - (counts["real"] == 0).mean(),
    }
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_same_seed_same_table(table):
    data = screen()
    pd.testing.assert_frame_equal(table, scored(data, rows_of(data, **IFN_IN_T)))


def test_evaluate_agrees_with_the_same_cells_scored_in_a_holdout():
    data = screen()
    held = rows_of(data, **IFN_IN_T)
    training, real = data[~held], data[held]
    control = data[rows_of(data, cell_type="T", perturbation="control")]
    space = EvaluationSpace.fit(training)
    predicted = control.copy()
    predicted.obs["perturbation"] = "ifn"
    table = evaluate(predicted, real, control, space=space, metrics=["e_distance", "mae"], method="no change")
    other = scored(data, held, {"no change": BASELINES["no change"]}, metrics=["e_distance", "mae"])
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
    with pytest.raises(LabelError, match="did you mean 'pearson_delta'"):
        scored(data, rows_of(data, **IFN_IN_T), metrics=["pearson_dleta"])
    with pytest.raises(HoldoutError, match="at least one group"):
        evaluate(data[:60], data[60:120], data[:60], space=EvaluationSpace.fit(data))
    bare = data[rows_of(data, **IFN_IN_T)][:1]
    with pytest.raises(HoldoutError, match="at least 2 real and 2 control cells.*1 real"):
        evaluate(bare, bare, data[rows_of(data, perturbation="control")], space=EvaluationSpace.fit(data))
    unlabelled = data.copy()
    del unlabelled.uns["cellop_nb"]
    with pytest.raises(LabelError, match="setup"):
        evaluate(unlabelled, unlabelled, unlabelled, space=EvaluationSpace.fit(data))


def test_floor_of_the_truth_against_itself_shrinks_with_cells():
    floors = []
    for n in (40, 400):
        data = screen(n=n, contexts=("T",))
        cells = log1p_cp10k(data.X.toarray())
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
        data = screen()
        scored(data, rows_of(data, **IFN_IN_T), {"broken": broken})


def test_mean_only_prediction_has_its_mean_metrics():
    data = screen(contexts=("T",))
    cells = log1p_cp10k(data.X.toarray())
    truth = Truth(cells[60:], cells[:60], EvaluationSpace.fit(data))
    flat = score(Prediction("flat", truth.mean), truth, ["mae", "e_distance"])
    found = pd.DataFrame(flat).set_index("metric")
    assert found.loc["mae", "value"] == 0 and np.isnan(found.loc["e_distance", "value"])
    assert Training.of(data, EvaluationSpace.fit(data)).groups.pairs == [("T", "ifn")]


# --- the numbers that earlier prototypes were scored by ---

PUBLISHED = {
    "no change": (8.9, 22.2, 6.1, 4.6, 12.6, 13.8, 6.0),
    "mean shift": (1.96, 10.3, 2.47, 3.39, 1.98, 2.55, 2.87),
}


def test_known_scores_of_held_out_cell_types(kang_file):
    data = ad.read_h5ad(kang_file)
    Keys().write(data)
    # over all cells, as those numbers were made; real use chooses on training cells
    genes = select_genes(data, 1000, flavor="seurat", min_cells=10, split=None)
    data = data[data.obs["cell_type"] != "Mk"].copy()
    methods = {name: BASELINES[name] for name in PUBLISHED}
    options = {"genes": genes, "metrics": ["e_distance", "pearson_delta"]}
    table = pd.concat(
        scored(data, rows_of(data, cell_type=context, perturbation="IFNb"), methods, **options)
        for context in sorted(data.obs["cell_type"].unique())
    )
    for method, expected in PUBLISHED.items():
        np.testing.assert_allclose(rows(table, "e_distance", method)["value"], expected, rtol=0.05)
    assert rows(table, "e_distance", "no change")["value"].mean() == pytest.approx(10.6, abs=0.1)
    assert rows(table, "e_distance", "mean shift")["value"].mean() == pytest.approx(3.65, abs=0.04)
    assert rows(table, "pearson_delta", "mean shift")["value"].mean() == pytest.approx(0.803, abs=0.002)
