"""The predictor: what it refuses, what a prediction holds, who may not train, and what it says of its answers."""

from __future__ import annotations

import copy
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import cellop_nb as co
from cellop_nb.analysis import means
from cellop_nb.analysis.cellop import CellOp
from cellop_nb.analysis.means import Means
from cellop_nb.analysis.metrics import log1p_cp10k
from cellop_nb.data.contract import Keys
from cellop_nb.data.groups import Groups
from cellop_nb.errors import DataError, LabelError, ModelError
from cellop_nb.models.affine import AffineOperator

from .screens import TINY, rows_of, tiny

GENES, CONTEXTS = 40, ("B", "M", "NK", "T")


def planted(seed=0, n=40):
    """Contexts B, NK and T with what the perturbations do; M has controls alone.

    "ifn" lifts a fixed quarter of the genes everywhere, "nil" does nothing, "odd" lifts other genes in every context, and
    "once" was measured in B alone. All perturbed cells but those of "nil" hold 1.3 times as many other counts, too.
    """
    rng = np.random.default_rng(seed)
    rate, counts, obs, total = rng.gamma(2.0, 1.5, size=GENES), [], [], []
    lifts = {"ifn": np.arange(10), "once": np.arange(20, 30)}
    for number, context in enumerate(CONTEXTS):
        own = rate * rng.uniform(0.7, 1.4, size=GENES)
        for name in ("control",) if context == "M" else ("control", "ifn", "nil", "odd", "once"):
            if name == "once" and context != "B":
                continue
            lift = np.ones(GENES)
            lift[lifts.get(name, [])] = 3.0
            if name == "odd":
                lift[10 * number : 10 * number + 10] = 3.0
            cells = rng.poisson(own * lift, size=(n, GENES))
            counts.append(cells)
            grown = 1.0 if name in ("control", "nil") else 1.3
            total.append(cells.sum(1) + rng.poisson(600 * grown, n))
            obs += [(context, name)] * n
    table = pd.DataFrame(obs, columns=["cell_type", "perturbation"], index=[f"c{k}" for k in range(len(obs))])
    adata = ad.AnnData(
        sparse.csr_matrix(np.concatenate(counts).astype(np.float32)),
        obs=table,
        var=pd.DataFrame(index=[f"g{k}" for k in range(GENES)]),
    )
    adata.obs["total_counts"] = np.concatenate(total).astype(float)
    Keys().write(adata)
    return adata


@pytest.fixture(scope="module")
def screen():
    return planted()


@pytest.fixture(scope="module")
def model(screen):
    return tiny(screen, n_genes=30).fit(progress=False)


@pytest.fixture(scope="module")
def cells(model):
    return model.predict(context="M", perturbation="ifn")


def same(one: ad.AnnData, other: ad.AnnData) -> bool:
    """Whether two predictions are equal in every number and name."""
    return (
        one.obs_names.equals(other.obs_names)
        and one.var_names.equals(other.var_names)
        and (one.X != other.X).nnz == 0
        and (one.layers["mean"] != other.layers["mean"]).nnz == 0
        and np.array_equal(one.obsm["X_nbvae"], other.obsm["X_nbvae"])
    )


def controls(adata, context):
    """Counts (cell, gene) of a context's control cells, by name."""
    return adata[rows_of(adata, cell_type=context, perturbation="control")]


# -- what is refused before anything is trained ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_latent": 1}, "n_latent to be a whole number of at least 2.*Found n_latent=1"),
        ({"n_latent": 4.5}, "n_latent to be a whole number.*4.5"),
        ({"n_members": 0}, "n_members to be a whole number of at least 1.*0"),
        ({"n_genes": 1}, "n_genes to be a whole number of at least 2.*1"),
        ({"operators": co.OperatorModel(4, ["ifn"], ["B"])}, "a VAE beside the operators"),
        ({"vae": co.NBVAE(["g0", "g1"], n_latent=4), "n_members": 2}, "n_members=1 with trained parts.*2"),
        (
            {"vae": co.NBVAE(["g0"], n_latent=4), "operators": co.OperatorModel(3, ["ifn"], ["B"])},
            "parts of one latent space.*3 and a VAE of 4",
        ),
    ],
    ids=str,
)
def test_parts_and_sizes_that_cannot_be_are_refused(screen, settings, message):
    with pytest.raises(ModelError, match=message) as caught:
        CellOp(screen, **settings)
    assert "To fix it" in str(caught.value)


def test_data_that_were_not_set_up_are_refused(screen):
    bare = screen.copy()
    del bare.uns["cellop_nb"]
    with pytest.raises(LabelError, match="setup"):
        CellOp(bare)


def test_an_unfitted_model_answers_nothing(screen):
    unfitted = tiny(screen)
    for ask in (
        lambda: unfitted.vae,
        lambda: unfitted.plan("M", "ifn"),
        lambda: unfitted.predict(context="M", perturbation="ifn"),
    ):
        with pytest.raises(ModelError, match="a fitted CellOp.*model.fit"):
            ask()


def test_counts_on_disk_are_refused(screen, tmp_path):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    with pytest.raises(DataError, match="memory"):
        tiny(backed).fit(progress=False)


