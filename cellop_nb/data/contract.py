"""The AnnData contract: which columns and layers of a screen mean what (`setup`), and the gate that checks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ..errors import DataError, LabelError, did_you_mean, three_beats
from .on_disk import StoredRows, is_stored_by_cells

JOINER = " | "
EVERYWHERE = "all"
FEW_CELLS = 10
"""Groups under this size are marked in the table of :func:`setup`."""

_MISSING = {"", "nan", "na", "none", "null"}
_GENES = {"gene expression", "gene", "genes", "rna", "mrna"}
_USUAL = {
    "perturbation_key": (
        "perturbation",
        "condition",
        "treatment",
        "drug",
        "guide",
        "label",
        "stim",
        "target",
    ),
    "context_key": ("cell_type", "celltype", "cell_line", "cluster", "tissue", "donor", "patient", "louvain"),
}


@dataclass(frozen=True)
class Keys:
    """Which columns, layers and labels of a screen mean what, as :func:`setup` was told.

    Attributes
    ----------
    layer
        Layer of raw counts; None for `X`.
    perturbation_key, control
        Column of conditions, and its label of unperturbed cells.
    context_key
        Columns of contexts, whose labels are joined with " | " where there are several; None: one context, "all".
    dose_key, time_key, batch_key
        Columns of doses, times and batches, or None.
    singles
        Labels with a "+" that are one perturbation.
    """

    layer: str | None = None
    perturbation_key: str = "perturbation"
    context_key: tuple[str, ...] | None = ("cell_type",)
    control: str = "control"
    dose_key: str | None = None
    time_key: str | None = None
    batch_key: str | None = None
    singles: tuple[str, ...] = ()

    def write(self, adata: AnnData) -> None:
        """Keep the keys in ``uns["cellop_nb"]["keys"]``, in a form that h5ad and zarr can hold (no None)."""
        stored = {name: value for name, value in asdict(self).items() if value is not None}
        for name in stored.keys() & {"context_key", "singles"}:
            stored[name] = np.array(stored[name], dtype=str)
        ours = dict(adata.uns.get("cellop_nb", {}))
        adata.uns["cellop_nb"] = ours | {"keys": stored}


def setup(
    adata: AnnData,
    *,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    dose_key: str | None = None,
    time_key: str | None = None,
    batch_key: str | None = None,
    singles: Sequence[str] = (),
) -> pd.DataFrame:
    """Check a screen and say once which columns mean what; every other function reads it from the data.

    Parameters
    ----------
    adata
        Cells (cell, gene) of a screen, control and perturbed.
    layer
        Layer of raw counts; None for `X`. Sparse, dense or backed on disk (then read in blocks).
    perturbation_key, control
        Column of `obs` with the condition of each cell, and its label of unperturbed cells. A label "A+B" is a
        combination where "A" and "B" are labels too.
    context_key
        Column of cell type, donor or tissue; several columns are joined; None for one context, "all".
    dose_key
        Column of doses: positive numbers; what it says of control cells does not matter.
    time_key, batch_key
        Columns of times, and of batches that the VAE is to be told.
    singles
        Labels that are one perturbation although their parts are labels of the screen.

    Returns
    -------
    DataFrame
        One row per (context, perturbation): `context`, `perturbation`, `cells`, `counts_per_cell` (median), `note`.
        Writes ``uns["cellop_nb"]["keys"]``, which is saved with the file and survives slicing, copies and
        ``concat(uns_merge="same")``.

    Raises
    ------
    DataError
        If there are no cells or genes, names repeat, features are no genes, or the matrix does not hold raw counts.
    LabelError
        If a column, the control label or a context's controls are missing, or labels or doses are malformed.
    """
    _check_names(adata)
    _check_features(adata)
    context = (
        (context_key,)
        if isinstance(context_key, str)
        else None
        if context_key is None
        else tuple(context_key)
    )
    if not isinstance(control, str):
        fix = "write all controls alike first: adata.obs[key] = adata.obs[key].replace(...)"
        raise LabelError(three_beats("one control label, a string", f"control={control!r}", fix))
    keys = Keys(layer, perturbation_key, context, control, dose_key, time_key, batch_key, tuple(singles))
    if context is not None and perturbation_key in context:
        fix = "name the column of cell types, or pass context_key=None"
        raise LabelError(three_beats("different columns", f"{perturbation_key!r} as both keys", fix))
    labels = label_table(adata, keys)
    for key in (time_key, batch_key):
        if key is not None:
            obs_labels(adata, key)
    check_labels(labels, keys)
    labels["counts_per_cell"] = check_counts(adata, layer)
    groups = labels.groupby(["context", "perturbation"])["counts_per_cell"]
    table = groups.agg(cells="size", counts_per_cell="median").reset_index()
    lone = table[table["cells"] < 2]
    if len(lone):
        first = lone.iloc[0]
        problem = f"{len(lone)} with one, such as {first['perturbation']!r} in {first['context']!r}"
        raise LabelError(
            three_beats("at least 2 cells in every group", problem, "drop or merge these groups")
        )
    keys.write(adata)
    return table.assign(note=np.where(table["cells"] < FEW_CELLS, f"fewer than {FEW_CELLS} cells", ""))


def keys_of(adata) -> Keys:
    """The keys that :func:`setup` kept in the data.

    Raises
    ------
    LabelError
        If there are none; the columns that look like them are named.
    """
    stored = getattr(adata, "uns", {}).get("cellop_nb", {}).get("keys")
    if stored is None:
        raise LabelError(
            three_beats("a screen that was set up", "no keys in uns['cellop_nb']", _likely(adata))
        )
    values = {field.name: stored[field.name] for field in fields(Keys) if field.name in stored}
    values = {"context_key": None} | {
        name: tuple(map(str, np.atleast_1d(value))) if name in ("context_key", "singles") else str(value)
        for name, value in values.items()
    }
    return Keys(**values)


def is_set_up(adata) -> bool:
    """Whether :func:`setup` kept keys in the data."""
    return "keys" in adata.uns.get("cellop_nb", {})


def _likely(adata) -> str:
    """The call of `setup` that the columns of `obs` suggest."""
    columns = {str(column).lower(): str(column) for column in getattr(adata, "obs", ())}
    likely = {}
    for name, usual in _USUAL.items():
        match = [columns[word] for word in usual if word in columns]
        match += [column for low, column in columns.items() if any(word in low for word in usual)]
        if match:
            likely[name] = match[0]
    said = ", ".join(f"{name}={column!r}" for name, column in likely.items()) or "perturbation_key=..."
    return f"call cellop_nb.setup(adata, {said}, control=...) once (columns of obs: {', '.join(columns.values())})"


# -- labels -------------------------------------------------------------------------------------------------------


def obs_labels(adata: AnnData, key: str) -> pd.Series:
    """Column `key` of `obs` as strings, (cell,).

    Raises
    ------
    LabelError
        If the column does not exist or exists twice, or some cells have no label.
    """
    if key not in adata.obs:
        options = did_you_mean(key, adata.obs.columns)
        raise LabelError(
            three_beats(f"a column {key!r} in obs", "no such column", f"name the right one ({options})")
        )
    column = adata.obs[key]
    if column.ndim > 1:
        problem = f"{column.shape[1]} columns of this name"
        raise LabelError(three_beats(f"one column {key!r} in obs", problem, "rename or drop the others"))
    missing = column.isna()
    if missing.any():
        first = list(adata.obs_names[missing][:3])
        problem = f"{int(missing.sum())} cells without one, such as {first}"
        raise LabelError(
            three_beats(f"a label in obs[{key!r}] for every cell", problem, "label or drop these cells")
        )
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return column.astype(str)
    # One string per category: pandas would make one for every cell.
    names = column.cat.categories.astype(str).to_numpy(dtype=object)
    return pd.Series(names[column.cat.codes], index=column.index, name=key, dtype=str)


def context_labels(adata: AnnData, context_key: str | Sequence[str] | None) -> pd.Series:
    """Context of each cell, (cell,) strings, indexed by cell.

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
            problem = f"{clash[0]!r} in obs[{key!r}]"
            raise LabelError(
                three_beats(f"context labels without {JOINER!r}", problem, "rename these labels")
            )
    joined = columns[0]
    for column in columns[1:]:
        joined = joined + JOINER + column
    return joined


