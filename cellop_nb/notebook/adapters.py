"""Show the training of other packages: Lightning, and what is built on it (scvi-tools)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module

from cellop_nb.notebook.live import LivePlot

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(live: LivePlot):
    """A Lightning callback that shows `trainer.callback_metrics` of each epoch.

    Works for `lightning`, `pytorch_lightning`, and ``model.train(callbacks=[...])`` of scvi-tools. Patience is shown
    where the trainer stops early. Without either package it is a plain object with the same hooks.

    Returns
    -------
    A callback whose `rows` holds one row per epoch.
    """

    class LightningLive(*_bases()):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.live = live
            self.rows: list[dict] = []

        def on_train_start(self, trainer, module) -> None:
            self.rows = []
            self.live.update(self.rows, source=_Run(trainer))

        def on_train_epoch_end(self, trainer, module) -> None:
            row = {"epoch": getattr(trainer, "current_epoch", len(self.rows))}
            self.rows.append(row | row_from_metrics(trainer.callback_metrics))
            self.live.update(self.rows, source=_Run(trainer))

        def on_train_end(self, trainer, module) -> None:
            self.live.finish(self.rows, source=_Run(trainer, "finished"))

        def on_exception(self, trainer, module, exception) -> None:
            status = "stopped" if isinstance(exception, KeyboardInterrupt) else "failed"
            self.live.finish(self.rows, source=_Run(trainer, status))

    return LightningLive()


class _Run:
    """What a picture asks about a training, answered by a Lightning trainer."""

    def __init__(self, trainer, status: str = "running") -> None:
        stopper = getattr(trainer, "early_stopping_callback", None)
        most = getattr(trainer, "max_epochs", None)
        self.status, self.step = status, getattr(trainer, "global_step", None)
        self.max_epochs = most if most and most > 0 else None  # -1: without end
        self.monitor = None if stopper is None else _column(stopper.monitor)
        self.patience = None if stopper is None else stopper.patience


def _bases() -> tuple[type, ...]:
    """Callback classes of the packages in use: a trainer takes only those of its own."""
    loaded = [sys.modules[name].Callback for name in _PACKAGES if name in sys.modules]
    if loaded:
        return tuple(loaded)
    for name in _PACKAGES:
        try:
            return (import_module(name).Callback,)
        except ImportError:
            continue
    return (object,)


def row_from_metrics(metrics: Mapping[str, object]) -> dict[str, float]:
    """Metric names as columns of our history: `elbo_validation` and `val_elbo_epoch` become `val_elbo`.

    Per-step values are left out.
    """
    return {_column(name): float(value) for name, value in metrics.items() if not name.endswith("_step")}


def _column(name: str) -> str:
    name = name.removesuffix("_epoch")
    for word, kind in (("validation", "val"), ("valid", "val"), ("val", "val"), ("train", "train")):
        if name.startswith(f"{word}_"):
            return f"{kind}_{name.removeprefix(f'{word}_')}"
        if name.endswith(f"_{word}"):
            return f"{kind}_{name.removesuffix(f'_{word}')}"
    return name
