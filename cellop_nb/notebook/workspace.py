"""What the numbered notebooks share: one prepared screen, the models made so far, and where results are written.

A run folder holds one folder per notebook. A notebook takes what the ones before it left there, when it was made
from the same data and parameters; otherwise it makes a stand-in itself, so that each notebook also runs alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import anndata as ad
import pandas as pd

from ..analysis.predict import embed
from ..data import catalogue
from ..data.checks import check as check_screen
from ..data.splits import split
from ..errors import CellopError, three_beats
from ..training.checkpoint import load, save
from ..training.operators import OperatorTrainer, new_operators
from ..training.vae import VAETrainer, new_vae
from . import batch, parameters
from .figures.style import show


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
    """

    def __init__(self, notebook: str, run_dir: str | Path = ".", **values):
        self.notebook, self.run_dir = notebook, Path(run_dir)
        self.folder = self.run_dir / notebook
        self.values = values
        self.keys = {name: values[name] for name in ("perturbation_key", "context_key", "control") if name in values}
        self.at_defaults = values == {
            name: value for name, value in parameters.defaults(notebook).items() if name in values
        }

    # -- what comes in ----------------------------------------------------------------------------------------

    def screen(self) -> ad.AnnData:
        """The checked screen with its variable genes and its split into train, val and test."""
        source = self._source()
        path = self.run_dir / "01_data" / "screen.h5ad"
        if path.is_file():
            adata = ad.read_h5ad(path)
            if adata.uns["cellop_nb"].get("source") == source:
                return adata
        adata = self._prepare()
        adata.uns["cellop_nb"]["source"] = source
        return adata

    def vae(self, adata: ad.AnnData):
        """The VAE of 02_train_vae, or a stand-in trained here; writes ``obsm["X_nbvae"]``."""
        model = self._load("02_train_vae", adata, "vae")
        if model is None:
            model = new_vae(adata, layer=self.layer, n_latent=32, n_hidden=128, seed=self.seed)
            VAETrainer(adata, model, layer=self.layer, max_epochs=40, lr=2e-3, seed=self.seed).fit()
        embed(adata, model, layer=self.layer)
        return model

    def operators(self, adata: ad.AnnData):
        """The operators of 04_train_operators, or a stand-in trained here on ``obsm["X_nbvae"]``."""
        model = self._load("04_train_operators", adata, "operators")
        if model is None:
            model = new_operators(adata, **self.keys)
            OperatorTrainer(adata, model, seed=self.seed, **self.keys).fit()
        return model

    @property
    def layer(self) -> str | None:
        return self.values.get("layer")

    @property
    def seed(self) -> int:
        return self.values.get("seed", 0)

    def _source(self) -> str:
        names = ("data", "layer", "perturbation_key", "context_key", "control", "n_genes", "seed")
        return json.dumps({name: self.values.get(name) for name in names}, default=str, sort_keys=True)

    def _prepare(self) -> ad.AnnData:
        from ..data.contract import select_genes

        adata = catalogue.load(self.values["data"], **self.keys)
        check_screen(adata, layer=self.layer, **self.keys)
        split(adata, seed=self.seed, **self.keys)
        n_genes = self.values.get("n_genes", 0)
        if 0 < n_genes < adata.n_vars:
            adata = adata[:, select_genes(adata, n_genes, layer=self.layer)].copy()
        return adata

    def _load(self, notebook: str, adata: ad.AnnData, part: str):
        """A model that an earlier notebook left, when it was made from this very screen."""
        folder = self.run_dir / notebook / "model"
        if not folder.is_dir():
            return None
        stored = load(folder)
        if stored.extra.get("source") != adata.uns["cellop_nb"]["source"]:
            return None
        return getattr(stored, part)

    # -- what goes out ----------------------------------------------------------------------------------------

    def keep_screen(self, adata: ad.AnnData) -> Path:
        """Write the prepared screen for the notebooks that follow."""
        return self._write("screen.h5ad", adata.write_h5ad)

    def keep_model(self, adata: ad.AnnData, **models) -> Path:
        """Write trained models for the notebooks that follow."""
        path = self.folder / "model"
        save(path, **models, extra={"source": adata.uns["cellop_nb"]["source"]})
        return path

    def figure(self, figure, name: str):
        """Write the figure as PNG and show it."""
        path = self.folder / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        return show(figure, path)

    def table(self, table: pd.DataFrame, name: str) -> Path:
        """Write a table as CSV."""
        return self._write(f"{name}.csv", lambda path: table.to_csv(path, index=False))

    def metrics(self, **numbers) -> Path:
        """Write the notebook's key numbers, its parameters beside them."""
        return batch.write_metrics(self.run_dir, self.notebook, {**numbers, "parameters": self.values})

    def _write(self, name: str, writer) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, temporary = self.folder / name, self.folder / f".{os.getpid()}.{name}"
        try:
            writer(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    # -- what must hold ---------------------------------------------------------------------------------------

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
            raise CheckFailed(three_beats(wanted, f"{value:.4g}", "find out what changed since this was written"))
        return f"as expected: {name}"


class CheckFailed(CellopError):
    """A number of a notebook left the bounds it was shown with."""
