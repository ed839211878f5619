"""Where counts and labels live in an AnnData object, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ..errors import DataError, LabelError, did_you_mean, three_beats
from .stored import StoredRows, is_stored_by_cells

JOINER = " | "
EVERYWHERE = "all"


def count_slot(adata: AnnData, layer: str | None = None):
    """The matrix of counts as it is stored, (cell, gene): sparse, dense or backed on disk.

    Raises
    ------
    DataError
        If the layer does not exist, or `X` is empty.
    """
    if layer is None:
        if adata.X is None:
            raise DataError(three_beats("raw counts in X", "X is empty", "name the layer that holds them"))
        return adata.X
    if layer not in adata.layers:
        known = did_you_mean(layer, adata.layers)
        raise DataError(
            three_beats(f"a layer {layer!r}", "no such layer", f"pass layer=None for X ({known})")
        )
    return adata.layers[layer]


def counts(adata: AnnData, layer: str | None = None) -> sparse.csr_matrix | np.ndarray:
    """Raw counts in memory, (cell, gene): CSR where they are sparse, an array where they are dense."""
    slot = count_slot(adata, layer)
    if hasattr(slot, "to_memory"):
        slot = slot.to_memory()
    if sparse.issparse(slot):
        return slot.tocsr()
    return np.asarray(slot[...])


def count_blocks(adata: AnnData, layer: str | None = None, size: int = 4096) -> Iterator[tuple[int, Any]]:
    """Counts in blocks of cells: (first row, CSR or array of (at most `size`, gene))."""
    slot = count_slot(adata, layer)
    if sparse.issparse(slot):
        slot = slot.tocsr()
    stored = StoredRows(slot) if is_stored_by_cells(slot) else None
    for start in range(0, adata.n_obs, size):
        end = min(start + size, adata.n_obs)
        block = slot[start:end] if stored is None else stored.read(np.array([start]), np.array([end]))
        yield start, block.tocsr() if sparse.issparse(block) else np.asarray(block)


def library_size(adata: AnnData, layer: str | None = None) -> np.ndarray:
    """Counts per cell summed over the genes, (cell,) float64."""
    sums = [np.asarray(block.sum(axis=1), dtype=float).ravel() for _, block in count_blocks(adata, layer)]
    return np.concatenate(sums) if sums else np.zeros(0)


def obs_labels(adata: AnnData, key: str) -> pd.Series:
    """Column `key` of `obs` as strings, (cell,).

    Raises
    ------
    LabelError
        If the column does not exist, or some cells have no label.
    """
    if key not in adata.obs:
        known = did_you_mean(key, adata.obs.columns)
        raise LabelError(
            three_beats(f"a column {key!r} in obs", "no such column", f"name the right one ({known})")
        )
    column = adata.obs[key]
    missing = column.isna()
    if missing.any():
        first = list(adata.obs_names[missing][:3])
        found = f"{int(missing.sum())} cells without one, such as {first}"
        raise LabelError(
            three_beats(f"a label in obs[{key!r}] for every cell", found, "label or drop these cells")
        )
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return column.astype(str)
    # One string per category: pandas would make one for every cell.
    names = column.cat.categories.astype(str).to_numpy(dtype=object)
    return pd.Series(names[column.cat.codes], index=column.index, name=key, dtype=str)


def context_labels(adata: AnnData, context_key: str | Sequence[str] | None) -> pd.Series:
    """Context of each cell, (cell,) strings.

    Parameters
    ----------
    context_key
        A column of `obs`, several columns (their labels are joined with " | "), or None: one context, "all".

    Returns
    -------
    Series
        Labels (cell,), indexed by cell.

    Raises
    ------
    LabelError
        If a column is missing, has cells without a label, or joined labels would be ambiguous.
    """
    if context_key is None:
        return pd.Series(EVERYWHERE, index=adata.obs_names, dtype=str)
    if isinstance(context_key, str):
        return obs_labels(adata, context_key)
    if not len(context_key):
        raise LabelError(three_beats("at least one context column", "an empty list", "pass context_key=None"))
    columns = [obs_labels(adata, key) for key in context_key]
    for key, column in zip(context_key, columns, strict=True):
        clash = [label for label in column.unique() if JOINER in label]
        if clash and len(columns) > 1:
            found = f"{clash[0]!r} in obs[{key!r}]"
            raise LabelError(three_beats(f"context labels without {JOINER!r}", found, "rename these labels"))
    joined = columns[0]
    for column in columns[1:]:
        joined = joined + JOINER + column
    return joined


def perturbation_parts(label: str) -> tuple[str, ...]:
    """Split a combination into its primitives: "A+B" gives ("A", "B").

    Raises
    ------
    LabelError
        If a part is empty, repeated, or surrounded by blanks.
    """
    parts = tuple(str(label).split("+"))
    clean = tuple(part.strip() for part in parts)
    if parts != clean or "" in parts or len(set(parts)) < len(parts):
        fix = f"write {'+'.join(dict.fromkeys(part for part in clean if part))!r}"
        raise LabelError(three_beats("a perturbation, or a combination written 'A+B'", f"{label!r}", fix))
    return parts


def require_control(labels: pd.Series, control: str, perturbation_key: str) -> np.ndarray:
    """Mask of the control cells among perturbation labels, (cell,); refuses a label that no cell has."""
    mask = (labels == control).to_numpy()
    if not mask.any():
        fix = f"pass control=... ({did_you_mean(control, labels.unique())})"
        raise LabelError(three_beats(f"control cells {control!r} in obs[{perturbation_key!r}]", "none", fix))
    return mask
