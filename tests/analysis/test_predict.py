"""Virtual cells: control cells moved by an operator, back in gene space, and never under a wrong name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from cellop_nb.analysis.predict import decode_cells, embed, latents, operator_for, predict, source_cells
from cellop_nb.data.splits import split
from cellop_nb.data.synthetic import synthetic
from cellop_nb.errors import DataError, LabelError, ModelError
from cellop_nb.models.affine import AffineOperator
from cellop_nb.models.operators import Condition, OperatorModel
from cellop_nb.training.operators import new_operators
from cellop_nb.training.vae import new_vae

CONTEXT = "type A"


@pytest.fixture(scope="module")
def embedded():
    adata = synthetic(
        n_contexts=2, n_perturbations=2, n_cells=40, n_genes=30, n_latent=4, library=60.0, seed=0
    )
    split(adata, test_fraction=0, val_fraction=0.2)
    vae = new_vae(adata, covariate_keys=["batch"], n_latent=3, n_hidden=8, dropout=0.2)
    embed(adata, vae)
    return adata, vae, new_operators(adata)


@pytest.fixture
def screen(embedded):
    return embedded[0].copy()


@pytest.fixture
def vae(embedded):
    return embedded[1]


@pytest.fixture
def operators(embedded):
    return embedded[2]


def controls_of(adata, context=CONTEXT):
    return adata[(adata.obs["perturbation"] == "control") & (adata.obs["cell_type"] == context)]


def doubling(d=3):
    return AffineOperator(2 * torch.eye(d), torch.ones(d), "doubling")


# -- embed ------------------------------------------------------------------------------------------------


def test_embed_writes_posterior_means_and_nothing_else(embedded):
    adata, vae, _ = embedded
    bare = adata.copy()
    del bare.obsm["X_nbvae"]
    before = bare.copy()
    assert embed(bare, vae, key_added="X_here", batch_size=33) is None
    assert bare.obsm["X_here"].shape == (adata.n_obs, 3)
    assert bare.obsm["X_here"].dtype == np.float32
    x = torch.as_tensor(bare.X.toarray())
    expected = vae.encode(x).loc.detach().numpy()
    np.testing.assert_allclose(bare.obsm["X_here"], expected, atol=1e-5)
    assert bare.obs.equals(before.obs)
    assert set(bare.obsm) == set(before.obsm) | {"X_here"}


def test_embed_reads_a_layer_dense_or_sparse_in_any_gene_order(screen, vae):
    expected = screen.obsm["X_nbvae"].copy()
    screen.layers["counts"] = screen.X.toarray()
    screen.X = sparse.csr_matrix(screen.shape, dtype=np.float32)
    turned = screen[:, ::-1].copy()
    embed(turned, vae, layer="counts")
    np.testing.assert_allclose(turned.obsm["X_nbvae"], expected, atol=1e-5)


def test_embed_is_the_same_whatever_mode_the_model_is_in(screen, vae):
    vae.train()
    before = screen.obsm["X_nbvae"].copy()
    embed(screen, vae)
    assert np.array_equal(screen.obsm["X_nbvae"], before)


def test_missing_genes_are_refused_with_names(screen, vae, operators):
    fewer = screen[:, 1:].copy()
    with pytest.raises(DataError, match="all genes of the model.*1 of 30 missing.*GENE0000"):
        embed(fewer, vae)
    with pytest.raises(DataError, match="all genes of the model"):
        predict(fewer, vae, operators, perturbation="drug 1", context=CONTEXT)


def test_more_genes_than_the_model_knows_are_left_out(screen, embedded):
    small = new_vae(screen[:, 5:20].copy(), n_latent=3, n_hidden=4)
    embed(screen, small)
    model = OperatorModel(3, ["drug 1"], [CONTEXT])
    assert list(predict(screen, small, model, perturbation="drug 1").var_names) == list(
        screen.var_names[5:20]
    )


# -- what a prediction is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", [True, False])
def test_predict_gives_counts_of_the_contexts_control_cells(screen, vae, operators, carry):
    predicted = predict(screen, vae, operators, perturbation="drug 1", context=CONTEXT, carry=carry)
    source = controls_of(screen)
    assert list(predicted.obs_names) == list(source.obs_names)
    assert list(predicted.var_names) == list(screen.var_names)
    counts = predicted.X.toarray()
    assert (counts >= 0).all()
    assert (counts == np.round(counts)).all()
    assert sparse.issparse(predicted.X)
    assert predicted.layers["mean"].shape == predicted.shape
    assert set(predicted.obs["perturbation"]) == {"drug 1"}
    assert predicted.obs.drop(columns="perturbation").equals(source.obs.drop(columns="perturbation"))
    moved = operators.operator(Condition(("drug 1",), CONTEXT))(torch.as_tensor(source.obsm["X_nbvae"]))
    np.testing.assert_allclose(predicted.obsm["X_nbvae"], moved, atol=1e-5)


def test_predict_leaves_its_input_alone(screen, vae, operators):
    before = screen.copy()
    predict(screen, vae, operators, perturbation="drug 1", context=CONTEXT)
    assert screen.obs.equals(before.obs)
    assert (screen.X != before.X).nnz == 0
    assert "prediction" not in screen.uns["cellop_nb"]


def test_predict_says_how_it_was_made(screen, vae, operators):
    predicted = predict(screen, vae, operators, perturbation="drug 1", context=CONTEXT, strength=0.5, seed=7)
    told = predicted.uns["cellop_nb"]["prediction"]
    assert told["perturbation"] == "drug 1"
    assert (told["context"], told["context_was_trained"]) == (CONTEXT, True)
    assert (told["strength"], told["seed"]) == (0.5, 7)
    assert told["operator"] == "type A, drug 1"


def test_a_prediction_can_be_written_to_a_file(screen, vae, operators, tmp_path):
    predict(screen, vae, operators, perturbation="drug 1", context=CONTEXT).write_h5ad(tmp_path / "p.h5ad")


def test_drawn_counts_have_the_decoders_mean_at_the_cells_library(screen, vae):
    source = controls_of(screen)
    z = torch.as_tensor(source.obsm["X_nbvae"])
    draws = [decode_cells(source, vae, z, seed=seed) for seed in range(60)]
    mean = draws[0].layers["mean"]
    np.testing.assert_allclose(mean.sum(1), np.asarray(source.X.sum(1)).ravel(), rtol=1e-4)
    average = np.mean([draw.X.toarray() for draw in draws], axis=0)
    assert np.corrcoef(average.ravel(), mean.ravel())[0, 1] > 0.95
    assert average.sum() == pytest.approx(mean.sum(), rel=0.05)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_no_move_is_a_reconstruction(screen, vae, operators, strength):
    """Strength zero of an effect, and full strength of control, leave the latents."""
    name = "control" if strength else "drug 1"
    settings = {"perturbation": name, "context": CONTEXT, "strength": strength}
    predicted = predict(screen, vae, operators, carry=False, **settings)
    source = controls_of(screen)
    np.testing.assert_allclose(predicted.obsm["X_nbvae"], source.obsm["X_nbvae"], atol=1e-6)
    same = decode_cells(source, vae, torch.as_tensor(source.obsm["X_nbvae"]))
    np.testing.assert_allclose(predicted.layers["mean"], same.layers["mean"], rtol=1e-4)
    carried = predict(screen, vae, operators, carry=True, **settings)
    assert abs(carried.X - source.X).sum() <= 0.001 * source.X.sum()


def test_half_a_strength_twice_is_the_whole(screen, vae, operators):
    half = operators.operator(Condition(("drug 1",), CONTEXT)).power(0.5)
    twice = predict(screen, vae, half @ half, perturbation="drug 1", context=CONTEXT)
    once = predict(screen, vae, operators, perturbation="drug 1", context=CONTEXT)
    np.testing.assert_allclose(twice.obsm["X_nbvae"], once.obsm["X_nbvae"], atol=1e-3)


def test_an_operator_of_ones_own_may_be_given(screen, vae):
    predicted = predict(screen, vae, doubling(), perturbation="anything", context=CONTEXT)
    expected = 2 * controls_of(screen).obsm["X_nbvae"] + 1
    np.testing.assert_allclose(predicted.obsm["X_nbvae"], expected, rtol=1e-5)
    assert set(predicted.obs["perturbation"]) == {"anything"}


# -- seeds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", [True, False])
def test_predictions_follow_their_seed_alone(screen, vae, operators, carry):
    settings = {"perturbation": "drug 1", "context": CONTEXT, "carry": carry}
    one = predict(screen, vae, operators, seed=1, **settings)
    torch.manual_seed(5)
    vae.train()
    same = predict(screen, vae, operators, seed=1, **settings)
    other = predict(screen, vae, operators, seed=2, **settings)
    assert (one.X != same.X).nnz == 0
    assert (one.X != other.X).nnz > 0


def test_max_cells_draws_some_of_the_controls(screen, vae, operators):
    some, same, other = (
        predict(screen, vae, operators, perturbation="drug 1", context=CONTEXT, max_cells=10, seed=seed)
        for seed in (1, 1, 2)
    )
    assert some.n_obs == 10
    assert set(some.obs_names) <= set(controls_of(screen).obs_names)
    assert list(some.obs_names) == list(same.obs_names) != list(other.obs_names)


# -- contexts ---------------------------------------------------------------------------------------------


def test_all_controls_are_moved_where_no_context_is_named(screen, vae, operators):
    predicted = predict(screen, vae, operators, perturbation="drug 1")
    assert predicted.n_obs == (screen.obs["perturbation"] == "control").sum()
    assert predicted.uns["cellop_nb"]["prediction"]["context"] == ""


def test_a_context_that_was_not_trained_is_marked_and_gets_the_shared_response(screen, vae):
    model = new_operators(screen[screen.obs["cell_type"] == CONTEXT].copy())
    predicted = predict(screen, vae, model, perturbation="drug 1", context="type B")
    assert predicted.uns["cellop_nb"]["prediction"]["context_was_trained"] is False
    shared = model.operator(Condition(("drug 1",)))
    expected = shared(latents(controls_of(screen, "type B")))
    np.testing.assert_allclose(predicted.obsm["X_nbvae"], expected, atol=1e-5)
    assert operator_for(model, "drug 1", CONTEXT)[1] is True


def test_several_columns_make_a_context(screen, vae):
    rows = source_cells(screen, "type A | donor 1", context_key=["cell_type", "donor"])
    chosen = screen.obs.iloc[rows]
    assert set(chosen["cell_type"]) == {"type A"}
    assert set(chosen["donor"]) == {"donor 1"}
    assert set(chosen["perturbation"]) == {"control"}


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (
            {"perturbation": "drug1"},
            LabelError,
            "a perturbation the model was fitted with.*'drug1'.*'drug 1'",
        ),
        ({"perturbation": "drug 1+drg 2"}, LabelError, "'drg 2'.*did you mean 'drug 2'"),
        ({"context": "typ A"}, LabelError, "a context of the data.*'typ A'.*did you mean 'type A'"),
        ({"context_key": "celltype"}, LabelError, "'celltype'.*'cell_type'"),
        ({"perturbation_key": "perturb"}, LabelError, "'perturb'.*'perturbation'"),
        ({"control": "DMSO"}, DataError, "control cells to start from in type A.*'perturbation'.*'DMSO'"),
        ({"use_rep": "X_vae"}, DataError, r"latents in obsm\['X_vae'\].*call embed"),
        ({"use_rep": "X_truth"}, ModelError, "latents with 3 columns.*4"),
        ({"layer": "raw"}, DataError, "a layer 'raw'"),
    ],
    ids=str,
)
def test_what_cannot_be_predicted_is_refused_with_advice(screen, vae, operators, asked, error, message):
    given = {"perturbation": "drug 1", "context": CONTEXT} | asked
    with pytest.raises(error, match=message) as caught:
        predict(screen, vae, operators, **given)
    assert "To fix it" in str(caught.value)


@pytest.mark.parametrize("carry", [True, False])
def test_cells_are_decoded_in_parts(screen, vae, monkeypatch, carry):
    """Parts of 7 cells: the same expectations, and carried counts drawn from one stream."""
    start = latents(screen)
    moved, options = start + 0.5, {"start": start if carry else None}
    whole = decode_cells(screen, vae, moved, **options)
    monkeypatch.setattr("cellop_nb.analysis.predict._CELLS_AT_ONCE", 7)
    parts = decode_cells(screen, vae, moved, **options)
    np.testing.assert_allclose(parts.layers["mean"], whole.layers["mean"], rtol=1e-5, atol=1e-5)
    assert parts.shape == whole.shape and parts.X.sum() > 0
    if carry:
        np.testing.assert_array_equal(parts.X.toarray(), whole.X.toarray())
