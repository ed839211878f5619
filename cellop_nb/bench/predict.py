"""The whole job on one screen: VAE and operators to convergence, and every condition predicted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from anndata import AnnData

from ..analysis.predict import embed, predict
from ..analysis.space import variable_genes
from ..data.catalogue import load
from ..data.splits import split
from ..training.callbacks import EarlyStopping
from ..training.operators import OperatorTrainer, new_operators
from ..training.vae import VAETrainer, new_vae
from .limits import compared
from .operator import step_products
from .vae import step_bounds

KANG = "kang18_pbmc_ifnb.h5ad"
GENES, LATENT, HIDDEN, BATCH, CELLS = 1_000, 32, 128, 128, 128
BETWEEN = {
    "VAE to convergence": "the sparse first layer, exponentials and logarithms, and about 400 calls a step at batch 128",
    "operators to convergence": "narrow products, inverse roots, and about 250 calls a step; validation each epoch",
    "predict all conditions": "sampled counts and AnnData objects; the decoder's products are the smaller part",
}


def screen(quick: bool) -> tuple[AnnData, str]:
    """The screen of Kang et al. where ``CELLOP_REAL_DATA`` has it, else the synthetic example; and its name."""
    path = Path(os.environ.get("CELLOP_REAL_DATA", "")) / KANG
    real = path.is_file() and not quick
    adata = load(path) if real else load()
    split(adata)
    train = adata[adata.obs["split"] != "test"]
    adata = adata[:, variable_genes(train, 100 if quick else GENES)].copy()
    return adata, "Kang" if real else "synthetic example"


def _timed(call: Callable[[], object]) -> tuple[object, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, {"stage_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def run(quick: bool = False) -> list[dict]:
    """Time the stages of one job, each once.

    Parameters
    ----------
    quick
        The example screen and two epochs: whether it runs.

    Returns
    -------
    One row per stage: variant, what, data, stage_seconds (wall), cpu_seconds, epochs and steps of a training,
    bound_seconds and distance, note.
    """
    adata, name = screen(quick)
    settings = {"progress": False, "accelerator": "cpu", "max_epochs": 2 if quick else 120}
    vae = new_vae(adata, n_latent=LATENT, n_hidden=HIDDEN)
    stop = EarlyStopping(patience=20)
    first = VAETrainer(adata, vae, batch_size=BATCH, callbacks=[stop], **settings)
    _, taken = _timed(first.fit)
    limits = step_bounds(HIDDEN, BATCH, adata.n_vars)
    stages = [_trained("VAE to convergence", first, taken, limits)]
    _, taken = _timed(lambda: embed(adata, vae))
    stages.append(("encode all cells", taken, {}))
    operators = new_operators(adata)
    second = OperatorTrainer(
        adata, operators, cells_per_group=CELLS, **settings | {"max_epochs": 2 if quick else 30}
    )
    _, taken = _timed(second.fit)
    limits = {"products": step_products(len(second.groups), CELLS)}
    stages.append(_trained("operators to convergence", second, taken, limits))
    _, taken = _timed(lambda: _predict_all(adata, vae, operators, second))
    made = {"conditions": len(second.groups)}
    stages.append(("predict all conditions", taken, made))
    both = [taken for what, taken, _ in stages if "convergence" in what]
    stages.append(("VAE and operators", {key: sum(part[key] for part in both) for key in both[0]}, {}))
    common = {"variant": "cellop_nb", "data": f"{name}, {adata.n_obs:,} cells, {adata.n_vars:,} genes"}
    return [common | {"what": what, "note": None} | taken | more for what, taken, more in stages]


def _trained(what: str, trainer, taken: dict, limits: dict[str, float]) -> tuple[str, dict, dict]:
    whole = {kind: trainer.step * seconds for kind, seconds in limits.items()}
    made = {"epochs": len(trainer.rows), "steps": trainer.step, "best_epoch": trainer.best_epoch}
    return what, taken, made | compared(taken["cpu_seconds"], between=BETWEEN[what], **whole)


def _predict_all(adata: AnnData, vae, operators, trainer: OperatorTrainer) -> None:
    for group in trainer.groups.items:
        predict(adata, vae, operators, perturbation=group.perturbation, context=group.context)
