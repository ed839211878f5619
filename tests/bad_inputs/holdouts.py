"""Hold-outs in turn, as a call and as a command."""

from __future__ import annotations

import cellop_nb as co
from cellop_nb.analysis.baselines import Prediction, Target, Training, run
from cellop_nb.analysis.metrics import EvaluationSpace

from .cases import HOLDOUTS, SPLIT, case, command


@case(SPLIT, "a hold-out over nothing that is known")
def _(place):
    co.holdout(place.adata, over="celltypes", progress=False)


@case(SPLIT, "a hold-out over a column named like a way to hold out")
def _(place):
    place.adata.obs["group"] = place.adata.obs["donor"]
    co.holdout(place.adata, over="group", progress=False)


@case(SPLIT, "a hold-out of a context that is nearly right")
def _(place):
    co.holdout(place.adata, only=["typ A"], progress=False)


@case(SPLIT, "a hold-out of counts that lie on disk")
def _(place):
    backed = co.datasets.load(str(place.h5ad), backed=True)
    co.holdout(backed, progress=False)


@case(SPLIT, "combinations in turn where none was measured")
def _(place):
    co.holdout(place.adata, over="combination", progress=False)


@case(SPLIT, "perturbations in turn without a description of them")
def _(place):
    co.holdout(place.adata, over="perturbation", progress=False)


@case(SPLIT, "contexts in turn that have too few cells")
def _(place):
    obs = place.adata.obs
    third = obs.groupby(["cell_type", "perturbation"], observed=True).cumcount() < 3
    co.holdout(place.adata[third | (obs["perturbation"] == "control")].copy(), progress=False)


@case(SPLIT, "contexts in turn without a context column")
def _(place):
    co.setup(place.adata, context_key=None)
    co.holdout(place.adata, progress=False)


@case(SPLIT, "half a fit asked for in a hold-out", found="n_seeds=1.5")
def _(place):
    co.holdout(place.adata, n_seeds=1.5)


@case(SPLIT, "no fit asked for in a hold-out")
def _(place):
    co.holdout(place.adata, n_seeds=0)


@case(SPLIT, "an unknown metric")
def _(place):
    co.holdout(place.adata, metrics=["e_dist"])


@case(SPLIT, "a method by the name of a baseline")
def _(place):
    co.holdout(place.adata, methods={"mean shift": lambda training, target: None})


@case(SPLIT, "a method that gives back an array")
def _(place):
    answered(place, lambda training, target: target.control)


@case(SPLIT, "a method that predicts some of the genes")
def _(place):
    answered(place, lambda training, target: Prediction.of_cells("mine", target.control[:, :5]))


def answered(place, rule):
    """What a hold-out asks of a method of one's own."""
    space = EvaluationSpace.fit(place.adata)
    training = Training.of(place.adata, space)
    control = training.cells[training.rows("type A", "control")]
    run("mine", rule, training, Target("type A", "drug 1", control, space=space))


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


@case(HOLDOUTS, "hold-outs in a latent space of one dimension", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "holdout", "screen.h5ad", "--latent", "1")


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
