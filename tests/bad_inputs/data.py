"""Wrong counts, labels and splits."""

from __future__ import annotations

import numpy as np

import cellop_nb as co

from .cases import COUNTS, LABELS, SPLIT, case

# -- counts


@case(COUNTS, "log-normalised values where counts are due; the counts are in a layer")
def _(place):
    place.adata.layers["counts"] = place.adata.X.copy()
    place.adata.X = place.adata.X.log1p()
    co.setup(place.adata)


@case(COUNTS, "log-normalised values; the counts are in raw")
def _(place):
    place.adata.raw = place.adata.copy()
    place.adata.X = place.adata.X.log1p()
    co.setup(place.adata)


@case(COUNTS, "values normalised to the same total")
def _(place):
    dense = place.adata.X.toarray()
    place.adata.X = 1e4 * dense / dense.sum(1, keepdims=True)
    co.setup(place.adata)


@case(COUNTS, "scaled values, some negative")
def _(place):
    place.adata.X = place.adata.X.toarray() - 1.0
    co.setup(place.adata)


@case(COUNTS, "NaN among the counts")
def _(place):
    place.adata.X = place.adata.X.toarray()
    place.adata.X[3, 5] = np.nan
    co.setup(place.adata)


@case(COUNTS, "a cell without counts")
def _(place):
    place.adata.X = place.adata.X.toarray()
    place.adata.X[7] = 0
    co.setup(place.adata)


@case(COUNTS, "a layer that is not there")
def _(place):
    place.adata.layers["counts"] = place.adata.X
    co.setup(place.adata, layer="count")


@case(COUNTS, "nothing in X")
def _(place):
    place.adata.X = None
    co.setup(place.adata)


@case(COUNTS, "no cells left after a filter")
def _(place):
    co.setup(place.adata[:0].copy())


@case(COUNTS, "a path instead of an AnnData object")
def _(place):
    co.setup("screen.h5ad")


@case(COUNTS, "repeated gene names")
def _(place):
    place.adata.var_names = ["gene 1", *place.adata.var_names[1:-1], "gene 1"]
    co.setup(place.adata)


@case(COUNTS, "repeated cell names")
def _(place):
    place.adata.obs_names = ["AAACG"] * place.adata.n_obs
    co.setup(place.adata)


@case(COUNTS, "a synthetic screen of too few dimensions")
def _(place):
    co.datasets.synthetic(n_latent=2)


@case(COUNTS, "log-normalised values into the trainer")
def _(place):
    vae = place.vae
    place.adata.X = place.adata.X.log1p()
    co.VAETrainer(place.adata, vae, max_epochs=1, progress=False).fit()


# -- labels


@case(LABELS, "a perturbation column of another name")
def _(place):
    place.adata.obs = place.adata.obs.rename(columns={"perturbation": "perturbations"})
    co.setup(place.adata)


@case(LABELS, "a context column that is not there")
def _(place):
    co.setup(place.adata, context_key="celltype")


@case(LABELS, "another label for the controls")
def _(place):
    co.setup(place.adata, control="DMSO")


@case(LABELS, "a cell type without controls")
def _(place):
    obs = place.adata.obs
    co.setup(place.adata[~((obs.cell_type == "type A") & (obs.perturbation == "control"))].copy())


@case(LABELS, "nothing but controls")
def _(place):
    co.setup(place.adata[place.adata.obs.perturbation == "control"].copy())


@case(LABELS, "cells without a label")
def _(place):
    place.adata.obs.loc[place.adata.obs_names[:5], "perturbation"] = None
    co.setup(place.adata)


def relabel(place, old, new):
    labels = place.adata.obs["perturbation"].astype(str)
    place.adata.obs["perturbation"] = labels.where(labels != old, new).to_numpy()


@case(LABELS, "two spellings of the control")
def _(place):
    relabel(place, "drug 1", "Control")
    co.setup(place.adata)


@case(LABELS, "a label with a blank at its end")
def _(place):
    relabel(place, "drug 1", "drug 1 ")
    co.setup(place.adata)


@case(LABELS, "a combination with the control")
def _(place):
    relabel(place, "drug 1", "drug 1+control")
    co.setup(place.adata)


@case(LABELS, "a combination in two orders")
def _(place):
    relabel(place, "drug 1", "A+B")
    relabel(place, "drug 2", "B+A")
    co.setup(place.adata)


@case(LABELS, "one column for both keys")
def _(place):
    co.setup(place.adata, context_key="perturbation")


@case(LABELS, "a group of one cell")
def _(place):
    labels = place.adata.obs["perturbation"].astype(str).to_numpy()
    labels[np.flatnonzero(labels == "drug 1")[0]] = "drug 9"
    place.adata.obs["perturbation"] = labels
    co.setup(place.adata)


# -- splits


@case(SPLIT, "a hold-out that matches no cell")
def _(place):
    co.split(place.adata, holdout={"cell_type": "type Z"})


@case(SPLIT, "a hold-out of an unknown column")
def _(place):
    co.split(place.adata, holdout={"celltype": "type A"})


@case(SPLIT, "a hold-out that leaves nothing to learn from")
def _(place):
    co.split(place.adata, holdout={"perturbation": ["drug 1", "drug 2"]})


@case(SPLIT, "fractions that leave no cell for training")
def _(place):
    co.split(place.adata, test_fraction=0.6, val_fraction=0.5)


@case(SPLIT, "training without a split")
def _(place):
    co.new_vae(place.adata, n_latent=2)
