"""The affine map K(z) = A z + b as an object: apply, compose, invert, raise to a real power; several as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import torch
from scipy.linalg import expm, logm
from torch import Tensor

from ..display import card
from ..errors import ModelError

MAX_STRENGTH = 1.5
"""Largest strength given out: nothing was measured beyond it, and a generator extrapolates exponentially."""


@dataclass(frozen=True)
class AffineOperator:
    r"""One affine operator of the latent space.

    .. math:: K(z) = A z + b

    Parameters
    ----------
    matrix
        A, (d, d).
    shift
        b, (d,), in the units of the latent.
    label
        What a person calls it.
    """

    matrix: Tensor
    shift: Tensor
    label: str = ""

    def __call__(self, z: Tensor) -> Tensor:
        """Move latents (cell, d); the result lies on their device."""
        if z.shape[-1] != len(self.shift):
            fix = "use the representation that the operators were fitted in (use_rep=...)"
            raise ModelError(f"latents with {len(self.shift)} columns", str(z.shape[-1]), fix)
        return z @ self.matrix.to(z.device).T + self.shift.to(z.device)

    def __matmul__(self, first: AffineOperator) -> AffineOperator:
        """Composition: ``(self @ first)(z) == self(first(z))``, so the right operator acts first."""
        shift = self.matrix @ first.shift + self.shift
        return AffineOperator(self.matrix @ first.matrix, shift, f"{self.label} after {first.label}")

    def _repr_html_(self) -> str:
        facts = {
            "dimensions": len(self.shift),
            "largest singular value": self.norm,
            "length of the shift": float(self.shift.norm()),
        }
        return card(f"Affine operator: {self.label}", facts)

    @property
    def norm(self) -> float:
        """Largest singular value of A."""
        return float(torch.linalg.matrix_norm(self.matrix, 2))

    @property
    def homogeneous(self) -> np.ndarray:
        """(d + 1, d + 1) float64 matrix [[A, b], [0, 1]], in which composition is a matrix product."""
        d = len(self.shift)
        whole = np.eye(d + 1)
        whole[:d, :d] = self.matrix.detach().double().cpu().numpy()
        whole[:d, d] = self.shift.detach().double().cpu().numpy()
        return whole

    def _like(self, homogeneous: np.ndarray, label: str) -> AffineOperator:
        whole = torch.as_tensor(homogeneous, dtype=self.matrix.dtype, device=self.matrix.device)
        return AffineOperator(whole[:-1, :-1], whole[:-1, -1], label)

    def with_share(self, share: float, centre: Tensor) -> AffineOperator:
        r"""The operator with a share s of its matrix, which moves the `centre` c (d,) as before; with none a shift.

        .. math:: K_s(z) = s\, K(z) + (1 - s)\,(z + K(c) - c)
        """
        rest = (1 - share) * torch.eye(len(self.shift), dtype=self.matrix.dtype, device=self.matrix.device)
        centre = centre.to(self.shift)
        shift = share * self.shift + (1 - share) * (self(centre) - centre)
        return AffineOperator(share * self.matrix + rest, shift, self.label)

    def inverse(self) -> AffineOperator:
        """The way back, by float64 whatever the operator's own precision.

        Raises
        ------
        ModelError
            Where A is so nearly singular that the way back of a cell would be off by more than a thousandth: where the
            condition number times the rounding of A's precision is above 1e-3.
        """
        condition = float(np.linalg.cond(self.homogeneous[:-1, :-1]))
        largest = 1e-3 / torch.finfo(self.matrix.dtype).eps
        if not condition <= largest:
            precision = str(self.matrix.dtype).removeprefix("torch.")
            expected = f"an invertible operator for the reversal of {self.label!r}"
            received = f"a condition number of {condition:.1e}, above {largest:.1e} for {precision}"
            fix = "fit with a larger ridge, which pulls the operator towards the identity"
            raise ModelError(expected, received, fix)
        return self._like(np.linalg.inv(self.homogeneous), f"inverse of {self.label}")

    @cached_property
    def generator(self) -> np.ndarray:
        r"""Real logarithm L of the homogeneous matrix, (d + 1, d + 1), so that :math:`K = e^L`.

        Raises
        ------
        ModelError
            Where A has an eigenvalue on the closed negative real axis, or too close to zero to tell, so that
            no real principal logarithm exists.

        References
        ----------
        Culver (1966), Proc. Amer. Math. Soc. 17:1146; Higham (2008), Functions of Matrices, theorem 1.31.
        """
        values = np.linalg.eigvals(self.homogeneous)
        rounding = 1e-9 * np.abs(values).max()
        on_negative_axis = (values.real <= rounding) & (np.abs(values.imag) <= rounding)
        if on_negative_axis.any():
            raise ModelError(
                f"an operator with a real logarithm for a fractional strength of {self.label!r}",
                f"the eigenvalue {values[on_negative_axis][0].real:.3g} on the negative real axis",
                "use strengths 0 and 1 only, or fit with a larger ridge",
            )
        return logm(self.homogeneous).real

    def power(self, t: float) -> AffineOperator:
        r"""The operator at strength t, :math:`K^t = e^{tL}`: 0 is the identity, 1 itself, -1 the inverse."""
        if t == 1:
            return self
        if t == 0:  # asks for no logarithm, so it works where there is none
            return self._like(np.eye(len(self.shift) + 1), f"{self.label} at strength 0")
        return self._like(expm(t * self.generator), f"{self.label} at strength {t:g}")


def check_strength(strength: float) -> float:
    """The strength itself, where it lies between 0 and :data:`MAX_STRENGTH`; refused elsewhere."""
    if not 0 <= strength <= MAX_STRENGTH:
        fix = "stay near what was measured; the way back is operator.inverse()"
        raise ModelError(f"a strength between 0 and {MAX_STRENGTH:g}", f"{strength:g}", fix)
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
    return parts[0]._like(expm(np.sum([part.generator for part in parts], axis=0)), label)


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
        raise ModelError("at least one operator", "none", "name the perturbations")
    sizes = {len(part.shift) for part in parts}
    if len(sizes) > 1:
        fix = "take operators of one fit"
        raise ModelError("operators of one latent space", f"dimensions {sorted(sizes)}", fix)
