"""Running what is missing of a sweep: at most so many kernels at once, each run whole or not counted."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cellop_nb.errors import DataError, three_beats
from cellop_nb.notebook import batch
from cellop_nb.notebook.sweeps import store
from cellop_nb.notebook.sweeps.cluster import await_first, connected
from cellop_nb.notebook.sweeps.plan import Run

logger = logging.getLogger("cellop_nb")

_ABANDONED = 24 * 3600.0  # seconds after which a draft on a shared disk has no owner any more


def missing(folder: Path, runs: Sequence[Run], *, retry_failed: bool = False) -> list[Run]:
    """Runs that have no result yet, or a bad one that is to be tried again."""
    kept = ("done",) if retry_failed else ("done", "failed")
    return [run for run in runs if (store.result_of(folder / run.key) or {}).get("status") not in kept]


def execute(
    notebook: Path,
    folder: Path,
    runs: Sequence[Run],
    *,
    where: str = "local",
    workers: int = 1,
    timeout: int | None = None,
    options: dict | None = None,
    retry_failed: bool = False,
    tell: Callable[[str], None] = logger.warning,
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Execute the missing runs, and yield each with its result as it ends.

    Parameters
    ----------
    notebook
        The notebook; a copy of it is taken at the start, so that it may be edited meanwhile.
    folder
        Folder of the sweep; see :mod:`~cellop_nb.notebook.sweeps.store`.
    runs
        The planned runs.
    where, options
        As in :func:`~cellop_nb.notebook.sweeps.cluster.connected`.
    workers
        Kernels that may run at once.
    timeout
        Seconds that one cell may take; None: no limit.
    tell
        Told while no worker has started.

    Raises
    ------
    DataError
        When another sweep works in `folder`, or the cluster is lost. What has ended is kept.
    """
    with store.locked(folder):
        store.sweep_up(folder, older_than=0.0 if where == "local" else _ABANDONED)
        todo = missing(folder, runs, retry_failed=retry_failed)
        if not todo:
            return
        copy = store.draft(folder, "notebook") / notebook.name
        shutil.copyfile(notebook, copy)
        tasks = [
            (str(copy), str(folder), run.values, run.key, timeout, _environment(where, workers))
            for run in todo
        ]
        with connected(where, min(workers, len(todo)), options) as client:
            await_first(client, where, tell)
            for position, result in _windowed(client, tasks, workers):
                run = todo[position]
                yield run, result if "status" in result else _give_up(folder, run, result["error"])
        shutil.rmtree(copy.parent, ignore_errors=True)


def _windowed(client, tasks: list[tuple], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Results by position, never more than `workers` tasks given out: a kernel's memory is not Dask's to bound."""
    from distributed import as_completed

    waiting = iter(enumerate(tasks))
    position = {}

    def submit(item):
        number, task = item
        future = client.submit(run_one, *task, key=f"cellop-{task[3]}", pure=False)
        position[future.key] = number
        return future

    ended = as_completed([submit(item) for item in islice(waiting, workers)], loop=client.loop)
    for future in ended:
        if future.status == "finished":
            result = future.result()
        elif future.status == "error":
            result = {"error": _why(future.exception())}
        else:
            fix = "start the cluster and run the same command again; finished runs are kept"
            raise DataError(three_beats("a Dask cluster until the end", f"a run was {future.status}", fix))
        yield position[future.key], result
        following = next(waiting, None)
        if following is not None:
            ended.add(submit(following))


def _why(error: BaseException) -> str:
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return "KilledWorker: every worker that ran it died (out of memory?)"
    return f"{type(error).__name__}: {error}"


def _give_up(folder: Path, run: Run, error: str) -> dict[str, Any]:
    """Keep a run that no worker could end as a failed one."""
    result = _result(run.values, "failed", error, 0.0, {})
    store.finish(store.draft(folder, run.key), folder / run.key, result)
    return result


def run_one(
    notebook: str, folder: str, values: dict, key: str, timeout: int | None, environment: dict[str, str]
) -> dict[str, Any]:
    """In a worker: one run, in a hidden folder that becomes the run's own when it has ended."""
    os.environ.update(environment)
    target = Path(folder) / key
    found = store.result_of(target)
    if found and found["status"] == "done":  # another worker, believed dead, ended it after all
        return found
    work = store.draft(Path(folder), key)
    start = time.monotonic()
    outcome = batch.execute(notebook, work, values, timeout=timeout)
    status = "failed" if outcome.error else "done"
    result = _result(values, status, outcome.error, time.monotonic() - start, outcome.metrics)
    store.finish(work, target, result)
    return store.result_of(target) or result


def _result(values: dict, status: str, error: str, seconds: float, metrics: dict) -> dict[str, Any]:
    return {
        "status": status,
        "error": error,
        "seconds": round(seconds, 3),
        "values": values,
        "metrics": metrics,
    }


def _environment(where: str, workers: int) -> dict[str, str]:
    """Each kernel's share of the cores; its waiting threads must not keep one from the others."""
    share = max(1, (os.cpu_count() or 1) // workers) if where == "local" else 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(share)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**dict.fromkeys(names, threads), "OMP_WAIT_POLICY": "PASSIVE"}
