"""The training loop: epochs, one optimiser step, several processes, and what a person asks of it while it runs.

A trainer is a subclass of :class:`Trainer` that says what is trained: batches, loss terms and validation.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import logging
import math
import operator
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ..display import History, card
from ..errors import (
    CheckpointError,
    DataError,
    LabelError,
    ModelError,
    check_values,
    checked,
    did_you_mean,
)
from ..models.host import looks_are_free
from .callbacks import Callback, HistoryCSV, ProgressBar, SaveCheckpoints, callback_list
from .checkpoint import plain, read_state, reason, refuse_other_run, write_state
from .cuda_graph import check_compiler, compiled, recorder_of
from .guard import NonFiniteGuard

BY_HAND = "stopped by hand", "interrupted"
"""Reasons to stop that a repeated run would not find by itself."""

LAST = "last.pt"
"""Name of the checkpoint that a run goes on from."""


def half_cosine(step: int, total: int) -> float:
    """Learning-rate factor that falls from 1 to 0.02 along half a cosine."""
    share = min(step / max(total, 1), 1.0)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * share))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down to a total norm of `max_norm`, in place; returns the norm before.

    As ``torch.nn.utils.clip_grad_norm_``, without the pass over all gradients where a CPU knows that none has to change.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if not looks_are_free(norm.device) or not bool(norm <= max_norm):
        torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


class Processes:
    """What this process knows of the others of a launched `fabric`; with a single one, every call returns at once."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.size, self.rank = fabric, fabric.world_size, fabric.global_rank

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """This process's positions of n things: every `size`-th."""
        return range(self.rank, n, self.size)

    def weighted(self, terms: dict[str, Tensor], mine: int, n: int) -> dict[str, Tensor]:
        """Means over `mine` of n things, scaled so that their mean over processes is the mean over all n."""
        if self.size == 1:
            return terms
        return {name: term * (mine * self.size / n) for name, term in terms.items()}

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the mean over processes into ``grad``, in one message; None stays where no process used a parameter."""
        if self.size == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trained]
        used = parts[0].new_tensor([p.grad is not None for p in trained])
        *means, used = self.average(torch.cat([*parts, used])).split([*map(len, parts), len(trained)])
        for parameter, mean, in_use in zip(trained, means, used.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter).clone() if in_use else None

    def average(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return value if self.size == 1 else cast("Tensor", self.fabric.all_reduce(value, reduce_op="mean"))

    def all(self, flag: Tensor) -> Tensor:
        """Whether it holds in every process, still on the device."""
        return flag if self.size == 1 else self.average(flag.to(torch.float32)) == 1

    def any(self, flag: bool) -> bool:
        """Whether it holds in one of the processes at least; all hear the same answer."""
        return flag if self.size == 1 else not self.all(torch.tensor(not flag, device=self.fabric.device))


class RemoteControl:
    """The part of :class:`Trainer` that a notebook's controls talk to; the loop obeys between two steps.

    Attributes
    ----------
    changes
        What was changed by hand, in order: dicts of ``epoch``, ``step`` (steps done before it took effect), ``name``,
        ``value``. :class:`Replay` makes the same changes again.
    """

    # what the trainer has
    epoch: int
    step: int
    fit: Callable[..., pd.DataFrame]
    _call: Callable[..., None]

    def __init__(self, lr: float) -> None:
        self.status, self.stop_reason = "idle", ""
        self.weights: dict[str, float] = {}
        self.changes: list[dict] = []
        self._asked: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        self.learning_rate = lr
        self._stop = threading.Event()
        self._go = threading.Event()
        self._go.set()

    @property
    def learning_rate(self) -> float:
        """Base learning rate; the rate in force is this times the schedule's factor."""
        return self._base_lr

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        if not (value > 0 and math.isfinite(value)):
            raise ModelError("a positive learning rate", f"{value}", "give a number such as 1e-3")
        self._base_lr = float(value)

    def change(self, name: str, value: float) -> None:
        """Change the learning rate or the weight of a loss term by hand, from the next step on.

        Parameters
        ----------
        name
            ``"learning_rate"``, or a name in ``weights``.
        value
            The new base learning rate (positive) or weight (not negative).

        Raises
        ------
        LabelError
            For a name that nothing here bears.
        ModelError
            For a value that cannot be trained with.
        """
        names = ["learning_rate", *self.weights]
        if name not in names:
            raise LabelError("a setting of this training", repr(name), did_you_mean(name, names))
        value = float(value)
        if not math.isfinite(value) or value < 0 or (value == 0 and name == "learning_rate"):
            fix = "give a finite number above 0 (a weight may be 0)"
            raise ModelError(f"a value for {name}", f"{value:g}", fix)
        self._asked.put((name, value))
        if self.status not in ("running", "paused"):
            self._obey()

    def _obey(self) -> None:
        """Make the changes that were asked for; called between steps, so that each is known to the step."""
        while not self._asked.empty():
            name, value = self._asked.get()
            if name == "learning_rate":
                self.learning_rate = value
            else:
                self.weights[name] = value
            self._record(name, value)

    def _record(self, name: str, value: float | str) -> None:
        self.changes.append({"epoch": self.epoch, "step": self.step, "name": name, "value": value})

    def _words_of_changes(self, epoch: int | None = None) -> list[str]:
        """Of all epochs, or of one without its stop."""
        chosen = [c for c in self.changes if epoch is None or (c["epoch"] == epoch and c["name"] != "stop")]
        values = [c["value"] if isinstance(c["value"], str) else f"{c['value']:.4g}" for c in chosen]
        return [
            f"{c['name']} {value} after step {c['step']}" for c, value in zip(chosen, values, strict=True)
        ]

    def stop(self, reason: str = BY_HAND[0]) -> None:
        """End after the current step; the model and the history stay usable."""
        self.stop_reason = reason
        self._stop.set()
        self._go.set()

    def pause(self) -> None:
        """Hold after the current step until :meth:`resume` or :meth:`stop`."""
        self._go.clear()

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._go.set()

    def _hold_while_paused(self) -> None:
        if self._go.is_set() or self._stop.is_set():
            return
        self.status = "paused"
        self._call("on_pause")
        while not self._go.wait(0.2):
            if not self._asked.empty():
                self._obey()
                self._call("on_pause")
        self.status = "running"

    async def fit_async(self, max_epochs: int | None = None, *, resume: bool = False) -> pd.DataFrame:
        """Same as :meth:`fit` in a worker thread, so that a notebook's controls keep working meanwhile."""
        loop = asyncio.get_running_loop()
        # With the cell's context, as in asyncio.to_thread: ipykernel 7.0 publishes nothing from a thread without it.
        fit = functools.partial(contextvars.copy_context().run, self.fit, max_epochs, resume=resume)
        future = loop.run_in_executor(None, fit)
        try:
            # Waking up often lets the kernel's interrupt reach this coroutine.
            while not future.done():
                await asyncio.wait({future}, timeout=0.1)
        except (KeyboardInterrupt, asyncio.CancelledError):
            self.stop("interrupted")
            await asyncio.wait({future})
        return future.result()


