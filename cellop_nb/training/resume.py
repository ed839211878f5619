"""What a training run is made of between two epochs: copied, written, read, and gone on from exactly."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import torch

from ..errors import CheckpointError, three_beats
from ..files import write_whole


class Resumable:
    """The part of :class:`Trainer` that holds the best state and the checkpoints."""

    def _keep_best(self, row: dict) -> None:
        if row[self.monitor] < self.best_value:
            self.best_value, self.best_epoch = row[self.monitor], row["epoch"]
            self._best_state = copy.deepcopy(self.model.state_dict())

    def restore_best(self) -> None:
        """Put the parameters of the best epoch back into the model."""
        if self._best_state is not None:
            self.model.load_state_dict(self._best_state)
        self.model.eval()

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
        }

    def load_state(self, state: dict) -> None:
        """Go on exactly where :meth:`state` was taken."""
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
