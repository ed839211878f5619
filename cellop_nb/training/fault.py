"""A fault of a training run as an error that tells where it came from, with a file that shows it again."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor, nn

from .explain import NonFiniteError, explain
from .reproducer import random_state, save_reproducer, set_random_state

_LOG = logging.getLogger("cellop_nb")


def described(
    trainer, model: nn.Module, optimizer, told: dict, *, random: dict[str, Tensor], folder: Path | None
) -> NonFiniteError:
    """Run the trainer's batch again from the random states before it, and say what happened.

    Parameters
    ----------
    told
        Stage, epoch, step and learning rate.
    random
        Random states before the step.
    folder
        Where the reproducer goes; None writes none.
    """
    now = random_state(trainer)
    set_random_state(random, trainer)
    loss_terms, batch = getattr(trainer, "loss_terms", None), getattr(trainer, "batch", None)
    batch = getattr(
        batch, "whole", lambda: batch
    )()  # one on a device by its rows: its values are told and saved
    names = trainer.describe_batch(batch) if hasattr(trainer, "describe_batch") else {}
    error = explain(model, loss_terms, batch, told=told, described=names, optimizer=optimizer)
    set_random_state(now, trainer)
    if folder is not None:
        told = told | {"tensor": error.tensor, "module": error.module}
        error.reproducer = _saved(folder / f"nonfinite_step{told['step']}.pt", model, batch, random, told)
    return error


def _saved(path: Path, *content) -> Path | None:
    try:
        return save_reproducer(path, *content)
    except Exception as problem:  # the report of the fault must not be lost to a full disk
        _LOG.warning("the reproducer %s could not be written: %s", path, problem)
        return None
