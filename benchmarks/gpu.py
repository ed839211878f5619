"""On a GPU: absolute times, the share of the bound, waits of the host, and what each option of a trainer brings."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from anndata import AnnData

from cellop_nb.analysis.predict import embed
from cellop_nb.errors import ModelError
from cellop_nb.models.energy import energy_distance, grouped_energy_distance
from cellop_nb.training.callbacks import EarlyStopping
from cellop_nb.training.loop import Machine, Trainer
from cellop_nb.training.operators import OperatorTrainer, new_operators
from cellop_nb.training.vae import VAETrainer, new_vae

from . import energy, vae
from . import predict as job
from .measure import LATENT_COLUMNS
from .operators import QUICK, SIZES, latent_trainer


class Card:
    """What a device can do at best, and what a call takes there.

    Parameters
    ----------
    device
        A CUDA device; a CPU stands in for one in tests, without a count of waits and of busy time.

    Raises
    ------
    ModelError
        If there is no such device.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.device, self.is_gpu = torch.device(device), device.startswith("cuda")
        if self.is_gpu and not torch.cuda.is_available():
            fix = "run this section where torch.cuda.is_available()"
            raise ModelError("a CUDA device", "none on this machine", fix)

    @property
    def name(self) -> str:
        """Of the device, as its driver tells it."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else "CPU"

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], *, least: float = 0.1, turns: int = 5) -> float:
        """Median seconds of a call and all that it started on the device, after some that warm up.

        A turn makes the call until `least` seconds are over, and waits once, at its end.
        """
        for _ in range(3):
            once = self._turn(call, 1)
        times = max(1, round(least / max(once, 1e-6)))
        return statistics.median(self._turn(call, times) / times for _ in range(turns))

    def _turn(self, call: Callable[[], object], times: int) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return time.perf_counter() - start

    def busy(self, call: Callable[[], object], times: int = 20) -> float | None:
        """Seconds of a call in which the device computes or copies, by its own clock."""
        if not self.is_gpu:
            return None
        from torch.profiler import ProfilerActivity, profile

        call()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(times):
                call()
            self.wait()
        return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6 / times

    def waits(self, call: Callable[[], object], times: int = 20) -> int | None:
        """How often the host waits for the device in so many calls."""
        if not self.is_gpu:
            return None
        self.wait()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(times):
                    call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in found)

    def extra_mb(self, call: Callable[[], object]) -> float | None:
        """Peak memory of the device above what is held, in MB."""
        if not self.is_gpu:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    # -- limits ------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019 (a card lives as long as the process)
    def product_rate(
        self, rows: int, inner: int, columns: int, groups: int = 1, dtype: torch.dtype = torch.float32
    ) -> float:
        """Operations per second of products (rows x inner) (inner x columns), so many at once."""
        a = torch.randn(groups, rows, inner, device=self.device).to(dtype)
        b = torch.randn(groups, inner, columns, device=self.device).to(dtype)
        out = torch.empty(groups, rows, columns, dtype=dtype, device=self.device)
        seconds = self.seconds(lambda: torch.bmm(a, b, out=out), least=0.02)
        return 2.0 * groups * rows * inner * columns / seconds

    @functools.cache  # noqa: B019
    def bandwidth(self, mbyte: int = 1024) -> float:
        """Bytes read and written per second by a copy within the device's memory."""
        source = torch.ones(mbyte << 18, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * source.nbytes / self.seconds(lambda: target.copy_(source), least=0.02)

    @functools.cache  # noqa: B019
    def call_seconds(self) -> float:
        """Seconds of one call on a handful of numbers: what every call costs beside its arithmetic."""
        small = torch.ones(8, device=self.device)
        out = torch.empty_like(small)
        return self.seconds(lambda: torch.add(small, small, out=out), least=0.02)

    def limits(self, size: int = 8192) -> dict[str, float]:
        """The limits, for the file of a run."""
        rates = {
            f"gpu_{name}_gflops": self.product_rate(size, size, size, dtype=dtype) / 1e9
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64))
        }
        return rates | {
            "gpu_bandwidth_gb_s": self.bandwidth() / 1e9,
            "gpu_call_us": self.call_seconds() * 1e6,
        }


