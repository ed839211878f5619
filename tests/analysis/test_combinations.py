"""Combinations, sequences and reversal on planted operators, where the answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch
from cellop_nb.analysis.fits import fit_response
from cellop_nb.analysis.transfer import Complexity, Response

from cellop_nb import datasets, energy_distance, split
from cellop_nb.analysis.combinations import (
    RULES,
    combine,
    order_effects,
    response_operator,
    reversal,
    sequence,
)
from cellop_nb.analysis.metrics import Undefined
from cellop_nb.data.groups import Groups
from cellop_nb.errors import LabelError, ModelError
from cellop_nb.models.affine import AffineOperator
from cellop_nb.models.carry import Remainder
from cellop_nb.models.operators import Condition

from .screens import interacting

DOUBLE = "drug 1+drug 2"


AFFINE = Complexity(ridge=1e-2)


@pytest.fixture(scope="module")
def screen():
    """True latents as the representation: what is tested is the operators, not an encoder."""
    adata = datasets.synthetic(
        n_contexts=2, n_perturbations=3, combinations=[DOUBLE], n_cells=300, n_genes=20, n_latent=4, seed=3
    )
    split(adata, holdout={"perturbation": DOUBLE})
    adata.obsm["X_nbvae"] = adata.obsm["X_truth"]
    return adata


@pytest.fixture(scope="module")
def response(screen):
    return fit_response(screen, AFFINE, max_epochs=15, cells_per_group=128)


def cells(screen, context, perturbation):
    rows = (screen.obs["cell_type"] == context) & (screen.obs["perturbation"] == perturbation)
    return torch.as_tensor(screen.obsm["X_truth"][rows.to_numpy()])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_predicts_a_double_that_was_never_seen(screen, response, rule):
    for context in ("type A", "type B"):
        start, real = cells(screen, context, "control"), cells(screen, context, DOUBLE)
        moved = combine(response.operators, DOUBLE, context, rule=rule)(start)
        assert energy_distance(moved, real) < 0.25 * energy_distance(start, real)


def test_composition_in_the_planted_order_is_nearest_to_the_planted_double(screen, response):
    """The planted double is B after A: its cells must lie nearer to that order than to the other."""
    for context in ("type A", "type B"):
        start, real = cells(screen, context, "control"), cells(screen, context, DOUBLE)

        def energy(label, rule="composition", context=context, start=start, real=real):
            return float(energy_distance(combine(response.operators, label, context, rule=rule)(start), real))

        assert energy(DOUBLE) < 0.6 * energy("drug 2+drug 1")
        assert energy(DOUBLE) < 0.6 * energy(DOUBLE, "axes")


def test_rules_agree_on_single_perturbations(response):
    found = [combine(response.operators, "drug 1", "type A", rule=rule) for rule in ("axes", "composition")]
    torch.testing.assert_close(found[0].matrix, found[1].matrix)


def test_unknown_rule_and_perturbation_are_refused(response):
    with pytest.raises(LabelError, match="did you mean 'composition'"):
        combine(response.operators, DOUBLE, rule="compositon")
    with pytest.raises(LabelError, match="drug 9"):
        combine(response.operators, "drug 1+drug 9", rule="composition")
    with pytest.raises(Undefined, match="drug 9"):
        response_operator(response, "drug 1+drug 9", "type A")
    with pytest.raises(Undefined, match="not a combination"):
        response_operator(response, "drug 1", "type A", rule="composition")


def test_sequence_of_part_strengths(response):
    op = response.operators.operator(Condition.parse("drug 1", "type A"))
    halves = sequence(response.operators, [("drug 1", 0.5), ("drug 1", 0.5)], "type A")
    torch.testing.assert_close(halves.matrix, op.matrix, atol=1e-5, rtol=1e-5)
    there = sequence(response.operators, ["drug 1", ("drug 2", 1.0)], "type A")
    composed = combine(response.operators, DOUBLE, "type A", rule="composition")
    torch.testing.assert_close(there.shift, composed.shift)
    with pytest.raises(ModelError, match="between 0 and 1.5"):
        sequence(response.operators, [("drug 1", 2.0)], "type A")


def test_order_effects_are_largest_where_maps_do_not_commute(screen, response):
    table = order_effects(screen, response.operators)
    assert len(table) == 6 and table["energy"].is_monotonic_decreasing
    nothing = table[(table["first"] == "drug 3") | (table["second"] == "drug 3")]  # drug 3 does nothing
    strong = table[(table["first"] == "drug 1") & (table["second"] == "drug 2")]
    assert strong["gap"].min() > 1.5 * nothing["gap"].max()
    assert strong["energy"].min() > 5 * nothing["energy"].max()


def test_order_effects_of_many_are_those_of_the_few_that_move_cells_furthest(screen, response):
    table = order_effects(screen, response.operators, max_pairs=1)
    assert list(zip(table["first"], table["second"], strict=True)) == [("drug 1", "drug 2")] * 2
    every = order_effects(Groups(screen, use_rep="X_nbvae"), response.operators, contexts=["type B"])
    pd.testing.assert_series_equal(
        table.set_index("context").loc["type B"], every.set_index("context").iloc[0]
    )
    few = order_effects(screen, response.operators, max_pairs=1, max_cells=100)
    np.testing.assert_allclose(few["relative"], table["relative"], rtol=0.2)
    with pytest.raises(LabelError, match="type A"):
        order_effects(screen, response.operators, contexts=["typ A"])


def test_reversal_leads_perturbed_cells_back(screen, response):
    table = reversal(screen, response.operators, split=None)
    wide = table[table["perturbation"].isin(["drug 1", "drug 2"])].pivot_table(
        index="group", columns="method", values="energy"
    )
    assert (wide["operator"] < 0.1 * wide["no change"]).all()
    assert (wide["operator"] < wide["own mean"]).all()
    floor, limit = table["floor"].abs().mean(), table["limit"].mean()
    assert floor < limit and wide["operator"].mean() < 5 * limit


def test_reversal_without_an_inverse_says_so(screen, response, monkeypatch):
    singular = AffineOperator(torch.zeros(4, 4), torch.zeros(4), "collapse")
    monkeypatch.setattr(type(response.operators), "operator", lambda *_: singular)
    table = reversal(screen, response.operators, split=None).set_index("method").loc["operator"]
    assert table["energy"].isna().all() and table["reason"].str.contains("condition number").all()


# -- interaction, learned where doubles were measured


def test_interaction_is_learned_where_the_double_was_measured():
    adata = interacting()
    training = {"max_epochs": 12, "lr": 5e-2, "context_key": None}
    axes = fit_response(adata, Complexity(ridge=10.0), **training).operators
    move = axes.operator(Condition(("A", "B")))
    start = torch.as_tensor(adata.obsm["X_nbvae"][:100])
    assert torch.allclose(move(start).mean(0), torch.tensor([2.0, 2.0]), atol=0.4)
    unseen = adata[adata.obs["perturbation"] != "A+B"].copy()
    additive = fit_response(unseen, Complexity(ridge=10.0), **training).operators
    move = additive.operator(Condition(("A", "B")))
    assert torch.allclose(move(start).mean(0), torch.tensor([4.0, 4.0]), atol=0.4)


def test_a_combination_takes_over_what_the_decoder_misses_of_its_parts():
    """A decoder that knows no perturbation at all: the prediction then is that of the additive rule, in levels."""
    parts = {("x", "A"): Remainder(np.array([1.0, 0.0]), 0.2), ("x", "B"): Remainder(np.array([0.5, -2.0]))}
    everywhere = {"C": Remainder(np.ones(2), -0.1)}
    response = Response(None, Complexity(rank=0, remainder=True), remainders=everywhere, missed=parts)
    for label, level, growth in (
        ("A+B", [1.5, -2.0], 0.2),
        ("A+C", [2.0, 1.0], 0.1),
        ("C", [1.0, 1.0], -0.1),
    ):
        found = response.remainder(label, "x")
        np.testing.assert_array_equal(found.level, level)
        assert found.growth == pytest.approx(growth)
    assert response.remainder("A+B", "y") is None and response.remainder("A", "x") is None


def test_one_perturbation_has_no_order(screen, response):
    table = order_effects(screen, response.operators, pairs=[])
    assert not len(table) and {"first", "second", "commutator", "energy"} <= set(table)
