"""The command sweep."""

from __future__ import annotations

import os
from unittest import mock

from .cases import SWEEPS, case, command


@case(SWEEPS, "nothing to go through", code=2)
def _(place):
    return command(place, "sweep", "02", "-p", "max_epochs", "3")


@case(SWEEPS, "a name without values", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "latent_dim")


@case(SWEEPS, "a parameter that the notebook does not have", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "latent_dims=8,16")


@case(SWEEPS, "a value of another kind", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "latent_dim=8,many")


@case(SWEEPS, "a varied value out of range", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "latent_dim=0,8")


@case(SWEEPS, "the same value twice", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "latent_dim=8,8")


@case(SWEEPS, "a parameter both varied and fixed", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "latent_dim=8,16", "-p", "latent_dim", "8")


@case(SWEEPS, "a range from high to low", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=4..0")


@case(SWEEPS, "a continuous range that is to be gone through whole", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "learning_rate=log:1e-4..1e-2")


@case(SWEEPS, "a logarithmic range from zero", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "learning_rate=log:0..1e-2", "--random", "3")


@case(SWEEPS, "no random combination", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "latent_dim=8,16", "--random", "0")


@case(SWEEPS, "values to be chosen by a number that is not named", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "latent_dim=8,16", "--tpe", "5")


@case(SWEEPS, "curves of a grid to be given up early", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "latent_dim=8,16", "--prune")


@case(SWEEPS, "the folder of the run", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "run_dir=a,b")


@case(SWEEPS, "an unknown notebook to sweep", code=2)
def _(place):
    return command(place, "sweep", "train_vae", "-g", "seed=0..2")


@case(SWEEPS, "an unknown batch system", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "--cluster", "slrum")


@case(SWEEPS, "no worker", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "--workers", "0")


@case(SWEEPS, "memory of a job in no known unit", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "--job", "memory=lots")


@case(SWEEPS, "a time limit that is none", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "--job", "walltime=a day")


@case(SWEEPS, "more runs than a disk holds", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..99999999")


@case(SWEEPS, "the same option twice", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "--workers", "1", "--workers", "2")


@case(SWEEPS, "the same fixed value twice", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "-p", "hidden", "8", "-p", "hidden", "16")


@case(SWEEPS, "a scheduler that whoever reaches it may use", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "--cluster", "tcp://10.0.0.1:8786")


@case(SWEEPS, "an account of two lines", code=2)
def _(place):
    where = ("--cluster", "slurm", "--job", "account=lab7\n#SBATCH --uid=0")
    return command(place, "sweep", "02", "-g", "seed=0..2", *where)


@case(SWEEPS, "a folder that a job script would read as two words", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "--cluster", "slurm", "--runs", "my runs")


@case(SWEEPS, "a data file that is not there", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "--data", "screen.h5ad")


@case(SWEEPS, "a name that leads out of the sweeps", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "--name", "../elsewhere")


@case(SWEEPS, "a wrong column in the file", code=2)
def _(place):
    _ = place.h5ad
    where = ("--data", "screen.h5ad", "--context-key", "celltype", "--runs", "runs")
    return command(place, "sweep", "02", "-g", "seed=0..2", *where)


@case(SWEEPS, "a batch system that this machine does not have", code=2)
def _(place):
    with mock.patch.dict(os.environ, PATH=str(place.folder)):
        return command(place, "sweep", "02", "-g", "seed=0..2", "--cluster", "slurm")


@case(SWEEPS, "a metric that the notebook does not write")
def _(place):
    import pandas as pd

    from cellop_nb.notebook.sweep import Sweep

    runs = pd.DataFrame({"run": ["a", "b"], "seed": [0, 1], "status": "done", "val_elbo": [1.0, 2.0]})
    Sweep(runs, ["seed"], "val_loss")
