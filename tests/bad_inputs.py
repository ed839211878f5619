"""The catalogue of bad inputs: what a person may do wrong, each as a few lines that do it.

`test_errors.py` runs every case and demands the three beats and a clean folder; run as a script, this file writes
a page of the docs, the messages as a person sees them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from unittest import mock

import numpy as np

import cellop_nb as co
from cellop_nb.errors import CellopError


@dataclass
class Place:
    """What a case works with: an empty folder, a small screen, models made for it."""

    folder: Path
    given: dict[str, bytes] = field(default_factory=dict)

    def put(self, name: str, content: str | bytes) -> Path:
        """A file that the case itself brings along; it must still be there, unchanged, in the end."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return self.keep(path)

    def keep(self, path: Path) -> Path:
        self.given[str(path.relative_to(self.folder))] = path.read_bytes()
        return path

    def cut(self, path: Path, share: float) -> Path:
        """The file, but only its first part."""
        content = path.read_bytes()
        return self.put(str(path.relative_to(self.folder)), content[: int(share * len(content))])

    @cached_property
    def adata(self):
        return screen()

    @cached_property
    def split(self):
        co.split(self.adata)
        return self.adata

    @cached_property
    def vae(self):
        return co.new_vae(self.split, n_latent=2, n_hidden=8)

    @cached_property
    def embedded(self):
        co.embed(self.split, self.vae)
        return self.adata

    @cached_property
    def operators(self):
        return co.new_operators(self.embedded, rank=1)

    @cached_property
    def saved(self) -> Path:
        return self.keep(co.save(self.folder / "model.safetensors", vae=self.vae))

    @cached_property
    def h5ad(self) -> Path:
        path = self.folder / "screen.h5ad"
        self.adata.write_h5ad(path)
        return self.keep(path)


def screen():
    """A synthetic screen of 240 cells and 40 genes; the copy is the caller's to spoil."""
    return _SCREEN.copy()


_SCREEN = co.datasets.synthetic(
    n_contexts=2, n_perturbations=2, n_cells=40, n_genes=40, n_latent=4, library=200.0, control="control"
)


@dataclass(frozen=True)
class Case:
    """One thing done wrong."""

    area: str
    title: str
    do: Callable[[Place], object]
    code: int | None = None  # exit code of the command line; None: an error of the library


CASES: list[Case] = []


def case(area: str, title: str, *, code: int | None = None):
    """Register the decorated function as a case."""

    def register(do):
        CASES.append(Case(area, title, do, code))
        return do

    return register


def command(place: Place, *words: object) -> int:
    """The command line, in the case's folder; its complaint goes to standard error."""
    from cellop_nb.__main__ import main

    before = Path.cwd()
    os.chdir(place.folder)
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        os.chdir(before)


COUNTS, LABELS, SPLIT, MODELS, FILES, NOTEBOOKS, COMMANDS, SWEEPS, HOLDOUTS, MACHINE = (
    "Counts", "Labels", "Splits and hold-outs", "Models and training", "Files", "Notebook parameters",
    "Command line", "The command sweep", "The command holdout", "The machine",
)  # fmt: skip

# -- counts


@case(COUNTS, "log-normalised values where counts are due; the counts are in a layer")
def _(place):
    place.adata.layers["counts"] = place.adata.X.copy()
    place.adata.X = place.adata.X.log1p()
    co.check(place.adata)


@case(COUNTS, "log-normalised values; the counts are in raw")
def _(place):
    place.adata.raw = place.adata.copy()
    place.adata.X = place.adata.X.log1p()
    co.check(place.adata)


@case(COUNTS, "values normalised to the same total")
def _(place):
    dense = place.adata.X.toarray()
    place.adata.X = 1e4 * dense / dense.sum(1, keepdims=True)
    co.check(place.adata)


@case(COUNTS, "scaled values, some negative")
def _(place):
    place.adata.X = place.adata.X.toarray() - 1.0
    co.check(place.adata)


