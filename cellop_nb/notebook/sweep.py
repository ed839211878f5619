"""Sweeps: one notebook executed for many parameter values, here or on a cluster, and the report of what came out.

In the order of this file: which runs there are (`read_axis`, `plan`), the folder of each, executing them (`execute`), and
their table and report (`write_report`, `Sweep`). Only executing and reporting import more than the standard library: the
command line refuses wrong values before there is an environment.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cellop_nb

from ..errors import CellopError, DataError, LabelError, did_you_mean, three_beats
from ..files import write_whole
from . import parameters, runs
from .parameters import Parameter, ParameterError

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("cellop_nb")

FREE = "run_dir"  # the one parameter that does not change a result
MOST_RUNS = 10_000
"""Runs of a sweep at most: each is a folder with an executed notebook."""

# -- which runs: axes read from text, expanded to a grid or sampled


@dataclass(frozen=True)
class Interval:
    """A continuous range to sample from, uniformly or (`log`) uniformly in the logarithm."""

    low: float
    high: float
    log: bool = False

    def draw(self, source: random.Random) -> float:
        """One value, to four digits: names and tables stay readable."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = source.uniform(low, high)
        value = float(f"{math.exp(value) if self.log else value:.4g}")
        return min(max(value, self.low), self.high)  # rounding must not leave the range


@dataclass(frozen=True)
class Axis:
    """A parameter and the values that it takes in a sweep."""

    name: str
    values: Sequence | Interval


@dataclass(frozen=True)
class Run:
    """One execution of the notebook.

    Attributes
    ----------
    values
        Every parameter of the notebook with its value, the defaults included.
    key
        Digest of what the result depends on: values, the notebook's code, the content of the data, our version.
    """

    values: dict[str, Any]
    key: str


def read_axis(notebook: str | Path, text: str) -> Axis:
    """An axis from `name=values`.

    Values are `8,16,32`, whole numbers `0..4` (both ends included), or, for sampling, `1e-4..1e-2` and
    `log:1e-4..1e-2`. Values that are lists themselves are separated by `;`.

    Raises
    ------
    LabelError
        When the text is no axis, or the notebook has no such parameter.
    ParameterError
        When a value does not fit the parameter.
    """
    name, equals, listed = (part.strip() for part in text.partition("="))
    if not equals or not listed:
        fix = "write -g latent_dim=8,16,32 or -g seed=0..4"
        raise LabelError(three_beats("NAME=VALUES after -g", repr(text), fix))
    if name == FREE:
        fix = "leave it out: every run has a folder of its own"
        raise LabelError(three_beats("a parameter that is free", f"{FREE!r}, set by the sweep", fix))
    parameter = parameters.parameter(notebook, name)
    if ".." in listed and "str" not in parameter.kinds:
        return Axis(name, _span(parameter, listed))
    separator = ";" if any(kind.startswith("list") for kind in parameter.kinds) else ","
    values = tuple(parameter.parse(value) for value in listed.split(separator))
    if len({json.dumps(value) for value in values}) < len(values):
        fix = "name each value once"
        raise LabelError(three_beats(f"different values of {name!r}", repr(list(values)), fix))
    return Axis(name, values)


def _span(parameter: Parameter, text: str) -> range | Interval:
    log = text.startswith("log:")
    first, _, last = text.removeprefix("log:").partition("..")
    low, high = parameter.parse(first), parameter.parse(last)
    if not low < high or (log and low <= 0):
        fix = "write LOW..HIGH with LOW below HIGH, and above 0 after log:"
        raise ParameterError(three_beats(f"a range for the parameter {parameter.name!r}", repr(text), fix))
    if isinstance(low, int) and isinstance(high, int):
        return range(low, high + 1)
    return Interval(float(low), float(high), log)


