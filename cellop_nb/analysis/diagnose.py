"""Gradient audit: does the loss reach every parameter, and if not, at which operation does the path end?"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from types import FrameType

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ModelError, three_beats
from ..models.trace import (
    ModuleScopes,
    caller,
    graph_nodes,
    is_finite,
    named_tensors,
    owner_of_parameter,
    storage_address,
    unchanged_buffers,
)

_ADVICE = {
    "ok": "",
    "frozen": "intended if this part is not to be trained; else set requires_grad",
    "not reached": "the optimiser will never change it: see path_ends",
    "zero gradient": "reached, but nothing flows: look for saturated or dead units, or a clamp",
    "non-finite": "train under the non-finite guard, which names the operation",
}


_HERE = ("diagnose.py", "trace.py")


@dataclass
class _Cut:
    """An operation that passes values on but no gradient.

    Autograd itself detaches what it keeps for the backward pass; such a copy takes no part in what follows.
    """

    text: str
    parameters: frozenset[str]
    addresses: frozenset[int]
    followed: bool = False


def gradient_audit(model: nn.Module, loss: Tensor | Callable, *, retain_graph: bool = False) -> pd.DataFrame:
    """What the gradient of a loss does at each parameter of a model.

    Parameters
    ----------
    model
        Any module.
    loss
        0-d tensor; or a function without arguments that returns one (or a dictionary of named terms).
        Only a function can be watched, and only then is the place named where a path ends.
    retain_graph
        Keep the graph of a tensor `loss` for a later backward.

    Returns
    -------
    One row per parameter:

    - ``parameter``, ``module``, ``shape``
    - ``reached``: the loss has a gradient there (a zero gradient is one)
    - ``grad_norm``, ``weight_norm`` (Euclidean) and ``grad_to_weight``, their ratio
    - ``zero_share``: share of entries with a gradient of exactly zero
    - ``dead_units``: rows (first axis) whose whole gradient is zero
    - ``status``: ok, frozen, not reached, zero gradient or non-finite
    - ``path_ends``: first operation that cut the path from parameter to loss
    - ``advice``

    Gradients held in ``.grad``, buffers and the global random state are left as they were.

    Raises
    ------
    ModelError
        If the loss is not a scalar.
    """
    flow = _Flow(model)
    with unchanged_buffers(model):  # until after the backward pass, which may need them as they became
        value = _watched(loss, flow) if callable(loss) else loss
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ModelError(three_beats("a scalar loss", found, "take the mean or sum of it"))
        gradients = _gradients(model, value, retain_graph and not callable(loss))
    rows = [_row(name, p, gradients.get(name), flow, value) for name, p in model.named_parameters()]
    return pd.DataFrame(rows)


def _watched(loss: Callable, flow: _Flow) -> Tensor:
    flow.watched = True
    with torch.random.fork_rng(devices=[]), flow.scopes, flow:
        value = loss()
        return reduce(add, value.values()) if isinstance(value, dict) else value


def _gradients(model: nn.Module, loss: Tensor, retain_graph: bool) -> dict[str, Tensor]:
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not wanted or not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, retain_graph=retain_graph)
    return {name: gradient for name, gradient in zip(wanted, found, strict=True) if gradient is not None}


def _row(name: str, parameter: nn.Parameter, gradient: Tensor | None, flow: _Flow, loss: Tensor) -> dict:
    status = _status(parameter, gradient)
    size = float(parameter.detach().double().norm())
    row: dict[str, object] = {
        "parameter": name,
        "module": owner_of_parameter(name),
        "shape": tuple(parameter.shape),
    }
    row |= {"reached": gradient is not None, "grad_norm": 0.0, "weight_norm": size}
    row["grad_to_weight"] = 0.0
    row |= {"zero_share": 1.0, "dead_units": len(parameter) if parameter.ndim else 1}
    if gradient is not None:
        slope = float(gradient.double().norm())
        units = gradient.reshape(*(gradient.shape[:1] or (1,)), math.prod(gradient.shape[1:]))
        row |= {"grad_norm": slope, "grad_to_weight": slope / size if size else math.nan}
        row["zero_share"] = float((gradient == 0).double().mean()) if gradient.numel() else 0.0
        row["dead_units"] = int((units == 0).all(1).sum())
    ends = flow.end_of(name, loss) if gradient is None and parameter.requires_grad else ""
    return row | {"status": status, "path_ends": ends, "advice": _ADVICE[status]}


def _status(parameter: nn.Parameter, gradient: Tensor | None) -> str:
    if gradient is None:
        return "not reached" if parameter.requires_grad else "frozen"
    if not is_finite(gradient):
        return "non-finite"
    return "ok" if bool((gradient != 0).any()) or not gradient.numel() else "zero gradient"


class _Flow(TorchDispatchMode):
    """Follows which parameters each value depends on, and notes operations that cut the gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scopes, self.watched = ModuleScopes(model), False
        self._kept: list[Tensor] = []  # so that no storage address is used twice
        self._depends: dict[int, frozenset[str]] = {}
        self._cuts: list[_Cut] = []
        self._last_use: dict[str, str] = {}
        self._own = {name: storage_address(p) for name, p in model.named_parameters() if p.numel()}
        for name, address in self._own.items():
            self._depends[address] = self._depends.get(address, frozenset()) | {name}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [tensor for _, tensor in named_tensors([args, kwargs], depth=3)]
        self._follow(inputs)
        known = [self._depends.get(storage_address(tensor), frozenset()) for tensor in inputs]
        out = func(*args, **kwargs)
        depends = frozenset().union(*known)
        if not depends:
            return out
        outputs = [tensor for _, tensor in named_tensors(out)]
        self._note(func.overloadpacket.__name__, inputs, outputs, depends)
        for tensor in outputs:
            self._kept.append(tensor)
            address = storage_address(tensor)
            self._depends[address] = self._depends.get(address, frozenset()) | depends
        return out

    def _note(self, name: str, inputs: list, outputs: list, depends: frozenset[str]) -> None:
        place = self._place(name)
        self._last_use.update(dict.fromkeys(depends, place))
        if not any(tensor.requires_grad for tensor in inputs):
            return
        text = ""
        if name == "detach":
            text = place
        elif not torch.is_grad_enabled():
            text = f"no_grad around {place}"
        elif not any(tensor.is_floating_point() for tensor in outputs):
            text = f"no derivative of {place}"
        if text and not _in_function():
            self._cuts.append(_Cut(text, depends, frozenset(map(storage_address, outputs))))

    def _follow(self, inputs: list) -> None:
        """Mark the cuts whose result, now without a gradient, is used: the latest where several share it."""
        constants = {storage_address(tensor) for tensor in inputs if not tensor.requires_grad}
        for cut in reversed(self._cuts):
            cut.followed = cut.followed or bool(cut.addresses & constants)
            constants -= cut.addresses

    def _place(self, name: str) -> str:
        module, line = self.scopes.current, caller(_HERE)
        return f"{name}{f' in module {module!r}' if module else ''}{f' at {line}' if line else ''}"

    def end_of(self, parameter: str, loss: Tensor) -> str:
        """Where the path from a parameter to the loss ends."""
        if not self.watched:
            return _constants(loss)
        last = self._last_use.get(parameter)
        for cut in self._cuts:
            ends_here = cut.followed or (last is not None and cut.text.endswith(last))
            if parameter in cut.parameters and ends_here:
                return cut.text
        return f"its last use is {last}; that result does not enter the loss" if last else "never used"


def _in_function() -> bool:
    """Whether this runs in the forward of an `autograd.Function`, which has a backward of its own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            return True
        frame = frame.f_back
    return False


def _constants(loss: Tensor) -> str:
    """Operations of the graph with an input that carries no gradient: where a path may have been cut."""
    nodes = [node for node in graph_nodes(loss.grad_fn) if any(n is None for n, _ in node.next_functions)]
    ends = dict.fromkeys(node.name() for node in nodes)
    named = ", ".join(dict.fromkeys(name.removesuffix("Backward0") for name in ends)) or "none"
    return f"not in the graph; constants enter at: {named} (give the loss as a function to learn the line)"


def saved_for_backward(loss: Callable) -> int:
    """Bytes of tensors that the graph of a loss keeps for its backward pass, beside the parameters' own.

    Parameters
    ----------
    loss
        Function without arguments that returns the loss; no gradient is computed.
    """
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.layout == torch.strided:
            sizes[storage_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = loss()  # held until the sizes are read, so that no address is used twice
    del kept
    return sum(sizes.values())
