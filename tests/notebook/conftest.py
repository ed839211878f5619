"""A trainer that trains nothing: the contract that live plots and controls rely on, and made-up histories."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cellop_nb.training.loop import RemoteControl


def vae_row(epoch: int, **more: float) -> dict[str, float]:
    """One epoch of a made-up VAE training."""
    fall = 600 * np.exp(-epoch / 6)
    return {
        "epoch": epoch,
        "seconds": 1.0,
        "lr": 1e-3 * 0.98**epoch,
        "cells_per_s": 8000.0,
        "grad_norm": float(np.exp(3 - epoch / 10)),
        "train_loss": 900 + fall,
        "val_loss": 910 + fall + 0.1 * max(epoch - 20, 0) ** 2,
        "train_reconstruction": 890 + fall,
        "val_reconstruction": 900 + fall,
        "train_kl": 10.0,
        "val_kl": 10.0,
        "kl_weight": 1.0,
        **more,
    }


def operator_row(epoch: int, groups: list[str]) -> dict[str, float]:
    """One epoch of a made-up operator training."""
    energies = {f"val_energy[{name}]": (2 + i) * np.exp(-epoch / 8) - 0.01 for i, name in enumerate(groups)}
    return {
        "epoch": epoch,
        "lr": 2e-2,
        "cells_per_s": 4e4,
        "grad_norm": 1.0,
        "train_loss": 3 * np.exp(-epoch / 8) + 0.1,
        "val_loss": 3 * np.exp(-epoch / 8) + 0.2,
        "train_energy": 3 * np.exp(-epoch / 8),
        "val_energy": 3 * np.exp(-epoch / 8),
        "train_stability": 0.0,
        "val_stability": 0.0,
        "operator_norm": 1.2,
        **energies,
    }


class FakeTrainer(RemoteControl):
    """Counts steps, sleeps between them, and obeys as the real trainer does."""

    monitor, patience = "val_loss", 10

    def __init__(self, *, epochs: int = 3, steps: int = 2, pause: float = 0.0, callbacks=(), row=vae_row):
        super().__init__(1e-3)
        self.max_epochs, self.n_steps, self.seconds, self.row = epochs, steps, pause, row
        self.callbacks, self.rows, self.floors = list(callbacks), [], {}
        self.epoch = self.step = 0
        self.weights = {"kl_weight": 1.0, "stability_weight": 0.1}
        self.saved, self.seen = [], []

    def save_checkpoint(self, path):
        self.saved.append((path, self.step))

    def _call(self, hook: str, *args):
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)

    def fit(self):
        self.status = "running"
        self._call("on_fit_start")
        while self.epoch < self.max_epochs and not self._stop.is_set():
            for _ in range(self.n_steps):
                time.sleep(self.seconds)
                self._obey()
                self.step += 1
                self.seen.append((self.learning_rate, dict(self.weights)))
                self._call("on_step_end")
                self._hold_while_paused()
                if self._stop.is_set():
                    break
            row = self.row(self.epoch, lr=self.learning_rate, **self.weights)
            self.rows.append(row)
            self.epoch += 1
            self._call("on_epoch_end", row)
        self.status = "stopped" if self._stop.is_set() else "finished"
        self._call("on_fit_end")
        return self.rows


@pytest.fixture
def fake_trainer() -> type[FakeTrainer]:
    """The class, so that a test chooses epochs and steps."""
    return FakeTrainer


@pytest.fixture
def vae_rows():
    """`vae_rows(n)`: the history of n epochs of a VAE."""
    return lambda n, **more: [vae_row(epoch, **more) for epoch in range(n)]


@pytest.fixture
def operator_rows():
    """`operator_rows(n, groups)`: the history of n epochs of operators."""
    return lambda n, groups: [operator_row(epoch, groups) for epoch in range(n)]


@pytest.fixture
def pictures() -> list[bytes]:
    """Where a live plot puts its pictures."""
    return []


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture(scope="session")
def trained():
    """`adata, vae, operators`: two contexts, three drugs, one measured pair; type B's drug 2 is held out."""
    from cellop_nb.analysis.predict import embed
    from cellop_nb.data.splits import split
    from cellop_nb.data.synthetic import synthetic
    from cellop_nb.training.operators import new_operators
    from cellop_nb.training.vae import new_vae

    adata = synthetic(
        n_contexts=2, n_perturbations=3, combinations=["drug 1+drug 2"], n_cells=70, n_genes=40, n_latent=4,
        library=400.0, seed=0,
    )  # fmt: skip
    split(adata, seed=0)
    held_out = (adata.obs["cell_type"] == "type B") & (adata.obs["perturbation"] == "drug 2")
    adata.obs.loc[held_out, "split"] = "test"
    vae = new_vae(adata, n_latent=4, n_hidden=16)
    embed(adata, vae)
    return adata, vae, new_operators(adata)


@pytest.fixture(scope="session")
def predictor():
    """`predictor(adata, vae, operators)`: a CellOp of these parts, fitted in a second."""
    from dataclasses import replace

    from cellop_nb.analysis.cellop import RECIPE, CellOp

    def fit(adata, vae, operators):
        model = CellOp(adata, n_latent=vae.n_latent, n_genes=None, vae=vae, operators=operators)
        sizes = {"n_hidden": 8, "vae_epochs": 1, "finish_epochs": 1, "operator_epochs": 1, "n_folds": 2}
        model.recipe = replace(RECIPE, **sizes)
        return model.fit(progress=False)

    return fit


@pytest.fixture(scope="session")
def model(trained, predictor):
    """The predictor of the trained screen."""
    return predictor(*trained)


@pytest.fixture(scope="session")
def cells(model):
    """Answers about the trained screen."""
    from cellop_nb.notebook.virtual import VirtualCells

    return VirtualCells(model)


@pytest.fixture(scope="session")
def controls():
    """`controls(adata, context)`: latents of the control cells of a context, (cell, d)."""
    import torch

    from cellop_nb.data.groups import Groups

    return lambda adata, context="type A": torch.from_numpy(
        adata.obsm["X_nbvae"][Groups(adata).controls(context)]
    )