def test_genes_of_a_ready_vae_that_the_data_lack_are_refused(screen):
    other = co.NBVAE(["g0", "g1", "none"], n_latent=4)
    with pytest.raises(DataError, match="1 of 3 missing, such as.*none"):
        CellOp(screen, vae=other).fit(progress=False)


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        ({"context": "M"}, LabelError, "a context and a perturbation"),
        ({"context": "m", "perturbation": "ifn"}, LabelError, "a context with control cells.*'m'.*'M'"),
        ({"context": "M", "perturbation": "ifm"}, LabelError, "was measured.*'ifm'.*did you mean 'ifn'"),
        ({"context": "M", "perturbation": "ifn+nix"}, LabelError, "'nix'.*'nil'"),
        ({"conditions": [("M", "ifn")], "context": "M"}, LabelError, "one way of asking"),
        ({"conditions": []}, LabelError, "columns context and perturbation.*0 rows"),
        (
            {"conditions": pd.DataFrame({"contxt": ["M"], "perturbation": ["ifn"]})},
            LabelError,
            "columns context and perturbation.*'contxt'",
        ),
        ({"context": "M", "perturbation": "ifn", "n_cells": 0}, LabelError, "n_cells.*0"),
        ({"context": "M", "perturbation": "ifn", "n_cells": 2.5}, LabelError, "n_cells.*2.5"),
        ({"context": "M", "perturbation": "ifn", "n_cells": "5"}, LabelError, "n_cells.*'5'"),
        ({"context": "M", "perturbation": "ifn", "strength": 2.0}, ModelError, "between 0 and 1.5"),
        ({"context": "M", "perturbation": "ifn", "missing_genes": "drop"}, LabelError, "'drop'"),
        ({"context": "M", "perturbation": "ifn", "out": "cells.csv"}, DataError, "cells.csv"),
    ],
    ids=str,
)
def test_questions_that_cannot_be_are_refused(model, question, error, message):
    with pytest.raises(error, match=message) as caught:
        model.predict(**question)
    assert "To fix it" in str(caught.value)


# -- what a prediction holds ----------------------------------------------------------------------------------------


def test_a_prediction_is_whole_counts_of_the_contexts_control_cells(cells, screen, model):
    source = controls(screen, "M")
    assert sorted(cells.obs["source_cell"]) == sorted(source.obs_names)
    assert cells.obs_names.is_unique and list(cells.var_names) == list(screen.var_names)
    assert sparse.issparse(cells.X) and cells.layers["mean"].shape == cells.shape
    assert (cells.X.data == np.round(cells.X.data)).all() and (cells.X.data >= 0).all()
    assert set(cells.obs["perturbation"]) == {"ifn"} and set(cells.obs["cell_type"]) == {"M"}
    assert cells.obs["predicted"].all() and cells.obsm["X_nbvae"].shape == (cells.n_obs, 4)
    assert set(cells.var_names[cells.var["modelled"]]) == set(model.genes) and len(model.genes) == 30
    # every count is the floor or the ceiling of what was expected
    assert np.abs(cells.X.toarray() - cells.layers["mean"].toarray()).max() < 1 + 1e-4


@pytest.fixture(scope="module")
def narrow(screen):
    """A model of genes g5 to g34; g0 to g4 answer to "ifn" and are not modelled, and g39 was hardly ever counted."""
    rare = screen.copy()
    dense = rare.X.toarray()
    dense[5:, 39] = 0
    rare.X = sparse.csr_matrix(dense)
    return tiny(rare, vae=co.NBVAE([f"g{k}" for k in range(5, 35)], n_latent=4)).fit(progress=False)


def level_change(cells, model, genes):
    """(gene,) change of mean log1p-CP10k between the source cells and the predicted ones."""
    source = model.adata[cells.obs["source_cell"].to_numpy()]
    return [
        sign * log1p_cp10k(x[:, genes].X.toarray(), x.obs["total_counts"].to_numpy()).mean(0)
        for sign, x in ((1, cells), (-1, source))
    ]


def test_genes_that_are_not_modelled_are_carried_to_a_planned_mean(narrow):
    cells = narrow.predict(context="M", perturbation="ifn")
    ways = cells.var["prediction"].astype(str)
    assert (ways[narrow.genes] == "moved").all() and set(ways[ways == "moved"].index) == set(narrow.genes)
    assert ways["g39"] == "kept" and (ways[[f"g{k}" for k in (0, 4, 35, 38)]] == "planned").all()
    lifted, still = [f"g{k}" for k in range(5)], [f"g{k}" for k in range(35, 39)]
    measured = []
    for context in ("B", "NK", "T"):
        for sign, name in ((1, "ifn"), (-1, "control")):
            x = narrow.adata[rows_of(narrow.adata, cell_type=context, perturbation=name)]
            measured.append(sign * log1p_cp10k(x[:, lifted].X.toarray(), x.obs["total_counts"]).mean(0))
    expected = np.sum(measured, axis=0) / 3
    change = np.sum(level_change(cells, narrow, lifted), axis=0)
    assert (expected > 0.3).all()
    assert change.mean() == pytest.approx(expected.mean(), rel=0.2) and change.min() > 0.5
    assert np.abs(np.sum(level_change(cells, narrow, still), axis=0)).max() < 0.5 * change.min()
    assert cells.uns["cellop_nb"]["predictions"]["others"].tolist() == ["planned"]


def test_a_cell_holds_no_more_than_its_library(narrow):
    cells = narrow.predict(context="M", perturbation="ifn")
    total = cells.obs["total_counts"].to_numpy()
    source = narrow.adata[cells.obs["source_cell"].to_numpy()]
    before = source.obs["total_counts"].to_numpy()
    unseen = (before - source.X.toarray().sum(1)) * total / before
    np.testing.assert_allclose((cells.layers["mean"].toarray().sum(1) + unseen) / total, 1, atol=0.02)


def test_genes_of_which_nothing_tells_keep_the_control_cells_counts(narrow):
    act = narrow.operator("M", "ifn")
    cells = narrow.predict(context="M", perturbation="mine", operator=act)
    source = narrow.adata[cells.obs["source_cell"].to_numpy()]
    others = ~cells.var["modelled"].to_numpy()
    np.testing.assert_array_equal(cells.X[:, others].toarray(), source.X[:, others].toarray())
    assert (cells.var["prediction"][others] == "kept").all()
    assert cells.uns["cellop_nb"]["predictions"]["others"].tolist() == ["kept"]


