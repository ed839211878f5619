"""Models and training asked for what they cannot do."""

from __future__ import annotations

import numpy as np

import cellop_nb as co

from .cases import MODELS, case


@case(MODELS, "genes of another data set")
def _(place):
    vae = place.vae
    place.adata.var_names = [f"ENSG{k:011d}" for k in range(place.adata.n_vars)]
    co.embed(place.adata, vae)


@case(MODELS, "operators before the cells are embedded")
def _(place):
    co.new_operators(place.split)


@case(MODELS, "latents that are not finite")
def _(place):
    place.embedded.obsm["X_nbvae"][3] = np.nan
    co.new_operators(place.adata)


@case(MODELS, "an unknown perturbation to predict")
def _(place):
    place.predictor.predict(context="type A", perturbation="drug1")


@case(MODELS, "an unknown context to predict in")
def _(place):
    place.predictor.predict(context="typeA", perturbation="drug 1")


@case(MODELS, "latents of another model")
def _(place):
    operators = place.operators
    place.adata.obsm["X_nbvae"] = np.zeros((place.adata.n_obs, 3), dtype=np.float32)
    co.combinations.order_effects(place.adata, operators)


@case(MODELS, "a predictor asked before it was fitted")
def _(place):
    co.CellOp(place.adata).predict(context="type A", perturbation="drug 1")


@case(MODELS, "operators without the VAE of their latent space")
def _(place):
    co.CellOp(place.adata, operators=place.operators)


@case(MODELS, "a latent space of one dimension")
def _(place):
    co.CellOp(place.adata, n_latent=1)


@case(MODELS, "genes that new controls lack")
def _(place):
    fewer = place.adata[:, 3:].copy()
    place.predictor.on(fewer).predict(context="type A", perturbation="drug 1")


@case(MODELS, "a table of conditions with a misnamed column")
def _(place):
    import pandas as pd

    place.predictor.predict(pd.DataFrame({"cell_type": ["type A"], "perturbation": ["drug 1"]}))


@case(MODELS, "a strength beyond what is known")
def _(place):
    place.predictor.predict(context="type A", perturbation="drug 1", strength=3.0)


@case(MODELS, "features that lack a perturbation")
def _(place):
    import pandas as pd

    features = pd.DataFrame(np.eye(1), index=["drug 1"])
    co.CellOp(place.adata, features=features).fit(progress=False)


@case(MODELS, "NaN in training")
def _(place):
    place.vae.encoder.mean.weight.data[0, 0] = float("nan")
    co.VAETrainer(place.adata, place.vae, max_epochs=1, progress=False).fit()


@case(MODELS, "a negative learning rate")
def _(place):
    co.VAETrainer(place.split, place.vae, progress=False).learning_rate = -1.0


@case(MODELS, "no epoch to train")
def _(place):
    co.VAETrainer(place.split, place.vae, max_epochs=0, progress=False)


@case(MODELS, "an empty batch")
def _(place):
    co.VAETrainer(place.split, place.vae, batch_size=0, progress=False)


@case(MODELS, "a setting of the VAE that is nearly right")
def _(place):
    co.new_vae(place.split, n_latents=8)


@case(MODELS, "a setting of the operators that is nearly right")
def _(place):
    co.new_operators(place.embedded, ranks=2)


@case(MODELS, "a trainer's setting by its name in other programs")
def _(place):
    co.VAETrainer(place.split, place.vae, learning_rate=1e-3)


@case(MODELS, "the way back of a singular operator")
def _(place):
    import torch

    from cellop_nb.models.affine import AffineOperator

    AffineOperator(torch.zeros(2, 2), torch.zeros(2), "type A, drug 1").inverse()


@case(MODELS, "half a dose of an operator that mirrors")
def _(place):
    import torch

    from cellop_nb.models.affine import AffineOperator

    AffineOperator(torch.diag(torch.tensor([-1.0, 1.0])), torch.zeros(2), "type A, drug 1").power(0.5)


@case(MODELS, "an energy distance of one cell")
def _(place):
    import torch

    co.energy_distance(torch.zeros(1, 2), torch.zeros(5, 2))


@case(MODELS, "clouds of two different models")
def _(place):
    import torch

    co.energy_distance(torch.zeros(5, 2), torch.zeros(5, 3))


@case(MODELS, "negative counts in the likelihood")
def _(place):
    import torch

    co.nb_log_likelihood(-torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))


@case(MODELS, "a penalty on the gradient of an energy distance")
def _(place):
    import torch

    x = torch.randn(5, 2, requires_grad=True)
    torch.autograd.grad(co.energy_distance(x, torch.zeros(5, 2)), x, create_graph=True)


@case(MODELS, "the way back of an operator that is nearly singular")
def _(place):
    import torch

    from cellop_nb.models.affine import AffineOperator

    AffineOperator(torch.diag(torch.tensor([1.0, 1e-6])), torch.zeros(2), "type A, drug 1").inverse()


def asks(question):
    """Ask a fitted predictor for drug 1 in type A, but for what the question says."""
    usual = {"context": "type A", "perturbation": "drug 1"}
    return lambda place: place.predictor.predict(**usual | question)


QUESTIONS = {
    "a combination of a perturbation with itself": ({"perturbation": "drug 1+drug 1"}, "'drug 1+drug 1'"),
    "a combination whose second part was left out": ({"perturbation": "drug 1+"}, "'drug 1+'"),
    "a truth value as a number of cells": ({"n_cells": True}, "True"),
    "more cells than fit anywhere": ({"n_cells": 10**12}, "1000000000000"),
    "a part of a cell": ({"n_cells": 2.5}, "2.5"),
    "a fraction as the seed of a prediction": ({"seed": 1.5}, "seed=1.5"),
    "a seed below 0 for a prediction": ({"seed": -1}, "seed=-1"),
    "an ending that is no h5ad": ({"out": "cells.csv"}, "'cells.csv'"),
}
for title, (question, found) in QUESTIONS.items():
    case(MODELS, title, found=found)(asks(question))


@case(MODELS, "None as the seed of a predictor", found="seed=None")
def _(place):
    co.CellOp(place.adata, seed=None)


@case(MODELS, "the class of a callback in place of a callback", found="the class LivePlot")
def _(place):
    co.CellOp(place.adata).fit(callbacks=[co.LivePlot])


@case(MODELS, "a function in place of a callback", found="a function")
def _(place):
    co.VAETrainer(place.split, place.vae, callbacks=[lambda trainer: None], progress=False)


@case(MODELS, "nothing as the path of a model", found="None")
def _(place):
    co.load(None)


@case(MODELS, "an empty name for a model", found="''")
def _(place):
    place.predictor.save("")


@case(MODELS, "nothing to score", found="a NoneType")
def _(place):
    co.score(None, place.adata)


@case(MODELS, "arrays to score in place of cells with names", found="a ndarray")
def _(place):
    co.score({"mine": np.ones((3, 3))}, place.adata)