def expand(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, the last axis changing fastest."""
    endless = [axis.name for axis in axes if isinstance(axis.values, Interval)]
    if endless:
        fix = "add --random N to sample it, or list its values"
        raise LabelError(three_beats("values to go through", f"a continuous range of {endless[0]!r}", fix))
    _check_number(_n_combinations(axes), "name fewer values, or add --random N to sample them")
    combinations = itertools.product(*(cast(Sequence, axis.values) for axis in axes))
    return [dict(zip([axis.name for axis in axes], values, strict=True)) for values in combinations]


def sample(axes: Sequence[Axis], n_runs: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """`n_runs` different random combinations; the same for the same axes and seed."""
    if n_runs < 1:
        raise LabelError(three_beats("--random of at least 1", str(n_runs), "ask for some runs"))
    _check_number(n_runs, "ask for fewer runs after --random")
    source = random.Random(seed)
    if _n_combinations(axes) <= MOST_RUNS:
        grid = expand(axes)
        return source.sample(grid, min(n_runs, len(grid)))
    different: dict[str, dict] = {}
    for _ in range(100 * n_runs):
        values = {axis.name: _draw(axis, source) for axis in axes}
        different.setdefault(json.dumps(values), values)
        if len(different) == n_runs:
            break
    return list(different.values())


def _draw(axis: Axis, source: random.Random) -> Any:
    return axis.values.draw(source) if isinstance(axis.values, Interval) else source.choice(axis.values)


def _n_combinations(axes: Sequence[Axis]) -> float:
    return math.prod(math.inf if isinstance(axis.values, Interval) else len(axis.values) for axis in axes)


def _check_number(n_runs: float, fix: str) -> None:
    if n_runs > MOST_RUNS:
        raise LabelError(three_beats(f"at most {MOST_RUNS:,} runs", f"{n_runs:,}", fix))


def plan(
    notebook: str | Path,
    axes: Sequence[Axis],
    fixed: Mapping[str, Any] | None = None,
    *,
    n_random: int | None = None,
    seed: int = 0,
) -> list[Run]:
    """The runs of a sweep, all of their values checked.

    Parameters
    ----------
    notebook
        Path of the notebook.
    axes
        What varies.
    fixed
        Values of other parameters that differ from the defaults.
    n_random, seed
        Sample so many combinations instead of all.

    Raises
    ------
    LabelError
        When there is nothing to vary, a parameter is named twice or unknown, or the runs are too many.
    ParameterError
        When a value does not fit.
    """
    names = [axis.name for axis in axes]
    twice = [name for name in names if names.count(name) > 1 or name in (fixed or {})]
    if not names or twice:
        received = f"{twice[0]!r} named twice" if twice else "none"
        raise LabelError(three_beats("parameters to vary, each named once", received, "see `sweep --help`"))
    combinations = expand(axes) if n_random is None else sample(axes, n_random, seed=seed)
    base = {**parameters.defaults(notebook), **(fixed or {})}
    base.pop(FREE, None)
    code = _code_of(Path(notebook))
    planned = []
    for values in combinations:
        full = parameters.validate(notebook, {**base, **values})
        text = json.dumps([full, code, _data_of(full), cellop_nb.__version__], sort_keys=True)
        planned.append(Run(full, hashlib.sha256(text.encode()).hexdigest()[:16]))
    return planned


def _code_of(notebook: Path) -> list[str]:
    """Source of the code cells; text and stored outputs change no result."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell.get("metadata", {}).get("tags", [])
    ]


def _data_of(values: Mapping[str, Any]) -> str:
    """Digest of the file or folder that `data` names: other content under an old name makes another run."""
    path = Path(str(values.get("data") or os.devnull))
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return _digest(path, tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))


