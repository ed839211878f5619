"""Train, validation and test cells, with hold-outs that can neither match nothing nor leak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from ..display import SplitTable
from ..errors import HoldoutError, LabelError, checked, counted, did_you_mean
from .contract import keys_of, label_table, obs_labels, require_control

SPLITS = ("train", "val", "test")
SPLIT_KEY = "split"
"""Column of ``obs`` that :func:`split` writes and all else reads."""


@checked
def split(
    adata: AnnData,
    *,
    holdout: Mapping[str, object] | str | Path | None = None,
    test_fraction: float = 0.1,
    val_fraction: float = 0.1,
    holdout_controls: bool = False,
    seed: int = 0,
) -> pd.DataFrame:
    """Assign every cell to train, val or test, by a rule or as a file says.

    ``adata.obs["split"].to_csv("split.csv")`` writes a split for others, ``split(adata, holdout="split.csv")`` reads it.

    Parameters
    ----------
    adata
        A screen that was set up (:func:`cellop_nb.setup`).
    holdout
        Column of `obs` to value or list of values; a cell is held out if it matches all of them:
        ``{"cell_type": "B", "perturbation": "IFNb"}``, ``{"donor": "d1"}``, ``{"perturbation": ["A", "B"]}``.
        None holds out random cells of every group. A path: a CSV of cell names and their split, which then decides
        alone; cells of the file that are not here are ignored.
    test_fraction
        Share of each (context, perturbation) group that becomes test when `holdout` is None.
    val_fraction
        Share of the cells outside test that becomes val, drawn inside each (context, perturbation) group.
    holdout_controls
        Also hold out the control cells that match. By default they stay, since predictions start from them;
        they are held out anyway where `holdout` names the control label itself.

    Returns
    -------
    DataFrame
        Cells per (context, perturbation) group and split. Writes ``obs["split"]`` (train, val, test) and
        `uns["cellop_nb"]["split"]` (how it was made).

    Raises
    ------
    LabelError
        If the data were not set up, or a column or value of `holdout` is unknown.
    HoldoutError
        If the hold-out matches no perturbed cell, leaks into training, or leaves nothing to learn from.
    """
    keys = keys_of(adata)
    labels = label_table(adata, replace(keys, dose_key=None))
    is_control = require_control(labels["perturbation"], keys.control, keys.perturbation_key)
    _check_fractions(test_fraction if holdout is None else 0.0, val_fraction)
    rng = np.random.default_rng(seed)
    if isinstance(holdout, (str, Path)):
        assigned = _read(adata, holdout)
        _refuse_bad_holdout(adata, labels, assigned == "test", is_control, {"file": str(holdout)})
        return _write(adata, labels, assigned, {"control": keys.control, "file": str(holdout)})
    if holdout is None:
        test = _random_share(labels, np.ones(len(labels), dtype=bool), test_fraction, rng)
    else:
        named = keys.control in _values(holdout.get(keys.perturbation_key, ()))
        test = _matches(adata, holdout) & (~is_control | named | holdout_controls)
        _refuse_bad_holdout(adata, labels, test, is_control, holdout)
    val = _random_share(labels, ~test, val_fraction, rng)
    assigned = np.select([test, val], ["test", "val"], "train")
    about = {"seed": int(seed), "val_fraction": float(val_fraction), "control": keys.control}
    about["holdout"] = {
        key: [str(value) for value in _values(chosen)] for key, chosen in (holdout or {}).items()
    }
    return _write(adata, labels, assigned, about)


def _write(adata: AnnData, labels: pd.DataFrame, assigned: np.ndarray, about: dict) -> pd.DataFrame:
    """Keep the split of each cell and how it was made; the table of groups."""
    adata.obs[SPLIT_KEY] = pd.Categorical(assigned, categories=list(SPLITS))
    adata.uns.setdefault("cellop_nb", {})["split"] = about
    groups = labels.assign(split=assigned).groupby(["context", "perturbation", "split"])
    table = groups.size().unstack(fill_value=0).reindex(columns=list(SPLITS), fill_value=0)
    return SplitTable(table.rename_axis(columns=None).reset_index())


def _read(adata: AnnData, file: str | Path) -> np.ndarray:
    """The split of each cell (cell,), from a CSV whose first column is the name of the cell."""
    table = pd.read_csv(file, index_col=0, dtype=str, keep_default_na=False)
    column = SPLIT_KEY if SPLIT_KEY in table else table.columns[-1] if len(table.columns) else None
    if column is None or not table.index.is_unique:
        problem = "one column alone" if column is None else "names that repeat"
        fix = 'write it with adata.obs["split"].to_csv(file)'
        raise HoldoutError(f"cell names and their split in {str(file)!r}", problem, fix)
    names = pd.Index(adata.obs_names)
    missing = names[~names.isin(table.index)]
    if len(missing):
        problem = f"{counted(len(missing), 'cell')} without one, such as {missing[0]!r}"
        fix = f"use the cell names of the file, such as {str(table.index[0])!r}, or drop these cells"
        raise HoldoutError(f"a split of every cell in {str(file)!r}", problem, fix)
    assigned = table[column].reindex(names).to_numpy(dtype=str)
    unknown = sorted({*assigned} - {*SPLITS})
    if unknown:
        fix = "rename them in the file"
        raise HoldoutError(f"splits named {SPLITS}", repr(unknown[0]), fix)
    return assigned


def split_labels(adata: AnnData) -> pd.Series:
    """The split of each cell, (cell,) strings; refuses a column that says something else than train, val and test."""
    labels = obs_labels(adata, SPLIT_KEY)
    other = [label for label in labels.unique() if label not in SPLITS]
    if other:
        fix = "run cellop_nb.split(adata, ...), or rename the column where it means something else"
        raise LabelError(f"train, val or test in obs[{SPLIT_KEY!r}]", repr(other[0]), fix)
    return labels


def outside_test(adata: AnnData) -> np.ndarray:
    """Mask of the cells that may train, (cell,): all where the data have no split."""
    if SPLIT_KEY not in adata.obs:
        return np.ones(adata.n_obs, dtype=bool)
    mask = (split_labels(adata) != "test").to_numpy()
    if not mask.any():
        fix = "run cellop_nb.split(adata, ...), or delete the column"
        raise HoldoutError("cells outside the test split", "all cells in it", fix)
    return mask


def rows_of(adata: AnnData, name: str | Sequence[str]) -> np.ndarray:
    """Rows of the cells in a split (or several), (cell,) ascending; refuses data without it."""
    if SPLIT_KEY not in adata.obs:
        fix = "run cellop_nb.split(adata, ...) first"
        raise LabelError(f"a column {SPLIT_KEY!r} in obs", "cells without a split", fix)
    labels = split_labels(adata)
    for one in _values(name):
        if one not in set(labels):
            fix = f"run split(adata, ...) or name another one ({did_you_mean(one, labels.unique())})"
            raise LabelError(f"cells of split {one!r} in obs[{SPLIT_KEY!r}]", "none", fix)
    return np.flatnonzero(labels.isin(_values(name)))


def _values(labels: object) -> list:
    """One value or several, as a list."""
    if isinstance(labels, (list, tuple, set, np.ndarray, pd.Index, pd.Series)):
        return list(labels)
    return [labels]


def _check_fractions(test_fraction: float, val_fraction: float) -> None:
    for name, share in {"test_fraction": test_fraction, "val_fraction": val_fraction}.items():
        if not 0 <= share < 1:
            raise HoldoutError(f"{name} in [0, 1)", f"{share}", "pass a share of the cells, such as 0.1")
    if test_fraction + val_fraction >= 1:
        problem = f"test_fraction {test_fraction} and val_fraction {val_fraction}"
        raise HoldoutError("some cells left for training", problem, "lower one of them")


def _random_share(
    labels: pd.DataFrame, among: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Mask of about `share` of the cells of each group, (cell,); a group of two or more keeps one outside."""
    order = rng.permutation(len(labels))
    order = order[among[order]]
    groups = labels.iloc[order].groupby(["context", "perturbation"])
    rank, size = groups.cumcount().to_numpy(), groups["context"].transform("size").to_numpy()
    n_test = np.minimum(np.floor(size * share + 0.5), size - 1)
    mask: np.ndarray = np.zeros(len(labels), dtype=bool)
    mask[order[rank < n_test]] = True
    return mask


