"""The one training loop, on Lightning Fabric; a trainer adds one step and one validation to it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import nn

from ..errors import DataError, ModelError, three_beats
from ..models import host
from ..tables import History
from .callbacks import Callback, HistoryCSV, ProgressBar, SaveCheckpoints
from .card import trainer_card
from .compiled import check_compiler, compiled
from .guard import NonFiniteGuard
from .parallel import Processes
from .recorded import recorder_of
from .remote import BY_HAND, RemoteControl
from .resume import Resumable
from .step import Step


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Lightning repeats in each notebook that bfloat16 was asked for, and recommends products of three digits."""
    log = logging.getLogger("lightning_fabric")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


class Trainer(Step, RemoteControl, Resumable):
    """Runs epochs, keeps history and the best state, and obeys requests made while it runs.

    A subclass gives the data and the mathematics of its :class:`~cellop_nb.training.task.Task`.

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
    compile
        Whether the dense parts of the model run through ``torch.compile`` while it trains. What it brings is a row of
        `python3 -m cellop_nb bench vae` and `operator`: nothing on a CPU, whose small parts are not what takes the
        time. Refused where there is no compiler; a part that cannot be compiled whole is an error.
    cuda_graphs
        Whether steps are recorded once as CUDA graphs and replayed: hundreds of calls become one, and small batches
        many times faster. None: wherever it can be (one GPU, ``on_nonfinite="stop"``, a trainer that declares itself
        `recordable`); True is refused where it cannot.
    accelerator, devices, num_nodes, strategy, precision
        Passed to ``lightning_fabric.Fabric``; "auto" takes a CUDA device where there is one (MPS has no float64). With
        several processes (``devices=2, strategy="ddp"``, started by torchrun or SLURM) each takes its share of every
        batch, and the numbers are those of one process with the joint batch; the first one writes the files.
    """

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
        compile: bool = False,  # noqa: A002 (its name in the field)
        cuda_graphs: bool | None = None,
        accelerator: str = "auto",
        devices: int | str = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        precision: str = "32-true",
    ):
        if max_epochs < 1:
            raise ModelError(
                three_beats("max_epochs of at least 1", str(max_epochs), "give a positive number")
            )
        if precision.startswith("16"):
            fix = "pass precision='bf16-mixed', which has the range of single precision"
            raise ModelError(three_beats("a precision whose gradients stay finite", repr(precision), fix))
        RemoteControl.__init__(self, lr)
        Resumable.__init__(self)
        with _without_advice():
            self.fabric = Fabric(
                accelerator=host.best() if accelerator == "auto" else accelerator,
                devices=devices,
                num_nodes=num_nodes,
                strategy=strategy,
                precision=precision,
            )
            self.fabric.launch()
        if compile:
            check_compiler(self.fabric.device)
        self._compiled_parts = self.compilable if compile else ()
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
        self.callbacks = self._standard_callbacks(progress) + list(callbacks)
        self.guard = NonFiniteGuard(model, self.optimizer, folder=self.folder, on_nonfinite=on_nonfinite)
        self.recorder = recorder_of(self, cuda_graphs)
        self.patience, self.batch = None, None
        self.terms: dict[str, Any] = {}
        self.parameters = {
            "max_epochs": int(max_epochs), "lr": float(lr), "weight_decay": float(weight_decay),
            "clip_norm": float(clip_norm), "seed": int(seed), "precision": precision,
        }  # fmt: skip
        if hasattr(model, "config"):
            self.made_from["model"] = model.config

    def _standard_callbacks(self, progress: bool) -> list[Callback]:
        if not self.processes.first:
            return []
        callbacks: list[Callback] = [ProgressBar(self.unit)] if progress else []
        if self.folder is not None:
            callbacks += [HistoryCSV(self.folder / "history.csv"), SaveCheckpoints(self.folder)]
        return callbacks

    @property
    def history(self) -> pd.DataFrame:
        """One row per finished epoch."""
        return History.of(self.rows, self.monitor)

    def _repr_html_(self) -> str:
        return trainer_card(self)

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
            With `resume`: if the checkpoint is damaged, or of another model, split or data.
        """
        if resume:
            self.load_last()
        self.max_epochs = self.max_epochs if max_epochs is None else max_epochs
        self.recorder = (
            self.recorder and self.recorder.anew()
        )  # what was loaded since lies elsewhere in memory
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
        return compiled(self.model, self._compiled_parts)

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
            raise DataError(three_beats("at least one batch in an epoch", "none", fix))
        self.model.train()
        self.before_epoch()
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
            **self._changes_of_epoch(),
        }
        self.model.eval()
        row |= self.validate()
        self.rows.append(row)
        self._keep_best(row)
        self.epoch += 1
        self._call("on_epoch_end", row)

    def _call(self, hook: str, *args) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)
