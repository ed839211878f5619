"""Choices by what the operators predict of groups that neither they nor the VAE has seen."""

import numpy as np
import pandas as pd
import pytest

from cellop_nb import datasets
from cellop_nb.analysis import nested
from cellop_nb.analysis.fitted import SIZES
from cellop_nb.analysis.holdout import holdout
from cellop_nb.analysis.nested import NestedFits, choose_latent
from cellop_nb.analysis.space import EvaluationSpace
from cellop_nb.analysis.transfer import Complexity
from cellop_nb.data.splits import split
from cellop_nb.errors import ModelError

KEYS = {"perturbation_key": "perturbation", "context_key": "cell_type", "control": "control"}
TRAINING = {"max_epochs": 30, "lr": 5e-3, "batch_size": 48}
SHIFT = [Complexity(rank=0)]
NARROW, WIDE = {"n_latent": 1, "n_hidden": 4}, {"n_latent": 8, "n_hidden": 32}


@pytest.fixture(scope="module")
def screen():
    return datasets.synthetic(n_perturbations=2, n_cells=80, n_genes=120, n_latent=4, library=200.0, seed=3)


def compared(screen, settings=(NARROW, WIDE), training=TRAINING, **options):
    train = screen.copy()
    split(train, holdout={"cell_type": "type B", "perturbation": "drug 1"}, seed=0, **KEYS)
    train = train[train.obs["split"] != "test"].copy()
    space = EvaluationSpace.fit(train, genes=list(train.var_names))
    known = {"over": "group", "space": space, "keys": KEYS, "training": training, "progress": False}
    return train, NestedFits(train, settings, **(known | options)).compare(SHIFT)


def test_a_latent_space_that_is_too_narrow_is_not_taken(screen):
    result = holdout(
        screen, heldout={"cell_type": "type B", "perturbation": "drug 1"}, vae=[NARROW, WIDE], training=TRAINING,
        candidates=SHIFT, metrics=["e_distance"], progress=False,
    )  # fmt: skip
    assert result.sizes == WIDE and result.fits[0].vae.config["n_latent"] == 8
    mean = result.latent_choice.groupby("vae", sort=False)["e_distance"].mean()
    assert mean.index[0] == "n_latent 1, n_hidden 4" and mean.iloc[1] < 0.85 * mean.iloc[0]


def test_by_default_two_sizes_are_compared_and_without_folds_the_first_is_taken(screen):
    held = {"cell_type": "type B", "perturbation": "drug 1"}
    options = {
        "candidates": SHIFT,
        "metrics": ["e_distance"],
        "training": {"max_epochs": 1},
        "progress": False,
    }
    result = holdout(screen, heldout=held, **options)
    assert list(result.latent_choice["vae"].unique()) == [
        "n_latent 32, n_hidden 256",
        "n_latent 16, n_hidden 128",
    ]
    best = result.latent_choice.groupby("vae", sort=False)["e_distance"].mean()
    assert result.sizes in SIZES and result.fits[0].vae.config["n_latent"] == result.sizes["n_latent"]
    assert set(best.index) == {nested.sizes_in_words(sizes) for sizes in SIZES}
    quick = holdout(screen, heldout=held, nested=False, **options)
    assert quick.sizes == SIZES[0] and not len(quick.latent_choice)


def test_every_group_is_asked_once_of_models_that_did_not_see_it(screen, monkeypatch):
    hidden = []
    real = nested.fit_vae

    def spy(train, **options):
        out = train.obs[train.obs["split"] == "test"]
        hidden.append(set(zip(out["cell_type"].astype(str), out["perturbation"].astype(str), strict=True)))
        return real(train, **options)

    monkeypatch.setattr(nested, "fit_vae", spy)
    train, table = compared(screen, settings=[WIDE], training=TRAINING | {"max_epochs": 1})
    groups = {
        (c, p)
        for c, p in zip(train.obs["cell_type"], train.obs["perturbation"], strict=True)
        if p != "control"
    }
    groups.remove(("type B", "drug 2"))  # its context keeps no other perturbed cells
    assert len(hidden) == 3 and set.union(*hidden) == groups and sum(map(len, hidden)) == len(groups)
    for fold, out in enumerate(hidden):
        assert set(table.loc[table["fold"] == fold, "group"]) == {", ".join(group) for group in out}
    assert set(train.obs["split"]) == {"train", "val"}, "the caller's split stays"


def test_of_equals_the_first_is_taken(screen):
    _, table = compared(screen, settings=[WIDE], training=TRAINING | {"max_epochs": 1})
    assert choose_latent(table) == 0
    assert choose_latent(pd.concat([table.assign(setting=1), table])) == 0
    worse = table.assign(e_distance=table["e_distance"] + 1.0)
    assert choose_latent(pd.concat([table.assign(setting=1), worse])) == 1


