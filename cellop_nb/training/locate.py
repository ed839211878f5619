"""Where a non-finite number was born, and what to tell: tensor, module, operation, cells and genes or group.

Nothing of this runs while training is healthy. Once a check has failed, the same batch is evaluated again
under the random state it had, and the first operation that made NaN or infinity *out of finite numbers*, and
whose result reached the loss, is named together with its module and source line.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import NonFiniteError, three_beats
from ..models.trace import (
    ModuleScopes,
    caller,
    graph_nodes,
    is_finite,
    named_tensors,
    nonfinite_state,
    optimizer_faults,
    owner_of_parameter,
    storage_address,
    unchanged_buffers,
)

_TORCH = str(Path(torch.__file__).parent)
_HERE = ("locate.py", "trace.py")


@dataclass
class Origin:
    """Birth of a non-finite value.

    Attributes
    ----------
    kind
        `batch` (it came with the data), `parameter` (the model held it already), `operation` (a forward
        operation made it) or `gradient` (an operation of the backward pass made it).
    name
        Name of the tensor or of the operation.
    module
        Innermost module that was running; None for a loss function outside of the model.
    line
        `file:line in function` of the code that asked for the operation.
    inputs
        Smallest and largest value of each input of the operation.
    masks
        Where the first tensor is not finite, and then the tensors that were computed from it.
    found
        The first non-finite values (at most five).
    """

    kind: str
    name: str
    module: str | None = None
    line: str | None = None
    inputs: list[tuple[float, float]] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    found: list = field(default_factory=list)

    def __str__(self) -> str:
        owner = f" of module {self.module!r}" if self.module else ""
        at = f" at {self.line}" if self.line else ""
        if self.kind in ("batch", "parameter"):
            return f"{self.name}{owner} held {_listed(self.found)}"
        ranges = ", ".join(f"[{low:.4g}, {high:.4g}]" for low, high in self.inputs)
        values = f" from values in {ranges}" if ranges else ""
        return f"{self.name}{owner}{at} gave {_listed(self.found)}{values}"


def _listed(found: list) -> str:
    return "non-finite values" if not found else ", ".join(f"{value:g}" for value in dict.fromkeys(found))


class OperationWatch(TorchDispatchMode):
    """Follows every operation, and remembers for each non-finite result where it was born."""

    def __init__(self, scopes: ModuleScopes, known: list[tuple[Origin, Tensor]]) -> None:
        super().__init__()
        self.scopes = scopes
        self._births: dict[int, tuple[int, Origin]] = {}
        self._kept: list[Tensor] = []  # so that no storage address is used twice
        for origin, tensor in known:
            self._remember(tensor, (len(self._kept), origin))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = [tensor for _, tensor in named_tensors([args, kwargs], depth=3)]
        poisoned = [tensor for tensor in before if not is_finite(tensor)]
        # In-place operations overwrite their inputs: the ranges are read before.
        ranges = [] if poisoned else [_range(t) for t in before if _has_range(t)]
        out = func(*args, **kwargs)
        made = [tensor for _, tensor in named_tensors(out) if not is_finite(tensor)]
        if made and not func.__name__.startswith(("empty", "new_empty")):
            birth = self._inherited(poisoned) or (len(self._kept), self._birth(func, before, ranges, made[0]))
            for tensor in made:
                self._remember(tensor, birth)
        return out

    def _birth(self, func, before: list[Tensor], ranges: list, made: Tensor) -> Origin:
        name = f"operation {func.overloadpacket.__name__}"
        where = ~torch.isfinite(made.detach())
        return Origin("operation", name, self.scopes.current, caller(_HERE), ranges, [], _first(made, where))

    def _inherited(self, poisoned: list[Tensor]) -> tuple[int, Origin] | None:
        births = [self._births.get(storage_address(tensor)) for tensor in poisoned]
        found = [birth for birth in births if birth is not None]
        if found:
            return min(found, key=lambda birth: birth[0])
        if not poisoned:
            return None
        return 0, given("batch", "an input", poisoned[0])  # it was not made by torch: it came with the data

    def _remember(self, tensor: Tensor, birth: tuple[int, Origin]) -> None:
        self._kept.append(tensor)
        self._births.setdefault(storage_address(tensor), birth)
        masks = birth[1].masks
        if tensor.layout == torch.strided and len(masks) < 50:
            masks.append(~torch.isfinite(tensor.detach()))

    def of(self, tensor: Tensor) -> Origin | None:
        """Birth of a tensor's non-finite values."""
        birth = self._births.get(storage_address(tensor))
        return birth[1] if birth else None


