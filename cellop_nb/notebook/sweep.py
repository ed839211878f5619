"""Sweeps: one notebook executed for many parameter values, here or on a cluster, and the report of what came out.

In the order of this file: what varies (`Axis`, `Space`), the folder of each run, executing (`execute`), clusters, values
that Optuna chooses (`Search`), and the table and report (`write_report`, `Sweep`). Only executing, choosing and reporting
import more than the standard library: the command line refuses wrong values before there is an environment.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cellop_nb

from ..errors import CellopError, DataError, LabelError, did_you_mean
from ..files import write_whole
from ..packages import require
from . import parameters, runs
from .parameters import Parameter, ParameterError

if TYPE_CHECKING:
    import optuna
    import pandas as pd

logger = logging.getLogger("cellop_nb")

FREE = "run_dir"  # the one parameter that does not change a result
MOST_RUNS = 10_000
"""Runs of a sweep at most: each is a folder with an executed notebook."""

# -- what varies


@dataclass(frozen=True)
class Axis:
    """A parameter and what it takes in a sweep: the listed `values`, or, where there are none, any number of a range.

    A continuous range may be sampled uniformly in the logarithm (`log`).
    """

    parameter: Parameter
    values: Sequence = ()
    low: float = math.nan
    high: float = math.nan
    log: bool = False

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.parameter.name

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        """What Optuna draws from."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if isinstance(self.values, range):
            return IntDistribution(self.values[0], self.values[-1])
        if not self.values:
            return FloatDistribution(self.low, self.high, log=self.log)
        return CategoricalDistribution([_cell(value) for value in self.values])


@dataclass(frozen=True)
class Run:
    """One execution of the notebook: all values, and a digest of what the result depends on.

    Where it may be ended early, `trial` is its place in a study of Optuna, as
    :class:`~cellop_nb.training.callbacks.Pruning` reads it.
    """

    values: dict[str, Any]
    key: str
    trial: dict[str, Any] | None = field(default=None, compare=False)


def read_axis(notebook: str | Path, text: str) -> Axis:
    """An axis from `name=values`.

    Values are `8,16,32`, whole numbers `0..4` (both ends included), or, for sampling, `1e-4..1e-2` and
    `log:1e-4..1e-2`. Values that are lists themselves are separated by `;`.
    """
    name, equals, listed = (part.strip() for part in text.partition("="))
    if not equals or not listed:
        fix = "write -g latent_dim=8,16,32 or -g seed=0..4"
        raise LabelError("NAME=VALUES after -g", repr(text), fix)
    if name == FREE:
        fix = "leave it out: every run has a folder of its own"
        raise LabelError("a parameter that is free", f"{FREE!r}, set by the sweep", fix)
    parameter = parameters.parameter(notebook, name)
    if ".." in listed and "str" not in parameter.kinds:
        return _span(parameter, listed)
    separator = ";" if any(kind.startswith("list") for kind in parameter.kinds) else ","
    values = tuple(parameter.parse(value) for value in listed.split(separator))
    if len({json.dumps(value) for value in values}) < len(values):
        fix = "name each value once"
        raise LabelError(f"different values of {name!r}", repr(list(values)), fix)
    return Axis(parameter, values)


def _span(parameter: Parameter, text: str) -> Axis:
    log = text.startswith("log:")
    first, _, last = text.removeprefix("log:").partition("..")
    low, high = parameter.parse(first), parameter.parse(last)
    if not low < high or (log and low <= 0):
        fix = "write LOW..HIGH with LOW below HIGH, and above 0 after log:"
        raise ParameterError(f"a range for the parameter {parameter.name!r}", repr(text), fix)
    if isinstance(low, int) and isinstance(high, int):
        return Axis(parameter, range(low, high + 1))
    return Axis(parameter, low=float(low), high=float(high), log=log)


