"""Genes of responses, profiles, gene sets and tests, each against an independent reference or a planted answer."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import stats

from cellop_nb.analysis.genes import (
    axis_genes,
    enrich,
    measured_genes,
    predicted_expression,
    response_genes,
    response_profiles,
    response_similarity,
)
from cellop_nb.data.contract import Keys
from cellop_nb.data.datasets import load
from cellop_nb.errors import DataError, LabelError, MissingExtraError
from cellop_nb.models.operators import Condition, OperatorModel
from cellop_nb.models.vae import NBVAE

GENES = [f"GENE{k}" for k in range(60)]
SETS = {"rises": GENES[:8], "falls": GENES[8:16], "still": GENES[20:30], "tiny": GENES[40:42]}


@pytest.fixture
def changes():
    rng = np.random.default_rng(0)
    effect = 0.2 * rng.normal(size=60)
    effect[:8] += 2.0
    effect[8:16] -= 2.0
    parts = [
        pd.DataFrame({"axis": k, "gene": GENES, "effect": sign * effect}) for k, sign in ((1, 1), (2, -1))
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def gmt(tmp_path):
    path = tmp_path / "sets.gmt"
    lines = ["\t".join([name, "made for this test", *genes, "NOT_MEASURED"]) for name, genes in SETS.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


decoupler = pytest.mark.skipif(
    find_spec("decoupler") is None,
    reason="decoupler is not installed: pip install 'cellop_nb[enrichment]'",
)


@decoupler
def test_planted_sets_lead_with_their_sign(changes, gmt):
    table = enrich(changes, gmt)
    first = table[table["axis"] == 1].set_index("gene_set")
    assert list(first.index[:2]) in (["rises", "falls"], ["falls", "rises"]) and "tiny" not in first.index
    assert first.loc["rises", "score"] > 5 and first.loc["falls", "score"] < -5
    assert first.loc["still", "fdr"] > 0.05 > first.loc["rises", "fdr"]
    assert first.loc["rises", "n_genes"] == 8 and set(first.loc["rises", "genes"].split(", ")) <= set(
        GENES[:8]
    )
    second = table[table["axis"] == 2].set_index("gene_set")
    assert second.loc["rises", "score"] == pytest.approx(-first.loc["rises", "score"], rel=1e-6)


@decoupler
def test_score_is_the_t_of_a_regression_on_membership(changes, gmt):
    effect = changes[changes["axis"] == 1].set_index("gene")["effect"]
    member = effect.index.isin(SETS["still"]).astype(float)
    fit = stats.linregress(member, effect)
    row = enrich(changes, gmt).query("axis == 1 and gene_set == 'still'").iloc[0]
    assert row["score"] == pytest.approx(fit.slope / fit.stderr, rel=1e-5)
    assert row["p"] == pytest.approx(fit.pvalue, rel=1e-4)


@decoupler
def test_profiles_named_by_context_and_perturbation(changes, gmt):
    named = changes.assign(
        context="B", perturbation=np.where(changes["axis"] == 1, "p", "q"), lfc=changes["effect"]
    )
    table = enrich(named.drop(columns=["axis", "effect"]), gmt)
    assert set(zip(table["context"], table["perturbation"], strict=True)) == {("B", "p"), ("B", "q")}


@decoupler
def test_other_gene_names_are_refused_with_the_numbers(changes):
    ensembl = {"a": [f"ENSG{k:05d}" for k in range(30)]}
    with pytest.raises(DataError, match="at most 0 in any of 1 sets, among 60 genes"):
        enrich(changes, ensembl)


def test_bad_files_and_names_are_refused(changes, tmp_path):
    with pytest.raises(DataError, match="no file"):
        enrich(changes, tmp_path / "none.gmt")
    (tmp_path / "bad.gmt").write_text("one\tno genes\n")
    with pytest.raises(DataError, match="line 1 of .*bad.gmt with 2 fields"):
        enrich(changes, tmp_path / "bad.gmt")
    with pytest.raises(LabelError, match="'change'"):
        enrich(changes, SETS, value="change")


def test_a_missing_package_is_named(changes, monkeypatch):
    monkeypatch.setitem(sys.modules, "decoupler", None)
    with pytest.raises(MissingExtraError, match=r"cellop_nb\[enrichment\]"):
        enrich(changes, SETS)


# -- genes of responses

CONTEXTS, DRUGS, N_GENES, CELLS = ("a", "b"), ("up", "down", "none"), 12, 30
SHIFT = {"up": 1.0, "down": -1.0, "none": 0.0}


@pytest.fixture(scope="module")
def screen():
    """Random counts and latents; the responses do not depend on the former."""
    rng = np.random.default_rng(0)
    labels = [(c, p) for c in CONTEXTS for p in ("control", *DRUGS) for _ in range(CELLS)]
    obs = pd.DataFrame(labels, columns=["cell_type", "perturbation"]).astype("category")
    obs.index = [f"cell {k}" for k in range(len(obs))]
    adata = AnnData(rng.poisson(2.0, (len(obs), N_GENES)).astype(np.float32), obs=obs)
    adata.var_names = [f"gene {k}" for k in range(N_GENES)]
    adata.obsm["X_nbvae"] = rng.normal(size=(len(obs), 2)).astype(np.float32)
    adata.obs["split"] = "test"
    Keys().write(adata)
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
def shifts():
    """Pure shifts along the first latent direction."""
    model = OperatorModel(2, DRUGS, CONTEXTS, n_axes=1, rank=0)
    with torch.no_grad():
        model.conditions.embedding.copy_(torch.tensor([[SHIFT[name]] for name in DRUGS]))
        model.axis_shift.copy_(torch.tensor([[1.0, 0.0]]))
    return model


def test_planted_signs_and_order_are_recovered(screen, vae, shifts, weights):
    table = response_genes(screen, vae, shifts, n_top=None, pseudocount=0.0)
    assert list(table.columns) == ["context", "perturbation", "gene", "lfc"]
    assert len(table) == len(CONTEXTS) * len(DRUGS) * N_GENES
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


def test_the_largest_come_first_and_rare_genes_do_not(screen, vae, shifts):
    top = response_genes(screen, vae, shifts, n_top=2)
    up = top[(top["perturbation"] == "up") & (top["context"] == "a")]
    assert set(up["gene"]) <= {"gene 0", "gene 1", "gene 10", "gene 11"} and len(up) == 2
    quiet = response_genes(screen, vae, shifts, n_top=None, pseudocount=1e9)
    assert quiet["lfc"].abs().max() < 1e-4


def test_the_axis_is_the_planted_direction_with_its_sign(screen, vae, shifts, weights):
    table = axis_genes(screen, vae, shifts, n_axes=1)
    assert table["share"].iloc[0] == pytest.approx(1.0)
    # "up" and "down" cancel in the vote for the sign, so either is right.
    assert abs(np.corrcoef(table["effect"], weights)[0, 1]) > 0.999
    typical = np.sqrt(2 / 3)  # root mean square of the shifts 1, -1 and 0
    spread = table["effect"].max() - table["effect"].min()
    assert spread == pytest.approx(typical * 1.2 / np.log(2), rel=1e-4)


def test_axes_do_not_depend_on_how_the_model_mixes_its_own(screen, vae, shifts):
    before = axis_genes(screen, vae, shifts, n_axes=1)
    mixed = OperatorModel(2, DRUGS, CONTEXTS, n_axes=1, rank=0)
    with torch.no_grad():
        mixed.conditions.embedding.copy_(shifts.conditions.embedding * 5)
        mixed.axis_shift.copy_(shifts.axis_shift / 5)
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
    monkeypatch.setattr("cellop_nb.data.counts.PART", 7)
    screen.write_h5ad(tmp_path / "screen.h5ad")
    on_disk = measured_genes(load(str(tmp_path / "screen.h5ad"), backed=True))
    pd.testing.assert_frame_equal(on_disk, measured_genes(screen), rtol=1e-6)


def test_groups_without_cells_in_the_split_are_left_out(screen):
    other = screen.copy()
    other.obs["split"] = np.where(other.obs["perturbation"] == "up", "test", "train")
    assert set(measured_genes(other)["perturbation"]) == {"up"}
    assert set(measured_genes(other, split=None)["perturbation"]) == set(DRUGS)


# -- profiles


@pytest.fixture
def operators():
    torch.manual_seed(0)
    model = OperatorModel(5, ["a", "b", "c", "nothing"], ["x"], n_axes=3, rank=2, pairs=[("a", "b")])
    with torch.no_grad():
        for parameter in (model.axis_shift, model.axis_left, model.axis_right, model.conditions.embedding):
            parameter.normal_()
        model.conditions.embedding[1] = -model.conditions.embedding[0]
        model.conditions.embedding[3] = 0
    return model


def test_lengths_and_angles_are_those_of_the_operators(operators):
    profiles = response_profiles(operators, ["a", "c"])
    found = [operators.operator(Condition((name,))) for name in ("a", "c")]
    departure = [op.matrix - torch.eye(5) for op in found]
    shift = [op.shift + d @ operators.center for op, d in zip(found, departure, strict=True)]
    for prefix, parts in (("alpha", departure), ("beta", shift)):
        inner = torch.stack([part.flatten() for part in parts])
        values = profiles.filter(like=prefix).to_numpy()
        np.testing.assert_allclose(values @ values.T, (inner @ inner.T).numpy(), rtol=1e-4)


def test_opposite_same_and_silent_conditions(operators):
    table = response_similarity(operators)
    assert list(table) == ["a", "b", "c", "nothing", "a+b"]
    assert table.loc["a", "b"] == pytest.approx(-1) and table.loc["c", "c"] == pytest.approx(1)
    assert table.loc["nothing"].isna().all()


def test_a_mixture_of_the_axes_changes_nothing(operators):
    """The shifts' coefficients times M and the axes times its inverse: the same operators, the same angles."""
    before = response_similarity(operators, part="shift")
    mixture = torch.randn(3, 3) + 2 * torch.eye(3)
    with torch.no_grad():
        operators.conditions.embedding.copy_(operators.conditions.embedding @ mixture)
        operators.axis_shift.copy_(torch.linalg.solve(mixture, operators.axis_shift))
    np.testing.assert_allclose(response_similarity(operators, part="shift"), before, atol=1e-4)