def require_control(labels: pd.Series, control: str, perturbation_key: str) -> np.ndarray:
    """Mask of the control cells among perturbation labels, (cell,); refuses a label that no cell has."""
    mask = (labels == control).to_numpy()
    if not mask.any():
        fix = f"pass control=... ({did_you_mean(control, labels.unique())})"
        raise LabelError(three_beats(f"control cells {control!r} in obs[{perturbation_key!r}]", "none", fix))
    return mask


def label_table(adata: AnnData, keys: Keys) -> pd.DataFrame:
    """Columns `context`, `perturbation`, `dose` (1 without a column of doses, and for controls), a row per cell."""
    table = pd.DataFrame(
        {
            "context": context_labels(adata, keys.context_key).to_numpy(),
            "perturbation": obs_labels(adata, keys.perturbation_key).to_numpy(),
        }
    )
    perturbed = (table["perturbation"] != keys.control).to_numpy()
    return table.assign(dose=_doses(adata, keys.dose_key, perturbed))


def _doses(adata: AnnData, key: str | None, perturbed: np.ndarray) -> np.ndarray:
    """Doses (cell,) float64; 1 for controls, whatever their column says."""
    doses = np.ones(adata.n_obs)
    if key is None:
        return doses
    if key not in adata.obs:
        obs_labels(adata, key)
    column = adata.obs[key][perturbed]
    numbers = pd.to_numeric(column.astype(str), errors="coerce").to_numpy(float)
    wrong = ~(np.isfinite(numbers) & (numbers > 0))
    if wrong.any():
        seen = ", ".join(repr(value) for value in pd.unique(column[wrong])[:3])
        negative = np.isfinite(numbers[wrong]).all()
        fix = (
            "if these are logarithms, give doses: 10 ** value"
            if negative
            else "write numbers alone, in one unit"
        )
        expected = f"positive numbers as doses of perturbed cells in obs[{key!r}]"
        raise LabelError(three_beats(expected, f"{int(wrong.sum())} others, such as {seen}", fix))
    doses[perturbed] = numbers
    return doses


