"""Which module ran which operation: the bridge between a model's modules and torch's autograd graph.

The autograd graph knows operations, a model knows modules, and neither knows the other. Autograd numbers its
nodes in the order in which they are made, so the numbers seen when a module starts and ends bound its nodes.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

_TORCH = str(Path(torch.__file__).parent)


class ModuleScopes:
    """Context manager that records which module is running, and which autograd nodes it makes.

    Parameters
    ----------
    model
        Any module. Its sub-modules are watched through forward hooks, which are removed on exit.

    Examples
    --------
    >>> with ModuleScopes(model) as scopes:
    ...     loss = model(x).sum()
    >>> scopes.owner(loss.grad_fn)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._running: list[tuple[str, int]] = []
        self._spans: list[tuple[int, int, str]] = []
        self._handles: list = []

    def __enter__(self) -> ModuleScopes:
        for name, module in self.model.named_modules():
            label = name or type(self.model).__name__
            self._handles.append(module.register_forward_pre_hook(self._starter(label)))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *_) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._running.clear()

    def _starter(self, label: str):
        def start(*_) -> None:
            self._running.append((label, _next_number()))

        return start

    def _end(self, *_) -> None:
        if self._running:
            label, start = self._running.pop()
            self._spans.append((start, _next_number(), label))

    @property
    def current(self) -> str | None:
        """Name of the innermost module that is running, None outside of all modules."""
        return self._running[-1][0] if self._running else None

    def owner(self, node: Node) -> str | None:
        """Name of the innermost module that made an autograd node, None if no module did."""
        number = sequence_number(node)
        around = [span for span in self._spans if span[0] < number < span[1]]
        return min(around, key=lambda span: span[1] - span[0])[2] if around else None


def sequence_number(node: Node) -> int:
    """Creation number of a node; nodes that collect a leaf's gradient have none and get -1."""
    return -1 if hasattr(node, "variable") else node._sequence_nr()


def _next_number() -> int:
    with torch.enable_grad():
        return torch.ones((), requires_grad=True).neg().grad_fn._sequence_nr()


def graph_nodes(root: Node | None) -> Iterator[Node]:
    """Every node of the autograd graph below `root`, nearest to the loss first."""
    queue, seen = [root] if root is not None else [], {root}
    while queue:
        node = queue.pop(0)
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                queue.append(below)


def owner_of_parameter(name: str) -> str:
    """Module part of a parameter's dotted name: `encoder.0` of `encoder.0.weight`."""
    return name.rpartition(".")[0] or name


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite.

    A sum cannot hide a NaN or an infinity, and costs one pass; only where it is not finite itself (it may
    have overflowed) are the values looked at one by one.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    values = tensor.detach()
    values = values if values.layout == torch.strided else values.values()
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def nonfinite_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of a model that hold NaN or infinity, by name."""
    both = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in both if not is_finite(tensor)]


def optimizer_faults(model: nn.Module, optimizer) -> list[tuple[str, Tensor]]:
    """Moments of an optimiser that are not finite, named by their parameter."""
    if optimizer is None:
        return []
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (f"{names.get(id(parameter), 'a parameter')}.{key}", value)
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
        if isinstance(value, Tensor) and not is_finite(value)
    ]


def named_tensors(value: object, name: str = "batch", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside nested dicts, sequences, dataclasses and plain objects, with a dotted name."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth > 0:
        for key, item in _items(value):
            yield from named_tensors(item, f"{name}.{key}", depth - 1)


def _items(value: object):
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [(item.name, getattr(value, item.name)) for item in fields(value)]
    return getattr(value, "__dict__", {}).items()


def storage_address(tensor: Tensor) -> int:
    """Address of a tensor's memory: the same for its views, its detached form and its saved copy."""
    values = tensor if tensor.layout == torch.strided else tensor.values()
    return values.untyped_storage().data_ptr()


def caller(skip: tuple[str, ...]) -> str | None:
    """`file:line in function` of the code outside of torch and of the files `skip` that is running."""
    frames = [f for f in traceback.extract_stack() if not f.filename.startswith((_TORCH, "<"))]
    outside = [f for f in frames if Path(f.filename).name not in skip]
    last = outside[-1] if outside else None
    return f"{Path(last.filename).name}:{last.lineno} in {last.name}" if last else None


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module):
    """Running statistics are the model's state: looking at a batch again must not move them."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
