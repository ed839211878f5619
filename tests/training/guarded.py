"""A training loop with nothing but the guard in it, around a count VAE that any planted fault brings down."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from cellop_nb.errors import NonFiniteError
from cellop_nb.training.guard import NonFiniteGuard

CELLS, GENES, LATENT = 6, 5, 2


class Toy(nn.Module):
    """A small count VAE without any protection, so that planted faults do their harm."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(GENES, 8), nn.ReLU(), nn.Linear(8, 2 * LATENT))
        self.decoder = nn.Linear(LATENT, GENES)
        self.log_theta = nn.Parameter(torch.zeros(GENES))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)  # a running statistic that looking twice must not move
        mean, logvar = self.encoder(torch.log1p(x)).chunk(2, -1)
        return Normal(mean, torch.exp(0.5 * logvar), validate_args=False)


class ToyTrainer:
    """The least that the guard needs to know of a trainer."""

    def __init__(self, model=None, *, clip=10.0, **guard):
        torch.manual_seed(0)
        self.model = Toy() if model is None else model
        self.generator = torch.Generator().manual_seed(1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.guard = NonFiniteGuard(self.model, self.optimizer, **guard)
        self.counts = torch.poisson(torch.full((CELLS, GENES), 3.0), generator=self.generator)
        self.epoch, self.step, self.clip = 0, 0, clip
        self.learning_rate = 1e-2
        self.weird_term = lambda value: value * 0
        self.between = {}  # step -> what happens after the optimiser's step

    def loss_terms(self, batch):
        posterior = self.model(batch["counts"])
        z = posterior.loc + posterior.scale * torch.randn(posterior.loc.shape, generator=self.generator)
        mu = torch.softmax(self.model.decoder(z), -1) * batch["counts"].sum(1, keepdim=True)
        theta = self.model.log_theta.exp()
        x = batch["counts"]
        nb = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        nb = nb + theta * torch.log(theta / (theta + mu)) + x * torch.log(mu / (theta + mu))
        kl = 0.5 * (posterior.loc**2 + posterior.scale**2 - 1 - 2 * posterior.scale.log()).sum(1)
        return {"reconstruction": -nb.sum(1).mean(), "kl": kl.mean(), "extra": self.weird_term(kl.mean())}

    def describe_batch(self, batch):
        return {"cells": [f"cell{i}" for i in range(CELLS)], "genes": [f"gene{i}" for i in range(GENES)]}

    def run(self, steps=1):
        for _ in range(steps):
            self.batch = {"counts": self.counts.clone(), "name": "batch"}
            self.one_step()
            self.step += 1
        return self

    def one_step(self):
        self.guard.begin_step(self)
        self.optimizer.zero_grad()
        terms = self.loss_terms(self.batch)
        sum(terms.values()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip, norm)
        if not self.guard.check(self, terms, norm):
            return
        self.optimizer.step()
        self.between.pop(self.step, lambda: None)()
        self.guard.after_step(self)

    def state(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def fail(trainer, steps=1) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        trainer.run(steps)
    return caught.value


def assert_same(state, expected):
    for name, tensor in expected.items():
        if name != "seen":
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=name)


def everything_is_finite(trainer):
    moments = [t for s in trainer.optimizer.state.values() for t in s.values()]
    return all(torch.isfinite(t).all() for t in [*trainer.model.state_dict().values(), *moments])
