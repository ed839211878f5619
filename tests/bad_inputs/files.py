"""Files that are damaged, foreign or cannot be written."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import numpy as np

import cellop_nb as co
from cellop_nb.training.checkpoint import read_models, write_models

from .cases import FILES, Place, case, refuses


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
    read_models(place.folder / "model.safetensors")


@case(FILES, "models that were cut short")
def _(place):
    place.cut(place.saved, 0.5)
    read_models(place.saved)


@case(FILES, "a pickle instead of saved models")
def _(place):
    import pickle

    place.put("model.safetensors", pickle.dumps({"vae": 1}))
    read_models(place.folder / "model.safetensors")


@case(FILES, "tensors of another program")
def _(place):
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, place.folder / "model.safetensors")
    read_models(place.keep(place.folder / "model.safetensors"))


@case(FILES, "a checkpoint that holds code")
def _(place):
    from cellop_nb.training.checkpoint import write_state

    write_state(place.folder / "last.pt", {"model": Place})
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
    write_models(place.folder / "model.safetensors")


@case(FILES, "notes that JSON cannot hold")
def _(place):
    write_models(place.folder / "model.safetensors", vae=place.vae, predictor={"genes": np.arange(3)})


@case(FILES, "a full disk while models are saved")
def _(place):
    vae, full = place.vae, OSError(28, "No space left on device")
    with mock.patch("cellop_nb.training.checkpoint.save_file", side_effect=full):
        write_models(place.folder / "model.safetensors", vae=vae)


@case(FILES, "a full disk while a run writes its numbers")
def _(place):
    from cellop_nb.notebook import runs

    def half(path, text, **_):
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    with mock.patch.object(Path, "write_text", half):
        runs.write_json(runs.metrics_file(place.folder, "02_train_vae"), {"val_elbo": 1.0})


@case(FILES, "a folder for checkpoints that is a file")
def _(place):
    folder = refuses(place, "results")
    co.VAETrainer(place.split, place.vae, max_epochs=1, folder=folder / "vae", progress=False).fit()


@case(FILES, "a read-only folder")
def _(place):
    vae = place.vae
    with mock.patch("os.replace", side_effect=PermissionError(13, "Permission denied")):
        write_models(place.folder / "model.safetensors", vae=vae)


@case(FILES, "a name that leads out of the run folder")
def _(place):
    co.results.folder(place.folder / "run", "../../elsewhere")
