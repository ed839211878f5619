"""The library over all measured genes grows in a prediction as it grew where the perturbation was measured."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellop_nb import datasets
from cellop_nb.analysis.baselines import BASELINES
from cellop_nb.analysis.holdout import OPERATORS, holdout
from cellop_nb.analysis.library import library_growth, measured_totals
from cellop_nb.analysis.metric_intervals import metric_intervals
from cellop_nb.analysis.metrics import evaluate, score_split
from cellop_nb.analysis.space import EvaluationSpace
from cellop_nb.analysis.transfer import Complexity

GROWN = 1.5  # planted: perturbed cells hold half as many counts again, in genes that are not modelled
HELD = {"cell_type": "type B", "perturbation": "drug 1"}
QUICK = {
    "vae": {"n_latent": 4, "n_hidden": 16},
    "training": {"max_epochs": 3},
    "candidates": [Complexity(rank=0)],
    "metrics": ["library_ratio", "counts_ratio"],
    "progress": False,
}


def labelled(*groups: tuple[str, str, float]) -> ad.AnnData:
    """Ten cells of each (context, perturbation, mean library), the libraries spread around the mean."""
    rows = [
        {"cell_type": c, "perturbation": p, "total_counts": mean * share}
        for c, p, mean in groups
        for share in np.linspace(0.5, 1.5, 10)
    ]
    obs = pd.DataFrame(rows).rename(index=str)
    return ad.AnnData(np.ones((len(obs), 2), dtype=np.float32), obs=obs)


def test_growth_is_the_contexts_own_or_the_mean_of_all_or_the_sum_of_the_parts():
    cells = labelled(
        *(("S", "control", 100), ("S", "A", 200), ("S", "B", 50)),
        *(("T", "control", 10), ("T", "A", 80)),
        *(("U", "control", 7),),
    )
    assert library_growth(cells, "S", "A") == pytest.approx(np.log(2))
    assert library_growth(cells, "U", "A") == pytest.approx((np.log(2) + np.log(8)) / 2)
    assert library_growth(cells, "U", "A+B") == pytest.approx(np.log(4) + np.log(0.5))
    assert library_growth(cells, "S", "A+B") == pytest.approx(0, abs=1e-12)
    assert library_growth(cells, "S", "never measured") == 0


def test_a_measured_combination_needs_no_parts():
    cells = labelled(("S", "control", 10), ("S", "A", 20), ("S", "B", 20), ("S", "A+B", 30))
    assert library_growth(cells, "S", "A+B") == pytest.approx(np.log(3))


@pytest.fixture(scope="module")
def screen():
    """A synthetic screen whose last, loud gene is left out of the models and holds the planted growth."""
    cells = datasets.synthetic(n_perturbations=2, n_cells=60, n_genes=60, n_latent=4, library=200.0, seed=3)
    counts = cells.X.toarray()
    perturbed = (cells.obs["perturbation"] != "control").to_numpy()
    total = np.where(perturbed, GROWN, 1.0) * 400
    loud = np.maximum(np.random.default_rng(0).poisson(total) - counts.sum(1), 0)
    wide = ad.AnnData(np.column_stack([counts, loud]), obs=cells.obs)
    wide.var_names = [*cells.var_names, "loud"]
    return wide


@pytest.fixture(scope="module")
def result(screen):
    named = screen[:, screen.var_names != "loud"].copy()
    named.obs["total_counts"] = np.asarray(screen.X.sum(1)).ravel()
    return holdout(named, heldout=HELD, n_genes=0, **QUICK)


def ratio(table: pd.DataFrame, metric: str, method: str) -> float:
    return table[(table["metric"] == metric) & (table["method"] == method)]["value"].item()


def test_predicted_libraries_grow_as_planted(result):
    assert ratio(result.table, "library_ratio", OPERATORS) == pytest.approx(1, abs=0.05)
    assert ratio(result.table, "library_ratio", "no change") == pytest.approx(1 / GROWN, abs=0.05)
    assert ratio(result.table, "library_ratio", "latent shift") == pytest.approx(1 / GROWN, abs=0.05)


def test_predicted_cells_carry_their_library(result):
    sources = result.control.obs["total_counts"][result.predictions.obs["source_cell"]].to_numpy()
    grown = result.predictions.obs["total_counts"].to_numpy() / sources
    np.testing.assert_allclose(grown, grown[0])
    assert grown[0] == pytest.approx(GROWN, abs=0.05)


def test_evaluating_the_predicted_cells_gives_the_same_ratio(result):
    table = evaluate(
        result.predictions, result.real, result.control, space=result.space, **_only("library_ratio")
    )
    assert ratio(table, "library_ratio", "prediction") == ratio(result.table, "library_ratio", OPERATORS)


def test_intervals_hold_the_ratio(result):
    row = metric_intervals(result, n_replicates=40, progress=False, **_only("library_ratio")).iloc[0]
    assert row["low"] < row["value"] < row["high"] and row["high"] - row["low"] < 0.1


def test_where_no_gene_was_left_out_the_counts_are_the_library():
    cells = datasets.synthetic(n_perturbations=2, n_cells=20, n_genes=30, n_latent=4, seed=1)
    held = ((cells.obs["cell_type"] == "type B") & (cells.obs["perturbation"] == "drug 1")).to_numpy()
    table = score_split(cells[~held], cells[held], metrics=["library_ratio", "counts_ratio"])
    assert measured_totals(cells) is None
    assert ratio(table, "library_ratio", "no change") == ratio(table, "counts_ratio", "no change")


def test_a_method_without_libraries_says_so(screen):
    cells = screen.copy()
    cells.obs["total_counts"] = np.asarray(cells.X.sum(1)).ravel()
    held = ((cells.obs["cell_type"] == "type B") & (cells.obs["perturbation"] == "drug 1")).to_numpy()
    space = EvaluationSpace.fit(cells[~held])
    methods = {"mean shift": BASELINES["mean shift"]}
    table = score_split(cells[~held], cells[held], methods, space=space, metrics=["library_ratio"])
    assert "over all measured genes" in table[table["method"] == "mean shift"]["reason"].item()


def _only(metric: str) -> dict:
    return {"metrics": [metric]}
