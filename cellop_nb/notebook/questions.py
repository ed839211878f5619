"""What can be asked of virtual cells, and what an answer holds: plain data, no computation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..display import card
from ..models.affine import AffineOperator


@dataclass(frozen=True)
class Question:
    """What is asked of the virtual cells.

    Parameters
    ----------
    perturbation
        ``"A"``, a combination ``"A+B"``, or a sequence ``("A", "B")``, the first acting first.
    context
        Whose control cells are moved.
    strength
        Power of the operator, 0 to 1.5; each step of a sequence is taken at this strength.
    rule
        How a combination is built: ``"axes"``, ``"composition"``, ``"generator"`` (:func:`cellop_nb.combine`).
    reverse
        Lead the perturbed cells back to the controls instead.
    """

    perturbation: str | tuple[str, ...]
    context: str
    strength: float = 1.0
    rule: str = "axes"
    reverse: bool = False

    @property
    def label(self) -> str:
        """``"A+B"``, ``"A, then B"``, with strength and direction where they are not the plain ones."""
        given = self.perturbation
        words = given if isinstance(given, str) else ", then ".join(given)
        if self.strength != 1:
            words += f" at strength {self.strength:g}"
        return f"{words}, reversed" if self.reverse else words


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of the source cells.

    Attributes
    ----------
    question
        What was asked.
    standing
        ``"fitted"`` where training cells of this very condition took part in the fit; else ``"prediction"``.
    why
        The standing in words.
    operator
        The map that moved the cells, strength and direction included.
    start, moved, real
        (cell, 2) the source cells, the same moved, and the real cells aimed at, in the fixed plane.
    energy, energy_start, floor
        Energy distance (Euclidean, U-statistic, latent) of the moved and of the unmoved cells to the real ones, and
        the noise floor; NaN without real cells. `n_moved` and `n_real` cells are compared.
    genes
        DataFrame with all genes, largest absolute change first: ``gene, lfc, low, high`` (95 % bootstrap interval
        over cells) and ``measured`` (of the real cells; NaN without).
    counts
        Chosen gene: cloud name to log1p-CP10k of its cells, (cell,).
    eigenvalues
        (d,) complex, of the operator's matrix.
    health
        :func:`cellop_nb.analysis.stability.affine_health` of the operator at full strength.
    """

    question: Question
    standing: str
    why: str
    operator: AffineOperator
    start: np.ndarray
    moved: np.ndarray
    real: np.ndarray
    energy: float
    energy_start: float
    floor: float
    n_moved: int
    n_real: int
    genes: pd.DataFrame
    gene: str
    counts: dict[str, np.ndarray]
    eigenvalues: np.ndarray
    health: dict

    @property
    def sentence(self) -> str:
        """The answer in one line."""
        asked = self.question
        head = f"{asked.context}, {asked.label} | {self.why}"
        if np.isnan(self.energy):
            return f"{head} | no real cells of this condition to compare with"
        return (
            f"{head} | energy distance to {self.n_real:,} real cells {self.energy:.3f} "
            f"(no change {self.energy_start:.3f}, noise floor {self.floor:.3f})"
        )

    def _repr_html_(self) -> str:
        known = np.isfinite(self.energy)
        facts = {
            "what is known": self.why,
            "energy distance": f"{self.energy:.4f} ({self.n_moved:,} to {self.n_real:,} cells)"
            if known
            else "no real cells",
            "no change": self.energy_start if known else None,
            "noise floor": self.floor if known else None,
            "genes that change most": [
                f"{row.gene} {row.lfc:+.2f}" for row in self.genes.head(6).itertuples()
            ],
            "stability": self.verdict,
        }
        note = (
            "Energy distances are Euclidean, U-statistic, in the latent space; genes are log2 fold changes."
        )
        return card(f"{self.question.context}: {self.question.label}", facts, note=note)

    @property
    def verdict(self) -> str:
        """Stability of the operator in words."""
        return f"{self.health['verdict']}: {self.health['advice']}"
