"""Predictions of any number of cells, written to a file part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..data.contract import block_check, count_slot
from ..data.on_disk import RowReader, is_on_disk
from ..errors import DataError, check_settings, three_beats
from ..files import write_whole
from ..models.affine import AffineOperator
from ..models.operators import OperatorModel
from ..models.vae import NBVAE
from .predict import predict, source_cells


def predict_to_file(
    adata,
    vae: NBVAE,
    operators: OperatorModel | AffineOperator,
    *,
    path: str | Path,
    perturbation: str,
    context: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    use_rep: str = "X_nbvae",
    batch_size: int = 1024,
    seed: int = 0,
    **settings,
) -> Path:
    """Virtual cells as :func:`cellop_nb.predict` makes them, for more cells than fit in memory.

    Parameters
    ----------
    adata
        With latents (:func:`cellop_nb.embed`) and raw counts, in memory or on disk
        (``datasets.load(path, backed=True)``).
    vae, operators, perturbation, context
        As in :func:`cellop_nb.predict`.
    path
        The `.h5ad` to write: sampled counts in ``X`` (CSR), ``obs`` and moved latents in ``obsm[use_rep]``; expected
        counts, which are dense, are left out.
    batch_size
        Cells that are moved and decoded at a time.
    seed
        Seeds the sampled counts; every part has draws of its own, so that `batch_size` matters for them.
    **settings
        ``strength``, ``layer``, ``carry`` of :func:`cellop_nb.predict`.

    Returns
    -------
    The path; the file is whole or not there.

    Raises
    ------
    LabelError
        For an unknown context, perturbation or setting.
    DataError
        For a path that is no `.h5ad`.
    """
    if Path(path).suffix != ".h5ad":
        raise DataError(three_beats("the path of an .h5ad file", repr(str(path)), "end it in .h5ad"))
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    ours = ("adata", "vae", "operators", "context", "perturbation", "use_rep", "seed", "max_cells")
    check_settings(settings, predict, of="predict", taken=(*ours, *keys))
    source = source_cells(adata, context, **keys)
    starts = range(0, len(source), batch_size)
    part_of = _reader(adata, use_rep, settings.get("layer"))

    def parts():
        for start in tqdm(starts, desc=f"predicting {perturbation}", disable=len(starts) < 20):
            cells = part_of(source[start : start + batch_size])
            asked = {"perturbation": perturbation, "context": context, "use_rep": use_rep, **keys, **settings}
            yield predict(cells, vae, operators, seed=seed + start, **asked)

    return write_whole(path, lambda part: _write(part, parts(), use_rep))


def _reader(adata, use_rep: str, layer: str | None) -> Callable[[np.ndarray], ad.AnnData]:
    """What gives chosen cells in memory: their counts, labels and latents, and nothing else that is on disk."""
    slot, latents = count_slot(adata, layer), adata.obsm.get(use_rep)
    if not is_on_disk(slot):
        return lambda rows: adata[rows].to_memory()
    counts = RowReader(slot, check=block_check(adata, layer))

    def cells(rows: np.ndarray) -> ad.AnnData:
        x = counts.read(rows)
        slots = {"X": x} if layer is None else {"layers": {layer: x}}
        kept = {} if latents is None else {use_rep: latents[rows]}
        return ad.AnnData(obs=adata.obs.iloc[rows], var=adata.var, obsm=kept, **slots)

    return cells


def _write(path: Path, parts, use_rep: str) -> None:
    obs = []  # a few labels per cell: all that is kept
    with h5py.File(path, "w") as file:
        for number, cells in enumerate(parts):
            latents = np.asarray(cells.obsm[use_rep])
            if number == 0:
                # Rows are appended below; all else is written with the first part.
                ad.io.write_elem(file, "/", ad.AnnData(X=cells.X, var=cells.var, uns=cells.uns))
                growing = {"maxshape": (None, latents.shape[1])}
                ad.io.write_elem(file["obsm"], use_rep, latents, dataset_kwargs=growing)
            else:
                ad.io.sparse_dataset(file["X"]).append(cells.X)
                _append(file["obsm"][use_rep], latents)
            obs.append(cells.obs)
        ad.io.write_elem(file, "obs", pd.concat(obs))


def _append(stored: h5py.Dataset, rows: np.ndarray) -> None:
    stored.resize(len(stored) + len(rows), axis=0)
    stored[-len(rows) :] = rows
