"""Energy distance, value and gradient: ours against dense autograd and the peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cellop_nb.models.energy import energy_distance, grouped_energy_distance, self_distance

from .measure import (
    LATENT_COLUMNS,
    Counts,
    compared,
    counts,
    in_fresh_process,
    interleaved,
    missing,
    product_rate,
)

DIMENSIONS = 32
BETWEEN = "an inverse root per pair, and two more passes over each tile of distances"


def dense(x: Tensor, y: Tensor) -> Tensor:
    """The usual form: three distance matrices, differentiated by autograd."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return 2 * torch.cdist(x, y).mean() - within


def geomloss(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """The same (V form, doubled) with geomloss."""
    from geomloss import SamplesLoss

    return 2 * SamplesLoss("energy", backend=backend)(x, y)


VARIANTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[str, ...]]] = {
    "cellop_nb": (energy_distance, ()),
    "torch.cdist": (dense, ()),
    "geomloss tensorized": (lambda x, y: geomloss(x, y, "tensorized"), ("geomloss",)),
    "geomloss online": (lambda x, y: geomloss(x, y, "online"), ("geomloss", "pykeops")),
}


def step(variant: str, n: int) -> Callable[[], object]:
    """Value and gradient at n = m cells of two Gaussian clouds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, DIMENSIONS, generator=generator).requires_grad_()
    y = torch.randn(n, DIMENSIONS, generator=generator) + 0.3
    torch.autograd.grad(VARIANTS[variant][0](x[:8], y[:8]), x)  # libraries allocate at their first call
    return lambda: torch.autograd.grad(VARIANTS[variant][0](x, y), x)


def _gradient(value: Callable[[], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value(), x)


def grouped_steps(groups: int = 200, cells: int = 64) -> dict[str, Callable[[], object]]:
    """Many small groups: one call, one call with the constant known, and Python loops."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups * cells, DIMENSIONS, generator=generator).requires_grad_()
    y = torch.randn(groups * cells, DIMENSIONS, generator=generator)
    sizes = [cells] * groups
    known = self_distance(y, sizes)

    def loop(distance) -> Tensor:
        return sum(distance(a, b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True))

    values = {
        "cellop_nb grouped": lambda: grouped_energy_distance(x, y, sizes, sizes).sum(),
        "cellop_nb grouped, y_self known": lambda: grouped_energy_distance(
            x, y, sizes, sizes, y_self=known
        ).sum(),
        "cellop_nb in a loop": lambda: loop(energy_distance),
        "torch.cdist in a loop": lambda: loop(dense),
    }
    return {name: partial(_gradient, value, x) for name, value in values.items()}


def product_seconds(n: int, *, groups: int = 1, known: bool = False) -> float:
    """CPU seconds that the matrix products alone take.

    Per pair one product for d^2 and one or two for the gradient: in units of 2 (d + 2) operations, the cross
    term takes 2, the x term 3 / 2 (each pair once, two gradients), and the y term, where it is not known, 1 / 2.
    """
    side = min(n, 512)
    rate = product_rate(side, LATENT_COLUMNS, side, groups if side < 512 else 1)
    return groups * n**2 * 2.0 * LATENT_COLUMNS * (3.5 if known else 4.0) / rate


def run(quick: bool = False, memory: bool = True, peers: bool = True) -> list[dict]:
    """Measure all variants.

    Parameters
    ----------
    quick
        Small sizes and few repetitions: seconds instead of minutes.
    memory
        Whether peaks are taken too, in fresh processes.
    peers
        Whether the optional peers are measured, where they are installed.

    Returns
    -------
    One row per variant and size: variant, n (cells per cloud), groups, seconds, cpu_seconds (medians),
    extra_mb (peak above the input, fresh process), ratio and cpu_ratio (seconds over those of cellop_nb),
    bound_seconds and distance (CPU seconds of the products alone, and ours over them), note.
    """
    rows: list[dict] = []
    made = Counts()
    for n in (200, 1000) if quick else (200, 1000, 2000, 5000, 10_000):
        absent = {name: missing(*needs, wanted=peers) for name, (_, needs) in VARIANTS.items()}
        calls = {name: step(name, n) for name, note in absent.items() if note is None}
        times = interleaved(calls, 3 if quick or n > 2000 else 15)
        for name, note in absent.items():
            row: dict[str, object] = {"variant": name, "n": n, "note": note}
            if note is None:
                row |= times[name] | _ratios(times[name], times["cellop_nb"])
                if memory:
                    peak = in_fresh_process(__name__, "step", {"variant": name, "n": n})
                    row["extra_mb"] = peak["extra_mb"]
                if name == "cellop_nb":
                    products, made = product_seconds(n), counts(calls[name])
                    row |= compared(row["cpu_seconds"], products=products, made=made, between=BETWEEN)
            rows.append(row)
    if not quick:
        rows.append(_large(100_000, 10_000, made))
    calls = grouped_steps()
    times = interleaved(calls, 3 if quick else 9)
    for name, taken in times.items():
        row = {"variant": name, "groups": 200, "n": 64, "note": None} | taken
        row |= _ratios(taken, times["cellop_nb grouped"])
        if "loop" not in name:
            products = product_seconds(64, groups=200, known="known" in name)
            made = counts(calls[name])
            row |= compared(taken["cpu_seconds"], products=products, made=made, between=BETWEEN)
        rows.append(row)
    return rows


def _large(n: int, counted: int, made: Counts) -> dict:
    """One value and gradient in a process of its own; what was counted at `counted` cells grows with the pairs."""
    row = {"variant": "cellop_nb", "n": n, "note": None}
    row |= in_fresh_process(__name__, "step", {"variant": "cellop_nb", "n": n}, timeout=3600)
    if row["note"] is not None:
        return row
    made = made.times((n // counted) ** 2)
    return row | compared(row["cpu_seconds"], products=product_seconds(n), made=made, between=BETWEEN)


def _ratios(taken: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
    return {
        "ratio": taken["seconds"] / ours["seconds"],
        "cpu_ratio": taken["cpu_seconds"] / ours["cpu_seconds"],
    }
