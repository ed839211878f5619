"""Small screens with planted effects, and models of them that are fitted in a second."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from cellop_nb import CellOp, split
from cellop_nb.analysis.baselines import BASELINES, Training
from cellop_nb.analysis.cellop import Recipe
from cellop_nb.analysis.metrics import EvaluationSpace
from cellop_nb.analysis.scores import score_rules
from cellop_nb.data.contract import Keys
from cellop_nb.data.groups import Groups

TINY = Recipe(
    n_hidden=16, vae_epochs=2, warmup_epochs=1, batch_size=64, finish_epochs=1, operator_epochs=1, n_folds=2
)
"""A recipe under which a model is fitted in a second: for tests of what is done, not of how well."""


def tiny(adata, *, recipe: Recipe = TINY, n_latent: int = 4, **settings) -> CellOp:
    """An unfitted model with a recipe for tests."""
    model = CellOp(adata, n_latent=n_latent, **settings)
    model.recipe = recipe
    return model


def rows_of(adata, **labels) -> np.ndarray:
    """Mask (cell,) of the cells with these labels in `obs`."""
    return np.logical_and.reduce(
        [(adata.obs[column] == label).to_numpy() for column, label in labels.items()]
    )


def scored(adata, left_out: np.ndarray, methods=BASELINES, *, genes=None, metrics=None) -> pd.DataFrame:
    """The table of rules without a model: groups of the left-out cells (cell,) predicted from the rest."""
    train, real = adata[~left_out].copy(), adata[left_out].copy()
    space = EvaluationSpace.fit(train, genes=genes)
    training, controls = Training.of(train, space), Groups(train, min_cells=1).controls
    keys = training.groups.keys
    labels = real.obs[[*keys.context_key, keys.perturbation_key]].astype(str)
    pairs = list(dict.fromkeys(labels.itertuples(index=False, name=None)))
    return score_rules(methods, pairs, training, real, lambda c: train[controls(c)], space, metrics=metrics)[
        0
    ]


def screen(n=60, genes=30, contexts=("B", "NK", "T"), perturbations=("ifn",), seed=0):
    """Poisson counts; every perturbation lifts its own third of the genes in all contexts."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(2.0, 1.5, size=genes)
    counts, obs = [], []
    for context in contexts:
        own = rate * rng.uniform(0.7, 1.4, size=genes)
        for number, name in enumerate(("control", *perturbations)):
            lift = np.ones(genes)
            if number:
                lift[np.random.default_rng(number).permutation(genes)[: genes // 3]] = 4.0
            counts.append(rng.poisson(own * lift, size=(n, genes)))
            obs += [(context, name)] * n
    table = pd.DataFrame(
        obs, columns=["cell_type", "perturbation"], index=[f"cell{i}" for i in range(len(obs))]
    )
    var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    adata = ad.AnnData(sparse.csr_matrix(np.concatenate(counts).astype(np.float32)), obs=table, var=var)
    Keys().write(adata)
    return adata


def acted(act, n: int, seed: int = 0):
    """Latents of one context: n control cells of two dimensions under each of the maps of `act`, by label."""
    rng = np.random.default_rng(seed)
    z = np.concatenate([move(0.5 * rng.normal(size=(n, 2))) for move in act.values()])
    obs = pd.DataFrame({"perturbation": np.repeat(list(act), n)})
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(obs=obs, obsm={"X_nbvae": z.astype(np.float32)})
    Keys(context_key=None).write(adata)
    split(adata, test_fraction=0.0)
    return adata


def interacting():
    """A+B is half of the sum of A and B; the shifts are 4 long."""
    shift = {"control": [0, 0], "A": [4, 0], "B": [0, 4], "C": [-4, 0], "A+B": [2, 2], "B+C": [-4, 4]}
    return acted({name: lambda z, s=s: z + np.array(s) for name, s in shift.items()}, 100)
