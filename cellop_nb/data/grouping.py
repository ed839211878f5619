"""The groups of a screen: cells by (context, perturbation[, dose]), with the controls of the same context."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from ..errors import DataError, did_you_mean, three_beats
from .groups import Group, Groups, dropped_table
from .slots import context_labels, obs_labels, require_control
from .splits import rows_of

logger = logging.getLogger("cellop_nb")


def groups(
    adata: AnnData,
    *,
    use_rep: str | np.ndarray = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    dose_key: str | None = None,
    split: str | Sequence[str] | None = None,
    split_key: str = "split",
    control_split: str | Sequence[str] | None = None,
    min_cells: int = 2,
) -> Groups:
    """Group cells by (context, perturbation[, dose]) and match the controls of the same context.

    Parameters
    ----------
    use_rep
        Key of `obsm`, or an array (cell, d).
    split
        Use only the cells of this split (or these); None for all.
    control_split
        Where the controls come from; by default the same split. A test group whose context has too few
        controls there (they were not held out with it) starts from all controls of its context.
    min_cells
        Smaller groups are left out and listed in `Groups.dropped`.

    Returns
    -------
    Groups

    Raises
    ------
    LabelError
        If a key or the control label is unknown.
    DataError
        If the representation is missing or not finite, a context has no controls, or no group is left.
    """
    z = _representation(adata, use_rep)
    labels = _label_table(adata, perturbation_key, context_key, dose_key)
    inside = _inside(adata, split, split_key)
    usable = inside if control_split is None else _inside(adata, control_split, split_key)
    reserve = np.ones(adata.n_obs, dtype=bool) if split == "test" and control_split is None else usable
    is_control = require_control(labels["perturbation"], control, perturbation_key)
    chosen = labels[inside & ~is_control]
    grouped = chosen.groupby(["context", "perturbation", "dose"]).row
    members = {key: rows.to_numpy(copy=True) for key, rows in grouped}  # pandas 3 lends its own, read-only
    kept = {key: rows for key, rows in members.items() if len(rows) >= min_cells}
    small = [(*key[:2], len(rows)) for key, rows in members.items() if key not in kept]
    if small:
        logger.warning(
            "%d groups have fewer than %d cells and are left out: %s", len(small), min_cells, small[:5]
        )
    if not kept:
        found = f"{len(members)} groups, none with {min_cells} cells"
        fix = "check the split and the control label, or lower min_cells"
        raise DataError(three_beats("at least one perturbed group", found, fix))
    control_index = {}
    for context in dict.fromkeys(key[0] for key in kept):
        here = is_control & (labels["context"] == context).to_numpy()
        control_index[context] = _controls(here & usable, here & reserve, context, min_cells)
    several = {key[:2] for key in kept if sum(other[:2] == key[:2] for other in kept) > 1}
    pool = z[np.concatenate([*control_index.values(), *kept.values()])]
    cells = pool.split([len(rows) for rows in (*control_index.values(), *kept.values())])
    items = [
        Group(context, name, dose, part, rows, _group_label(context, name, dose, (context, name) in several))
        for ((context, name, dose), rows), part in zip(kept.items(), cells[len(control_index) :], strict=True)
    ]
    control_cells = dict(zip(control_index, cells, strict=False))
    return Groups(control_cells, items, control_index=control_index, dropped=dropped_table(small), pool=pool)


def _representation(adata: AnnData, use_rep: str | np.ndarray) -> Tensor:
    if isinstance(use_rep, str):
        if use_rep not in adata.obsm:
            fix = f"embed the cells first, or name another key ({did_you_mean(use_rep, adata.obsm)})"
            raise DataError(three_beats(f"obsm[{use_rep!r}]", "no such key", fix))
        use_rep = adata.obsm[use_rep]
    z = np.asarray(use_rep, dtype=np.float32)
    if z.ndim != 2 or len(z) != adata.n_obs:
        fix = "pass one row per cell"
        raise DataError(three_beats(f"a representation of shape ({adata.n_obs}, d)", f"shape {z.shape}", fix))
    broken = ~np.isfinite(z).all(axis=1)
    if broken.any():
        found = f"{int(broken.sum())} cells with NaN or infinity, such as {adata.obs_names[broken][0]!r}"
        raise DataError(
            three_beats("finite latents", found, "embed the cells again with a model that is finite")
        )
    return torch.from_numpy(z)


def _label_table(adata: AnnData, perturbation_key, context_key, dose_key) -> pd.DataFrame:
    perturbation = obs_labels(adata, perturbation_key)
    dose = 1.0 if dose_key is None else obs_labels(adata, dose_key).astype(float).to_numpy()
    context = context_labels(adata, context_key).to_numpy()
    table = {"context": context, "perturbation": perturbation.to_numpy(), "dose": dose}
    return pd.DataFrame(table).assign(row=np.arange(adata.n_obs))


def _inside(adata: AnnData, split: str | Sequence[str] | None, split_key: str) -> np.ndarray:
    """Mask of the cells in the split, (cell,)."""
    if split is None:
        return np.ones(adata.n_obs, dtype=bool)
    mask = np.zeros(adata.n_obs, dtype=bool)
    mask[rows_of(adata, split, split_key=split_key)] = True
    return mask


def _controls(preferred: np.ndarray, reserve: np.ndarray, context: str, min_cells: int) -> np.ndarray:
    """Rows of a context's controls, from the reserve where too few are preferred."""
    rows = np.flatnonzero(preferred)
    rows = rows if len(rows) >= min_cells else np.flatnonzero(reserve)
    if len(rows) < min_cells:
        found = f"{len(rows)} in context {context!r}"
        fix = "leave this context out, merge it with another, or measure its controls"
        raise DataError(three_beats(f"at least {min_cells} control cells in every context", found, fix))
    return rows


def _group_label(context: str, perturbation: str, dose: float, several_doses: bool) -> str:
    return f"{context}, {perturbation}" + (f" @ {dose:g}" if several_doses else "")
