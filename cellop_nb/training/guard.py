"""The non-finite guard: training stops before a NaN is kept, says where it came from, and can go on before it.

A healthy step pays for one number: whether the loss terms and the gradient norm, which clipping has computed anyway, are
finite. A GPU keeps it, holds the optimiser back by it, and is asked every few steps. Only when it says no is the batch
run again with every operation watched (:mod:`.locate`), and written to a file that shows the fault again.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.counts import CountBatch
from ..data.groups import GroupSample
from ..errors import CheckpointError, LabelError, NonFiniteError, did_you_mean
from ..models.host import looks_are_free
from .checkpoint import read_state, write_state
from .locate import Origin, is_finite, nonfinite_state, owner_of_parameter, search

_LOG = logging.getLogger("cellop_nb")
_POLICIES = ("stop", "rollback")
_ADVICE = {
    "batch": "look at these entries and remove or correct them (cellop_nb.setup finds such data)",
    "parameter": "load guard.last_finite or a checkpoint, and train with a smaller learning rate",
    "operation": "bound the input of that operation, or train with a smaller learning rate "
    "(on_nonfinite='rollback' does the latter by itself)",
    "gradient": "keep the input of that operation away from where its derivative is infinite, or train with "
    "a smaller learning rate (on_nonfinite='rollback')",
    None: "train with a smaller learning rate (on_nonfinite='rollback')",
}


@dataclass
class TrainingState:
    """Copy of a model (name to tensor), its optimiser's state dictionary and the random states by source, at one step."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict
    random: dict[str, Tensor]

    @classmethod
    def of(cls, trainer, model: nn.Module, optimizer) -> TrainingState:
        """Copy the present state."""
        both = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        return cls(trainer.step, *both, random_state(trainer))

    def restore(self, model: nn.Module, optimizer, trainer=None) -> None:
        """Put the copy back; random states too where a trainer is given."""
        model.load_state_dict(self.model)
        # Optimisers keep the tensors they load and change them in place: they get a copy of the copy.
        optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        if trainer is not None:
            set_random_state(self.random, trainer)


def random_state(trainer) -> dict[str, Tensor]:
    """State of every source of randomness of a training step: torch's own, and the trainer's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {name: generator.get_state() for name, generator in _generators(trainer).items()}


def _generators(trainer) -> dict[str, torch.Generator]:
    return {
        f"trainer.{name}": value
        for name, value in vars(trainer).items()
        if isinstance(value, torch.Generator)
    }


def set_random_state(states: dict[str, Tensor], trainer) -> None:
    """Put :func:`random_state` back; a generator of another kind of device than the state's is left as it is."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    for name, generator in _generators(trainer).items():
        if name in states and states[name].shape == generator.get_state().shape:
            generator.set_state(states[name].cpu())


@dataclass(frozen=True)
class _Step:
    """What it takes to make a step again, and whether it was finite, unread."""

    number: int
    batch: object
    random: dict[str, Tensor]
    finite: Tensor


