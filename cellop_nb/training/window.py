"""The steps that a device has made and the host has not looked at yet."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reproducer import random_state, set_random_state


@dataclass(frozen=True)
class _Step:
    """What it takes to make a step again: its number, batch and random states; and whether it was finite, unread."""

    number: int
    batch: object
    random: dict[str, Tensor]
    finite: Tensor


class Window:
    """Lets the device itself hold back the optimiser from the first step on that is not finite.

    The host reads one flag for several steps. Where it is raised, the parameters are still those before the first
    faulty step: that step and the ones after it are made again, one by one, with every check at once.

    Parameters
    ----------
    optimizer
        A fused optimiser, which leaves everything as it is where its ``found_inf`` is 1.
    """

    def __init__(self, optimizer) -> None:
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._steps: list[_Step] = []
        self._raised: Tensor | None = None

    @staticmethod
    def possible(optimizer) -> bool:
        """Whether the optimiser can be held back by the device."""
        return bool(getattr(optimizer, "defaults", {}).get("fused"))

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, trainer, random: dict[str, Tensor], finite: Tensor) -> None:
        """Before the optimiser's step: hold it back where this step, or one before it, was not finite."""
        self._steps.append(_Step(trainer.step, trainer.batch, random, finite))
        bad = (~finite).to(torch.float32)
        self._raised = bad if self._raised is None else torch.maximum(self._raised, bad)
        self._optimizer.found_inf = self._raised

    def look(self, trainer) -> list[_Step]:
        """Read the flag, and begin anew; the steps to be made again, from the first that was not finite."""
        steps, raised = self._steps, self._raised
        self._steps, self._raised, self._optimizer.found_inf = [], None, None
        if raised is None or not bool(raised):
            return []
        first = torch.stack([step.finite for step in steps]).tolist().index(False)
        return steps[first:]

    @staticmethod
    def make_again(steps: list[_Step], trainer) -> bool:
        """Make the steps with the batches and random states that they had; False where one was rolled back."""
        kept = trainer.step, trainer.batch, random_state(trainer)
        done = True
        for step in steps:
            set_random_state(step.random, trainer)
            trainer.step = step.number
            done = trainer._run_step(step.batch) is not None and done
        trainer.step, trainer.batch = kept[:2]
        set_random_state(kept[2], trainer)
        return done