# -- differential expression


def test_predicted_expression_is_scanpys(tmp_path):
    import scanpy as sc

    rng = np.random.default_rng(0)
    control = AnnData(rng.poisson(3.0, (60, 20)).astype(np.float32))
    predicted = AnnData(rng.poisson(3.0, (50, 20)).astype(np.float32))
    predicted.X[:, 4] = rng.poisson(30.0, 50)
    predicted.obs_names = [f"virtual {k}" for k in range(50)]
    Keys().write(control)
    both = predicted_expression(predicted, control)
    table = sc.get.rank_genes_groups_df(both, "predicted")
    assert table["names"].iloc[0] == "4" and table["pvals_adj"].iloc[0] < 1e-6
    sides = [both[both.obs["side"] == side].X[:, 4] for side in ("predicted", "control")]
    z = stats.mannwhitneyu(*sides, use_continuity=False, method="asymptotic")
    assert table["pvals"].iloc[0] == pytest.approx(z.pvalue, rel=1e-3)
    np.testing.assert_allclose(np.expm1(both.X).sum(1), 1e4, rtol=1e-4)
    with pytest.raises(DataError, match="0 shared genes"):
        other = control.copy()
        other.var_names = [f"x{k}" for k in range(20)]
        predicted_expression(predicted, other)


def test_measured_changes_start_from_all_controls_of_the_context(screen):
    held_out = screen.copy()
    few = (held_out.obs["perturbation"] == "control") & (np.arange(held_out.n_obs) % 2 == 1)
    held_out.obs["split"] = np.where(few, "train", "test")
    pd.testing.assert_frame_equal(measured_genes(held_out), measured_genes(screen))


@pytest.mark.parametrize("sign", [1, -1])
def test_most_responses_are_positive_along_an_axis(screen, vae, shifts, weights, sign):
    part = screen[screen.obs["perturbation"].isin(["control", "up"])].copy()
    turned = OperatorModel(2, DRUGS, CONTEXTS, n_axes=1, rank=0)
    with torch.no_grad():
        turned.conditions.embedding.copy_(shifts.conditions.embedding)
        turned.axis_shift.copy_(sign * shifts.axis_shift)
    effect = axis_genes(part, vae, turned, n_axes=1)["effect"]
    assert np.corrcoef(effect, sign * weights)[0, 1] > 0.999
