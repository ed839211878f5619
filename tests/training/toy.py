"""A trainer small enough to follow by hand: a line with dropout, fitted to forty points."""

from __future__ import annotations

import os
import time

import numpy as np
import torch
from torch import nn

from cellop_nb.data.splits import split
from cellop_nb.data.synthetic import synthetic
from cellop_nb.errors import NonFiniteError
from cellop_nb.models import vae as vae_module
from cellop_nb.training.callbacks import Callback
from cellop_nb.training.loop import Machine, Trainer
from cellop_nb.training.operators import OperatorTrainer, new_operators
from cellop_nb.training.vae import VAETrainer, new_vae

CPU = Machine(accelerator="cpu")


class Line(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.slope = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(seed)))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return self.dropout(x) @ self.slope


class LineTrainer(Trainer):
    """Four steps per epoch; `scripted` replaces the validation loss, epoch by epoch."""

    def __init__(self, model=None, *, scripted=None, steps=4, **settings):
        settings = {"max_epochs": 6, "lr": 0.1, "progress": False, "machine": CPU} | settings
        super().__init__(Line() if model is None else model, **settings)
        generator = torch.Generator().manual_seed(99)
        self.x = torch.randn(40, 3, generator=generator)
        self.y = self.x @ torch.tensor([1.0, -2.0, 0.5])
        self.weights = {"ridge": 0.01}
        self.scripted, self.steps = scripted, steps

    def batches(self):
        for _ in range(self.steps):
            yield torch.randperm(40, generator=self.cpu_generator)[:8]

    def loss_terms(self, batch):
        x = self.x[batch] + 0.01 * torch.randn(8, 3, generator=self.generator)
        error = (self.module(x) - self.y[batch]).square().mean()
        return {"error": error, "ridge": self.weights["ridge"] * self.model.slope.square().sum()}

    @torch.no_grad()
    def validate(self):
        if self.scripted is not None:
            return {"val_loss": self.scripted[self.epoch]}
        return {"val_loss": float((self.model(self.x) - self.y).square().mean())}

    def batch_size_of(self, batch):
        return len(batch)

    def steps_per_epoch(self):
        return self.steps


class Do(Callback):
    """Callback that runs `action(trainer)` once, after the given step or epoch."""

    def __init__(self, action, *, step=None, epoch=None):
        self.action, self.step, self.epoch = action, step, epoch

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            self.step = None
            self.action(trainer)

    def on_epoch_end(self, trainer, row):
        if row["epoch"] == self.epoch:
            self.epoch = None
            self.action(trainer)


def comparable(trainer):
    """The history without the columns that measure time."""
    return trainer.history.drop(columns=["seconds", "cells_per_s"])


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_run(left, right):
    """Bit-equal history and weights."""
    assert comparable(left).equals(comparable(right))
    for name, value in weights_of(left).items():
        assert torch.equal(value, weights_of(right)[name]), name


def small_vae(folder, *, max_epochs=12, pause=0.0, adata=None, **settings):
    """A VAE with dropout and covariates on a small screen, that writes its checkpoints to `folder`."""
    adata = small_screen() if adata is None else adata
    vae = new_vae(adata, covariate_keys=["batch"], n_latent=3, n_hidden=8, dropout=0.1)
    given = {"max_epochs": max_epochs, "batch_size": 16, "lr": 1e-2, "progress": False, "machine": CPU}
    return VAETrainer(adata, vae, folder=folder, callbacks=[Pause(pause)], **given | settings)


def small_operators(folder, *, max_epochs=12, pause=0.0, **settings):
    """Operators on random latents of the same screen."""
    adata = small_screen()
    draw = np.random.default_rng(0).normal(size=(adata.n_obs, 3))
    adata.obsm["X_nbvae"] = (
        draw + 0.3 * (adata.obs["perturbation"] != "control").to_numpy()[:, None]
    ).astype("f4")
    operators = new_operators(adata, n_axes=1, rank=1)
    given = {"max_epochs": max_epochs, "steps_per_epoch": 5, "cells_per_group": 16, "progress": False}
    return OperatorTrainer(
        adata, operators, folder=folder, callbacks=[Pause(pause)], **given | {"machine": CPU} | settings
    )


def small_screen():
    adata = synthetic(
        n_contexts=1, n_perturbations=2, n_cells=40, n_genes=30, n_latent=4, library=60.0, seed=0
    )
    split(adata, test_fraction=0.2, val_fraction=0.2)
    return adata


class Pause(Callback):
    """Slow steps, so that a kill falls inside the training."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_end(self, trainer):
        time.sleep(self.seconds)


def train(kind, folder, pause):
    """In a process of its own: start the run, or go on with it."""
    torch.set_num_threads(1)
    make = {"vae": small_vae, "operators": small_operators}[kind]
    make(folder, pause=pause).fit(resume=True)


def together(size):
    """The machine of one of `size` processes."""
    return Machine(accelerator="cpu", devices=size, strategy="ddp") if size > 1 else CPU


def one_of(rank, size, port, kind, folder):
    """In a process of its own: a short run as one of `size` processes; writes its first gradients and its end."""
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    place |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "GROUP_RANK": "0"}
    os.environ.update({name: value for name, value in place.items() if size > 1})
    trainer = joint_run(kind, folder, machine=together(size))
    told = {"gradients": trainer.first_gradients, "weights": weights_of(trainer)}
    torch.save(
        told | {"val_loss": trainer.history["val_loss"].tolist(), "rows": trainer.rows}, f"{folder}/{rank}.pt"
    )


def one_with_a_fault(rank, size, port, kind, folder):
    """As :func:`one_of`; the loss of the second process is NaN in step 3. Writes what came of it."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    address |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "GROUP_RANK": "0"}
    os.environ.update(address)
    trainer = small_operators(folder, max_epochs=2, machine=together(size), on_nonfinite=kind)
    plain = trainer.loss_terms

    def terms(batch):
        spike = float("nan") if rank == 1 and trainer.step == 3 else 1.0
        return {name: term * spike for name, term in plain(batch).items()}

    trainer.loss_terms, message = terms, ""
    try:
        trainer.fit()
    except NonFiniteError as error:
        message = str(error)
    state = {"weights": weights_of(trainer), "rolled_back": trainer.guard.rolled_back, "message": message}
    torch.save(state | {"epochs": trainer.epoch}, f"{folder}/{rank}.pt")


def joint_run(kind, folder, machine=CPU):
    """Two epochs without noise or clipping, whose first gradients are kept."""
    vae_module.sample_z = lambda posterior, generator=None: posterior.loc
    if kind == "vae":
        adata = small_screen()
        model = new_vae(adata, n_latent=3, n_hidden=8)
        given = {"batch_size": 17, "lr": 1e-2, "warmup_epochs": 0}
        trainer = VAETrainer(adata, model, **given, **COMMON, folder=folder, machine=machine)
    else:
        trainer = small_operators(folder, clip_norm=1e9, max_epochs=2, machine=machine)
    trainer.callbacks.append(KeepGradients())
    trainer.fit()
    return trainer


COMMON = {"max_epochs": 2, "progress": False, "clip_norm": 1e9}


class KeepGradients(Callback):
    def on_step_end(self, trainer):
        if trainer.step == 1:
            named = trainer.model.named_parameters()
            trainer.first_gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
