"""Genes of learned responses, where the decoder and the operators are written by hand or planted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from cellop_nb.analysis.responses import axis_genes, measured_genes, response_genes
from cellop_nb.data.catalogue import load
from cellop_nb.models.operators import OperatorModel
from cellop_nb.models.vae import NBVAE

CONTEXTS, DRUGS, GENES, CELLS = ("a", "b"), ("up", "down", "none"), 12, 30
SHIFT = {"up": 1.0, "down": -1.0, "none": 0.0}


@pytest.fixture(scope="module")
def screen():
    """Random counts and latents; the responses do not depend on the former."""
    rng = np.random.default_rng(0)
    labels = [(c, p) for c in CONTEXTS for p in ("control", *DRUGS) for _ in range(CELLS)]
    obs = pd.DataFrame(labels, columns=["cell_type", "perturbation"]).astype("category")
    obs.index = [f"cell {k}" for k in range(len(obs))]
    adata = AnnData(rng.poisson(2.0, (len(obs), GENES)).astype(np.float32), obs=obs)
    adata.var_names = [f"gene {k}" for k in range(GENES)]
    adata.obsm["X_nbvae"] = rng.normal(size=(len(obs), 2)).astype(np.float32)
    adata.obs["split"] = "test"
    return adata


@pytest.fixture(scope="module")
def weights():
    """Change of each logit per unit of the first latent direction: four up, four none, four down."""
    return torch.tensor([0.6, 0.5, 0.4, 0.3] + [0.0] * 4 + [-0.3, -0.4, -0.5, -0.6])


@pytest.fixture(scope="module")
def vae(screen, weights):
    model = NBVAE(list(screen.var_names), n_latent=2, n_hidden=4)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
        model.decoder.linear.weight[:, 0] = weights
    return model


@pytest.fixture(scope="module")
def operators():
    """Pure shifts along the first latent direction."""
    model = OperatorModel(2, DRUGS, CONTEXTS, n_axes=1, rank=0)
    with torch.no_grad():
        model.conditions.embedding.copy_(torch.tensor([[SHIFT[name]] for name in DRUGS]))
        model.axis_shift.copy_(torch.tensor([[1.0, 0.0]]))
    return model


def test_planted_signs_and_order_are_recovered(screen, vae, operators, weights):
    table = response_genes(screen, vae, operators, n_top=None, pseudocount=0.0)
    assert list(table.columns) == ["context", "perturbation", "gene", "lfc"]
    assert len(table) == len(CONTEXTS) * len(DRUGS) * GENES
    planted = dict(zip(screen.var_names, weights.tolist(), strict=True))
    for (_, drug), rows in table.groupby(["context", "perturbation"]):
        wanted = SHIFT[drug] * rows["gene"].map(planted)
        if drug == "none":
            assert rows["lfc"].abs().max() < 1e-6
            continue
        assert (np.sign(rows["lfc"][wanted != 0]) == np.sign(wanted[wanted != 0])).all()
        # The softmax takes the same number from every log proportion; the order of genes stays.
        assert rows["lfc"].corr(wanted, method="spearman") > 0.95
        assert rows["lfc"].abs().is_monotonic_decreasing


def test_the_largest_come_first_and_rare_genes_do_not(screen, vae, operators):
    top = response_genes(screen, vae, operators, n_top=2)
    up = top[(top["perturbation"] == "up") & (top["context"] == "a")]
    assert set(up["gene"]) <= {"gene 0", "gene 1", "gene 10", "gene 11"} and len(up) == 2
    quiet = response_genes(screen, vae, operators, n_top=None, pseudocount=1e9)
    assert quiet["lfc"].abs().max() < 1e-4


def test_the_axis_is_the_planted_direction_with_its_sign(screen, vae, operators, weights):
    table = axis_genes(screen, vae, operators, n_axes=1)
    assert table["share"].iloc[0] == pytest.approx(1.0)
    # "up" and "down" cancel in the vote for the sign, so either is right.
    assert abs(np.corrcoef(table["effect"], weights)[0, 1]) > 0.999
    typical = np.sqrt(2 / 3)  # root mean square of the shifts 1, -1 and 0
    spread = table["effect"].max() - table["effect"].min()
    assert spread == pytest.approx(typical * 1.2 / np.log(2), rel=1e-4)


def test_axes_do_not_depend_on_how_the_model_mixes_its_own(screen, vae, operators):
    before = axis_genes(screen, vae, operators, n_axes=1)
    mixed = OperatorModel(2, DRUGS, CONTEXTS, n_axes=1, rank=0)
    with torch.no_grad():
        mixed.conditions.embedding.copy_(operators.conditions.embedding * 5)
        mixed.axis_shift.copy_(operators.axis_shift / 5)
    np.testing.assert_allclose(
        axis_genes(screen, vae, mixed, n_axes=1)["effect"], before["effect"], atol=1e-5
    )


def test_the_measured_change_is_that_of_the_mean_proportions(screen):
    table = measured_genes(screen, pseudocount=1.0)
    counts = screen.X / screen.X.sum(1, keepdims=True)
    inside = (screen.obs["cell_type"] == "b").to_numpy()
    mean = {
        label: 1e4 * counts[inside & (screen.obs["perturbation"] == label).to_numpy()].mean(0) + 1
        for label in ("control", "up")
    }
    wanted = dict(zip(screen.var_names, np.log2(mean["up"] / mean["control"]), strict=True))
    rows = table[(table["context"] == "b") & (table["perturbation"] == "up")]
    np.testing.assert_allclose(rows["lfc"], rows["gene"].map(wanted), rtol=1e-4)


def test_the_measured_change_is_read_from_a_file_in_parts(screen, tmp_path, monkeypatch):
    monkeypatch.setattr("cellop_nb.data.on_disk.PART", 7)
    screen.write_h5ad(tmp_path / "screen.h5ad")
    on_disk = measured_genes(load(str(tmp_path / "screen.h5ad"), backed=True))
    pd.testing.assert_frame_equal(on_disk, measured_genes(screen), rtol=1e-6)


def test_groups_without_cells_in_the_split_are_left_out(screen):
    other = screen.copy()
    other.obs["split"] = np.where(other.obs["perturbation"] == "up", "test", "train")
    assert set(measured_genes(other)["perturbation"]) == {"up"}
    assert set(measured_genes(other, split=None)["perturbation"]) == set(DRUGS)
