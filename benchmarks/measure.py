"""How the benchmarks measure: time in turn, memory in a fresh process, calls, and what the machine can do at best."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cellop_nb.notebook.live import LivePlot
from cellop_nb.training.guard import NonFiniteGuard, random_state
from cellop_nb.training.loop import Trainer

_CHILD = """
import json, sys
from benchmarks.measure import child
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
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    surroundings = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=surroundings)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"extra_mb": None, "seconds": None, "note": reason}
    return json.loads(done.stdout.strip().splitlines()[-1])


def no_compiler(*, quick: bool) -> str | None:
    """Why ``compile=True`` is not measured; None where it is."""
    if quick:
        return "left out: compiling takes longer than all else that is quick"
    import torch

    from cellop_nb.errors import ModelError
    from cellop_nb.training.cuda_graph import check_compiler

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


_aten = torch.ops.aten
OPERATIONS = {
    **flop_registry,
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
}

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal")
"""Calls after which the host waits for a device: their result, or its shape, depends on values."""


@dataclass
class Counts:
    """Calls of torch that compute (views are free), their operations in products, the bytes of all their inputs
    and results, and the names of those that a device would have to be waited for."""

    calls: int = 0
    operations: int = 0
    bytes: int = 0
    reads: tuple[str, ...] = ()

    def times(self, number: int) -> Counts:
        """That of `number` such computations."""
        return Counts(number * self.calls, number * self.operations, number * self.bytes, number * self.reads)

    def __add__(self, other: Counts) -> Counts:
        """Of one computation and another."""
        calls, operations = self.calls + other.calls, self.operations + other.operations
        return Counts(calls, operations, self.bytes + other.bytes, self.reads + other.reads)

    def per(self, number: int) -> Counts:
        """That of one of `number` computations, rounded; reads are told of all."""
        calls, operations, passed = (
            round(total / number) for total in (self.calls, self.operations, self.bytes)
        )
        return Counts(calls, operations, passed, self.reads)


