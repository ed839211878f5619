"""`bench`: measure speed and memory, beside the peers that are installed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cellop_nb.commands import environment
from cellop_nb.commands.terminal import say
from cellop_nb.errors import DataError, three_beats

SUMMARY = "measure speed and memory, beside the peers that are installed"
EXTRAS = ()  # the peers are optional: those that are absent are named as such

SECTIONS = (
    "vae",
    "energy",
    "operators",
    "predict",
    "explorer",
    "scale",
)  # those of bench.record, which needs torch
GPU = "gpu"
"""A section apart: it is of another machine, and `all` leaves it out where there is no GPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench`."""
    parser.add_argument(
        "section",
        nargs="?",
        default="all",
        choices=(*SECTIONS, GPU, "all"),
        help="what to measure (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: whether it runs, not how fast")
    parser.add_argument(
        "--out", metavar="FILE.json", type=Path, help="file for numbers, machine and versions"
    )
    parser.add_argument(
        "--threads", type=int, help="threads of torch (default: OMP_NUM_THREADS, else all cores)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse where the benchmarks are not, and what could not be written, before hours of work."""
    environment.require_checkout("benchmarks")
    if args.threads is not None and args.threads < 1:
        fix = "leave it out for all cores"
        raise DataError(three_beats("--threads of at least 1", str(args.threads), fix))
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise DataError(three_beats("--out in a folder that exists", str(args.out), "make the folder first"))


def main(args: argparse.Namespace) -> int:
    """Measure, print one table per kind of row, and write the file."""
    threads = args.threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the fresh processes that measure memory
    sys.path.insert(0, str(environment.ROOT))
    import torch

    from benchmarks.record import record, write

    every = (*SECTIONS, GPU) if torch.cuda.is_available() else SECTIONS
    run = record(
        every if args.section == "all" else (args.section,), quick=args.quick, threads=threads, show=True
    )
    if args.out is not None:
        write(args.out, run)
        say(f"written: {args.out}")
    return 0
