"""Where a look at values is free: on a CPU. On a device the host would have to wait for it, in every step."""

from __future__ import annotations

import torch


def looks_are_free(device: torch.device) -> bool:
    """Whether the host may branch on the values of tensors there without waiting for a device.

    On a CPU such looks save work (nothing large to compute where no count is large, no close pairs to repair). On
    a device the same numbers are computed without them.
    """
    return device.type == "cpu"


def best() -> str:
    """Kind of the fastest device here that has float64, which sums and distances need: no MPS, therefore."""
    return "cuda" if torch.cuda.is_available() else "cpu"
