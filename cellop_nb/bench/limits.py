"""What this machine can do at best, measured in the same run: the bound that every figure is compared with."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from .count import Counts

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
