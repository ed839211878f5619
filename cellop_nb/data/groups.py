"""Groups of latents: perturbed cells per (context, perturbation), with the controls of the same context."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from ..errors import DataError, did_you_mean, three_beats
from .draws import Draws, GroupSample
from .matrices import sent
from .slots import context_labels, obs_labels, require_control
from .splits import rows_of

logger = logging.getLogger("cellop_nb")


@dataclass(frozen=True)
class Group:
    """The perturbed cells of one (context, perturbation, dose).

    Attributes
    ----------
    cells : Tensor
        Latents, (cell, d) float32.
    index : ndarray
        Rows of the cells in the AnnData object, (cell,).
    label : str
        "context, perturbation", with the dose where several were measured.
    """

    context: str
    perturbation: str
    dose: float
    cells: Tensor = field(repr=False)
    index: np.ndarray = field(repr=False)
    label: str

    def __len__(self) -> int:
        return len(self.index)


class Groups(Sequence):
    """All (context, perturbation) groups of a screen, ready to be sampled.

    Attributes
    ----------
    control : dict
        Control latents per context, (cell, d) float32.
    control_index : dict
        Rows of these controls in the AnnData object, (cell,).
    items : list of Group
        The perturbed groups.
    dropped : DataFrame
        Groups that were left out because they have too few cells.
    pool : Tensor
        All control and perturbed latents, (cell, d). Those of `control` and `items` are views of it: there is one copy.
    """

    def __init__(
        self,
        control: dict[str, Tensor],
        items: list[Group],
        *,
        control_index: dict[str, np.ndarray] | None = None,
        dropped: pd.DataFrame | None = None,
        pool: Tensor | None = None,
    ) -> None:
        sizes = [*(len(z) for z in control.values()), *(len(group) for group in items)]
        self.pool = (
            torch.cat([*control.values(), *(group.cells for group in items)]) if pool is None else pool
        )
        cells = self.pool.split(sizes)
        self.control = dict(zip(control, cells, strict=False))
        self.items = [replace(g, cells=z) for g, z in zip(items, cells[len(control) :], strict=True)]
        self.control_index = control_index or {name: np.arange(len(z)) for name, z in control.items()}
        self.dropped = _dropped([]) if dropped is None else dropped
        starts = [0, *accumulate(sizes)]
        contexts = {name: place for place, name in enumerate(control)}
        sources = [contexts[group.context] for group in items]
        targets = range(len(control), len(sizes))
        # The controls of every group first, then its perturbed cells.
        sets = (*sources, *targets)
        self._draws = Draws([sizes[k] for k in sets], [starts[k] for k in sets])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position):
        return self.items[position]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.items)

    def __repr__(self) -> str:
        cells = sum(len(group) for group in self.items)
        return f"Groups({len(self)} groups of {cells} cells, {len(self.control)} contexts, d={self.dim})"

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False)

    @property
    def dim(self) -> int:
        """Latent dimension d."""
        return self.pool.shape[1]

    @property
    def labels(self) -> list[str]:
        """Label of each group, "context, perturbation"."""
        return [group.label for group in self.items]

    @property
    def contexts(self) -> list[str]:
        """The contexts that have controls."""
        return list(self.control)

    @property
    def perturbations(self) -> list[str]:
        """The perturbations, in order of first appearance."""
        return list(dict.fromkeys(group.perturbation for group in self.items))

    def table(self) -> pd.DataFrame:
        """One row per group: context, perturbation, dose, perturbed cells and control cells."""
        columns = ["context", "perturbation", "dose", "cells", "controls"]
        rows = [(g.context, g.perturbation, g.dose, len(g), len(self.control[g.context])) for g in self.items]
        return pd.DataFrame(rows, columns=columns)

    def to(self, device: torch.device | str) -> Groups:
        """The same groups on another device; these where they are there already."""
        pool = self.pool.to(device)
        if pool is self.pool:
            return self
        return Groups(
            self.control, self.items, control_index=self.control_index, dropped=self.dropped, pool=pool
        )

    def sample(
        self,
        n_cells: int | None = None,
        generator: torch.Generator | None = None,
        which: Sequence[int] | None = None,
    ) -> GroupSample:
        """Draw cells of both sides of several groups, without replacement inside a draw.

        Parameters
        ----------
        n_cells
            Cells per side and group, all where a side has fewer; None takes all cells in their order.
        generator
            Source of the draw; equal states give equal cells.
        which
            Positions of the groups; None for all.

        Returns
        -------
        GroupSample
        """
        chosen = [int(k) for k in (range(len(self)) if which is None else which)]
        rows, sizes = self._draws.draw([*chosen, *(k + len(self) for k in chosen)], n_cells, generator)
        cut = sum(sizes[: len(chosen)])
        rows = sent(rows, self.pool.device)
        return GroupSample(
            control=self.pool.index_select(0, rows[:cut]),
            perturbed=self.pool.index_select(0, rows[cut:]),
            control_sizes=sizes[: len(chosen)],
            perturbed_sizes=sizes[len(chosen) :],
            which=chosen,
            control_rows=rows[:cut],
            perturbed_rows=rows[cut:],
        )


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
    return Groups(control_cells, items, control_index=control_index, dropped=_dropped(small), pool=pool)


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


def _dropped(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["context", "perturbation", "cells"])


def _group_label(context: str, perturbation: str, dose: float, several_doses: bool) -> str:
    return f"{context}, {perturbation}" + (f" @ {dose:g}" if several_doses else "")
