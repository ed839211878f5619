"""Several affine operators as one: one after the other, at once, and how much their order matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy.linalg import expm

from ..errors import ModelError, three_beats
from .affine import AffineOperator

MAX_STRENGTH = 1.5
"""Largest strength given out: nothing was measured beyond it, and a generator extrapolates exponentially."""


def check_strength(strength: float) -> float:
    """The strength itself, where it lies between 0 and :data:`MAX_STRENGTH`; refused elsewhere."""
    if not 0 <= strength <= MAX_STRENGTH:
        fix = "stay near what was measured; the way back is operator.inverse()"
        raise ModelError(three_beats(f"a strength between 0 and {MAX_STRENGTH:g}", f"{strength:g}", fix))
    return float(strength)


def compose(parts: Sequence[AffineOperator]) -> AffineOperator:
    r"""The parts one after the other, the first acting first.

    .. math:: K = K_n \circ \dots \circ K_1
    """
    _some(parts)
    return reduce(lambda done, following: following @ done, parts)


def sum_generators(parts: Sequence[AffineOperator]) -> AffineOperator:
    r"""The parts acting at the same time: their generators add, so no order is preferred.

    .. math:: K = e^{L_1 + \dots + L_n}, \qquad K_i = e^{L_i}

    It equals the composition where the parts commute, and lies between the two orders elsewhere
    (Baker, Campbell, Hausdorff; Higham 2008, Functions of Matrices, section 10.1).

    Raises
    ------
    ModelError
        Where a part has no real logarithm.
    """
    _some(parts)
    label = "+".join(part.label for part in parts)
    return parts[0]._like(expm(np.sum([part.generator() for part in parts], axis=0)), label)


@dataclass(frozen=True)
class Commutator:
    r"""How much the order of two operators matters.

    Attributes
    ----------
    matrix
        :math:`H_B H_A - H_A H_B` of the homogeneous matrices, (d + 1, d + 1).
    relative
        Its Frobenius norm over :math:`2\,\|H_A - I\|\,\|H_B - I\|`, which bounds it: 0 where they commute.
    """

    matrix: np.ndarray
    relative: float

    def displacement(self, z: np.ndarray) -> np.ndarray:
        """Where "A then B" takes cells (cell, d), minus where "B then A" takes them: (cell, d)."""
        return np.asarray(z, dtype=float) @ self.matrix[:-1, :-1].T + self.matrix[:-1, -1]


def commutator(first: AffineOperator, second: AffineOperator) -> Commutator:
    """The commutator of two operators of one latent space."""
    a, b = first.homogeneous, second.homogeneous
    matrix = b @ a - a @ b
    one = np.eye(len(a))
    bound = 2 * np.linalg.norm(a - one) * np.linalg.norm(b - one)
    return Commutator(matrix, float(np.linalg.norm(matrix) / bound) if bound > 0 else 0.0)


def _some(parts: Sequence[AffineOperator]) -> None:
    if not parts:
        raise ModelError(three_beats("at least one operator", "none", "name the perturbations"))
    sizes = {len(part.shift) for part in parts}
    if len(sizes) > 1:
        fix = "take operators of one fit"
        raise ModelError(three_beats("operators of one latent space", f"dimensions {sorted(sizes)}", fix))
