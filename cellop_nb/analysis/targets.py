"""What every method is given, the training cells and the group to predict, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from anndata import AnnData

from ..data.contract import context_labels, obs_labels
from ..errors import DataError, LabelError, did_you_mean, three_beats
from .formulas import Undefined
from .library import measured_totals
from .space import EvaluationSpace


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a method says about one group.

    Attributes
    ----------
    method : name shown in tables
    mean : (gene,) predicted mean in log1p-CP10k, or None where nothing could be predicted
    cells : (cell, gene) predicted cells in log1p-CP10k, or None for a method that predicts a mean only
    counts : (cell, gene) predicted counts, or None for a method that predicts no counts
    library : (cell,) predicted counts over all measured genes, where the table holds only some of them
    reason : why there is no prediction
    """

    method: str
    mean: np.ndarray | None = field(default=None, repr=False)
    cells: np.ndarray | None = field(default=None, repr=False)
    counts: Any = field(default=None, repr=False)
    library: np.ndarray | None = field(default=None, repr=False)
    reason: str = ""

    def __post_init__(self) -> None:
        for name in ("mean", "cells"):
            value = getattr(self, name)
            if value is not None and not np.isfinite(value).all():
                found = f"{int((~np.isfinite(value)).sum())} NaN or infinite values"
                fix = "find out where the model breaks; they are not replaced"
                raise DataError(three_beats(f"a finite {name} predicted by {self.method!r}", found, fix))

    @property
    def mean_only(self) -> bool:
        """Whether the method predicts a mean and no cells: metrics of clouds are then undefined."""
        return self.mean is not None and self.cells is None

    @classmethod
    def of_cells(cls, method: str, cells: np.ndarray, counts=None, library=None) -> Prediction:
        """From predicted cells (cell, gene) in log1p-CP10k."""
        return cls(method, np.asarray(cells).mean(axis=0, dtype=np.float64), cells, counts, library)

    @classmethod
    def of_counts(cls, method: str, counts, space: EvaluationSpace, library=None) -> Prediction:
        """From predicted counts (cell, gene) over the genes of `space`."""
        return cls.of_cells(method, space.transform(counts), counts, library)


@dataclass(frozen=True, eq=False)
class Screen:
    """Training cells as an array with their labels; `cells` may be log1p-CP10k or latents.

    Attributes
    ----------
    cells : (cell, gene)
    contexts, perturbations : (cell,) labels
    control : the label of unperturbed cells
    adata : the training cells themselves, for methods that need more
    """

    cells: np.ndarray = field(repr=False)
    contexts: np.ndarray = field(repr=False)
    perturbations: np.ndarray = field(repr=False)
    control: str = "control"
    adata: AnnData | None = field(default=None, repr=False)
    _means: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        adata: AnnData,
        cells: np.ndarray,
        *,
        perturbation_key: str = "perturbation",
        context_key: str | Sequence[str] | None = "cell_type",
        control: str = "control",
    ) -> Screen:
        """Label the rows of `cells` (cell, gene) by columns of `adata.obs`; an unknown control is refused."""
        perturbations = obs_labels(adata, perturbation_key).to_numpy()
        if control not in set(perturbations):
            hint = did_you_mean(control, np.unique(perturbations))
            found = f"no such label in obs[{perturbation_key!r}]"
            raise LabelError(
                three_beats(f"control cells labelled {control!r}", found, f"pass control=... ({hint})")
            )
        return cls(cells, context_labels(adata, context_key).to_numpy(), perturbations, control, adata)

    def rows(self, context: str, perturbation: str) -> np.ndarray:
        """(cell,) boolean mask of a group."""
        return (self.contexts == context) & (self.perturbations == perturbation)

    def mean(self, context: str, perturbation: str) -> np.ndarray:
        """(gene,) mean of a group; Undefined where it has no cells."""
        key = (context, perturbation)
        if key not in self._means:
            rows = self.rows(*key)
            if not rows.any():
                raise Undefined(f"no training cells of {perturbation!r} in {context!r}")
            self._means[key] = self.cells[rows].mean(axis=0, dtype=np.float64)
        return self._means[key]

    def shift(self, context: str, perturbation: str) -> np.ndarray:
        """(gene,) perturbed mean minus control mean inside one context."""
        return self.mean(context, perturbation) - self.mean(context, self.control)

    def measured(self) -> list[tuple[str, str]]:
        """Perturbed (context, perturbation) groups that also have controls, sorted."""
        groups = sorted(set(zip(self.contexts, self.perturbations, strict=True)))
        with_controls = {context for context, name in groups if name == self.control}
        return [(c, p) for c, p in groups if p != self.control and c in with_controls]

    def others(self, target: Target) -> list[str]:
        """Other contexts where the perturbation of `target` was measured; Undefined where there is none."""
        found = [c for c, p in self.measured() if p == target.perturbation and c != target.context]
        if not found:
            raise Undefined(f"no other training context has both {target.perturbation!r} and control cells")
        return found


@dataclass(frozen=True, eq=False)
class Target:
    """The group to predict, and the control cells to start from.

    Attributes
    ----------
    context, perturbation : labels of the group
    control : (cell, gene) control cells of that context in log1p-CP10k
    counts : (cell, gene) their counts, optional
    adata : the control cells themselves, for methods that need more
    space : the space in which `control` stands and predictions are scored
    """

    context: str
    perturbation: str
    control: np.ndarray = field(repr=False)
    counts: object = field(default=None, repr=False)
    adata: AnnData | None = field(default=None, repr=False)
    space: EvaluationSpace | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.control) == 0:
            raise Undefined(f"there are no control cells in {self.context!r} to start from")

    @property
    def library(self) -> np.ndarray | None:
        """(cell,) counts of the control cells over all measured genes; None where no gene was left out."""
        return None if self.adata is None else measured_totals(self.adata)


Baseline = Callable[[Screen, Target], Prediction]
