"""`bench`: measure speed and memory, beside the peers that are installed."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path

from cellop_nb.commands.terminal import Status, say, table
from cellop_nb.errors import DataError, three_beats
from cellop_nb.files import write_whole

SUMMARY = "measure speed and memory, beside the peers that are installed"
EXTRAS = ()  # the peers are optional: those that are absent are named as such

SECTIONS = ("vae", "energy", "operator", "scale")
_PACKAGES = (
    "cellop_nb", "torch", "numpy", "scipy", "anndata", "scvi-tools", "geomloss", "pykeops", "dcor",
)  # fmt: skip
_UNITS = {  # column: (title, factor, format)
    "seconds": ("ms", 1e3, "{:,.2f}"),
    "cpu_seconds": ("CPU ms", 1e3, "{:,.2f}"),
    "guard_seconds": ("guard CPU ms", 1e3, "{:.3f}"),
    "bound_seconds": ("products alone, ms", 1e3, "{:,.2f}"),
    "stage_seconds": ("s", 1, "{:,.1f}"),
    "fit_seconds": ("fit, s", 1, "{:.1f}"),
    "extra_mb": ("extra MB", 1, "{:,.1f}"),
    "extra_share": ("of before's", 100, "{:.1f} %"),
    "share": ("share", 100, "{:.2f} %"),
    "ratio": ("ratio", 1, "{:.2f}"),
    "cpu_ratio": ("CPU ratio", 1, "{:.2f}"),
    "cells_per_s": ("cells/s", 1, "{:,.0f}"),
    "cells_per_cpu_s": ("cells/CPU-s", 1, "{:,.0f}"),
    "gemm_cells_per_s": ("dense products alone", 1, "{:,.0f}"),
    "negative_elbo": ("negative ELBO", 1, "{:,.2f}"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench`."""
    parser.add_argument(
        "section", nargs="?", default="all", choices=(*SECTIONS, "all"), help="what to measure (default: all)"
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
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    results = {}
    try:
        for section in SECTIONS if args.section == "all" else (args.section,):
            results[section] = _measure(section, args.quick)
    finally:
        torch.set_num_threads(before)
    if args.out is not None:
        written = _surroundings(threads, args.quick) | {"results": results}
        text = json.dumps(written, indent=1) + "\n"
        write_whole(args.out, lambda part: part.write_text(text, encoding="utf-8"))
        say(f"written: {args.out}")
    return 0


def _measure(section: str, quick: bool) -> list[dict]:
    from importlib import import_module

    with Status(f"measuring {section}", every=60.0):
        rows = import_module(f"cellop_nb.bench.{section}").run(quick)
    say(f"\n{section}\n")
    for group in _alike(rows):
        say(_text(group) + "\n")
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
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "note"))
    shown = [c for c in columns if any(row.get(c) is not None for row in rows)]
    titles = [_UNITS[c][0] if c in _UNITS else c for c in shown]
    cells = [[*(_cell(c, row.get(c)) for c in shown), row.get("note") or ""] for row in rows]
    numbers = [i for i, c in enumerate(shown) if c in _UNITS or any(isinstance(r.get(c), int) for r in rows)]
    return table([*titles, ""], cells, right=numbers)


def _cell(column: str, value: object) -> str:
    if value is None:
        return ""
    if column not in _UNITS:
        return f"{value:,}" if isinstance(value, int) else str(value)
    _, factor, form = _UNITS[column]
    return form.format(factor * value)


def _surroundings(threads: int, quick: bool) -> dict:
    """What the numbers depend on: date, machine, threads and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "threads": threads,
        "quick": quick,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    if name == "cellop_nb":
        from cellop_nb import __version__

        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
