"""cell-eval (Arc Institute) on the same pair of AnnData gives the numbers of our metrics."""

from __future__ import annotations

import numpy as np
import pytest

from cellop_nb import datasets, holdout
from cellop_nb.analysis.exchange import cell_eval_pair
from cellop_nb.analysis.holdout import CELLOP
from cellop_nb.errors import LabelError

from .screens import rows_of, tiny

METRICS = ["pearson_delta", "mae", "rmse", "direction_match", "lfc_spearman", "precision_at_50", "de_score"]


@pytest.fixture(scope="module")
def result():
    # No adjusted p of these draws is near 0.05: their rank sum test has a continuity correction, scanpy's has none.
    screen = datasets.synthetic(
        n_contexts=3, n_perturbations=5, n_cells=120, n_genes=80, library=300.0, seed=5
    )
    weak = rows_of(screen, cell_type="type B") & screen.obs["perturbation"].isin(["drug 4", "drug 5"])
    model = tiny(screen[~weak.to_numpy()].copy(), n_latent=6, n_genes=None)
    return holdout(model, only=["type B"], metrics=METRICS, progress=False)


@pytest.fixture(scope="module")
def theirs(result, tmp_path_factory):
    reason = "cell-eval is not installed: pip install 'cellop_nb[evaluation]'"
    cell_eval = pytest.importorskip("cell_eval", reason=reason)
    predicted, real = cell_eval_pair(result)
    evaluator = cell_eval.MetricsEvaluator(
        predicted,
        real,
        control_pert="control",
        pert_col="perturbation",
        num_threads=1,
        outdir=str(tmp_path_factory.mktemp("cell-eval")),
    )
    table, _ = evaluator.compute(profile="full", skip_metrics=["clustering_agreement"], write_csv=False)
    return table.to_pandas().set_index("perturbation")


SAME = {
    "pearson_delta": "pearson_delta",
    "mae": "mae",
    "direction_match": "de_direction_match",
    "lfc_spearman": "de_spearman_lfc_sig",
    "precision_at_50": "precision_at_50",
    "de_score": "overlap_at_N",
}


@pytest.mark.parametrize("metric", SAME)
def test_the_same_number(result, theirs, metric):
    ours = result.scores[(result.scores["method"] == CELLOP) & (result.scores["metric"] == metric)]
    ours = ours.set_index("perturbation")["value"]
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, theirs[SAME[metric]].loc[ours.index], rtol=1e-5, atol=1e-6)


def test_rmse_is_the_root_of_their_mse(result, theirs):
    ours = result.scores[(result.scores["method"] == CELLOP) & (result.scores["metric"] == "rmse")]
    ours = ours.set_index("perturbation")["value"]
    np.testing.assert_allclose(ours**2, theirs["mse"].loc[ours.index], rtol=1e-5)


def test_their_energy_distance_is_our_v_form(result):
    reason = "cell-eval is not installed: pip install 'cellop_nb[evaluation]'"
    pytest.importorskip("cell_eval", reason=reason)
    import torch
    from cell_eval._types import PerturbationAnndataPair
    from cell_eval.metrics._anndata import edistance

    from cellop_nb import energy_distance

    predicted, real = cell_eval_pair(result)
    for side in (predicted, real):
        side.X = side.X.astype(float)  # their distances of single-precision cells are rounded
    pair = PerturbationAnndataPair(real=real, pred=predicted, pert_col="perturbation", control_pert="control")

    def distance(side, name: str) -> float:
        clouds = (torch.as_tensor(side[side.obs["perturbation"] == p].X).double() for p in (name, "control"))
        return float(energy_distance(*clouds, estimator="V"))

    ours = np.array([[distance(side, name) for name in pair.perts] for side in (real, predicted)])
    expected = edistance(pair)
    assert expected == pytest.approx(np.corrcoef(ours)[0, 1], abs=1e-5)


def test_the_pair_holds_the_same_controls_and_genes(result):
    predicted, real = cell_eval_pair(result, context="type B")
    assert list(predicted.var_names) == list(real.var_names)
    sides = [side[side.obs["perturbation"] == "control"].X for side in (predicted, real)]
    np.testing.assert_array_equal(*sides)
    assert set(predicted.obs["perturbation"]) == {"control", "drug 1", "drug 2", "drug 3"}
    with pytest.raises(LabelError, match="type B"):
        cell_eval_pair(result, context="type Z")
