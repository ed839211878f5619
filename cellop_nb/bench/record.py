"""One run of the benchmarks as a record: numbers, the machine and its limits, versions; written and read as JSON."""

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

from ..errors import DataError, three_beats
from ..files import write_whole

SHIPPED = Path(__file__).with_name("record.json")
"""A full run on an idle machine. To make it anew: ``python3 -m cellop_nb bench all --threads 1 --out <this file>``."""

GPU = Path(__file__).with_name("gpu_record.json")
"""A run on a GPU: ``python3 -m cellop_nb bench gpu --threads 1 --out <this file>``."""

SECTIONS = ("vae", "energy", "operator", "predict", "explorer", "scale")
PACKAGES = (
    "cellop_nb", "torch", "numpy", "scipy", "anndata", "scvi-tools", "geomloss", "pykeops", "dcor",
)  # fmt: skip


def record(
    sections: Iterable[str],
    *,
    quick: bool = False,
    memory: bool = True,
    peers: bool = True,
    threads: int | None = None,
    measure: Callable[[str, Callable[[], list[dict]]], list[dict]] = lambda section, call: call(),
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
    measure
        Gets the name of each section and the call that measures it: room for progress and tables.

    Returns
    -------
    Dictionary with date, machine (and the GPU's name where it was measured), threads, quick, versions, limits, and
    results (section to rows).
    """
    import torch

    from . import limits
    from .card import Card

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        results = {}
        for section in sections:
            run = import_module(f"cellop_nb.bench.{section}").run
            options = {"memory": memory, "peers": peers}
            options = {name: value for name, value in options.items() if name in run.__annotations__}
            results[section] = measure(section, partial(run, quick, **options))
        made = _surroundings(torch.get_num_threads(), quick) | {"limits": limits.machine()}
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
        raise DataError(three_beats("a record of a benchmark", f"{path}: {error}", fix)) from error
    if not isinstance(made, dict) or not {"results", "machine", "limits"} <= set(made):
        raise DataError(three_beats("a record of a benchmark", f"{path} without results or limits", fix))
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
        from .. import __version__

        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
