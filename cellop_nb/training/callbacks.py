"""What can happen around training: a handful of hooks, and the callbacks that every run uses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from ..errors import ModelError, checked, counted
from ..files import write_whole
from ..packages import require

__all__ = [
    "Callback",
    "EarlyStopping",
    "HistoryCSV",
    "MLflow",
    "ProgressBar",
    "Pruning",
    "Replay",
    "SaveCheckpoints",
    "TensorBoard",
    "WeightsAndBiases",
]


class Callback:
    """Hooks that do nothing; override what is needed. Each gets the trainer, which carries all state."""

    def on_fit_start(self, trainer) -> None:
        """Before the first epoch."""

    def on_step_end(self, trainer) -> None:
        """After each optimiser step."""

    def on_pause(self, trainer) -> None:
        """When training holds, and after each change made by hand while it holds."""

    def on_epoch_end(self, trainer, row: dict) -> None:
        """After each epoch; `row` is the epoch's line of the history."""

    def on_exception(self, trainer, error: BaseException) -> None:
        """When training fails, before the error is raised again."""

    def on_fit_end(self, trainer) -> None:
        """When training ends, however it ends."""


def callback_list(callbacks: Iterable[Callback] | Callback) -> list[Callback]:
    """One callback or several as a list; refuses what is none."""
    listed = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for one in listed:
        if not isinstance(one, Callback):
            problem = f"the class {one.__name__}" if isinstance(one, type) else f"a {type(one).__name__}"
            fix = "pass objects of classes that are derived from cellop_nb.callbacks.Callback"
            raise ModelError("a list of callbacks", problem, fix)
    return listed


class EarlyStopping(Callback):
    """Stop when the monitored column has not improved for `patience` epochs.

    Parameters
    ----------
    patience
        Epochs without improvement that are waited for.
    min_delta
        Smallest decrease of the monitored value that counts as an improvement.
    """

    @checked
    def __init__(self, patience: int = 20, *, min_delta: float = 0.0):
        self.patience, self.min_delta = patience, min_delta

    def on_fit_start(self, trainer) -> None:
        trainer.patience = self.patience
        self._judge(trainer)  # a run that was killed after its last epoch has no epoch left

    def on_epoch_end(self, trainer, row: dict) -> None:
        self._judge(trainer)

    def _judge(self, trainer) -> None:
        best, waited = float("inf"), 0
        for row in trainer.rows:
            value = row.get(trainer.monitor, float("inf"))
            best, waited = (value, 0) if value < best - self.min_delta else (best, waited + 1)
        if waited >= self.patience:
            trainer.stop(f"{trainer.monitor} has not improved for {counted(self.patience, 'epoch')}")


