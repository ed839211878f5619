"""One training step of the operators, and a whole fit, in four forms: before, the report's fix, batched, and ours.

All four minimise the same loss, the mean over groups of the energy distance (Euclidean, U-statistic) between
moved controls and perturbed cells, and make the same step of the same optimiser.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from cellop_nb.analysis.predict import embed
from cellop_nb.data.contract import Keys
from cellop_nb.data.counts import count_matrix
from cellop_nb.models.energy import moved_energy_distance, self_distance
from cellop_nb.models.operators import Condition, OperatorModel
from cellop_nb.models.vae import NBVAE
from cellop_nb.training.loop import Machine
from cellop_nb.training.operators import OperatorTrainer, new_operators

from .measure import (
    LATENT_COLUMNS,
    compared,
    counts,
    guard_share,
    in_fresh_process,
    interleaved,
    live_share,
    no_compiler,
    product_rate,
)
from .vae import CPU, screen

LATENT = 32
SIZES = {"groups": 16, "cells": 128, "genes": 2_000, "hidden": 512}
QUICK = {"groups": 16, "cells": 64, "genes": 500, "hidden": 128}
TINY = {"groups": 4, "cells": 16, "genes": 60, "hidden": 16}
BEFORE, FIX, OURS, WHOLE = "before", "report's fix", "cellop_nb", "cellop_nb, OperatorTrainer"
BATCHED = "batched torch.cdist"


def problem(groups: int, cells: int, genes: int, hidden: int, *, seed: int = 0) -> SimpleNamespace:
    """VAE, operators, control counts and perturbed latents of one step, groups one after the other."""
    torch.manual_seed(seed)
    vae = NBVAE(genes, n_latent=LATENT, n_hidden=hidden).eval()
    adata = screen(groups * cells, genes, seed=seed)
    names = [f"P{k}" for k in range(max(1, groups // 4))]
    contexts = [f"T{k}" for k in range(-(-groups // len(names)))]
    conditions = [Condition((p,), context=c) for c in contexts for p in names][:groups]
    model = OperatorModel(LATENT, names, contexts)
    model.axis_left.data.normal_(std=0.1)
    x = torch.from_numpy(adata.X.toarray())
    library = x.sum(1).clamp_min(1)
    with torch.no_grad():
        z = vae.encode(x, library).loc
    target, own = z.roll(1, 0) + 0.3 * torch.randn_like(z), [cells] * groups
    return SimpleNamespace(
        vae=vae,
        model=model,
        design=model.conditions.design(conditions),
        x=x,
        library=library,
        latents=z,
        target=target,
        target_self=self_distance(target, own),
        sizes=own,
    )


def dense_energy(moved: Tensor, target: Tensor, sizes: list[int]) -> Tensor:
    """Mean over groups of the energy distance, by autograd through all pairs of cells of the batch."""
    groups, cells = len(sizes), sizes[0]

    def own(a: Tensor, b: Tensor) -> Tensor:
        blocks = torch.cdist(a, b).view(groups, cells, groups, cells)
        return blocks.diagonal(dim1=0, dim2=2).sum((0, 1))

    pairs = cells * (cells - 1)
    cross, within = own(moved, target) / cells**2, own(moved, moved) + own(target, target)
    return (2 * cross - within / pairs).mean()


def loss_before(p: SimpleNamespace) -> Tensor:
    """Encoder with its graph in every step, a copy of the operator for each cell, one dense distance."""
    z = p.vae.encode(p.x, p.library).loc
    matrices, shifts = p.model.affine(p.design)
    per_cell = matrices.repeat_interleave(p.sizes[0], 0)
    moved = (per_cell * z.unsqueeze(1)).sum(-1) + shifts.repeat_interleave(p.sizes[0], 0)
    return dense_energy(moved, p.target, p.sizes)


def loss_fix(p: SimpleNamespace) -> Tensor:
    """The encoder still runs in every step but keeps no graph, and no copy per cell is kept."""
    with torch.no_grad():
        z = p.vae.encode(p.x, p.library).loc
    return dense_energy(p.model(z, p.sizes, *p.model.affine(p.design)), p.target, p.sizes)


def loss_ours(p: SimpleNamespace) -> Tensor:
    """Cached latents, one operator per group, all groups' distances in one call with closed-form gradient.

    The distances within the perturbed cells are a constant, computed before.
    """
    maps = p.model.affine(p.design)
    return moved_energy_distance(p.latents, p.target, p.sizes, p.sizes, *maps, y_self=p.target_self).mean()


def loss_batched(p: SimpleNamespace) -> Tensor:
    """What a good programmer writes: cached latents, pairs within groups alone, the constant term kept; autograd."""
    matrices, shifts = p.model.affine(p.design)
    groups, cells = len(p.sizes), p.sizes[0]
    z, target = (cloud.view(groups, cells, -1) for cloud in (p.latents, p.target))
    moved = torch.baddbmm(shifts.unsqueeze(1), z, matrices.mT)
    within = torch.cdist(moved, moved).sum((1, 2)) / (cells * (cells - 1))
    return (2 * torch.cdist(moved, target).mean((1, 2)) - within - p.target_self).mean()


LOSSES: dict[str, Callable[[SimpleNamespace], Tensor]] = {
    BEFORE: loss_before,
    FIX: loss_fix,
    BATCHED: loss_batched,
    OURS: loss_ours,
}


def stepper(variant: str, p: SimpleNamespace) -> Callable[[], Tensor]:
    """Loss, gradient and one step of the optimiser at each call."""
    optimizer = torch.optim.AdamW(p.model.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        if variant == BEFORE:  # the others send it no gradient
            p.vae.zero_grad()
        loss = LOSSES[variant](p)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


COMPILED = "compiled"
RATIOS = {"ratio": "seconds", "cpu_ratio": "cpu_seconds"}
BETWEEN = {
    "cellop_nb": "an inverse root per pair, the pairs within the moved cells computed twice, and Python "
    "between the calls",
    "cellop_nb, OperatorTrainer": "besides, the draw of the cells, penalties, clipping and guard",
}
FIT = "counts checked and encoded once, operators started from moments, validation, and what the row of a step tells"


def steps(variant: str, sizes: dict, least: float) -> Callable[[], dict[str, int]]:
    """For the fresh process: steps for `least` CPU seconds, after a tenth of that and at least one that warm up.

    The first one reads the libraries' code for these sizes from disk, and makes the optimiser's moments; the next ones
    teach the allocator. What a step takes is what it takes in a training of thousands.
    """
    call = whole_step(sizes) if variant == WHOLE else stepper(variant, problem(**sizes))
    _for_seconds(call, least / 10)
    return lambda: {"steps": _for_seconds(call, least)}


def _for_seconds(call: Callable[[], object], least: float) -> int:
    """How often the call was made until so many CPU seconds were over: once or more."""
    start, made = time.process_time(), 0
    while not made or time.process_time() - start < least:
        call()
        made += 1
    return made


def apart(sizes: dict, rounds: int = 3, least: float = 2.0) -> tuple[dict[str, dict], dict[str, float]]:
    """Seconds of a step and extra memory of each form, medians of processes of its own, one of each form in turn.

    In one process the forms would share what the allocator has learned, and ours teaches it to keep freed memory
    (:func:`cellop_nb.models.host.keep_freed_memory`): the form before would lose its page faults to the measurement.
    """
    taken: dict[str, list[dict]] = {name: [] for name in (*LOSSES, WHOLE)}
    for _ in range(rounds):
        for name, found in taken.items():
            given = {"variant": name, "sizes": sizes, "least": least}
            found.append(in_fresh_process(__name__, "steps", given))

    times, peaks = {}, {}
    for name, found in taken.items():
        of_a_step = {kind: [one[kind] / one["steps"] for one in found] for kind in ("seconds", "cpu_seconds")}
        times[name] = {kind: statistics.median(values) for kind, values in of_a_step.items()}
        if name in LOSSES:
            peaks[name] = statistics.median(one["extra_mb"] for one in found)
    return times, peaks


# -- a whole fit -------------------------------------------------------------------------------------------


def fit_screen(groups: int, cells: int, genes: int) -> AnnData:
    """Counts of a screen with `groups` groups of `cells` training cells, and as many controls per context."""
    perturbations = max(1, groups // 4)
    contexts = -(-groups // perturbations)
    labels = ["control", *(f"P{k}" for k in range(perturbations))]
    size = cells + cells // 4
    adata = screen(contexts * len(labels) * size, genes)
    group: np.ndarray = np.arange(adata.n_obs) // size
    adata.obs["perturbation"] = np.array(labels)[group % len(labels)]
    adata.obs["cell_type"] = np.char.add("T", (group // len(labels)).astype(str))
    adata.obs["split"] = np.where(np.arange(adata.n_obs) % 5 == 0, "val", "train")
    Keys().write(adata)
    return adata


def fit_ours(adata: AnnData, vae: NBVAE, steps: int, callbacks: tuple = ()) -> OperatorTrainer:
    """Encode all cells once, start the operators from moments, and train; all of it counted."""
    embed(adata, vae)
    return _trainer(adata, steps, callbacks)


def _trainer(adata: AnnData, steps: int, callbacks: tuple = (), machine: Machine = CPU) -> OperatorTrainer:
    per_epoch = min(20, steps)
    return OperatorTrainer(
        adata,
        new_operators(adata),
        max_epochs=steps // per_epoch,
        steps_per_epoch=per_epoch,
        progress=False,
        callbacks=callbacks,
        machine=machine,
    )


def fit_rows(sizes: dict, steps: int, counted: int) -> list[dict]:
    """Seconds of a fit of `steps` steps; of the forms without a cache `counted` steps are made and scaled up.

    They read the counts of each step's cells from CSR, as ours does once; their steps all cost the same.
    """
    adata = fit_screen(sizes["groups"], 2 * sizes["cells"], sizes["genes"])
    torch.manual_seed(0)
    vae = NBVAE(list(adata.var_names), n_latent=LATENT, n_hidden=sizes["hidden"]).eval()
    start, cpu = time.perf_counter(), time.process_time()
    fit_ours(adata, vae, steps).fit()
    taken = {OURS: (time.perf_counter() - start, time.process_time() - cpu)}
    p, matrix = problem(**sizes), count_matrix(adata)
    cells, rng = len(p.x), np.random.default_rng(0)
    for name in (BEFORE, FIX):
        call = stepper(name, p)
        call()
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(counted):
            batch = matrix.batch(np.sort(rng.choice(len(matrix), cells, replace=False)))
            p.x, p.library = batch.x, batch.library
            call()
        scale = steps / counted
        taken[name] = scale * (time.perf_counter() - start), scale * (time.process_time() - cpu)
    note = f"{counted} of {steps} steps made, scaled up"
    rows = [
        {"variant": name, "what": f"fit of {steps} steps", "seconds": wall, "cpu_seconds": cpu}
        | {"ratio": wall / taken[OURS][0], "cpu_ratio": cpu / taken[OURS][1]}
        | {"note": None if name == OURS else note}
        for name, (wall, cpu) in taken.items()
    ]
    bound = steps * step_products(sizes["groups"], sizes["cells"])
    rows[0] |= {"bound_seconds": bound, "bound": "products", "distance": taken[OURS][1] / bound}
    return [rows[0] | {"between": FIT}, *rows[1:]]


def compiled_row(sizes: dict, quick: bool) -> dict:
    """The trainer's whole step with ``compile=True``, against the same without, in turn in this process."""
    note = no_compiler(quick=quick)
    row = {"variant": f"{WHOLE}, compiled", "what": "step", "note": note}
    if note is not None:
        return row
    trainer = latent_trainer(sizes, 200, machine=Machine(accelerator="cpu", compile=True))
    calls = {WHOLE: whole_step(sizes), COMPILED: _step_of(trainer)}
    with trainer.compiled():
        times = interleaved(calls, 40)
    row["note"] = "against the same step without, in one process"
    return row | times[COMPILED] | _ratios(times[COMPILED], times[WHOLE])


