"""The VAE's sizes are chosen by what its operators predict of groups that neither has seen."""

import pandas as pd
import pytest

from cellop_nb import datasets
from cellop_nb.analysis import latent_choice
from cellop_nb.analysis.holdout import holdout
from cellop_nb.analysis.latent_choice import choose_latent, compare_latents
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
    return train, compare_latents(train, list(settings), SHIFT, **(known | options))


def test_a_latent_space_that_is_too_narrow_is_not_taken(screen):
    result = holdout(
        screen, heldout={"cell_type": "type B", "perturbation": "drug 1"}, vae=[NARROW, WIDE], training=TRAINING,
        candidates=SHIFT, metrics=["e_distance"], progress=False,
    )  # fmt: skip
    assert result.sizes == WIDE and result.fits[0].vae.config["n_latent"] == 8
    mean = result.latent_choice.groupby("vae", sort=False)["e_distance"].mean()
    assert mean.index[0] == "n_latent 1, n_hidden 4" and mean.iloc[1] < 0.7 * mean.iloc[0]


def test_every_group_is_asked_once_of_models_that_did_not_see_it(screen, monkeypatch):
    hidden = []
    real = latent_choice.fit_vae

    def spy(train, **options):
        out = train.obs[train.obs["split"] == "test"]
        hidden.append(set(zip(out["cell_type"].astype(str), out["perturbation"].astype(str), strict=True)))
        return real(train, **options)

    monkeypatch.setattr(latent_choice, "fit_vae", spy)
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
        compare_latents(few, [NARROW, WIDE], SHIFT, over="context", space=space, keys=KEYS)