@case(COUNTS, "NaN among the counts")
def _(place):
    place.adata.X = place.adata.X.toarray()
    place.adata.X[3, 5] = np.nan
    co.check(place.adata)


@case(COUNTS, "a cell without counts")
def _(place):
    place.adata.X = place.adata.X.toarray()
    place.adata.X[7] = 0
    co.check(place.adata)


@case(COUNTS, "a layer that is not there")
def _(place):
    place.adata.layers["counts"] = place.adata.X
    co.check(place.adata, layer="count")


@case(COUNTS, "nothing in X")
def _(place):
    place.adata.X = None
    co.check(place.adata)


@case(COUNTS, "no cells left after a filter")
def _(place):
    co.check(place.adata[:0].copy())


@case(COUNTS, "a path instead of an AnnData object")
def _(place):
    co.check("screen.h5ad")


@case(COUNTS, "repeated gene names")
def _(place):
    place.adata.var_names = ["gene 1", *place.adata.var_names[1:-1], "gene 1"]
    co.check(place.adata)


@case(COUNTS, "repeated cell names")
def _(place):
    place.adata.obs_names = ["AAACG"] * place.adata.n_obs
    co.check(place.adata)


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
    co.check(place.adata)


@case(LABELS, "a context column that is not there")
def _(place):
    co.check(place.adata, context_key="celltype")


@case(LABELS, "another label for the controls")
def _(place):
    co.check(place.adata, control="DMSO")


@case(LABELS, "a cell type without controls")
def _(place):
    obs = place.adata.obs
    co.check(place.adata[~((obs.cell_type == "type A") & (obs.perturbation == "control"))].copy())


@case(LABELS, "nothing but controls")
def _(place):
    co.check(place.adata[place.adata.obs.perturbation == "control"].copy())


@case(LABELS, "cells without a label")
def _(place):
    place.adata.obs.loc[place.adata.obs_names[:5], "perturbation"] = None
    co.check(place.adata)


def relabel(place, old, new):
    labels = place.adata.obs["perturbation"].astype(str)
    place.adata.obs["perturbation"] = labels.where(labels != old, new).to_numpy()


@case(LABELS, "two spellings of the control")
def _(place):
    relabel(place, "drug 1", "Control")
    co.check(place.adata)


@case(LABELS, "a label with a blank at its end")
def _(place):
    relabel(place, "drug 1", "drug 1 ")
    co.check(place.adata)


@case(LABELS, "a combination with the control")
def _(place):
    relabel(place, "drug 1", "drug 1+control")
    co.check(place.adata)


@case(LABELS, "a combination in two orders")
def _(place):
    relabel(place, "drug 1", "A+B")
    relabel(place, "drug 2", "B+A")
    co.check(place.adata)


@case(LABELS, "one column for both keys")
def _(place):
    co.check(place.adata, context_key="perturbation")


@case(LABELS, "a group of one cell")
def _(place):
    labels = place.adata.obs["perturbation"].astype(str).to_numpy()
    labels[np.flatnonzero(labels == "drug 1")[0]] = "drug 9"
    place.adata.obs["perturbation"] = labels
    co.check(place.adata)


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


@case(SPLIT, "no fit asked for in a hold-out")
def _(place):
    co.holdout(place.adata, heldout={"cell_type": "type A", "perturbation": "drug 1"}, n_seeds=0)


# -- models and training


@case(MODELS, "genes of another data set")
def _(place):
    vae = place.vae
    place.adata.var_names = [f"ENSG{k:011d}" for k in range(place.adata.n_vars)]
    co.embed(place.adata, vae)


@case(MODELS, "a saved model for other genes")
def _(place):
    co.load(place.saved, genes=[f"ENSG{k:011d}" for k in range(40)])


@case(MODELS, "operators before the cells are embedded")
def _(place):
    co.new_operators(place.split)


@case(MODELS, "latents that are not finite")
def _(place):
    place.embedded.obsm["X_nbvae"][3] = np.nan
    co.new_operators(place.adata)


@case(MODELS, "an unknown perturbation to predict")
def _(place):
    co.predict(place.embedded, place.vae, place.operators, context="type A", perturbation="drug1")


