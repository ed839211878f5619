"""The whole job on one screen: VAE and operators to convergence, and every condition predicted."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path

from anndata import AnnData

from cellop_nb.analysis.predict import Start, assemble, embed, modelled_counts
from cellop_nb.data.contract import keys_of, setup
from cellop_nb.data.datasets import load
from cellop_nb.data.genes import select_genes
from cellop_nb.data.splits import split
from cellop_nb.training.callbacks import EarlyStopping
from cellop_nb.training.operators import OperatorTrainer, new_operators
from cellop_nb.training.vae import VAETrainer, new_vae

from . import vae
from .measure import Counts, compared, counts, product_rate
from .operators import BETWEEN as operators_between
from .operators import WHOLE, step_products

KANG = "kang18_pbmc_ifnb.h5ad"
GENES, LATENT, HIDDEN, BATCH, CELLS = 1_000, 32, 128, 128, 128
VAE, ENCODE, OPERATORS, PREDICT = "VAE", "encode all cells", "operators", "predict all conditions"
BETWEEN = {
    VAE: f"{vae.BETWEEN}; validation each epoch",
    ENCODE: "counts checked and copied",
    OPERATORS: f"{operators_between[WHOLE]}; validation each epoch",
    PREDICT: "sampled counts, checks and AnnData objects: the decoder's products are the smaller part",
}


def screen(quick: bool) -> tuple[AnnData, str]:
    """The screen of Kang et al. where ``CELLOP_REAL_DATA`` has it, else the synthetic example; and its name."""
    path = Path(os.environ.get("CELLOP_REAL_DATA", "")) / KANG
    real = path.is_file() and not quick
    adata = load(path) if real else load()
    setup(adata)
    split(adata)
    train = adata[adata.obs["split"] != "test"]
    genes = select_genes(train, 100 if quick else GENES, flavor="seurat", min_cells=10, split=None)
    adata = adata[:, genes].copy()
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
    One row per stage: variant, what, data, stage_seconds (wall), cpu_seconds, epochs, steps and best_epoch of a
    training (to convergence: until 20 epochs bring nothing, or 120 are over), bound_seconds and distance, note.
    """
    adata, name = screen(quick)
    settings = {"progress": False, "machine": vae.CPU, "max_epochs": 2 if quick else 120}
    model = new_vae(adata, n_latent=LATENT, n_hidden=HIDDEN)

    def vae_trainer(model, callbacks=()) -> VAETrainer:
        return VAETrainer(adata, model, batch_size=BATCH, callbacks=callbacks, **settings)

    def operator_trainer(model) -> OperatorTrainer:
        return OperatorTrainer(
            adata, model, cells_per_group=CELLS, **settings | {"max_epochs": 2 if quick else 30}
        )

    made = counts(vae.trainer_step(vae_trainer(copy.deepcopy(model))))
    first = vae_trainer(model, [EarlyStopping(patience=20)])
    _, taken = _timed(first.fit)
    rows = [_trained(VAE, first, taken, made, vae.step_bounds(HIDDEN, BATCH, adata.n_vars))]
    rows.append(_made(ENCODE, lambda: embed(adata, model)))
    operators = new_operators(adata)
    made = counts(vae.trainer_step(operator_trainer(copy.deepcopy(operators))))
    second = operator_trainer(operators)
    _, taken = _timed(second.fit)
    products = step_products(len(second.groups), CELLS)
    rows.append(_trained(OPERATORS, second, taken, made, {"products": products}))
    rows.append(_made(PREDICT, lambda: predict_all(adata, model, operators, second)))
    rows[-1]["conditions"] = len(second.groups)
    both = {key: rows[0][key] + rows[2][key] for key in ("stage_seconds", "cpu_seconds", "bound_seconds")}
    both |= {"bound": "products", "distance": both["cpu_seconds"] / both["bound_seconds"]}
    rows.append({"what": "VAE and operators", "between": "what the two rows tell"} | both)
    common = {"variant": "cellop_nb", "data": f"{name}, {adata.n_obs:,} cells, {adata.n_vars:,} genes"}
    return [common | {"note": None} | row for row in rows]


def _trained(what: str, trainer, taken: dict, made: Counts, limits: dict[str, float]) -> dict:
    whole = {kind: trainer.step * seconds for kind, seconds in limits.items()}
    whole |= {"made": made.times(trainer.step), "between": BETWEEN[what]}
    row = {"what": what, "epochs": len(trainer.rows), "steps": trainer.step, "best_epoch": trainer.best_epoch}
    return row | taken | compared(taken["cpu_seconds"], **whole)


def _made(what: str, call: Callable[[], object]) -> dict:
    """A stage without training: its counted products are its bound."""
    _, taken = _timed(call)
    made = counts(call)
    products = max(made.operations, 1) / product_rate(BATCH, HIDDEN, GENES)
    return (
        {"what": what}
        | taken
        | compared(taken["cpu_seconds"], products=products, made=made, between=BETWEEN[what])
    )


def predict_all(adata: AnnData, vae, operators, trainer: OperatorTrainer) -> None:
    """Predict every condition that the trainer has."""
    keys = keys_of(adata)
    for group in trainer.groups.items:
        rows = trainer.groups.controls(group.context)
        start = Start.of(modelled_counts(adata[rows], vae, keys), vae)
        condition = group.condition(operators.conditions.perturbations)
        drawn = start.moved(operators.operator(condition))
        assemble(adata[rows], keys, vae.genes, drawn, group.perturbation)
