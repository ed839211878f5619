"""Mean response of every measured group, with its sampling noise: all that a plan needs to know of the cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import anndata as ad
import numpy as np
from scipy import sparse

from ..data.contract import JOINER
from ..data.counts import TOTAL_KEY, count_matrix
from ..data.groups import Groups
from ..models.operators import perturbation_parts
from .metrics import log1p_cp10k
from .plan import Measured, near_mean_shift

RANK = 64
"""Most rows that the changes of genes which are not modelled are kept in, however many groups were measured."""


@dataclass(frozen=True, eq=False)
class Factors:
    """An array (row, gene) as ``left @ right``, (row, rank) and (rank, gene); its rows are worked out when asked for."""

    left: np.ndarray
    right: np.ndarray

    def __getitem__(self, rows) -> np.ndarray:
        return self.left[rows].astype(np.float64) @ self.right


@dataclass(frozen=True, eq=False)
class Means:
    """Means of control cells and changes of measured groups, in log1p-CP10k (of all measured genes).

    Attributes
    ----------
    contexts : contexts with controls, in the order of `control`
    control : (context, gene) mean control cell
    pairs : measured (context, perturbation), in the order of `change`
    change, noise : (pair, gene) mean perturbed less mean control cell, and its sampling variance
    growth : (pair,) change of the log of the mean library; 0 where no library over all genes was recorded, since the sum
        of some genes changes with their response
    shares : (gene,) mean share of the counts in control cells
    n_factors : columns of which the labels of contexts are joined
    moved, corrected : what models that have not seen a pair's cells say of its change, (gene,), for the pairs that were
        judged
    missed : what the model that has seen a pair misses of its change, (gene,), by the operator that contexts share
    """

    contexts: list[str]
    control: np.ndarray = field(repr=False)
    pairs: list[tuple[str, str]]
    change: np.ndarray | Factors = field(repr=False)
    noise: np.ndarray | Factors = field(repr=False)
    growth: np.ndarray = field(repr=False)
    shares: np.ndarray = field(repr=False)
    moved: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)
    n_factors: int = 1
    corrected: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)
    missed: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)

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

        Doses of one perturbation in one context are pooled, by least squares: their column holds strengths
        (:class:`~cellop_nb.analysis.doses.DoseCurve`), and the change is that of strength 1.
        """
        library, x = _counts(cells)
        (mean, control), (variance, control_variance) = level_moments(cells, groups)
        size = np.array([len(group) for group in groups], dtype=float)
        log_library, log_control = (np.log(part[:, 0]) for part in groups.means(library[:, None]))
        context = {name: k for k, name in enumerate(groups.contexts)}
        rows = defaultdict(list)
        for k, group in enumerate(groups):
            rows[group.context, group.perturbation].append(k)
        pairs = list(rows)
        strength = np.array([group.dose for group in groups])
        weight = [
            size[k] * strength[k] / (size[k] @ np.square(strength[k])) for k in map(np.array, rows.values())
        ]
        start = np.cumsum([0, *map(len, rows.values())])
        mixing = sparse.csr_matrix((np.concatenate(weight), np.concatenate([*rows.values()]), start))
        of_control = np.asarray(mixing.sum(1))  # 1 where there is one dose, of strength 1
        at = np.array([context[c] for c, _ in pairs])
        share = groups.means(x)[1] / groups.means(library[:, None])[1]
        grown = mixing @ log_library - of_control[:, 0] * log_control[at]
        return cls(
            groups.contexts,
            control,
            pairs,
            mixing @ mean - of_control * control[at],
            mixing.power(2) @ variance + np.square(of_control) * control_variance[at],
            grown if TOTAL_KEY in cells.obs else np.zeros(len(pairs)),
            share.mean(0),
            n_factors=len(groups.keys.context_key or ("",)),
        )

    @classmethod
    def in_few_rows(cls, cells, groups: Groups, block: int = 1024) -> Means:
        """The same of many genes, block by block and without growth and shares.

        Changes of more than :data:`RANK` groups are kept in as many rows: the leading singular directions over groups (a
        randomised range finder with a power iteration). Noise is that of a group times that of a gene.

        References
        ----------
        Halko, Martinsson, Tropp (2011), SIAM Review 53:217.
        """

        by_gene = sparse.csc_matrix(cells.X)

        def parts() -> Iterator[Means]:
            for start in range(0, cells.n_vars, block):
                some = by_gene[:, start : start + block].tocsr()
                yield cls.of(ad.AnnData(some, obs=cells.obs, uns=cells.uns), groups)

        n_pairs, chance = len(groups.pairs), np.random.default_rng(0)
        basis = np.eye(n_pairs) if n_pairs <= RANK else np.zeros((n_pairs, 0))
        for _ in range(0 if n_pairs <= RANK else 2):
            sketch = np.zeros((n_pairs, RANK))
            for part in parts():
                change = part.change[:]
                towards = change.T @ basis if basis.size else chance.normal(size=(change.shape[1], RANK))
                sketch += change @ towards
            basis = np.linalg.qr(sketch)[0]
        control, right, noise, of_pair = [], [], [], np.zeros(n_pairs)
        for part in parts():
            control.append(part.control.astype(np.float32))
            right.append((basis.T @ part.change[:]).astype(np.float32))
            noise.append(part.noise[:].mean(0))
            of_pair += part.noise[:].sum(1)
        mean_noise = np.concatenate(noise).astype(np.float32)
        share = of_pair / max(float(of_pair.mean()), np.finfo(float).tiny)
        return cls(
            groups.contexts,
            np.concatenate(control, 1),
            groups.pairs,
            Factors(basis.astype(np.float32), np.concatenate(right, 1)),
            Factors(share.astype(np.float32)[:, None], mean_noise[None]),
            np.zeros(n_pairs),
            np.zeros(0),
            n_factors=len(groups.keys.context_key or ("",)),
        )

    @property
    def perturbations(self) -> Collection[str]:
        """What was measured in one context or more."""
        return self._of.keys()

    def of_perturbation(self, perturbation: str, without: str | None = None) -> Measured:
        """What was measured of a perturbation, in all contexts but one."""
        rows = [k for k in self._of.get(perturbation, []) if self.pairs[k][0] != without]
        at = [self._context[self.pairs[k][0]] for k in rows]
        judged = bool(rows) and all(self.pairs[k] in self.moved for k in rows)
        moved, corrected = (
            np.stack([by_pair[self.pairs[k]] for k in rows]) if judged else None
            for by_pair in (self.moved, self.corrected)
        )
        names = tuple(self.pairs[k][0] for k in rows)
        levels = tuple(tuple(name.split(JOINER)) for name in names) if self.n_factors > 1 and names else None
        return Measured(
            names, self.control[at], self.change[rows], self.noise[rows], moved, corrected, levels
        )

    def own(self, context: str, perturbation: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Measured change and its noise, (gene,) each, of a group; None where it was not measured."""
        return self.change_of(context, perturbation) if (context, perturbation) in self._row else None

    def change_of(self, context: str, perturbation: str) -> tuple[np.ndarray, np.ndarray]:
        """Measured change and its noise, (gene,) each, of a group that was measured."""
        row = self._row[context, perturbation]
        return self.change[row], self.noise[row]

    def correct(
        self,
        moved: np.ndarray,
        context: str,
        perturbation: str,
        target: np.ndarray,
        missed: Mapping[tuple[str, str], np.ndarray],
    ) -> np.ndarray:
        r"""Change (gene,) of moved cells, and what their model misses of contexts that it has seen, near ones first.

        .. math:: \hat d = m + \sum_c w_c (d_c - m_c), \quad w_c \propto \|\mu - \mu_c\|^{-p}

        with the changes m of the cells moved by one operator in all contexts, and the measured d: what the decoder, or a
        regularised operator, gets wrong in every context is mended.

        Parameters
        ----------
        moved, target
            (gene,) change of the target's moved cells, and its mean control cell.
        missed
            Measured less moved change, by (context, perturbation). What the `context` itself tells takes no part, and the
            change stays where no other one tells this perturbation.
        """
        told = [other for other in self.contexts if other != context and (other, perturbation) in missed]
        if not told:
            return moved
        control = self.control[[self._context[other] for other in told]]
        rows = np.stack([missed[other, perturbation] for other in told])
        return moved + near_mean_shift(control, rows, target).change

    def near(self, context: str, perturbation: str) -> tuple[np.ndarray, np.ndarray]:
        """Change of a measured perturbation and its noise, (gene,) each, in a context, else the mean over those where it
        was measured."""
        if (context, perturbation) in self._row:
            return self.change_of(context, perturbation)
        measured = self.of_perturbation(perturbation)
        return measured.change.mean(0), measured.noise.mean(0) / len(measured)

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


def _counts(cells) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Library sizes (cell,) float64, and counts (cell, gene), in memory as a fit requires."""
    matrix = count_matrix(cells, total_key=TOTAL_KEY if TOTAL_KEY in cells.obs else None)
    x = matrix.csr[:, : cells.n_vars]
    return matrix.library.numpy().astype(np.float64), x


def level_moments(cells, groups: Groups):
    """Mean log1p-CP10k of every group and of every context's controls, (row, gene) each, and their sampling variances."""
    library, x = _counts(cells)
    level = log1p_cp10k(x, library)
    means, squares = groups.means(level), groups.means(level.power(2))
    sizes = [len(group) for group in groups], [len(rows) for rows in groups.control_rows.values()]
    variances = [
        np.maximum(square - mean**2, 0.0) / np.maximum(np.array(size, dtype=float) - 1, 1)[:, None]
        for mean, square, size in zip(means, squares, sizes, strict=True)
    ]
    return means, variances
