"""A hold-out is fit, predict and score: it leaks nothing, says what it refuses, and scores every method alike."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from cellop_nb import CellOp, datasets, holdout, score, select_genes, setup
from cellop_nb.analysis import holdout as room
from cellop_nb.analysis.baselines import BASELINES, Prediction
from cellop_nb.analysis.holdout import (
    AFFINE,
    CELLOP,
    LATENT_SHIFT,
    Holdout,
    questions_of,
)
from cellop_nb.analysis.scores import CEILING, FLOOR
from cellop_nb.analysis.uncertainty import STAGES, error_advice, error_budget
from cellop_nb.data.contract import Keys
from cellop_nb.errors import HoldoutError, LabelError, ModelError

from .screens import rows_of, screen, tiny
from .test_cellop import Client, same

METRICS = ["e_distance", "pearson_delta", "library_ratio"]


@pytest.fixture(scope="module")
def data():
    """Three contexts with two drugs and their combination, three donors, over 50 genes."""
    return datasets.synthetic(
        n_contexts=3, n_perturbations=2, combinations=1, n_cells=30, n_genes=50, n_latent=4, seed=4
    )


@pytest.fixture(scope="module")
def result(data):
    return holdout(tiny(data, n_genes=40), metrics=METRICS, progress=False)


def value(result, metric, method, group=None):
    rows = result.scores[(result.scores["metric"] == metric) & (result.scores["method"] == method)]
    rows = rows if group is None else rows[rows["group"] == group]
    return rows["value"].mean()


def perturbed(adata, context):
    return rows_of(adata, cell_type=context) & (adata.obs["perturbation"] != "control").to_numpy()


# -- what is predicted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_genes", [40, None])
def test_a_prediction_is_that_of_a_model_fitted_without_those_cells(data, result, n_genes):
    """Bit for bit, also where the questions share a VAE of the controls."""
    if n_genes is None:
        result = holdout(tiny(data, n_genes=None), only=["type B", "type C"], metrics=["mae"], progress=False)
    for context in ("type B", "type C"):
        alone = tiny(data[~perturbed(data, context)].copy(), n_genes=n_genes).fit(progress=False)
        for name in ("drug 1", "drug 2", "drug 1+drug 2"):
            expected = alone.predict(context=context, perturbation=name)
            received = result.predictions[rows_of(result.predictions, question=context, perturbation=name)]
            assert same(received, expected), (context, name)
        choice = result.choices[result.choices["question"] == context].reset_index(drop=True)
        pd.testing.assert_frame_equal(choice[["estimator", "left", "weight"]], alone.choice.table)


def test_every_group_has_every_method_beside_the_noise(result, data):
    assert not len(result.refused)
    assert set(result.scores["question"]) == {"type A", "type B", "type C"}
    methods = set(result.scores["method"])
    assert {*BASELINES, LATENT_SHIFT, AFFINE, CELLOP, FLOOR, CEILING} == methods
    assert len(result.scores.drop_duplicates("group")) == 9
    assert not result.scores.duplicated(["group", "method", "metric", "seed"]).any()
    bare = result.scores["value"].isna()
    assert (result.scores.loc[bare, "reason"] != "").all()
    finite = result.scores[(result.scores["method"] == CELLOP) & (result.scores["metric"] == "e_distance")]
    assert np.isfinite(finite["value"]).all()


def test_predictions_are_cells_with_names_and_sources(result, data):
    cells = result.predictions
    assert list(cells.var_names) == list(data.var_names) and (cells.obs["seed"] == 0).all()
    assert set(cells.obs["source_cell"]) <= set(data.obs_names[data.obs["perturbation"] == "control"])
    assert (cells.X.data == np.round(cells.X.data)).all() and cells.obs_names.is_unique


def test_the_table_is_a_row_per_group_and_method(result):
    table = result.table
    first = ["question", "context", "perturbation", "group", "method", "seed"]
    assert list(table) == [*first, *METRICS] and not table.duplicated(["group", "method", "seed"]).any()
    row = table[(table["group"] == "type B, drug 1") & (table["method"] == CELLOP)]
    assert row["e_distance"].item() == value(result, "e_distance", CELLOP, "type B, drug 1")
    assert "<table" in result._repr_html_()


def test_a_method_by_ones_own_stands_beside_the_others(data):
    def double(training, target):
        shift = training.measured(target).change.mean(0)
        return Prediction.of_cells("anything", target.control + 2 * shift)

    own = {"double shift": double}
    options = {"only": ["type B"], "methods": own, "metrics": ["pearson_delta"], "progress": False}
    table = holdout(tiny(data), **options).table
    wide = table.pivot_table(index="group", columns="method", values="pearson_delta")
    np.testing.assert_allclose(wide["double shift"], wide["mean shift"])
    with pytest.raises(LabelError, match="no other method of the table.*'mean shift'"):
        holdout(tiny(data), methods={"mean shift": double})
    with pytest.raises(HoldoutError, match="a Prediction from 'mine'.*ndarray"):
        holdout(
            tiny(data), only=["type B"], methods={"mine": lambda t, target: target.control}, progress=False
        )


def test_one_name_is_a_list_of_one(data):
    one, several = (
        holdout(tiny(data), only=name, metrics=metric, progress=False).scores
        for name, metric in (("type B", "mae"), (["type B"], ["mae"]))
    )
    pd.testing.assert_frame_equal(one, several)


def test_a_suite_stands_beside_our_metrics(data, monkeypatch):
    pytest.importorskip(
        "cell_eval2", reason="cell-eval2 is not installed: pip install 'cellop_nb[evaluation]'"
    )
    seen = []

    def suite(cells, real, *, context):
        seen.append((set(cells.obs["perturbation"]), set(real.obs["perturbation"]), context))
        return pd.DataFrame([{"metric": "m", "value": 0.5, "reason": "", "raw": 2.0}])

    monkeypatch.setitem(room.SUITES, "vcc2026", suite)
    table = holdout(tiny(data), only=["type B"], metrics=["mae"], suite="vcc2026", progress=False).scores
    rows = table[table["metric"] == "vcc2026 m"]
    assert (
        rows["value"].tolist() == [0.5]
        and rows["method"].item() == CELLOP
        and rows["group"].item() == "type B"
    )
    drugs = {"drug 1", "drug 2", "drug 1+drug 2"}
    assert seen == [(drugs, drugs | {"control"}, "type B")]
    with pytest.raises(LabelError, match="a suite of.*did you mean 'vcc2026'"):
        holdout(tiny(data), suite="vcc2025")


def test_a_method_that_fails_is_not_hidden(data):
    def broken(training, target):
        raise ZeroDivisionError("a bug, not a refusal")

    with pytest.raises(ZeroDivisionError):
        holdout(tiny(data), only=["type B"], methods={"broken": broken}, progress=False)


def test_a_perfect_prediction_scores_about_the_ceiling():
    """Another sample of the same cells: as near as the real cells are to themselves, and no nearer."""
    whole = screen(n=120, contexts=("B", "NK", "T"))
    first = np.tile(np.arange(120) < 60, whole.n_obs // 120)
    data, replicate = whole[first].copy(), whole[~first]
    real = replicate[rows_of(replicate, cell_type="T", perturbation="ifn")]

    def perfect(training, target):
        return Prediction.of_counts("perfect", target.space.select(real), target.space)

    options = {"only": ["T"], "methods": {"perfect": perfect}, "progress": False}
    result = holdout(tiny(data), metrics=["e_distance", "pearson_delta", "mae"], **options)
    assert value(result, "pearson_delta", "perfect") == pytest.approx(
        value(result, "pearson_delta", CEILING), abs=0.02
    )
    assert abs(value(result, "e_distance", "perfect")) < 0.1 * value(result, "e_distance", "no change")
    assert value(result, "mae", "perfect") == pytest.approx(2**0.5 * value(result, "mae", FLOOR), rel=0.25)
    assert value(result, "e_distance", "mean shift") < 0.3 * value(result, "e_distance", "no change")


# -- nothing leaks --------------------------------------------------------------------------------------------------


def test_held_out_cells_change_nothing_that_is_fitted(data):
    """Another count in every held-out cell, and a gene that is loud there alone: the same genes, components, models."""
    held, quiet, loud = perturbed(data, "type B"), data.copy(), data.copy()
    dense = data.X.toarray()
    dense[held] = dense[np.random.default_rng(0).permutation(np.flatnonzero(held))]
    dense[np.flatnonzero(held)[::4], 1] = 6
    loud.X = sparse.csr_matrix(dense)
    chosen = [
        select_genes(version, 15, flavor="seurat", min_cells=10, split=None) for version in (quiet, loud)
    ]
    assert quiet.var_names[1] in chosen[1] and chosen[0] != chosen[1], "the plant is one that would be chosen"
    spaces, predictions, seen = [], [], []

    def spy(training, target):
        seen.append(training.cells)
        return BASELINES["mean shift"](training, target)

    for version in (quiet, loud):
        result = holdout(
            tiny(version, n_genes=15), only=["type B"], methods={"spy": spy}, metrics=["mae"], progress=False
        )
        spaces.append(result.fits[0].space)
        predictions.append(result.predictions)
    assert quiet.var_names[1] not in spaces[1].genes and len(spaces[1].genes) == 15
    np.testing.assert_array_equal(spaces[0].genes, spaces[1].genes)
    np.testing.assert_array_equal(spaces[0].components, spaces[1].components)
    np.testing.assert_array_equal(spaces[0].centre, spaces[1].centre)
    np.testing.assert_array_equal(seen[0], seen[-1])
    assert same(*predictions)


# -- what is asked --------------------------------------------------------------------------------------------------

PAIRS = {f"type {c}, {p}" for c in "ABC" for p in ("drug 1", "drug 2", "drug 1+drug 2")}


@pytest.mark.parametrize(
    ("over", "names"),
    [
        ("context", {"type A", "type B", "type C"}),
        ("cell_type", {"type A", "type B", "type C"}),
        ("donor", {"donor 1", "donor 2", "donor 3"}),
        ("group", PAIRS),
        ("combination", {"drug 1+drug 2"}),
    ],
)
def test_what_is_held_out(data, over, names):
    questions, refused = questions_of(data, over)
    assert {question.name for question in questions} == names and not refused
    control = (data.obs["perturbation"] == "control").to_numpy()
    for question in questions:
        assert question.left_out.any() and not (question.left_out & control).any()


def test_a_perturbation_is_held_out_with_its_combinations(data):
    questions, _ = questions_of(data, "perturbation", described=True)
    assert [question.name for question in questions] == ["drug 1", "drug 2"]
    left = data.obs["perturbation"][questions[0].left_out]
    assert set(left) == {"drug 1", "drug 1+drug 2"} and {p for _, p in questions[0].pairs} == {"drug 1"}
    with pytest.raises(HoldoutError, match="descriptors.*no features.*CellOp"):
        questions_of(data, "perturbation")


def test_contexts_of_two_columns_are_held_out(data):
    both = data.copy()
    Keys(context_key=("cell_type", "batch")).write(both)
    questions, _ = questions_of(both, "context")
    assert len(questions) == 6 and all(" | " in question.name for question in questions)
    alone = data.copy()
    Keys(context_key=None).write(alone)
    with pytest.raises(HoldoutError, match="no perturbed cells are left"):
        holdout(tiny(alone), progress=False)
    assert {question.name for question in questions_of(alone, "combination")[0]} == {"drug 1+drug 2"}


def test_a_column_is_predicted_from_the_controls_of_the_same_label(data):
    result = holdout(tiny(data), over="donor", only=["donor 2"], metrics=["e_distance"], progress=False)
    source = data.obs.loc[result.predictions.obs["source_cell"]]
    assert set(source["donor"]) == {"donor 2"} and set(result.scores["question"]) == {"donor 2"}
    real = result.fits[0].real.obs
    assert set(real["donor"]) == {"donor 2"} and (real["perturbation"] != "control").all()
    expected = (data.obs["donor"] == "donor 2") & (data.obs["perturbation"] != "control")
    assert len(real) == expected.sum()
    starts = result.fits[0].control.obs
    assert set(starts["donor"]) == {"donor 2"} and set(starts["perturbation"]) == {"control"}


@pytest.mark.parametrize("name", ["context", "group", "perturbation", "combination"])
def test_a_column_named_like_a_way_is_refused(data, name):
    renamed = data.copy()
    renamed.obs = renamed.obs.rename(columns={"perturbation": "condition"})
    renamed.obs[name] = "x"
    Keys(perturbation_key="condition").write(renamed)
    with pytest.raises(LabelError, match=f"rename the column.*{name}") as caught:
        questions_of(renamed, name, described=True)
    assert "To fix it" in str(caught.value)


def test_a_key_may_be_named_like_the_way_it_is(data):
    renamed = data.copy()
    renamed.obs = renamed.obs.rename(columns={"cell_type": "context"})
    Keys(context_key=("context",)).write(renamed)
    names = [question.name for question in questions_of(renamed, "context")[0]]
    assert names == ["type A", "type B", "type C"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"over": "doner"}, LabelError, "did you mean 'donor'"),
        ({"only": ["type D"]}, LabelError, "questions over 'context'.*'type D'.*type"),
        ({"n_seeds": 0}, ModelError, "n_seeds to be a whole number of at least 1.*n_seeds=0"),
        ({"metrics": ["pearson_dleta"]}, LabelError, "did you mean 'pearson_delta'"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused_with_advice(data, settings, error, message):
    with pytest.raises(error, match=message) as caught:
        holdout(tiny(data), **settings)
    assert "To fix it" in str(caught.value)


def untrainable(monkeypatch):
    """Any training fails: what is refused must be so before."""
    monkeypatch.setattr(room.CellOp, "fit", lambda *_, **__: pytest.fail("trained before it was refused"))


def test_questions_without_an_answer_are_refused_before_training(data, monkeypatch):
    untrainable(monkeypatch)
    one = data[rows_of(data, cell_type="type A")].copy()
    with pytest.raises(HoldoutError, match="type A: no perturbed cells are left for training"):
        holdout(tiny(one))
    own = {"type A": "drug 1", "type B": "drug 2", "type C": "control"}
    kept = [
        p in ("control", own[c]) for c, p in zip(data.obs["cell_type"], data.obs["perturbation"], strict=True)
    ]
    with pytest.raises(HoldoutError, match="none of its perturbations was measured elsewhere"):
        holdout(tiny(data[np.array(kept)].copy()))
    singles = data[data.obs["perturbation"] != "drug 1+drug 2"].copy()
    with pytest.raises(HoldoutError, match="something to hold out over 'combination'.*none"):
        holdout(tiny(singles), over="combination")
    few = data.copy()
    few = few[~(perturbed(few, "type A") & (np.arange(few.n_obs) % 3 > 0))].copy()
    small = few[~perturbed(few, "type A")].copy()
    some = data[rows_of(data, cell_type="type A", perturbation="drug 1")][:3]
    questions, refused = questions_of(ad.concat([small, some], uns_merge="first"), "context")
    assert {question.name for question in questions} == {"type B", "type C"}
    assert refused[0]["question"] == "type A" and "3 cells; 4 are needed" in refused[0]["reason"]


def test_a_small_group_beside_larger_ones_has_its_reason(data):
    small = rows_of(data, cell_type="type B", perturbation="drug 1")
    kept = ~small
    kept[np.flatnonzero(small)[:1]] = True
    result = holdout(tiny(data[kept].copy()), only=["type B"], metrics=["e_distance"], progress=False)
    rows = result.scores[result.scores["method"] == CELLOP].set_index("group")
    assert np.isfinite(rows.loc["type B, drug 2", "value"]) and np.isnan(rows.loc["type B, drug 1", "value"])
    assert rows.loc["type B, drug 1", "reason"].startswith("1 held-out cells")


def test_one_refused_answer_does_not_sink_the_others(data, monkeypatch):
    real = room._scored

    def sometimes(model, question, *rest):
        if question.name == "type B":
            raise HoldoutError("Expected luck. Found none. To fix it: try again.")
        return real(model, question, *rest)

    monkeypatch.setattr(room, "_scored", sometimes)
    result = holdout(tiny(data), only=["type A", "type B"], metrics=["mae"], progress=False)
    assert set(result.scores["question"]) == {"type A"}
    assert result.refused["question"].tolist() == ["type B"] and "luck" in result.refused["reason"].item()
    with pytest.raises(HoldoutError, match="luck"):
        holdout(tiny(data), only=["type B"], metrics=["mae"], progress=False)


# -- ragged screens, seeds, clusters --------------------------------------------------------------------------------


def test_means_of_a_ragged_screen_are_over_the_same_groups(data):
    """drug 2 was measured in type A alone: no other context tells it, and the table says which group is left out."""
    ragged = data[~(rows_of(data, perturbation="drug 2") & ~rows_of(data, cell_type="type A"))].copy()
    ragged = ragged[ragged.obs["perturbation"] != "drug 1+drug 2"].copy()
    result = holdout(tiny(ragged), metrics=["e_distance"], progress=False)
    wide = result.summary()
    last = wide.iloc[-1]
    assert wide.index[-1] == "mean of 3 groups" and len(wide) == 5
    assert wide.attrs["left_out"]["groups"] == ["type A, drug 2"]
    assert set(wide.attrs["left_out"]["methods"]) >= set() and "additive" not in last.dropna().index
    common = [f"type {c}, drug 1" for c in "ABC"]
    for method in last.dropna().index:
        assert last[method] == pytest.approx(wide.loc[common, method].mean()), method
    reasons = result.scores[(result.scores["group"] == "type A, drug 2") & result.scores["value"].isna()]
    assert (reasons["reason"] != "").all() and CELLOP in set(reasons["method"])


def made_up(**by_method):
    """A result of the groups a and b with these values."""
    rows = [
        (group, group, group, "p", group, name, "e_distance", pair[k], 0)
        for k, group in enumerate("ab")
        for name, pair in by_method.items()
    ]
    columns = ["question", "q", "context", "perturbation", "group", "method", "metric", "value", "seed"]
    return Holdout(pd.DataFrame(rows, columns=columns), ad.AnnData(), pd.DataFrame(), pd.DataFrame())


def test_a_method_of_few_groups_has_no_mean_and_takes_none_from_the_others():
    values = {CELLOP: (1.0, 3.0), "mean shift": (2.0, 4.0), "additive": (np.nan, np.nan)}
    wide = made_up(**values).summary()
    assert wide.loc["mean of 2 groups", CELLOP] == 2 and wide.loc["mean of 2 groups", "mean shift"] == 3
    with pytest.raises(LabelError, match="a metric of the table.*'e_dist'.*e_distance"):
        made_up(**values).summary("e_dist")


def test_groups_behind_their_best_baseline_are_reported():
    values = {
        CELLOP: (1.0, 0.55),
        "mean shift": (0.5, 0.5),
        "no change": (3.0, 3.0),
        FLOOR: (0.0, 0.0),
    }
    behind = made_up(**values).behind()
    assert behind["group"].tolist() == ["a"] and behind["best_baseline"].tolist() == ["mean shift"]
    assert behind["excess"].item() == pytest.approx(0.5)


def test_seeds_are_fits_of_their_own(data):
    options = {"only": ["type B"], "metrics": ["e_distance", "mae"], "progress": False}
    two = holdout(tiny(data), n_seeds=2, **options)
    again = holdout(tiny(data), n_seeds=2, **options)
    alone = holdout(tiny(data), seed=1, **options)
    pd.testing.assert_frame_equal(two.scores, again.scores)
    second = two.scores[two.scores["seed"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(second, alone.scores)
    assert [fit.seed for fit in two.fits] == [0, 1] and two.predictions.n_obs == 2 * alone.predictions.n_obs
    assert two.predictions.obs_names.is_unique
    wide = two.summary("mae")
    both = two.scores[(two.scores["metric"] == "mae") & (two.scores["method"] == CELLOP)]
    assert wide.loc["type B, drug 1", CELLOP] == pytest.approx(
        both[both["group"] == "type B, drug 1"]["value"].mean()
    )


def test_questions_are_shared_out_with_the_same_numbers(data, result):
    client = Client()
    there = holdout(tiny(data, n_genes=40), metrics=METRICS, client=client, progress=False)
    pd.testing.assert_frame_equal(there.scores, result.scores)
    assert same(there.predictions, result.predictions) and client.submitted == 3


# -- combinations, perturbations that were never measured, libraries ------------------------------------------------


def test_a_combination_has_every_baseline(data):
    result = holdout(tiny(data), over="combination", metrics=["pearson_delta"], progress=False)
    wide = result.summary("pearson_delta")
    for method in (CELLOP, "additive", "best single", "no change"):
        assert np.isfinite(wide[method]).all(), method
    assert set(result.predictions.obs["perturbation"]) == {"drug 1+drug 2"}
    reasons = result.scores[result.scores["method"] == "mean shift"]["reason"]
    assert reasons.str.contains("no other training context has both").all()


def test_a_perturbation_that_was_never_measured_is_predicted_from_its_features():
    data = datasets.synthetic(n_contexts=1, n_perturbations=4, n_cells=30, n_genes=50, seed=1)
    features = pd.DataFrame(np.eye(4)[:, :3] + 0.1, index=[f"drug {k + 1}" for k in range(4)])
    model = tiny(data, features=features)
    result = holdout(model, over="perturbation", only=["drug 2"], metrics=["pearson_delta"], progress=False)
    assert np.isfinite(value(result, "pearson_delta", CELLOP))
    assert set(result.predictions.obs["perturbation"]) == {"drug 2"}


@pytest.fixture(scope="module")
def grown():
    """Perturbed cells hold half as many counts again, in a loud gene that is no part of the table."""
    data = datasets.synthetic(n_perturbations=2, n_cells=60, n_genes=60, n_latent=4, library=200.0, seed=3)
    rng, counts = np.random.default_rng(0), data.X.toarray()
    total = np.where(data.obs["perturbation"] != "control", 1.5, 1.0) * 400
    data.obs["total_counts"] = np.maximum(rng.poisson(total), counts.sum(1)).astype(float)
    return data


def test_predicted_libraries_grow_as_planted(grown):
    metrics = ["library_ratio", "counts_ratio"]
    result = holdout(tiny(grown, n_genes=None), only=["type B"], metrics=metrics, progress=False)
    group = "type B, drug 1"
    assert value(result, "library_ratio", CELLOP, group) == pytest.approx(1, abs=0.07)
    for method in ("no change", LATENT_SHIFT):
        assert value(result, "library_ratio", method, group) == pytest.approx(1 / 1.5, abs=0.05)
    shift = result.scores[(result.scores["method"] == "mean shift") & (result.scores["group"] == group)]
    assert shift["reason"].str.contains("counts").all()
    predicted = result.predictions[rows_of(result.predictions, perturbation="drug 1")]
    table = score(predicted, grown, metrics=["library_ratio"])
    again = table[table["method"] == "prediction"]["value"].item()
    assert again == pytest.approx(value(result, "library_ratio", CELLOP, group))


def test_where_no_gene_was_left_out_the_counts_are_the_library(data):
    metrics = ["library_ratio", "counts_ratio"]
    result = holdout(tiny(data, n_genes=None), only=["type B"], metrics=metrics, progress=False)
    for method in ("no change", CELLOP):
        assert value(result, "library_ratio", method) == value(result, "counts_ratio", method)


# -- where the error sits -------------------------------------------------------------------------------------------


def test_the_budget_names_the_stages(result):
    budget = error_budget(result)
    assert list(budget["stage"]) == [*STAGES] * 9 and np.isfinite(budget["energy"]).all()
    first = budget[budget["group"] == "type B, drug 1"].set_index("stage")["energy"]
    assert first[CELLOP] == value(result, "e_distance", CELLOP, "type B, drug 1")
    assert len(error_advice(budget)) == 9


@pytest.mark.parametrize(
    ("energies", "sentence"),
    [
        ((0.0, 0.1, 0.1, 0.05, 5.0), "nothing to improve"),
        (
            (0.0, 0.1, 0.9, 1.0, 5.0),
            "takes off 80% of the distance. 90% of what is left remains when the true latents are decoded: if that",
        ),
        ((0.0, 0.1, 1.5, 1.0, 5.0), "no nearer (1.50) than the prediction (1.00), which keeps"),
        ((0.0, 0.1, 0.1, 1.0, 5.0), "90% of what is left comes from the operators and the plan"),
        ((0.0, 0.1, 0.1, 0.1, 0.02), "hardly an effect"),
    ],
)
def test_advice_says_what_the_numbers_say(energies, sentence):
    budget = pd.DataFrame({"group": "g", "stage": STAGES, "energy": energies})
    assert sentence in error_advice(budget)["advice"].iloc[0]


def donors_of_mixed_types(n_donors=4, n=60, seed=0):
    """Donors whose types nobody labels: each of three has genes of its own, and others that its cells answer with."""
    rng, counts, obs = np.random.default_rng(seed), [], []
    rate = rng.gamma(2.0, 1.0, size=60)
    for donor in range(n_donors):
        own = rate * rng.uniform(0.8, 1.25, size=60)
        for kind in range(3):
            of_type = own * np.where(np.arange(60) // 10 == kind, 5.0, 1.0)
            for name in ("control", "ifn"):
                answers = (np.arange(60) // 10 == 3 + kind) & (name == "ifn")
                depth = rng.lognormal(0.0, 0.3, size=(n, 1))
                counts.append(rng.poisson(depth * of_type * np.where(answers, 5.0, 1.0)))
                obs += [(f"donor {donor}", name)] * n
    table = pd.DataFrame(obs, columns=["donor", "perturbation"], index=[f"c{k}" for k in range(len(obs))])
    adata = ad.AnnData(sparse.csr_matrix(np.concatenate(counts).astype(np.float32)), obs=table)
    setup(adata, context_key="donor")
    return adata


def test_cells_of_a_new_donor_answer_each_in_its_own_way():
    """No shift, not even the right one, gives a mixed donor its shape: moved cells do, though no type was named."""
    result = holdout(
        CellOp(donors_of_mixed_types(), n_genes=None, n_latent=8),
        only=["donor 0"],
        metrics=["e_distance", "e_distance_centred"],
        progress=False,
    )
    shape = result.table.set_index("method")["e_distance_centred"]
    distance = result.table.set_index("method")["e_distance"]
    assert shape["mean shift"] == pytest.approx(shape["no change"])  # a shift has no shape
    assert shape[CELLOP] < 0.2 * shape["mean shift"]
    assert distance[CELLOP] < 0.2 * distance[["mean shift", "near mean shift", "linear"]].min()