@case(MODELS, "an unknown context to predict in")
def _(place):
    co.predict(place.embedded, place.vae, place.operators, context="typeA", perturbation="drug 1")


@case(MODELS, "latents of another model")
def _(place):
    operators = place.operators
    place.adata.obsm["X_nbvae"] = np.zeros((place.adata.n_obs, 3), dtype=np.float32)
    co.predict(place.adata, place.vae, operators, context="type A", perturbation="drug 1")


@case(MODELS, "features that lack a perturbation")
def _(place):
    import pandas as pd

    features = pd.DataFrame(np.eye(1), index=["drug 1"])
    co.new_operators(place.embedded, features=features)


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


# -- files


@case(FILES, "an .h5ad that was cut short")
def _(place):
    place.cut(place.h5ad, 0.3)
    co.datasets.load(place.h5ad)


@case(FILES, "a text file named .h5ad")
def _(place):
    place.put("screen.h5ad", "cell,gene\n")
    co.datasets.load(place.folder / "screen.h5ad")


@case(FILES, "an HDF5 file that holds no AnnData")
def _(place):
    import h5py

    with h5py.File(place.folder / "screen.h5ad", "w") as file:
        file["matrix"] = np.zeros(3)
    co.datasets.load(place.keep(place.folder / "screen.h5ad"))


@case(FILES, "a table instead of an .h5ad")
def _(place):
    place.put("screen.csv", "cell,gene\n")
    co.datasets.load(place.folder / "screen.csv")


@case(FILES, "an unknown data set")
def _(place):
    co.datasets.load("kang_18")


@case(FILES, "no connection for a public screen")
def _(place):
    import requests

    refuse = mock.patch("pooch.retrieve", side_effect=requests.ConnectionError("no route to host"))
    with mock.patch.dict(os.environ, CELLOP_CACHE=str(place.folder / "cache")), refuse:
        co.datasets.load("kang_2018")


@case(FILES, "models that are not there")
def _(place):
    co.load(place.folder / "model.safetensors")


@case(FILES, "models that were cut short")
def _(place):
    place.cut(place.saved, 0.5)
    co.load(place.saved)


@case(FILES, "a pickle instead of saved models")
def _(place):
    import pickle

    place.put("model.safetensors", pickle.dumps({"vae": 1}))
    co.load(place.folder / "model.safetensors")


@case(FILES, "tensors of another program")
def _(place):
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, place.folder / "model.safetensors")
    co.load(place.keep(place.folder / "model.safetensors"))


@case(FILES, "a checkpoint that holds code")
def _(place):
    import torch

    torch.save({"model": Case}, place.folder / "last.pt")
    co.VAETrainer(place.split, place.vae, progress=False).load_checkpoint(
        place.keep(place.folder / "last.pt")
    )


@case(FILES, "a checkpoint of another model")
def _(place):
    other = co.new_vae(place.split, n_latent=3, n_hidden=8)
    path = co.VAETrainer(place.adata, other, progress=False).save_checkpoint(place.folder / "last.pt")
    co.VAETrainer(place.adata, place.vae, progress=False).load_checkpoint(place.keep(path))


@case(FILES, "nothing to save")
def _(place):
    co.save(place.folder / "model.safetensors")


@case(FILES, "notes that JSON cannot hold")
def _(place):
    co.save(place.folder / "model.safetensors", vae=place.vae, summary={"genes": np.arange(3)})


@case(FILES, "a full disk while models are saved")
def _(place):
    vae, full = place.vae, OSError(28, "No space left on device")
    with mock.patch("cellop_nb.training.checkpoint.save_file", side_effect=full):
        co.save(place.folder / "model.safetensors", vae=vae)


@case(FILES, "a full disk while a run writes its numbers")
def _(place):
    from cellop_nb.notebook import batch

    def half(path, text, **_):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    with mock.patch.object(Path, "write_text", half):
        batch.write_metrics(place.folder, "02_train_vae", {"val_elbo": 1.0})