PLAIN, RECORDED = "call by call", "recorded (default)"
OPTIONS: dict[str, Machine] = {
    PLAIN: Machine(cuda_graphs=False),
    RECORDED: Machine(),
    "recorded, bf16-mixed": Machine(precision="bf16-mixed"),
    "recorded, compiled": Machine(compile=True),
}
MANY = {"groups": 256, "cells": 256, "genes": 50, "hidden": 16}
VAE_SIZES = (*vae.SIZES, (512, 4096))
BETWEEN = {
    "energy distance": "passes of float64 over each tile (inverse root, mask, sums); at a few cells the calls themselves",
    "operator step": "small kernels one after the other, each at least a microsecond or two: penalties, clipping, "
    "guard and optimiser beside the distances",
    "VAE step": "kernels of a few microseconds one after the other: special functions at the non-zeros, the dense input "
    "of the first layer, and the optimiser",
}


def run(quick: bool = False, device: str = "cuda") -> list[dict]:
    """Measure on one GPU.

    Parameters
    ----------
    quick
        Small sizes: whether it runs.
    device
        Where.

    Returns
    -------
    One row per measure: what, variant, sizes, seconds (median, the device waited for), busy_seconds (of them the device
    computes), extra_mb (of the device's memory), waits (of the host, in 40 steps), ratio (seconds over those of
    cellop_nb, or gain of an option: seconds call by call over its own), bound_seconds, bound, distance and
    bound_share (its inverse), cells_per_s of a training;
    stage_seconds of the stages of a whole job.

    Raises
    ------
    ModelError
        Without a GPU.
    """
    card = Card(device)
    parts = (_energies, _operators, _vaes, _encode, _job)
    return [row for part in parts for row in part(card, quick)]


def _bounded(row: dict, seconds: float, *, products: float, memory: float = 0.0) -> dict:
    """With the bound of a row, and what stands between where it is more than twice as slow."""
    bound = max(products, memory)
    near = {"bound_seconds": bound, "bound": "products" if products >= memory else "memory"}
    near |= {"distance": seconds / bound, "bound_share": bound / seconds}
    return row | near | ({"between": BETWEEN[row["what"]]} if seconds > 2 * bound else {})


# -- energy distance ---------------------------------------------------------------------------------------


def _energies(card: Card, quick: bool) -> Iterator[dict]:
    for n in (100, 300) if quick else (200, 1000, 5000, 10_000, 30_000):
        x, y = _clouds(n, card)
        forms = {"cellop_nb": energy_distance} | ({"torch.cdist": energy.dense} if n <= 10_000 else {})
        calls = {name: _gradient(form, x, y) for name, form in forms.items()}
        taken = {name: card.seconds(call, turns=3) for name, call in calls.items()}
        for name, call in calls.items():
            row: dict = {"what": "energy distance", "variant": name, "n": n, "seconds": taken[name]}
            row |= {"extra_mb": card.extra_mb(call), "ratio": taken[name] / taken["cellop_nb"]}
            if name == "cellop_nb":
                row = _bounded(row, taken[name], products=_products(card, n))
            yield row
    groups, cells = (10, 16) if quick else (200, 64)
    x, y = _clouds(groups * cells, card)
    sizes = [cells] * groups
    seconds = card.seconds(_gradient(lambda a, b: grouped_energy_distance(a, b, sizes, sizes).sum(), x, y))
    row = {
        "what": "energy distance",
        "variant": "cellop_nb grouped",
        "n": cells,
        "groups": groups,
        "seconds": seconds,
    }
    yield _bounded(row, seconds, products=_products(card, cells, groups))


def _clouds(n: int, card: Card) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, energy.DIMENSIONS, generator=generator).to(card.device) for _ in range(2))
    return x.requires_grad_(), y + 0.3


