"""`compile=True`: the same numbers, no fall-back in silence, and a refusal where there is no compiler."""

from __future__ import annotations

import pytest
import torch

import cellop_nb as co
from cellop_nb.errors import ModelError
from cellop_nb.training.cuda_graph import check_compiler, compiled
from cellop_nb.training.loop import Machine
from cellop_nb.training.operators import OperatorTrainer, new_operators
from cellop_nb.training.vae import VAETrainer, new_vae

CPU = Machine(accelerator="cpu")


@pytest.fixture(scope="module")
def screen():
    adata = co.datasets.synthetic(n_contexts=2, n_perturbations=2, n_cells=30, n_genes=40)
    co.split(adata)
    return adata


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares numbers of one CPU")
def test_compiled_training_gives_the_same_numbers_and_leaves_the_model_as_it_was(screen):
    losses = {}
    for compile_it in (False, True):
        machine = Machine(accelerator="cpu", compile=compile_it)
        vae = new_vae(screen, n_latent=4, n_hidden=8)
        trainer = VAETrainer(screen, vae, max_epochs=2, batch_size=32, progress=False, machine=machine)
        fitted = trainer.fit()["train_loss"]
        co.embed(screen, vae)
        operators = new_operators(screen)
        steps = {
            "max_epochs": 1,
            "steps_per_epoch": 3,
            "cells_per_group": 8,
            "progress": False,
            "machine": machine,
        }
        moved = OperatorTrainer(screen, operators, **steps).fit()["train_loss"]
        losses[compile_it] = [*fitted, *moved]
        assert "forward" not in vars(vae.decoder) and "affine" not in vars(operators)
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_what_cannot_be_compiled_whole_is_an_error(screen):
    class Broken(torch.nn.Module):
        def part(self, x):
            return x + 1 if float(x.sum()) > 0 else x

    model = Broken()
    with compiled(model, ("part",)), pytest.raises(Exception, match="(?i)graph break|data-dependent"):
        model.part(torch.ones(3))
    assert model.part(torch.ones(3)).tolist() == [2, 2, 2]


def test_a_machine_without_a_compiler_is_told_so(screen, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    vae = new_vae(screen, n_latent=4, n_hidden=8)
    with pytest.raises(ModelError, match="no-such-compiler"):
        VAETrainer(screen, vae, progress=False, machine=Machine(accelerator="cpu", compile=True))
    VAETrainer(screen, vae, progress=False, machine=CPU)  # nothing is asked of those who do not ask for it
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="Triton"):
        check_compiler(torch.device("cuda"))
