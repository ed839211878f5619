"""Combinations, sequences and reversal on planted operators, where the answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch

from cellop_nb import datasets, energy_distance, split
from cellop_nb.analysis.combinations import (
    RULES,
    combine,
    order_effects,
    reversal,
    sequence,
)
from cellop_nb.data.contract import Keys
from cellop_nb.data.groups import Groups
from cellop_nb.errors import LabelError, ModelError
from cellop_nb.models.affine import AffineOperator
from cellop_nb.models.operators import Condition, OperatorModel
from cellop_nb.training.loop import Machine
from cellop_nb.training.operators import OperatorTrainer, Penalties, new_operators

from .screens import acted, interacting

DOUBLE = "drug 1+drug 2"


def fit(adata, ridge: float, **training) -> OperatorModel:
    """Operators whose contexts share everything, trained on the latents."""
    model = new_operators(adata, context_rank=None)
    penalties, machine = Penalties(ridge=ridge, context_ridge=0.01), Machine(accelerator="cpu")
    options = {"lr": 2e-2, "penalties": penalties, "machine": machine, "progress": False} | training
    OperatorTrainer(adata, model, **options).fit()
    return model.eval()


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
def operators(screen):
    return fit(screen, 1e-2, max_epochs=15, cells_per_group=128)


def cells(screen, context, perturbation):
    rows = (screen.obs["cell_type"] == context) & (screen.obs["perturbation"] == perturbation)
    return torch.as_tensor(screen.obsm["X_truth"][rows.to_numpy()])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_predicts_a_double_that_was_never_seen(screen, operators, rule):
    for context in ("type A", "type B"):
        start, real = cells(screen, context, "control"), cells(screen, context, DOUBLE)
        moved = combine(operators, DOUBLE, context, rule=rule)(start)
        assert energy_distance(moved, real) < 0.25 * energy_distance(start, real)


def test_composition_in_the_planted_order_is_nearest_to_the_planted_double(screen, operators):
    """The planted double is B after A: its cells must lie nearer to that order than to the other."""
    for context in ("type A", "type B"):
        start, real = cells(screen, context, "control"), cells(screen, context, DOUBLE)

        def energy(label, rule="composition", context=context, start=start, real=real):
            return float(energy_distance(combine(operators, label, context, rule=rule)(start), real))

        assert energy(DOUBLE) < 0.6 * energy("drug 2+drug 1")
        assert energy(DOUBLE) < 0.6 * energy(DOUBLE, "axes")


def test_rules_agree_on_single_perturbations(operators):
    found = [combine(operators, "drug 1", "type A", rule=rule) for rule in ("axes", "composition")]
    torch.testing.assert_close(found[0].matrix, found[1].matrix)


def test_unknown_rule_and_perturbation_are_refused(operators):
    with pytest.raises(LabelError, match="did you mean 'composition'"):
        combine(operators, DOUBLE, rule="compositon")
    with pytest.raises(LabelError, match="drug 9"):
        combine(operators, "drug 1+drug 9", rule="composition")


def test_sequence_of_part_strengths(operators):
    op = operators.operator(Condition.parse("drug 1", "type A"))
    halves = sequence(operators, [("drug 1", 0.5), ("drug 1", 0.5)], "type A")
    torch.testing.assert_close(halves.matrix, op.matrix, atol=1e-5, rtol=1e-5)
    there = sequence(operators, ["drug 1", ("drug 2", 1.0)], "type A")
    composed = combine(operators, DOUBLE, "type A", rule="composition")
    torch.testing.assert_close(there.shift, composed.shift)
    with pytest.raises(ModelError, match="between 0 and 1.5"):
        sequence(operators, [("drug 1", 2.0)], "type A")


def test_order_effects_are_largest_where_maps_do_not_commute(screen, operators):
    table = order_effects(screen, operators)
    assert len(table) == 6 and table["energy"].is_monotonic_decreasing
    nothing = table[(table["first"] == "drug 3") | (table["second"] == "drug 3")]  # drug 3 does nothing
    strong = table[(table["first"] == "drug 1") & (table["second"] == "drug 2")]
    assert strong["gap"].min() > 1.5 * nothing["gap"].max()
    assert strong["energy"].min() > 5 * nothing["energy"].max()


def test_order_effects_of_many_are_those_of_the_few_that_move_cells_furthest(screen, operators):
    table = order_effects(screen, operators, max_pairs=1)
    assert list(zip(table["first"], table["second"], strict=True)) == [("drug 1", "drug 2")] * 2
    every = order_effects(Groups(screen, use_rep="X_nbvae"), operators, contexts=["type B"])
    pd.testing.assert_series_equal(
        table.set_index("context").loc["type B"], every.set_index("context").iloc[0]
    )
    few = order_effects(screen, operators, max_pairs=1, max_cells=100)
    np.testing.assert_allclose(few["relative"], table["relative"], rtol=0.2)
    with pytest.raises(LabelError, match="type A"):
        order_effects(screen, operators, contexts=["typ A"])


def test_reversal_leads_perturbed_cells_back(screen, operators):
    table = reversal(screen, operators, split=None)
    wide = table[table["perturbation"].isin(["drug 1", "drug 2"])].pivot_table(
        index="group", columns="method", values="energy"
    )
    assert (wide["operator"] < 0.1 * wide["no change"]).all()
    assert (wide["operator"] < wide["own mean"]).all()
    floor, limit = table["floor"].abs().mean(), table["limit"].mean()
    assert floor < limit and wide["operator"].mean() < 5 * limit


def test_reversal_without_an_inverse_says_so(screen, operators, monkeypatch):
    singular = AffineOperator(torch.zeros(4, 4), torch.zeros(4), "collapse")
    monkeypatch.setattr(type(operators), "operator", lambda *_: singular)
    table = reversal(screen, operators, split=None).set_index("method").loc["operator"]
    assert table["energy"].isna().all() and table["reason"].str.contains("condition number").all()


# -- interaction, learned where doubles were measured


def test_interaction_is_learned_where_the_double_was_measured():
    adata = interacting()
    training = {"max_epochs": 12, "lr": 5e-2}
    axes = fit(adata, 10.0, **training)
    move = axes.operator(Condition(("A", "B")))
    start = torch.as_tensor(adata.obsm["X_nbvae"][:100])
    assert torch.allclose(move(start).mean(0), torch.tensor([2.0, 2.0]), atol=0.4)
    unseen = adata[adata.obs["perturbation"] != "A+B"].copy()
    additive = fit(unseen, 10.0, **training)
    move = additive.operator(Condition(("A", "B")))
    assert torch.allclose(move(start).mean(0), torch.tensor([4.0, 4.0]), atol=0.4)


def test_one_perturbation_has_no_order(screen, operators):
    table = order_effects(screen, operators, pairs=[])
    assert not len(table) and {"first", "second", "commutator", "energy"} <= set(table)


def test_cells_of_a_dose_are_led_back_by_the_operator_of_that_dose():
    data = acted(
        {
            name: lambda z, s=s: z + np.array([s, 0])
            for name, s in {"control": 0, "half": 2, "full": 4}.items()
        },
        100,
    )
    data.obs["dose"] = data.obs["perturbation"].map({"control": 1.0, "half": 0.5, "full": 1.0})
    data.obs["perturbation"] = data.obs["perturbation"].replace({"half": "A", "full": "A"})
    Keys(context_key=None, dose_key="dose").write(data)
    operators = OperatorModel(2, ["A"], ["all"], n_axes=1, rank=0)
    with torch.no_grad():
        operators.conditions.embedding.copy_(torch.ones(1, 1))
        operators.axis_shift.copy_(torch.tensor([[4.0, 0.0]]))
    table = reversal(data, operators, split=None)
    table = table[table["method"] == "operator"]
    assert len(table) == 2 and (table["energy"] < 0.1).all()
