"""`test`: the unit tests, and every committed notebook run again and compared with its outputs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from cellop_nb.commands import environment

SUMMARY = "run the tests, the notebooks' included"
EXTRAS = ("test",)

_NBVAL = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `test`."""
    parser.add_argument(
        "pytest", nargs="*", metavar="-- ARGUMENTS",
        help="passed on to pytest, e.g. -- -k energy, or -- tests/models -n 0",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuse where there are no tests: an installed wheel has none."""
    environment.require_checkout("tests")


def main(args: argparse.Namespace) -> int:
    """Run pytest once over tests/ and notebooks/, so that its summary is the last thing printed."""
    given, places = _split(args.pytest)
    workers = min(os.cpu_count() or 1, 2)
    # a module's tests and a notebook's cells stay in one worker, in order
    parallel = ["-n", str(workers), "--dist", "loadscope"] if workers > 1 else []
    command = [sys.executable, "-m", "pytest", *_NBVAL, *parallel, *given, *(places or _everything())]
    return subprocess.call(command, cwd=environment.ROOT, env=_surroundings())


def _everything() -> list[str]:
    has_notebooks = any((environment.ROOT / "notebooks").glob("*.ipynb"))
    return ["tests", "notebooks", "benchmarks"] if has_notebooks else ["tests"]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options, and paths: a relative path is the caller's where it exists there, else the project's."""
    options, places = [], []
    for argument in arguments:
        path, mark, rest = argument.partition("::")
        if argument.startswith("-") or not ((environment.ROOT / path).exists() or Path(path).exists()):
            options.append(argument)
        else:
            places.append((str(Path(path).resolve()) if Path(path).exists() else path) + mark + rest)
    return options, places


def _surroundings() -> dict[str, str]:
    """One thread for each worker: two workers of two threads each would only wait for each other."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    return {**threads, **os.environ, "JUPYTER_PREFER_ENV_PATH": "1"}
