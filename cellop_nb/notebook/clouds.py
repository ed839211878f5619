"""Which cells a question moves, which real cells they are compared with, and where both lie on the map."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..analysis.transport import noise_floor
from ..errors import DataError, three_beats
from ..models.energy import energy_distance, self_distance
from .questions import Question

MIN_REAL = 50
"""Held-out cells below which a moved cloud is compared with all cells of the group."""


class Memory(dict):
    """What earlier questions left behind."""

    def keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for each key."""
        if key not in self:
            self[key] = make()
        return self[key]


class Clouds:
    """The cells of a screen by context and perturbation, and their latents.

    Parameters
    ----------
    z
        (cell, d) latents.
    labels, contexts, split
        (cell,) perturbation, context and part of the split of each cell.
    control
        Label of the unperturbed cells.
    sizes
        Kind of work (``draw, energy, decode``) to the number of cells that it takes at most.
    seed
        Of every draw.
    memory
        Keeps what a move of the strength does not change.

    Attributes
    ----------
    plane
        (d, 2) orthonormal directions of the map: those of the largest mean responses. Fitted once.
    center
        (d,) mean of the control cells, the origin of the map.
    contexts
        Contexts with control cells.
    """

    def __init__(
        self, z: Tensor, labels: np.ndarray, contexts: np.ndarray, split: np.ndarray, *,
        control: str, sizes: dict[str, int], seed: int, memory: Memory,
    ):  # fmt: skip
        self.z, self.control, self.sizes, self.seed, self.memory = z, control, sizes, seed, memory
        # whole numbers: a million labels are compared in a millisecond, as strings in fifty
        self._codes, self._names = pd.factorize(labels, sort=True)
        self._places, self._context_names = pd.factorize(contexts)
        self._train, self._test = (split == part for part in ("train", "test"))
        self.contexts = sorted(set(contexts[labels == control]))
        if self.contexts:
            self._fit_plane()

    def measured(self, context: str) -> list[str]:
        """Perturbations, combinations included, of which there are cells in this context."""
        there = np.unique(self._codes[self._in(context)])
        return [name for name in self._names[there] if name != self.control]

    def sides(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the cells that are moved, and of the real cells that they should become.

        Raises
        ------
        DataError
            For a reversal where there are no perturbed cells to lead back.
        """
        control = self.rows(question.context, self.control)
        perturbed = self.rows(question.context, together(question.perturbation))
        if question.reverse and not len(perturbed):
            found = f"none of {question.perturbation!r} in {question.context!r}"
            raise DataError(
                three_beats("perturbed cells to lead back", found, "ask for a measured condition")
            )
        return (perturbed, control) if question.reverse else (control, perturbed)

    def rows(self, context: str, perturbation: str) -> np.ndarray:
        """Rows of a group: control cells all; perturbed cells those that no fit has seen, where there are enough."""

        def find() -> np.ndarray:
            inside = self.inside(context, perturbation)
            unseen = inside & self._test
            use = inside if perturbation == self.control or unseen.sum() < MIN_REAL else unseen
            return np.flatnonzero(use)

        return self.memory.keep(("rows", context, perturbation), find)

    def inside(self, context: str, perturbation: str) -> np.ndarray:
        """Which cells belong to a group, as booleans; "A+B" is "B+A"."""
        wanted = frozenset(perturbation.split("+"))
        same = [i for i, name in enumerate(self._names) if frozenset(str(name).split("+")) == wanted]
        return self._in(context) & np.isin(self._codes, same)

    def trained(self, context: str, perturbation: str) -> bool:
        """Whether training cells of this very group took part in the fit."""

        def find() -> bool:
            return bool((self.inside(context, perturbation) & self._train).any())

        return self.memory.keep(("trained", context, perturbation), find)

    def take(self, rows: np.ndarray, kind: str = "draw") -> np.ndarray:
        """At most as many of the rows as this kind of work takes, in random order (seeded)."""
        return np.random.default_rng(self.seed).permutation(rows)[: self.sizes[kind]]

    def latents(self, rows: np.ndarray, kind: str = "draw") -> Tensor:
        """Latents (cell, d) of the rows that :meth:`take` gives."""
        return self.memory.keep(("latents", kind, rows.tobytes()), lambda: self.z[self.take(rows, kind)])

    def still(self, rows: np.ndarray) -> np.ndarray:
        """(cell, 2) where the drawn cells of a group lie on the map, unmoved."""
        return self.memory.keep(("map", rows.tobytes()), lambda: self.on_map(self.latents(rows)))

    def energies(self, moved: Tensor, source: np.ndarray, target: np.ndarray):
        """Energy distance of moved and of unmoved cells to the real ones, floor, and how many cells a side."""
        moved = moved[: self.sizes["energy"]]
        if len(target) < 2:
            return float("nan"), float("nan"), float("nan"), len(moved), len(target)
        real = self.latents(target, "energy")

        def fixed():
            unmoved = self.latents(source, "energy")
            own = self_distance(real, [len(real)])
            return own, float(energy_distance(unmoved, real, y_self=own)), noise_floor(real, seed=self.seed)

        own, before, floor = self.memory.keep(("energy", source.tobytes(), target.tobytes()), fixed)
        return float(energy_distance(moved, real, y_self=own)), before, floor, len(moved), len(real)

    def _in(self, context: str) -> np.ndarray:
        """Which cells are of a context; none of one that the data do not hold."""
        return self._places == next((i for i, name in enumerate(self._context_names) if name == context), -2)

    # -- the map

    def on_map(self, cloud: Tensor) -> np.ndarray:
        """(cell, 2) where latents lie in the plane."""
        return (cloud - self.center).numpy() @ self.plane

    def _fit_plane(self) -> None:
        """The two directions in which the groups' means move most; what is missing comes from the control cells."""
        controls = {context: self.z[self.rows(context, self.control)] for context in self.contexts}
        every = torch.cat(list(controls.values()))
        self.center = every.mean(0)
        shifts = [
            self.z[rows].mean(0) - cells.mean(0)
            for context, cells in controls.items()
            for name in self._names
            if name != self.control and len(rows := self.rows(context, str(name)))
        ]
        spread = torch.linalg.svd(every - self.center, full_matrices=False)[2][:2]
        first = torch.linalg.svd(torch.stack(shifts), full_matrices=False)[2][:2] if shifts else spread[:0]
        self.plane = torch.linalg.qr(torch.cat([first, spread]).T)[0][:, :2].numpy()


def together(perturbation: str | tuple[str, ...]) -> str:
    """Nobody measures sequences: the nearest that there is are cells that got all of it at once."""
    if isinstance(perturbation, str):
        return perturbation
    return "+".join(dict.fromkeys(part for step in perturbation for part in step.split("+")))
