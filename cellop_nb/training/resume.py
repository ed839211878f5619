"""What a training run is made of between two epochs: copied, written, read, and gone on from exactly."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CheckpointError, three_beats
from ..files import write_whole

LAST = "last.pt"
"""Name of the checkpoint that a run goes on from."""


class Resumable:
    """The part of :class:`Trainer` that holds the best state and the checkpoints.

    Attributes
    ----------
    parameters
        Settings of the training, kept in every checkpoint.
    made_from
        What the numbers depend on beside them (the model's sizes, the split, a digest of the data): a
        checkpoint that was made from something else is refused.
    """

    # what the trainer that this is a part of has
    model: nn.Module
    optimizer: Any
    fabric: Any
    generator: torch.Generator
    cpu_generator: torch.Generator
    folder: Path | None
    weights: dict[str, float]
    max_epochs: int
    monitor: str
    status: str
    stop_reason: str
    steps_per_epoch: Callable[[], int]

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.epoch = self.step = 0
        self.best_epoch, self.best_value = -1, float("inf")
        self._best_state: dict | None = None
        self.parameters: dict = {}
        self.made_from: dict = {}

    def _keep_best(self, row: dict) -> None:
        if row[self.monitor] < self.best_value:
            self.best_value, self.best_epoch = row[self.monitor], row["epoch"]
            self._best_state = copy.deepcopy(self.model.state_dict())

    def restore_best(self) -> None:
        """Put the parameters of the best epoch back into the model."""
        if self._best_state is not None:
            self.model.load_state_dict(self._best_state)
        self.model.eval()

    def summary(self) -> dict:
        """How the model was trained, in words and numbers: what :func:`cellop_nb.save` keeps beside it."""
        return {
            "trainer": type(self).__name__,
            "parameters": plain(self.parameters),
            "epochs": self.epoch,
            "best_epoch": self.best_epoch,
            self.monitor: float(self.best_value),
            "changes": list(self.changes),
            "status": self.status,
            "stop_reason": self.stop_reason,
        }

    def state(self) -> dict:
        """Copy of everything that the next epoch depends on: tensors, numbers and text."""
        return copy.deepcopy(self._state())

    def _state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "best_model": self._best_state,
            "optimizer": self.optimizer.state_dict(),
            "generators": [self.generator.get_state(), self.cpu_generator.get_state()],
            "rows": self.rows,
            "changes": self.changes,
            "seed": self.seed,
            "epoch": self.epoch,
            "step": self.step,
            "best": [self.best_epoch, self.best_value],
            "base_lr": self._base_lr,
            "weights": {name: float(value) for name, value in self.weights.items()},
            "schedule": {"half_cosine_steps": self.max_epochs * self.steps_per_epoch()},
            "parameters": plain(self.parameters),
            "made_from": plain(self.made_from),
        }

    def load_state(self, state: dict) -> None:
        """Go on exactly where :meth:`state` was taken; only the length (``max_epochs``) stays this trainer's.

        Raises
        ------
        CheckpointError
            If the state was made from another model, split or data.
        """
        _refuse_other(state.get("made_from", {}), plain(self.made_from))
        state = copy.deepcopy(state)  # the optimiser would change it in place
        self.model.load_state_dict(state["model"])
        self._best_state = state["best_model"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generators"][0].cpu())
        self.cpu_generator.set_state(state["generators"][1].cpu())
        self.rows, self.changes = list(state["rows"]), list(state.get("changes", []))
        self.seed, self.epoch, self.step = state["seed"], state["epoch"], state["step"]
        self.best_epoch, self.best_value = state["best"]
        self._base_lr = state["base_lr"]
        self.weights |= state["weights"]

    def save_checkpoint(self, path: str | Path) -> Path:
        """Write :meth:`state` atomically; readable with ``weights_only=True``."""
        return write_whole(path, lambda part: torch.save(self._state(), part))

    def load_last(self) -> bool:
        """Go on from the folder's ``last.pt``; False where the run has not got that far yet.

        Raises
        ------
        CheckpointError
            If the trainer has no folder, or the checkpoint does not fit.
        """
        if self.folder is None:
            fix = "give the trainer folder=..."
            raise CheckpointError(three_beats("a folder with checkpoints", "a trainer without one", fix))
        path = self.folder / LAST
        if not path.exists():
            return False
        self.load_checkpoint(path)
        return True

    def load_checkpoint(self, path: str | Path) -> None:
        """Read :meth:`save_checkpoint`'s file; no code in it is ever run.

        Raises
        ------
        CheckpointError
            If the file is missing, damaged, or of another model.
        """
        expected = f"a checkpoint of this {type(self.model).__name__}"
        try:
            state = torch.load(path, map_location=self.fabric.device, weights_only=True)
        except Exception as error:
            fix = "give the path of a last.pt or best.pt, or start the run anew"
            raise CheckpointError(three_beats(expected, f"{path}, {_reason(error)}", fix)) from error
        try:
            self.load_state(state)
        except CheckpointError:
            raise
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            fix = "build the model with the names and sizes of the run that was saved"
            raise CheckpointError(three_beats(expected, f"{path}, {_reason(error)}", fix)) from error


def _reason(error: Exception) -> str:
    """In one line why a checkpoint cannot be used; torch's own text advises to run the code that a file holds."""
    if isinstance(error, FileNotFoundError):
        return "which does not exist"
    if isinstance(error, pickle.UnpicklingError):
        return "which holds more than tensors, numbers and text, and is never run"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"which does not fit: {lines[min(1, len(lines) - 1)]}" if lines else type(error).__name__


def digest(values) -> str:
    """Short fingerprint of a tensor or array."""
    data = torch.as_tensor(values).detach().cpu().contiguous()
    return hashlib.sha256(data.numpy()).hexdigest()[:16]  # read where it lies


def plain(value):
    """The value without numpy scalars, which a checkpoint must not hold."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _equal(old, new) -> bool:
    if isinstance(old, torch.Tensor):
        return isinstance(new, torch.Tensor) and torch.equal(old.cpu(), new.cpu())
    return not isinstance(new, torch.Tensor) and old == new


def _refuse_other(then: dict, now: dict, path: str = "") -> None:
    """Name the first entry in which a run and its checkpoint differ; later versions may know more entries."""
    for name in then:
        old, new, here = then.get(name), now.get(name), f"{path}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            _refuse_other(old, new, f"{here}.")
        elif not _equal(old, new):
            fix = "build model and trainer as for that run, or start anew in another folder"
            found = f"{here} {_short(new)}, not {_short(old)}"
            raise CheckpointError(three_beats("the run that the checkpoint is of", found, fix))


def _short(value: object) -> str:
    text = f"of {len(value)} entries" if isinstance(value, (list, torch.Tensor)) else repr(value)
    return text if len(text) < 60 else text[:57] + "..."
