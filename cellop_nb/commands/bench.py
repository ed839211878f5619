"""`bench`: measure speed and memory, beside the peers that are installed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cellop_nb.commands.terminal import Status, say, table
from cellop_nb.errors import DataError, three_beats

SUMMARY = "measure speed and memory, beside the peers that are installed"
EXTRAS = ()  # the peers are optional: those that are absent are named as such

SECTIONS = (
    "vae",
    "energy",
    "operator",
    "predict",
    "explorer",
    "scale",
)  # those of bench.record, which needs torch
GPU = "gpu"
"""A section apart: it is of another machine, and `all` leaves it out where there is no GPU."""

_UNITS = {  # column: (title, factor, format)
    "seconds": ("ms", 1e3, "{:,.2f}"),
    "cpu_seconds": ("CPU ms", 1e3, "{:,.2f}"),
    "guard_seconds": ("guard CPU ms", 1e3, "{:.3f}"),
    "bound_seconds": ("bound, ms", 1e3, "{:,.2f}"),
    "busy_seconds": ("busy, ms", 1e3, "{:,.2f}"),
    "gain": ("gain", 1, "{:.1f}"),
    "bound_share": ("share of the bound", 100, "{:.0f} %"),
    "bound_cells_per_cpu_s": ("bound, cells/CPU-s", 1, "{:,.0f}"),
    "distance": ("times the bound", 1, "{:.1f}"),
    "stage_seconds": ("s", 1, "{:,.1f}"),
    "fit_seconds": ("fit, s", 1, "{:.1f}"),
    "gflop": ("GFLOP", 1, "{:,.3f}"),
    "mbyte": ("MB passed", 1, "{:,.0f}"),
    "calls_share": ("calls' share", 100, "{:.0f} %"),
    "products_share": ("products' share", 100, "{:.0f} %"),
    "drawing_share": ("drawing's share", 100, "{:.0f} %"),
    "bytes_share": ("bytes' share", 100, "{:.0f} %"),
    "file_mb": ("file, MB", 1, "{:,.1f}"),
    "extra_mb": ("extra MB", 1, "{:,.1f}"),
    "extra_share": ("of before's", 100, "{:.1f} %"),
    "share": ("share", 100, "{:.2f} %"),
    "ratio": ("ratio", 1, "{:.2f}"),
    "cpu_ratio": ("CPU ratio", 1, "{:.2f}"),
    "cells_per_s": ("cells/s", 1, "{:,.0f}"),
    "cells_per_cpu_s": ("cells/CPU-s", 1, "{:,.0f}"),
    "time_exponent": ("time grows as cells to the", 1, "{:.2f}"),
    "bytes_per_cell": ("bytes more per cell", 1, "{:,.0f}"),
    "negative_elbo": ("negative ELBO", 1, "{:,.2f}"),
}


_WORDS = ("note", "between")  # told after the columns


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
    """Refuse a thread count below one and a file that could not be written, before hours of work."""
    if args.threads is not None and args.threads < 1:
        fix = "leave it out for all cores"
        raise DataError(three_beats("--threads of at least 1", str(args.threads), fix))
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise DataError(three_beats("--out in a folder that exists", str(args.out), "make the folder first"))


def main(args: argparse.Namespace) -> int:
    """Measure, print one table per kind of row, and write the file."""
    threads = args.threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the fresh processes that measure memory
    from cellop_nb.bench.record import record, write

    sections = (*SECTIONS, *_if_there()) if args.section == "all" else (args.section,)
    made = record(sections, quick=args.quick, threads=threads, measure=_measure)
    if args.out is not None:
        write(args.out, made)
        say(f"written: {args.out}")
    return 0


def _if_there() -> tuple[str, ...]:
    import torch

    return (GPU,) if torch.cuda.is_available() else ()


def _measure(section: str, call: Callable[[], list[dict]]) -> list[dict]:
    with Status(f"measuring {section}", every=60.0):
        rows = call()
    say(f"\n{section}\n")
    for group in _alike(rows):
        say(_text(group) + "\n")
    for row in rows:
        if row.get("between"):
            named = ", ".join(
                str(row[key])
                for key in ("variant", "what", "stage", "n", "cells", "hidden", "batch")
                if key in row
            )
            say(
                f"{named}: {row['distance']:.1f} times the bound ({row['bound']}). Between: {row['between']}."
            )
    return rows


def _alike(rows: list[dict]) -> list[list[dict]]:
    """Rows in their order, cut where another kind of number begins."""
    groups: list[list[dict]] = []
    keys: set[str] = set()
    for row in rows:
        found = {key for key in row if key in _UNITS and row[key] is not None}
        if not groups or (found and keys and not (found <= keys or keys <= found)):
            groups.append([])
            keys = set()
        groups[-1].append(row)
        keys |= found
    return groups


def _text(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in _WORDS))
    shown = [c for c in columns if any(row.get(c) is not None for row in rows)]
    titles = [_UNITS[c][0] if c in _UNITS else c for c in shown]
    cells = [[*(_cell(c, row.get(c)) for c in shown), row.get("note") or ""] for row in rows]
    numbers = [i for i, c in enumerate(shown) if c in _UNITS or any(isinstance(r.get(c), int) for r in rows)]
    return table([*titles, ""], cells, right=numbers)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column not in _UNITS:
        return f"{value:,}" if isinstance(value, int) else str(value)
    _, factor, form = _UNITS[column]
    return form.format(factor * value)