def test_data_may_hold_the_modelled_genes_alone(narrow):
    cells = narrow.on(narrow.adata[:, narrow.genes].copy()).predict(context="M", perturbation="ifn")
    assert list(cells.var_names) == narrow.genes and (cells.var["prediction"] == "moved").all()


def test_many_groups_are_kept_in_few_rows(screen, monkeypatch):
    """Nine groups in three rows: the responses, which are few, survive; noise does not."""
    groups = Groups(screen)
    exact, chosen = Means.of(screen, groups), Means.in_few_rows(screen, groups, block=7)
    np.testing.assert_allclose(chosen.change[:], exact.change, atol=1e-5)
    np.testing.assert_allclose(chosen.noise[:].sum(0), exact.noise.sum(0), rtol=1e-4)
    monkeypatch.setattr(means, "RANK", 4)
    few = Means.in_few_rows(screen, groups, block=7)
    assert few.change.left.shape[1] == 4 and len(few.pairs) == 10
    best = np.linalg.svd(exact.change)[1]
    assert np.square(few.change[:] - exact.change).sum() < 1.1 * np.square(best[4:]).sum()


def test_latents_are_moved_by_the_operator_of_the_question(cells, screen, model):
    own = screen[cells.obs["source_cell"].to_numpy(), model.genes].copy()
    co.embed(own, model.vae)
    moved = model.operator("M", "ifn")(torch.as_tensor(own.obsm["X_nbvae"]))
    np.testing.assert_allclose(cells.obsm["X_nbvae"], moved, atol=1e-5)


def test_the_mean_change_is_the_planned_one(cells, model, screen):
    """At the libraries that the cells have, which grew."""
    source = screen[cells.obs["source_cell"].to_numpy()]
    level, before = (
        log1p_cp10k(x[:, model.genes].X.toarray(), x.obs["total_counts"].to_numpy()).mean(0)
        for x in (cells, source)
    )
    planned = model.plan("M", "ifn").change
    assert np.square(level - before - planned).sum() < 0.01 * np.square(planned).sum()


def test_what_a_model_misses_of_every_context_is_mended(model):
    """One gene missed alike everywhere is mended whole; one missed in the nearest context, mostly."""
    means = model.means
    near, far = means.contexts[0], means.contexts[1:3]
    missed = {(near, "ifn"): np.eye(len(model.genes))[0] + np.eye(len(model.genes))[1]}
    missed |= {(context, "ifn"): np.eye(len(model.genes))[0] for context in far}
    target = means.control[0] + 1e-3
    nothing = np.zeros(len(model.genes))
    mended = means.correct(nothing, "M", "ifn", target, missed)
    assert mended[0] == pytest.approx(1) and 0.9 < mended[1] <= 1 and not mended[2:].any()
    itself = means.correct(nothing, near, "ifn", target, missed)
    assert itself[0] == pytest.approx(1) and not itself[1:].any(), "a context does not correct itself"
    assert not means.correct(nothing, "M", "never measured", target, missed).any()


def test_a_plan_weighs_moved_cells_corrected_and_not(model):
    planned = model.plan("M", "ifn")
    assert {"moved cells", "moved cells (corrected)"} <= set(planned.estimates)
    moved, corrected = planned.estimates["moved cells"], planned.estimates["moved cells (corrected)"]
    told = [context for context, perturbation in model.means.missed if perturbation == "ifn"]
    assert set(told) == {"B", "NK", "T"} and not np.allclose(moved, corrected)
    seen = model.means.of_perturbation("ifn")
    assert seen.moved.shape == seen.corrected.shape and not np.allclose(seen.moved, seen.corrected)


def test_libraries_grow_as_they_did_where_the_perturbation_was_measured(cells, screen, model):
    source = screen.obs["total_counts"][cells.obs["source_cell"]].to_numpy()
    grown = cells.obs["total_counts"].to_numpy() / source
    np.testing.assert_allclose(grown, grown[0])
    measured = []
    for context in ("B", "NK", "T"):
        means = [
            screen.obs["total_counts"][rows_of(screen, cell_type=context, perturbation=name)].mean()
            for name in ("ifn", "control")
        ]
        measured.append(np.log(means[0] / means[1]))
    assert np.log(grown[0]) == pytest.approx(np.mean(measured), rel=0.02)
    both = model.predict(context="M", perturbation="ifn+odd", n_cells=3)
    parts = sum(model.means.growth_of("M", name) for name in ("ifn", "odd"))
    again = both.obs["total_counts"].to_numpy() / screen.obs["total_counts"][both.obs["source_cell"]]
    np.testing.assert_allclose(np.log(again), parts)


def test_growth_is_the_groups_own_or_the_mean_or_the_sum_of_the_parts(model):
    growth = model.means.growth_of
    of_contexts = [growth(context, "ifn") for context in ("B", "NK", "T")]
    assert growth("M", "ifn") == pytest.approx(np.mean(of_contexts)) and len(set(of_contexts)) == 3
    assert growth("B", "ifn+once") == pytest.approx(growth("B", "ifn") + growth("B", "once"))
    assert growth("M", "never measured") == 0


def test_a_context_of_controls_alone_is_predicted_at_full_strength(cells, screen, model):
    """The shift of every lifted gene is as large as where it was measured, not a shrunken one."""
    lifted = [k for k, gene in enumerate(model.genes) if gene in {f"g{k}" for k in range(10)}]
    measured = np.mean([model.means.own(c, "ifn")[0] for c in ("B", "NK", "T")], axis=0)
    planned = model.plan("M", "ifn").change
    assert planned[lifted].mean() > 0.8 * measured[lifted].mean()
    assert not model.plan("M", "ifn").measured