def _gradient(form: Callable, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(form(x, y), x)


def _products(card: Card, n: int, groups: int = 1, *, per_pair: float = 4.0) -> float:
    """Seconds of the products alone, in float64 (:func:`benchmarks.energy.product_seconds`)."""
    side = min(n, 2048)
    rate = card.product_rate(side, LATENT_COLUMNS, side, groups, torch.float64)
    return groups * n**2 * 2.0 * LATENT_COLUMNS * per_pair / rate


# -- trainers ----------------------------------------------------------------------------------------------


def _endless(trainer: Trainer) -> Callable[[], object]:
    """One step of a training at each call, with the draw of its batch."""

    def batches() -> Iterator:
        while True:
            yield from trainer.batches()

    given = batches()
    trainer.model.train()

    def step() -> None:
        trainer._run_step(next(given))
        trainer.step += 1

    return step


def _options(card: Card, quick: bool, make: Callable[..., Trainer]) -> Iterator[tuple[dict, Trainer]]:
    """A row of seconds, waits and gain for each option of a trainer."""
    plain = 0.0
    for name, machine in OPTIONS.items():
        if (quick or not card.is_gpu) and machine.compile:
            continue
        trainer = make(machine=replace(machine, accelerator="cuda" if card.is_gpu else "cpu"))
        call = _endless(trainer)
        with trainer.compiled():
            for _ in range(5):
                call()
            seconds = card.seconds(call, least=0.01 if quick else 0.2)
            row = {"variant": name, "seconds": seconds, "busy_seconds": card.busy(call)}
            row["waits"] = card.waits(call, 40)
        plain = plain or seconds
        yield row | {"gain": plain / seconds}, trainer


def _operators(card: Card, quick: bool) -> Iterator[dict]:
    for sizes in (QUICK,) if quick else (SIZES, MANY):
        groups, cells = sizes["groups"], sizes["cells"]
        for row, _ in _options(
            card, quick, lambda machine, sizes=sizes: latent_trainer(sizes, 200, machine=machine)
        ):
            row = {"what": "operator step", "groups": groups, "n": cells} | row
            yield _bounded(row, row["seconds"], products=_products(card, cells, groups, per_pair=3.5))


def _vaes(card: Card, quick: bool) -> Iterator[dict]:
    adata = vae.screen(600 if quick else 20_000, 100 if quick else 2_000)
    for hidden, batch in ((16, 64),) if quick else VAE_SIZES:

        def make(machine: Machine, hidden: int = hidden, batch: int = batch) -> VAETrainer:
            model = new_vae(adata, n_latent=vae.LATENT, n_hidden=hidden)
            return VAETrainer(adata, model, batch_size=batch, progress=False, machine=machine)

        for row, trainer in _options(card, quick, make):
            row = {"what": "VAE step", "hidden": hidden, "batch": batch} | row
            cells = sum(
                map(trainer.batch_size_of, trainer.batches())
            )  # the last batch of an epoch is smaller
            row["cells_per_s"] = cells / trainer.steps_per_epoch() / row["seconds"]
            yield _bounded(row, row["seconds"], **_step_bounds(card, hidden, batch, adata.n_vars))


def _step_bounds(card: Card, hidden: int, batch: int, n_genes: int) -> dict[str, float]:
    """As :func:`benchmarks.vae.step_bounds`, of the device; the first layer's products are dense there."""
    operations = 2.0 * batch * n_genes * (hidden + vae.LATENT) * 5
    weights, entries = n_genes * (2 * hidden + 2 * vae.LATENT), batch * n_genes
    return {
        "products": operations / card.product_rate(batch, hidden, n_genes),
        "memory": 4.0 * (10 * weights + 5 * entries) / card.bandwidth(),
    }


def _encode(card: Card, quick: bool) -> Iterator[dict]:
    adata: AnnData = vae.screen(600 if quick else 20_000, 100 if quick else 2_000)
    model = new_vae(adata, n_latent=vae.LATENT, n_hidden=128).to(card.device).eval()
    seconds = card.seconds(lambda: embed(adata, model), least=0.01, turns=3)
    yield {"what": "encode", "variant": "cellop_nb", "cells": adata.n_obs, "seconds": seconds,
           "cells_per_s": adata.n_obs / seconds}  # fmt: skip


def _job(card: Card, quick: bool) -> Iterator[dict]:
    """The whole job of :mod:`.predict`, each stage once."""
    adata, name = job.screen(quick)
    machine = Machine(accelerator="cuda" if card.is_gpu else "cpu")
    settings: dict = {"progress": False, "machine": machine}
    model = new_vae(adata, n_latent=job.LATENT, n_hidden=job.HIDDEN)
    stops = [EarlyStopping(patience=20)]
    first = VAETrainer(
        adata, model, batch_size=job.BATCH, callbacks=stops, max_epochs=2 if quick else 120, **settings
    )
    stages: dict[str, Callable[[], object]] = {job.VAE: first.fit, job.ENCODE: lambda: embed(adata, model)}
    for stage, call in stages.items():
        yield _stage(card, name, adata, stage, call)
    operators = new_operators(adata)
    second = OperatorTrainer(adata, operators, max_epochs=2 if quick else 30, **settings)
    yield _stage(card, name, adata, job.OPERATORS, second.fit)
    yield _stage(card, name, adata, job.PREDICT, lambda: job.predict_all(adata, model, operators, second))


def _stage(card: Card, name: str, adata: AnnData, stage: str, call: Callable[[], object]) -> dict:
    start = time.perf_counter()
    call()
    card.wait()
    common = {
        "what": stage,
        "variant": "cellop_nb",
        "data": f"{name}, {adata.n_obs:,} cells, {adata.n_vars:,} genes",
    }
    return common | {"stage_seconds": time.perf_counter() - start}