class Space:
    """The runs that a sweep may have: what varies, and `fixed` values that differ from the notebook's defaults."""

    def __init__(self, notebook: str | Path, axes: Sequence[Axis], fixed: Mapping[str, Any] | None = None):
        names = [axis.name for axis in axes]
        twice = [name for name in names if names.count(name) > 1 or name in (fixed or {})]
        if not names or twice:
            received = f"{twice[0]!r} named twice" if twice else "none"
            fix = "see `sweep --help`"
            raise LabelError("parameters to vary, each named once", received, fix)
        self.notebook, self.axes = Path(notebook), axes
        self._base = parameters.defaults(notebook) | dict(fixed or {})
        self._base.pop(FREE, None)
        cells = json.loads(self.notebook.read_text(encoding="utf-8"))["cells"]
        # text, stored outputs and the defaults of parameters change no result
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        self._code = [c["source"] for c in code if "parameters" not in c.get("metadata", {}).get("tags", [])]

    def run(self, values: Mapping[str, Any]) -> Run:
        """The run with these values of the axes, all of its values checked."""
        full = parameters.validate(self.notebook, self._base | dict(values))
        return Run(full, self._digest(full, _data_of(full)))

    def chosen(self, params: Mapping[str, Any]) -> Run:
        """The run behind what Optuna calls its values."""
        of = {axis.name: axis.parameter for axis in self.axes}
        return self.run({k: of[k].parse(v) if isinstance(v, str) else v for k, v in params.items()})

    @property
    def key(self) -> str:
        """Digest of all that does not vary, and of the axes."""
        return self._digest(self._base, _data_of(self._base), [repr(axis) for axis in self.axes])

    def _digest(self, *content: Any) -> str:
        text = json.dumps([*content, self._code, cellop_nb.__version__], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self, n_random: int | None = None) -> None:
        """Refuse runs without end, and more than :data:`MOST_RUNS` of them."""
        endless = [axis.name for axis in self.axes if not axis.values]
        if n_random is None and endless:
            fix = "add --random N to sample it, or list its values"
            received = f"a continuous range of {endless[0]!r}"
            raise LabelError("values to go through", received, fix)
        if n_random is not None and n_random < 1:
            raise LabelError("runs to choose, at least 1", str(n_random), "ask for some runs")
        n_runs = math.prod(len(axis.values) for axis in self.axes) if n_random is None else n_random
        if n_runs > MOST_RUNS:
            fix = "name fewer values, or add --random N to sample them"
            raise LabelError(f"at most {MOST_RUNS:,} runs", f"{n_runs:,}", fix)

    def grid(self) -> list[Run]:
        """A run for every combination of the axes' values, the last axis changing fastest."""
        self.check()
        names = [axis.name for axis in self.axes]
        combinations = itertools.product(*(axis.values for axis in self.axes))
        return [self.run(dict(zip(names, values, strict=True))) for values in combinations]

    def sample(self, n_runs: int, *, seed: int = 0) -> list[Run]:
        """`n_runs` different random combinations; the same for the same axes and seed."""
        self.check(n_runs)
        if math.prod(len(axis.values) or math.inf for axis in self.axes) <= n_runs:
            return self.grid()
        optuna = _optuna()
        study, different = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)), dict[str, Run]()
        while len(different) < n_runs:
            run = self.chosen(study.ask(self.distributions).params)
            different.setdefault(run.key, run)
        return list(different.values())

    @property
    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """What Optuna draws each parameter from."""
        return {axis.name: axis.distribution for axis in self.axes}


def _optuna():
    require("optuna", "notebook", of="sweeps")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


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


# -- folders: one per run, named by its key; a run counts when its result is there

RESULT = "result.json"


def result_of(folder: Path) -> dict[str, Any] | None:
    """What a finished run left: `values`, `status` (done, pruned, failed), `error`, `seconds`, `metrics`.

    None without, and where the file is damaged: the run is then done again.
    """
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        whole = result["status"] in ("done", "pruned", "failed") and isinstance(result["metrics"], dict)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return result if whole else None


