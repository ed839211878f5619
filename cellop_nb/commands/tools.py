"""`test`, `bench`, `docs`: for those who work on the package; each needs a checkout."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

from cellop_nb.commands import add, check_least, check_new, environment
from cellop_nb.commands.terminal import say
from cellop_nb.errors import LabelError, did_you_mean

SUITES = ("science", "tooling")
SCIENCE = ("models", "data", "training", "analysis")
"""Folders of tests/ that need no notebook, browser or second environment."""

SECTIONS = ("vae", "energy", "operators", "predict", "explorer", "scale")  # those of benchmarks.record
GPU = "gpu"
"""A section apart: it is of another machine, and `all` leaves it out where there is no GPU."""
PEERS = "peers"
"""A section apart: hours, and environments of other packages; it fills docs/peers.csv."""

_NBVAL = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300"]


def add_commands(commands) -> None:
    """`test`, `bench` and `docs` on the command line."""
    extras, summary = ("notebook", "test", "docs"), "run the tests, the notebooks' included"
    parser = add(commands, "test", test, summary, check=check_test, extras=extras)
    parser.add_argument(
        "pytest", nargs="*", metavar="SUITE, or -- ARGUMENTS",
        help="passed on to pytest, e.g. -- -k energy, or -- tests/models -n 0; the suites are science (models, data, "
        "training, analysis) and tooling (the rest, with the notebooks); default: both",
    )  # fmt: skip
    # the peers of a benchmark are optional: those that are absent are named as such
    summary = "measure speed and memory, beside the peers that are installed"
    parser = add(commands, "bench", bench, summary, check=check_bench, extras=("notebook",))
    sections = (*SECTIONS, GPU, PEERS, "all")
    what = "what to measure (default: all but peers)"
    parser.add_argument("section", nargs="?", default="all", choices=sections, help=what)
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it runs, not how fast")
    out = "JSON file for numbers, machine and versions; peers: CSV (default: docs/peers.csv)"
    parser.add_argument("--out", metavar="FILE", type=Path, help=out)
    threads = "threads of torch (default: OMP_NUM_THREADS, else all cores)"
    parser.add_argument("--threads", type=int, help=threads)
    parser.add_argument("--data", metavar="FILE.h5ad", type=Path, help="peers: the screen of Kang et al.")
    parser.add_argument("--only", default="", metavar="NAMES", help="peers: some of them, with commas")
    parser.add_argument("--contexts", default="", metavar="NAMES", help="peers: some types, with commas")
    parser.add_argument("--seeds", type=int, default=1, help="peers: seeds of each fit (default: 1)")

    summary = "build the documentation site, from the notebooks as they are committed"
    parser = add(commands, "docs", docs, summary, check=check_docs, extras=extras)
    folder = "where the site goes (default: docs/_build/html)"
    parser.add_argument("--out", metavar="FOLDER", type=Path, help=folder)


def check_test(args: argparse.Namespace) -> None:
    """Refuse where there are no tests, as in an installed wheel, and a suite that there is not."""
    environment.require_checkout("tests")
    name = next(iter(args.pytest), "-")
    if not name.startswith("-") and name not in SUITES and not _split([name])[1]:
        fix = did_you_mean(name, SUITES)
        raise LabelError("a suite, a path, or -- and options of pytest", repr(name), fix)


def test(args: argparse.Namespace) -> int:
    """Run pytest once over all that is chosen, so that its summary is the last thing printed."""
    name = args.pytest[0] if args.pytest and args.pytest[0] in SUITES else None
    options, paths = _split(args.pytest[name is not None :])
    workers = min(os.cpu_count() or 1, 2)
    # a module's tests and a notebook's cells stay in one worker, in order
    parallel = ["-n", str(workers), "--dist", "loadscope"] if workers > 1 else []
    command = [sys.executable, "-m", "pytest", *_NBVAL, *parallel, *options, *(paths or suite(name))]
    return environment.become(command, cwd=environment.ROOT, env=_surroundings())


def suite(name: str | None) -> list[str]:
    """Paths below the project's folder that a suite consists of; None: both."""
    science = [f"tests/{folder}" for folder in SCIENCE]
    notebooks = ["notebooks", "benchmarks"] if any((environment.ROOT / "notebooks").glob("*.ipynb")) else []
    if name == "science":
        return science
    left_out = [f"--ignore={path}" for path in science] if name == "tooling" else []
    return ["tests", *notebooks, *left_out]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options, and paths: a relative path is the caller's where it exists there, else the project's."""
    options, paths = [], []
    for argument in arguments:
        path, mark, rest = argument.partition("::")
        if argument.startswith("-") or not ((environment.ROOT / path).exists() or Path(path).exists()):
            options.append(argument)
        else:
            paths.append((str(Path(path).resolve()) if Path(path).exists() else path) + mark + rest)
    return options, paths


def _surroundings() -> dict[str, str]:
    """One thread for each worker: two workers of two threads each would only wait for each other."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return {**threads, **os.environ, "JUPYTER_PREFER_ENV_PATH": "1"}


def check_bench(args: argparse.Namespace) -> None:
    """Refuse where the benchmarks are not, and what could not be written, before hours of work."""
    environment.require_checkout("benchmarks")
    check_least(args, threads=1)
    check_new("--out", args.out, may_exist=True)


def bench(args: argparse.Namespace) -> int:
    """Measure, print one table per kind of row, and write the file."""
    threads = args.threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the fresh processes that measure memory
    sys.path.insert(0, str(environment.ROOT))
    if args.section == PEERS:
        only, contexts = ([name for name in names.split(",") if name] for names in (args.only, args.contexts))
        peers = import_module("benchmarks.peers")
        out = args.out or peers.TABLE
        table = peers.run(args.data, only, contexts=contexts, seeds=args.seeds, out=out)
        if out == peers.TABLE:
            peers.draw(table)
        say(f"{peers.page(table)}\n\nwritten: {out}")
        return 0
    import torch

    record = import_module("benchmarks.record")  # of the checkout, no part of the package

    every = (*SECTIONS, GPU) if torch.cuda.is_available() else SECTIONS
    run = record.record(
        every if args.section == "all" else (args.section,), quick=args.quick, threads=threads, show=True
    )
    if args.out is not None:
        record.write(args.out, run)
        say(f"written: {args.out}")
    return 0


def check_docs(args: argparse.Namespace) -> None:
    """Refuse where there is nothing to build from: an installed wheel has no pages."""
    environment.require_checkout("docs")


def docs(args: argparse.Namespace) -> int:
    """Build the site from the committed notebooks and the docstrings."""
    folder = [args.out.resolve()] if args.out else []
    return environment.become([sys.executable, "-m", "docs.build", *map(str, folder)], cwd=environment.ROOT)