def _matches(adata: AnnData, holdout: Mapping[str, object]) -> np.ndarray:
    """Cells that match every entry of the hold-out, (cell,)."""
    if not holdout:
        fix = "name a column and value, or pass holdout=None for random cells"
        raise HoldoutError("a hold-out that names something", "an empty one", fix)
    mask = np.ones(adata.n_obs, dtype=bool)
    for key, chosen in holdout.items():
        labels = obs_labels(adata, key)
        column, values = set(labels), [str(value) for value in _values(chosen)]
        for value in values:
            if value not in column:
                fix = f"name a label that exists ({did_you_mean(value, labels.unique())})"
                raise LabelError(f"{value!r} among the labels of obs[{key!r}]", "no such cell", fix)
        mask &= labels.isin(values).to_numpy()
    return mask


def _refuse_bad_holdout(
    adata: AnnData, labels: pd.DataFrame, test: np.ndarray, is_control: np.ndarray, holdout: Mapping
) -> None:
    """Refuse hold-outs without perturbed cells, without anything left to learn, or that leak."""
    perturbed = ~is_control
    if not (test & perturbed).any():
        fix = "check that this combination was measured (cellop_nb.setup(adata) shows the groups)"
        raise HoldoutError("a hold-out with perturbed cells", f"none match {dict(holdout)}", fix)
    if not (perturbed & ~test).any():
        problem = f"all {int(perturbed.sum())} perturbed cells held out by {dict(holdout)}"
        raise HoldoutError("perturbed cells left for training", problem, "hold out fewer groups")
    lost = set(labels["context"][test]) - set(labels["context"][is_control & ~test])
    if lost:
        problem = f"no control cells outside test in {sorted(lost)[:3]}"
        fix = "keep the controls (holdout_controls=False)"
        raise HoldoutError("controls from which test groups can be predicted", problem, fix)
    _refuse_reordered(labels, test, holdout)
    _refuse_repeated_cells(adata, test)


def _refuse_reordered(labels: pd.DataFrame, test: np.ndarray, holdout: Mapping) -> None:
    """A held-out A+B may not stay in training as B+A, in the same context."""
    unordered = labels["perturbation"].map(
        {label: "+".join(sorted(label.split("+"))) for label in labels["perturbation"].unique()}
    )
    names = labels["context"] + "\0" + labels["perturbation"]
    same = labels["context"] + "\0" + unordered
    leak = ~test & same.isin(set(same[test])).to_numpy() & ~names.isin(set(names[test])).to_numpy()
    if leak.any():
        problem = f"{labels['perturbation'][leak].iloc[0]!r}, the same combination, in training"
        raise HoldoutError(f"no leak of {dict(holdout)}", problem, "write combinations in one order")


def _refuse_repeated_cells(adata: AnnData, test: np.ndarray) -> None:
    """A cell name that occurs twice could sit on both sides."""
    names = pd.Index(adata.obs_names)
    leaked = names[test].intersection(names[~test])
    if len(leaked):
        problem = f"{counted(len(leaked), 'cell name')} on both sides, such as {leaked[0]!r}"
        raise HoldoutError("no leak", problem, "run adata.obs_names_make_unique() or drop repeats")