def refuses(place: Place, name: str) -> Path:
    """A path below a file, where nobody can write, not even root."""
    return place.put(name, "")


@case(FILES, "a folder for checkpoints that is a file")
def _(place):
    folder = refuses(place, "results")
    co.VAETrainer(place.split, place.vae, max_epochs=1, folder=folder / "vae", progress=False).fit()


@case(FILES, "a read-only folder")
def _(place):
    vae = place.vae
    with mock.patch("os.replace", side_effect=PermissionError(13, "Permission denied")):
        co.save(place.folder / "model.safetensors", vae=vae)


@case(FILES, "a name that leads out of the run folder")
def _(place):
    from cellop_nb.notebook.workspace import Workspace

    Workspace("01_data", place.folder / "run").table(place.adata.obs, "../../elsewhere")


# -- notebook parameters


def validated(notebook: str, **values):
    from cellop_nb.notebook import parameters

    return parameters.validate(notebook, values)


@case(NOTEBOOKS, "an unknown parameter")
def _(place):
    validated("02_train_vae", n_latent=16)


@case(NOTEBOOKS, "text where a number is due")
def _(place):
    validated("02_train_vae", latent_dim="16")


@case(NOTEBOOKS, "a number out of range")
def _(place):
    validated("02_train_vae", latent_dim=0)


@case(NOTEBOOKS, "a rate that is not finite")
def _(place):
    validated("02_train_vae", learning_rate=float("nan"))


@case(NOTEBOOKS, "a notebook that does not exist")
def _(place):
    validated("12_nothing", seed=1)


# -- command line


@case(COMMANDS, "an unknown command", code=2)
def _(place):
    return command(place, "rnu")


@case(COMMANDS, "an unknown option", code=2)
def _(place):
    return command(place, "run", "--dat", "screen.h5ad")


@case(COMMANDS, "a file that is not there", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "run", "--data", "scren.h5ad")


@case(COMMANDS, "log-normalised values in a file whose counts are in raw", code=2)
def _(place):
    place.adata.raw = place.adata.copy()
    place.adata.X = place.adata.X.log1p()
    _ = place.h5ad
    return command(place, "run", "--data", "screen.h5ad")


@case(COMMANDS, "the wrong column", code=2)
def _(place):
    _ = place.h5ad
    return command(place, "run", "--data", "screen.h5ad", "--context-key", "celltype")


@case(COMMANDS, "log-normalised counts in the file", code=2)
def _(place):
    place.adata.X = place.adata.X.log1p()
    _ = place.h5ad
    return command(place, "run", "--data", "screen.h5ad")


@case(COMMANDS, "a file that was cut short", code=2)
def _(place):
    place.cut(place.h5ad, 0.3)
    return command(place, "run", "--data", "screen.h5ad")


@case(COMMANDS, "a parameter out of range", code=2)
def _(place):
    return command(place, "run", "--only", "02", "-p", "latent_dim", "0")


@case(COMMANDS, "a parameter that no notebook has", code=2)
def _(place):
    return command(place, "run", "--only", "02", "-p", "latent_dims", "8")


@case(COMMANDS, "a run folder outside of the runs", code=2)
def _(place):
    return command(place, "run", "--name", "../elsewhere")


@case(COMMANDS, "broken YAML", code=2)
def _(place):
    place.put("values.yaml", "latent_dim: [8\n")
    return command(place, "run", "--only", "02", "-f", "values.yaml")


@case(COMMANDS, "a folder without notebooks", code=2)
def _(place):
    return command(place, "run", "--notebooks", ".")


@case(COMMANDS, "a parent of runs that is a file", code=2)
def _(place):
    refuses(place, "runs")
    return command(place, "run", "--only", "00", "--runs", "runs")


@case(COMMANDS, "notebooks copied twice", code=2)
def _(place):
    place.put("mine/notebooks/00_quickstart.ipynb", "{}")
    return command(place, "notebooks", "mine")


# -- sweeps


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
    return command(place, "sweep", "02", "-g", "seed=0..2", "--memory", "lots")


