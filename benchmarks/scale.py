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

from .measure import bandwidth, in_fresh_process, missing, product_rate
from .vae import PEER, step_bounds

OURS, WITHIN = "cellop_nb", "cellop_nb, all in memory"
HIDDEN, LATENT, BATCH = 128, 32, 256
CONTEXTS, PERTURBATIONS = 4, 4
_MORE = "{over:.2f} CPU s more"
BETWEEN = {
    "read": f"{_MORE}, for chunks taken out of the file (in zarr out of their compression), copied into CSR matrices",
    "train": f"{_MORE} than in memory, where a pass over the file takes {{reading:.2f}}: starting values, library sizes "
    "and constants are a pass each, and every window of the shuffle is put together from blocks",
    "encode": f"{_MORE}, for names and labels, the check of the values, logarithms of the non-zeros, and a first layer "
    "whose rows are gathered one by one",
    "predict": f"{_MORE}, for names and labels, noise floors and starts of the operators, an epoch of theirs, sampled "
    "counts and writing them; reading takes {reading:.2f}",
    WITHIN: f"{_MORE}, for reading and checking the file, starting values and constants, and in each step what "
    "`bench vae` tells",
}


def bounded(rows: list[dict]) -> list[dict]:
    """The rows, ours with their bound; CPU seconds."""
    found = {
        (row["variant"], row["stage"], row["file"], row["cells"]): row for row in rows if "extra_mb" in row
    }
    most = max((row["cells"] for row in rows if row["variant"] == WITHIN and "extra_mb" in row), default=None)
    memory = found.get((WITHIN, "train", "h5ad", most))
    for row in found.values():
        once = found.get((OURS, "read", row["file"], row["cells"]))
        if row["variant"] == PEER or row["stage"] == "names" or once is None:
            continue
        reading, kind = _seconds(once), WITHIN if row["variant"] == WITHIN else row["stage"]
        bound = _bound(kind, row, reading, memory)
        if bound is None:
            continue
        cpu = _seconds(row)
        row |= {"bound": bound[0], "bound_seconds": bound[1], "distance": cpu / bound[1]}
        if row["distance"] > 2:
            row["between"] = BETWEEN[kind].format(reading=reading, over=cpu - bound[1])
    return rows


def _seconds(row: dict) -> float:
    return row["cells"] / row["cells_per_cpu_s"]


def _bound(kind: str, row: dict, reading: float, memory: dict | None) -> tuple[str, float] | None:
    """What bounds a row, and its CPU seconds; `reading` is those of a pass over its file."""
    cells, genes = row["cells"], row["genes"]
    if kind == "read":
        return "the file's bytes, copied once", row["file_mb"] * 1e6 / (bandwidth() / 2)
    if kind == "train":
        return None if memory is None else ("training in memory", cells / memory["cells_per_cpu_s"])
    if kind == "encode":
        return "reading the file once, encoder's products", reading + _encoding(row)
    if kind == "predict":
        # Every 16th cell is a control of the context: its neighbours are read too.
        return "reading the file once, decoder's products", reading + _decoding(cells, genes)
    return "products", cells / BATCH * step_bounds(HIDDEN, BATCH, genes)["products"]


def _encoding(row: dict) -> float:
    """CPU seconds of the products of the first layer at the non-zeros, which the share of them in the file counts."""
    nonzeros = row["file_mb"] * 1e6 / 8  # a value and a gene each take four bytes
    return 2.0 * nonzeros * (HIDDEN + LATENT) / product_rate(BATCH, HIDDEN, row["genes"])


def _decoding(cells: int, genes: int) -> float:
    """CPU seconds of the products that decode the predicted cells, before and after their move."""
    moved = cells / (CONTEXTS * PERTURBATIONS)
    return 2 * moved * 2.0 * genes * (HIDDEN + LATENT) / product_rate(1024, HIDDEN, genes)


CELLS, GENES = (10_000, 30_000, 100_000, 300_000, 1_000_000), 2_000
QUICK_CELLS, QUICK_GENES = (1_000, 2_000), 200
ZARR = 30_000
"""Cells at which the same training is measured from a zarr store too."""

IN_MEMORY = 100_000
"""Cells up to which the same training is measured in memory too, ours and the peer's."""

_CHUNK = 4_096
_LIMIT = 7_200.0  # seconds for one measurement


