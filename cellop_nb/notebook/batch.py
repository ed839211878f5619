"""Notebooks executed without a browser: papermill runs them, each in the folder of its run.

A run folder holds the executed notebooks and, beside each, a folder of the same name with what it wrote:
`02_train_vae.ipynb` and `02_train_vae/metrics.json`, figures, tables, checkpoints.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellop_nb.errors import SetupError, three_beats
from cellop_nb.files import write_whole
from cellop_nb.notebook import parameters

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook.

    Parameters
    ----------
    notebook
        Name without the suffix.
    folder
        Folder of the run.
    seconds
        Wall time, the start of the kernel included.
    error
        Type and message of the error; empty where the notebook ran to its end.
    cell
        Execution count of the failing cell, as in `In [3]`.
    metrics
        Content of `metrics.json`.
    """

    notebook: str
    folder: Path
    seconds: float
    error: str = ""
    cell: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        """The executed notebook; kept when it failed, too."""
        return self.folder / f"{self.notebook}.ipynb"


def execute(
    notebook: str | Path,
    folder: str | Path,
    values: Mapping[str, Any] | None = None,
    *,
    on_cell: Callable[[int, int], None] | None = None,
    timeout: int | None = None,
) -> Outcome:
    """Execute one notebook in a run folder.

    Parameters
    ----------
    notebook
        Path of the notebook.
    folder
        Run folder, made when it is not there; the notebook's working directory.
    values
        Parameters that differ from the defaults.
    on_cell
        Called with the number of the cell that starts (from 1) and the number of cells.
    timeout
        Seconds that one cell may take; None: no limit.

    Returns
    -------
    Outcome
        A failing notebook is an outcome with an `error`, not an exception.

    Raises
    ------
    LabelError, ParameterError
        When a parameter is unknown or its value does not fit; nothing has run then.
    """
    notebook, folder = Path(notebook), Path(folder).resolve()
    values = parameters.validate(notebook, values or {})
    if any(parameter.name == "run_dir" for parameter in parameters.for_notebook(notebook)):
        values = {"run_dir": ".", **values}  # the notebook's own default is for work by hand
    folder.mkdir(parents=True, exist_ok=True)
    metrics_file(folder, notebook.stem).unlink(missing_ok=True)  # an old result must not pass for a new one
    start = time.monotonic()
    error, cell = _papermill(notebook, folder, values, on_cell, timeout)
    seconds = time.monotonic() - start
    return Outcome(notebook.stem, folder, seconds, error, cell, read_metrics(folder, notebook.stem))


def _papermill(
    notebook: Path, folder: Path, values: dict, on_cell: Callable | None, timeout: int | None
) -> tuple[str, int | None]:
    """Run papermill; the error and the failing cell, or `("", None)`."""
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    from cellop_nb.notebook import kernels  # not at the top: refusals come before there is an environment

    # papermill infers parameters with a pattern that does not know `str | None`, and warns of them as unknown
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="cellop-") as sockets, kernels.surroundings():
        try:
            papermill.execute_notebook(
                str(notebook), str(folder / notebook.name), parameters=values,
                # the kernel's folder alone: `cwd=` changes that of this process, which other lanes share
                resources={"metadata": {"path": str(folder)}},
                progress_bar=False, execution_timeout=timeout, on_cell_start=_counter(notebook, on_cell),
                **kernels.options(sockets),
            )  # fmt: skip
        except papermill.PapermillExecutionError as problem:
            return _ANSI.sub("", f"{problem.ename}: {problem.evalue}"), problem.exec_count
        except NoSuchKernel as problem:
            fix = "run `pip install ipykernel` in this environment"
            raise SetupError(three_beats("a Python kernel", str(problem), fix)) from problem
        except (CellTimeoutError, DeadKernelError) as problem:
            return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}", None
    return "", None


def _counter(notebook: Path, on_cell: Callable[[int, int], None] | None) -> Callable | None:
    if on_cell is None:
        return None
    total = len(json.loads(notebook.read_text(encoding="utf-8"))["cells"])

    def started(cell: Any, cell_index: int) -> None:
        # papermill may have put a cell of its own among them
        on_cell(min(cell_index + 1, total), total)

    return started


def metrics_file(run_dir: str | Path, notebook: str) -> Path:
    """Where a notebook's key numbers lie in a run folder."""
    return Path(run_dir) / notebook / "metrics.json"


def write_metrics(run_dir: str | Path, notebook: str, metrics: Mapping[str, Any]) -> Path:
    """Write a notebook's key numbers; the first ones stand in the closing table of `run`.

    Parameters
    ----------
    run_dir
        Run folder.
    notebook
        Name of the notebook, which is the name of its folder there.
    metrics
        Name to number, text, or nested dicts and lists of them. Numpy and torch scalars are converted; a
        number that is not finite becomes null.

    Returns
    -------
    Path
        The file, `<run_dir>/<notebook>/metrics.json`.
    """
    path = metrics_file(run_dir, notebook)
    write_json(path, metrics)
    return path


def read_metrics(run_dir: str | Path, notebook: str) -> dict[str, Any]:
    """Key numbers of a notebook; empty where it wrote none."""
    path = metrics_file(run_dir, notebook)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step: a reader, or a run killed here, never leaves or sees half a file."""
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _plain(value: Any) -> Any:
    """The value in the types of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
