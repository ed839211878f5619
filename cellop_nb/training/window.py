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


class _Question:
    """A copy of the flag on its way to the host, about so many steps."""

    def __init__(self, flag: Tensor, steps: int) -> None:
        self.steps, self._event = steps, None
        if flag.device.type != "cuda":
            self._copy = flag.clone()
            return
        self._copy = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
        self._copy.copy_(flag, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def answered(self, *, wait: bool) -> bool:
        """Whether the copy has come; with `wait` it has."""
        if self._event is not None and wait:
            self._event.synchronize()
        return self._event is None or self._event.query()

    def raised(self) -> bool:
        """What the flag says."""
        return self.answered(wait=True) and bool(self._copy)


class Window:
    """Lets the device itself hold back the optimiser from the first step on that is not finite.

    The host asks for one flag every few steps, goes on meanwhile, and reads it once it has come. Where it is raised, the
    parameters are still those before the first faulty step: that step and the ones after it are made again, one by one,
    with every check at once.

    Parameters
    ----------
    optimizer
        A fused optimiser, which leaves everything as it is where its ``found_inf`` is 1.
    every
        Steps between two questions.
    """

    AHEAD = 4
    """The host is at most so many times `every` steps ahead of what it knows; then it waits."""

    def __init__(self, optimizer, every: int) -> None:
        self._optimizer, self._every = getattr(optimizer, "optimizer", optimizer), every
        self._steps: list[_Step] = []
        self._raised: Tensor | None = None
        self._question: _Question | None = None

    @staticmethod
    def possible(optimizer) -> bool:
        """Whether the optimiser can be held back by the device."""
        return bool(getattr(optimizer, "defaults", {}).get("fused"))

    def __len__(self) -> int:
        return len(self._steps)

    def hold(self, finite: Tensor) -> None:
        """On the device: hold the optimiser back where this step, or one before it, was not finite."""
        bad = (~finite).to(torch.float32)
        if self._raised is None:
            self._raised = torch.zeros_like(bad)
        torch.maximum(self._raised, bad, out=self._raised)  # in place: a recorded step knows this tensor
        self._optimizer.found_inf = self._raised

    def note(self, trainer, random: dict[str, Tensor], finite: Tensor) -> None:
        """Remember a step until the device has told that it was finite."""
        self._steps.append(_Step(trainer.step, trainer.batch, random, finite))

    def look(self) -> list[_Step]:
        """The steps to be made again, from the first that was not finite; none as long as the device has told of none."""
        if self._question is None and len(self._steps) >= self._every:
            self._ask()
        if self._question is None or not self._question.answered(wait=len(self) >= self.AHEAD * self._every):
            return []
        return self._read()

    def look_at_all(self) -> list[_Step]:
        """As :meth:`look`, of all steps so far: the host waits."""
        if self._raised is None:
            return []
        self._ask()
        return self._read()

    def _ask(self) -> None:
        assert self._raised is not None
        self._question = _Question(self._raised, len(self._steps))

    def _read(self) -> list[_Step]:
        question, self._question = self._question, None
        assert question is not None and self._raised is not None
        if not question.raised():
            del self._steps[: question.steps]
            return []
        steps, self._steps, self._optimizer.found_inf = self._steps, [], None
        self._raised.zero_()
        first = torch.stack([step.finite for step in steps]).tolist().index(False)
        return steps[first:]

    @staticmethod
    def make_again(steps: list[_Step], trainer) -> bool:
        """Make the steps with the batches and random states that they had; False where one was rolled back."""
        kept = trainer.step, trainer.batch, random_state(trainer)
        done, recorder = True, vars(trainer).get("recorder")
        trainer.recorder = None  # call by call
        try:
            for step in steps:
                set_random_state(step.random, trainer)
                trainer.step = step.number
                done = trainer._run_step(step.batch) is not None and done
        finally:
            trainer.recorder = recorder
        trainer.step, trainer.batch = kept[:2]
        set_random_state(kept[2], trainer)
        return done
