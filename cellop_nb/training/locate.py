"""Where a NaN or an infinity was born: in the batch, in a parameter, in an operation, or in the gradient of one.

The faulty batch is run once more with every operation watched. What is told is the first one that made NaN or infinity
*out of finite numbers*, and whose result reached the loss or a gradient.
"""

from __future__ import annotations

import contextlib
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TORCH = str(Path(torch.__file__).parent)


@dataclass(eq=False)
class Origin:
    """Birth of a non-finite value.

    Its `kind` is `batch` (it came with the data), `parameter` (the model held it already), `operation` (one of the
    forward pass made it) or `gradient` (one of the backward pass).
    """

    kind: str
    name: str  # of the tensor or of the operation
    values: list  # the first non-finite ones, at most five
    module: str | None = None  # the innermost that was running; None for a loss function outside of the model
    line: str | None = None  # `file:line in function` of the code that asked for the operation
    inputs: list[tuple[float, float]] = field(default_factory=list)  # smallest and largest value of each
    masks: list[Tensor] = field(
        default_factory=list
    )  # where it, and then what was computed from it, is not finite

    @classmethod
    def held(cls, kind: str, name: str, tensor: Tensor) -> Origin:
        """Of a value that was not computed but was there."""
        module = owner_of_parameter(name) if kind == "parameter" else None
        return cls(kind, name, _first(tensor), module, masks=[~torch.isfinite(tensor.detach())])

    def __str__(self) -> str:
        owner = f" of module {self.module!r}" if self.module else ""
        values = ", ".join(f"{value:g}" for value in dict.fromkeys(self.values))
        if self.kind in ("batch", "parameter"):
            return f"{self.name}{owner} held {values}"
        ranges = ", ".join(f"[{low:.4g}, {high:.4g}]" for low, high in self.inputs)
        at = f" at {self.line}" if self.line else ""
        return f"{self.name}{owner}{at} gave {values}{f' from values in {ranges}' if ranges else ''}"

    def involved(self, names: dict[str, list[str]]) -> dict[str, list[str]]:
        """Those of the `cells`, `groups` and `genes` named whose entries of the first such tensor are not finite."""
        people = {}
        for kind in ("cells", "groups"):
            some = names.get(kind, [])
            # A parameter concerns all cells; a weight with as many rows as there are cells must not name some.
            masks = [mask for mask in self.masks if some and mask.ndim and len(mask) == len(some)]
            if masks and self.kind != "parameter":
                people[kind] = _chosen(some, masks[0].reshape(len(some), -1).any(1))
        genes = names.get("genes", [])
        if genes and self.masks and self.masks[0].ndim and self.masks[0].shape[-1] == len(genes):
            people["genes"] = _chosen(genes, self.masks[0].reshape(-1, len(genes)).any(0))
        return people


def _chosen(names: list[str], hits: Tensor) -> list[str]:
    return [name for name, hit in zip(names, hits.tolist(), strict=True) if hit]


def _first(tensor: Tensor) -> list[float]:
    values = tensor.detach()
    return values[~torch.isfinite(values)][:5].tolist()


def search(model: nn.Module, loss_terms: Callable, batch: object) -> tuple[str | None, Origin | None]:
    """Run a batch again, forward and backward, under the present random state.

    Returns
    -------
    The name of the first loss term, or parameter by its gradient, that is not finite, and where that was born; (None,
    None) where all are finite this time.
    """
    births = [(_in_batch(batch, name, t), t) for name, t in named_tensors(batch) if not is_finite(t)]
    births += [(Origin.held("parameter", name, t), t) for name, t in nonfinite_state(model)]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings(), unchanged_buffers(model), RunningModules(model) as modules:
        warnings.simplefilter("ignore")  # anomaly mode announces itself; here it only keeps source lines
        watch = _Watch(modules, births)
        with torch.autograd.detect_anomaly(check_nan=False), watch:
            terms = loss_terms(batch)
        for name, term in terms.items():
            if not is_finite(term):
                return name, watch.birth_of(term)
        with watch:
            slopes = torch.autograd.grad(sum(terms.values()), [*trained.values()], allow_unused=True)
    for name, slope in zip(trained, slopes, strict=True):
        if slope is not None and not is_finite(slope):
            origin = watch.birth_of(slope)
            if origin is not None and origin.module is None:
                origin.module = owner_of_parameter(name)
            return name, origin
    return None, None


def _in_batch(batch: object, name: str, tensor: Tensor) -> Origin:
    origin = Origin.held("batch", name, tensor)
    if name == "batch.values" and hasattr(batch, "counts"):  # non-zeros of counts: by cell and gene
        origin.masks = [batch.counts.spread(origin.masks[0])]
    return origin