def test_a_measured_group_is_its_own_measurement_drawn_towards_the_plan(model):
    plan = model.plan("T", "ifn")
    own, _ = model.means.own("T", "ifn")
    planned = plan.size * (plan.estimates.to_numpy() @ plan.weights.to_numpy())
    assert plan.measured and np.corrcoef(plan.change, own)[0, 1] > 0.95
    between = (np.minimum(own, planned) - 1e-9 <= plan.change) & (
        plan.change <= np.maximum(own, planned) + 1e-9
    )
    assert between.all() and np.linalg.norm(plan.change - own) < np.linalg.norm(planned - own)


def test_a_prediction_says_how_it_was_made(model):
    cells = model.predict([("M", "ifn"), ("T", "ifn")], strength=0.5, n_cells=7, seed=3)
    table = cells.uns["cellop_nb"]["predictions"]
    assert table["context"].tolist() == ["M", "T"] and table["measured"].tolist() == [False, True]
    assert (table[["strength", "n_cells", "seed"]] == [0.5, 7, 3]).all(axis=None)
    everything = model.predict(context="M", perturbation="ifn").uns["cellop_nb"]["predictions"]
    assert everything["n_cells"].tolist() == [-1]


def test_a_prediction_leaves_the_data_alone(model, screen):
    before = screen.copy()
    model.predict(context="M", perturbation="ifn")
    assert screen.obs.equals(before.obs) and (screen.X != before.X).nnz == 0
    assert set(screen.obsm) == set(before.obsm) and set(screen.uns["cellop_nb"]) == {"keys"}


# -- how one asks ---------------------------------------------------------------------------------------------------


def test_more_cells_than_controls_are_drawn_with_replacement(model):
    few, all_of_them, many = (
        model.predict(context="M", perturbation="ifn", n_cells=n) for n in (10, 40, 100)
    )
    assert few.n_obs == few.obs["source_cell"].nunique() == 10
    assert all_of_them.obs["source_cell"].nunique() == 40
    assert many.n_obs == 100 and many.obs["source_cell"].nunique() <= 40 and many.obs_names.is_unique
    assert set(many.obs["source_cell"]) <= set(all_of_them.obs["source_cell"])


def test_a_list_and_a_table_of_conditions_ask_the_same(model):
    asked = [("M", "ifn"), ("T", "odd")]
    listed = model.predict(asked)
    table = model.predict(pd.DataFrame(asked, columns=["context", "perturbation"]))
    assert same(listed, table)
    for context, perturbation in asked:
        alone = model.predict(context=context, perturbation=perturbation)
        assert same(alone, listed[rows_of(listed, cell_type=context, perturbation=perturbation)])


def test_a_table_may_say_how_many_and_how_strong(model):
    table = pd.DataFrame(
        {"context": ["M", "M"], "perturbation": ["ifn", "odd"], "n_cells": [5, None], "strength": [0.5, 1.0]}
    )
    cells = model.predict(table)
    assert cells.obs["perturbation"].value_counts().to_dict() == {"odd": 40, "ifn": 5}
    alone = model.predict(context="M", perturbation="ifn", n_cells=5, strength=0.5)
    assert same(alone, cells[rows_of(cells, perturbation="ifn")])
    both = pd.DataFrame({"context": "M", "perturbation": "ifn", "strength": [0.5, 1.0]})
    assert model.predict(both).obs_names.is_unique
    for wrong, message in (
        (pd.concat([both, both]), "'ifn' in 'M' twice"),
        (("M", "ifn"), "a list of pairs"),
    ):
        with pytest.raises(LabelError, match=message):
            model.predict(wrong)


def test_no_strength_leaves_every_count_and_half_of_it_lies_between(model, screen):
    none, half, full = (
        model.predict(context="M", perturbation="ifn", strength=strength) for strength in (0.0, 0.5, 1.0)
    )
    source = screen[none.obs["source_cell"].to_numpy()]
    np.testing.assert_array_equal(none.X.toarray(), source.X.toarray())
    np.testing.assert_allclose(none.layers["mean"].toarray(), source.X.toarray(), atol=1e-4)
    assert (none.obs["total_counts"].to_numpy() == source.obs["total_counts"].to_numpy()).all()
    lifted = [f"g{k}" for k in range(10) if f"g{k}" in model.genes]
    level = [part[:, lifted].X.mean() for part in (none, half, full)]
    assert level[0] + 0.25 * (level[2] - level[0]) < level[1] < level[2] - 0.25 * (level[2] - level[0])


def test_an_operator_of_ones_own_moves_the_cells(model, screen):
    ifn = model.operator("M", "ifn")
    own = controls(screen, "M")[:, model.genes].copy()
    co.embed(own, model.vae)
    z = torch.as_tensor(own.obsm["X_nbvae"])
    sequence = co.combinations.sequence(model.operators, [("ifn", 0.5), "odd"])
    back = AffineOperator(ifn.matrix, ifn.shift, "there").inverse() @ ifn
    for act, name in ((sequence, "first ifn, then odd"), (back, None)):
        cells = model.predict(context="M", perturbation=name, operator=act)
        expected = pd.DataFrame(act(z).numpy(), index=own.obs_names).loc[cells.obs["source_cell"]]
        np.testing.assert_allclose(cells.obsm["X_nbvae"], expected, atol=1e-4)
        assert set(cells.obs["perturbation"]) == {name or act.label}
        assert cells.uns["cellop_nb"]["predictions"]["operator"].tolist() == [act.label]
    # there and back again are the counts of the control cells
    np.testing.assert_allclose(
        cells.X.toarray(), screen[cells.obs["source_cell"].to_numpy()].X.toarray(), atol=1
    )
    assert np.abs(cells.X - screen[cells.obs["source_cell"].to_numpy()].X).sum() < 0.001 * cells.X.sum()


