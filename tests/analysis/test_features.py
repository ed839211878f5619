"""Perturbations that were never measured, from features that are given for each."""

import numpy as np
import pandas as pd
import pytest
import torch

from cellop_nb import datasets, holdout, split
from cellop_nb.analysis.fits import fit_response
from cellop_nb.analysis.selection import leave_out
from cellop_nb.analysis.transfer import Complexity
from cellop_nb.errors import LabelError, ModelError

from .screens import QUICK


@pytest.fixture(scope="module")
def described():
    """Latents whose shift is linear in two descriptors of the perturbation; the last one is never seen."""
    import anndata as ad

    rng = np.random.default_rng(0)
    features = pd.DataFrame(rng.normal(size=(8, 2)), index=[f"p{k}" for k in range(8)], columns=["x", "y"])
    shift = features.to_numpy() @ np.array([[2.0, 0.0, 1.0], [0.0, 2.0, -1.0]])
    names = ["control", *features.index]
    z = np.concatenate([s + 0.4 * rng.normal(size=(60, 3)) for s in [np.zeros(3), *shift]])
    obs = pd.DataFrame({"perturbation": np.repeat(names, 60)})
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(obs=obs, obsm={"X_nbvae": z.astype(np.float32)})
    split(adata, holdout={"perturbation": "p7"}, context_key=None)
    return adata, features, shift


def test_unseen_perturbation_is_predicted_from_features(described):
    adata, features, shift = described
    response = fit_response(adata, Complexity(rank=0), context_key=None, features=features)
    start = torch.as_tensor(adata.obsm["X_nbvae"][:60])
    moved = response.operator("p7", "all")(start)
    gap = (moved.mean(0) - start.mean(0)).numpy() - shift[7]
    assert np.linalg.norm(gap) < 0.25 * np.linalg.norm(shift[7])


def test_perturbations_are_left_out_in_turn_where_features_are_given(described):
    adata, features, _ = described
    options = {"over": "perturbation", "context_key": None, "progress": False}
    table = leave_out(adata, [Complexity(rank=0)], features=features, **options)
    assert len(table) == 7 and table["e_distance"].mean() < 0.3 * table["no_change"].mean()


def test_features_must_name_every_perturbation(described):
    adata, features, _ = described
    with pytest.raises(LabelError, match="features.*p0"):
        fit_response(adata, Complexity(rank=0), context_key=None, features=features.iloc[1:])
    broken = features.copy()
    broken.iloc[2, 0] = np.nan
    with pytest.raises(ModelError, match="p2"):
        fit_response(adata, Complexity(rank=0), context_key=None, features=broken)


def test_holdout_of_an_unseen_perturbation_with_features():
    screen = datasets.synthetic(n_contexts=1, n_perturbations=5, n_cells=40, n_genes=60, seed=1)
    features = pd.DataFrame(np.eye(5)[:, :3] + 0.1, index=[f"drug {k + 1}" for k in range(5)])
    candidates = [Complexity(rank=0), Complexity(rank=0, context_rank=0)]
    options = QUICK | {"candidates": candidates, "features": features}
    result = holdout(screen, heldout={"perturbation": "drug 2"}, **options)
    row = result.table[(result.table["method"] == "operators") & (result.table["metric"] == "pearson_delta")]
    assert np.isfinite(row["value"]).all() and set(result.predictions.obs["perturbation"]) == {"drug 2"}
    assert len(result.choice)