@cache
def _digest(path: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Digest of names and contents; sizes and times only tell whether it is still the same in this process."""
    digest = hashlib.blake2b(digest_size=16)
    for file, size, _ in files:
        digest.update(f"{file.relative_to(path)} {size} ".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


# -- folders: one per run, named by its key, complete or not there


RESULT = "result.json"
_DRAFT = ".unfinished-"


def result_of(folder: Path) -> dict[str, Any] | None:
    """What a finished run left: `values`, `status` (done, failed), `error`, `seconds`, `metrics`.

    None without, and where the file is damaged: the run is then done again.
    """
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        whole = result["status"] in ("done", "failed") and isinstance(result["metrics"], dict)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return result if whole else None


def draft(parent: Path, key: str) -> Path:
    """A hidden folder for a run to work in: whatever dies half-way counts for nothing."""
    folder = parent / f"{_DRAFT}{key}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def finish(folder: Path, target: Path, result: dict[str, Any]) -> bool:
    """Turn a draft into the run's folder in one step; False where another worker was first."""
    runs.write_json(folder / RESULT, result)
    if (
        target.exists() and (result_of(target) or {}).get("status") != "done"
    ):  # failed or damaged, and tried again
        old = target.with_name(f"{_DRAFT}old-{uuid.uuid4().hex[:8]}")
        os.rename(target, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(folder, target)  # refuses a folder that is there and not empty
    except OSError:
        if result_of(target) is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def sweep_up(parent: Path, *, older_than: float = 0.0) -> None:
    """Remove what interrupted runs left behind, if untouched for so many seconds."""
    limit = time.time() - older_than
    for folder in parent.glob(f"{_DRAFT}*"):
        newest = max((path.stat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)
        if newest <= limit:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(parent: Path) -> Iterator[None]:
    """Only one sweep at a time works in a folder; the lock of a killed one is gone with it.

    Raises
    ------
    DataError
        When another sweep is at work there.
    """
    from filelock import FileLock, Timeout

    parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(parent / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        fix = "wait until it has ended, or give this one another --name"
        raise DataError(three_beats(f"one sweep at a time in {parent}", "another at work", fix)) from None
    try:
        yield
    finally:
        lock.release()


# -- executing: at most so many kernels at once, each run whole or not counted

_ABANDONED = 24 * 3600.0  # seconds after which a draft on a shared disk has no owner any more


def missing(folder: Path, planned: Sequence[Run], *, retry_failed: bool = False) -> list[Run]:
    """Runs that have no result yet, or a bad one that is to be tried again."""
    kept = ("done",) if retry_failed else ("done", "failed")
    return [run for run in planned if (result_of(folder / run.key) or {}).get("status") not in kept]


def execute(
    notebook: Path,
    folder: Path,
    planned: Sequence[Run],
    *,
    where: str = "local",
    workers: int = 1,
    timeout: int | None = None,
    job: Job | None = None,
    retry_failed: bool = False,
    tell: Callable[[str], None] = logger.warning,
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Execute the missing runs, and yield each with its result as it ends.

    Parameters
    ----------
    notebook
        The notebook; a copy of it is taken at the start, so that it may be edited meanwhile.
    folder
        Folder of the sweep, with a folder for each run.
    planned
        The runs of :func:`plan`.
    where
        As :func:`check_where` takes it.
    workers
        Kernels that may run at once.
    timeout
        Seconds that one cell may take; None: no limit.
    job
        What a job of a batch system gets.
    tell
        Told while no worker has started.

    Raises
    ------
    DataError
        When another sweep works in `folder`, or the cluster is lost. What has ended is kept.
    """
    with locked(folder):
        sweep_up(folder, older_than=0.0 if where == "local" else _ABANDONED)
        todo = missing(folder, planned, retry_failed=retry_failed)
        if not todo:
            return
        copy = draft(folder, "notebook") / notebook.name
        shutil.copyfile(notebook, copy)
        workers = min(workers, len(todo))
        started = _here(workers) if where == "local" else _there(where, workers, job or Job(), tell)
        with started as submit:
            tasks = ((run, (str(copy), str(folder), run.values, run.key, timeout)) for run in todo)
            for run, future in _windowed(submit, tasks, workers):
                try:
                    yield run, future.result()
                except ClusterLost:
                    raise
                except Exception as error:  # no worker could end it
                    yield run, _give_up(folder, run, error)
        shutil.rmtree(copy.parent, ignore_errors=True)


class ClusterLost(DataError):
    """The scheduler or its workers went away while runs were at work."""


def _windowed(submit: Callable[..., Future], tasks: Iterable[tuple[Run, tuple]], workers: int):
    """Runs with their futures as they end, never more than `workers` given out: nobody else bounds a kernel's memory."""
    waiting, pending = iter(tasks), dict[Future, Run]()
    while True:
        for run, task in itertools.islice(waiting, workers - len(pending)):
            pending[submit(*task)] = run
        if not pending:
            return
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            yield pending.pop(future), future


def _give_up(folder: Path, run: Run, error: Exception) -> dict[str, Any]:
    """Keep a run that no worker could end as a failed one."""
    killed = type(error).__name__ == "KilledWorker"
    why = "every worker that ran it died (out of memory?)" if killed else str(error)
    result = _result(run.values, f"{type(error).__name__}: {why}", 0.0, {})
    finish(draft(folder, run.key), folder / run.key, result)
    return result


def run_one(
    notebook: str,
    folder: str,
    values: dict,
    key: str,
    timeout: int | None,
    stopped: threading.Event | None = None,
) -> dict[str, Any]:
    """One run, in a hidden folder that becomes the run's own when it has ended, unless all were `stopped` meanwhile."""
    target = Path(folder) / key
    earlier = result_of(target)
    if earlier and earlier["status"] == "done":  # another worker, believed dead, ended it after all
        return earlier
    work, start = draft(Path(folder), key), time.monotonic()
    outcome = runs.execute(notebook, work, values, timeout=timeout)
    result = _result(values, outcome.error, time.monotonic() - start, outcome.metrics)
    if (
        stopped is not None and stopped.is_set()
    ):  # its kernel was ended: it has neither failed nor come to its end
        shutil.rmtree(work, ignore_errors=True)
        return result
    finish(work, target, result)
    return result_of(target) or result


def _result(values: dict, error: str, seconds: float, metrics: dict) -> dict[str, Any]:
    return {
        "status": "failed" if error else "done",
        "error": error,
        "seconds": round(seconds, 3),
        "values": values,
        "metrics": metrics,
    }


def _threads(share: int) -> dict[str, str]:
    """Environment of kernels that get so many cores each; their waiting threads must not keep one from the others."""
    n = os.environ.get("OMP_NUM_THREADS") or str(max(1, share))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**dict.fromkeys(names, n), "OMP_WAIT_POLICY": "PASSIVE"}


@contextmanager
def _here(workers: int) -> Iterator[Callable[..., Future]]:
    """Give runs to threads of this process: nothing listens on a port. Kernels at work when it is left are ended."""
    stopped, futures = threading.Event(), []

    def submit(*task) -> Future:
        futures.append(pool.submit(partial(run_one, stopped=stopped), *task))
        return futures[-1]

    with runs.surroundings(_threads((os.cpu_count() or 1) // workers)), ThreadPoolExecutor(workers) as pool:
        try:
            yield submit
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while wait(futures, timeout=0.5).not_done:
                runs.end_kernels()


def _run_there(environment: dict[str, str], *task) -> dict[str, Any]:
    """In a worker process of a cluster, which runs nothing else."""
    os.environ.update(environment)
    return run_one(*task)


@contextmanager
def _there(
    where: str, workers: int, job: Job, tell: Callable[[str], None]
) -> Iterator[Callable[..., Future]]:
    """Give runs to single-threaded Dask workers; all that was started here is gone at the end."""
    from distributed import Client

    with ExitStack() as stack:
        if "://" in where:
            client = stack.enter_context(_connected(where))
        else:
            cluster = stack.enter_context(queue_cluster(where, job))
            cluster.scale(jobs=workers)
            client = stack.enter_context(Client(cluster, set_as_default=False))
        await_first(client, where, tell)
        held = []  # Dask forgets a task that nobody holds

        def submit(*task) -> Future:
            remote = client.submit(_run_there, _threads(1), *task, key=f"cellop-{task[3]}", pure=False)
            local: Future = Future()
            remote.add_done_callback(lambda ended: _pass_on(ended, local))
            held.append(remote)
            return local

        yield submit


def _pass_on(remote, local: Future) -> None:
    """What a Dask future came to, as a plain one."""
    if remote.status == "finished":
        local.set_result(remote.result())
    elif remote.status == "error":
        local.set_exception(remote.exception())
    else:
        fix = "start the cluster and run the same command again; finished runs are kept"
        local.set_exception(
            ClusterLost(three_beats("a Dask cluster until the end", f"a run was {remote.status}", fix))
        )


# -- clusters: jobs of a batch system, or a Dask cluster that is there

QUEUES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "sge": "SGECluster"}
_SUBMIT = {"slurm": "sbatch", "pbs": "qsub", "sge": "qsub"}
KERNEL_GB = 1.0
"""Memory that a kernel with torch, scanpy and a small screen takes."""

_SEARCH_SECONDS = 30
_PLAIN_PATH = r"[\w./+@:=,-]+"


@dataclass(frozen=True)
class Job:
    """What a job of a batch system gets.

    Parameters
    ----------
    memory, walltime
        Amount and time as the batch system reads them: ``"4GB"``, ``"04:00:00"``.
    queue, account
        Partition or queue, and who pays; the site's own where None.
    logs
        Folder for what the jobs print, and for the certificate of their cluster.

    Raises
    ------
    DataError
        For what would not stay one word of a job script.
    """

    memory: str = "4GB"
    walltime: str = "04:00:00"
    queue: str | None = None
    account: str | None = None
    logs: Path | None = None

    def __post_init__(self) -> None:
        self._refuse(
            "memory", r"\d+(\.\d+)? ?[kMGT]i?B", "--memory such as 4GB", "write a number and MB or GB"
        )
        fix = "write hours:minutes:seconds, or days-hours:minutes:seconds"
        self._refuse("walltime", r"(\d+-)?\d+:\d\d(:\d\d)?", "--walltime such as 04:00:00", fix)
        for name in ("queue", "account"):
            fix = "use letters, digits and . _ + @ : , -"
            self._refuse(name, r"[\w.+@:,-]+", f"a name after --{name}", fix)
        fix = "give --runs a folder without spaces and special characters"
        self._refuse("logs", _PLAIN_PATH, "a folder that a job script can name", fix)

    def _refuse(self, name: str, pattern: str, expected: str, fix: str) -> None:
        value = getattr(self, name)
        if value is not None and not re.fullmatch(pattern, str(value), flags=re.ASCII):
            raise DataError(three_beats(expected, repr(str(value)), fix))


def check_where(where: str) -> str:
    """Refuse what is neither `local`, nor a batch system we know, nor the address of a scheduler with TLS."""
    if where == "local" or where in QUEUES or where.startswith("tls://"):
        return where
    if "://" in where:
        fix = (
            "start it with --tls-ca-file, --tls-cert and --tls-key, and name the same in Dask's configuration"
        )
        received = f"{where}, where whoever reaches the port can run code as you"
        raise LabelError(three_beats("a scheduler that checks who connects, tls://HOST:PORT", received, fix))
    fix = did_you_mean(where, ["local", *QUEUES])
    raise LabelError(three_beats("--cluster local, slurm, pbs, sge or tls://HOST:PORT", repr(where), fix))


def check_queue(where: str) -> None:
    """Refuse a batch system whose command is not here: dask-jobqueue would wait for its workers for ever."""
    if where not in QUEUES:
        return
    if shutil.which(_SUBMIT[where]) is None:
        fix = "run this where jobs are submitted (a login node), or leave --cluster out to run here"
        received = f"no command {_SUBMIT[where]} on this machine"
        raise DataError(three_beats(f"a machine that hands jobs to {where}", received, fix))
    for module, package in (("dask_jobqueue", "dask-jobqueue>=0.9"), ("cryptography", "cryptography>=42")):
        if find_spec(module) is None:
            fix = f'run `pip install "{package}"` in this environment'
            raise DataError(three_beats(f"{module} for --cluster {where}", "it is not installed", fix))


def default_workers() -> int:
    """Kernels that this machine has room for: by its cores and its free memory."""
    import psutil

    room = psutil.virtual_memory().available / 1e9 // KERNEL_GB
    return int(max(1, min(os.cpu_count() or 1, room)))


def await_first(client, where: str, tell: Callable[[str], None], *, every: float = 30.0) -> None:
    """Wait until a worker is there, and say so: a queued job may wait for hours, and a broken one for ever."""
    waited = 0.0
    while True:
        try:
            return client.wait_for_workers(1, timeout=every)
        except TimeoutError:
            waited += every
            tell(f"{waited:.0f} s and no worker yet: see the queue of {where} and the logs of its jobs")


def _connected(address: str):
    """A client of a scheduler that somebody started; both show the certificates of Dask's configuration."""
    from distributed import Client
    from distributed.security import Security

    check_where(address)
    security = Security()
    tls = security.get_tls_config_for_role("client")
    if not (tls["ca_file"] and tls["cert"]):
        fix = "set distributed.comm.tls.ca-file, .client.cert and .client.key, as the scheduler's owner does"
        raise DataError(three_beats("certificates in Dask's configuration", "none", fix))
    try:
        client = Client(address, timeout=_SEARCH_SECONDS, security=security, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        fix = "start `dask scheduler` there, check host, port, firewall and certificates"
        raise DataError(three_beats(f"a Dask scheduler at {address}", f"none ({error})", fix)) from error
    try:
        client.wait_for_workers(1, timeout=_SEARCH_SECONDS)
    except TimeoutError as error:
        client.close()
        fix = f"start `dask worker {address}` where the kernels shall run"
        raise DataError(three_beats(f"workers at {address}", "none", fix)) from error
    return client


def queue_cluster(where: str, job: Job):
    """Jobs of one worker and one kernel each; further settings as in dask-jobqueue's `jobqueue.yaml`.

    Scheduler and workers speak TLS with a certificate made for this run alone, which the jobs read from files in
    `job.logs` that only the user can read: nobody else can connect.
    """
    import dask_jobqueue
    from distributed.security import Security

    if job.logs is not None:
        job.logs.mkdir(parents=True, exist_ok=True)
    logs = None if job.logs is None else str(job.logs)
    payer = {"project" if where == "sge" else "account": job.account} if job.account else {}
    home = Path(__file__).resolve().parents[2]
    return getattr(dask_jobqueue, QUEUES[where])(
        cores=1, processes=1, memory=job.memory, walltime=job.walltime, queue=job.queue, **payer,
        log_directory=logs, shared_temp_directory=logs, protocol="tls://", security=Security.temporary(),
        scheduler_options={"dashboard_address": "127.0.0.1:0"},
        worker_extra_args=["--dashboard-address", "127.0.0.1:0"],
        job_script_prologue=[f'export PYTHONPATH={shlex.quote(str(home))}:"$PYTHONPATH"'],
    )  # fmt: skip


# -- what came out: one row per run, effects of the parameters, the report

HEAD, TAIL = ["run"], ["status", "seconds", "error", "notebook"]
TEMPLATE = Path(__file__).with_name("summary.ipynb")
_ABOUT = "sweep.json"
_HIGH_IS_GOOD = ("pearson", "r2", "gain", "score", "accuracy", "auc", "correlation", "recall", "precision")
_MANY = 8  # values of a parameter beyond which it is taken as continuous


class ReportError(CellopError):
    """The summary notebook did not run to its end."""


def collect(folder: Path, planned: Sequence[Run], notebook: str) -> pd.DataFrame:
    """One row per run, in the order of the plan.

    Parameters
    ----------
    folder
        Folder of the sweep.
    planned
        The planned runs.
    notebook
        Name of the notebook, without suffix.

    Returns
    -------
    DataFrame
        ``run`` (the folder), every parameter, every number of ``metrics.json`` (nested ones as ``a.b``; one named
        like a parameter as ``metric.a``), ``status`` (done, failed, missing), ``seconds``, ``error`` and
        ``notebook`` (the executed one, relative to `folder`).
    """
    import pandas as pd

    rows = []
    for run in planned:
        result = result_of(folder / run.key) or {"status": "missing", "metrics": {}}
        values = {name: _cell(value) for name, value in run.values.items()}
        metrics = {
            name if name not in values else f"metric.{name}": v for name, v in _numbers(result["metrics"])
        }
        file = f"{run.key}/{notebook}.ipynb"
        end = {"status": result["status"], "seconds": result.get("seconds", math.nan)}
        end |= {"error": result.get("error", ""), "notebook": file if (folder / file).is_file() else ""}
        rows.append({"run": run.key} | values | metrics | end)
    names = dict.fromkeys(name for row in rows for name in row if name not in HEAD + TAIL)
    return pd.DataFrame(rows, columns=[*HEAD, *names, *TAIL])


def _cell(value: Any) -> Any:
    """A parameter's value as a cell of a table: lists and None as text."""
    return ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else value


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Names and values of the numbers; what a notebook repeats of its inputs is left out."""
    for name, value in metrics.items():
        if not prefix and name in ("parameters", "inputs"):
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, float(value)


class Sweep:
    """The runs of a sweep, compared by one number.

    Parameters
    ----------
    runs
        Table of :func:`collect`.
    parameters
        Names of the notebook's parameters.
    metric
        The number to compare; the first that the notebook wrote where None or empty.
    best
        ``"min"`` or ``"max"``: what is good; where None or empty low is, unless the metric is named like a score.
    notebook
        Name of the notebook.

    Attributes
    ----------
    varied
        Parameters that took more than one value, ``seed`` last.

    Raises
    ------
    LabelError
        When no run wrote such a number.
    """

    def __init__(
        self, runs: pd.DataFrame, parameters: Sequence[str], metric: str | None = None, best: str | None = None,
        *, notebook: str = "",
    ):  # fmt: skip
        self.runs, self.notebook = runs, notebook
        varied = [name for name in parameters if name in runs and runs[name].nunique(dropna=False) > 1]
        self.varied = sorted(varied, key=lambda name: name == "seed")
        numbers = [name for name in runs.columns if name not in (*HEAD, *parameters, *TAIL)]
        if not numbers or (metric and metric not in numbers):
            fix = f"name one with --metric ({did_you_mean(metric or '', numbers)})"
            raise LabelError(three_beats("a number in the runs' metrics.json", repr(metric or "none"), fix))
        self.metric = metric or numbers[0]
        self.best = best or ("max" if any(score in self.metric.lower() for score in _HIGH_IS_GOOD) else "min")

    @classmethod
    def read(cls, folder: str | Path = ".", metric: str = "", best: str = "") -> Sweep:
        """The sweep whose report lies in a folder: ``runs.parquet`` and ``sweep.json``."""
        import pandas as pd

        about = json.loads((Path(folder) / _ABOUT).read_text(encoding="utf-8"))
        table = pd.read_parquet(Path(folder) / "runs.parquet")
        return cls(table, about["parameters"], metric, best, notebook=about["notebook"])

    def __repr__(self) -> str:
        states = ", ".join(f"{n} {state}" for state, n in self.runs["status"].value_counts().items())
        good = "lowest" if self.best == "min" else "highest"
        return f"Sweep of {self.notebook}: {states}; {self.metric}, {good} is best"

    @property
    def done(self) -> pd.DataFrame:
        """Runs that came to their end and wrote the metric."""
        return self.runs[self.runs["status"] == "done"].dropna(subset=[self.metric])

    def best_runs(self, n: int = 10) -> pd.DataFrame:
        """The best single runs."""
        ordered = self.done.sort_values(self.metric, ascending=self.best == "min", kind="stable")
        return ordered.head(n)[["run", *self.varied, self.metric, "seconds", "notebook"]]

    def settings(self, n: int = 10) -> pd.DataFrame:
        """The best combinations of the parameters but the seed: mean, standard error and number of runs.

        One lucky seed must not decide which setting is taken.
        """
        others, done = [name for name in self.varied if name != "seed"], self.done
        if not others or done.empty:
            return done.reindex(columns=[*others, "mean", "sem", "runs"]).head(0)
        pooled = (
            done.groupby(others, sort=False)[self.metric]
            .agg(mean="mean", sem="sem", runs="size")
            .reset_index()
        )
        return pooled.sort_values("mean", ascending=self.best == "min", kind="stable").head(n)

    def failed(self) -> pd.DataFrame:
        """Runs that failed, and why."""
        return self.runs.loc[self.runs["status"] == "failed", ["run", *self.varied, "error", "notebook"]]

    def effects(self, level: float = 0.95) -> pd.DataFrame:
        r"""Effect of each value of each parameter on the metric, with the uncertainty over seeds.

        For a parameter p with value v, and seed s,

        .. math:: e_{p,s}(v) = \mathrm{mean}_{o}\big(y(v, o, s) - \mathrm{mean}_{v'} y(v', o, s)\big)

        over the settings o of the other parameters that were run for every value of p: differences inside one
        setting and seed, so that neither moves the comparison. The effect is the mean over seeds, its interval
        Student's t over them; with a single seed there is none.

        Returns
        -------
        DataFrame
            ``parameter, value, mean, effect, low, high, seeds, runs``. Parameters without a complete comparison
            (random sampling) are left out: :meth:`trends` serves them.
        """
        import pandas as pd

        done = self.done
        done = done.assign(seed=done["seed"] if "seed" in self.varied else 0)
        rows = [row for name in self.varied if name != "seed" for row in self._effect(done, name, level)]
        columns = ["parameter", "value", "mean", "effect", "low", "high", "seeds", "runs"]
        return pd.DataFrame(rows, columns=columns)

    def _effect(self, done: pd.DataFrame, name: str, level: float) -> list[dict]:
        from scipy import stats

        block = [other for other in self.varied if other not in (name, "seed")] + ["seed"]
        if done[name].dtype.kind == "f" and done[name].nunique() > _MANY:  # a scale, not separate values
            return []
        wide = done.pivot_table(
            index=block, columns=name, values=self.metric, aggfunc="mean", sort=False
        ).dropna()
        if wide.empty or wide.shape[1] < 2:
            return []
        wide = wide[sorted(wide.columns)]
        by_seed = wide.sub(wide.mean(axis=1), axis=0).groupby(level="seed").mean()
        n, mean = len(by_seed), by_seed.mean()
        half = stats.t.ppf(0.5 + level / 2, n - 1) * by_seed.sem() if n > 1 else mean * math.nan
        return [
            {"parameter": name, "value": value, "mean": wide[value].mean(), "effect": mean[value],
             "low": mean[value] - half[value], "high": mean[value] + half[value], "seeds": n, "runs": len(wide)}
            for value in wide.columns
        ]  # fmt: skip

    def trends(self, n_boot: int = 500, seed: int = 0) -> pd.DataFrame:
        """Spearman correlation of each numeric parameter with the metric, and its bootstrap interval over runs.

        Returns
        -------
        DataFrame
            ``parameter, spearman, low, high`` (95 %), ``runs``.

        References
        ----------
        Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
        """
        import numpy as np
        import pandas as pd

        done, rng, rows = self.done, np.random.default_rng(seed), []
        for name in self.varied:
            if name == "seed" or not pd.api.types.is_numeric_dtype(done[name]) or len(done) < 5:
                continue
            x, y = done[name].to_numpy(float), done[self.metric].to_numpy(float)
            draws = [_spearman(x[draw], y[draw]) for draw in rng.integers(len(x), size=(n_boot, len(x)))]
            low, high = map(float, np.nanquantile(draws, [0.025, 0.975]))
            rows.append(
                {"parameter": name, "spearman": _spearman(x, y), "low": low, "high": high, "runs": len(x)}
            )
        return pd.DataFrame(rows, columns=["parameter", "spearman", "low", "high", "runs"])

    @staticmethod
    def linked(frame: pd.DataFrame):
        """A table whose runs are links to their executed notebooks; markup in labels and values shows as text."""
        from ..display import styled

        links = [
            f'<a href="{escape(row["notebook"])}">{escape(row["run"])}</a>'
            if row["notebook"]
            else escape(row["run"])
            for row in frame.to_dict("records")
        ]
        shown = frame.assign(run=range(len(frame))).drop(columns="notebook").reset_index(drop=True)
        return styled(shown, precision=4, index=False).format(links.__getitem__, subset=["run"])


def _spearman(x, y) -> float:
    from scipy.stats import rankdata

    x, y = rankdata(x), rankdata(y)
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else math.nan


def write_report(
    notebook: Path,
    folder: Path,
    planned: Sequence[Run],
    *,
    metric: str | None = None,
    best: str | None = None,
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
    frame = collect(folder, planned, notebook.stem)
    names = list(planned[0].values)
    # parquet holds one type a column; `none` may stand among numbers
    mixed = [name for name in frame if frame[name].dropna().map(type).nunique() > 1]
    typed = frame.astype(dict.fromkeys(mixed, str))
    write_whole(folder / "runs.parquet", lambda path: typed.to_parquet(path, index=False))
    write_whole(folder / "runs.csv", lambda path: frame.to_csv(path, index=False))
    runs.write_json(folder / _ABOUT, {"notebook": notebook.stem, "parameters": names})
    if (frame["status"] == "done").any():
        sweep = Sweep(frame, names, metric, best)
        _summary(folder, {"metric": sweep.metric, "best": sweep.best})
    return frame


def _summary(folder: Path, values: dict) -> None:
    work = draft(folder, "summary")
    try:
        outcome = runs.execute(TEMPLATE, work, {**values, "folder": str(folder)})
        os.replace(outcome.output, folder / TEMPLATE.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if outcome.error:
        fix = f"open {folder / TEMPLATE.name}; the table is complete in {folder / 'runs.csv'}"
        raise ReportError(three_beats("the report to run to its end", outcome.error, fix))
