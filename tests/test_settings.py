"""One place checks every setting of a public callable before work: its name, and whether its value can be."""

from __future__ import annotations

import math

import numpy as np
import pytest

import cellop_nb as co
from cellop_nb.errors import LabelError, ModelError, checked


@pytest.fixture(scope="module")
def screen():
    adata = co.datasets.synthetic(n_contexts=2, n_perturbations=1, n_cells=24, n_genes=20)
    co.split(adata)
    co.embed(adata, co.new_vae(adata, n_latent=2, n_hidden=4))
    return adata


def vae_trainer(adata, **settings):
    return co.VAETrainer(adata, co.new_vae(adata, n_latent=2, n_hidden=4), progress=False, **settings)


def operator_trainer(adata, **settings):
    return co.OperatorTrainer(adata, co.new_operators(adata), progress=False, **settings)


@pytest.mark.parametrize(
    ("call", "name", "value", "can_be"),
    [
        (co.new_vae, "n_latent", 0, "a whole number of at least 2"),
        (co.new_vae, "n_latent", 1, "a whole number of at least 2"),
        (co.new_vae, "n_latent", 2.5, "a whole number of at least 2"),
        (co.new_vae, "n_hidden", 0, "a whole number of at least 1"),
        (co.new_vae, "n_layers", -1, "a whole number of at least 1"),
        (co.new_vae, "dropout", 1.0, "a number of at least 0 and at most 0.99"),
        (co.new_vae, "seed", 2**70, "a whole number of at least 0 and at most 4,294,967,295"),
        (co.new_vae, "seed", -1, "a whole number of at least 0"),
        (co.new_vae, "seed", None, "a whole number of at least 0"),
        (operator_trainer, "max_epochs", None, "a whole number of at least 1"),
        (co.new_operators, "n_axes", 0, "a whole number of at least 1"),
        (co.new_operators, "rank", -1, "a whole number of at least 0"),
        (co.new_operators, "context_rank", -1, "a whole number of at least 0"),
        (vae_trainer, "max_epochs", 0, "a whole number of at least 1"),
        (vae_trainer, "max_epochs", 2.5, "a whole number of at least 1"),
        (vae_trainer, "max_epochs", True, "a whole number of at least 1"),
        (vae_trainer, "lr", 0.0, "a number above 0"),
        (vae_trainer, "lr", math.nan, "a number above 0"),
        (vae_trainer, "clip_norm", -1.0, "a number above 0"),
        (vae_trainer, "clip_norm", 0, "a number above 0"),
        (vae_trainer, "weight_decay", -0.1, "a number of at least 0"),
        (vae_trainer, "kl_weight", -1.0, "a number of at least 0"),
        (vae_trainer, "kl_weight", math.inf, "a number of at least 0"),
        (vae_trainer, "warmup_epochs", -3, "a whole number of at least 0"),
        (vae_trainer, "batch_size", 0, "a whole number of at least 1"),
        (vae_trainer, "seed", 2**70, "a whole number of at least 0"),
        (operator_trainer, "cells_per_group", 1, "a whole number of at least 2"),
        (operator_trainer, "steps_per_epoch", 0, "a whole number of at least 1"),
        (operator_trainer, "max_epochs", -1, "a whole number of at least 1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_work(screen, call, name, value, can_be):
    with pytest.raises(ModelError, match=f"Expected {name} to be {can_be}.*Found {name}=.*To fix it"):
        call(screen, **{name: value})


def etest(adata, **settings):
    return co.distances.etest(adata, use_rep="X_nbvae", **settings)


def synthetic(_, **settings):
    return co.datasets.synthetic(**settings)


def early_stopping(_, **settings):
    return co.callbacks.EarlyStopping(**settings)


def tiled(adata, **settings):
    return co.energy_distance(adata.obsm["X_nbvae"], adata.obsm["X_nbvae"], **settings)


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [
        (co.CellOp, "seed", -1),
        (co.CellOp, "n_genes", 2.5),
        (co.split, "seed", 1.5),
        (co.select_genes, "n_genes", 2.5),
        (co.select_genes, "min_cells", -1),
        (co.Groups, "min_cells", -1),
        (co.holdout, "seed", 2**70),
        (co.score, "seed", -1),
        (etest, "n_permutations", 0),
        (etest, "alpha", 2.0),
        (etest, "max_cells", 1),
        (etest, "seed", -1),
        (synthetic, "seed", -1),
        (synthetic, "library", -1.0),
        (synthetic, "batch_effect", math.nan),
        (early_stopping, "patience", 0),
        (early_stopping, "min_delta", math.nan),
        (tiled, "tile", -1),
    ],
)
def test_sizes_and_seeds_of_every_public_call_are_looked_at(screen, call, name, value):
    with pytest.raises(ModelError, match=f"Expected {name} to be .*number.*Found {name}=.*To fix it"):
        call(screen, **{name: value})


def test_a_value_is_looked_at_wherever_it_stands(screen):
    for wrong in (2.5, 0, -1):
        with pytest.raises(ModelError, match=f"max_epochs={wrong}"):
            vae_trainer(screen).fit(wrong)
    with pytest.raises(ModelError, match="n_genes=0"):
        co.select_genes(screen, 0)


@pytest.mark.parametrize("name", ["ridge", "context_ridge", "stability_weight", "max_norm", "weight_decay"])
def test_a_penalty_below_zero_is_refused(name):
    with pytest.raises(ModelError, match=f"Expected {name} to be a number.*-1"):
        co.Penalties(**{name: -1})


def test_numbers_of_numpy_and_no_clipping_are_fine(screen):
    trainer = vae_trainer(screen, max_epochs=np.int64(1), lr=np.float32(0.1), clip_norm=math.inf)
    assert len(trainer.fit()) == 1


def test_a_name_that_nothing_bears_is_refused_with_the_nearest():
    @checked
    def call(adata, *, max_epochs=1, lr=0.1):
        return max_epochs, lr

    assert call(None, lr=0.2) == (1, 0.2)
    with pytest.raises(LabelError, match="a setting of .*call: max_epochs, lr.*'learning_rate'.*mean 'lr'"):
        call(None, learning_rate=1)
    with pytest.raises(LabelError, match="use one of these, or leave it out"):
        call(None, colour="red")


def test_trainers_take_few_settings_and_all_of_them_by_name():
    import inspect

    for call in (co.new_vae, co.new_operators, co.VAETrainer, co.OperatorTrainer, co.Machine, co.Penalties):
        kinds = {parameter.kind for parameter in inspect.signature(call).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, call