def test_a_file_is_what_memory_holds(model, tmp_path):
    asked = [("M", "ifn"), ("T", "odd"), ("B", "once")]
    path = model.predict(asked, out=tmp_path / "cells.h5ad")
    stored, held = ad.read_h5ad(path), model.predict(asked)
    assert path == tmp_path / "cells.h5ad"
    np.testing.assert_array_equal(stored.X.toarray(), held.X.toarray())
    np.testing.assert_array_equal(stored.obsm["X_nbvae"], held.obsm["X_nbvae"])
    assert stored.obs_names.equals(held.obs_names) and stored.var["modelled"].equals(held.var["modelled"])
    for column in held.obs:
        assert stored.obs[column].tolist() == held.obs[column].tolist(), column
    table = stored.uns["cellop_nb"]["predictions"]
    assert table["context"].tolist() == ["M", "T", "B"]
    held.write_h5ad(tmp_path / "memory.h5ad")


class Client:
    """What of a Dask client is used, done at once in this process."""

    class Future:
        def __init__(self, value):
            self.value = value

        def result(self):
            return self.value

    def __init__(self):
        self.submitted = 0

    def scatter(self, value, **_):
        return copy.deepcopy(value)

    def submit(self, function, *arguments, pure):
        self.submitted += 1
        return self.Future(function(*arguments))

    def cancel(self, futures):
        assert futures == []


def test_conditions_are_shared_out_with_the_same_numbers(model):
    asked, client = [("M", "ifn"), ("T", "odd"), ("B", "once")], Client()
    assert same(model.predict(asked, client=client), model.predict(asked))
    assert client.submitted == 3


def test_a_prediction_that_was_ended_goes_on(model, tmp_path, monkeypatch):
    """Of three conditions two are done when it ends; the same call makes the third, and the file is the same."""
    asked, path = [("M", "ifn"), ("T", "odd"), ("B", "once")], tmp_path / "cells.h5ad"
    whole = ad.read_h5ad(model.predict(asked, out=tmp_path / "whole.h5ad"))
    answer, made = CellOp.answer, []

    def once(self, question, *more):
        if question[0] == "B" and "B" not in made:
            made.append("B")
            raise KeyboardInterrupt
        made.append(question[0])
        return answer(self, question, *more)

    monkeypatch.setattr(CellOp, "answer", once)
    with pytest.raises(KeyboardInterrupt):
        model.predict(asked, out=path)
    assert len([*tmp_path.glob("cells.h5ad.parts/*.h5ad")]) == 2 and not path.exists()
    written = ad.read_h5ad(model.predict(asked, out=path))
    assert made == ["M", "T", "B", "B"] and {*tmp_path.iterdir()} == {tmp_path / "whole.h5ad", path}
    assert (written.X != whole.X).nnz == 0
    np.testing.assert_array_equal(written.obsm["X_nbvae"], whole.obsm["X_nbvae"])
    pd.testing.assert_frame_equal(written.obs, whole.obs)
    with pytest.raises(KeyboardInterrupt):
        made.clear()
        model.predict(asked, out=path, seed=5)
    assert made == ["M", "T", "B"], "parts of another seed are others"
    assert len([*tmp_path.glob("cells.h5ad.parts/*.h5ad")]) == 2


def test_dask_gives_the_same_numbers(model):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: cellop_nb[notebook]")
    asked = [("M", "ifn"), ("T", "odd")]
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        assert same(model.predict(asked, client=client), model.predict(asked))


def test_genes_that_new_controls_lack(model, screen):
    lacking = model.genes[0]
    fewer = controls(screen, "M")[:, screen.var_names[::-1]].copy()
    fewer = fewer[:, fewer.var_names != lacking].copy()
    asked = model.on(fewer)
    with pytest.raises(DataError, match=f"1 of 30 missing, such as .*{lacking}.*missing_genes"):
        asked.predict(context="M", perturbation="ifn")
    whole = model.predict(context="M", perturbation="ifn")
    kept = fewer.var_names
    for way in ("zero", "impute"):
        cells = asked.predict(context="M", perturbation="ifn", missing_genes=way)
        assert cells.var_names.equals(kept) and cells.var["modelled"].sum() == 29
        gap = np.abs(cells.X.toarray().mean(0) - whole[:, kept].X.toarray().mean(0))
        assert gap.mean() < 0.2 * whole.X.mean()
    assert asked._missing_genes == "refuse"


def test_genes_that_the_model_does_not_know_are_kept_and_their_order_is_the_datas(model, screen):
    turned = controls(screen, "M")[:, screen.var_names[::-1]].copy()
    cells = model.on(turned).predict(context="M", perturbation="ifn")
    assert list(cells.var_names) == list(screen.var_names[::-1])
    assert same(cells[:, screen.var_names], model.predict(context="M", perturbation="ifn"))


# -- what training sees ---------------------------------------------------------------------------------------------


def weights(model):
    return [value.clone() for part in (model.vae, model.operators) for value in part.state_dict().values()]


def test_ready_parts_are_not_trained_again(model, screen):
    before = weights(model)
    ready = tiny(screen, vae=model.vae, operators=model.operators).fit(progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(ready), strict=True))
    assert ready.genes == model.genes and ready.n_latent == 4
    assert not ready.history["stage"].str.contains("operators").all()
    only = tiny(screen, vae=model.vae).fit(progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.vae.state_dict().values(), only.vae.state_dict().values(), strict=True)
    )
    assert same(
        ready.predict(context="M", perturbation="ifn"), model.predict(context="M", perturbation="ifn")
    )


