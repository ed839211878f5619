"""The training history as one static figure, with the panels of the live picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cellop_nb.notebook.figures import changes
from cellop_nb.notebook.figures.dashboard import Dashboard, Marks
from cellop_nb.notebook.figures.panels import Columns, pick_panels


def training_curves(
    history: pd.DataFrame | Sequence[Mapping[str, object]],
    *,
    floors: Mapping[str, float] | None = None,
    monitor: str | None = None,
    patience: int | None = None,
    title: str = "",
) -> Figure:
    """Every number of a training history, one panel each, with the best epoch and the changes by hand marked.

    Parameters
    ----------
    history
        One row per epoch, as `trainer.history`.
    floors
        Split-half noise floor by group label; drawn beside `val_energy[<group>]`.
    monitor
        Column whose minimum is the best epoch; `val_loss`, else `train_loss`.
    patience
        Epochs without improvement that early stopping allows, shaded behind the best epoch.
    """
    columns = Columns()
    rows = history.to_dict("records") if isinstance(history, pd.DataFrame) else list(history)
    columns.extend(rows)
    monitor = monitor or default_monitor(columns)
    best = best_epoch(columns, monitor)
    headline = title or f"{columns.n_rows} epochs" + (
        "" if best is None else f", best epoch {best + 1:g} ({monitor})"
    )
    board = Dashboard(pick_panels(columns.names(), columns.constant()), monitor=monitor)
    board.update(columns, Marks(headline, monitor, best, patience, floors or {}, changes.of_history(rows)))
    return board.sheet.fig


def default_monitor(columns: Columns) -> str:
    """`val_loss`, else `train_loss`, whichever holds numbers."""
    return "val_loss" if "val_loss" in columns.names() else "train_loss"


def best_epoch(columns: Columns, monitor: str) -> float | None:
    """Epoch of the smallest finite value of `monitor`; None where there is none."""
    if monitor not in columns.names():
        return None
    values = columns[monitor]
    return float(columns.epochs()[np.nanargmin(np.where(np.isfinite(values), values, np.nan))])
