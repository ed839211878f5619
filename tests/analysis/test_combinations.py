"""Combinations, sequences and reversal on planted operators, where the answer is known."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from cellop_nb import datasets, energy_distance, holdout, split
from cellop_nb.analysis.combinations import (
    RULES,
    combine,
    order_effects,
    response_operator,
    reversal,
    sequence,
)
from cellop_nb.analysis.fits import Fits, fit_response, latents_only
from cellop_nb.analysis.formulas import Undefined
from cellop_nb.analysis.selection import choose, leave_out, left_out, what_to_leave_out
from cellop_nb.analysis.transfer import Complexity, Response
from cellop_nb.analysis.views import LatentView
from cellop_nb.errors import HoldoutError, LabelError, ModelError
from cellop_nb.models.affine import AffineOperator
from cellop_nb.models.conditions import Condition
from cellop_nb.models.coupling import Remainder

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


def test_reversal_leads_perturbed_cells_back(screen, response):
    table = reversal(screen, response.operators, split=None)
    wide = table[table["perturbation"].isin(["drug 1", "drug 2"])].pivot_table(
        index="group", columns="method", values="energy"
    )
    assert (wide["operator"] < 0.1 * wide["no change"]).all()
    assert (wide["operator"] < wide["mean shift"]).all()


def test_reversal_without_an_inverse_says_so(screen, response, monkeypatch):
    singular = AffineOperator(torch.zeros(4, 4), torch.zeros(4), "collapse")
    monkeypatch.setattr("cellop_nb.analysis.combinations.operator_for", lambda *_, **__: (singular, True))
    table = reversal(screen, response.operators, split=None).set_index("method").loc["operator"]
    assert table["energy"].isna().all() and table["reason"].str.contains("condition number").all()


# -- interaction, learned where doubles were measured


def acted(act, n: int, seed: int = 0):
    """Latents of one context: n control cells of two dimensions under each of the maps of `act`, by label."""
    import anndata as ad

    rng = np.random.default_rng(seed)
    z = np.concatenate([move(0.5 * rng.normal(size=(n, 2))) for move in act.values()])
    obs = pd.DataFrame({"perturbation": np.repeat(list(act), n)})
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(obs=obs, obsm={"X_nbvae": z.astype(np.float32)})
    split(adata, test_fraction=0.0, context_key=None)
    return adata


def interacting():
    """A+B is half of the sum of A and B; the shifts are 4 long."""
    shift = {"control": [0, 0], "A": [4, 0], "B": [0, 4], "C": [-4, 0], "A+B": [2, 2], "B+C": [-4, 4]}
    return acted({name: lambda z, s=s: z + np.array(s) for name, s in shift.items()}, 100)


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


# -- hold-outs of combinations


def test_what_is_left_out_resembles_the_question():
    singles, doubles = [("x", "A"), ("x", "B"), ("x", "C")], [("x", "A+B"), ("x", "B+C")]
    assert what_to_leave_out(singles + doubles, [("x", "A+C")]) == "combination"
    assert what_to_leave_out(singles, [("x", "A+C")]) is None
    twice = [*singles, *(("y", p) for _, p in singles), ("x", "A+B"), ("y", "A+B")]
    assert what_to_leave_out(twice, [("x", "A+C")]) == "combination"  # one, measured in two contexts
    assert what_to_leave_out([*singles, ("y", "A")], [("x", "A+C")]) == "context"
    assert what_to_leave_out([*singles, *doubles, ("y", "A")], [("y", "B")]) == "context"


def test_combinations_are_left_out_in_turn():
    adata = interacting()
    table = leave_out(adata, [Complexity(rank=0)], over="combination", context_key=None, progress=False)
    assert set(table["group"]) == {"all, A+B", "all, B+C"} or len(table) == 2
    energy = table.set_index("group")["e_distance"]
    assert energy.filter(like="B+C").iloc[0] < energy.filter(like="A+B").iloc[0]  # only B+C is additive


def composed():
    """A and C shift, B and D stretch threefold about the controls' centre; the doubles do one after the other."""
    act = {"control": lambda z: z}
    for shift, stretch, axis in (("A", "B", 0), ("C", "D", 1)):
        move, grow = np.eye(2)[axis] * 4, np.where(np.arange(2) == axis, 3.0, 1.0)
        act |= {shift: lambda z, m=move: z + m, stretch: lambda z, g=grow: z * g}
        act[f"{shift}+{stretch}"] = lambda z, m=move, g=grow: (z + m) * g
    return acted(act, 150)


def test_the_rule_is_chosen_by_the_doubles_left_out():
    rules = [Complexity(ridge=1e-3, rule=rule) for rule in RULES]
    training = {"max_epochs": 15, "cells_per_group": 128}
    table = leave_out(composed(), rules, over="combination", context_key=None, progress=False, **training)
    assert choose(table, rules).rule == "composition"
    mean = table.groupby("complexity")["e_distance"].mean()
    assert (
        mean.filter(like="composition").iloc[0] < 0.3 * mean.drop(mean.filter(like="composition").index).min()
    )