def empty(folder: Path) -> Path:
    """A folder with nothing in it: what an interrupted or a failed run left is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def locked(parent: Path) -> Iterator[None]:
    """Only one sweep at a time works in a folder, others are refused; the lock of a killed one is gone with it."""
    from filelock import FileLock, Timeout

    parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(parent / ".lock").acquire(timeout=0)
    except Timeout:
        fix = "wait until it has ended, or give this one another --name"
        raise DataError(f"one sweep at a time in {parent}", "another at work", fix) from None
    with lock:
        yield


# -- executing: at most so many kernels at once, each run whole or not counted


def missing(folder: Path, planned: Sequence[Run], *, retry_failed: bool = False) -> list[Run]:
    """Runs that have no result yet, or a bad one that is to be tried again."""
    kept = ("done", "pruned") if retry_failed else ("done", "pruned", "failed")
    return [run for run in planned if (result_of(folder / run.key) or {}).get("status") not in kept]


def execute(
    notebook: Path,
    folder: Path,
    chosen: Iterable[Run],
    *,
    where: str = "local",
    workers: int = 1,
    timeout: int | None = None,
    job: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = logger.warning,
) -> Generator[tuple[Run, dict[str, Any]], None, None]:
    """Execute runs, and yield each with its result as it ends; call it while the folder is :func:`locked`.

    A copy of the notebook is taken at the start, so that it may be edited meanwhile. Each run is asked for when one of
    the `workers` is free, so that it may depend on what was yielded before; a cell may take `timeout` seconds. `tell` is
    told while no worker has started.
    """
    copy = empty(folder / ".notebook") / notebook.name
    shutil.copyfile(notebook, copy)
    started = _here(workers) if where == "local" else _there(where, workers, job or {}, folder / "jobs", tell)
    pending: dict[Future, Run] = {}
    waiting = iter(chosen)
    with started as (pool, work):
        while True:  # never more than `workers` are given out: nobody else bounds a kernel's memory
            for run in itertools.islice(waiting, workers - len(pending)):
                pending[pool.submit(work, str(copy), str(folder), run, timeout)] = run
            if not pending:
                break
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                run = pending.pop(future)
                try:
                    result = future.result()
                except CancelledError as error:
                    fix = "start the cluster and run the same command again; finished runs are kept"
                    expected, received = "a Dask cluster until the end", "one that went away"
                    raise DataError(expected, received, fix) from error
                except (
                    Exception
                ) as error:  # no worker could end it; a KilledWorker may have been short of memory
                    result = _result(run.values, f"{type(error).__name__}: {error}", 0.0, {})
                    runs.write_json(empty(folder / run.key) / RESULT, result)
                yield run, result


def run_one(
    notebook: str, folder: str, run: Run, timeout: int | None, stopped: threading.Event | None = None
) -> dict[str, Any]:
    """One run in its folder, whose result is written last; nothing is left of one whose kernel was `stopped`."""
    target = Path(folder) / run.key
    earlier = result_of(target)
    if earlier and earlier["status"] == "done":  # another worker, believed dead, ended it after all
        return earlier
    work, start = empty(target), time.monotonic()
    if run.trial is not None:
        runs.write_json(work / "trial.json", run.trial)
    outcome = runs.execute(notebook, work, run.values, timeout=timeout)
    result = _result(run.values, outcome.error, time.monotonic() - start, outcome.metrics)
    # neither failed nor come to its end
    if outcome.error and stopped is not None and stopped.is_set():
        shutil.rmtree(work, ignore_errors=True)
    else:
        runs.write_json(work / RESULT, result)
    return result


def _result(values: dict, error: str, seconds: float, metrics: dict) -> dict[str, Any]:
    pruned = error.startswith("TrialPruned")
    return {
        "status": "pruned" if pruned else "failed" if error else "done",
        "error": error,
        "seconds": round(seconds, 3),
        "values": values,
        "metrics": metrics,
    }


@contextmanager
def _here(workers: int) -> Iterator[tuple[Executor, Callable]]:
    """Threads of this process: nothing listens on a port. Kernels at work when they are left are ended."""
    with runs.lanes(workers) as (pool, stopped):
        yield pool, partial(run_one, stopped=stopped)


def _run_there(environment: dict[str, str], *task) -> dict[str, Any]:
    """In a worker process of a cluster, which runs nothing else."""
    os.environ.update(environment)
    return run_one(*task)


@contextmanager
def _there(
    where: str, workers: int, job: Mapping[str, str], logs: Path, tell: Callable[[str], None]
) -> Iterator[tuple[Executor, Callable]]:
    """Single-threaded Dask workers; all that was started here is gone at the end."""
    from distributed import Client

    with ExitStack() as stack:
        if "://" in where:
            client = stack.enter_context(connected(where))
        else:
            cluster = stack.enter_context(queue_cluster(where, job, logs))
            cluster.scale(jobs=workers)
            client = stack.enter_context(Client(cluster, set_as_default=False))
        await_first(client, where, tell)
        yield client.get_executor(pure=False), partial(_run_there, runs.shares())


# -- clusters: jobs of a batch system, or a Dask cluster that is there

QUEUES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "sge": "SGECluster"}
_SUBMIT = {"slurm": "sbatch", "pbs": "qsub", "sge": "qsub"}
KERNEL_GB = 1.0
"""Memory that a kernel with torch, scanpy and a small screen takes."""

_SEARCH_SECONDS = 30
_WORD, _AMOUNT = r"[\w.+@:,=/-]+", r"\d+(\.\d+)? ?[kMGT]i?B"
"""Form of each value of a job script, and of its memory."""


def read_job(texts: Iterable[str]) -> dict[str, str]:
    """Options of a job of a batch system from `NAME=VALUE`; what would not stay one word of its script is refused.

    Names are those of dask-jobqueue's clusters: ``memory``, ``walltime``, ``queue``, ``account`` (sge: ``project``).
    """
    job = {"memory": "4GB", "walltime": "04:00:00"}
    for text in texts:
        name, equals, value = text.partition("=")
        form = _AMOUNT if name == "memory" else _WORD
        if not (equals and name.isidentifier() and re.fullmatch(form, value, flags=re.ASCII)):
            fix = "write --job memory=8GB, walltime=1-04:00:00, queue=short or account=mylab"
            raise DataError(
                "NAME=VALUE after --job, of letters, digits and . _ + @ : , = / -", repr(text), fix
            )
        job[name] = value
    return job


def check_where(where: str) -> str:
    """Refuse what is neither `local`, nor a batch system we know, nor the address of a scheduler with TLS."""
    if where == "local" or where in QUEUES or where.startswith("tls://"):
        return where
    if "://" in where:
        fix = (
            "start it with --tls-ca-file, --tls-cert and --tls-key, and name the same in Dask's configuration"
        )
        received = f"{where}, where whoever reaches the port can run code as you"
        raise LabelError("a scheduler that checks who connects, tls://HOST:PORT", received, fix)
    fix = did_you_mean(where, ["local", *QUEUES])
    raise LabelError("--cluster local, slurm, pbs, sge or tls://HOST:PORT", repr(where), fix)


def check_queue(where: str) -> None:
    """Refuse a batch system whose command is not here: dask-jobqueue would wait for its workers for ever."""
    if where not in QUEUES:
        return
    if shutil.which(_SUBMIT[where]) is None:
        fix = "run this where jobs are submitted (a login node), or leave --cluster out to run here"
        received = f"no command {_SUBMIT[where]} on this machine"
        raise DataError(f"a machine that hands jobs to {where}", received, fix)
    for module in ("dask_jobqueue", "cryptography"):
        require(module, "cluster", of=f"--cluster {where}")


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


def connected(address: str):
    """A client of a scheduler that somebody started; both show the certificates of Dask's configuration."""
    from distributed import Client
    from distributed.security import Security

    check_where(address)
    security = Security()
    tls = security.get_tls_config_for_role("client")
    if not (tls["ca_file"] and tls["cert"]):
        fix = "set distributed.comm.tls.ca-file, .client.cert and .client.key, as the scheduler's owner does"
        raise DataError("certificates in Dask's configuration", "none", fix)
    try:
        return Client(address, timeout=_SEARCH_SECONDS, security=security, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        fix = "start `dask scheduler` there, check host, port, firewall and certificates"
        raise DataError(f"a Dask scheduler at {address}", f"none ({error})", fix) from error


def queue_cluster(where: str, job: Mapping[str, str], logs: Path):
    """Jobs of one worker and one kernel each; further settings as in dask-jobqueue's `jobqueue.yaml`.

    Scheduler and workers speak TLS with a certificate made for this run alone, which the jobs read from files in the
    folder `logs` that only the user can read: nobody else can connect.
    """
    import dask_jobqueue
    from distributed.security import Security

    read_job([f"logs={logs}"])
    logs.mkdir(parents=True, exist_ok=True)
    home = Path(__file__).resolve().parents[2]
    options: dict[str, Any] = {
        "cores": 1, "processes": 1, "log_directory": str(logs), "shared_temp_directory": str(logs),
        "protocol": "tls://", "security": Security.temporary(),
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
        "worker_extra_args": ["--dashboard-address", "127.0.0.1:0"],
        "job_script_prologue": [f'export PYTHONPATH={shlex.quote(str(home))}:"$PYTHONPATH"'],
    }  # fmt: skip
    return getattr(dask_jobqueue, QUEUES[where])(**{**job, **options})


# -- values that Optuna chooses, and runs that it ends early


class Search:
    """Runs chosen by Optuna, whose study is kept in the journal `study.log` (JSON) of the sweep's :func:`locked` folder.

    A study that was broken off, by ``kill -9`` too, goes on: what was at work is asked for again. A tree-structured
    Parzen estimator brings `metric` down or up (`best`); with `prune` a run whose validation curve is worse than the
    median of the others' is ended early.

    References
    ----------
    Akiba et al. 2019, KDD (Optuna); Bergstra et al. 2011, NeurIPS (tree-structured Parzen estimators).
    """

    def __init__(
        self, space: Space, folder: Path, metric: str, best: str | None = None, *, prune: bool = False, seed: int = 0
    ):  # fmt: skip
        optuna = _optuna()
        self._space, self._folder, self._metric, self._prune = space, folder, metric, prune
        self._sign, self._states = (1 if (best or _good(metric)) == "min" else -1), optuna.trial.TrialState
        self._numbers: dict[str, int] = {}  # of the trials, by the key of their run
        self._journal = folder.resolve() / "study.log"
        if self._journal.is_file():  # a line that a kill cut off would make the next one unreadable
            content = self._journal.read_bytes()
            self._journal.write_bytes(content[: content.rfind(b"\n") + 1])
        backend = optuna.storages.journal.JournalFileBackend(str(self._journal))
        self.study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend), study_name=f"{metric} {self._sign} {space.key}",
            direction="minimize" if self._sign > 0 else "maximize", load_if_exists=True,
        )  # fmt: skip
        for trial in self.study.get_trials(states=(self._states.RUNNING,)):  # nobody else is at work here
            self.study.tell(trial.number, state=self._states.FAIL)
            self.study.enqueue_trial(trial.params)
        self.study.sampler = optuna.samplers.TPESampler(
            seed=seed + len(self.study.trials),  # its generator starts anew, and not with the same values
            constant_liar=True,
        )

    def runs(self) -> list[Run]:
        """The different runs that were asked for so far, in their order."""
        chosen = [self._space.chosen(trial.params) for trial in self.study.trials if trial.params]
        return list({run.key: run for run in chosen}.values())

    def choose(self, n_runs: int, *, retry_failed: bool = False) -> Iterator[Run]:
        """Runs until there are `n_runs` different ones; each follows from what those told before came to."""
        if retry_failed:
            for run in missing(self._folder, self.runs(), retry_failed=True):
                self.study.enqueue_trial(
                    {axis.name: _cell(run.values[axis.name]) for axis in self._space.axes}
                )
        for _ in range(3 * n_runs):  # a small space may hold fewer
            if len(self.runs()) >= n_runs and not self.study.get_trials(states=(self._states.WAITING,)):
                return
            trial = self.study.ask(self._space.distributions)
            about = {"journal": str(self._journal), "study": self.study.study_name, "sign": self._sign}
            run = replace(self._space.chosen(trial.params), trial=about | {"number": trial.number})
            self._numbers[run.key] = trial.number
            if missing(self._folder, [run], retry_failed=retry_failed):
                yield run if self._prune else replace(run, trial=None)
            else:
                self.tell(run, result_of(self._folder / run.key) or {})

    def tell(self, run: Run, result: dict[str, Any]) -> None:
        """What a run came to; at its end it must have the metric."""
        number, metrics = self._numbers[run.key], dict(_numbers(result["metrics"]))
        if result["status"] == "done" and self._metric in metrics:
            self.study.tell(number, metrics[self._metric])
            return
        pruned = result["status"] == "pruned"
        self.study.tell(number, state=self._states.PRUNED if pruned else self._states.FAIL)
        if result["status"] == "done":
            fix = f"name one with --metric ({did_you_mean(self._metric, metrics)})"
            raise LabelError("a number in the runs' metrics.json", repr(self._metric), fix)


