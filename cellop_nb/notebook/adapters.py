"""Show the training of other packages: Lightning, and what is built on it (scvi-tools)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from cellop_nb.notebook.live import LivePlot


def lightning_callback(live: LivePlot):
    """A Lightning callback that shows `trainer.callback_metrics` of each epoch.

    Works for `lightning`, `pytorch_lightning`, and `model.train(callbacks=[...])` of scvi-tools. Without
    either package it is a plain object with the same hooks.

    Returns
    -------
    A callback whose `rows` holds one row per epoch.
    """

    class LightningLive(_lightning_base()):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.rows = live, []

        def on_train_epoch_end(self, trainer, module) -> None:
            row = {"epoch": getattr(trainer, "current_epoch", len(self.rows))}
            self.rows.append(row | row_from_metrics(trainer.callback_metrics))
            self.live.update(self.rows, source=trainer)

        def on_train_end(self, trainer, module) -> None:
            self.live.finish(self.rows, source=trainer)

    return LightningLive()


def _lightning_base() -> type:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name).Callback
        except ImportError:
            continue
    return object


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