class _Counter(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.name() == "aten::detach":
            return result
        counts = self.counts
        counts.calls += 1
        counted = OPERATIONS.get(function._overloadpacket)
        if counted is not None:
            counts.operations += counted(*args, **(kwargs or {}), out_val=result)
        counts.bytes += sum(_bytes(given) for given in tree_leaves((args, kwargs, result)))
        if function._opname in READS:
            counts.reads += (function._opname,)
        return result


def _bytes(given: object) -> int:
    return given.numel() * given.element_size() if isinstance(given, Tensor) else 0


def counts(call: Callable[[], object]) -> Counts:
    """Make the call, and count; those of its gradient are among them."""
    found = Counts()
    with _Counter(found), torch.autograd.set_multithreading_enabled(False):
        call()
    return found


LATENT_COLUMNS = 34
"""Columns of the products of an energy distance at d = 32: the latent, its norm, and one."""


def cpu_seconds(call: Callable[[], object], repeats: int = 9) -> float:
    """Median CPU seconds of a call, after one that warms up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return statistics.median(taken[1:])


@functools.cache
def product_rate(rows: int, inner: int, columns: int, groups: int = 1) -> float:
    """Operations per CPU second of a float32 product (rows x inner) (inner x columns), one or several at once."""
    a, b = torch.randn(groups, rows, inner), torch.randn(groups, inner, columns)
    out, calls = torch.empty(groups, rows, columns), 1 + 100_000_000 // (2 * groups * rows * inner * columns)

    def run() -> None:
        for _ in range(calls):
            torch.mm(a[0], b[0], out=out[0]) if groups == 1 else torch.bmm(a, b, out=out)

    return 2.0 * groups * rows * inner * columns * calls / cpu_seconds(run)


@functools.cache
def bandwidth() -> float:
    """Bytes read and written per CPU second by a copy of an array larger than every cache."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / cpu_seconds(lambda: target.copy_(source), 3)


@functools.cache
def call_seconds() -> float:
    """CPU seconds of one torch call on a handful of numbers: what every call costs beside its arithmetic."""
    small, out = torch.ones(8), torch.empty(8)

    def run() -> None:
        for _ in range(1000):
            torch.add(small, small, out=out)

    return cpu_seconds(run) / 1000


def machine() -> dict[str, float]:
    """The limits themselves, for the file of a run."""
    return {
        "gemm_gflops": product_rate(1024, 1024, 1024) / 1e9,
        "bandwidth_gb_s": bandwidth() / 1e9,
        "call_us": call_seconds() * 1e6,
    }


def compared(
    cpu: float,
    *,
    products: float = 0.0,
    memory: float = 0.0,
    drawing: float = 0.0,
    made: Counts,
    between: str,
) -> dict:
    """Bound and distance of a figure.

    Parameters
    ----------
    cpu
        CPU seconds that were measured.
    products, memory
        CPU seconds that the unavoidable products, and the unavoidable traffic with memory, take by themselves.
    drawing
        CPU seconds that drawing the same picture once more takes: it comes on top.
    made
        What was counted while it ran.
    between
        What stands between the bound and the figure beside the calls; kept where it is more than twice the bound.

    Returns
    -------
    ``bound_seconds`` (CPU seconds), ``bound`` (which one it is), ``distance`` (their ratio), ``calls``, ``gflop`` in
    products and ``mbyte`` of all inputs and results (counted), ``calls_share`` (their least cost over `cpu`),
    ``products_share``, ``bytes_share`` (as if all came from memory), ``drawing_share`` of a picture, and ``between``.
    """
    bound = max(products, memory) + drawing
    larger = "products" if products >= memory else "memory"
    row = {
        "bound_seconds": bound,
        "bound": f"drawing, {larger}" if drawing else larger,
        "distance": cpu / bound,
        "calls": made.calls,
        "gflop": made.operations / 1e9,
        "mbyte": made.bytes / 1e6,
        "calls_share": made.calls * call_seconds() / cpu,
        "products_share": products / cpu,
        "bytes_share": made.bytes / bandwidth() / cpu,
    }
    row |= {"drawing_share": drawing / cpu} if drawing else {}
    return row | ({"between": f"{_parts(row)}; {between}"} if cpu > 2 * bound else {})


def _parts(row: dict) -> str:
    """What was counted, as shares of the time: they overlap, since a call multiplies or passes over bytes."""
    needed = {"drawing": "drawing", "products": "the unavoidable products"}
    return "; ".join([
        f"{row['calls']:,} torch calls, at least {row['calls_share']:.0%} of the time",
        *(f"{words}, {row[f'{kind}_share']:.0%}" for kind, words in needed.items() if row.get(f"{kind}_share")),
        f"{row['mbyte']:,.3g} MB of inputs and results, {row['bytes_share']:.0%} if all came from memory and none "
        "from the cache",
    ])  # fmt: skip


GUARD = (
    "loss terms and norm put together and read, the calls that copy the random state before each step, so that a faulty "
    "one can be made again, and Python itself"
)
LIVE = (
    "the panels are made once, and fonts and letters rendered once, which a drawing of the same picture finds ready; the "
    "line of words before the first epoch"
)


class _Watched:
    """A guard whose calls are timed, and counted where wanted."""

    def __init__(self, guard, *, count: bool = False) -> None:
        self._guard, self._count = guard, count
        self.seconds, self.made = 0.0, Counts()

    def __getattr__(self, name: str):
        function = getattr(self._guard, name)

        def call(*args):
            results = []
            start = time.process_time()
            try:
                if self._count:
                    self.made += counts(lambda: results.append(function(*args)))
                else:
                    results.append(function(*args))
            finally:
                self.seconds += time.process_time() - start
            return results[0]

        return call


def guard_share(trainer: Trainer, steps: int = 200) -> dict:
    """CPU seconds inside the guard's calls, and of a step without them.

    The difference of two runs, with and without guard, would drown in the noise of a busy machine: the calls
    themselves are timed. What they wait for is theirs.

    Returns
    -------
    ``cpu_seconds`` of a step without the guard, ``guard_seconds``, ``share``, their ratio, and the bound of the
    guard's seconds: the traffic with memory that its copies of the random state take.
    """
    trainer.model.train()
    _steps(trainer, min(5, steps))
    start = time.process_time()
    inside = _watched(trainer, steps).seconds
    total = time.process_time() - start
    made = _watched(trainer, steps, count=True).made.per(steps)
    step, guard = (total - inside) / steps, inside / steps
    row = {"cpu_seconds": step, "guard_seconds": guard, "share": guard / step, "note": None}
    return row | compared(guard, memory=_guard_bytes(trainer) / bandwidth(), made=made, between=GUARD)


def _watched(trainer: Trainer, steps: int, *, count: bool = False) -> _Watched:
    """The watch of so many steps."""
    own, watch = trainer.guard, _Watched(trainer.guard, count=count)
    trainer.guard = cast(NonFiniteGuard, watch)
    _steps(trainer, steps)
    trainer.guard = own
    return watch


def _guard_bytes(trainer: Trainer) -> float:
    """Bytes of a step: the random states are read and copied."""
    return 2.0 * sum(state.nbytes for state in random_state(trainer).values())


def _steps(trainer: Trainer, steps: int) -> None:
    done = 0
    while done < steps:
        for batch in trainer.batches():
            trainer._run_step(batch)
            trainer.step, done = trainer.step + 1, done + 1
            if done >= steps:
                break


def live_share(make: Callable[..., Trainer], *args) -> dict:
    """Share of a fit's seconds that drawing its picture took, the first and the last one included.

    Parameters
    ----------
    make
        ``make(*args, callbacks)`` gives the trainer.

    Returns
    -------
    ``fit_seconds``, ``seconds`` of all pictures, ``pictures``, ``share``, and as bound the seconds that it takes to
    draw the last picture so many times again.
    """
    picture = LivePlot(publish=lambda png: None)
    trainer = make(*args, (picture,))
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start
    taken, again = picture.cost_seconds, _drawing(picture)
    row: dict = {
        "fit_seconds": seconds,
        "seconds": taken,
        "pictures": picture.n_drawn,
        "share": taken / seconds,
    }
    row |= {"bound_seconds": again, "bound": "drawing", "distance": taken / again, "note": None}
    return row | ({"between": LIVE} if taken > 2 * again else {})


def _drawing(picture: LivePlot) -> float:
    """Seconds to draw the pictures of a fit again: every artist, and the PNG; nothing is made or looked up."""
    board = picture._board
    assert board is not None

    def seconds(small: bool) -> float:
        taken = []
        for _ in range(5):
            board.ground = None
            start = time.perf_counter()
            board.png(small=small)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    return (picture.n_drawn - 1) * seconds(False) + seconds(True)
