"""On a GPU: absolute times, the share of the bound, waits of the host, and what each option of a trainer brings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from anndata import AnnData

from ..analysis.predict import embed
from ..models.energy import energy_distance, grouped_energy_distance
from ..training.callbacks import EarlyStopping
from ..training.loop import Trainer
from ..training.operators import OperatorTrainer, new_operators
from ..training.vae import VAETrainer, new_vae
from . import energy, operator, vae
from . import predict as job
from .card import Card
from .limits import LATENT_COLUMNS
from .operator_forms import QUICK, SIZES

PLAIN, RECORDED = "call by call", "recorded (default)"
OPTIONS: dict[str, dict] = {
    PLAIN: {"cuda_graphs": False},
    RECORDED: {},
    "recorded, bf16-mixed": {"precision": "bf16-mixed"},
    "recorded, compiled": {"compile": True},
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
    """Seconds of the products alone, in float64 (:func:`cellop_nb.bench.energy.product_seconds`)."""
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
    for name, options in OPTIONS.items():
        if (quick or not card.is_gpu) and options.get("compile"):
            continue
        trainer = make(accelerator="cuda" if card.is_gpu else "cpu", **options)
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
            card, quick, lambda sizes=sizes, **given: operator._latent_trainer(sizes, 200, **given)
        ):
            row = {"what": "operator step", "groups": groups, "n": cells} | row
            yield _bounded(row, row["seconds"], products=_products(card, cells, groups, per_pair=3.5))


def _vaes(card: Card, quick: bool) -> Iterator[dict]:
    adata = vae.screen(600 if quick else 20_000, 100 if quick else 2_000)
    for hidden, batch in ((16, 64),) if quick else VAE_SIZES:

        def make(hidden: int = hidden, batch: int = batch, **given) -> VAETrainer:
            model = new_vae(adata, n_latent=vae.LATENT, n_hidden=hidden)
            return VAETrainer(adata, model, batch_size=batch, progress=False, **given)

        for row, trainer in _options(card, quick, make):
            row = {"what": "VAE step", "hidden": hidden, "batch": batch} | row
            cells = sum(
                map(trainer.batch_size_of, trainer.batches())
            )  # the last batch of an epoch is smaller
            row["cells_per_s"] = cells / trainer.steps_per_epoch() / row["seconds"]
            yield _bounded(row, row["seconds"], **_step_bounds(card, hidden, batch, adata.n_vars))


def _step_bounds(card: Card, hidden: int, batch: int, n_genes: int) -> dict[str, float]:
    """As :func:`cellop_nb.bench.vae.step_bounds`, of the device; the first layer's products are dense there."""
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
    settings: dict = {"progress": False, "accelerator": "cuda" if card.is_gpu else "cpu"}
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