def _has_range(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and tensor.layout == torch.strided


def _range(tensor: Tensor) -> tuple[float, float]:
    return float(tensor.detach().min()), float(tensor.detach().max())


def _first(tensor: Tensor, where: Tensor, count: int = 5) -> list[float]:
    return tensor.detach()[where][:count].tolist()


def given(kind: str, name: str, tensor: Tensor) -> Origin:
    """Origin of a value that was not computed but was there: in the batch or in a parameter."""
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    where = ~torch.isfinite(dense)
    module = owner_of_parameter(name) if kind == "parameter" else None
    return Origin(kind, name, module, masks=[where], found=_first(dense, where))


def find_in_loss(model: nn.Module, loss_terms: Callable, batch: object) -> tuple[str | None, Origin | None]:
    """Run a batch again and find where the first non-finite loss term came from.

    Returns
    -------
    The name of the term and the origin; (None, None) where every term is finite in the second run.
    """
    known = [(_in_batch(batch, name, t), t) for name, t in named_tensors(batch) if not is_finite(t)]
    known += [(given("parameter", name, t), t) for name, t in nonfinite_state(model)]
    with ModuleScopes(model) as scopes, OperationWatch(scopes, known) as watch:
        terms = loss_terms(batch)
    for name, term in terms.items():
        if not is_finite(term):
            return name, watch.of(term)
    return None, None


def _in_batch(batch: object, name: str, tensor: Tensor) -> Origin:
    """Origin of a value of the batch; non-zeros of counts are told by cell and gene."""
    origin = given("batch", name, tensor)
    if name == "batch.values" and hasattr(batch, "spread"):
        origin.masks = [batch.spread(origin.masks[0])]
    return origin


def find_in_gradient(
    model: nn.Module, loss_terms: Callable, batch: object
) -> tuple[list[str], Origin | None]:
    """Run a batch forward and backward again and find the first operation with a non-finite gradient.

    Returns
    -------
    Names of the parameters with a non-finite gradient, and the origin (None where the second run is finite).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly mode announces itself; here it only keeps source lines
        with torch.autograd.detect_anomaly(check_nan=False), ModuleScopes(model) as scopes:
            loss = sum(loss_terms(batch).values())
    births: list[Origin] = []
    handles = [node.register_hook(_backward_hook(node, scopes, births)) for node in graph_nodes(loss.grad_fn)]
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for handle in handles:
        handle.remove()
    bad = [name for name, g in zip(names, gradients, strict=True) if g is not None and not is_finite(g)]
    if bad and not births:  # no operation did it: a hook on the parameter changes its gradient
        births.append(Origin("gradient", f"a hook on {bad[0]}", owner_of_parameter(bad[0])))
    return bad, births[0] if births else None


def _backward_hook(node, scopes: ModuleScopes, births: list[Origin]):
    def look(made: tuple, given_: tuple) -> None:
        known = [g for g in given_ if g is not None]
        bad = [g for g in made if g is not None and not is_finite(g)]
        if bad and not births and all(is_finite(g) for g in known):
            where = ~torch.isfinite(bad[0])
            ranges = [_range(g) for g in known if _has_range(g)]
            name = f"gradient of operation {node.name().removesuffix('Backward0')}"
            line = _recorded_line(node)
            births.append(
                Origin("gradient", name, scopes.owner(node), line, ranges, [where], _first(bad[0], where))
            )

    return look


def _recorded_line(node) -> str | None:
    """Source line of the forward operation, as anomaly mode keeps it on the node."""
    lines = [line.strip() for text in node.metadata.get("traceback_", []) for line in text.splitlines()]
    frames = [line for line in lines if line.startswith('File "')]
    mine = [line for line in frames if _TORCH not in line and "/locate.py" not in line]
    if not mine:
        return None
    path, number, function = mine[-1].removeprefix('File "').replace('"', "").split(", ")[:3]
    return f"{Path(path).name}:{number.removeprefix('line ')} {function}"


_ADVICE = {
    "batch": "look at these entries and remove or correct them (cellop_nb.setup finds such data)",
    "parameter": "load guard.last_finite or a checkpoint, and train with a smaller learning rate",
    "operation": "bound the input of that operation, or train with a smaller learning rate "
    "(on_nonfinite='rollback' does the latter by itself)",
    "gradient": "keep the input of that operation away from where its derivative is infinite, or train with "
    "a smaller learning rate (on_nonfinite='rollback')",
    None: "train with a smaller learning rate (on_nonfinite='rollback')",
}


def explain(
    model: nn.Module,
    loss_terms: Callable | None,
    batch: object,
    *,
    told: dict,
    described: dict[str, list[str]] | None = None,
    optimizer=None,
) -> NonFiniteError:
    """Run a faulty batch again and say what happened.

    Parameters
    ----------
    told
        `stage`, `epoch`, `step`, `learning_rate` of the fault.
    described
        Names of the batch's cells and genes, or groups.
    """
    nothing = None, None  # here; the fault is in another process
    elsewhere = told.get("elsewhere", False)
    tensor, origin = nothing if elsewhere else search(model, loss_terms, batch, told["stage"], optimizer)
    tensor = tensor or told.get("tensor")
    module = origin.module if origin else told.get("module")
    people = involved(origin, described or {})
    values = {"inputs": origin.inputs, "found": origin.found} if origin else {}
    return NonFiniteError(
        _message(told, tensor, origin, people),
        tensor=tensor,
        origin=origin,
        module=module,
        people=people,
        values=values,
        norms=part_norms(model),
        stage=told["stage"],
        epoch=told.get("epoch"),
        step=told.get("step"),
        learning_rate=told.get("learning_rate"),
    )


def search(
    model: nn.Module, loss_terms: Callable | None, batch: object, stage: str, optimizer=None
) -> tuple[str | None, Origin | None]:
    """Name of the first non-finite tensor and its origin; (None, None) where none is found."""
    if stage == "parameter":
        for name, tensor in [*nonfinite_state(model), *optimizer_faults(model, optimizer)]:
            return name, given("parameter", name, tensor)
    if loss_terms is None:
        return _standing_gradient(model)
    with unchanged_buffers(model), contextlib.suppress(ArithmeticError, RuntimeError, ValueError):
        found, origin = find_in_loss(model, loss_terms, batch)
        if found is None:
            bad, origin = find_in_gradient(model, loss_terms, batch)
            found = bad[0] if bad else None
        if found is not None:
            return found, origin
    return _standing_gradient(model)


def _standing_gradient(model: nn.Module) -> tuple[str | None, Origin | None]:
    """The first gradient that is not finite now, where no second run shows how it arose."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not is_finite(parameter.grad):
            origin = given("gradient", f"the gradient of {name}", parameter.grad)
            origin.module = owner_of_parameter(name)
            return name, origin
    return None, None


def part_norms(model: nn.Module) -> dict[str, float]:
    """Euclidean norm of the parameters of each part of a model, in float64 so that it cannot overflow."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        squares[part] = squares.get(part, 0.0) + float(parameter.detach().double().square().sum())
    return {part: square**0.5 for part, square in squares.items()}


def involved(origin: Origin | None, described: dict[str, list[str]]) -> dict[str, list[str]]:
    """Names of the cells, genes and groups whose entries of the first non-finite tensors are not finite."""
    if origin is None:
        return {}
    people = {}
    for kind in ("cells", "groups"):
        names = list(described.get(kind, ()))
        # A parameter concerns all cells; a weight with as many rows as there are cells must not name some.
        rows = None if origin.kind == "parameter" else _rows(origin.masks, len(names))
        if rows is not None:
            people[kind] = [name for name, hit in zip(names, rows, strict=True) if hit]
    genes = list(described.get("genes", ()))
    first = origin.masks[0] if origin.masks else None
    if genes and first is not None and first.ndim and first.shape[-1] == len(genes):
        hits = first.reshape(-1, len(genes)).any(0).tolist()
        people["genes"] = [name for name, hit in zip(genes, hits, strict=True) if hit]
    return people


def _rows(masks: list[Tensor], n_names: int) -> list[bool] | None:
    for mask in masks:
        if n_names and mask.ndim and mask.shape[0] == n_names:
            return mask.reshape(n_names, -1).any(1).tolist()
    return None


def _message(told: dict, tensor: str | None, origin: Origin | None, people: dict[str, list[str]]) -> str:
    when = f"at epoch {told['epoch']}, step {told['step']} (learning rate {told['learning_rate']:g})"
    what = f"{told['stage']} {tensor!r}" if tensor else f"a {told['stage']}"
    unseen = "in another process" if told.get("elsewhere") else "a second run of the same batch was finite"
    why = f": {origin}" if origin else f" ({unseen})"
    names = [f"{kind} {_short(who)}" for kind, who in people.items() if who]
    about = f"; {', '.join(names)}" if names else ""
    found = f"NaN or infinity in {what} {when}{why}{about}"
    return three_beats("finite numbers throughout training", found, _ADVICE[origin.kind if origin else None])


def _short(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