def test_the_order_of_rows_does_not_matter(model, screen):
    order = np.random.default_rng(0).permutation(screen.n_obs)
    shuffled = tiny(screen[order].copy(), n_genes=30).fit(progress=False)
    assert shuffled.genes == model.genes
    asked = [("M", "ifn"), ("T", "odd")]
    assert same(shuffled.predict(asked), model.predict(asked))
    assert same(shuffled.predict(asked, n_cells=15), model.predict(asked, n_cells=15))
    assert shuffled.verdict("M", "ifn") == model.verdict("M", "ifn")


def test_a_seed_is_all_that_a_model_depends_on(model, screen):
    torch.manual_seed(99)
    again = tiny(screen, n_genes=30).fit(progress=False)
    other = tiny(screen, n_genes=30, seed=1).fit(progress=False)
    asked = {"context": "M", "perturbation": "ifn"}
    assert same(again.predict(**asked), model.predict(**asked))
    assert not same(other.predict(**asked), model.predict(**asked))
    assert (model.predict(**asked, seed=1).X != model.predict(**asked).X).nnz > 0


def test_test_cells_never_train(screen):
    """Their counts and labels of the split are all that differ: nothing that is fitted or predicted may."""
    kept = screen.copy()
    held = rows_of(kept, cell_type="T") & (kept.obs["perturbation"] != "control").to_numpy()
    kept.obs["split"] = np.where(held, "test", "train")
    spoilt = kept.copy()
    dense = spoilt.X.toarray()
    dense[held] = np.random.default_rng(0).poisson(9.0, dense[held].shape)
    spoilt.X = sparse.csr_matrix(dense)
    spoilt.obs.loc[held, "total_counts"] *= 5
    one, other = (tiny(data, n_genes=30).fit(progress=False) for data in (kept, spoilt))
    assert one.genes == other.genes
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))
    assert same(one.predict(context="T", perturbation="ifn"), other.predict(context="T", perturbation="ifn"))
    assert one.verdict("T", "ifn") == other.verdict("T", "ifn") and not one.plan("T", "ifn").measured
    without = tiny(kept[~held].copy(), n_genes=30).fit(progress=False)
    assert same(
        one.predict(context="T", perturbation="ifn"), without.predict(context="T", perturbation="ifn")
    )


def test_a_validation_split_of_ones_own_is_used(screen):
    own = screen.copy()
    co.split(own, test_fraction=0.0, seed=5)
    fitted = tiny(own, n_genes=30)
    assert fitted._training_cells().obs["split"].value_counts()["val"] == (own.obs["split"] == "val").sum()


def test_members_average_their_plans_and_share_the_cells(screen, model):
    two = tiny(screen, n_genes=30, n_members=2).fit(progress=False)
    assert len(two.members) == 2 and two.members[0].vae.genes == two.members[1].vae.genes
    for a, b in zip(two.vae.state_dict().values(), model.vae.state_dict().values(), strict=True):
        assert torch.equal(a, b), "the first member is the model of the seed alone"
    cells = two.predict(context="M", perturbation="ifn")
    assert cells.n_obs == cells.obs["source_cell"].nunique() == 40 and "mean" in cells.layers
    assert two.predict(context="M", perturbation="ifn", n_cells=201).obs_names.is_unique
    moved = [
        start.change(two._operator_of(m, "ifn", "M"))
        for start, m in zip(two._starts("M"), two.members, strict=True)
    ]
    planned = two.plan("M", "ifn").estimates["moved cells"]
    np.testing.assert_allclose(planned, np.mean(moved, axis=0))


def test_columns_of_other_names_are_read(screen):
    renamed = screen.copy()
    renamed.obs = renamed.obs.rename(columns={"cell_type": "kind", "perturbation": "condition"})
    renamed.obs["condition"] = renamed.obs["condition"].astype(str).replace({"control": "ctrl"})
    renamed.layers["raw"] = renamed.X.copy()
    renamed.X = sparse.csr_matrix(renamed.shape, dtype=np.float32)
    co.setup(renamed, layer="raw", perturbation_key="condition", context_key="kind", control="ctrl")
    fitted = tiny(renamed, n_genes=30).fit(progress=False)
    cells = fitted.predict(context="M", perturbation="ifn")
    plain = tiny(screen, n_genes=30).fit(progress=False).predict(context="M", perturbation="ifn")
    assert same(cells, plain) and set(cells.obs["condition"]) == {"ifn"} and set(cells.obs["kind"]) == {"M"}


def test_one_context_alone_is_fitted_and_says_that_nothing_could_be_left_out(screen):
    alone = tiny(screen[rows_of(screen, cell_type="B")].copy(), n_genes=None).fit(progress=False)
    assert "No context could be held out" in str(alone.choice) and not len(alone.choice.table)
    cells = alone.predict(context="B", perturbation="ifn")
    assert np.isfinite(cells.layers["mean"].data).all()


def test_perturbations_that_were_never_measured_are_described(screen):
    features = pd.DataFrame(
        np.eye(5)[:, :4] + 0.1, index=["ifn", "nil", "odd", "once", "new"], columns=list("abcd")
    )
    fitted = tiny(screen, n_genes=30, features=features).fit(progress=False)
    assert "new" in fitted.perturbations
    cells = fitted.predict(context="M", perturbation="new")
    assert set(cells.obs["perturbation"]) == {"new"} and np.isfinite(cells.layers["mean"].data).all()
    assert not fitted.plan("M", "new").measured
    with pytest.raises(LabelError, match="features.*ifn"):
        tiny(screen, n_genes=30, features=features.iloc[1:]).fit(progress=False)
    broken = features.copy()
    broken.iloc[2, 0] = np.nan
    with pytest.raises(ModelError, match="odd"):
        tiny(screen, n_genes=30, features=broken).fit(progress=False)


