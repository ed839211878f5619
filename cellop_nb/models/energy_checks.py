"""What an energy distance refuses: empty, ragged, mismatched and non-finite clouds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ModelError, did_you_mean, three_beats

ESTIMATORS = ("U", "V")


def as_sizes(sizes: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Cells per group as plain integers."""
    return tuple(sizes.tolist() if isinstance(sizes, Tensor) else map(int, sizes))


def check_estimator(estimator: str) -> None:
    """Refuse what is neither U nor V."""
    if estimator not in ESTIMATORS:
        found = f"{estimator!r} ({did_you_mean(estimator, ESTIMATORS)})"
        raise ModelError(three_beats('estimator "U" or "V"', found, 'pass "U" for an unbiased distance'))


def check_cloud(name: str, x: Tensor, sizes: Sequence[int], least: int, validate: bool) -> None:
    """Refuse a cloud (cell, d) that does not fit its sizes, has too few cells, or is not finite."""
    if x.dim() != 2:
        found = f"shape {tuple(x.shape)}"
        raise ModelError(three_beats(f"{name} of shape (cell, d)", found, "pass one row per cell"))
    if sum(sizes) != len(x) or not sizes:
        found = f"{len(x)} rows and sizes that sum to {sum(sizes)} over {len(sizes)} groups"
        raise ModelError(
            three_beats(f"as many rows in {name} as its groups have cells", found, "pass matching sizes")
        )
    if min(sizes) < least:
        found = f"{min(sizes)} in group {sizes.index(min(sizes))} of {name}"
        fix = (
            'leave the group out, or pass estimator="V" for one cell' if least == 2 else "leave the group out"
        )
        raise ModelError(three_beats(f"at least {least} cell(s) in every group", found, fix))
    if validate and not math.isfinite(float(x.detach().sum())) and not torch.isfinite(x).all():
        row = int((~torch.isfinite(x)).any(-1).nonzero()[0])
        found = f"NaN or infinity in row {row} of {name}"
        raise ModelError(
            three_beats("finite coordinates", found, "look at the model that produced that cell")
        )


def check_pair(
    x: Tensor, y: Tensor, x_sizes: Sequence[int], y_sizes: Sequence[int], y_self: Tensor | None
) -> None:
    """Refuse two clouds of other dimensions or groups, and a self-distance that cannot be used."""
    if x.shape[1] != y.shape[1]:
        found = f"{x.shape[1]} and {y.shape[1]}"
        raise ModelError(
            three_beats("x and y in one space", f"dimensions {found}", "embed both with one model")
        )
    if len(x_sizes) != len(y_sizes):
        found = f"{len(x_sizes)} and {len(y_sizes)} groups"
        raise ModelError(three_beats("a group of y for each group of x", found, "match the groups first"))
    if y_self is None:
        return
    if y.requires_grad:
        fix = "drop y_self, or detach y"
        raise ModelError(three_beats("a constant y with y_self", "a y that requires a gradient", fix))
    if tuple(y_self.shape) != (len(y_sizes),):
        found = f"shape {tuple(y_self.shape)}"
        raise ModelError(
            three_beats(f"y_self of shape ({len(y_sizes)},)", found, "pass self_distance(y, y_sizes)")
        )
