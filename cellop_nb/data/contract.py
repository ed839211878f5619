"""The AnnData contract: which columns and layers of a screen mean what (`setup`), and the gate that checks them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ..errors import DataError, LabelError, counted, did_you_mean
from .on_disk import RowReader, blocks_by_genes, part, stored_format

JOINER = " | "
FEW_CELLS = 10
"""Groups under this size are marked in the table of :func:`setup`."""

LARGEST_COUNT = 2**24
"""Whole numbers up to here are exact in float32, in which the models hold counts."""

_MISSING = {"", "nan", "na", "none", "null", "<na>", "n/a", "#n/a"}
_GENES = {"gene expression", "gene", "genes", "rna", "mrna"}
USUAL = {
    "perturbation_key": (
        "perturbation", "condition", "treatment", "stimulation", "stim", "drug", "compound", "cytokine", "target_gene",
        "target", "gene", "guide", "knockout", "label",
    ),
    "context_key": (
        "cell_type", "celltype", "cell_line", "cell_label", "cell", "tissue", "cluster", "leiden", "louvain", "donor",
        "patient", "sample",
    ),
    "control": (
        "control", "ctrl", "untreated", "unstimulated", "unstim", "vehicle", "dmso", "pbs", "mock", "non-targeting",
        "nontargeting", "ntc", "nt", "resting", "wt",
    ),
    "layer": ("counts", "raw_counts", "raw", "umi"),
}  # fmt: skip
"""Words that columns, labels and layers of each key usually have, the likeliest first."""


@dataclass(frozen=True)
class Keys:
    """Which columns, layers and labels of a screen mean what; the attributes are the parameters of :func:`setup`."""

    layer: str | None = None
    perturbation_key: str = "perturbation"
    context_key: tuple[str, ...] | None = ("cell_type",)
    control: str = "control"
    dose_key: str | None = None
    time_key: str | None = None
    batch_key: str | None = None
    singles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what can name no column, layer or label, and columns with two meanings."""
        said = [(name, value) for name, value in vars(self).items() if value is not None]
        tuples = [(name, one) for name, value in said if isinstance(value, tuple) for one in value]
        for name, value in [pair for pair in said if not isinstance(pair[1], tuple)] + tuples:
            if not isinstance(value, str):
                fix = "pass one name; several labels are written alike first: obs[key].replace({...})"
                raise LabelError(f"{name}, a string", repr(value), fix)
        for name in ("perturbation_key", "control"):
            if getattr(self, name) is None:
                raise LabelError(f"{name}, a string", "None", "pass the name")
        columns = [self.perturbation_key, *(self.context_key or ())]
        columns += [] if self.dose_key is None else [self.dose_key]
        more = [key for key in (self.time_key, self.batch_key) if key == self.perturbation_key]
        twice = [key for key in columns if (columns + more).count(key) > 1]
        if twice:
            fix = "name another column, or None where there is none, such as context_key=None"
            raise LabelError("a column of its own for each key", f"{twice[0]!r} twice", fix)

    def write(self, adata: AnnData) -> None:
        """Keep the keys in ``uns["cellop_nb"]["keys"]``, in a form that h5ad and zarr can hold (no None)."""
        stored = {name: value for name, value in asdict(self).items() if value is not None}
        for name in stored.keys() & {"context_key", "singles"}:
            stored[name] = np.array(stored[name], dtype=str)
        adata.uns["cellop_nb"] = {**_ours(adata), "keys": stored}


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
    """Check a screen, and store in it which column means what; every other function reads it from there.

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
        Column of cell type, donor or tissue. Several columns are factors, whose effects add up: a pair that was never
        perturbed is told by its margins; its label joins theirs with " | ". None for one context, "all".
    dose_key
        Column of doses, or of times where these vary: positive numbers; what it says of control cells does not matter.
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
    check_names(adata)
    _check_features(adata)
    _ours(adata)
    context = None if context_key is None else _several(context_key)
    keys = Keys(layer, perturbation_key, context, control, dose_key, time_key, batch_key, _several(singles))
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
        raise LabelError("at least 2 cells in every group", problem, "drop or merge these groups")
    keys.write(adata)
    return table.assign(note=np.where(table["cells"] < FEW_CELLS, f"fewer than {FEW_CELLS} cells", ""))


def _several(names) -> tuple:
    """One name or several as a tuple."""
    return (names,) if isinstance(names, str) or not np.iterable(names) else tuple(names)


def keys_of(adata) -> Keys:
    """The keys that :func:`setup` kept in the data; without any, the error names the columns that look like them."""
    stored = _ours(adata).get("keys") if hasattr(adata, "uns") else None
    if not isinstance(stored, Mapping):
        fix = _suggested_call(adata)
        raise LabelError("a screen that was set up", "no keys in uns['cellop_nb']", fix)
    values = {field.name: stored[field.name] for field in fields(Keys) if field.name in stored}
    values = {"context_key": None} | {
        name: tuple(map(str, np.atleast_1d(value))) if name in ("context_key", "singles") else str(value)
        for name, value in values.items()
    }
    return Keys(**values)


def is_set_up(adata) -> bool:
    """Whether :func:`setup` kept keys in the data."""
    return "keys" in _ours(adata)


def _ours(adata) -> Mapping:
    """What the package keeps in `uns`; refuses what others wrote under its name."""
    ours = adata.uns.get("cellop_nb", {})
    if not isinstance(ours, Mapping):
        fix = "keep it under another name: adata.uns['other'] = adata.uns.pop('cellop_nb')"
        raise LabelError("a dictionary in uns['cellop_nb']", f"a {type(ours).__name__}", fix)
    return ours


def _suggested_call(adata) -> str:
    columns = list(map(str, getattr(adata, "obs", ())))
    usual = {name: likely(name, columns) for name in ("perturbation_key", "context_key")}
    keys = [f"{name}={names[0]!r}" for name, names in usual.items() if names] or ["perturbation_key=..."]
    call = f"cellop_nb.setup(adata, {', '.join(keys)}, control=...)"
    return f"call {call} once (columns of obs: {', '.join(columns)})"


def likely(name: str, options: Sequence[str]) -> list[str]:
    """Options that are a usual word for this key, or contain one; the likeliest first."""
    plain = {option: re.sub(r"[^a-z0-9]", "", option.lower()) for option in options}
    words = [word.replace("_", "").replace("-", "") for word in USUAL[name]]
    same = [option for word in words for option in options if plain[option] == word]
    within = [option for word in words for option in options if len(word) > 3 and word in plain[option]]
    return list(dict.fromkeys([*same, *within]))


# -- labels -------------------------------------------------------------------------------------------------------


def obs_column(adata: AnnData, key: str) -> pd.Series:
    """Column `key` of `obs`, (cell,); refuses one that does not exist or exists twice."""
    if key not in adata.obs:
        options = did_you_mean(key, adata.obs.columns)
        raise LabelError(f"a column {key!r} in obs", "no such column", f"name the right one ({options})")
    column = adata.obs[key]
    if column.ndim > 1:
        problem = f"{column.shape[1]} columns of this name"
        raise LabelError(f"one column {key!r} in obs", problem, "rename or drop the others")
    return column


def obs_labels(adata: AnnData, key: str) -> pd.Series:
    """Column `key` of `obs` as strings, (cell,); refuses a missing or double column, and cells without a label."""
    column = obs_column(adata, key)
    missing = column.isna()
    if missing.any():
        first = list(adata.obs_names[missing][:3])
        problem = f"{counted(missing.sum(), 'cell')} without one, such as {first}"
        raise LabelError(f"a label in obs[{key!r}] for every cell", problem, "label or drop these cells")
    categories = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column.unique()
    written: dict[str, object] = {}
    for label in categories:
        twin = written.setdefault(str(label), label)
        if twin is not label and twin != label:
            fix = f"make them one or name them apart: obs[{key!r}] = obs[{key!r}].astype(str)"
            raise LabelError(
                f"labels in obs[{key!r}] that are written differently", f"{twin!r} and {label!r}", fix
            )
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return column.astype(str)
    # One string per category: pandas would make one for every cell.
    names = column.cat.categories.astype(str).to_numpy(dtype=object)
    return pd.Series(names[column.cat.codes], index=column.index, name=key, dtype=str)


def context_labels(adata: AnnData, keys: Keys) -> pd.Series:
    """Context of each cell, (cell,) strings, indexed by cell; several columns are joined, without any it is "all"."""
    if keys.context_key is None:
        return pd.Series("all", index=adata.obs_names, dtype=str)
    if not keys.context_key:
        raise LabelError("at least one context column", "an empty list", "pass context_key=None")
    joined, *others = columns = [obs_labels(adata, key) for key in keys.context_key]
    for key, column in zip(keys.context_key, columns, strict=True):
        clash = [label for label in column.unique() if JOINER in label]
        if clash and others:
            problem = f"{clash[0]!r} in obs[{key!r}]"
            fix = "rename these labels"
            raise LabelError(f"context labels without {JOINER!r}", problem, fix)
    for column in others:
        joined = joined + JOINER + column
    return joined


def context_name(context: str | Sequence[str] | Mapping[str, str], keys: Keys) -> str:
    """The label of a context that is named by its factors: column to level, or levels in the order of the keys."""
    if isinstance(context, str) or not np.iterable(context):
        return str(context)
    columns = keys.context_key or ()
    levels = [context.get(key) for key in columns] if isinstance(context, Mapping) else list(context)
    if len(context) != len(columns) or None in levels:
        problem = repr(dict(context) if isinstance(context, Mapping) else tuple(context))
        raise LabelError(f"a level of each of {list(columns)}", problem, "name them all")
    return JOINER.join(map(str, levels))


def require_control(labels: pd.Series, control: str, perturbation_key: str) -> np.ndarray:
    """Mask of the control cells among perturbation labels, (cell,); refuses a label that no cell has."""
    mask = (labels == control).to_numpy()
    if not mask.any():
        fix = f"pass control=... ({did_you_mean(control, labels.unique())})"
        raise LabelError(f"control cells {control!r} in obs[{perturbation_key!r}]", "none", fix)
    return mask


def label_table(adata: AnnData, keys: Keys) -> pd.DataFrame:
    """Columns `context`, `perturbation`, `dose` (1 without a column of doses, and for controls), a row per cell."""
    table = pd.DataFrame(
        {
            "context": context_labels(adata, keys).to_numpy(),
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
    column = obs_column(adata, key)[perturbed]
    numbers = pd.to_numeric(column.astype(str), errors="coerce").to_numpy(float)
    wrong = ~(np.isfinite(numbers) & (numbers > 0))
    if wrong.any():
        first = pd.unique(column[wrong])[:3]
        seen = ", ".join(repr(value) if isinstance(value, str) else str(value) for value in first)
        negative = np.isfinite(numbers[wrong]).all()
        fix = (
            "if these are logarithms, give doses: 10 ** value"
            if negative
            else "write numbers alone, in one unit"
        )
        expected = f"positive numbers as doses of perturbed cells in obs[{key!r}]"
        raise LabelError(expected, f"{counted(wrong.sum(), 'other value')}, such as {seen}", fix)
    doses[perturbed] = numbers
    return doses


# -- counts -------------------------------------------------------------------------------------------------------


def count_slot(adata: AnnData, layer: str | None = None):
    """The matrix of counts as it is stored, (cell, gene): sparse, dense or on disk; refuses what is not there."""
    if layer is None:
        if adata.X is None:
            fix = f"name the layer that holds them{_elsewhere(adata, layer)}"
            raise DataError("raw counts in X", "X is empty", fix)
    elif layer not in adata.layers:
        options = did_you_mean(layer, adata.layers)
        raise DataError(f"a layer {layer!r}", "no such layer", f"pass layer=None for X ({options})")
    slot = adata.X if layer is None else adata.layers[layer]
    if hasattr(slot, "dask"):
        fix = f"compute it first: adata.{_where(layer)} = adata.{_where(layer)}.compute()"
        raise DataError(f"counts in memory or in a file in {_where(layer)}", "a dask array", fix)
    return slot


def counts(adata: AnnData, layer: str | None = None) -> sparse.csr_matrix | np.ndarray:
    """Raw counts in memory, (cell, gene): CSR where they are sparse, an array where they are dense."""
    slot = count_slot(adata, layer)
    if hasattr(slot, "to_memory"):
        slot = slot.to_memory()
    return _held(slot if sparse.issparse(slot) else slot[...], _where(layer))


def _held(block, where: str) -> sparse.csr_matrix | np.ndarray:
    """A block in memory as CSR or array; half precision, in which sums overflow, becomes single."""
    if sparse.issparse(block):
        _check_structure(block, where)  # scipy writes past its arrays where indices are wrong
        return block.tocsr()
    block = np.asarray(block)
    return block.astype(np.float32) if block.dtype == np.float16 else block


def count_blocks(adata: AnnData, layer: str | None = None, size: int = 4096) -> Iterator[tuple[int, Any]]:
    """Counts in blocks of cells: (first row, CSR or array of (at most `size`, gene))."""
    slot = count_slot(adata, layer)
    if sparse.issparse(slot):
        slot = _held(slot, _where(layer))
    stored = RowReader(slot) if stored_format(slot) == "csr" else None
    for start in range(0, adata.n_obs, size):
        end = min(start + size, adata.n_obs)
        block = part(slot, start, end) if stored is None else stored.runs([start], [end])
        yield start, block if sparse.issparse(slot) else _held(block, _where(layer))


def library_size(adata: AnnData, layer: str | None = None) -> np.ndarray:
    """Counts per cell summed over the genes, (cell,) float64."""
    sums = [cell_sums(block) for _, block in count_blocks(adata, layer)]
    return np.concatenate(sums) if sums else np.zeros(0)


def cell_sums(block) -> np.ndarray:
    """Sums over genes, (cell,) float64."""
    return np.asarray(block.sum(axis=1, dtype=float), dtype=float).ravel()


# -- the gate -----------------------------------------------------------------------------------------------------


def check_names(adata: AnnData) -> None:
    """Refuse what is no AnnData, empty, or has repeated cell or gene names."""
    if not isinstance(adata, AnnData):
        fix = "read the file first, with anndata.read_h5ad or cellop_nb.datasets.load"
        raise DataError("an AnnData object", f"a {type(adata).__name__}", fix)
    if not adata.n_obs or not adata.n_vars:
        problem = f"{counted(adata.n_obs, 'cell')} and {counted(adata.n_vars, 'gene')}"
        raise DataError("cells and genes", problem, "check the filter that made this object")
    for what, names in {"obs": adata.obs_names, "var": adata.var_names}.items():
        if not names.is_unique:
            repeated = names[names.duplicated()]
            problem = f"{len(repeated)} repeated in {what}_names, such as {repeated[0]!r}"
            raise DataError("unique names", problem, f"run adata.{what}_names_make_unique()")


def _check_features(adata: AnnData) -> None:
    """Refuse features that ``var["feature_types"]`` calls something else than genes: guides, antibodies."""
    if "feature_types" not in adata.var:
        return
    genes = adata.var["feature_types"].astype(str).str.strip().str.lower().isin(_GENES).to_numpy()
    if genes.any() and not genes.all():
        types = ", ".join(map(str, pd.unique(adata.var["feature_types"][~genes])))
        problem = (
            f"{counted((~genes).sum(), 'other feature')} ({types}), such as {adata.var_names[~genes][0]!r}"
        )
        fix = "leave them out: adata = adata[:, adata.var['feature_types'] == 'Gene Expression'].copy()"
        raise DataError("genes alone in var", problem, fix)


def check_counts(adata: AnnData, layer: str | None = None) -> np.ndarray:
    """Refuse a matrix that does not hold raw counts, and cells without any; counts per cell, (cell,) float64."""
    totals = check_values(adata, layer)
    empty = np.flatnonzero(totals == 0)
    if len(empty):
        problem = f"{len(empty)} without any, such as {adata.obs_names[empty[0]]!r}"
        fix = "drop them with scanpy.pp.filter_cells(adata, min_counts=1)"
        raise DataError(f"counts in every cell of {_where(layer)}", problem, fix)
    return totals


def check_values(adata: AnnData, layer: str | None = None) -> np.ndarray:
    """Refuse what cannot be raw counts: no numbers, not finite, negative, not whole; sums (cell,) float64."""
    totals, check = np.zeros(adata.n_obs), block_check(adata, layer)
    slot = count_slot(adata, layer)
    if stored_format(slot) == "csc":  # rows of it would cost a pass through the file each time
        for first, block in blocks_by_genes(slot):
            check(_held(block, _where(layer)), np.arange(adata.n_obs), first)
            totals += cell_sums(block)
        return totals
    for start, block in count_blocks(adata, layer):
        rows = np.arange(start, start + block.shape[0])
        check(block, rows)
        totals[rows] = cell_sums(block)
    return totals


def block_check(adata: AnnData, layer: str | None = None) -> Callable[..., None]:
    """What refuses a block of counts (cell, gene), as stored, of the rows (cell,), as :func:`check_values` does.

    Where the block holds some of the genes, the position of the first is a third argument. Values that are no numbers are
    refused at once.
    """
    slot = count_slot(adata, layer)
    kind = np.dtype(slot.dtype)
    if kind.kind not in "iuf" or (kind == np.float16 and hasattr(slot, "format")):  # which scipy has not
        problem = f"values of type {kind}"
        fix = "store counts as integers or float32"
        fix = "pass the counts from before they became yes or no" if kind.kind == "b" else fix
        raise DataError(f"numbers in {_where(layer)}", problem, fix)
    return partial(_check_block, adata, layer)


def _where(layer: str | None) -> str:
    return "X" if layer is None else f"layers[{layer!r}]"


def check_labels(labels: pd.DataFrame, keys: Keys) -> None:
    """Refuse labels (columns context, perturbation) that would be misread, and contexts without controls."""
    for what in ("context", "perturbation"):
        _check_spelling(what, labels[what].unique(), keys.control)
    where = f"obs[{keys.perturbation_key!r}]"
    is_control = require_control(labels["perturbation"], keys.control, keys.perturbation_key)
    treated = [label for label in labels["perturbation"].unique() if label != keys.control]
    if not treated:
        problem = f"only {keys.control!r} in {where}"
        raise LabelError("perturbed cells beside the controls", problem, "check perturbation_key")
    unknown = [label for label in keys.singles if label not in treated]
    if unknown:
        fix = f"name labels of the screen ({did_you_mean(unknown[0], treated)})"
        raise LabelError(f"singles among the labels of {where}", repr(unknown[0]), fix)
    _check_combinations(treated, keys)
    lacking = sorted(set(labels["context"]) - set(labels["context"][is_control]))
    if lacking:
        problem = f"none in {len(lacking)} of them, such as {lacking[0]!r}"
        fix = "drop these contexts, or choose a context_key whose labels all have controls"
        raise LabelError(f"control cells {keys.control!r} in every context", problem, fix)


def _check_spelling(what: str, labels: Sequence[str], control: str) -> None:
    """No blanks around labels, no invisible characters, no written-out missing values, one spelling of each."""
    seen: dict[str, str] = {}
    for label in labels:
        if label != label.strip():
            fix = "strip the labels: obs[key] = obs[key].str.strip()"
            raise LabelError(f"{what} labels without blanks around them", ascii(label), fix)
        if label.lower() in _MISSING and label != control:
            fix = "label or drop these cells"
            raise LabelError(f"a {what} for every cell", f"the label {label!r}", fix)
        if not label.isprintable():
            fix = "write them with letters, signs and plain blanks: obs[key] = obs[key].replace({...})"
            raise LabelError(f"{what} labels of visible characters", ascii(label), fix)
        folded = " ".join(unicodedata.normalize("NFKC", label).casefold().split())
        twin = seen.setdefault(folded, label)
        if twin != label:
            show = repr if twin.casefold() == label.casefold() else ascii
            both = f"{show(twin)} and {show(label)}"
            fix = "write both alike, or name them apart: obs[key] = obs[key].replace({...})"
            raise LabelError(f"one spelling of each {what} label", both, fix)


def _check_combinations(treated: list[str], keys: Keys) -> None:
    """Combinations name no control and are each written in one order."""
    labels, control = {*treated, keys.control}, keys.control
    seen: dict[tuple, str] = {}
    for label in treated:
        parts = [part.strip() for part in label.split("+")]
        named = [part for part in dict.fromkeys(parts) if part]
        if label in keys.singles or len(parts) < 2:
            continue
        if control in named:
            alone = "+".join(part for part in named if part != control)
            raise LabelError("combinations of perturbations", f"{label!r}", f"write {alone!r}")
        if named and set(named) <= labels and label != "+".join(named):
            fix = f"write {'+'.join(named)!r}, or pass singles=[{label!r}]"
            raise LabelError("a perturbation, or a combination written 'A+B'", f"{label!r}", fix)
        twin = seen.setdefault(tuple(sorted(named if labels.intersection(named) else parts)), label)
        if twin != label:
            fix = "write each combination in one order"
            raise LabelError("one label per combination", f"{twin!r} and {label!r}", fix)


def _check_block(adata: AnnData, layer: str | None, block, rows: np.ndarray, first_gene: int = 0) -> None:
    where = _where(layer)
    if sparse.issparse(block):
        _check_structure(block, where)
    values = block.data if sparse.issparse(block) else block
    describe = partial(_describe, adata, block, rows, first_gene)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        problem = describe(lambda v: ~np.isfinite(v))
        raise DataError(f"finite counts in {where}", problem, "drop or repair these cells")
    if values.dtype.kind != "u" and (values < 0).any():
        problem = f"negative values: {describe(lambda v: v < 0)}; scaled or corrected data"
        fix = f"pass the raw counts{_elsewhere(adata, layer)}"
        raise DataError(f"counts of at least 0 in {where}", problem, fix)
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        guess, advice = _guess(block, values)
        problem = f"{describe(lambda v: v != np.rint(v))}; {guess}"
        fix = f"pass the raw counts{_elsewhere(adata, layer)}{advice}"
        raise DataError(f"whole numbers in {where}", problem, fix)
    if values.size and values.max() > LARGEST_COUNT:
        problem = describe(lambda v: v > LARGEST_COUNT)
        fix = f"pass counts of molecules or reads{_elsewhere(adata, layer)}"
        raise DataError(f"counts of at most {LARGEST_COUNT:,} in {where}", problem, fix)


def _check_structure(block, where: str) -> None:
    """Refuse a sparse matrix whose indices point outside its genes or cells, or whose pointers do not rise."""
    by_cells = block.format == "csr"
    n_pointed, n_others = block.shape if by_cells else block.shape[::-1]
    low, high = (block.indices.min(), block.indices.max()) if len(block.indices) else (0, 0)
    ends, stored = block.indptr, min(len(block.data), len(block.indices))
    outside = low < 0 or high >= n_others
    if (
        outside
        or len(ends) != n_pointed + 1
        or ends[0] != 0
        or (np.diff(ends) < 0).any()
        or ends[-1] > stored
    ):
        what = "gene" if by_cells else "cell"
        problem = f"the {what} index {low if low < 0 else high}" if outside else "row pointers that fall"
        fix = "the file is damaged, or its shape was cut: make it again from its source"
        raise DataError(f"{what} indices of 0 to {n_others - 1} in {where}", problem, fix)


def _describe(adata: AnnData, block, rows: np.ndarray, first_gene: int, bad: Callable) -> str:
    """How many values are bad, and the first one with its cell and gene."""
    entries = sparse.coo_matrix(block)  # no zero is bad
    mask = bad(entries.data)
    first = int(np.flatnonzero(mask)[0])
    row, column, value = entries.row[first], entries.col[first], entries.data[first]
    cell, gene = adata.obs_names[rows[row]], adata.var_names[first_gene + column]
    return f"{value:g} in cell {cell!r}, gene {gene!r} ({counted(mask.sum(), 'such value')})"


def _guess(block, values: np.ndarray) -> tuple[str, str]:
    """What values that are not whole probably are, and what else can be done about it."""
    rounded = np.rint(values)
    if (np.abs(values - rounded) < 1e-3 + 1e-6 * values).all():
        advice = "; or round these: adata.X = adata.X.round()"
        return "they are whole but for rounding, as after undoing a logarithm", advice
    sums = cell_sums(block)
    if len(sums) > 1 and np.ptp(sums) <= 1e-3 * sums.mean():
        return f"it looks normalised to {sums.mean():.4g} per cell", ""
    rows = sparse.coo_matrix(block)
    worst = np.bincount(rows.row[rows.data != np.rint(rows.data)]).argmax()
    cell = rows.data[rows.row == worst].astype(float)
    for what, undone in (
        ("normalised by a factor per cell", cell),
        ("log-normalised", np.expm1(np.minimum(cell, 50))),
        ("log2-normalised", np.exp2(np.minimum(cell, 50)) - 1),
    ):
        steps = undone / undone.min()  # whole where the smallest count is 1
        if len(cell) > 2 and 1 < steps.max() < 1e6 and np.abs(steps - np.rint(steps)).max() < 0.02:
            return f"it looks {what}", ""
    whole = float((values == rounded)[values > 0].mean())
    if values.max() < 30 and not whole > 0.2:  # log1p of any count below 10^13
        return "it looks log-normalised, or corrected", ""
    advice = "; fractions of counts may be rounded: adata.X = adata.X.round()"
    return (
        f"it looks corrected or averaged ({whole:.0%} are whole): alevin, SoupX and CellBender do that",
        advice,
    )


def _elsewhere(adata: AnnData, layer: str | None) -> str:
    """Another slot that seems to hold raw counts, as the end of a sentence."""
    for name in (None, *adata.layers):
        if name == layer or (name is None and adata.X is None):
            continue
        _, block = next(count_blocks(adata, name, size=64))
        if looks_raw(block):
            return f", layer={name!r} seems to hold them"
    in_raw = adata.raw is not None and looks_raw(adata.raw.X[:64])
    return f" with layer=...{'; adata.raw has whole numbers: try adata.raw.to_adata()' if in_raw else ''}"


def looks_raw(block) -> bool:
    """Whether all values of a block are whole and none is negative."""
    values = block.data if sparse.issparse(block) else np.asarray(block)
    numbers = values.size and values.dtype.kind in "biuf"
    return bool(numbers and (values >= 0).all() and (values == np.rint(values)).all())
