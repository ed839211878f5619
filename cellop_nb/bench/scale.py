"""Data larger than memory: memory and speed of training, encoding and predicting from a file, by number of cells.

Bounds come from the same run: training in memory, reading the file once in order, products, and the file's bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from .measure import in_fresh_process, missing
from .scale_bounds import BATCH, CONTEXTS, HIDDEN, LATENT, OURS, PERTURBATIONS, WITHIN, bounded
from .scale_growth import growth
from .vae import PEER

CELLS, GENES = (10_000, 30_000, 100_000, 300_000, 1_000_000), 2_000
QUICK_CELLS, QUICK_GENES = (1_000, 2_000), 200
ZARR = 30_000
"""Cells at which the same training is measured from a zarr store too."""

IN_MEMORY = 100_000
"""Cells up to which the same training is measured in memory too, ours and the peer's."""

_CHUNK = 4_096
_LIMIT = 7_200.0  # seconds for one measurement


def write_screen(path: Path, n_cells: int, n_genes: int, *, nonzero: float = 0.10, seed: int = 0) -> Path:
    """A synthetic screen (Poisson counts, planted shifts), written part by part, never held as a whole.

    Parameters
    ----------
    path
        `.h5ad` or `.zarr`.
    nonzero
        About the share of non-zero counts.
    """
    import anndata as ad

    rng = np.random.default_rng(seed)
    level = rng.gamma(0.5, 1.0, n_genes) + 0.01
    level *= nonzero / (1 - np.exp(-level)).mean()
    shifts = np.exp(rng.normal(0, 0.5, (CONTEXTS, n_genes)))
    effects = np.exp(rng.normal(0, 0.3, (PERTURBATIONS, n_genes)) * (rng.uniform(size=n_genes) < 0.1))
    effects[0] = 1.0
    store, tables = _store(path), []
    for start in range(0, n_cells, _CHUNK):
        n = min(_CHUNK, n_cells - start)
        context, perturbation = rng.integers(CONTEXTS, size=n), rng.integers(PERTURBATIONS, size=n)
        mean = rng.gamma(4.0, 0.25, (n, 1)) * level * shifts[context] * effects[perturbation]
        x = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))  # type: ignore[attr-defined]
        if start:
            ad.io.sparse_dataset(store["X"]).append(x)
        else:
            var = pd.DataFrame(index=[f"gene {k}" for k in range(n_genes)])
            ad.io.write_elem(store, "/", ad.AnnData(x, var=var))
        tables.append(_labels(start, context, perturbation, rng))
    ad.io.write_elem(store, "obs", pd.concat(tables).astype("category"))
    return path


def _store(path: Path):
    import h5py
    import zarr

    return zarr.open_group(path, mode="w") if path.suffix == ".zarr" else h5py.File(path, "w")


def _labels(start: int, context: np.ndarray, perturbation: np.ndarray, rng) -> pd.DataFrame:
    names = np.array(["control", *(f"drug {k}" for k in range(1, PERTURBATIONS))])
    columns = {
        "perturbation": names[perturbation],
        "cell_type": np.array([f"type {k}" for k in range(CONTEXTS)])[context],
        "split": np.where(rng.uniform(size=len(context)) < 0.05, "val", "train"),
    }
    return pd.DataFrame(columns, index=[f"cell {start + k}" for k in range(len(context))])


# -- the measured calls, each made in a process of its own ---------------------------------------------------


def read(path: str) -> Callable[[], object]:
    """Every row of the counts once, in order: what any use of the file costs at least."""
    from ..data.catalogue import load
    from ..data.on_disk import RowReader

    def call():
        reader = RowReader(load(path, backed=True).X)
        for start in range(0, reader.shape[0], _CHUNK):
            reader.read(np.arange(start, min(start + _CHUNK, reader.shape[0])))

    return call


def names(path: str) -> Callable[[], object]:
    """The file opened: names and labels of all cells, which are held, and no counts."""
    from ..data.catalogue import load

    kept = []
    return lambda: kept.append(load(path, backed=True))


def peer(path: str) -> Callable[[], object]:
    """One epoch of SCVI with the same sizes, the file read into memory."""
    from ..data.catalogue import load
    from .vae import _peer_model, _peer_train

    def call():
        adata = load(path)
        _peer_train(_peer_model(adata, HIDDEN), adata, BATCH, 1, [])

    return call


def train(path: str, backed: bool = True) -> Callable[[], object]:
    """One epoch of the VAE, from opening the file to the saved model."""
    from ..data.catalogue import load
    from ..training.checkpoint import save
    from ..training.vae import VAETrainer, new_vae

    def call():
        adata = load(path, backed=backed)
        vae = new_vae(adata, n_latent=LATENT, n_hidden=HIDDEN)
        settings = {"batch_size": BATCH, "max_epochs": 1, "progress": False, "accelerator": "cpu"}
        VAETrainer(adata, vae, **settings).fit()
        save(_beside(path, "vae.safetensors"), vae)

    return call


