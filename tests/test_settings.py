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