def test_a_holdout_takes_the_rule_that_was_chosen(monkeypatch):
    from cellop_nb.analysis import choices

    adata, found = composed(), Complexity(ridge=1e-3)
    monkeypatch.setattr(choices, "leave_out", partial(leave_out, max_epochs=15))
    keys = {"perturbation_key": "perturbation", "context_key": None, "control": "control"}
    given = {"settings": [{}], "candidates": [found, Complexity(rank=0)], "training": {}, "space": None}
    given |= {"layer": None, "features": None, "nested": False, "seed": 0, "progress": False}
    plan = choices.Choice(adata, [("all", "A+D")], keys=keys, **given)
    first = leave_out(adata, [found], over="combination", context_key=None, progress=False)
    choice, taken = plan._with_rule(first, found, LatentView(adata, context_key=None))
    assert taken == Complexity(ridge=1e-3, rule="composition")
    assert choice["candidate"].tolist() == [0, 0, 1, 2, 1, 2] and choice["complexity"].nunique() == 3


def test_a_rule_without_an_answer_leaves_the_effect():
    flipped = AffineOperator(
        torch.diag(torch.tensor([-1.0, 1.0])), torch.zeros(2), "flip"
    )  # no real logarithm
    adata = composed()
    fits = Fits(
        latents_only(adata, "X_nbvae", "split"), LatentView(adata, context_key=None), keys={}, training={}
    )

    class Flipping(Response):
        def operator(self, perturbation, context):
            return flipped

    model = type("Model", (), {"conditions": type("Known", (), {"perturbations": ["A", "B"]})})()
    fits.response = lambda *_, **__: Flipping(model, Complexity(rule="generator"))
    row = left_out(fits, [("all", "A+B")], Complexity(rule="generator"))[0]
    assert row["e_distance"] == row["no_change"] > 0


QUICK = {
    "context_key": None,
    "vae": {"n_latent": 4, "n_hidden": 16},
    "training": {"max_epochs": 3},
    "metrics": ["e_distance", "pearson_delta"],
    "progress": False,
}


@pytest.fixture(scope="module")
def doubles():
    return datasets.synthetic(n_contexts=1, n_perturbations=3, combinations=3, n_cells=40, n_genes=60, seed=1)


def test_holdout_of_combinations_has_every_rule_and_baseline(doubles):
    held = {"perturbation": ["drug 1+drug 2", "drug 1+drug 3"]}
    result = holdout(doubles, heldout=held, candidates=[Complexity(rank=0)], **QUICK)
    table = result.table[result.table["metric"] == "pearson_delta"].set_index(["perturbation", "method"])
    for double in held["perturbation"]:
        for method in ("operators", "composition", "generator", "additive", "best single", "no change"):
            assert np.isfinite(table.loc[(double, method), "value"]), method
    assert set(result.predictions.obs["perturbation"]) == set(held["perturbation"])


def test_unseen_perturbation_is_refused_with_the_reason(doubles):
    keep = ~doubles.obs["perturbation"].isin(["drug 1+drug 3", "drug 2+drug 3"]).to_numpy()
    with pytest.raises(HoldoutError, match="drug 3.*features"):
        holdout(doubles[keep], heldout={"perturbation": "drug 3"}, **QUICK)


def test_a_group_that_cannot_be_predicted_has_its_reason_in_the_table(doubles):
    keep = ~doubles.obs["perturbation"].isin(["drug 1+drug 3", "drug 2+drug 3"]).to_numpy()
    held = {"perturbation": ["drug 1+drug 2", "drug 3"]}
    result = holdout(doubles[keep], heldout=held, candidates=[Complexity(rank=0)], **QUICK)
    row = result.table[(result.table["perturbation"] == "drug 3") & (result.table["method"] == "operators")]
    assert row["value"].isna().all() and row["reason"].str.contains("drug 3").all()
    assert set(result.predictions.obs["perturbation"]) == {"drug 1+drug 2"}


# -- perturbations never measured, from given features


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


def test_norman_doubles_beside_additive_single_and_ceiling(norman_file):
    """The five doubles whose parts were measured, held out together: all rules, baselines, floor and ceiling.

    The table itself, with a full training for each double: ``python -m cellop_nb holdout norman19_k562_subset.h5ad
    --over combination --context-key none --genes 0 --seeds 3``.
    """
    import anndata as ad

    from cellop_nb.analysis.holdouts import _plan

    screen = ad.read_h5ad(norman_file)
    keys = {"perturbation_key": "perturbation", "context_key": None, "control": "control"}
    plan, _ = _plan(screen, "combination", {}, 10, keys)
    doubles = ["KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2"]
    assert sorted(plan) == doubles
    options = QUICK | {"training": {"max_epochs": 8}, "vae": {"n_latent": 16, "n_hidden": 64}}
    result = holdout(screen, heldout={"perturbation": doubles}, n_genes=0, **options)
    wide = result.summary()
    assert result.complexity.remainder  # no double is left to choose by
    for rule in ("operators", *RULES):
        assert wide.loc[rule, "e_distance"] < 0.35 * wide.loc["no change", "e_distance"]
        assert wide.loc[rule, "pearson_delta"] > 0.6
    assert wide.loc["additive", "pearson_delta"] > 0.7 and wide.loc["best single", "pearson_delta"] > 0.6
    assert wide.filter(like="ceiling", axis=0)["pearson_delta"].iloc[0] > 0.7
    scored = (
        result.table[(result.table["metric"] == "pearson_delta")].groupby("perturbation")["value"].count()
    )
    assert (scored >= 8).all() and sorted(scored.index) == doubles


def test_one_perturbation_has_no_order(screen, response):
    table = order_effects(screen, response.operators, pairs=[])
    assert not len(table) and {"first", "second", "commutator", "energy"} <= set(table)
