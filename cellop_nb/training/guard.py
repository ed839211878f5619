"""The non-finite guard: training stops before a NaN is kept, and says where it came from.

A healthy step pays for three numbers: the sum of the loss terms, the gradient norm that clipping has
computed anyway, and, every few steps, one sum over each parameter. On a GPU they are combined there, hold the
optimiser back there (:mod:`.window`), and are read every few steps. Only when one of them is not finite is the batch
run again with every operation watched (:mod:`.locate`).
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CellopError, LabelError, did_you_mean, three_beats
from ..models.host import looks_are_free
from ..models.trace import is_finite
from .explain import NonFiniteError, optimizer_faults
from .fault import described
from .locate import nonfinite_state
from .reproducer import TrainingState, random_state, replay
from .window import Window

__all__ = ["NonFiniteError", "NonFiniteGuard", "replay"]

_LOG = logging.getLogger("cellop_nb")
_POLICIES = ("stop", "rollback")


class NonFiniteGuard:
    """Checks of one training run; the loop calls it four times a step and once per epoch.

    Parameters
    ----------
    model, optimizer
        What is trained.
    folder
        Where reproducer files go; None writes none.
    on_nonfinite
        ``"stop"`` raises :class:`NonFiniteError`. ``"rollback"`` restores the last kept state, halves the
        learning rate and goes on, at most `max_rollbacks` times. A batch that holds NaN itself raises at
        once: no learning rate cures it.
    max_rollbacks
        Number of rollbacks before the error is raised after all.
    check_every
        Steps between two direct looks at the parameters. A step with finite gradients and moments leaves them
        finite; if something else broke them, the next loss shows it and the fault is still told as theirs.
    snapshot_every
        Steps between two copies of model and optimiser; on a device that holds the optimiser back, the end of the epoch
        after so many, since a copy waits for it.
    deferred
        Leave all checks on the device and read them every `check_every` steps (once per step for "rollback", whose
        next step depends on them, and for optimisers that the device cannot hold back); None chooses this for every
        device but the CPU.

    Attributes
    ----------
    last_finite
        :class:`TrainingState` to go back to; after an error the last state in which everything was finite.
    rollbacks, errors
        Number of rollbacks so far, and the errors that caused them.
    finite
        Whether the last step was finite, on the device; only where checks are deferred.

    Notes
    -----
    Every check returns whether to go on with the step. After False (rollback) the loop takes the next batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer,
        *,
        folder: str | Path | None = None,
        on_nonfinite: str = "stop",
        max_rollbacks: int = 5,
        check_every: int = 10,
        snapshot_every: int = 200,
        deferred: bool | None = None,
    ) -> None:
        if on_nonfinite not in _POLICIES:
            raise LabelError(
                three_beats(
                    "on_nonfinite 'stop' or 'rollback'",
                    repr(on_nonfinite),
                    did_you_mean(on_nonfinite, _POLICIES),
                )
            )
        self.model, self.optimizer = model, optimizer
        self.folder = None if folder is None else Path(folder)
        self.on_nonfinite, self.max_rollbacks = on_nonfinite, max_rollbacks
        self.check_every, self.snapshot_every = check_every, snapshot_every
        self.last_finite: TrainingState | None = None
        self.errors: list[NonFiniteError] = []
        self.rollbacks, self.overflows = 0, 0
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        on_cpu = all(looks_are_free(p.device) for p in self._parameters)
        self.deferred = not on_cpu if deferred is None else deferred
        self._loss_flag: Tensor | None = None
        self._parameter_flag = self._flag_of_parameters() if self.deferred else None
        self._terms: dict[str, Tensor] = {}
        self._random: dict[str, Tensor] | None = None
        self._since = 0
        self._suspect = False
        held_back = self.deferred and on_nonfinite == "stop" and Window.possible(optimizer)
        self._window = Window(optimizer, check_every) if held_back else None
        self.finite: Tensor | None = None

    @property
    def holds_back(self) -> bool:
        """Whether the device itself holds the optimiser back, so that the host need not look."""
        return self._window is not None

    # -- the calls of the loop ---------------------------------------------------------------------

    def begin_step(self, trainer) -> None:
        """Remember the random state before the loss, so that a faulty step can be run again exactly."""
        self._random = random_state(trainer)
        if self.last_finite is None and not nonfinite_state(self.model):
            self.keep(trainer)

    def before_backward(self, terms: dict[str, Tensor], trainer) -> bool:
        """Check the loss terms."""
        # Without their graph: it would stay in memory until the next step.
        terms = {name: term.detach() for name, term in terms.items()}
        self._terms = terms
        if self._random is None:
            self.begin_step(trainer)
        if self.deferred:
            self._loss_flag = torch.isfinite(torch.stack(list(terms.values()))).all()
            return True
        return all(math.isfinite(term.item()) for term in terms.values()) or self._loss_fault(trainer)

    def after_backward(self, trainer, grad_norm: Tensor | float | None = None) -> bool:
        """Check the gradients, by their norm; the step has not been made yet."""
        norm = self._gradient_norm() if grad_norm is None else grad_norm
        if not self.deferred:
            return math.isfinite(float(norm)) or self._gradient_fault(trainer)
        flags = [self._loss_flag, self._parameter_flag, torch.isfinite(torch.as_tensor(norm))]
        flags = [flag.to(self._parameters[0].device) for flag in flags if flag is not None]
        self.finite = torch.stack(flags).all()
        if self._window is None:
            return bool(self.finite) or self._deferred_fault(trainer)
        self._window.hold(self.finite)
        return True

    def replayed(self, finite: Tensor) -> None:
        """In place of the two checks before: a recorded step, which holds them, has been made."""
        self.finite = finite

    def after_step(self, trainer) -> bool:
        """Check the parameters, and copy the state from time to time."""
        self._since += 1
        window = self._window
        if window is not None:
            window.note(trainer, self._random, self.finite)
            if not self._look(trainer, window, window.look()):
                return False
        if self._since % self.check_every == 0:
            if self._parameter_flag is not None and self.deferred:
                self._parameter_flag.copy_(self._flag_of_parameters())
            elif not self._parameters_are_finite():
                return self._fault("parameter", trainer)
        # Where the device holds the optimiser back, the state cannot turn bad unseen: the epoch's end is early enough.
        due = self._suspect or (self._since >= self.snapshot_every and not self.holds_back)
        return self.keep(trainer) if due else True

    def end_of_epoch(self, trainer) -> bool:
        """Check the parameters, and keep the state if the last copy is old."""
        if self._window is not None and not self._look(trainer, self._window, self._window.look_at_all()):
            return False
        self._lower_parameter_flag()
        if not self._parameters_are_finite():
            return self._fault("parameter", trainer)
        return self.keep(trainer) if self._since >= self.snapshot_every else True

    # -- states ------------------------------------------------------------------------------------

    def keep(self, trainer) -> bool:
        """Copy model, optimiser and random states, provided that all of them are finite."""
        self._since, self._suspect = 0, False
        if nonfinite_state(self.model) or optimizer_faults(self.model, self.optimizer):
            return self._fault("parameter", trainer)
        self.last_finite = TrainingState.of(trainer, self.model, self.optimizer, into=self.last_finite)
        return True

    def restore(self, trainer=None) -> None:
        """Put the last finite state back into model and optimiser; random states too, given a trainer.

        Raises
        ------
        CellopError
            If there never was a finite state.
        """
        if self.last_finite is None:
            raise CellopError(
                three_beats("a finite state to go back to", "none since the start", "build a new model")
            )
        self.last_finite.restore(self.model, self.optimizer, trainer)
        self._lower_parameter_flag()

    # -- faults ------------------------------------------------------------------------------------

    def _look(self, trainer, window: Window, steps: list) -> bool:
        """Make the steps again that the device found faulty, or held back, with every check at once."""
        if not steps:
            return True
        self._window, deferred, self.deferred = None, self.deferred, False
        try:
            return Window.make_again(steps, trainer)
        finally:
            self._window, self.deferred = window, deferred
            self._lower_parameter_flag()

    def _flag_of_parameters(self) -> Tensor:
        """Whether the parameters are finite, still on the device."""
        return torch.isfinite(torch.stack([p.detach().sum() for p in self._parameters]).sum())

    def _lower_parameter_flag(self) -> None:
        if self._parameter_flag is not None:  # in place: a recorded step knows this tensor
            self._parameter_flag.fill_(True)

    def _parameters_are_finite(self) -> bool:
        total = sum(parameter.detach().sum() for parameter in self._parameters)
        return math.isfinite(float(total)) or not nonfinite_state(self.model)

    def _gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

    def _drop_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def _gradient_fault(self, trainer) -> bool:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not all(is_finite(gradient) for gradient in gradients):
            return self._fault("gradient", trainer)
        # Squares overflow in float32 above 1.8e19. Every gradient is finite, so this is no fault yet; but an
        # optimiser that squares them may be harmed, hence the full check after this step.
        self.overflows, self._suspect = self.overflows + 1, True
        if self.overflows == 1:
            text = "step %s: the gradient norm overflowed, though every gradient is finite"
            _LOG.warning(text, trainer.step)
        return True

    def _loss_fault(self, trainer) -> bool:
        if nonfinite_state(self.model):  # broken since the step before; the loss only shows it
            return self._fault("parameter", trainer, late=1)
        return self._fault("loss", trainer)

    def _deferred_fault(self, trainer) -> bool:
        suspect = self._parameter_flag is not None and not bool(self._parameter_flag)
        if not bool(self._loss_flag) or (suspect and nonfinite_state(self.model)):
            return self._loss_fault(trainer)
        self._lower_parameter_flag()
        gradients_ok = math.isfinite(float(self._gradient_norm()))
        return True if gradients_ok else self._gradient_fault(trainer)

    def _fault(self, stage: str, trainer, late: int = 0) -> bool:
        told = {"stage": stage, "epoch": trainer.epoch, "step": max(trainer.step - late, 0)}
        told["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        random = self._random or random_state(trainer)
        error = described(trainer, self.model, self.optimizer, told, random=random, folder=self.folder)
        error.values["terms"] = {name: float(term) for name, term in self._terms.items()}
        self.errors.append(error)
        in_data = error.origin is not None and error.origin.kind == "batch"
        kept = None if in_data else self.last_finite
        if self.on_nonfinite == "rollback" and self.rollbacks < self.max_rollbacks and kept is not None:
            return self._roll_back(trainer, error, kept.step)
        self._leave_finite(trainer)
        raise error

    def _roll_back(self, trainer, error: NonFiniteError, step: int) -> bool:
        rate = trainer.learning_rate / 2
        self.restore()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        trainer.learning_rate = rate
        self.rollbacks += 1
        _LOG.warning("%s Back to step %s with learning rate %g.", error, step, rate)
        self._drop_gradients()
        return False

    def _leave_finite(self, trainer) -> None:
        """Make the model usable after an error: its present state if finite, else the last such one."""
        self._drop_gradients()
        if not (nonfinite_state(self.model) or optimizer_faults(self.model, self.optimizer)):
            self.last_finite = TrainingState.of(trainer, self.model, self.optimizer)
        elif self.last_finite is not None:
            self.restore()
