"""What a computation asks of the machine, counted while it runs: calls of torch, products, bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
OPERATIONS = {
    **flop_registry,
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
}

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal")
"""Calls after which the host waits for a device: their result, or its shape, depends on values."""


@dataclass
class Counts:
    """Calls of torch that compute (views are free), their operations in products, the bytes of all their inputs
    and results, and the names of those that a device would have to be waited for."""

    calls: int = 0
    operations: int = 0
    bytes: int = 0
    reads: tuple[str, ...] = ()

    def times(self, number: int) -> Counts:
        """That of `number` such computations."""
        return Counts(number * self.calls, number * self.operations, number * self.bytes, number * self.reads)

    def __add__(self, other: Counts) -> Counts:
        """Of one computation and another."""
        calls, operations = self.calls + other.calls, self.operations + other.operations
        return Counts(calls, operations, self.bytes + other.bytes, self.reads + other.reads)

    def per(self, number: int) -> Counts:
        """That of one of `number` computations, rounded; reads are told of all."""
        calls, operations, passed = (
            round(total / number) for total in (self.calls, self.operations, self.bytes)
        )
        return Counts(calls, operations, passed, self.reads)


class _Counter(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.name() == "aten::detach":
            return result
        counts = self.counts
        counts.calls += 1
        counted = OPERATIONS.get(function._overloadpacket)
        if counted is not None:
            counts.operations += counted(*args, **(kwargs or {}), out_val=result)
        counts.bytes += sum(_bytes(given) for given in tree_leaves((args, kwargs, result)))
        if function._opname in READS:
            counts.reads += (function._opname,)
        return result


def _bytes(given: object) -> int:
    return given.numel() * given.element_size() if isinstance(given, Tensor) else 0


def counts(call: Callable[[], object]) -> Counts:
    """Make the call, and count; those of its gradient are among them."""
    found = Counts()
    with _Counter(found), torch.autograd.set_multithreading_enabled(False):
        call()
    return found
