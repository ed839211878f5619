"""A trainer small enough to follow by hand: a line with dropout, fitted to forty points."""

from __future__ import annotations

import torch
from torch import nn

from cellop_nb.training.callbacks import Callback
from cellop_nb.training.loop import Trainer


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
        settings = {"max_epochs": 6, "lr": 0.1, "progress": False, "accelerator": "cpu"} | settings
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
