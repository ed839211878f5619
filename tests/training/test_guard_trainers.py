"""The guard inside the real trainers."""

from __future__ import annotations

import math

import anndata
import numpy as np
import pytest
import scipy.sparse
import torch

from cellop_nb.data.contract import setup
from cellop_nb.errors import NonFiniteError
from cellop_nb.training.guard import random_state, replay, set_random_state
from cellop_nb.training.loop import Machine
from cellop_nb.training.operators import OperatorTrainer, new_operators
from cellop_nb.training.vae import VAETrainer, new_vae

CPU = Machine(accelerator="cpu")


@pytest.fixture(scope="module")
def adata():
    rng = np.random.default_rng(0)
    n = 240
    counts = rng.poisson(rng.gamma(1, 2, (1, 12)), (n, 12)).astype("f4")
    screen = anndata.AnnData(scipy.sparse.csr_matrix(counts))
    screen.obs["split"] = np.where(np.arange(n) % 5 == 0, "val", "train")
    screen.obs["cell_type"] = np.array(["B", "NK"])[np.arange(n) % 2]
    screen.obs["perturbation"] = np.where(np.arange(n) % 4 < 2, "control", "IFNb")
    screen.obsm["X_nbvae"] = rng.normal(size=(n, 3)).astype("f4")
    setup(screen)
    return screen


def vae_trainer(adata, **settings):
    model = new_vae(adata, n_latent=2, n_hidden=8)
    return VAETrainer(adata, model, batch_size=64, max_epochs=2, progress=False, **settings)


def operator_trainer(adata, **settings):
    settings = {"max_epochs": 2, "steps_per_epoch": 3, "cells_per_group": 16} | settings
    return OperatorTrainer(adata, new_operators(adata), progress=False, **settings)


def is_finite(model):
    return all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())


def plant(trainer, step, what):
    """Do something to the model just before the loss of a step."""
    whole = trainer.loss_terms

    def terms(batch):
        if trainer.step == step and not trainer.guard.rolled_back:
            what(trainer)
        return whole(batch)

    trainer.loss_terms = terms
    return trainer


def test_a_poisoned_encoder_weight(adata, tmp_path):
    def poison(trainer):
        trainer.model.encoder.mean.weight.data[0, 0] = math.nan

    trainer = plant(vae_trainer(adata, folder=tmp_path), 2, poison)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    error = caught.value
    assert (error.module, error.tensor) == ("encoder.mean", "encoder.mean.weight")
    assert trainer.status == "failed" and is_finite(trainer.model)
    assert is_finite(trainer.model) and trainer.guard.last_finite.step <= 2
    again = replay(error.reproducer, vae_trainer(adata))
    assert again.module == "encoder.mean"


def test_the_cell_and_gene_of_a_bad_count(adata, tmp_path):
    # On a GPU batches are rows of held counts.
    trainer = vae_trainer(adata, folder=tmp_path, machine=CPU)
    loader = trainer.batches()

    def batches():
        for number, batch in enumerate(loader):
            if number == 1:
                found = (batch.columns == 5).nonzero()[0]
                batch.values[found] = math.nan
            yield batch

    trainer.batches = batches
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    error = caught.value
    assert error.origin.kind == "batch" and len(error.cells) == 1
    assert error.genes == [adata.var_names[5]] and error.cells[0] in adata.obs_names
    assert replay(error.reproducer, vae_trainer(adata, machine=CPU)).cells == error.cells


def test_random_states_of_another_kind_of_device_are_left_out(adata):
    """A file written on a GPU is shown on a CPU: the state of a CUDA generator has another size."""
    trainer = vae_trainer(adata, machine=CPU)
    states = random_state(trainer)
    expected = torch.rand(3, generator=trainer.cpu_generator)
    set_random_state(states | {"trainer.generator": torch.zeros(16, dtype=torch.uint8)}, trainer)
    assert torch.equal(torch.rand(3, generator=trainer.cpu_generator), expected)


def test_an_operator_of_norm_1e20(adata):
    def blow_up(trainer):
        trainer.model.axis_left.data.fill_(1e20)

    trainer = plant(operator_trainer(adata), 1, blow_up)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    assert caught.value.groups and set(caught.value.groups) <= {"B, IFNb", "NK, IFNb"}
    assert is_finite(trainer.model)


def test_a_nan_operator_is_told_by_the_guard_and_not_by_the_energy_distance(adata):
    def poison(trainer):
        trainer.model.axis_shift.data[0, 0] = math.nan

    with pytest.raises(NonFiniteError, match="axis_shift"):
        plant(operator_trainer(adata), 1, poison).fit()


def test_rollback_halves_the_rate_and_finishes(adata):
    def poison(trainer):
        trainer.model.axis_shift.data[0, 0] = math.nan

    trainer = plant(operator_trainer(adata, on_nonfinite="rollback", lr=1e-2), 1, poison)
    history = trainer.fit()
    assert trainer.status == "finished" and len(trainer.guard.rolled_back) == 1
    assert trainer.learning_rate == 0.5e-2 and len(history) == 2
    assert trainer.guard.rolled_back[0]["back_to"] == 0 and "axis_shift" in history["rollback"][0]
    assert np.isfinite(history["train_loss"]).all() and is_finite(trainer.model)