def encode(path: str) -> Callable[[], object]:
    """Latents of every cell."""
    from ..analysis.predict import embed
    from ..data.catalogue import load
    from ..training.checkpoint import load as load_model

    def call():
        adata = load(path, backed=True)
        embed(adata, load_model(_beside(path, "vae.safetensors")).vae)
        np.save(_beside(path, "latents.npy"), adata.obsm["X_nbvae"])

    return call


def predict(path: str) -> Callable[[], object]:
    """Operators fitted for an epoch, and every control cell moved and decoded into a file."""
    from ..analysis.streaming import predict_to_file
    from ..data.catalogue import load
    from ..training.checkpoint import load as load_model
    from ..training.operators import OperatorTrainer, new_operators

    def call():
        adata = load(path, backed=True)
        vae = load_model(_beside(path, "vae.safetensors")).vae
        adata.obsm["X_nbvae"] = np.load(_beside(path, "latents.npy"), allow_pickle=False)
        operators = new_operators(adata)
        OperatorTrainer(adata, operators, max_epochs=1, progress=False, accelerator="cpu").fit()
        predict_to_file(
            adata,
            vae,
            operators,
            path=_beside(path, "predicted.h5ad"),
            perturbation="drug 1",
            context="type 0",
        )

    return call


def _beside(path: str, name: str) -> Path:
    return Path(path).with_name(name)


def _write(path: str, n_cells: int, n_genes: int) -> Callable[[], object]:
    return lambda: write_screen(Path(path), n_cells, n_genes)


# -- the rows --------------------------------------------------------------------------------------------------


def run(quick: bool = False, peers: bool = True) -> list[dict]:
    """Measure all sizes, each stage in a process of its own.

    Returns
    -------
    One row per number of cells and stage: variant, stage, file, cells, genes, stage_seconds, cells_per_cpu_s, extra_mb
    (peak above importing), and for ours bound_seconds, bound, distance and between. "names" opens the file, "read" is
    one pass over it in order. The last rows tell how each stage grows: time_exponent (slope of CPU seconds against cells,
    both as logarithms) and bytes_per_cell (slope of extra memory).
    """
    sizes, n_genes = (QUICK_CELLS, QUICK_GENES) if quick else (CELLS, GENES)
    in_memory, zarr = (sizes[0], sizes[0]) if quick else (IN_MEMORY, ZARR)
    rows = []
    for n_cells in sizes:
        stages: list[tuple[str, str, dict]] = [
            (OURS, stage, {}) for stage in ("names", "read", "train", "encode", "predict")
        ]
        if n_cells <= in_memory:
            stages.append((WITHIN, "train", {"backed": False}))
            stages.append((PEER, "peer", {}))
        rows += _measure(n_cells, n_genes, "h5ad", stages, peers)
        if n_cells == zarr:
            rows += _measure(n_cells, n_genes, "zarr", [(OURS, "read", {}), (OURS, "train", {})], peers)
    return bounded(rows) + growth(rows)


def _measure(n_cells: int, n_genes: int, form: str, stages: list, peers: bool) -> list[dict]:
    with tempfile.TemporaryDirectory(prefix="cellop-scale-") as folder:
        path = str(Path(folder) / f"screen.{form}")
        written = {"path": path, "n_cells": n_cells, "n_genes": n_genes}
        done = in_fresh_process(__name__, "_write", written, _LIMIT)
        if done.get("note"):
            return [_row(OURS, "write", n_cells, n_genes, form, done)]
        rows, size = [], sum(part.stat().st_size for part in _files(Path(path))) / 1e6
        for variant, stage, more in stages:
            note = missing("scvi", wanted=peers) if stage == "peer" else None
            done = (
                {"note": note} if note else in_fresh_process(__name__, stage, {"path": path} | more, _LIMIT)
            )
            name = "train" if stage == "peer" else stage
            rows.append(_row(variant, name, n_cells, n_genes, form, done))
            rows[-1]["file_mb"] = size
        return rows


def _files(path: Path) -> list[Path]:
    return [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]


def _row(variant: str, stage: str, n_cells: int, n_genes: int, form: str, done: dict) -> dict:
    row = {"variant": variant, "stage": stage, "file": form, "cells": n_cells, "genes": n_genes}
    if done.get("note"):
        return row | {"note": done["note"]}
    per_cell = {"stage_seconds": done["seconds"], "cells_per_cpu_s": n_cells / done["cpu_seconds"]}
    return row | {"note": None, "extra_mb": done["extra_mb"]} | per_cell
