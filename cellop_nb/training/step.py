"""One optimiser step, from the batch to the guard's last look."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor, nn

from .clip import clip_gradients
from .guard import NonFiniteGuard
from .parallel import Processes
from .recorded import Recorder
from .task import Task


def half_cosine(step: int, total: int, *, floor: float = 0.02) -> float:
    """Learning-rate factor that falls from 1 to `floor` along half a cosine."""
    share = min(step / max(total, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


class Step(Task):
    """The part of a trainer that makes a step; the loop around it is :class:`~cellop_nb.training.loop.Trainer`."""

    # what the trainer that this is a part of has
    model: nn.Module
    module: Any
    optimizer: Any
    fabric: Fabric
    processes: Processes
    guard: NonFiniteGuard
    recorder: Recorder | None
    step: int
    max_epochs: int
    clip_norm: float
    batch: Any
    terms: dict[str, Any]
    _base_lr: float
    _obey: Callable[[], None]

    def _run_step(self, batch) -> Tensor | None:
        """One optimiser step; the gradient norm, still on the device, or None where the guard rolled it back."""
        self.batch = batch
        self._obey()
        self._set_rate()
        self.guard.begin_step(self)
        made = self.recorder.step(batch) if self.recorder is not None else None
        if made is None:
            made = self.make_step(batch)
        if made is None or not self.guard.after_step(self):
            return None
        self.terms, norm = made
        return norm

    def make_step(self, batch) -> tuple[dict[str, Tensor], Tensor] | None:
        """Loss, gradient and update: loss terms and gradient norm, or None where the guard rolled the step back.

        Where the guard's checks are deferred, nothing here looks at a value, so that it may be recorded.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.fabric.no_backward_sync(self.module, enabled=self.processes.size > 1):
            terms = self.loss_terms(batch)
            if not self.guard.before_backward(terms, self):
                return None
            self.fabric.backward(functools.reduce(operator.add, terms.values()))
        self.processes.average_gradients(self.model.parameters())
        norm = clip_gradients(self.model.parameters(), self.clip_norm)
        if not self.guard.after_backward(self, norm):
            return None
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}, norm

    def _set_rate(self) -> None:
        factor = half_cosine(self.step, self.max_epochs * self.steps_per_epoch())
        for group in self.optimizer.param_groups:
            group["lr"] = self._base_lr * factor
