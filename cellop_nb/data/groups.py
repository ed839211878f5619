"""Groups of latents: perturbed cells per (context, perturbation), with the controls of the same context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .draws import Draws, GroupSample
from .matrices import sent


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
        self.dropped = dropped_table([]) if dropped is None else dropped
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


def dropped_table(rows: list[tuple]) -> pd.DataFrame:
    """Groups (context, perturbation, cells) that were left out."""
    return pd.DataFrame(rows, columns=["context", "perturbation", "cells"])