@dataclass(frozen=True)
class Machine:
    """Where and how fast a training runs; none of it changes what is trained.

    Attributes
    ----------
    accelerator, devices, num_nodes, strategy, precision
        Passed to ``lightning_fabric.Fabric``; "auto" takes a CUDA device where there is one (MPS has no float64). With
        several processes (``devices=2, strategy="ddp"``, started by torchrun or SLURM) each takes its share of every
        batch, and the numbers are those of one process with the joint batch; the first one writes the files.
    compile
        Whether the dense parts of the model run through ``torch.compile`` while it trains. What it brings is a row of
        `python3 -m cellop_nb bench vae` and `operators`: nothing on a CPU, whose small parts are not what takes the
        time. Refused where there is no compiler; a part that cannot be compiled whole is an error.
    cuda_graphs
        Whether steps are recorded once as CUDA graphs and replayed: hundreds of calls become one, and small batches
        many times faster. None: wherever it can be (one GPU, ``on_nonfinite="stop"``, a trainer that declares itself
        `recordable`); True is refused where it cannot.

    Raises
    ------
    ModelError
        For a precision whose gradients overflow by design.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    compile: bool = False
    cuda_graphs: bool | None = None

    def __post_init__(self) -> None:
        if self.precision.startswith("16"):
            fix = "pass precision='bf16-mixed', which has the range of single precision"
            raise ModelError("a precision whose gradients stay finite", repr(self.precision), fix)
        check_values({"num_nodes": self.num_nodes})

    def launch(self) -> Fabric:
        """The running processes of this training."""
        log = logging.getLogger("lightning_fabric")
        level = log.level
        log.setLevel(
            logging.WARNING
        )  # it repeats in each notebook that bfloat16 was asked for, and recommends products
        try:
            fastest = "cuda" if torch.cuda.is_available() else "cpu"
            fabric = Fabric(
                accelerator=fastest if self.accelerator == "auto" else self.accelerator,
                devices=self.devices,
                num_nodes=self.num_nodes,
                strategy=self.strategy,
                precision=cast(Any, self.precision),  # refused above where Fabric does not know it
            )
            fabric.launch()
        finally:
            log.setLevel(level)
        if self.compile:
            check_compiler(fabric.device)
        return fabric


class Trainer(RemoteControl):
    """Runs epochs, keeps history and the best state, and obeys requests made while it runs.

    A subclass gives the data and the mathematics: :meth:`batches`, :meth:`loss_terms`, :meth:`validate`,
    :meth:`batch_size_of` and :meth:`steps_per_epoch`. The loss is the sum of the named terms.

    Parameters
    ----------
    model
        The module to train; only parameters that require gradients are touched.
    max_epochs, lr, weight_decay, clip_norm
        Length, base learning rate (it falls along half a cosine), decay and gradient clipping.
    callbacks
        Further callbacks; :class:`EarlyStopping`, :class:`cellop_nb.LivePlot`, your own.
    folder
        Where history and checkpoints go; None keeps them in memory.
    on_nonfinite
        ``"stop"`` raises :class:`NonFiniteError` at the first non-finite value; ``"rollback"`` restores the last
        finite state and halves the learning rate, a bounded number of times.
    progress
        Whether to show a progress bar.
    seed
        Seeds every draw of the trainer (batches, latent samples).
    machine
        Device, processes, precision, compilation.

    Raises
    ------
    LabelError, ModelError
        For a setting that is not known, or whose value cannot be.

    Attributes
    ----------
    monitor : str
        Column of the history whose smallest value marks the best epoch.
    unit : str
        What the progress bar says is trained.
    compilable : tuple of str
        Methods of the model, by their dotted names, that ``compile=True`` compiles.
    recordable : bool
        Whether a step may be recorded once and replayed (a CUDA graph): `loss_terms` then calls the device alone, looks
        at no value, and reads what changes between steps from the batch's `inputs_of` and from :attr:`in_force`. A
        subclass says so itself: what it adds would else be frozen unseen.
    parameters : dict
        Settings of the training, kept in every checkpoint.
    made_from : dict
        What the numbers depend on beside them (the model's sizes, the split, a digest of the data): a
        checkpoint that was made from something else is refused.
    """

    monitor = "val_loss"
    unit = "training"
    compilable: tuple[str, ...] = ()
    recordable = False

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        max_epochs: int = 100,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        clip_norm: float = 10.0,
        callbacks: Sequence[Callback] = (),
        folder: str | Path | None = None,
        on_nonfinite: str = "stop",
        progress: bool = True,
        seed: int = 0,
        machine: Machine = Machine(),  # noqa: B008 (frozen)
    ):
        super().__init__(lr)
        self.fabric = machine.launch()
        self._compiled_parts = self.compilable if machine.compile else ()
        self.processes = Processes(self.fabric)
        self.model, self.max_epochs, self.clip_norm, self.seed = model, max_epochs, clip_norm, seed
        self.folder = None if folder is None else Path(folder)
        trained = [p for p in model.parameters() if p.requires_grad]
        # One fused kernel for all parameters; the values are those of the plain loop.
        # Plain floats: a checkpoint holds no other kind of number.
        optimizer = torch.optim.AdamW(trained, lr=float(lr), weight_decay=float(weight_decay), fused=True)
        self.module, self.optimizer = self.fabric.setup(model, optimizer)
        # Noise differs between processes, the order of the cells does not.
        noise = seed + 7_919 * self.processes.rank
        self.generator = torch.Generator(device=self.fabric.device).manual_seed(noise)
        self.cpu_generator = torch.Generator().manual_seed(seed)
        self.callbacks = self._standard_callbacks(progress) + callback_list(callbacks)
        self.guard = NonFiniteGuard(model, self.optimizer, folder=self.folder, on_nonfinite=on_nonfinite)
        can_be_recorded = machine.cuda_graphs or self.fabric.device.type == "cuda"
        self.recorder = recorder_of(self, machine.cuda_graphs) if can_be_recorded else None
        self.patience, self.batch = None, None
        self.terms: dict[str, Any] = {}
        self.parameters = {
            "max_epochs": int(max_epochs), "lr": float(lr), "weight_decay": float(weight_decay),
            "clip_norm": float(clip_norm), "seed": int(seed), "precision": machine.precision,
        }  # fmt: skip
        self.rows: list[dict] = []
        self.epoch = self.step = 0
        self.best_epoch, self.best_value = -1, float("inf")
        self._best_state: dict | None = None
        self.made_from: dict = {"model": model.config} if hasattr(model, "config") else {}

    def _standard_callbacks(self, progress: bool) -> list[Callback]:
        if not self.processes.first:
            return []
        callbacks: list[Callback] = [ProgressBar(self.unit)] if progress else []
        if self.folder is not None:
            callbacks += [HistoryCSV(self.folder / "history.csv"), SaveCheckpoints(self.folder)]
        return callbacks

    # -- what a subclass says: its data and its mathematics ------------------------------------------

    def batches(self) -> Iterable:
        """Training batches of one epoch."""
        raise NotImplementedError

    def loss_terms(self, batch) -> dict[str, Tensor]:
        """Named, weighted loss terms of one batch (0-d tensors); the loss is their sum."""
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Columns of the history from held-out cells; contains the monitored one."""
        raise NotImplementedError

    def batch_size_of(self, batch) -> int:
        """Number of cells in a batch."""
        raise NotImplementedError

    def steps_per_epoch(self) -> int:
        """Number of batches of one epoch."""
        raise NotImplementedError

    def describe_batch(self, batch) -> dict[str, list[str]]:
        """Names of the cells, genes or groups of a batch, for messages."""
        return {}

    def weights_now(self) -> dict[str, float]:
        """Weights of the loss terms in this step, by name; those that may be changed by hand as they are."""
        return dict(self.weights)

    def shape_of(self, batch) -> Hashable | None:
        """What batches of one recording have in common; None for one that is made step by step."""
        return None

    def inputs_of(self, batch) -> dict[str, Tensor]:
        """The tensors in which batches of one shape differ."""
        raise NotImplementedError

    def with_inputs(self, batch, inputs: dict[str, Tensor]):
        """The batch that these inputs make, of the shape of `batch`, by calls of the device alone."""
        raise NotImplementedError

    @property
    def in_force(self) -> dict[str, Any]:
        """Weights of the loss terms in this step; tensors of the device while it is recorded."""
        recorded = self.recorder and self.recorder.numbers
        return recorded or self.weights_now()

    # -- the loop --------------------------------------------------------------------------------------

    @property
    def history(self) -> pd.DataFrame:
        """One row per finished epoch."""
        history = History(self.rows)
        history.monitor = self.monitor
        return history

    def _repr_html_(self) -> str:
        last = self.rows[-1] if self.rows else {}
        terms = [f"{name} {last[name]:.4g}" for name in last if name.startswith(("train_", "val_loss"))]
        best = f"{self.best_value:.4g} in epoch {self.best_epoch + 1}" if self.rows else None
        facts = {
            "status": f"{self.status} {self.stop_reason}".strip(),
            "epochs": f"{self.epoch} of {self.max_epochs} ({self.step:,} steps)",
            f"best {self.monitor}": best,
            "last epoch": terms or None,
            "learning rate": self.learning_rate,
            "weights": [f"{name} {value:g}" for name, value in self.weights.items()] or None,
            "changed by hand": self._words_of_changes() or None,
            "folder": None if self.folder is None else str(self.folder),
            "seed": self.seed,
        }
        title = f"{type(self).__name__} for {type(self.model).__name__}"
        return card(title, facts, note="history: trainer.history")

    @checked
    def fit(self, max_epochs: int | None = None, *, resume: bool = False) -> pd.DataFrame:
        """Train up to `max_epochs` (in total), and leave the model in its best state.

        Parameters
        ----------
        max_epochs
            Length, counted from the first epoch; that of the trainer where None.
        resume
            Go on from ``last.pt`` in the trainer's folder where there is one: the numbers are those of a run that
            was never interrupted. The same call starts a run and continues it after a crash.

        Returns
        -------
        The history, one row per epoch.

        Raises
        ------
        NonFiniteError
            At the first non-finite value, naming where it came from.
        CheckpointError
            With `resume`: without a folder; if the checkpoint is damaged, or of another model, split or data.
        """
        if resume:
            if self.folder is None:
                fix = "give the trainer folder=..."
                raise CheckpointError("a folder with checkpoints", "a trainer without one", fix)
            if (self.folder / LAST).exists():
                self.load_checkpoint(self.folder / LAST)
        self.max_epochs = self.max_epochs if max_epochs is None else max_epochs
        if self.recorder is not None:
            self.recorder.forget()
        self._go.set()  # a pause that an interrupt has ended
        self.status, self.stop_reason = "running", ""
        try:
            self._call("on_fit_start")
            while self.epoch < self.max_epochs and not self._stop.is_set():
                with self._own_randomness(), self.compiled():
                    self._run_epoch()
            self.status = "stopped" if self._stop.is_set() else "finished"
        except KeyboardInterrupt:
            # The stop square of a notebook: keep what was learned.
            self.status, self.stop_reason = "stopped", "interrupted"
        except BaseException as error:
            self.status, self.stop_reason = "failed", str(error)
            self._call("on_exception", error)
            raise
        finally:
            if self.stop_reason in BY_HAND:
                self._record("stop", self.stop_reason)
            self.restore_best()
            vars(self.model)["trained"] = self.summary()
            self._call("on_fit_end")
            self._stop.clear()  # last, so that a request made before the first step is not lost
        return self.history

    def compiled(self) -> contextlib.AbstractContextManager:
        """Where the parts of the model that were asked to be are compiled."""
        parts = self._compiled_parts
        return compiled(self.model, parts) if parts else contextlib.nullcontext()

    @contextlib.contextmanager
    def _own_randomness(self):
        """Seed by epoch what draws from torch's global source (dropout), and give that source back afterwards."""
        device = self.fabric.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            seed = 1_000_003 * self.seed + self.epoch + 7_919 * self.processes.rank
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            yield

    def _run_epoch(self) -> None:
        if self.steps_per_epoch() < 1:
            fix = "check the split, or ask for more steps_per_epoch"
            raise DataError("at least one batch in an epoch", "none", fix)
        self.model.train()
        sums: dict[str, Any] = {}
        start, cells, steps, norms = time.perf_counter(), 0, 0, []
        for batch in self.batches():
            norm = self._run_step(batch)
            self.step += 1
            if norm is None:  # the guard rolled the step back
                continue
            norms.append(norm)
            for name, term in self.terms.items():
                sums[name] = sums.get(name, 0) + term
            cells, steps = cells + self.batch_size_of(batch), steps + 1
            self._call("on_step_end")
            self._hold_while_paused()
            if self._stop.is_set() and self.processes.size == 1:
                break  # several processes end their epoch together
        if self.processes.any(self._stop.is_set()):
            self._stop.set()
        if not steps or not self.guard.end_of_epoch(self):
            return
        seconds = time.perf_counter() - start
        means = {f"train_{k}": float(self.processes.average(total)) / steps for k, total in sums.items()}
        row = {
            "epoch": self.epoch,
            "seconds": seconds,
            "lr": self.optimizer.param_groups[0]["lr"],
            "cells_per_s": cells * self.processes.size / seconds,
            "grad_norm": float(torch.stack(norms).mean()),
            "train_loss": sum(means.values()),
            **means,
            **{name: float(value) for name, value in self.weights.items()},
            **self._notes_of_epoch(),
        }
        self.model.eval()
        row |= self.validate()
        self.rows.append(row)
        self._keep_best(row)
        self.epoch += 1
        self._call("on_epoch_end", row)

    def _notes_of_epoch(self) -> dict[str, str]:
        """The history's columns of changes by hand and of rollbacks, each only where there was one."""
        rollbacks = [
            f"{one['reason']} in step {one['step']}: back to step {one['back_to']}, "
            f"learning rate {one['learning_rate']:.4g}"
            for one in self.guard.rolled_back
            if one["epoch"] == self.epoch
        ]
        columns = {"by_hand": self._words_of_changes(self.epoch), "rollback": rollbacks}
        return {name: "; ".join(lines) for name, lines in columns.items() if lines}

    def by_itself(self) -> contextlib.AbstractContextManager:
        """Where this process may run the module without the others."""
        return self.fabric.no_backward_sync(self.module, enabled=self.processes.size > 1)

    def _call(self, hook: str, *args) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)

    # -- one step --------------------------------------------------------------------------------------

    def _run_step(self, batch) -> Tensor | None:
        """One optimiser step; the gradient norm, still on the device, or None where the guard rolled it back."""
        self.batch = batch
        self._obey()
        self._set_rate()
        self.guard.begin_step(self)
        outcome = self.recorder.step(batch) if self.recorder is not None else None
        if outcome is None:
            outcome = self.make_step(batch)
        if outcome is None or not self.guard.after_step(self):
            return None
        self.terms, norm = outcome
        return norm

    def make_step(self, batch) -> tuple[dict[str, Tensor], Tensor] | None:
        """Loss, gradient and update: loss terms and gradient norm, or None where the guard rolled the step back.

        Where the guard's checks are deferred, nothing here looks at a value, so that it may be recorded.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self.by_itself():
            terms = self.loss_terms(batch)
            self.fabric.backward(functools.reduce(operator.add, terms.values()))
        self.processes.average_gradients(self.model.parameters())
        norm = clip_gradients(self.model.parameters(), self.clip_norm)
        if not self.guard.check(self, terms, norm):
            return None
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}, norm

    def _set_rate(self) -> None:
        factor = half_cosine(self.step, self.max_epochs * self.steps_per_epoch())
        for group in self.optimizer.param_groups:
            group["lr"] = self._base_lr * factor

    # -- the state of a run, between two epochs --------------------------------------------------------

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
        """How the model was trained, in words and numbers: what :meth:`CellOp.save` keeps beside it."""
        return {
            "trainer": type(self).__name__,
            "parameters": plain(self.parameters),
            "epochs": self.epoch,
            "best_epoch": self.best_epoch,
            self.monitor: float(self.best_value),
            "changes": list(self.changes),
            "rollbacks": list(self.guard.rolled_back),
            "status": self.status,
            "stop_reason": self.stop_reason,
        }

    def state(self) -> dict:
        """Copy of everything that the next epoch depends on: tensors, numbers and text."""
        state = {
            "model": self.model.state_dict(),
            "best_model": self._best_state,
            "optimizer": self.optimizer.state_dict(),
            "generators": [self.generator.get_state(), self.cpu_generator.get_state()],
            "rows": self.rows,
            "changes": self.changes,
            "rollbacks": self.guard.rolled_back,
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
        return copy.deepcopy(state)

    def load_state(self, state: dict) -> None:
        """Go on exactly where :meth:`state` was taken; only the length (``max_epochs``) may be another.

        Raises
        ------
        CheckpointError
            If the state was made from another model, split or data, or with other settings; :meth:`change` is for
            those that are to change on the way.
        """
        then, now = (run.get("parameters", {}) | {"max_epochs": 0} for run in (state, vars(self)))
        refuse_other_run(state.get("made_from", {}), plain(self.made_from))
        refuse_other_run(then, plain(now))
        state = copy.deepcopy(state)  # the optimiser would change it in place
        self.model.load_state_dict(state["model"])
        self._best_state = state["best_model"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generators"][0].cpu())
        self.cpu_generator.set_state(state["generators"][1].cpu())
        self.rows, self.changes = list(state["rows"]), list(state["changes"])
        self.guard.rolled_back, self.guard.last_finite = list(state["rollbacks"]), None
        self.seed, self.epoch, self.step = state["seed"], state["epoch"], state["step"]
        self.best_epoch, self.best_value = state["best"]
        self._base_lr = state["base_lr"]
        self.weights |= state["weights"]

    def save_checkpoint(self, path: str | Path) -> Path:
        """Write :meth:`state` atomically; readable with ``weights_only=True``."""
        return write_state(path, self.state())

    def load_checkpoint(self, path: str | Path) -> None:
        """Read :meth:`save_checkpoint`'s file; no code in it is ever run.

        Raises
        ------
        CheckpointError
            If the file is missing, damaged, or of another model.
        """
        expected = f"a checkpoint of this {type(self.model).__name__}"
        state = read_state(path, self.fabric.device, expected)
        try:
            self.load_state(state)
        except CheckpointError:
            raise
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            fix = "build the model with the names and sizes of the run that was saved"
            raise CheckpointError(expected, f"{path}, {reason(error)}", fix) from error
