"""From a failed check to a message: which tensor, module, cells, genes or group, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ..errors import CellopError, three_beats
from ..models.trace import is_finite, owner_of_parameter, unchanged_buffers
from .locate import Origin, find_in_gradient, find_in_loss, given, nonfinite_state

_ADVICE = {
    "batch": "look at these entries and remove or correct them (cellop_nb.check finds such data)",
    "parameter": "load guard.last_finite or a checkpoint, and train with a smaller learning rate",
    "operation": "bound the input of that operation, or train with a smaller learning rate "
    "(on_nonfinite='rollback' does the latter by itself)",
    "gradient": "keep the input of that operation away from where its derivative is infinite, or train with "
    "a smaller learning rate (on_nonfinite='rollback')",
    None: "train with a smaller learning rate (on_nonfinite='rollback')",
}


class NonFiniteError(CellopError):
    """A loss term, a gradient or a parameter is NaN or infinite.

    Parameters
    ----------
    message
        Three beats: what was expected, what was found, how to fix it.
    people
        ``{"cells": names, "genes": names, "groups": names}``, as far as they are known.

    Attributes
    ----------
    stage
        Which check found it: `loss` (before backward), `gradient` (after it), `parameter` (after the step).
    epoch, step
        When, both counted from 0.
    tensor
        The loss term, parameter or input that is not finite.
    module
        Module that first gave a non-finite value; None where the data did, or a loss function outside of
        every module.
    origin
        :class:`~cellop_nb.training.locate.Origin`: operation, source line, ranges of its inputs; None where a
        second run of the same batch was finite.
    cells, genes, groups
        Names of those involved, as far as they are known.
    values
        Numbers that explain: loss terms, the non-finite values, the inputs of the operation.
    learning_rate, norms
        Rate in force, and Euclidean norm of each part of the model.
    reproducer
        File for :func:`~cellop_nb.training.reproducer.replay`, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        stage: str,
        tensor: str | None = None,
        origin: Origin | None = None,
        module: str | None = None,
        epoch: int | None = None,
        step: int | None = None,
        learning_rate: float | None = None,
        people: dict[str, list[str]] | None = None,
        values: dict | None = None,
        norms: dict[str, float] | None = None,
    ) -> None:
        super().__init__(message)
        self.stage, self.tensor, self.origin, self.module = stage, tensor, origin, module
        self.epoch, self.step, self.learning_rate = epoch, step, learning_rate
        known = people or {}
        self.cells, self.genes, self.groups = (known.get(kind, []) for kind in ("cells", "genes", "groups"))
        self.values, self.norms = values or {}, norms or {}
        self.reproducer: Path | None = None


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
    tensor, origin = search(model, loss_terms, batch, told["stage"], optimizer)
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
        **{key: told.get(key) for key in ("stage", "epoch", "step", "learning_rate")},
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
    why = f": {origin}" if origin else " (a second run of the same batch was finite)"
    names = [f"{kind} {_short(who)}" for kind, who in people.items() if who]
    about = f"; {', '.join(names)}" if names else ""
    found = f"NaN or infinity in {what} {when}{why}{about}"
    return three_beats("finite numbers throughout training", found, _ADVICE[origin.kind if origin else None])


def _short(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
