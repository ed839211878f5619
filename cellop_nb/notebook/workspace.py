"""What the numbered notebooks share: one prepared screen, the models made so far, a place for results.

A run folder holds one folder per notebook. A notebook takes what the ones before it left there, when it was
made from the same data and parameters; otherwise it makes a stand-in itself, so that it also runs alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import pandas as pd
import torch

from ..analysis.predict import embed
from ..data import datasets
from ..data.contract import library_size
from ..data.contract import setup as check_screen
from ..data.counts import TOTAL_KEY
from ..data.genes import select_genes
from ..data.splits import split
from ..errors import CellopError, CheckpointError, three_beats
from ..files import inside, write_whole
from ..models.operators import OperatorModel
from ..models.vae import NBVAE
from ..training.checkpoint import read_models, write_models
from ..training.operators import OperatorTrainer, Penalties, new_operators
from ..training.vae import VAETrainer, new_vae
from . import parameters, runs
from .style import shown

_SCREEN = ("data", "layer", "perturbation_key", "context_key", "control", "n_genes", "seed")
_VAE, _OPERATORS, _MODEL = "02_train_vae", "04_train_operators", "model.safetensors"


class Workspace:
    """The run folder as one notebook sees it.

    Parameters
    ----------
    notebook
        Name of the notebook, ``"02_train_vae"``; its results go to the folder of that name.
    run_dir
        Run folder, shared by the notebooks of one run.
    **values
        The notebook's parameters: ``data``, the keys, ``n_genes``, ``seed`` and its own.

    Attributes
    ----------
    keys
        ``perturbation_key``, ``context_key`` and ``control``, ready to be passed on as keywords.
    origin
        Where each input came from, in words: ``{"screen": ..., "vae": ..., "operators": ...}``.
    """

    def __init__(self, notebook: str, run_dir: str | Path = ".", **values):
        self.notebook, self.run_dir = notebook, Path(run_dir)
        self.folder = self.run_dir / notebook
        self.values = values
        self.keys = {
            name: values[name] for name in ("perturbation_key", "context_key", "control") if name in values
        }
        self.at_defaults = values == {
            name: value for name, value in parameters.defaults(notebook).items() if name in values
        }
        self.origin: dict[str, str] = {}

    @classmethod
    def from_cell(cls, notebook: str, namespace: Mapping[str, object]) -> Workspace:
        """The workspace of a notebook whose parameters are variables: ``from_cell("01_data", globals())``."""
        return cls(notebook, **{name: namespace[name] for name in parameters.defaults(notebook)})

    def __repr__(self) -> str:
        return f"Workspace({self.notebook} in {self.run_dir})"

    # -- what comes in

    def screen(self) -> ad.AnnData:
        """The checked screen with its variable genes and its split into train, val and test."""
        source, path = self._source(), self.run_dir / "01_data" / "screen.h5ad"
        if path.is_file():
            adata = ad.read_h5ad(path)
            if adata.uns["cellop_nb"].get("screen") == source:
                self.origin["screen"] = "01_data"
                return adata
        adata = self._prepare()
        adata.uns["cellop_nb"]["screen"] = source
        self.origin["screen"] = "prepared here"
        return adata

    def vae(self, adata: ad.AnnData) -> NBVAE:
        """The VAE of 02_train_vae, or a stand-in trained here as there; writes ``obsm["X_nbvae"]``."""
        model = self._load(_VAE, "vae", {"screen": adata.uns["cellop_nb"]["screen"]})
        if model is None:
            given = parameters.defaults(_VAE)
            model = new_vae(adata, seed=self.seed, **vae_sizes(given))
            VAETrainer(adata, model, **self.vae_settings(given)).fit()
        embed(adata, model)
        adata.uns["cellop_nb"]["vae"] = fingerprint(model)
        return model

    def operators(self, adata: ad.AnnData) -> OperatorModel:
        """The operators of 04_train_operators, or a stand-in; :meth:`vae` comes first."""
        made = adata.uns["cellop_nb"]
        model = self._load(_OPERATORS, "operators", {name: made[name] for name in ("screen", "vae")})
        if model is None:
            given = parameters.defaults(_OPERATORS)
            sizes = {"n_axes": given["n_axes"], "rank": given["rank"]}
            model = new_operators(adata, **sizes)
            OperatorTrainer(adata, model, **self.operator_settings(given)).fit()
        return model

    def vae_settings(self, values: Mapping | None = None) -> dict:
        """Keywords of :class:`VAETrainer` from the parameters of 02_train_vae."""
        values = self.values if values is None else values
        return {
            "max_epochs": values["max_epochs"],
            "batch_size": values["batch_size"],
            "lr": values["learning_rate"],
            "kl_weight": values["kl_weight"],
            "seed": self.seed,
            "progress": False,
        }

    def operator_settings(self, values: Mapping | None = None) -> dict:
        """Keywords of :class:`OperatorTrainer` from the parameters of 04_train_operators."""
        values = self.values if values is None else values
        penalties = Penalties(
            ridge=values["ridge"], stability_weight=values["stability_weight"], max_norm=values["max_norm"]
        )
        return {
            "max_epochs": values["max_epochs"],
            "cells_per_group": values["cells_per_group"],
            "penalties": penalties,
            "lr": values["learning_rate"],
            "seed": self.seed,
            "progress": False,
        }

    @property
    def layer(self) -> str | None:
        return self.values.get("layer")

    @property
    def seed(self) -> int:
        return self.values.get("seed", 0)

    def _source(self) -> str:
        """What the prepared screen depends on, as text; a file by its size and time too."""
        made = {name: self.values.get(name) for name in _SCREEN}
        path = Path(str(made["data"]))
        if path.is_file():
            made["data"] = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        return json.dumps(made, sort_keys=True)

    def _prepare(self) -> ad.AnnData:
        adata = datasets.load(self.values["data"])
        check_screen(adata, layer=self.layer, **self.keys)
        split(adata, seed=self.seed, **self.keys)
        n_genes = self.values.get("n_genes", 0)
        if 0 < n_genes < adata.n_vars:
            adata.obs[TOTAL_KEY] = library_size(adata, layer=self.layer)
            adata = adata[:, select_genes(adata, n_genes, layer=self.layer)].copy()
        return adata

    def _load(self, notebook: str, part: str, made: Mapping[str, str]):
        """A model that an earlier notebook left, when it was made from this very input; else None."""
        try:
            stored = read_models(self.run_dir / notebook / _MODEL)
        except CheckpointError:
            stored = None
        fits = stored is not None and stored.summary == made
        self.origin[part] = notebook if fits else "a stand-in trained here"
        return getattr(stored, part) if fits else None

    # -- what goes out

    def keep_screen(self, adata: ad.AnnData) -> Path:
        """Write the prepared screen for the notebooks that follow."""
        return self._write("screen.h5ad", adata.write_h5ad)

    def keep_model(self, adata: ad.AnnData, **models) -> Path:
        """Write trained models for the notebooks that follow, with what they were made from."""
        inputs = ("screen", "vae") if "operators" in models else ("screen",)
        made = {name: adata.uns["cellop_nb"][name] for name in inputs}
        return write_models(
            self.folder / _MODEL, **models, keys={"layer": self.layer, **self.keys}, summary=made
        )

    def figure(self, figure, name: str):
        """Write the figure as PNG and show it."""
        return shown(figure, inside(self.folder / "figures", f"{name}.png"))

    def picture(self, image, name: str):
        """Write an `IPython.display.Image` of PNG and show it."""
        path = inside(self.folder / "figures", f"{name}.png")
        write_whole(path, lambda part: part.write_bytes(image.data))
        return image

    def table(self, table: pd.DataFrame, name: str) -> Path:
        """Write a table as CSV."""
        return self._write(f"{name}.csv", lambda path: table.to_csv(path, index=False))

    def metrics(self, **numbers) -> Path:
        """Write the notebook's key numbers, and beside them its parameters and where its inputs came from."""
        content = {**numbers, "inputs": self.origin, "parameters": self.values}
        return runs.write_metrics(self.run_dir, self.notebook, content)

    def _write(self, name: str, writer) -> Path:
        return write_whole(inside(self.folder, name), writer)

    # -- what must hold

    def check(
        self,
        name: str,
        value: float,
        *,
        expected: float | None = None,
        rtol: float = 0.1,
        at_least: float = float("-inf"),
        at_most: float = float("inf"),
    ) -> str:
        """Compare a result with what it must be at the notebook's defaults; raise where it is not.

        The text that is returned does not depend on the number, so that executed notebooks can be compared.
        With other parameters nothing is known about the value, and nothing is claimed.

        Raises
        ------
        CheckFailed
            When the value lies outside its bounds.
        """
        if not self.at_defaults:
            return f"not checked, since parameters differ from the defaults: {name}"
        if expected is not None:
            margin = rtol * abs(expected)
            at_least, at_most = expected - margin, expected + margin
        if not at_least <= value <= at_most:
            wanted = f"{name} between {at_least:.4g} and {at_most:.4g}"
            fix = "find out what changed since this was written"
            raise CheckFailed(three_beats(wanted, f"{value:.4g}", fix))
        return f"as expected: {name}"


def vae_sizes(values: Mapping) -> dict[str, int]:
    """Sizes of :class:`NBVAE` from the parameters of 02_train_vae."""
    return {
        "n_latent": values["latent_dim"],
        "n_hidden": values["hidden"],
        "n_layers": values["n_layers"],
    }


def fingerprint(model: torch.nn.Module) -> str:
    """Digest of a model's weights: operators belong to the latents of one VAE and no other."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class CheckFailed(CellopError):
    """A number of a notebook left the bounds it was shown with."""
