"""`sweep`: one notebook for many parameter values, on Dask, with a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cellop_nb.commands import add, add_data, check_least, environment
from cellop_nb.commands import run as single
from cellop_nb.commands.terminal import Stopped, clock, complain, say, table
from cellop_nb.errors import LabelError, counted
from cellop_nb.notebook import sweep


def add_commands(commands) -> None:
    """`sweep` on the command line."""
    summary = "run a notebook for many parameter values, on this machine or a cluster"
    parser = add(commands, "sweep", sweep_notebook, summary, check=check, extras=("notebook",))
    parser.add_argument("notebook", metavar="NOTEBOOK", help="number, name or path of a notebook")
    what = parser.add_argument_group("what varies")
    what.add_argument(
        "-g", action="append", default=[], metavar="NAME=VALUES", dest="axes",
        help="values to try: latent_dim=8,16,32, seed=0..4; to sample from: lr=log:1e-4..1e-2",
    )  # fmt: skip
    what.add_argument("--random", type=int, metavar="N", help="N random combinations instead of all")
    tpe = "N runs, each chosen by the results of earlier ones (needs --metric)"
    what.add_argument("--tpe", type=int, metavar="N", help=tpe)
    what.add_argument("--prune", action="store_true", help="with --tpe: end poor runs early, by their curve")
    single.add_values(parser.add_argument_group("what is fixed"))
    add_data(parser)
    single.add_place(parser, "runs/sweeps")
    how = parser.add_argument_group("how")
    cluster = "local (default), slurm, pbs, sge, or the address tls://HOST:PORT of a Dask scheduler"
    how.add_argument("--cluster", default="local", metavar="WHERE", help=cluster)
    how.add_argument("--workers", type=int, metavar="N", help="notebooks at once (default: what fits here)")
    options = (
        "option of a job, as of dask-jobqueue: memory=8GB, walltime=1-04:00:00, queue=short, account=mylab"
    )
    how.add_argument("--job", action="append", default=[], metavar="NAME=VALUE", help=options)
    report = parser.add_argument_group("report and repetition")
    report.add_argument("--metric", help="what the report compares (default: the notebook's first number)")
    best = "whether low or high is good (default: by name)"
    report.add_argument("--best", choices=("min", "max"), help=best)
    report.add_argument("--retry-failed", action="store_true", help="also run again what failed before")
    report.add_argument("--dry-run", action="store_true", help="list the runs, and which are to do; run none")


def check(args: argparse.Namespace) -> None:
    """Refuse wrong parameters, values and places before the environment exists."""
    if args.tpe is not None and (args.random is not None or args.metric is None):
        received = "no --metric" if args.metric is None else "--random"
        fix = "name the number to improve, such as --metric test_loss, and leave --random out"
        raise LabelError("--tpe with a --metric, and not with --random", received, fix)
    if args.prune and args.tpe is None:
        raise LabelError("--prune beside --tpe N", "no --tpe", "add it, or leave --prune out")
    space = prepare(args)
    space.check(args.random if args.tpe is None else args.tpe)
    first_run(space)
    sweep.check_where(args.cluster)
    sweep.read_job(
        [*args.job, f"logs={place(args, space.notebook)}"] if args.cluster in sweep.QUEUES else args.job
    )
    check_least(args, workers=1)


def sweep_notebook(args: argparse.Namespace) -> int:
    """Run what is missing and write the report; 0 when all runs are done, 1 when one failed."""
    space = prepare(args, with_file=True)
    notebook, folder = space.notebook, place(args, space.notebook)
    if args.tpe is not None:
        if args.dry_run:
            say(f"{_runs(args.tpe)} of {notebook.stem}, each chosen by the results of the ones before")
            return 0
        return _search(args, space, folder)
    n = args.random
    runs = space.grid() if n is None else space.sample(n)
    todo = sweep.missing(folder, runs, retry_failed=args.retry_failed)
    done = len(runs) - len(todo)
    say(f"{_runs(len(runs))} of {notebook.stem} in {folder}: {done} finished, {len(todo)} to do")
    if args.dry_run:
        _list(runs, todo)
        return 0
    with _ready(args, folder, runs[0]):
        if todo:
            _run(args, notebook, folder, todo, n_done=done, n_runs=len(runs))
        return _report(args, notebook, folder, runs)


def _search(args: argparse.Namespace, space: sweep.Space, folder: Path) -> int:
    with _ready(args, folder, first_run(space)):
        search = sweep.Search(space, folder, args.metric, args.best, prune=args.prune)
        chosen, n_done = search.choose(args.tpe, retry_failed=args.retry_failed), len(search.runs())
        _run(args, space.notebook, folder, chosen, n_done=n_done, n_runs=args.tpe, told=search.tell)
        return _report(args, space.notebook, folder, search.runs())


@contextmanager
def _ready(args: argparse.Namespace, folder: Path, run: sweep.Run) -> Iterator[None]:
    """The folder for this sweep alone, after its place and its data were checked."""
    sweep.check_queue(args.cluster)
    single.check_data({"": run.values})
    with sweep.locked(folder):
        yield


def prepare(args: argparse.Namespace, *, with_file: bool = False) -> sweep.Space:
    """The runs that the notebook may have."""
    notebook = find(args)
    axes = [sweep.read_axis(notebook, text) for text in args.axes]
    axes = [
        replace(axis, values=tuple(map(single.locate, axis.values))) if axis.name == "data" else axis
        for axis in axes
    ]
    fixed = single.settings(args, [notebook], with_file=with_file)[notebook.stem]
    return sweep.Space(notebook, axes, fixed)


def first_run(space: sweep.Space) -> sweep.Run:
    """A run of the first value, or the lowest, of each axis."""
    return space.run({axis.name: axis.values[0] if axis.values else axis.low for axis in space.axes})


def find(args: argparse.Namespace) -> Path:
    """The notebook's path from its path, name or number."""
    path = Path(args.notebook)
    if path.suffix == ".ipynb" and path.is_file():
        return path.resolve()
    return single.choose(args.notebook, single.numbered(args.notebooks), "notebooks, or an .ipynb file")


