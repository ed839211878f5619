"""The non-finite guard: training stops before a NaN is kept, says where it came from, and can go on before it.

A healthy step pays for three numbers: the sum of the loss terms, the gradient norm that clipping has
computed anyway, and, every few steps, one sum over each parameter. On a GPU they are combined there, hold the
optimiser back there (:class:`Window`), and are read every few steps. Only when one of them is not finite is the batch
run again with every operation watched (:mod:`.locate`), and written to a file that shows the fault again.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import CellopError, CheckpointError, LabelError, NonFiniteError, did_you_mean, three_beats
from ..files import write_whole
from ..models.host import looks_are_free
from ..models.trace import is_finite, nonfinite_state, optimizer_faults
from .locate import explain, search

_LOG = logging.getLogger("cellop_nb")
_POLICIES = ("stop", "rollback")


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
    items = getattr(trainer, "__dict__", {}).items()
    return {f"trainer.{name}": value for name, value in items if isinstance(value, torch.Generator)}


def set_random_state(states: dict[str, Tensor], trainer=None) -> None:
    """Put :func:`random_state` back; a generator of another kind of device than the state's is left as it is."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    for name, generator in _generators(trainer).items():
        if name in states and states[name].shape == generator.get_state().shape:
            generator.set_state(states[name])


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

    def look(self, together: bool = False) -> list[_Step]:
        """The steps to be made again, from the first that was not finite; none as long as the device has told of none."""
        if self._question is None and len(self._steps) >= self._every:
            self._ask()
        late = len(self) >= self.AHEAD * self._every
        if self._question is None or (together and not late) or not self._question.answered(wait=late):
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


