"""The report of a sweep: its table in two formats, and an executed notebook that reads it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cellop_nb.errors import CellopError, three_beats
from cellop_nb.files import write_whole
from cellop_nb.notebook import batch
from cellop_nb.notebook.sweeps import store, table
from cellop_nb.notebook.sweeps.plan import Run

TEMPLATE = Path(__file__).with_name("summary.ipynb")
_ABOUT = "sweep.json"


class ReportError(CellopError):
    """The summary notebook did not run to its end."""


class Sweep:
    """A finished sweep, as its report reads it.

    Parameters
    ----------
    folder
        Folder of the sweep, with ``runs.parquet`` and ``sweep.json``.
    metric, best
        The number to compare and whether ``"min"`` or ``"max"`` is good; chosen by name where empty.

    Attributes
    ----------
    runs
        Table of :func:`~cellop_nb.notebook.sweeps.table.collect`.
    varied
        Parameters that vary, ``seed`` last.
    """

    def __init__(self, folder: str | Path = ".", *, metric: str = "", best: str = ""):
        self.folder = Path(folder)
        about = store.read(self.folder / _ABOUT)
        self.notebook, names = about["notebook"], about["parameters"]
        self.runs = pd.read_parquet(self.folder / "runs.parquet")
        self.varied = table.parameters_of(self.runs, names)
        self.metric = table.metric_of(self.runs, names, metric or None)
        self.best = table.direction_of(self.metric, best or None)

    def __repr__(self) -> str:
        states = ", ".join(f"{n} {state}" for state, n in self.runs["status"].value_counts().items())
        good = "lowest" if self.best == "min" else "highest"
        return f"Sweep of {self.notebook}: {states}; {self.metric}, {good} is best"

    def effects(self) -> pd.DataFrame:
        """Effect of each value, see :func:`~cellop_nb.notebook.sweeps.table.effects`."""
        return table.effects(self.runs, self.varied, self.metric)

    def trends(self) -> pd.DataFrame:
        """Rank correlation of each numeric parameter, see :func:`~cellop_nb.notebook.sweeps.table.trends`."""
        return table.trends(self.runs, self.varied, self.metric)

    def settings(self, n: int = 10) -> pd.DataFrame:
        """Best combinations, seeds pooled."""
        return table.best_settings(self.runs, self.varied, self.metric, self.best, n=n)

    def best_runs(self, n: int = 10) -> pd.DataFrame:
        """The best single runs."""
        shown = ["run", *self.varied, self.metric, "seconds", "notebook"]
        return table.best_runs(self.runs, self.metric, self.best, n=n)[shown]

    def failed(self) -> pd.DataFrame:
        """Runs that failed, and why."""
        return self.runs.loc[self.runs["status"] == "failed", ["run", *self.varied, "error", "notebook"]]

    def linked(self, frame: pd.DataFrame):
        """A table whose runs are links to their executed notebooks."""
        from IPython.display import HTML

        shown = frame.assign(run=[_link(row) for row in frame.to_dict("records")]).drop(columns="notebook")
        text = [name for name in shown if name != "run"]
        shown[text] = shown[text].map(lambda value: _escaped(value) if isinstance(value, str) else value)
        return HTML(shown.to_html(index=False, escape=False, float_format="{:.4g}".format))


def _link(row: dict) -> str:
    return f'<a href="{_escaped(row["notebook"])}">{row["run"]}</a>' if row["notebook"] else row["run"]


def _escaped(text: str) -> str:
    from html import escape

    return escape(text)


def write(
    notebook: Path, folder: Path, runs: Sequence[Run], *, metric: str | None = None, best: str | None = None
) -> pd.DataFrame:
    """Write ``runs.parquet``, ``runs.csv``, ``sweep.json`` and the executed ``summary.ipynb``.

    Returns
    -------
    The table.

    Raises
    ------
    LabelError
        When no run wrote the metric.
    ReportError
        When the summary notebook fails.
    """
    frame = table.collect(folder, runs, notebook.stem)
    names = list(runs[0].values)
    write_whole(folder / "runs.parquet", lambda path: _typed(frame).to_parquet(path, index=False))
    write_whole(folder / "runs.csv", lambda path: frame.to_csv(path, index=False))
    batch.write_json(folder / _ABOUT, {"notebook": notebook.stem, "parameters": names})
    if (frame["status"] == "done").any():
        chosen = table.metric_of(frame, names, metric)
        _summary(folder, {"metric": chosen, "best": table.direction_of(chosen, best)})
    return frame


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """A column of several types (`none` among numbers) as text: parquet holds one type a column."""
    mixed = [name for name in frame if frame[name].dropna().map(type).nunique() > 1]
    return frame.astype(dict.fromkeys(mixed, str))


def _summary(folder: Path, values: dict) -> None:
    work = store.draft(folder, "summary")
    try:
        outcome = batch.execute(TEMPLATE, work, {**values, "folder": str(folder)})
        os.replace(outcome.output, folder / TEMPLATE.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if outcome.error:
        fix = f"open {folder / TEMPLATE.name}; the table is complete in {folder / 'runs.csv'}"
        raise ReportError(three_beats("the report to run to its end", outcome.error, fix))