def place(args: argparse.Namespace, notebook: Path) -> Path:
    """Folder of the sweep: the same for the same command, so that it goes on where it was broken off."""
    parent = Path(args.runs).resolve() if args.runs else environment.home() / "runs" / "sweeps"
    return parent / single.folder_name(args.name or notebook.stem)


def _runs(number: int) -> str:
    return counted(number, "run")


def _list(runs: list[sweep.Run], todo: list[sweep.Run]) -> None:
    names = [name for name in runs[0].values if len({repr(run.values[name]) for run in runs}) > 1]
    rows = [
        [run.key, *(str(run.values[name]) for name in names), "to do" if run in todo else "finished"]
        for run in runs
    ]
    say(table(["run", *names, ""], rows))


def _run(
    args, notebook: Path, folder: Path, chosen: Iterable[sweep.Run], *, n_done: int, n_runs: int,
    told: Callable[[sweep.Run, dict], None] | None = None,
) -> None:  # fmt: skip
    from tqdm.auto import tqdm

    ended = sweep.execute(
        notebook, folder, chosen, where=args.cluster, job=sweep.read_job(args.job), tell=tqdm.write,
        workers=min(args.workers or sweep.default_workers(), n_runs - n_done or 1),
    )  # fmt: skip
    failed = 0
    with tqdm(total=n_runs, initial=n_done, desc=notebook.stem, unit="run", dynamic_ncols=True) as bar:
        try:
            for run, result in ended:
                if told is not None:
                    told(run, result)
                if result["status"] == "failed":
                    failed += 1
                    bar.write(f"{run.key} failed: {result['error']}")
                bar.set_postfix({"failed": failed}, refresh=False)
                bar.update()
        except Stopped:
            ended.close()  # its kernels end now, and what they had half done is removed
            bar.write(f"{bar.n} of {_runs(n_runs)} are kept in {folder}; the same command does the rest")
            raise


def _report(args, notebook: Path, folder: Path, runs: list[sweep.Run]) -> int:
    frame = sweep.write_report(notebook, folder, runs, metric=args.metric, best=args.best)
    failed = frame[frame["status"] == "failed"]
    say(f"Table: {folder / 'runs.csv'}. Report: {folder / 'summary.ipynb'}")
    if len(failed):
        complain(f"{len(failed)} of {_runs(len(frame))} failed; --retry-failed runs them again. First error:")
        complain(f"{failed['error'].iloc[0]}\nSee {folder / failed['run'].iloc[0]}")
    seconds = frame["seconds"].sum()
    say(f"{_runs(len(frame) - len(failed))} done, {clock(seconds)} of notebooks in all.")
    return 1 if len(failed) else 0