@case(SWEEPS, "a time limit that is none", code=2)
def _(place):
    return command(place, "sweep", "02", "-g", "seed=0..2", "--walltime", "a day")


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

    from cellop_nb.notebook.sweeps import table

    runs = pd.DataFrame({"run": ["a", "b"], "seed": [0, 1], "status": "done", "val_elbo": [1.0, 2.0]})
    table.metric_of(runs, ["seed"], "val_loss")


# -- hold-outs


@case(SPLIT, "a hold-out over nothing that is known")
def _(place):
    co.holdout_all(place.adata, over="celltypes", progress=False)


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


# -- the machine


@case(MACHINE, "no kernel to run a notebook with")
def _(place):
    from jupyter_client.kernelspec import NoSuchKernel

    from cellop_nb.commands import environment
    from cellop_nb.notebook import batch

    shipped = next(environment.NOTEBOOKS.glob("00_*.ipynb"))
    book = place.put(shipped.name, shipped.read_bytes())
    with mock.patch("papermill.execute_notebook", side_effect=NoSuchKernel("python3")):
        batch.execute(book, place.folder / "run")


def with_version(package: str, found: str):
    """As if another version of a package were installed."""
    from importlib import metadata

    known = metadata.version
    return mock.patch("cellop_nb.versions.version", lambda name: found if name == package else known(name))


@case(MACHINE, "a torch that is too old")
def _(place):
    from cellop_nb import versions

    with with_version("torch", "2.0.1"):
        versions.refuse_outdated()


@case(MACHINE, "an ipykernel that is too old")
def _(place):
    from cellop_nb import versions

    with with_version("ipykernel", "5.5.6"):
        versions.refuse_outdated()


@case(MACHINE, "a package that is missing, in an installed package", code=1)
def _(place):
    from importlib.metadata import PackageNotFoundError, version

    from cellop_nb.commands import environment

    def lacks(name):
        if name == "papermill":
            raise PackageNotFoundError(name)
        return version(name)

    installed = mock.patch.object(environment, "IS_CHECKOUT", False)
    with mock.patch("cellop_nb.versions.version", lacks), installed:
        return command(place, "run", "--only", "00")


# -- what a person sees


def message(one: Case, place: Place) -> str:
    """Do it, and return what a person reads: the error's text, or what the command line complains."""
    folder, complaint = place.folder, io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            code = one.do(place)
    except CellopError as error:
        assert one.code is None, f"a traceback on the command line: {error}"
        text = str(error)
    else:
        assert one.code is not None, "nothing was refused"
        assert code == one.code, f"exit code {code}: {complaint.getvalue()}"
        text = complaint.getvalue().strip()
    text = re.sub(
        r"runs/\d{4}-[\d_-]+", "runs/2026-01-31_12-00-00", text.replace(str(folder), "/home/you/work")
    )
    return text.replace("bad_inputs.", "")


def page(messages: dict[str, list[tuple[str, str]]]) -> str:
    """The catalogue as a page."""
    head = (
        "# Errors, and how to fix them\n\n"
        "Bad input is refused before anything is computed or written, with an error that says what was expected, "
        "what was found,\nand how to fix it. These are the messages as a person sees them; a test does each of "
        "these things wrong and compares.\n"
    )
    parts = [head]
    for area, rows in messages.items():
        parts.append(f"\n## {area}\n")
        for title, text in rows:
            lines = "\n".join(f"> {line}" if line else ">" for line in escape(text).splitlines())
            parts.append(f"\n**{escape(title[0].upper() + title[1:])}**\n\n{lines}\n")
    return "".join(parts)


def escape(text: str) -> str:
    for mark in "\\`*_[]<>#$|":
        text = text.replace(mark, "\\" + mark)
    return text


if __name__ == "__main__":
    import tempfile

    found: dict[str, list[tuple[str, str]]] = {}
    for one in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found.setdefault(one.area, []).append((one.title, message(one, Place(Path(folder).resolve()))))
    Path(sys.argv[1]).write_text(page(found), encoding="utf-8")