class NonFiniteGuard:
    """Checks of one training run; the loop calls it four times a step and once per epoch.

    Parameters
    ----------
    model, optimizer
        What is trained.
    folder
        Where reproducer files go; None writes none.
    on_nonfinite
        ``"stop"`` raises :class:`NonFiniteError`. ``"rollback"`` restores the last finite state, that after the
        step before, halves the learning rate and goes on, at most `max_rollbacks` times; it looks at the
        parameters and copies them after every step. A batch that holds NaN itself raises at once: no learning
        rate cures it.
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
    rolled_back
        Per rollback the ``epoch`` and ``step`` of the fault, the step after which the state was that it went
        ``back_to``, the ``learning_rate`` from then on, and the ``reason``.
    errors
        The errors that caused them.
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
        each = (
            on_nonfinite == "rollback"
        )  # what it goes back to is the last finite state, not one of long ago
        self.check_every, self.snapshot_every = (1, 1) if each else (check_every, snapshot_every)
        self.last_finite: TrainingState | None = None
        self.errors: list[NonFiniteError] = []
        self.rolled_back: list[dict] = []
        self.overflows = 0
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

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks so far."""
        return len(self.rolled_back)

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
            flag = torch.isfinite(torch.stack(list(terms.values()))).all()
            self._loss_flag = flag if _alone(trainer) else trainer.processes.all(flag)
            return True
        here = not all(math.isfinite(term.item()) for term in terms.values())
        return not _in_any(trainer, here) or self._loss_fault(trainer, here=here)

    def after_backward(self, trainer, grad_norm: Tensor | float | None = None) -> bool:
        """Check the gradients, by their norm; the step has not been made yet."""
        norm = self._gradient_norm() if grad_norm is None else grad_norm
        if not self.deferred:
            return math.isfinite(float(norm)) or self._gradient_fault(trainer)
        flags = [self._loss_flag, self._parameter_flag, torch.isfinite(torch.as_tensor(norm))]
        there = [flag.to(self._parameters[0].device) for flag in flags if flag is not None]
        self.finite = torch.stack(there).all()
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
            random, finite = (
                cast(dict, self._random),
                cast(Tensor, self.finite),
            )  # of before_step and the checks
            window.note(trainer, random, finite)
            if not self._look(trainer, window, window.look(together=not _alone(trainer))):
                return False
        if self._since % self.check_every == 0:
            if self._parameter_flag is not None and self.deferred:
                self._parameter_flag.copy_(self._flag_of_parameters())
            elif _in_any(trainer, not self._parameters_are_finite()):
                return self._fault("parameter", trainer)
        # Where the device holds the optimiser back, the state cannot turn bad unseen: the epoch's end is early enough.
        due = self._suspect or (self._since >= self.snapshot_every and not self.holds_back)
        return self.keep(trainer) if due else True

    def end_of_epoch(self, trainer) -> bool:
        """Check the parameters, and keep the state if the last copy is old."""
        if self._window is not None and not self._look(trainer, self._window, self._window.look_at_all()):
            return False
        self._lower_parameter_flag()
        if _in_any(trainer, not self._parameters_are_finite()):
            return self._fault("parameter", trainer)
        return self.keep(trainer) if self._since >= self.snapshot_every else True

    # -- states ------------------------------------------------------------------------------------

    def keep(self, trainer) -> bool:
        """Copy model, optimiser and random states, provided that all of them are finite."""
        self._since, self._suspect = 0, False
        broken = bool(nonfinite_state(self.model) or optimizer_faults(self.model, self.optimizer))
        if _in_any(trainer, broken):
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

    def _loss_fault(self, trainer, here: bool = True) -> bool:
        if nonfinite_state(self.model):  # broken since the step before; the loss only shows it
            return self._fault("parameter", trainer, late=1)
        return self._fault("loss", trainer, here=here)

    def _deferred_fault(self, trainer) -> bool:
        suspect = self._parameter_flag is not None and not bool(self._parameter_flag)
        if not bool(self._loss_flag) or (suspect and nonfinite_state(self.model)):
            return self._loss_fault(trainer)
        self._lower_parameter_flag()
        gradients_ok = math.isfinite(float(self._gradient_norm()))
        return True if gradients_ok else self._gradient_fault(trainer)

    def _fault(self, stage: str, trainer, late: int = 0, here: bool = True) -> bool:
        """Describe a fault, of this process or (`here` False) of another, and go back or raise, all alike."""
        told = {"stage": stage, "epoch": trainer.epoch, "step": max(trainer.step - late, 0)}
        told |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "elsewhere": not here}
        random, folder = self._random or random_state(trainer), self.folder if here else None
        error = described(trainer, self.model, self.optimizer, told, random=random, folder=folder)
        error.values["terms"] = {name: float(term) for name, term in self._terms.items()}
        self.errors.append(error)
        in_data = _in_any(trainer, error.origin is not None and error.origin.kind == "batch")
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
        reason = f"{error.stage} {error.tensor!r}" if error.tensor else f"a {error.stage} in another process"
        self.rolled_back.append(
            {
                "epoch": trainer.epoch,
                "step": error.step,
                "back_to": step,
                "learning_rate": rate,
                "reason": reason,
            }
        )
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


def _alone(trainer) -> bool:
    return getattr(trainer, "processes", None) is None or trainer.processes.size == 1


def _in_any(trainer, flag: bool) -> bool:
    """Whether it holds in one of the processes at least: all must go back, or stop, together."""
    return flag if _alone(trainer) else trainer.processes.any(flag)


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
    # One on a device by its rows: its values are told and saved.
    batch = getattr(batch, "whole", lambda: batch)()
    names = trainer.describe_batch(batch) if hasattr(trainer, "describe_batch") else {}
    with getattr(trainer, "by_itself", contextlib.nullcontext)():
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
        with part.open("wb") as file:  # torch's own writer does not say why it failed
            torch.save(content, file)
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
        problem = f"{path}: {error}"
        raise CheckpointError(
            three_beats("a reproducer of the non-finite guard", problem, "give the path that the error named")
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
    items = {key: _plain(item) for key, item in content.items() if not callable(item)}
    return {"__kind__": f"{type(value).__module__}:{type(value).__qualname__}", "value": items}


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
        cls = getattr(importlib.import_module(module), name)
    else:
        cls = type(name.rpartition(".")[2], (), {})
    if hasattr(cls, "_fields"):
        return cls(**content)
    instance = object.__new__(cls)
    for key, item in content.items():
        object.__setattr__(instance, key, item)
    return instance
