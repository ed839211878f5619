"""Small screens with planted effects, and settings of a hold-out that is over in seconds."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from cellop_nb import split

QUICK = {
    "context_key": None,
    "vae": {"n_latent": 4, "n_hidden": 16},
    "training": {"max_epochs": 3},
    "metrics": ["e_distance", "pearson_delta"],
    "progress": False,
}


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
    return ad.AnnData(sparse.csr_matrix(np.concatenate(counts).astype(np.float32)), obs=table, var=var)


def acted(act, n: int, seed: int = 0):
    """Latents of one context: n control cells of two dimensions under each of the maps of `act`, by label."""
    rng = np.random.default_rng(seed)
    z = np.concatenate([move(0.5 * rng.normal(size=(n, 2))) for move in act.values()])
    obs = pd.DataFrame({"perturbation": np.repeat(list(act), n)})
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(obs=obs, obsm={"X_nbvae": z.astype(np.float32)})
    split(adata, test_fraction=0.0, context_key=None)
    return adata


def interacting():
    """A+B is half of the sum of A and B; the shifts are 4 long."""
    shift = {"control": [0, 0], "A": [4, 0], "B": [0, 4], "C": [-4, 0], "A+B": [2, 2], "B+C": [-4, 4]}
    return acted({name: lambda z, s=s: z + np.array(s) for name, s in shift.items()}, 100)