class Pruning(Callback):
    """Let a sweep end this run early, when its validation curve is worse than the median of the other runs'.

    Outside of ``sweep ... --prune`` it does nothing.

    Parameters
    ----------
    run_dir
        The run folder: a sweep leaves a file there that names its study.

    Raises
    ------
    optuna.TrialPruned
        At the end of the epoch after which the run is given up.
    """

    def __init__(self, run_dir: str | Path):
        path = Path(run_dir) / "trial.json"
        self._about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        self._trial: Any = None

    def on_epoch_end(self, trainer, row: dict) -> None:
        if self._about is None or trainer.monitor not in row:
            return
        import optuna
        from optuna.storages.journal import JournalFileBackend

        if self._trial is None:
            backend = JournalFileBackend(self._about["journal"])
            storage = optuna.storages.JournalStorage(backend)
            study = optuna.load_study(study_name=self._about["study"], storage=storage)
            study.pruner = optuna.pruners.MedianPruner(n_warmup_steps=trainer.max_epochs // 10)
            number = storage.get_study_id_from_name(study.study_name), self._about["number"]
            self._trial = optuna.trial.Trial(study, storage.get_trial_id_from_study_id_trial_number(*number))
        self._trial.report(self._about["sign"] * row[trainer.monitor], row["epoch"])
        if self._trial.should_prune():
            raise optuna.TrialPruned(f"{trainer.monitor} is worse than that of half of the other runs")


class Replay(Callback):
    """Make the changes of an earlier run again, each before the same step, so that the run is repeated.

    Parameters
    ----------
    changes
        ``trainer.changes`` of that run, or ``"changed_by_hand"`` of its ``metrics.json``.
    """

    def __init__(self, changes: Iterable[Mapping]):
        self.changes = [dict(change) for change in changes]

    def on_fit_start(self, trainer) -> None:
        self._make(trainer)

    def on_step_end(self, trainer) -> None:
        self._make(trainer)

    def _make(self, trainer) -> None:
        for change in self.changes:
            if change["step"] == trainer.step:
                name, value = change["name"], change["value"]
                trainer.stop() if name == "stop" else trainer.change(name, value)


class ProgressBar(Callback):
    """One bar over the epochs, with the monitored value."""

    def __init__(self, description: str = "training"):
        self.description = description
        self._bar: Any = None

    def on_fit_start(self, trainer) -> None:
        self._bar = tqdm(total=trainer.max_epochs, initial=trainer.epoch, desc=self.description, unit="epoch")

    def on_epoch_end(self, trainer, row: dict) -> None:
        self._bar.set_postfix(
            {trainer.monitor: f"{row.get(trainer.monitor, float('nan')):.4g}"}, refresh=False
        )
        self._bar.update()

    def on_fit_end(self, trainer) -> None:
        if self._bar is not None:
            self._bar.close()


class HistoryCSV(Callback):
    """Write the history after every epoch, to a temporary name first, so that no half file is ever seen."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def on_epoch_end(self, trainer, row: dict) -> None:
        write_whole(self.path, lambda part: pd.DataFrame(trainer.rows).to_csv(part, index=False))


class SaveCheckpoints(Callback):
    """Save ``last.pt`` after every epoch, and ``best.pt`` whenever the monitored value improves."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def on_epoch_end(self, trainer, row: dict) -> None:
        if trainer.best_epoch == row["epoch"]:
            trainer.save_checkpoint(self.folder / "best.pt")
        trainer.save_checkpoint(self.folder / "last.pt")


# -- where others keep their runs


def _numbers(row: Mapping) -> dict[str, float]:
    """The finite numbers of a line of the history."""
    values = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


class TensorBoard(Callback):
    """Write every column of the history as a TensorBoard scalar, by epoch: ``tensorboard --logdir FOLDER`` shows them.

    Parameters
    ----------
    folder
        Where the event files go; one folder for each run.
    """

    def __init__(self, folder: str | Path):
        require("tensorboard", "logging", of="TensorBoard")
        self.folder = Path(folder)
        self._writer: Any = None

    def on_fit_start(self, trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder))

    def on_epoch_end(self, trainer, row: dict) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["epoch"])

    def on_fit_end(self, trainer) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflow(Callback):
    """Log every column of the history to MLflow, by epoch; to the active run, or to one that lasts as long as the fit.

    Parameters
    ----------
    run_name
        Name of a run that is started; the tracking address is that of ``mlflow.set_tracking_uri``.
    """

    def __init__(self, run_name: str | None = None):
        require("mlflow", "logging", of="MLflow")
        self.run_name, self._owns = run_name, False

    def on_fit_start(self, trainer) -> None:
        import mlflow

        self._owns = mlflow.active_run() is None
        if self._owns:
            mlflow.start_run(run_name=self.run_name)

    def on_epoch_end(self, trainer, row: dict) -> None:
        import mlflow

        # MLflow takes no brackets and commas in a name
        named = {re.sub(r"[^\w. /-]", "_", name): value for name, value in _numbers(row).items()}
        mlflow.log_metrics(named, step=row["epoch"])

    def on_fit_end(self, trainer) -> None:
        import mlflow

        if self._owns:
            failed = trainer.status == "failed"
            mlflow.end_run("FAILED" if failed else "FINISHED")


class WeightsAndBiases(Callback):
    """Log every column of the history to Weights & Biases, by epoch.

    Parameters
    ----------
    run
        What ``wandb.init(...)`` gave, which is left open; None starts a run of its own for each fit.
    """

    def __init__(self, run: Any = None):
        require("wandb", "logging", of="Weights & Biases")
        self.run, self._owns = run, run is None

    def on_fit_start(self, trainer) -> None:
        import wandb

        if self._owns:
            self.run = wandb.init()

    def on_epoch_end(self, trainer, row: dict) -> None:
        self.run.log(_numbers(row), step=row["epoch"], commit=True)

    def on_fit_end(self, trainer) -> None:
        if self._owns and self.run is not None:
            self.run.finish(exit_code=int(trainer.status == "failed"))