# -- what it says of itself -----------------------------------------------------------------------------------------


def test_verdicts(model):
    assert "no effect to predict; none of 3 measured groups" in model.verdict("M", "nil")
    assert "cannot be checked" in model.verdict("M", "once")
    assert "cannot be known" in model.verdict("M", "odd")
    assert model.verdict("T", "ifn").startswith("ifn in T: measured")
    normal, explained = model.verdict("M", "ifn"), model.explained("M", "ifn")
    assert (
        f"in 3 held-out contexts such predictions explained {100 * explained['CellOp']:.0f} % of the change"
        in normal
    )
    best = explained.drop("CellOp")
    assert f"{best.idxmax()}, explained {100 * best.max():.0f} %" in normal and explained["CellOp"] > 0.5


def test_a_group_without_effect_has_none_to_predict_where_others_have_one(model):
    mixed = copy.copy(model)
    here = (model.effects["context"] == "T") & (model.effects["perturbation"] == "ifn")
    mixed.effects = model.effects.assign(different=model.effects["different"] & ~here)
    said = mixed.verdict("T", "ifn")
    assert "no effect to predict; it was measured here" in said and "2 of 3 measured groups do" in said
    assert mixed.verdict("B", "ifn").startswith("ifn in B: measured")


def test_explained_is_what_left_out_predictions_take_off_the_distance(model):
    table = model.left_out
    assert set(table["method"]) == {"no change", "CellOp", "mean shift", "near mean shift", "linear"}
    assert set(table["context"]) == {"B", "NK", "T"} and "once" not in set(table["perturbation"])
    left = {"CellOp": 0.0, "no change": 0.0}
    for row in table.itertuples():
        if row.perturbation == "ifn" and row.context != "B" and row.method in left:
            left[row.method] += row.energy - row.floor
    assert model.explained("B", "ifn")["CellOp"] == pytest.approx(1 - left["CellOp"] / left["no change"])
    assert abs(table["floor"]).max() < 0.2 * table.query("perturbation == 'ifn'")["energy"].max()
    assert model.explained("M", "once").empty and model.explained("M", "odd").max() <= 0


def test_intervals_are_sorted_and_hold_the_change(model):
    table = model.intervals("M", "ifn")
    assert list(table) == ["gene", "change", "low", "high"] and set(table["gene"]) == set(model.genes)
    assert table["change"].abs().is_monotonic_decreasing
    assert ((table["low"] <= table["change"]) & (table["change"] <= table["high"])).all()
    assert set(table["gene"][:5]) <= {f"g{k}" for k in range(10)}
    assert model.intervals("M", "once")[["low", "high"]].isna().all(axis=None), "one context tells no error"


def test_support_names_the_contexts_that_are_borrowed_from(model):
    table = model.support("M", "ifn")
    assert sorted(table["context"]) == ["B", "NK", "T"] and table["distance"].is_monotonic_increasing
    assert 0.5 < table["share"].sum() <= 1 + 1e-9 and (table["response"] > 0).all()
    plan = model.plan("M", "ifn")
    assert table.attrs["planned"] == pytest.approx(np.linalg.norm(plan.change))
    assert table.attrs["extrapolated"] == (table.attrs["planned"] > table["response"].max())
    assert list(model.support("T", "ifn")["context"]) != [] and "T" not in set(
        model.support("T", "ifn")["context"]
    )


def test_support_says_that_a_context_lies_far_away(model, screen):
    alien = screen.copy()
    far = rows_of(alien, cell_type="M")
    dense = alien.X.toarray()
    dense[far] = np.random.default_rng(0).permutation(dense[far].T).T * 3
    alien.X = sparse.csr_matrix(dense)
    near, away = (asked.support("M", "ifn")["distance"].min() for asked in (model, model.on(alien)))
    assert away > 1.5 * near


def test_history_and_costs_name_the_stages(model):
    assert {"VAE, controls", "VAE, all cells", "operators"} == set(model.history["stage"])
    assert model.history["epoch"].min() >= 0 and model.history["train_loss"].notna().all()
    assert model.costs["stage"].tolist() == ["data", "VAE", "operators", "choice"]
    assert (model.costs[["wall", "cpu", "peak_mb"]] >= 0).all(axis=None)


def test_the_choice_is_a_table_and_a_sentence(model):
    table = model.choice.table
    assert list(table) == ["estimator", "left", "weight"] and table["weight"].sum() == pytest.approx(1)
    assert (table["weight"] >= 0).all() and model.choice.n_contexts > 3
    left = table.set_index("estimator")["left"]
    assert left["no change"] == pytest.approx(1, abs=0.1)
    words, best = str(model.choice), left.drop("no change").idxmin()
    assert f"no change misses {100 * left['no change']:.0f} %" in words
    assert f"single estimator, {best}, misses {100 * left[best]:.0f} %" in words
    assert "Choice" in model.choice._repr_html_()


def test_some_contexts_of_a_perturbation_are_enough_to_choose(screen):
    few = tiny(screen, n_genes=30, recipe=replace(TINY, most_judged=2)).fit(progress=False)
    assert len(few.means.moved) == 2 and len(few.means.of_perturbation("ifn")) == 3
    assert few.choice.n_contexts > 0 and few.choice.table["weight"].sum() == pytest.approx(1)


