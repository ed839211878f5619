"""One run of the benchmarks: measured, shown as tables, and kept as JSON with the machine, its limits and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from cellop_nb.commands.terminal import Status, say, table
from cellop_nb.errors import DataError
from cellop_nb.files import write_whole

SHIPPED = Path(__file__).with_name("record.json")
"""A full run on an idle machine. To make it anew: ``python3 -m cellop_nb bench all --threads 1 --out <this file>``."""

GPU = Path(__file__).with_name("gpu_record.json")
"""A run on a GPU: ``python3 -m cellop_nb bench gpu --threads 1 --out <this file>``."""

SECTIONS = ("vae", "energy", "operators", "predict", "explorer", "scale")
PACKAGES = (
    "cellop_nb", "torch", "numpy", "scipy", "anndata", "scvi-tools", "geomloss", "pykeops", "dcor",
)  # fmt: skip


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


def record(
    sections: Iterable[str],
    *,
    quick: bool = False,
    memory: bool = True,
    peers: bool = True,
    threads: int | None = None,
    show: bool = False,
) -> dict:
    """Run sections of the benchmark.

    Parameters
    ----------
    quick
        Small sizes and few repetitions.
    memory
        Whether peaks are taken too, each in a process of its own (a few seconds each).
    peers
        Whether the optional peers are measured, where they are installed.
    threads
        Threads of torch while it runs; as they are where None.
    show
        Whether progress and a table per kind of row are written to the terminal.

    Returns
    -------
    Dictionary with date, machine (and the GPU's name where it was measured), threads, quick, versions, limits, and
    results (section to rows).
    """
    import torch

    from .gpu import Card
    from .measure import machine

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        results = {}
        for section in sections:
            run = import_module(f"benchmarks.{section}").run
            options = {"memory": memory, "peers": peers}
            options = {name: value for name, value in options.items() if name in run.__annotations__}
            results[section] = (
                _measure(section, partial(run, quick, **options)) if show else run(quick, **options)
            )
        made = _surroundings(torch.get_num_threads(), quick) | {"limits": machine()}
        if "gpu" in results:
            card = Card()
            made["machine"] |= {"device": card.name, "CUDA": torch.version.cuda}
            made["limits"] |= card.limits()
        return made | {"results": results}
    finally:
        torch.set_num_threads(before)


def write(path: str | Path, made: dict) -> None:
    """Write a record as JSON, whole or not at all."""
    text = json.dumps(made, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def read(path: str | Path) -> dict:
    """Read a record.

    Raises
    ------
    DataError
        If the file is missing or is no record.
    """
    fix = "give a file that `python3 -m cellop_nb bench all --out FILE.json` wrote"
    try:
        made = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("a record of a benchmark", f"{path}: {error}", fix) from error
    if not isinstance(made, dict) or not {"results", "machine", "limits"} <= set(made):
        raise DataError("a record of a benchmark", f"{path} without results or limits", fix)
    return made


def told(made: dict) -> dict:
    """What a record was measured on, by its plain names: machine, limits, threads, sizes, date, versions."""
    limits = {name: round(value, 1) for name, value in made["limits"].items()}
    sizes = "quick" if made["quick"] else "full"
    versions = ", ".join(f"{name} {found}" for name, found in made["versions"].items() if found)
    last = {"sizes": sizes, "date": made["date"], "versions": versions, "note": made.get("note", "")}
    return made["machine"] | {"threads": made["threads"]} | limits | last


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
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
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


# -- tables in the terminal ------------------------------------------------------------------------------------


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
