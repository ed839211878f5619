"""Mean response of every measured group, with its sampling noise: all that a plan needs to know of the cells."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from ..data.counts import TOTAL_KEY, CountMatrix, count_matrix
from ..data.groups import Groups
from ..models.operators import perturbation_parts
from .metrics import log1p_cp10k
from .plan import Measured


@dataclass(frozen=True, eq=False)
class Means:
    """Means of control cells and changes of measured groups, in log1p-CP10k (of all measured genes).

    Attributes
    ----------
    contexts : contexts with controls, in the order of `control`
    control : (context, gene) mean control cell
    pairs : measured (context, perturbation), in the order of `change`
    change, noise : (pair, gene) mean perturbed less mean control cell, and its sampling variance
    growth : (pair,) change of the log of the mean library
    shares : (gene,) mean share of the counts in control cells
    moved : what models that have not seen a pair's cells say of its change, (gene,), for the pairs that were judged
    """

    contexts: list[str]
    control: np.ndarray = field(repr=False)
    pairs: list[tuple[str, str]]
    change: np.ndarray = field(repr=False)
    noise: np.ndarray = field(repr=False)
    growth: np.ndarray = field(repr=False)
    shares: np.ndarray = field(repr=False)
    moved: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)

    _of: dict[str, list[int]] = field(init=False, repr=False)
    _row: dict[tuple[str, str], int] = field(init=False, repr=False)
    _context: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_perturbation = defaultdict(list)
        for k, (_, perturbation) in enumerate(self.pairs):
            by_perturbation[perturbation].append(k)
        object.__setattr__(self, "_of", dict(by_perturbation))
        object.__setattr__(self, "_row", {pair: k for k, pair in enumerate(self.pairs)})
        object.__setattr__(self, "_context", {context: k for k, context in enumerate(self.contexts)})

    @classmethod
    def of(cls, cells, groups: Groups) -> Means:
        """From counts of the modelled genes (:func:`~cellop_nb.analysis.predict.modelled_counts`) and their index.

        Doses of one perturbation in one context are pooled, each by its cells.
        """
        total = TOTAL_KEY if TOTAL_KEY in cells.obs else None
        matrix = cast(CountMatrix, count_matrix(cells, total_key=total))  # in memory, as a fit requires
        library = matrix.library.numpy().astype(np.float64)
        x = matrix.csr[:, : cells.n_vars]
        level = log1p_cp10k(x, library)
        (mean, control), (square, control_square) = groups.means(level), groups.means(level.power(2))
        size = np.array([len(group) for group in groups], dtype=float)
        n_control = np.array([len(rows) for rows in groups.control_rows.values()], dtype=float)
        log_library, log_control = (np.log(part[:, 0]) for part in groups.means(library[:, None]))
        context = {name: k for k, name in enumerate(groups.contexts)}
        rows = defaultdict(list)
        for k, group in enumerate(groups):
            rows[group.context, group.perturbation].append(k)
        pairs = list(rows)
        mixing = np.zeros((len(pairs), len(size)))
        for row, members in enumerate(rows.values()):
            mixing[row, members] = size[members] / size[members].sum()
        at = np.array([context[c] for c, _ in pairs])
        variance = _variance(mixing @ mean, mixing @ square, mixing @ size)
        control_variance = _variance(control, control_square, n_control)
        share = groups.means(x)[1] / groups.means(library[:, None])[1]
        return cls(
            groups.contexts,
            control,
            pairs,
            mixing @ mean - control[at],
            variance + control_variance[at],
            mixing @ log_library - log_control[at],
            share.mean(0),
        )

    def of_perturbation(self, perturbation: str, without: str | None = None) -> Measured:
        """What was measured of a perturbation, in all contexts but one."""
        rows = [k for k in self._of.get(perturbation, []) if self.pairs[k][0] != without]
        at = [self._context[self.pairs[k][0]] for k in rows]
        judged = [self.moved.get(self.pairs[k]) for k in rows]
        moved = None if not judged or any(row is None for row in judged) else np.stack(judged)
        names = tuple(self.pairs[k][0] for k in rows)
        return Measured(names, self.control[at], self.change[rows], self.noise[rows], moved)

    def own(self, context: str, perturbation: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Measured change and its noise, (gene,) each, of a group; None where it was not measured."""
        return self.change_of(context, perturbation) if (context, perturbation) in self._row else None

    def change_of(self, context: str, perturbation: str) -> tuple[np.ndarray, np.ndarray]:
        """Measured change and its noise, (gene,) each, of a group that was measured."""
        row = self._row[context, perturbation]
        return self.change[row], self.noise[row]

    def growth_of(self, context: str, perturbation: str) -> float:
        r"""By how much a perturbation changes the log of the mean library: measured here, else the mean over
        contexts; of a combination that was measured nowhere the sum over its parts.

        .. math:: g_{cp} = \log \bar l_{cp} - \log \bar l_{c0}
        """
        if (context, perturbation) in self._row:
            return float(self.growth[self._row[context, perturbation]])
        if perturbation in self._of:
            return float(self.growth[self._of[perturbation]].mean())
        parts = perturbation_parts(perturbation, self._of)
        return sum(self.growth_of(context, part) for part in parts) if len(parts) > 1 else 0.0


def _variance(mean: np.ndarray, square: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Sampling variance (row, gene) of means over `size` cells (row,)."""
    return np.maximum(square - mean**2, 0.0) / np.maximum(size - 1, 1)[:, None]