def write_screen(
    path: Path,
    n_cells: int,
    n_genes: int,
    *,
    nonzero: float = 0.10,
    contexts: int = CONTEXTS,
    perturbations: int = PERTURBATIONS,
    measured: int | None = None,
    controls: float = 0.0,
    seed: int = 0,
) -> Path:
    """A synthetic screen (Poisson counts, planted shifts), written part by part, never held as a whole.

    Parameters
    ----------
    path
        `.h5ad` or `.zarr`.
    nonzero
        About the share of non-zero counts.
    contexts, perturbations, measured
        How many; only the first `measured` contexts got perturbations, the others are controls. The control counts
        as a perturbation.
    controls
        Share of the cells that are controls beyond their turn.
    """
    import anndata as ad

    from cellop_nb.data.contract import Keys

    rng = np.random.default_rng(seed)
    level = rng.gamma(0.5, 1.0, n_genes) + 0.01
    level *= nonzero / (1 - np.exp(-level)).mean()
    shifts = np.exp(rng.normal(0, 0.5, (contexts, n_genes)))
    effects = np.exp(rng.normal(0, 0.3, (perturbations, n_genes)) * (rng.uniform(size=n_genes) < 0.1))
    effects[0] = 1.0
    store, tables = _store(path), []
    for start in range(0, n_cells, _CHUNK):
        n = min(_CHUNK, n_cells - start)
        context, perturbation = rng.integers(contexts, size=n), rng.integers(perturbations, size=n)
        if controls:
            perturbation[rng.uniform(size=n) < controls] = 0
        if measured is not None:
            perturbation[context >= measured] = 0
        mean = rng.gamma(4.0, 0.25, (n, 1)) * level * shifts[context] * effects[perturbation]
        x = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))  # type: ignore[attr-defined]
        if start:
            ad.io.sparse_dataset(store["X"]).append(x)
        else:
            var = pd.DataFrame(index=[f"gene {k}" for k in range(n_genes)])
            first = ad.AnnData(x, var=var)
            Keys().write(first)
            ad.io.write_elem(store, "/", first)
        tables.append(_labels(start, context, perturbation, rng))
    ad.io.write_elem(store, "obs", pd.concat(tables).astype("category"))
    return path


def _store(path: Path):
    import h5py
    import zarr

    return zarr.open_group(path, mode="w") if path.suffix == ".zarr" else h5py.File(path, "w")


def _labels(start: int, context: np.ndarray, perturbation: np.ndarray, rng) -> pd.DataFrame:
    columns = {
        "perturbation": ["control" if k == 0 else f"drug {k}" for k in perturbation],
        "cell_type": [f"type {k}" for k in context],
        "split": np.where(rng.uniform(size=len(context)) < 0.05, "val", "train"),
    }
    return pd.DataFrame(columns, index=[f"cell {start + k}" for k in range(len(context))])


# -- the measured calls, each made in a process of its own ---------------------------------------------------


def read(path: str) -> Callable[[], object]:
    """Every row of the counts once, in order: what any use of the file costs at least."""
    from cellop_nb.data.datasets import load
    from cellop_nb.data.on_disk import RowReader

    def call():
        reader = RowReader(load(path, backed=True).X)
        for start in range(0, reader.shape[0], _CHUNK):
            reader.read(np.arange(start, min(start + _CHUNK, reader.shape[0])))

    return call


def names(path: str) -> Callable[[], object]:
    """The file opened: names and labels of all cells, which are held, and no counts."""
    from cellop_nb.data.datasets import load

    kept = []
    return lambda: kept.append(load(path, backed=True))


def peer(path: str) -> Callable[[], object]:
    """One epoch of SCVI with the same sizes, the file read into memory."""
    from cellop_nb.data.datasets import load

    from .vae import _peer_model, _peer_train

    def call():
        adata = load(path)
        _peer_train(_peer_model(adata, HIDDEN), adata, BATCH, 1, [])

    return call


