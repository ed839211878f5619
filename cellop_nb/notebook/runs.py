"""Notebooks executed without a browser: papermill runs them, each in the folder of its run.

A run folder holds the executed notebooks and, beside each, a folder of the same name with what it wrote:
`02_train_vae.ipynb` and `02_train_vae/metrics.json`, figures, tables, checkpoints. What executes notebooks is imported
when one is executed: the command line refuses wrong values before there is an environment.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakSet

from ..errors import DataError, SetupError, StorageError
from ..files import read_json, storing, write_whole
from ..packages import require
from . import parameters

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PATIENCE = 15.0
"""Seconds that a kernel is given to end by itself. An idle one takes a fraction of a second, or several where the machine
is busy: interrupted meanwhile, it writes the traceback of its own callbacks to the terminal."""


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook in the `folder` of its run.

    `error` is empty where it ran to its end; `cell` counts as in `In [3]`; `metrics` are the content of `metrics.json`.
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
    """Execute one notebook, with `values` that differ from its defaults, in a run folder: its working directory.

    `on_cell` is called with the number of the cell that starts (from 1) and the number of cells; a cell may take
    `timeout` seconds. A failing notebook is an outcome with an `error`, not an exception; values that do not fit are
    refused before anything runs.
    """
    notebook, folder = Path(notebook), Path(folder).resolve()
    values = parameters.validate(notebook, values or {})
    if any(parameter.name == "run_dir" for parameter in parameters.for_notebook(notebook)):
        values = {"run_dir": ".", **values}  # the notebook's own default is for work by hand
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    metrics_file(folder, notebook.stem).unlink(missing_ok=True)  # an old result must not pass for a new one
    start = time.monotonic()
    error, cell = _papermill(notebook, folder, values, on_cell, timeout)
    seconds = time.monotonic() - start
    try:
        metrics = read_metrics(folder, notebook.stem)
    except DataError as damage:
        metrics, error = {}, error or str(damage)
    return Outcome(notebook.stem, folder, seconds, error, cell, metrics)


def _papermill(
    notebook: Path, folder: Path, values: dict, on_cell: Callable | None, timeout: int | None
) -> tuple[str, int | None]:
    """Run papermill; the error and the failing cell, or `("", None)`."""
    require("papermill", "notebook", of="executing notebooks")
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    # papermill infers parameters with a pattern that does not know `str | None`, and warns of them as unknown
    logging.getLogger("papermill").setLevel(logging.ERROR)
    _write_notebooks_whole()
    with kernel_settings() as settings:
        try:
            papermill.execute_notebook(
                str(notebook), str(folder / notebook.name), parameters=values,
                # the kernel's folder alone: `cwd=` changes that of this process, which other lanes share
                resources={"metadata": {"path": str(folder)}},
                progress_bar=False, execution_timeout=timeout, on_cell_start=_counter(notebook, on_cell),
                **settings,
            )  # fmt: skip
        except StorageError as problem:
            return f"StorageError: {problem}", None
        except papermill.PapermillExecutionError as problem:
            return _ANSI.sub("", f"{problem.ename}: {problem.evalue}"), problem.exec_count
        except NoSuchKernel as problem:
            fix = "run `pip install ipykernel` in this environment"
            raise SetupError("a Python kernel", str(problem), fix) from problem
        except (CellTimeoutError, DeadKernelError) as problem:
            return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}", None
    return "", None


@cache
def _write_notebooks_whole() -> None:
    """Have papermill write its notebooks as we write files, cell after cell: half a notebook cannot be opened."""
    from papermill.iorw import LocalHandler, papermill_io

    class Whole(LocalHandler):
        def write(self, buf, path) -> None:
            write_whole(path, lambda part: part.write_text(buf, encoding="utf-8"))

    papermill_io.register(os.sep, Whole())


def _counter(notebook: Path, on_cell: Callable[[int, int], None] | None) -> Callable | None:
    if on_cell is None:
        return None
    total = len(read_json(notebook, "a notebook", "copy the file again")["cells"])

    def started(cell: Any, cell_index: int) -> None:
        # papermill may have put a cell of its own among them
        on_cell(min(cell_index + 1, total), total)

    return started


# -- kernels: how they are found, reached and ended


@contextmanager
def surroundings(variables: Mapping[str, str] | None = None) -> Iterator[None]:
    """Kernels import this very package, and are those of this environment, not of the user's home.

    `variables` are further environment variables for them; all are as before at the end.
    """
    package_home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_home, os.environ.get("PYTHONPATH")]))
    during = {**(variables or {}), "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
    before = {name: os.environ.get(name) for name in during}
    os.environ.update(during)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def shares(lanes: int | None = None) -> dict[str, str]:
    """Environment of kernels of which so many run side by side: each has its share of the cores, one where None.

    Its waiting threads must not keep a core from the others.
    """
    cores = 1 if lanes is None else max(1, (os.cpu_count() or 1) // lanes)
    threads = os.environ.get("OMP_NUM_THREADS", str(cores))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**dict.fromkeys(names, threads), "OMP_WAIT_POLICY": "PASSIVE"}


@contextmanager
def lanes(number: int) -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """Threads that execute notebooks side by side, and what says that they are to end.

    Left while notebooks are at work, it ends their kernels, and waits until the threads have come to their end.
    """
    stopped = threading.Event()
    with surroundings(shares(number)), ThreadPoolExecutor(number) as pool:
        try:
            yield pool, stopped
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while any(thread.is_alive() for thread in pool._threads):
                end_kernels()
                time.sleep(0.05)


@contextmanager
def kernel_settings() -> Iterator[dict]:
    """Keywords of a notebook client (nbclient, papermill) inside our :func:`surroundings`.

    Its sockets lie in a folder of the run's own: no two kernels ever race for a port, and the path stays short.
    """
    from traitlets.config import Config

    settings: dict[str, Any] = {"kernel_name": "python3", "kernel_manager_class": _patient_manager()}
    settings["store_widget_state"] = False
    with tempfile.TemporaryDirectory(prefix="cellop-") as sockets, surroundings():
        if os.name != "nt":
            connection = {"transport": "ipc", "connection_file": os.path.join(sockets, "kernel.json")}
            settings["config"] = Config({"KernelManager": connection})
        yield settings


_managers: WeakSet = WeakSet()


def end_kernels() -> None:
    """End the kernels of this process at once, and what they started, in whichever thread their notebooks run."""
    for manager in list(_managers):
        process = getattr(manager.provisioner, "process", None)
        if process is None or process.poll() is not None:
            continue
        if os.name != "nt" and os.getpgid(process.pid) == process.pid:  # never our own group
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


@cache
def _patient_manager() -> type:
    """A kernel manager that asks a kernel to end before it interrupts it.

    jupyter_client interrupts first. The kernel may then still be at the end of its last answer, which it has sent
    already, and says on the terminal that it was interrupted: an error message where nothing went wrong. A kernel that
    is busy (a cell was given up) does not end when asked, and is interrupted as ever.
    """
    from jupyter_client import AsyncKernelManager

    class PatientKernelManager(AsyncKernelManager):
        async def start_kernel(self, *arguments, **settings) -> None:  # type: ignore[override]
            """Start the kernel, and remember it for :func:`end_kernels`."""
            _managers.add(self)
            await super().start_kernel(*arguments, **settings)

        async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]
            """End the kernel: by request, then by interrupt, then by force."""
            if self.has_kernel and not now:
                self.shutting_down = True
                await self.request_shutdown(restart)
                end = asyncio.get_running_loop().time() + _PATIENCE
                while await self.is_alive() and asyncio.get_running_loop().time() < end:
                    await asyncio.sleep(0.02)
            await super().shutdown_kernel(now=now, restart=restart)

    return PatientKernelManager


# -- key numbers of a notebook


def metrics_file(run_dir: str | Path, notebook: str) -> Path:
    """Where a notebook's key numbers lie in a run folder."""
    return Path(run_dir) / notebook / "metrics.json"


def read_metrics(run_dir: str | Path, notebook: str) -> dict[str, Any]:
    """Key numbers of a notebook; empty where it wrote none, refused where the file is damaged."""
    path = metrics_file(run_dir, notebook)
    return read_json(path, "key numbers of a notebook", "run the notebook again") if path.is_file() else {}


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
