"""The AnnData contract: where counts and labels live, and the gate that checks both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from ..errors import DataError, LabelError, three_beats
from .checks import check_counts, check_labels
from .slots import (
    context_labels,
    count_blocks,
    count_slot,
    counts,
    library_size,
    obs_labels,
    perturbation_parts,
)

__all__ = [
    "check",
    "context_labels",
    "count_blocks",
    "count_slot",
    "counts",
    "library_size",
    "obs_labels",
    "perturbation_parts",
]


def check(
    adata: AnnData,
    *,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    min_cells: int = 10,
) -> pd.DataFrame:
    """Check that a screen is fit for use, and say how many cells each group has.

    Parameters
    ----------
    layer
        Layer of raw counts; None for `X`. Sparse, dense or backed on disk (then read in blocks).
    min_cells
        Groups under this size are marked in the column `note`.

    Returns
    -------
    DataFrame
        One row per (context, perturbation): `context`, `perturbation`, `cells`, `counts_per_cell` (median),
        `note`. Nothing is written to `adata`.

    Raises
    ------
    DataError
        If there are no cells or genes, names repeat, or the matrix does not hold raw counts.
    LabelError
        If a column, the control label or a context's controls are missing, or labels are malformed.
    """
    _check_names(adata)
    labels = pd.DataFrame(
        {
            "context": context_labels(adata, context_key).to_numpy(),
            "perturbation": obs_labels(adata, perturbation_key).to_numpy(),
        }
    )
    if perturbation_key in ([context_key] if isinstance(context_key, str) else context_key or ()):
        fix = "name the column of cell types, or pass context_key=None"
        raise LabelError(three_beats("different columns", f"{perturbation_key!r} as both keys", fix))
    check_labels(labels, perturbation_key, control)
    labels["counts_per_cell"] = check_counts(adata, layer)
    groups = labels.groupby(["context", "perturbation"])["counts_per_cell"]
    table = groups.agg(cells="size", counts_per_cell="median").reset_index()
    lone = table[table["cells"] < 2]
    if len(lone):
        found = (
            f"{len(lone)} with one, such as {lone.iloc[0]['perturbation']!r} in {lone.iloc[0]['context']!r}"
        )
        raise LabelError(three_beats("at least 2 cells in every group", found, "drop or merge these groups"))
    small = f"fewer than {min_cells} cells"
    return table.assign(note=np.where(table["cells"] < min_cells, small, ""))


def _check_names(adata: AnnData) -> None:
    """Refuse what is no AnnData, empty, or has repeated cell or gene names."""
    if not isinstance(adata, AnnData):
        fix = "read the file first, with anndata.read_h5ad or cellop_nb.datasets.load"
        raise DataError(three_beats("an AnnData object", f"a {type(adata).__name__}", fix))
    if not adata.n_obs or not adata.n_vars:
        found = f"{adata.n_obs} cells and {adata.n_vars} genes"
        raise DataError(three_beats("cells and genes", found, "check the filter that made this object"))
    for what, names in {"obs": adata.obs_names, "var": adata.var_names}.items():
        if not names.is_unique:
            repeated = names[names.duplicated()]
            found = f"{len(repeated)} repeated in {what}_names, such as {repeated[0]!r}"
            raise DataError(three_beats("unique names", found, f"run adata.{what}_names_make_unique()"))
