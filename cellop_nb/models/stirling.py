"""The remainder of Stirling's series and its slope: log-gamma without the part that cancels in a likelihood.

References
----------
Abramowitz and Stegun (1964), 6.1.15 and 6.1.41 (lgamma), 6.3.5 and 6.3.18 (digamma).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Stirling's series of lgamma in 1/z^2, after 1/z; and of log z - 1/(2 z) - digamma, after 1/z^2
_VALUE = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
_SLOPE = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def stirling(z: Tensor) -> tuple[Tensor, Tensor]:
    """h(z) = lgamma(z) - z log z + z and h'(z) = digamma(z) - log z, for z > 0.

    The series is used from `shift` above z, where its terms end at the precision of z, and the recurrence
    lgamma(z) = lgamma(z + n) - log z (z + 1) ... (z + n - 1) leads back; large z need no recurrence.
    """
    shift = 3 if z.dtype == torch.float32 else 8
    high = z + shift
    inverse, ratio = high.reciprocal(), (shift / z).log1p()
    w = inverse.square()
    product, reciprocals = z * inverse, z.reciprocal()
    for step in range(1, shift):
        product = product * ((z + step) * inverse)
        reciprocals = reciprocals + (z + step).reciprocal()
    value = (
        (z * ratio - shift) - 0.5 * high.log() - product.log() + inverse * _horner(w, _VALUE) + _HALF_LOG_2PI
    )
    return value, ratio - 0.5 * inverse - w * _horner(w, _SLOPE) - reciprocals


def _horner(w: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    terms = 4 if w.dtype == torch.float32 else len(coefficients)
    total = torch.full_like(w, coefficients[terms - 1])
    for coefficient in coefficients[terms - 2 :: -1]:
        total = total.mul_(w).add_(coefficient)
    return total


def count_constant(x: Tensor) -> Tensor:
    """c(x) = log x! - x log x + x of counts x > 0: the part of the likelihood that the data alone decide."""
    return stirling(x)[0] + x.log()
