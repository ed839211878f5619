"""The held-out groups of a hold-out, as its metrics see them: predicted, real and control cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.contract import context_labels, obs_labels
from .holdout import Holdout
from .library import measured_totals


@dataclass(frozen=True, eq=False)
class Sides:
    """One held-out group in the space of its metrics: cells (cell, gene) in log1p-CP10k, their counts, and their
    libraries (cell,) where genes were left out."""

    context: str
    perturbation: str
    fits: list[np.ndarray] = field(repr=False)
    fit_counts: list = field(repr=False)
    real: np.ndarray = field(repr=False)
    real_counts: Any = field(repr=False)
    control: np.ndarray = field(repr=False)
    fit_libraries: list[np.ndarray] | None = field(default=None, repr=False)
    real_library: np.ndarray | None = field(default=None, repr=False)

    @property
    def group(self) -> str:
        return f"{self.context}, {self.perturbation}"


def sides_of(result: Holdout, layer, perturbation_key: str, context_key) -> Iterator[Sides]:
    """The groups of a hold-out that were predicted, one after the other."""
    space = result.space

    def rows(adata, context: str, perturbation: str | None = None) -> np.ndarray:
        inside = (context_labels(adata, context_key) == context).to_numpy()
        if perturbation is not None:
            inside = inside & (obs_labels(adata, perturbation_key) == perturbation).to_numpy()
        return np.flatnonzero(inside)

    groups = result.table[["context", "perturbation"]].drop_duplicates()
    for context, perturbation in groups.itertuples(index=False, name=None):
        predicted = result.predictions[rows(result.predictions, context, perturbation)]
        if not predicted.n_obs:
            continue  # its reason stands in the table
        members = [predicted[predicted.obs["fit"] == fit] for fit in predicted.obs["fit"].unique()]
        parts = [space.select(member) for member in members]
        libraries = [measured_totals(member) for member in members]
        here = result.real[rows(result.real, context, perturbation)]
        real = space.select(here, layer)
        control = space.select(result.control[rows(result.control, context)], layer)
        cells = [space.transform(part) for part in parts]
        sides = (cells, parts, space.transform(real), real, space.transform(control))
        totals = (None if libraries[0] is None else libraries, measured_totals(here))
        yield Sides(context, perturbation, *sides, *totals)
