"""Gradient clipping that touches the gradients only where it has to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..models.host import looks_are_free


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down to a total norm of `max_norm`, in place; returns the norm before.

    As ``torch.nn.utils.clip_grad_norm_``, without the pass over all gradients where none has to change. On a
    device the scaling is always made: to know the norm the host would have to wait.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if not looks_are_free(norm.device) or not bool(norm <= max_norm):
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm
