"""What the equations ask of torch and of the machine: which device, memory that stays, gradients taken once."""

from __future__ import annotations

import functools

import torch

from ..errors import ModelError

_LARGEST = 30 << 20


def looks_are_free(device: torch.device) -> bool:
    """Whether the host may branch on the values of tensors there without waiting for a device.

    On a CPU such looks save work (nothing large to compute where no count is large, no close pairs to repair). On
    a device the same numbers are computed without them.
    """
    return device.type == "cpu"


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed blocks up to about 30 MB, instead of returning each to the system.

    It learns its thresholds from the largest block freed so far. Until then every array of a training step above
    128 kB may cost a page fault per 4 kB, each time: a third of the time of some steps. The block here is never
    written to, so that it takes no memory. Other allocators do not mind.
    """
    torch.empty(_LARGEST, dtype=torch.uint8)


def differentiable_once(what: str):
    """Decorator of a backward pass in closed form: it has no graph of its own, so ``create_graph=True`` is refused."""

    def decorate(backward):
        @functools.wraps(backward)
        def once(ctx, upstream):
            if torch.is_grad_enabled():  # as autograd does where a graph is to be made
                received = "create_graph=True, as second derivatives and gradient penalties ask for"
                fix = "take first derivatives only, or finite differences of the gradient"
                raise ModelError(f"one differentiation of {what}", received, fix)
            return backward(ctx, upstream)

        return once

    return decorate
