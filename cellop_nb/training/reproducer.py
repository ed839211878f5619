"""States that can be gone back to, and files that show a fault again."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, three_beats
from ..files import write_whole


@dataclass
class TrainingState:
    """Copy of a model, its optimiser and the random states at one step.

    Attributes
    ----------
    epoch, step
        When it was taken.
    model
        Name to tensor: parameters and buffers.
    optimizer
        State dictionary of the optimiser.
    random
        Random states by source.
    """

    epoch: int
    step: int
    model: dict[str, Tensor]
    optimizer: dict
    random: dict[str, Tensor]

    @classmethod
    def of(cls, trainer, model: nn.Module, optimizer, into: TrainingState | None = None) -> TrainingState:
        """Copy the present state; `into` gives up its memory for the copy where it has the same tensors."""
        copied = _copy(model.state_dict(), into and into.model)
        moments = _copy(optimizer.state_dict(), into and into.optimizer)
        return cls(trainer.epoch, trainer.step, copied, moments, random_state(trainer))

    def restore(self, model: nn.Module, optimizer=None, trainer=None) -> None:
        """Put the copy back; random states too where a trainer is given."""
        model.load_state_dict(self.model)
        if optimizer is not None:
            # Optimisers keep the tensors they load and change them in place: they get a copy of the copy.
            optimizer.load_state_dict(_copy(self.optimizer))
        if trainer is not None:
            set_random_state(self.random, trainer)


def _copy(value, into=None):
    """Deep copy of nested dictionaries and lists of tensors, re-using the memory of an earlier copy."""
    if isinstance(value, Tensor):
        if isinstance(into, Tensor) and into.shape == value.shape and into.dtype == value.dtype:
            return into.copy_(value)
        return value.detach().clone()
    if isinstance(value, dict):
        earlier = into if isinstance(into, dict) else {}
        return {key: _copy(item, earlier.get(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value


def random_state(trainer) -> dict[str, Tensor]:
    """State of every source of randomness of a training step: torch's own, and the trainer's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {name: generator.get_state() for name, generator in _generators(trainer).items()}


def _generators(trainer) -> dict[str, torch.Generator]:
    known = getattr(trainer, "__dict__", {}).items()
    return {f"trainer.{name}": value for name, value in known if isinstance(value, torch.Generator)}


def set_random_state(states: dict[str, Tensor], trainer=None) -> None:
    """Put :func:`random_state` back; a generator of another kind of device than the state's is left as it is."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    for name, generator in _generators(trainer).items():
        if name in states and states[name].shape == generator.get_state().shape:
            generator.set_state(states[name])


def save_reproducer(
    path: Path, model: nn.Module, batch: object, random: dict[str, Tensor], told: dict
) -> Path:
    """Write model, batch and random states of a fault; atomically, and readable without running any code.

    Parameters
    ----------
    path
        File to write.
    told
        Numbers and words about the fault (stage, epoch, step, tensor, module, learning rate).
    """
    content = {"model": _copy(model.state_dict()), "batch": _plain(batch), "random": random, "fault": told}

    def write(part: Path) -> None:
        torch.save(content, part)
        torch.load(part, weights_only=True)  # a file that cannot be read back is of no use

    return write_whole(path, write)


def load_reproducer(path: str | Path) -> dict:
    """Read what :func:`save_reproducer` wrote: `model`, `batch`, `random`, `fault`.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or of another kind.
    """
    try:
        content = torch.load(path, weights_only=True)
        return content | {"batch": _rebuilt(content["batch"])}
    except Exception as error:
        found = f"{path}: {error}"
        raise CheckpointError(
            three_beats("a reproducer of the non-finite guard", found, "give the path that the error named")
        ) from error


def replay(
    path: str | Path,
    trainer=None,
    *,
    model: nn.Module | None = None,
    loss_terms: Callable | None = None,
):
    """Show a saved fault again: load the model's state, run the batch, and look for non-finite values.

    Parameters
    ----------
    path
        Reproducer file named by the error.
    trainer
        A trainer set up like the one that failed; or else give
    model, loss_terms
        the model and the function of the batch that returns the named loss terms.

    Returns
    -------
    The :class:`NonFiniteError` that the batch gives (not raised), or None where every value is finite, which
    is what one hopes for after a repair. The model is left in the file's state.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or the model has other tensors.
    """
    from .explain import explain, search  # explain.py is above this file

    content = load_reproducer(path)
    model = trainer.model if model is None else model
    loss_terms = trainer.loss_terms if loss_terms is None else loss_terms
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        fix = "build the model with the sizes and names of the run that failed"
        raise CheckpointError(three_beats("the model of the reproducer", str(error), fix)) from error
    model.train()
    told, batch = content["fault"], content["batch"]
    set_random_state(content["random"], trainer)
    if search(model, loss_terms, batch, told["stage"])[0] is None:
        return None
    set_random_state(content["random"], trainer)
    described = trainer.describe_batch(batch) if trainer is not None else {}
    return explain(model, loss_terms, batch, told=told, described=described)


def _plain(value: object):
    """Batch as nested dictionaries of tensors, numbers and text, with class names for what is neither."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # numpy
        return {"__kind__": "numpy", "value": _plain(value.tolist()), "dtype": str(value.dtype)}
    if hasattr(value, "_fields"):
        content = value._asdict()  # type: ignore[attr-defined]
    elif is_dataclass(value):
        content = {item.name: getattr(value, item.name) for item in fields(value)}
    else:
        content = getattr(value, "__dict__", {})
    known = {key: _plain(item) for key, item in content.items() if not callable(item)}
    return {"__kind__": f"{type(value).__module__}:{type(value).__qualname__}", "value": known}


def _rebuilt(value: object):
    if isinstance(value, (list, tuple)):
        return type(value)(_rebuilt(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "__kind__" not in value:
        return {key: _rebuilt(item) for key, item in value.items()}
    if value["__kind__"] == "numpy":
        import numpy

        return numpy.asarray(value["value"], dtype=value["dtype"])
    return _instance(value["__kind__"], {key: _rebuilt(item) for key, item in value["value"].items()})


def _instance(kind: str, content: dict):
    """Object of one of this package's own classes; anything else becomes a bag with the same attributes."""
    module, _, name = kind.partition(":")
    # A file must not be able to make Python import a module of its choice.
    if module.startswith("cellop_nb.") and name.isidentifier():
        made = getattr(importlib.import_module(module), name)
    else:
        made = type(name.rpartition(".")[2], (), {})
    if hasattr(made, "_fields"):
        return made(**content)
    instance = object.__new__(made)
    for key, item in content.items():
        object.__setattr__(instance, key, item)
    return instance
