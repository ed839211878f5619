"""Hold-outs in turn, as a call and as a command."""

from __future__ import annotations

import cellop_nb as co
from cellop_nb.analysis.baselines import Prediction
from cellop_nb.analysis.scores import score_holdout

from .cases import HOLDOUTS, SPLIT, case, command


@case(SPLIT, "a hold-out over nothing that is known")
def _(place):
    co.holdout_all(place.adata, over="celltypes", progress=False)


@case(SPLIT, "a hold-out of counts that lie on disk")
def _(place):
    backed = co.datasets.load(str(place.h5ad), backed=True)
    co.holdout(backed, heldout={"cell_type": "type A", "perturbation": "drug 1"}, progress=False)


@case(SPLIT, "combinations in turn where none was measured")
def _(place):
    co.holdout_all(place.adata, over="combination", progress=False)


@case(SPLIT, "groups in turn that are all too small")
def _(place):
    co.holdout_all(place.adata, min_cells=1000, progress=False)


@case(SPLIT, "a condition on an unknown label")
def _(place):
    co.holdout_all(place.adata, where={"perturbation": "drug 7"}, progress=False)


@case(SPLIT, "contexts in turn without a context column")
def _(place):
    co.holdout_all(place.adata, context_key=None, progress=False)


@case(SPLIT, "no worker for the hold-outs")
def _(place):
    co.holdout_all(place.adata, cluster=0, progress=False)


@case(SPLIT, "an unknown metric")
def _(place):
    co.holdout(place.adata, heldout={"cell_type": "type A", "perturbation": "drug 1"}, metrics=["e_dist"])


@case(SPLIT, "a setting of a hold-out's VAE that is nearly right")
def _(place):
    co.holdout(place.adata, heldout={"cell_type": "type A", "perturbation": "drug 1"}, vae={"latent": 8})


@case(SPLIT, "a setting of a hold-out's training that is nearly right")
def _(place):
    co.holdout(place.adata, heldout={"cell_type": "type A", "perturbation": "drug 1"}, training={"epochs": 8})


@case(SPLIT, "a setting of a hold-out's training that the hold-out makes itself")
def _(place):
    co.holdout_all(place.adata, training={"callbacks": []}, progress=False)


@case(SPLIT, "a setting of hold-outs in turn that is nearly right")
def _(place):
    co.holdout_all(place.adata, n_gene=500, progress=False)


@case(SPLIT, "no setting of the VAE to choose from")
def _(place):
    co.holdout(place.adata, heldout={"cell_type": "type A", "perturbation": "drug 1"}, vae=[])


@case(SPLIT, "a method by the name of a baseline")
def _(place):
    own = {"mean shift": lambda training, target: None}
    co.holdout(place.adata, heldout={"cell_type": "type A", "perturbation": "drug 1"}, methods=own)


@case(SPLIT, "a method that gives back an array")
def _(place):
    scored(place, lambda training, target: target.control)


@case(SPLIT, "a method that predicts some of the genes")
def _(place):
    scored(place, lambda training, target: Prediction.of_cells("mine", target.control[:, :5]))


def scored(place, rule):
    where = {"context": "type A", "perturbation": "drug 1"}
    return score_holdout(place.adata, {"mine": rule}, **where)


@case(HOLDOUTS, "a condition without its label", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "holdout", "screen.h5ad", "--where", "perturbation")


@case(HOLDOUTS, "a screen that is not there", code=2)
def _(place):
    return command(place, "holdout", "screen.h5ad")


@case(HOLDOUTS, "a table in a folder that is not there", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "holdout", "screen.h5ad", "--out", "results/table.csv")


@case(HOLDOUTS, "a wrong column of contexts", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "holdout", "screen.h5ad", "--context-key", "celltype")


@case(HOLDOUTS, "something unknown in turn", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "holdout", "screen.h5ad", "--over", "patient")


@case(HOLDOUTS, "no run of each", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "holdout", "screen.h5ad", "--seeds", "0")


@case(HOLDOUTS, "no pass of the training", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "holdout", "screen.h5ad", "--epochs", "0")


@case(HOLDOUTS, "a negative number of genes", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "holdout", "screen.h5ad", "--genes", "-5")


@case(HOLDOUTS, "hold-outs without a worker", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "holdout", "screen.h5ad", "--workers", "0")


@case(HOLDOUTS, "a data set of nearly that name", code=2)
def _(place):
    return command(place, "holdout", "kang_18")