# -- what came out: one row per run, and the report

HEAD, TAIL = ["run"], ["status", "seconds", "error", "notebook"]
TEMPLATE = Path(__file__).with_name("summary.ipynb")
_HIGH_IS_GOOD = ("pearson", "r2", "gain", "score", "accuracy", "auc", "correlation", "recall", "precision")


class ReportError(CellopError):
    """The summary notebook did not run to its end."""


def _good(metric: str) -> str:
    """Low is good, unless the metric is named like a score."""
    return "max" if any(score in metric.lower() for score in _HIGH_IS_GOOD) else "min"


def collect(folder: Path, planned: Sequence[Run], notebook: str) -> pd.DataFrame:
    """One row per run, in the order of the plan.

    The columns are ``run`` (the folder), every parameter, every number of ``metrics.json`` (nested ones as ``a.b``; one
    named like a parameter as ``metric.a``), ``status`` (done, pruned, failed, missing), ``seconds``, ``error`` and
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
    """A parameter's value as one cell of a table, and as Optuna takes it: lists and None as text."""
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
    """The runs of a sweep (:func:`collect`), compared by one number.

    Without a `metric` it is the first number that the notebook wrote; without `best` ("min" or "max") low is good, unless
    the metric is named like a score. `varied` are the parameters that took more than one value, ``seed`` last.
    """

    def __init__(
        self, runs: pd.DataFrame, parameters: Sequence[str], metric: str | None = None, best: str | None = None
    ):  # fmt: skip
        self.runs = runs
        varied = [name for name in parameters if name in runs and runs[name].nunique(dropna=False) > 1]
        self.varied = sorted(varied, key=lambda name: name == "seed")
        numbers = [name for name in runs.columns if name not in (*HEAD, *parameters, *TAIL)]
        if not numbers or (metric and metric not in numbers):
            fix = f"name one with --metric ({did_you_mean(metric or '', numbers)})"
            raise LabelError("a number in the runs' metrics.json", repr(metric or "none"), fix)
        self.metric = metric or numbers[0]
        self.best = best or _good(self.metric)

    @classmethod
    def read(cls, folder: str | Path, parameters: Sequence[str], metric: str = "", best: str = "") -> Sweep:
        """The sweep whose ``runs.csv`` lies in a folder."""
        import pandas as pd

        table = pd.read_csv(Path(folder) / "runs.csv", keep_default_na=False, na_values=[""])
        return cls(table.fillna({"error": "", "notebook": ""}), parameters, metric, best)

    def __repr__(self) -> str:
        states = ", ".join(f"{n} {state}" for state, n in self.runs["status"].value_counts().items())
        good = "lowest" if self.best == "min" else "highest"
        return f"Sweep: {states}; {self.metric}, {good} is best"

    @property
    def done(self) -> pd.DataFrame:
        """Runs that came to their end and wrote the metric, the best first."""
        done = self.runs[self.runs["status"] == "done"].dropna(subset=[self.metric])
        return done.sort_values(self.metric, ascending=self.best == "min", kind="stable")

    def settings(self, n: int = 10) -> pd.DataFrame:
        """The best combinations of the parameters but the seed: mean, standard error and number of runs.

        One lucky seed must not decide which setting is taken.
        """
        others, done = [name for name in self.varied if name != "seed"], self.done
        if not others or done.empty:
            return done.reindex(columns=[*others, "mean", "sem", "runs"]).head(0)
        by_setting = done.groupby(others, sort=False)[self.metric]
        pooled = by_setting.agg(mean="mean", sem="sem", runs="size").reset_index()
        return pooled.sort_values("mean", ascending=self.best == "min", kind="stable").head(n)

    def study(self) -> optuna.Study:
        """The runs that are done as a study of Optuna, whose figures show it (``optuna.visualization.matplotlib``)."""
        optuna = _optuna()
        study = optuna.create_study(direction="minimize" if self.best == "min" else "maximize")
        distributions = {}
        for name in self.varied:
            values = self.done[name].unique()
            if values.dtype.kind == "f" and len(values) > 1:
                log = bool(values.min() > 0 and values.max() >= 100 * values.min())
                distributions[name] = optuna.distributions.FloatDistribution(values.min(), values.max(), log)
            else:
                distributions[name] = optuna.distributions.CategoricalDistribution(values.tolist())
        for row in self.done.to_dict("records"):
            params = {name: row[name] for name in self.varied}
            study.add_trial(
                optuna.create_trial(params=params, distributions=distributions, value=row[self.metric])
            )
        return study

    def shown(self, frame: pd.DataFrame) -> pd.DataFrame:
        """What the report shows of runs."""
        return frame[["run", *self.varied, self.metric, "status", "seconds", "error"]]


def write_report(
    notebook: Path, folder: Path, planned: Sequence[Run], *, metric: str | None = None, best: str | None = None
) -> pd.DataFrame:  # fmt: skip
    """Write ``runs.csv`` and the executed ``summary.ipynb``; the table."""
    frame, names = collect(folder, planned, notebook.stem), list(planned[0].values)
    write_whole(folder / "runs.csv", lambda path: frame.to_csv(path, index=False))
    if not (frame["status"] == "done").any():
        return frame
    sweep = Sweep(frame, names, metric, best)
    about = {"metric": sweep.metric, "best": sweep.best, "parameters": names, "folder": str(folder)}
    outcome = runs.execute(TEMPLATE, folder, about)
    if outcome.error:
        fix = f"open {folder / TEMPLATE.name}; the table is complete in {folder / 'runs.csv'}"
        raise ReportError("the report to run to its end", outcome.error, fix)
    return frame
