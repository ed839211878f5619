"""Combinations left out and predicted: which rule is chosen by the others, and every rule beside every baseline."""

from functools import partial

import numpy as np
import pytest
import torch

from cellop_nb import datasets, holdout
from cellop_nb.analysis.combinations import (
    RULES,
)
from cellop_nb.analysis.fits import Fits, latents_only
from cellop_nb.analysis.selection import choose, leave_out, left_out, what_to_leave_out
from cellop_nb.analysis.transfer import Complexity, Response
from cellop_nb.analysis.views import LatentView
from cellop_nb.errors import HoldoutError
from cellop_nb.models.affine import AffineOperator

from .screens import QUICK, acted, interacting


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


def test_norman_doubles_beside_additive_single_and_ceiling(norman_file):
    """The five doubles whose parts were measured, held out together: all rules, baselines, floor and ceiling.

    The table itself, with a full training for each double: ``python -m cellop_nb holdout norman19_k562_subset.h5ad
    --over combination --context-key none --genes 0 --seeds 3``.
    """
    import anndata as ad

    from cellop_nb.analysis.holdout_plan import plan_of

    screen = ad.read_h5ad(norman_file)
    keys = {"perturbation_key": "perturbation", "context_key": None, "control": "control"}
    plan, _ = plan_of(screen, "combination", {}, 10, keys)
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
