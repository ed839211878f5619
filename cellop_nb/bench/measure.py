"""How the benchmarks measure: interleaved repetitions for time, a fresh process for memory."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_CHILD = """
import json, sys
from cellop_nb.bench.measure import child
json.dump(child(*json.loads(sys.argv[1])), sys.stdout)
"""


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median wall and CPU seconds of each call, one repetition of each in turn.

    Turns spread a disturbance of the machine over all variants, so that their ratios hold. The first turn
    warms up and is dropped. A turn of a short call makes it several times, as training does, until it takes 20 ms:
    what another variant left in the caches, and the clock's own grain, would else be a part of it.

    Returns
    -------
    Name to ``{"seconds", "cpu_seconds"}`` of one call.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    times = {name: _times(call) for name, call in calls.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(times[name]):
                call()
            taken = time.perf_counter() - wall, time.process_time() - cpu
            seconds[name].append((taken[0] / times[name], taken[1] / times[name]))
    return {
        name: {
            "seconds": statistics.median(a for a, _ in taken),
            "cpu_seconds": statistics.median(b for _, b in taken),
        }
        for name, taken in seconds.items()
    }


def _times(call: Callable[[], object], least: float = 0.02) -> int:
    """How often a turn makes the call; it is made here to warm up, and again to be timed where it is short."""
    taken = 0.0
    for _ in range(2):
        start = time.process_time()
        call()
        taken = time.process_time() - start
        if taken > 10 * least:
            return 1
    return max(1, math.ceil(least / max(taken, 1e-6)))


def peak_mb(*, restart: bool = False) -> float:
    """Largest resident memory of this process in MB, since its start or (Linux) since the last restart."""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    if restart:
        # Importing peaks above what stays resident, and a child inherits the ru_maxrss of its parent: both
        # would hide what the call takes.
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def child(module: str, function: str, arguments: dict) -> dict:
    """In the fresh process: make the call to measure; its time, the peak memory that it adds, and what it tells."""
    call = getattr(importlib.import_module(module), function)(**arguments)
    _give_back()
    before, wall, cpu = peak_mb(restart=True), time.perf_counter(), time.process_time()
    told = call()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    taken = {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_mb": peak_mb() - before}
    return taken | (told if isinstance(told, dict) else {})


def _give_back() -> None:
    """Return freed memory to the system: what making the input took would be used again, unseen."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def in_fresh_process(module: str, function: str, arguments: dict, timeout: float = 600) -> dict:
    """``{"extra_mb", "seconds", "cpu_seconds"}`` of the call that ``module.function(**arguments)`` returns, in a new one.

    Extra memory is the peak above what importing and making the input took. A dictionary that the call returns is
    added to these.
    """
    command = [sys.executable, "-c", _CHILD, json.dumps([module, function, arguments])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"extra_mb": None, "seconds": None, "note": reason}
    return json.loads(done.stdout.strip().splitlines()[-1])


def no_compiler(*, quick: bool) -> str | None:
    """Why ``compile=True`` is not measured; None where it is."""
    if quick:
        return "left out: compiling takes longer than all else that is quick"
    import torch

    from ..errors import ModelError
    from ..training.cuda_graph import check_compiler

    try:
        check_compiler(torch.device("cpu"))
    except ModelError as error:
        return f"left out: {error}"
    return None


def missing(*modules: str, wanted: bool = True) -> str | None:
    """'not installed: a, b' of the optional peers that are absent, or that none is wanted; else None."""
    if modules and not wanted:
        return "left out"
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None