def test_it_shows_itself(model, screen):
    assert repr(tiny(screen)).endswith("not fitted") and "600 cells" not in repr(model)
    assert f"{screen.n_obs} cells" in repr(model) and "planned from" in repr(model)
    assert "not fitted: model.fit()" in tiny(screen)._repr_html_()
    html = model._repr_html_()
    assert "fitted" in html and "ifn" in html
    assert "Planned response" in model.plan("M", "ifn")._repr_html_()


class Epochs(co.callbacks.Callback):
    """Counts the epochs of all trainings."""

    def __init__(self):
        self.n = 0

    def on_epoch_end(self, trainer, row):
        self.n += 1


def test_callbacks_see_the_trainings_of_the_model_itself(screen):
    seen = Epochs()
    fitted = tiny(screen, n_genes=30)
    fitted.fit(callbacks=[seen], progress=False)
    assert seen.n == fitted.recipe.vae_epochs + fitted.recipe.finish_epochs + fitted.recipe.operator_epochs


def test_operators_keep_the_share_of_their_matrices_that_left_out_contexts_ask_for(model, screen, tmp_path):
    assert list(model.choice.matrices.index) == [1.0, 0.5, 0.0] and (model.choice.matrices > 0).all()
    shifts = copy.copy(model)
    shifts.choice = replace(model.choice, matrices=pd.Series({1.0: 0.2, 0.5: 0.15, 0.0: 0.1}))
    assert "no matrix is left: the operators are shifts here" in str(shifts.choice)
    whole = copy.copy(model)
    whole.choice = replace(model.choice, matrices=pd.Series({1.0: 0.1, 0.5: 0.15, 0.0: 0.2}))
    z = torch.as_tensor(model._starts("M")[0].z)
    moves = {one: one.operator("M", "ifn")(z) - z for one in (shifts, whole)}
    assert moves[shifts].std(0).max() < 1e-5 < moves[whole].std(0).max()
    torch.testing.assert_close(moves[shifts].mean(0), moves[whole].mean(0), rtol=1e-4, atol=1e-5)
    shifts._plans = {}
    file = shifts.save(tmp_path / "shifts.safetensors")
    assert co.load(file, screen).choice.matrix_share == 0.0


class Interrupts(Epochs):
    """Press stop at the end of an epoch."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def on_epoch_end(self, trainer, row):
        super().on_epoch_end(trainer, row)
        if self.n == self.at:
            raise KeyboardInterrupt


def test_an_interrupted_fit_goes_on_where_it_was(screen, model):
    fitted, recipe = tiny(screen, n_genes=30), model.recipe
    before = recipe.vae_epochs + recipe.finish_epochs
    with pytest.raises(KeyboardInterrupt):
        fitted.fit(callbacks=[Interrupts(before + 1)], progress=False)
    with pytest.raises(ModelError, match="a fitted CellOp"):
        fitted.predict(context="M", perturbation="ifn")
    rest = Epochs()
    fitted.fit(callbacks=[rest], progress=False)
    assert rest.n == recipe.operator_epochs  # the VAE was not trained again
    question = {"context": "M", "perturbation": "ifn"}
    assert same(fitted.predict(**question), model.predict(**question))
    assert fitted.history[["stage", "epoch"]].equals(model.history[["stage", "epoch"]])


def test_a_fit_on_other_counts_takes_nothing_over_and_where_it_is_interrupted_the_old_one_answers(
    screen, model
):
    fitted, seen = tiny(screen.copy(), n_genes=30), Epochs()
    fitted.fit(progress=False)
    kept = dict(vars(fitted))
    fitted.adata.X.data *= 2
    with pytest.raises(KeyboardInterrupt):
        fitted.fit(callbacks=[Interrupts(1)], progress=False)
    assert [name for name, value in vars(fitted).items() if value is not kept[name]] == []
    fitted.fit(callbacks=[seen], progress=False)
    assert seen.n == fitted.recipe.vae_epochs + fitted.recipe.finish_epochs + fitted.recipe.operator_epochs


def test_contexts_of_several_columns_are_asked_for_by_their_levels(screen):
    both = screen[rows_of(screen, perturbation="ifn") | rows_of(screen, perturbation="control")].copy()
    both.obs["donor"] = np.where(np.arange(both.n_obs) % 2, "d1", "d2")
    both = both[
        ~((both.obs["cell_type"] == "T") & (both.obs["donor"] == "d2") & (both.obs["perturbation"] == "ifn"))
    ]
    both = both.copy()
    co.setup(both, context_key=["cell_type", "donor"])
    model = tiny(both, n_genes=None).fit(progress=False)
    plain = model.predict(context="T | d2", perturbation="ifn")
    assert {*plain.obs["cell_type"]} == {"T"} and {*plain.obs["donor"]} == {"d2"}
    for context in (("T", "d2"), {"donor": "d2", "cell_type": "T"}):
        assert same(model.predict(context=context, perturbation="ifn"), plain)
        assert model.verdict(context, "ifn") == model.verdict("T | d2", "ifn")
    table = pd.DataFrame({"cell_type": ["T"], "donor": ["d2"], "perturbation": ["ifn"]})
    assert same(model.predict(table), plain) and same(model.predict([(("T", "d2"), "ifn")]), plain)
    planned = model.plan(("T", "d2"), "ifn")
    assert "factors" in planned.weights and planned.weights.sum() == pytest.approx(1)
    with pytest.raises(LabelError, match=r"a level of each of .'cell_type', 'donor'"):
        model.predict(context={"cell_type": "T"}, perturbation="ifn")
    for context in (7, np.nan):
        with pytest.raises(LabelError, match="a context with control cells"):
            model.predict([(context, "ifn")])
