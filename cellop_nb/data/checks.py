"""What makes counts and labels unfit, one test each; `contract.check` runs them all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ..errors import DataError, LabelError, three_beats
from .slots import count_blocks, count_slot, perturbation_parts, require_control

_MISSING = {"", "nan", "na", "none", "null"}


def check_counts(adata: AnnData, layer: str | None = None) -> np.ndarray:
    """Refuse a matrix that does not hold raw counts; counts per cell, (cell,) float64.

    Raises
    ------
    DataError
        For values that are not numbers, not finite, negative or not whole, and for cells without any count.
    """
    where = _where(layer)
    totals = check_values(adata, layer)
    empty = np.flatnonzero(totals == 0)
    if len(empty):
        found = f"{len(empty)} without any, such as {adata.obs_names[empty[0]]!r}"
        fix = "drop them with scanpy.pp.filter_cells(adata, min_counts=1)"
        raise DataError(three_beats(f"counts in every cell of {where}", found, fix))
    return totals


def check_values(adata: AnnData, layer: str | None = None) -> np.ndarray:
    """Refuse values that cannot be raw counts; sums per cell, (cell,) float64.

    Raises
    ------
    DataError
        For values that are not numbers, not finite, negative or not whole.
    """
    totals, check = np.zeros(adata.n_obs), block_check(adata, layer)
    for start, block in count_blocks(adata, layer):
        rows = np.arange(start, start + block.shape[0])
        check(block, rows)
        totals[rows] = np.asarray(block.sum(axis=1), dtype=float).ravel()
    return totals


def block_check(adata: AnnData, layer: str | None = None) -> Callable[[Any, np.ndarray], None]:
    """What refuses a block of counts (cell, gene), as stored, of the rows (cell,), as :func:`check_values` does.

    Raises
    ------
    DataError
        At once, if the values are not numbers.
    """
    if np.dtype(count_slot(adata, layer).dtype).kind not in "biuf":
        found = f"values of type {count_slot(adata, layer).dtype}"
        fix = "store counts as integers or floats"
        raise DataError(three_beats(f"numbers in {_where(layer)}", found, fix))
    return partial(_check_block, adata, layer)


def _where(layer: str | None) -> str:
    return "X" if layer is None else f"layers[{layer!r}]"


def check_labels(labels: pd.DataFrame, perturbation_key: str, control: str) -> None:
    """Refuse labels (columns context, perturbation) that would be misread, and contexts without controls.

    Raises
    ------
    LabelError
    """
    perturbations = list(labels["perturbation"].unique())
    for what in ("context", "perturbation"):
        _check_spelling(what, labels[what].unique(), control)
    require_control(labels["perturbation"], control, perturbation_key)
    treated = [label for label in perturbations if label != control]
    if not treated:
        found = f"only {control!r} in obs[{perturbation_key!r}]"
        raise LabelError(three_beats("perturbed cells beside the controls", found, "check perturbation_key"))
    _check_combinations(treated, control)
    with_controls = set(labels["context"][labels["perturbation"] == control])
    lacking = sorted(set(labels["context"]) - with_controls)
    if lacking:
        found = f"none in {len(lacking)} of them, such as {lacking[0]!r}"
        fix = "drop these contexts, or choose a context_key whose labels all have controls"
        raise LabelError(three_beats(f"control cells {control!r} in every context", found, fix))


def _check_spelling(what: str, labels, control: str) -> None:
    """No blanks around labels, no written-out missing values."""
    for label in labels:
        if label != label.strip():
            fix = "strip the labels: obs[key] = obs[key].str.strip()"
            raise LabelError(three_beats(f"{what} labels without blanks around them", repr(label), fix))
        if label.lower() in _MISSING and label != control:
            fix = "label or drop these cells"
            raise LabelError(three_beats(f"a {what} for every cell", f"the label {label!r}", fix))


def _check_combinations(treated: list[str], control: str) -> None:
    """Combinations are well formed, name no control, and each is written in one order; no second control."""
    seen: dict[tuple, str] = {}
    for label in treated:
        parts = perturbation_parts(label)
        if label.lower() == control.lower():
            fix = "write all controls alike"
            raise LabelError(three_beats(f"one control label {control!r}", f"{label!r} as well", fix))
        if control in parts:
            alone = "+".join(part for part in parts if part != control)
            raise LabelError(three_beats("combinations of perturbations", f"{label!r}", f"write {alone!r}"))
        twin = seen.setdefault(tuple(sorted(parts)), label)
        if twin != label:
            fix = "write each combination in one order"
            raise LabelError(three_beats("one label per combination", f"{twin!r} and {label!r}", fix))


def _check_block(adata: AnnData, layer: str | None, block, rows: np.ndarray) -> None:
    where = _where(layer)
    values = block.data if sparse.issparse(block) else block
    if values.dtype.kind in "bu":
        return
    if not np.isfinite(values).all():
        found = _describe(adata, block, rows, lambda v: ~np.isfinite(v))
        raise DataError(three_beats(f"finite counts in {where}", found, "drop or repair these cells"))
    if (values < 0).any():
        found = f"negative values: {_describe(adata, block, rows, lambda v: v < 0)}; scaled or corrected data"
        fix = f"pass the raw counts{_elsewhere(adata, layer)}"
        raise DataError(three_beats(f"counts of at least 0 in {where}", found, fix))
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        found = f"{_describe(adata, block, rows, lambda v: v != np.rint(v))}; {_guess(block, values)}"
        fix = f"pass the raw counts{_elsewhere(adata, layer)}"
        raise DataError(three_beats(f"whole numbers in {where}", found, fix))


def _describe(adata: AnnData, block, rows: np.ndarray, bad) -> str:
    """How many values are bad, and the first one with its cell and gene."""
    coo = block.tocoo() if sparse.issparse(block) else None
    mask = bad(coo.data if coo is not None else block)
    if coo is not None:
        place = int(np.flatnonzero(mask)[0])
        row, column, value = coo.row[place], coo.col[place], coo.data[place]
    else:
        row, column = np.argwhere(mask)[0]
        value = block[row, column]
    cell, gene = adata.obs_names[rows[row]], adata.var_names[column]
    return f"{value:g} in cell {cell!r}, gene {gene!r} ({int(mask.sum())} such values)"


def _guess(block, values: np.ndarray) -> str:
    """What values that are not whole probably are."""
    if values.max() < 30:  # log1p of any count below 10^13
        return "it looks log-normalised"
    sums = np.asarray(block.sum(axis=1), dtype=float).ravel()
    if len(sums) > 1 and np.ptp(sums) <= 1e-3 * sums.mean():
        return f"it looks normalised to {sums.mean():.4g} per cell"
    return "it looks corrected or averaged"


def _elsewhere(adata: AnnData, layer: str | None) -> str:
    """Another slot that seems to hold raw counts, as the end of a sentence."""
    for name in (None, *adata.layers):
        if name == layer or (name is None and adata.X is None):
            continue
        _, block = next(count_blocks(adata, name, size=64))
        if _looks_raw(block):
            return f", layer={name!r} seems to hold them"
    raw = "; adata.raw has whole numbers: try adata.raw.to_adata()" if _raw_has_counts(adata) else ""
    return f" with layer=...{raw}"


def _raw_has_counts(adata: AnnData) -> bool:
    return adata.raw is not None and _looks_raw(adata.raw.X[:64])


def _looks_raw(block) -> bool:
    """Whether all values of a block are whole and none is negative."""
    values = block.data if sparse.issparse(block) else np.asarray(block)
    known = values.size and values.dtype.kind in "biuf"
    return bool(known and (values >= 0).all() and (values == np.rint(values)).all())
