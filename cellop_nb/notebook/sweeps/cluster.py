"""Where a sweep's kernels run: workers of this machine, jobs of a batch system, or a Dask cluster that is there."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cellop_nb.errors import DataError, LabelError, did_you_mean, three_beats

QUEUES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "sge": "SGECluster"}
_SUBMIT = {"slurm": "sbatch", "pbs": "qsub", "sge": "qsub"}
KERNEL_GB = 1.0
"""Memory that a kernel with torch, scanpy and a small screen takes; Dask does not see it, so kernels are counted."""

_SEARCH_SECONDS = 30


def check_where(where: str) -> str:
    """Refuse what is neither `local`, nor a batch system we know, nor an address."""
    if where != "local" and where not in QUEUES and "://" not in where:
        fix = did_you_mean(where, ["local", *QUEUES])
        raise LabelError(three_beats("--cluster local, slurm, pbs, sge or tcp://HOST:PORT", repr(where), fix))
    return where


def check_queue(where: str) -> None:
    """Refuse a batch system whose command is not here: dask-jobqueue would wait for its workers for ever."""
    if where in QUEUES and shutil.which(_SUBMIT[where]) is None:
        fix = "run this where jobs are submitted (a login node), or leave --cluster out to run here"
        found = f"no command {_SUBMIT[where]} on this machine"
        raise DataError(three_beats(f"a machine that hands jobs to {where}", found, fix))


def check_job(memory: str, walltime: str) -> None:
    """Refuse what the batch system would not read as an amount of memory and a time."""
    if not re.fullmatch(r"\d+(\.\d+)? ?[kMGT]i?B", memory):
        raise DataError(three_beats("--memory such as 4GB", repr(memory), "write a number and MB or GB"))
    if not re.fullmatch(r"(\d+-)?\d+:\d\d(:\d\d)?", walltime):
        fix = "write hours:minutes:seconds, or days-hours:minutes:seconds"
        raise DataError(three_beats("--walltime such as 04:00:00", repr(walltime), fix))


def default_workers() -> int:
    """Kernels that this machine has room for: by its cores and its free memory."""
    import psutil

    room = psutil.virtual_memory().available / 1e9 // KERNEL_GB
    return int(max(1, min(os.cpu_count() or 1, room)))


@contextmanager
def connected(where: str, workers: int, options: dict | None = None) -> Iterator:
    """A Dask client with `workers` single-threaded workers; all that was started is gone at the end.

    Parameters
    ----------
    where
        As :func:`check_where` takes it.
    workers
        Kernels that may run at once.
    options
        Keywords of :func:`queue_cluster` for a batch system, else unused.

    Raises
    ------
    DataError
        When the package for the batch system is missing, or no worker answers at the address.
    """
    from distributed import Client

    if "://" in where:
        client = _found(where)
        try:
            yield client
        finally:
            client.close()
        return
    with (
        tempfile.TemporaryDirectory(prefix="cellop-dask-") as scratch,
        _started(where, workers, scratch, options or {}) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def await_first(client, where: str, tell: Callable[[str], None], *, every: float = 30.0) -> None:
    """Wait until a worker is there, and say so: a queued job may wait for hours, and a broken one for ever."""
    waited = 0.0
    while True:
        try:
            return client.wait_for_workers(1, timeout=every)
        except TimeoutError:
            waited += every
            tell(f"{waited:.0f} s and no worker yet: see the queue of {where} and the logs of its jobs")


def _found(address: str):
    from distributed import Client

    try:
        client = Client(address, timeout=_SEARCH_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        fix = "start `dask scheduler` there, and check host, port and firewall"
        raise DataError(three_beats(f"a Dask scheduler at {address}", f"none ({error})", fix)) from error
    try:
        client.wait_for_workers(1, timeout=_SEARCH_SECONDS)
    except TimeoutError as error:
        client.close()
        fix = f"start `dask worker {address}` where the kernels shall run"
        raise DataError(three_beats(f"workers at {address}", "none", fix)) from error
    return client


def _started(where: str, workers: int, scratch: str, options: dict):
    if where == "local":
        from distributed import LocalCluster

        # Ports are chosen by the system, and nothing but this machine reaches them.
        return LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", scheduler_port=0,
            dashboard_address="127.0.0.1:0", memory_limit=0, silence_logs=50, local_directory=scratch,
        )  # fmt: skip
    cluster = queue_cluster(where, **options)
    cluster.scale(jobs=workers)
    return cluster


def queue_cluster(
    where: str,
    *,
    memory: str = "4GB",
    walltime: str = "04:00:00",
    queue: str | None = None,
    account: str | None = None,
    logs: Path | None = None,
):
    """Jobs of one worker and one kernel each; further settings as in dask-jobqueue's `jobqueue.yaml`.

    What the jobs print goes into the folder `logs`.
    """
    try:
        import dask_jobqueue
    except ImportError as error:
        fix = 'run `pip install "dask-jobqueue>=0.9"` in this environment'
        raise DataError(
            three_beats(f"dask-jobqueue for --cluster {where}", "it is not installed", fix)
        ) from error
    home = Path(__file__).resolve().parents[3]
    payer = {"project" if where == "sge" else "account": account} if account else {}
    return getattr(dask_jobqueue, QUEUES[where])(
        cores=1, processes=1, memory=memory, walltime=walltime, queue=queue, **payer,
        log_directory=str(logs) if logs else None,
        scheduler_options={"dashboard_address": "127.0.0.1:0"},
        job_script_prologue=[f'export PYTHONPATH="{home}:$PYTHONPATH"'],
    )  # fmt: skip