# -- counts -------------------------------------------------------------------------------------------------------


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
        options = did_you_mean(layer, adata.layers)
        raise DataError(
            three_beats(f"a layer {layer!r}", "no such layer", f"pass layer=None for X ({options})")
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


# -- the gate -----------------------------------------------------------------------------------------------------


def _check_names(adata: AnnData) -> None:
    """Refuse what is no AnnData, empty, or has repeated cell or gene names."""
    if not isinstance(adata, AnnData):
        fix = "read the file first, with anndata.read_h5ad or cellop_nb.datasets.load"
        raise DataError(three_beats("an AnnData object", f"a {type(adata).__name__}", fix))
    if not adata.n_obs or not adata.n_vars:
        problem = f"{adata.n_obs} cells and {adata.n_vars} genes"
        raise DataError(three_beats("cells and genes", problem, "check the filter that made this object"))
    for what, names in {"obs": adata.obs_names, "var": adata.var_names}.items():
        if not names.is_unique:
            repeated = names[names.duplicated()]
            problem = f"{len(repeated)} repeated in {what}_names, such as {repeated[0]!r}"
            raise DataError(three_beats("unique names", problem, f"run adata.{what}_names_make_unique()"))


def other_features(adata: AnnData) -> np.ndarray:
    """Mask (gene,) of features that ``var["feature_types"]`` calls something else than genes: guides, antibodies."""
    if "feature_types" not in adata.var:
        return np.zeros(adata.n_vars, dtype=bool)
    types = adata.var["feature_types"].astype(str).str.strip().str.lower()
    return (
        (~types.isin(_GENES)).to_numpy() if types.isin(_GENES).any() else np.zeros(adata.n_vars, dtype=bool)
    )


def _check_features(adata: AnnData) -> None:
    other = other_features(adata)
    if other.any():
        types = ", ".join(map(str, pd.unique(adata.var["feature_types"][other])))
        problem = f"{int(other.sum())} other features ({types}), such as {adata.var_names[other][0]!r}"
        fix = "leave them out: adata = adata[:, adata.var['feature_types'] == 'Gene Expression'].copy()"
        raise DataError(three_beats("genes alone in var", problem, fix))


def check_counts(adata: AnnData, layer: str | None = None) -> np.ndarray:
    """Refuse a matrix that does not hold raw counts; counts per cell, (cell,) float64.

    Raises
    ------
    DataError
        For values that are not numbers, not finite, negative or not whole, and for cells without any count.
    """
    totals = check_values(adata, layer)
    empty = np.flatnonzero(totals == 0)
    if len(empty):
        problem = f"{len(empty)} without any, such as {adata.obs_names[empty[0]]!r}"
        fix = "drop them with scanpy.pp.filter_cells(adata, min_counts=1)"
        raise DataError(three_beats(f"counts in every cell of {_where(layer)}", problem, fix))
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
        problem = f"values of type {count_slot(adata, layer).dtype}"
        fix = "store counts as integers or floats"
        raise DataError(three_beats(f"numbers in {_where(layer)}", problem, fix))
    return partial(_check_block, adata, layer)


def _where(layer: str | None) -> str:
    return "X" if layer is None else f"layers[{layer!r}]"


def check_labels(labels: pd.DataFrame, keys: Keys) -> None:
    """Refuse labels (columns context, perturbation) that would be misread, and contexts without controls.

    Raises
    ------
    LabelError
    """
    for what in ("context", "perturbation"):
        _check_spelling(what, labels[what].unique(), keys.control)
    where = f"obs[{keys.perturbation_key!r}]"
    is_control = require_control(labels["perturbation"], keys.control, keys.perturbation_key)
    treated = [label for label in labels["perturbation"].unique() if label != keys.control]
    if not treated:
        problem = f"only {keys.control!r} in {where}"
        raise LabelError(
            three_beats("perturbed cells beside the controls", problem, "check perturbation_key")
        )
    unknown = [label for label in keys.singles if label not in treated]
    if unknown:
        fix = f"name labels of the screen ({did_you_mean(unknown[0], treated)})"
        raise LabelError(three_beats(f"singles among the labels of {where}", repr(unknown[0]), fix))
    _check_combinations(treated, keys)
    lacking = sorted(set(labels["context"]) - set(labels["context"][is_control]))
    if lacking:
        problem = f"none in {len(lacking)} of them, such as {lacking[0]!r}"
        fix = "drop these contexts, or choose a context_key whose labels all have controls"
        raise LabelError(three_beats(f"control cells {keys.control!r} in every context", problem, fix))


def _check_spelling(what: str, labels, control: str) -> None:
    """No blanks around labels, no written-out missing values."""
    for label in labels:
        if label != label.strip():
            fix = "strip the labels: obs[key] = obs[key].str.strip()"
            raise LabelError(three_beats(f"{what} labels without blanks around them", repr(label), fix))
        if label.lower() in _MISSING and label != control:
            fix = "label or drop these cells"
            raise LabelError(three_beats(f"a {what} for every cell", f"the label {label!r}", fix))


def _check_combinations(treated: list[str], keys: Keys) -> None:
    """Combinations name no control and are each written in one order; there is no second control."""
    labels, control = {*treated, keys.control}, keys.control
    seen: dict[tuple, str] = {}
    for label in treated:
        if label.lower() == control.lower():
            fix = "write all controls alike"
            raise LabelError(three_beats(f"one control label {control!r}", f"{label!r} as well", fix))
        parts = [part.strip() for part in label.split("+")]
        named = [part for part in dict.fromkeys(parts) if part]
        if label in keys.singles or len(parts) < 2:
            continue
        if control in named:
            alone = "+".join(part for part in named if part != control)
            raise LabelError(three_beats("combinations of perturbations", f"{label!r}", f"write {alone!r}"))
        if named and set(named) <= labels and label != "+".join(named):
            fix = f"write {'+'.join(named)!r}, or pass singles=[{label!r}]"
            raise LabelError(three_beats("a perturbation, or a combination written 'A+B'", f"{label!r}", fix))
        twin = seen.setdefault(tuple(sorted(named if labels.intersection(named) else parts)), label)
        if twin != label:
            fix = "write each combination in one order"
            raise LabelError(three_beats("one label per combination", f"{twin!r} and {label!r}", fix))


def _check_block(adata: AnnData, layer: str | None, block, rows: np.ndarray) -> None:
    where = _where(layer)
    if sparse.issparse(block):
        _check_structure(block, where)
    values = block.data if sparse.issparse(block) else block
    if values.dtype.kind in "bu":
        return
    if not np.isfinite(values).all():
        problem = _describe(adata, block, rows, lambda v: ~np.isfinite(v))
        raise DataError(three_beats(f"finite counts in {where}", problem, "drop or repair these cells"))
    if (values < 0).any():
        problem = (
            f"negative values: {_describe(adata, block, rows, lambda v: v < 0)}; scaled or corrected data"
        )
        fix = f"pass the raw counts{_elsewhere(adata, layer)}"
        raise DataError(three_beats(f"counts of at least 0 in {where}", problem, fix))
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        problem = f"{_describe(adata, block, rows, lambda v: v != np.rint(v))}; {_guess(block, values)}"
        fix = f"pass the raw counts{_elsewhere(adata, layer)}"
        raise DataError(three_beats(f"whole numbers in {where}", problem, fix))


def _check_structure(block, where: str) -> None:
    """Refuse a sparse matrix whose indices point outside its genes, or whose row pointers do not rise."""
    low, high = (block.indices.min(), block.indices.max()) if len(block.indices) else (0, 0)
    steps = np.diff(block.indptr)
    if low < 0 or high >= block.shape[1] or (steps < 0).any() or block.indptr[-1] > len(block.data):
        bad = int(low) if low < 0 else int(high)
        problem = f"the gene index {bad}" if low < 0 or high >= block.shape[1] else "row pointers that fall"
        fix = "the file is damaged, or its shape was cut: make it again from its source"
        raise DataError(three_beats(f"gene indices of 0 to {block.shape[1] - 1} in {where}", problem, fix))


def _describe(adata: AnnData, block, rows: np.ndarray, bad) -> str:
    """How many values are bad, and the first one with its cell and gene."""
    coo = block.tocoo() if sparse.issparse(block) else None
    mask = bad(coo.data if coo is not None else block)
    if coo is not None:
        first = int(np.flatnonzero(mask)[0])
        row, column, value = coo.row[first], coo.col[first], coo.data[first]
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
    in_raw = adata.raw is not None and _looks_raw(adata.raw.X[:64])
    return f" with layer=...{'; adata.raw has whole numbers: try adata.raw.to_adata()' if in_raw else ''}"


def _looks_raw(block) -> bool:
    """Whether all values of a block are whole and none is negative."""
    values = block.data if sparse.issparse(block) else np.asarray(block)
    numbers = values.size and values.dtype.kind in "biuf"
    return bool(numbers and (values >= 0).all() and (values == np.rint(values)).all())