def train(path: str, backed: bool = True) -> Callable[[], object]:
    """One epoch of the VAE, from opening the file to the saved model."""
    from cellop_nb.data.datasets import load
    from cellop_nb.training.checkpoint import write_models
    from cellop_nb.training.loop import Machine
    from cellop_nb.training.vae import VAETrainer, new_vae

    def call():
        adata = load(path, backed=backed)
        vae = new_vae(adata, n_latent=LATENT, n_hidden=HIDDEN)
        settings = {"batch_size": BATCH, "max_epochs": 1, "progress": False}
        VAETrainer(adata, vae, machine=Machine(accelerator="cpu"), **settings).fit()
        write_models(_beside(path, "vae.safetensors"), vae)

    return call


def encode(path: str) -> Callable[[], object]:
    """Latents of every cell."""
    from cellop_nb.analysis.predict import embed
    from cellop_nb.data.datasets import load
    from cellop_nb.training.checkpoint import read_models as load_model

    def call():
        adata = load(path, backed=True)
        embed(adata, load_model(_beside(path, "vae.safetensors")).vae)
        np.save(_beside(path, "latents.npy"), adata.obsm["X_nbvae"])

    return call


def predict(path: str) -> Callable[[], object]:
    """Operators fitted for an epoch, and every control cell moved and decoded into a file."""
    from cellop_nb.analysis.predict import Start, assemble, modelled_counts, write_parts
    from cellop_nb.data.contract import keys_of
    from cellop_nb.data.datasets import load
    from cellop_nb.data.groups import controls_by_context
    from cellop_nb.models.operators import Condition
    from cellop_nb.training.checkpoint import read_models as load_model
    from cellop_nb.training.loop import Machine
    from cellop_nb.training.operators import OperatorTrainer, new_operators

    def call():
        adata = load(path, backed=True)
        vae, keys = load_model(_beside(path, "vae.safetensors")).vae, keys_of(adata)
        adata.obsm["X_nbvae"] = np.load(_beside(path, "latents.npy"), allow_pickle=False)
        operators = new_operators(adata)
        OperatorTrainer(
            adata, operators, max_epochs=1, progress=False, machine=Machine(accelerator="cpu")
        ).fit()
        operator = operators.operator(Condition(("drug 1",), "type 0"))
        rows = np.sort(controls_by_context(adata, keys)["type 0"])
        chunks = np.split(rows, range(1024, len(rows), 1024))

        def parts():
            for chunk in chunks:
                drawn = Start.of(modelled_counts(adata[chunk], vae, keys), vae).moved(operator)
                yield assemble(adata[chunk], keys, vae.genes, drawn, "drug 1")

        write_parts(_beside(path, "predicted.h5ad"), parts(), {}, total=len(chunks))

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


def growth(rows: list[dict]) -> list[dict]:
    """One row per variant, stage and file measured at several numbers of cells.

    Returns
    -------
    Rows with ``time_exponent``, the slope of the logarithm of CPU seconds against that of cells (1: linear), and
    ``bytes_per_cell``, the slope of extra memory; both over all sizes, by least squares. The note says what of that
    are names and labels of the cells, and latents, which are held whole.
    """
    series: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get("cells_per_cpu_s"):
            series.setdefault((row["variant"], row["stage"], row["file"]), []).append(row)
    rows = [_slopes(key, points) for key, points in series.items() if len(points) > 1]
    names = next((row["bytes_per_cell"] for row in rows if row["stage"] == "names"), None)
    return [row | {"note": _held(row, names)} for row in rows]


def _held(row: dict, names: float | None) -> str | None:
    """What a stage of ours that reads from the file holds of every cell."""
    if row["variant"] != OURS or row["stage"] == "names" or names is None:
        return None
    copies = {"encode": 1, "predict": 2}.get(row["stage"], 0)  # the operators' groups hold them once more
    latents = f", {4 * LATENT * copies} latents" if copies else ""
    return f"of these bytes {names:.0f} names and labels{latents}"


def _slopes(key: tuple, points: list[dict]) -> dict:
    cells = np.array([row["cells"] for row in points], dtype=float)
    seconds = cells / [row["cells_per_cpu_s"] for row in points]
    memory = 1e6 * np.array([row["extra_mb"] for row in points])
    row = dict(zip(("variant", "stage", "file"), key, strict=True))
    row["what"] = f"growth from {cells.min():,.0f} to {cells.max():,.0f} cells"
    row["time_exponent"] = float(np.polyfit(np.log(cells), np.log(seconds), 1)[0])
    return row | {"bytes_per_cell": float(np.polyfit(cells, memory, 1)[0]), "note": None}