class NonFiniteGuard:
    """Checks of one training run; the loop calls it three times a step and once per epoch.

    Parameters
    ----------
    model, optimizer
        What is trained.
    folder
        Where reproducer files go; None writes none.
    on_nonfinite
        ``"stop"`` raises :class:`NonFiniteError`. ``"rollback"`` restores the last finite state, that after the
        step before, halves the learning rate and goes on, at most five times; it looks at the
        parameters and copies them after every step. A batch that holds NaN itself raises at once: no learning
        rate cures it.

    Attributes
    ----------
    read_every
        Steps between two questions to the device, which holds the optimiser back from the first step on that is not
        finite: that step and the ones after it are then made again, each with its check at once. 1, the check at once,
        on a CPU, for "rollback", whose next step depends on the last, and for an optimiser that cannot be held back (one
        that is not fused); 10 elsewhere.
    last_finite
        :class:`TrainingState` to go back to; after an error the last state in which everything was finite.
    rolled_back
        Per rollback the ``epoch`` and ``step`` of the fault, the step after which the state was that it went
        ``back_to``, the ``learning_rate`` from then on, and the ``reason``.
    overflows
        Steps whose gradients were finite, but their squares not.
    finite
        Whether the last step was finite, on the device.

    Notes
    -----
    Every check returns whether to go on with the step. After False (rollback) the loop takes the next batch.
    """

    MOST_ROLLBACKS = 5

    def __init__(
        self,
        model: nn.Module,
        optimizer,
        *,
        folder: str | Path | None = None,
        on_nonfinite: str = "stop",
    ) -> None:
        if on_nonfinite not in _POLICIES:
            expected, fix = "on_nonfinite 'stop' or 'rollback'", did_you_mean(on_nonfinite, _POLICIES)
            raise LabelError(expected, repr(on_nonfinite), fix)
        self.model, self.optimizer = model, optimizer
        self.folder = None if folder is None else Path(folder)
        self.on_nonfinite = on_nonfinite
        at_once = all(looks_are_free(parameter.device) for parameter in model.parameters())
        at_once = at_once or on_nonfinite == "rollback" or not optimizer.defaults.get("fused")
        self.read_every = 1 if at_once else 10
        self.last_finite: TrainingState | None = None
        self.rolled_back: list[dict] = []
        self.overflows = 0
        self.finite = torch.tensor(True)
        self._terms: dict[str, Tensor] = {}
        self._random: dict[str, Tensor] = {}
        self._suspect = False
        self._steps: list[_Step] = []  # not yet read
        device = next(model.parameters()).device
        self._raised = torch.zeros((), device=device)  # 1 from the first step on that was not finite
        self._question: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    @property
    def holds_back(self) -> bool:
        """Whether the device itself holds the optimiser back, so that the host need not look."""
        return self.read_every > 1

    # -- the calls of the loop ---------------------------------------------------------------------

    def begin_step(self, trainer) -> None:
        """Remember the random state before the loss, so that a faulty step can be run again exactly."""
        self._random = random_state(trainer)
        if self.last_finite is None and not nonfinite_state(self.model):
            self.keep(trainer)

    def check(self, trainer, terms: dict[str, Tensor], norm: Tensor) -> bool:
        """Check loss terms and gradients, these by their norm; the step has not been made yet."""
        # Without their graph: it would stay in memory until the next step.
        self._terms = {name: term.detach() for name, term in terms.items()}
        numbers = torch.stack([*self._terms.values(), norm])
        if not self.holds_back:
            broken = not all(map(math.isfinite, numbers.tolist()))
            return not _in_any(trainer, broken) or self._faulty_step(trainer)
        self.finite = trainer.processes.all(torch.isfinite(numbers).all())
        bad = (~self.finite).to(torch.float32)
        torch.maximum(self._raised, bad, out=self._raised)  # in place: a recorded step knows this tensor
        self._fused.found_inf = self._raised
        return True

    def after_step(self, trainer) -> bool:
        """Ask the device from time to time; copy the state where it may be needed."""
        if self.holds_back:
            self._steps.append(_Step(trainer.step, trainer.batch, self._random, self.finite))
            if len(self._steps) % self.read_every == 0:
                if self._question is not None:
                    self._read(trainer)
                self._ask()
        return self.keep(trainer) if self.on_nonfinite == "rollback" or self._suspect else True

    def end_of_epoch(self, trainer) -> bool:
        """Check the state before it is kept, and copy it: a finite step leaves it finite, but something else may not."""
        if self._steps:
            self._ask()
            self._read(trainer)
        return self.keep(trainer)

    # -- states ------------------------------------------------------------------------------------

    def keep(self, trainer) -> bool:
        """Copy model, optimiser and random states, provided that all of them are finite."""
        self._suspect = False
        if _in_any(trainer, bool(nonfinite_state(self.model, self.optimizer))):
            return self._fault("parameter", trainer)
        self.last_finite = TrainingState.of(trainer, self.model, self.optimizer)
        return True

    # -- faults ------------------------------------------------------------------------------------

    @property
    def _fused(self):
        """The optimiser itself, behind Fabric's: it leaves everything as it is where its ``found_inf`` is 1."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _ask(self) -> None:
        """Send the flag to the host, which reads it when it asks again, and hardly ever waits for the device."""
        flag = self._raised.to("cpu", copy=True, non_blocking=True)
        event = torch.cuda.Event() if self._raised.is_cuda else None
        if event is not None:
            event.record()
        self._question = len(self._steps), flag, event

    def _read(self, trainer) -> None:
        """Make the steps from the first that was not finite again, each with its check at once."""
        assert self._question is not None
        (n_steps, flag, event), self._question = self._question, None
        if event is not None:
            event.synchronize()
        if not bool(flag):
            del self._steps[:n_steps]
            return
        self._raised.zero_()
        self._fused.found_inf = None
        steps, self._steps = self._steps, []
        first = torch.stack([step.finite for step in steps]).tolist().index(False)
        before = trainer.step, trainer.batch, trainer.recorder, self.read_every
        now = random_state(trainer)
        trainer.recorder, self.read_every = None, 1  # call by call
        try:
            for step in steps[first:]:
                set_random_state(step.random, trainer)
                trainer.step = step.number
                trainer._run_step(step.batch)
        finally:
            trainer.recorder, self.read_every = before[2:]
        trainer.step, trainer.batch = before[:2]
        set_random_state(now, trainer)

    def _faulty_step(self, trainer) -> bool:
        # Broken since the step before; the loss only shows it.
        if _in_any(trainer, bool(nonfinite_state(self.model))):
            return self._fault("parameter", trainer, late=1)
        here = not all(map(is_finite, self._terms.values()))
        if _in_any(trainer, here):
            return self._fault("loss", trainer, here=here)
        if not all(is_finite(p.grad) for p in self.model.parameters() if p.grad is not None):
            return self._fault("gradient", trainer)
        # Squares overflow in float32 above 1.8e19. Every gradient is finite, so this is no fault yet; but an
        # optimiser that squares them may be harmed, hence the full check after this step.
        self.overflows, self._suspect = self.overflows + 1, True
        if self.overflows == 1:
            text = "step %s: the gradient norm overflowed, though every gradient is finite"
            _LOG.warning(text, trainer.step)
        return True

    def _fault(self, stage: str, trainer, late: int = 0, here: bool = True) -> bool:
        """Describe a fault, of this process or (`here` False) of another, and go back or raise, all alike."""
        fault = {"stage": stage, "epoch": trainer.epoch, "step": max(trainer.step - late, 0)}
        fault["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        batch = trainer.batch
        if hasattr(batch, "whole"):  # one on a device by its rows: its values are told
            batch = batch.whole()
        random, now = self._random or random_state(trainer), random_state(trainer)
        set_random_state(random, trainer)
        error = _explained(trainer, self.model, batch, fault, self.optimizer, here)
        set_random_state(now, trainer)
        error.terms = {name: float(term) for name, term in self._terms.items()}
        if here and self.folder is not None:
            content = {"model": self.model.state_dict(), "batch": batch, "random": random, "fault": fault}
            path = self.folder / f"nonfinite_step{fault['step']}.pt"
            try:
                error.reproducer = write_state(path, content)
            except Exception as problem:  # the report of the fault must not be lost to a full disk
                _LOG.warning("the reproducer %s could not be written: %s", path, problem)
        in_data = _in_any(trainer, error.origin is not None and error.origin.kind == "batch")
        self.model.zero_grad()
        if self.on_nonfinite == "rollback" and len(self.rolled_back) < self.MOST_ROLLBACKS and not in_data:
            return self._roll_back(trainer, error)
        # The model stays usable: in its present state if that is finite, else in the last such one.
        if not nonfinite_state(self.model, self.optimizer):
            self.last_finite = TrainingState.of(trainer, self.model, self.optimizer)
        elif self.last_finite is not None:
            self.last_finite.restore(self.model, self.optimizer)
        raise error

    def _roll_back(self, trainer, error: NonFiniteError) -> bool:
        if self.last_finite is None:  # the model came broken
            raise error
        step, rate = self.last_finite.step, trainer.learning_rate / 2
        self.last_finite.restore(self.model, self.optimizer)
        trainer.learning_rate = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        reason = f"{error.stage} {error.tensor!r}" if error.tensor else f"a {error.stage} in another process"
        line = {"epoch": trainer.epoch, "step": error.step, "back_to": step}
        self.rolled_back.append(line | {"learning_rate": rate, "reason": reason})
        _LOG.warning("%s Back to step %s with learning rate %g.", error, step, rate)
        return False


def _in_any(trainer, flag: bool) -> bool:
    """Whether it holds in one of the processes at least: all must go back, or stop, together."""
    return trainer.processes.any(flag) if hasattr(trainer, "processes") else flag


# -- what is told of a fault -----------------------------------------------------------------------------


def _explained(
    trainer, model: nn.Module, batch: object, fault: dict, optimizer=None, here: bool = True
) -> NonFiniteError:
    """Run a faulty batch again under the random state it had, which is the present one, and say what happened."""
    tensor, origin = _birth(trainer, model, batch, fault["stage"], optimizer) if here else (None, None)
    names = trainer.describe_batch(batch) if hasattr(trainer, "describe_batch") else {}
    people = origin.involved(names) if origin else {}
    what = f"{fault['stage']} {tensor!r}" if tensor else f"a {fault['stage']}"
    when = f"at epoch {fault['epoch']}, step {fault['step']} (learning rate {fault['learning_rate']:g})"
    why = f": {origin}" if origin else " (a second run of the same batch was finite)"
    why = why if here else " (in another process)"
    about = "".join(f"; {kind} {_short(some)}" for kind, some in people.items() if some)
    advice = _ADVICE[origin.kind if origin else None]
    error = NonFiniteError(
        "finite numbers throughout training", f"NaN or infinity in {what} {when}{why}{about}", advice
    )
    error.stage, error.epoch, error.step = fault["stage"], fault["epoch"], fault["step"]
    error.tensor, error.origin = tensor, origin
    error.cells, error.genes, error.groups = (people.get(kind, []) for kind in ("cells", "genes", "groups"))
    return error


def _birth(
    trainer, model: nn.Module, batch: object, stage: str, optimizer
) -> tuple[str | None, Origin | None]:
    """Name of the first non-finite tensor and its origin; (None, None) where a second run shows none."""
    broken = nonfinite_state(model, optimizer) if stage == "parameter" else []
    if broken:
        return broken[0][0], Origin.held("parameter", *broken[0])
    alone = getattr(trainer, "by_itself", contextlib.nullcontext)  # without the other processes
    with alone(), contextlib.suppress(ArithmeticError, RuntimeError, ValueError):
        tensor, origin = search(model, trainer.loss_terms, batch)
        if tensor is not None:
            return tensor, origin
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not is_finite(parameter.grad):
            origin = Origin.held("gradient", f"the gradient of {name}", parameter.grad)
            origin.module = owner_of_parameter(name)
            return name, origin
    return None, None


def _short(names: list[str], limit: int = 5) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def replay(path: str | Path, trainer) -> NonFiniteError | None:
    """Show a saved fault again: load the model's state, run the batch, and look for non-finite values.

    Parameters
    ----------
    path
        Reproducer file named by the error. No code in it is run: batches of a class of your own are to be allowed by
        ``torch.serialization.add_safe_globals``.
    trainer
        A trainer set up like the one that failed; its model is left in the file's state.

    Returns
    -------
    The :class:`NonFiniteError` that the batch gives (not raised), or None where every value is finite, which
    is what one hopes for after a repair.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or the model has other tensors.
    """
    model = trainer.model
    with torch.serialization.safe_globals([CountBatch, GroupSample]):
        content = read_state(path, next(model.parameters()).device, "a reproducer of the non-finite guard")
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        fix = "build the model with the sizes and names of the run that failed"
        raise CheckpointError("the model of the reproducer", str(error), fix) from error
    model.train()
    set_random_state(content["random"], trainer)
    again = _explained(trainer, model, content["batch"], content["fault"])
    return None if again.tensor is None else again