def _ratios(taken: dict, other: dict) -> dict:
    return {kind: taken[name] / other[name] for kind, name in RATIOS.items()}


def size_rows(sizes: dict, cells: tuple[int, ...], repeats: int) -> list[dict]:
    """A step of ours and of batched torch.cdist, in turn in this process, for groups of several sizes."""
    rows = []
    for size in cells:
        problems = {name: problem(**{**sizes, "cells": size}) for name in (OURS, BATCHED)}
        times = interleaved({name: stepper(name, p) for name, p in problems.items()}, repeats)
        for name, taken in times.items():
            what = {"variant": name, "what": f"step, groups of {size} cells", "note": None}
            rows.append(what | taken | _ratios(taken, times[OURS]))
    return rows


def step_products(groups: int, cells: int) -> float:
    """CPU seconds that the products of the distances of one step take alone: d^2 and gradient, cross and within.

    Each pair within the moved cells counts once for d^2.
    """
    rate = product_rate(cells, LATENT_COLUMNS, cells, groups)
    return groups * cells**2 * 2.0 * LATENT_COLUMNS * 3.5 / rate


def run(quick: bool = False, memory: bool = True) -> list[dict]:
    """Measure the forms.

    Parameters
    ----------
    quick
        A small problem and few steps: seconds instead of minutes.
    memory
        Whether each form is measured in processes of its own, with its peak; else all in turn in this one.

    Returns
    -------
    One row per form and measure: variant, what ("step" or "fit of n steps"), seconds, cpu_seconds (medians of
    steps made in turn), extra_mb (peak of a step above its input, fresh process), extra_share (of that of
    "before"), ratio and cpu_ratio (seconds over those of cellop_nb), bound_seconds and distance
    (CPU seconds of the products alone, and ours over them), note. "OperatorTrainer" is the trainer's
    whole step, with the draw of cells, penalties, guard and clipping, which the others leave out. The
    last rows are the shares of the guard and of the live picture.
    """
    sizes = QUICK if quick else SIZES
    calls: dict[str, Callable[[], object]] = {name: stepper(name, problem(**sizes)) for name in LOSSES}
    calls[WHOLE] = whole_step(sizes)
    if memory:
        times, peaks = apart(sizes, *((1, 0.1) if quick else (5, 2.0)))
    else:
        times, peaks = interleaved(calls, 2 if quick else 15), {}
    rows = []
    for name, taken in times.items():
        row = {"variant": name, "what": "step", "extra_mb": peaks.get(name), "note": None} | taken
        row |= _ratios(taken, times[OURS])
        if name in (OURS, WHOLE):
            products = step_products(sizes["groups"], sizes["cells"])
            calls[name]()  # what is made once and kept is not counted
            made = counts(calls[name])
            row |= compared(taken["cpu_seconds"], products=products, made=made, between=BETWEEN[name])
        if peaks.get(name) is not None and peaks[BEFORE]:
            row["extra_share"] = peaks[name] / peaks[BEFORE]
        rows.append(row)
    rows += size_rows(sizes, (32, 64) if quick else (32, 64, 128, 256, 512), 2 if quick else 60)
    rows += fit_rows(sizes, 40 if quick else 200, 2 if quick else 20)
    trainer = latent_trainer(sizes, 4 if quick else 200)
    rows.append({"variant": "guard", "what": "step"} | guard_share(trainer, 4 if quick else 400))
    rows.append(compiled_row(sizes, quick))
    steps = 4 if quick else 1000
    live = live_share(latent_trainer, sizes, steps)
    return [*rows, {"variant": "live picture", "what": f"fit of {steps} steps"} | live]


def latent_trainer(sizes: dict, steps: int, callbacks: tuple = (), machine: Machine = CPU) -> OperatorTrainer:
    """On random latents: what the operators see of a screen."""
    adata = fit_screen(sizes["groups"], 2 * sizes["cells"], 50)
    latents = np.random.default_rng(0).normal(size=(adata.n_obs, LATENT)) + 1.0 * (
        adata.obs[["perturbation"]].to_numpy() != "control"
    )
    adata.obsm["X_nbvae"] = latents.astype(np.float32)
    trainer = _trainer(adata, steps, callbacks, machine)
    trainer.cells_per_group = sizes["cells"]
    return trainer


def whole_step(sizes: dict) -> Callable[[], object]:
    """The trainer's own step, from the draw of its cells to the guard's last look."""
    return _step_of(latent_trainer(sizes, 200))


def _step_of(trainer: OperatorTrainer) -> Callable[[], object]:
    trainer.model.train()

    def call() -> None:
        trainer._run_step(trainer.groups.sample(trainer.cells_per_group, trainer.cpu_generator))
        trainer.step += 1

    return call