def test_one_group_cannot_tell(screen):
    few = screen[~((screen.obs["perturbation"] != "control") & (screen.obs["cell_type"] != "type A"))].copy()
    few = few[few.obs["perturbation"].isin(["control", "drug 1"])].copy()
    few.obs["split"] = "train"
    space = EvaluationSpace.fit(few, genes=list(few.var_names))
    with pytest.raises(ModelError, match="two or more contexts"):
        NestedFits(few, [NARROW, WIDE], over="context", space=space, keys=KEYS)


def test_the_complexity_and_the_errors_come_from_models_without_the_groups(screen, monkeypatch):
    """One VAE for each fold and the final one; every candidate judged in each fold, the errors by the chosen one."""
    trained = []
    real = nested.fit_vae
    monkeypatch.setattr(
        nested, "fit_vae", lambda train, **options: trained.append(1) or real(train, **options)
    )
    quick = {"heldout": {"cell_type": "type B", "perturbation": "drug 1"}, "vae": WIDE, "progress": False}
    quick |= {"training": TRAINING | {"max_epochs": 3}, "metrics": ["e_distance"]}
    two = [Complexity(rank=0), Complexity(rank=0, locality=2.0)]
    result = holdout(screen, candidates=two, **quick)
    assert len(trained) == 3 and not len(result.latent_choice)
    assert result.choice.groupby("candidate")["fold"].nunique().tolist() == [3, 3]
    errors = result.fits[0].response.errors["drug 1"]
    assert errors.shape == (3, result.predictions.n_vars) and (errors != 0).any()
    plain = holdout(screen, candidates=two, nested=False, **quick)
    assert len(trained) == 3 and "fold" not in plain.choice
    assert plain.fits[0].response.errors["drug 1"].shape == errors.shape
    assert not (plain.fits[0].response.errors["drug 1"] == errors).all()


def test_only_some_groups_of_a_large_fold_are_judged(screen, monkeypatch):
    monkeypatch.setattr(nested, "MOST_JUDGED", 1)
    _, table = compared(screen, settings=[WIDE], training=TRAINING | {"max_epochs": 1})
    assert table.groupby("fold").size().tolist() == [1, 1, 1]


def test_a_perturbation_is_never_left_out_whole_where_it_can_be_helped():
    parts = [[(context, p)] for context in "abc" for p in ("x", "y", "z", "w")]
    for seed in range(20):
        dealt = nested._dealt(parts, 3, seed)
        assert np.bincount(dealt).tolist() == [4, 4, 4]
        for p in "xyzw":
            assert {fold for part, fold in zip(parts, dealt, strict=True) if part[0][1] == p} == {0, 1, 2}


def test_one_combination_measured_in_several_contexts_is_enough():
    """Hold out one of two doubles: the other one, left out of the VAE everywhere, is what there is to choose by."""
    screen = datasets.synthetic(
        n_contexts=2, n_perturbations=3, combinations=2, n_cells=40, n_genes=60, seed=1
    )
    doubles = sorted(label for label in screen.obs["perturbation"].unique() if "+" in label)
    options = {
        "vae": {"n_latent": 4, "n_hidden": 16},
        "training": {"max_epochs": 2},
        "metrics": ["e_distance"],
    }
    two = [Complexity(rank=0), Complexity(rank=0, locality=2.0)]
    result = holdout(screen, heldout={"perturbation": doubles[0]}, candidates=two, progress=False, **options)
    assert set(result.choice["group"].str.partition(", ")[2]) == {doubles[1]}
    assert set(result.choice["fold"]) == {0} and result.choice["group"].nunique() == 2


def test_folds_that_can_tell_nothing_are_refused(screen, monkeypatch):
    """Each perturbation was measured in two contexts alone, which fall into one fold."""
    context, perturbation = screen.obs["cell_type"].astype(str), screen.obs["perturbation"].astype(str)
    first = context.isin(["type A", "type B"])
    pairs = screen[((perturbation != "drug 2") & first) | ((perturbation != "drug 1") & ~first)].copy()
    pairs.obs["split"] = np.where(np.arange(pairs.n_obs) % 5 == 0, "val", "train")
    monkeypatch.setattr(nested, "_dealt", lambda folds, n_folds, seed: np.array([0, 0, 1, 1]))
    space = EvaluationSpace.fit(pairs, genes=list(pairs.var_names))
    options = {"over": "context", "space": space, "keys": KEYS, "training": TRAINING | {"max_epochs": 1}}
    with pytest.raises(ModelError, match="left out whole"):
        NestedFits(pairs, [WIDE], n_folds=2, progress=False, **options).compare(SHIFT)