class _Watch(TorchDispatchMode):
    """Follows every operation, and remembers for each non-finite result where it was born."""

    def __init__(self, modules: RunningModules, births: Iterable[tuple[Origin, Tensor]]) -> None:
        super().__init__()
        self._modules = modules
        self._origins: list[Origin] = []
        self._births: dict[int, int] = {}  # address to position among the origins
        self._kept: list[Tensor] = []  # so that no storage address is used twice
        for origin, tensor in births:
            self._remember([tensor], origin)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = tensors_in([args, kwargs])
        poisoned = [tensor for tensor in before if not is_finite(tensor)]
        # In-place operations overwrite their inputs: the ranges are read before.
        ranges = [] if poisoned else [_range(t) for t in before if t.is_floating_point() and t.numel()]
        out = func(*args, **(kwargs or {}))
        broken = [tensor for tensor in tensors_in(out) if not is_finite(tensor)]
        if broken and not func.__name__.startswith(("empty", "new_empty")):
            inherited = [self._births[a] for a in map(storage_address, poisoned) if a in self._births]
            if inherited:
                origin = self._origins[min(inherited)]
            elif poisoned:  # not made by torch
                origin = Origin.held("batch", "an input", poisoned[0])
            else:
                origin = self._born(func, ranges, broken[0])
            self._remember(broken, origin)
        return out

    def _born(self, func, ranges: list, tensor: Tensor) -> Origin:
        node = torch._C._current_autograd_node()  # of the backward pass
        if node is None:
            name = f"operation {func.overloadpacket.__name__}"
            return Origin("operation", name, _first(tensor), self._modules.current, caller(), ranges)
        name = f"gradient of operation {node.name().removesuffix('Backward0')}"
        frames = re.findall(r'File "(.+)", line (\d+), in (.+)', "".join(_notes(node).get("traceback_", [])))
        return Origin("gradient", name, _first(tensor), _notes(node).get("module"), _line(frames), ranges)

    def _remember(self, tensors: list[Tensor], origin: Origin) -> None:
        if origin not in self._origins:
            self._origins.append(origin)
        for tensor in tensors:
            self._kept.append(tensor)
            self._births.setdefault(storage_address(tensor), self._origins.index(origin))
            if len(origin.masks) < 50:
                origin.masks.append(~torch.isfinite(tensor.detach()))

    def birth_of(self, tensor: Tensor) -> Origin | None:
        position = self._births.get(storage_address(tensor))
        return None if position is None else self._origins[position]


def _range(tensor: Tensor) -> tuple[float, float]:
    return float(tensor.detach().min()), float(tensor.detach().max())


class RunningModules:
    """Context manager that knows which module of a model is running, and notes it on the autograd nodes that it makes.

    A node's ``metadata["module"]`` is the innermost module that made it; nodes made outside of all have none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._running: list[str] = []
        self._handles: list = []

    def __enter__(self) -> RunningModules:
        for name, module in self.model.named_modules():
            label = name or type(self.model).__name__
            self._handles.append(module.register_forward_pre_hook(self._starter(label)))
            self._handles.append(module.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *_) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._running.clear()

    def _starter(self, label: str) -> Callable:
        def start(module, inputs) -> None:
            self._note(inputs)  # made before this module
            self._running.append(label)

        return start

    def _end(self, module, inputs, output) -> None:
        self._note(output)
        self._running.pop()

    def _note(self, results: object) -> None:
        queue = [tensor.grad_fn for tensor in tensors_in(results)]
        while queue:
            node = queue.pop()
            if node is not None and "module" not in _notes(node):
                _notes(node)["module"] = self.current
                queue += [below for below, _ in node.next_functions]

    @property
    def current(self) -> str | None:
        """Name of the innermost module that is running, None outside of all modules."""
        return self._running[-1] if self._running else None


def _notes(node: Node) -> dict:
    return cast(dict, node.metadata)  # which torch's own types take for a method


def owner_of_parameter(name: str) -> str:
    """Module part of a parameter's dotted name: `encoder.0` of `encoder.0.weight`."""
    return name.rpartition(".")[0] or name


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite; a sum, which cannot hide a NaN or an infinity, costs one pass but may overflow."""
    values = tensor.detach()
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def nonfinite_state(model: nn.Module, optimizer=None) -> list[tuple[str, Tensor]]:
    """Parameters and buffers of a model, and moments of an optimiser by their parameter, that hold NaN or infinity."""
    tensors: list[tuple[str, object]] = [*model.named_parameters(), *model.named_buffers()]
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            moments = optimizer.state.get(parameter, {})
            tensors += [(f"{name}.{key}", moment) for key, moment in moments.items()]
    return [(name, t) for name, t in tensors if isinstance(t, Tensor) and not is_finite(t)]


def tensors_in(value: object) -> list[Tensor]:
    """The tensors among arguments or results of an operation."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def named_tensors(value: object, name: str = "batch", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside nested dicts, sequences, dataclasses and plain objects, with a dotted name."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    elif is_dataclass(value):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    items = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    for key, item in items.items() if depth else ():
        yield from named_tensors(item, f"{name}.{key}", depth - 1)


def storage_address(tensor: Tensor) -> int:
    """Address of a tensor's memory: the same for its views, its detached form and its saved copy."""
    return tensor.untyped_storage().data_ptr()


def caller(*skip: str) -> str | None:
    """`file:line in function` of the code outside of torch, of this file and of the files `skip` that is running."""
    return _line([(f.filename, f.lineno, f.name) for f in traceback.extract_stack()], *skip)


def _line(frames: Iterable[tuple], *skip: str) -> str | None:
    """The innermost frame that is ours to read, in words."""
    outside = [
        (Path(file).name, number, function)
        for file, number, function in frames
        if not file.startswith((_TORCH, "<")) and Path(file).name not in (Path(__file__).name, *skip)
    ]
    file, number, function = outside[-1] if outside else (None, None, None)
    return f"{file}:{number} in {function}" if outside else None


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """Running statistics are the model's state: looking at a batch again must not move them."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
