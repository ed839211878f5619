"""A VAE step, an operator step, a prediction and the smallest hold-out as calls: `steps`, to be counted or profiled."""

import cellop_nb as co
from benchmarks.vae import trainer_step
from cellop_nb.analysis.transfer import Complexity

adata = co.datasets.load("synthetic_screen")
co.split(adata)
vae = co.new_vae(adata, n_latent=8)
vae_step = trainer_step(co.VAETrainer(adata, vae, max_epochs=1, progress=False, batch_size=256))
co.embed(adata, vae)
operators = co.new_operators(adata)
operator_step = trainer_step(co.OperatorTrainer(adata, operators, max_epochs=1, progress=False))
small = co.datasets.synthetic(n_contexts=2, n_perturbations=1, n_cells=24, n_genes=30)


def smallest_holdout():
    """One group of 24 cells, predicted by operators that were trained for one epoch."""
    return co.holdout(
        small,
        heldout={"cell_type": "type B", "perturbation": "drug 1"},
        vae={"n_latent": 4, "n_hidden": 8},
        candidates=[Complexity(rank=0)],
        training={"max_epochs": 1},
        progress=False,
        metrics=["e_distance"],
    )


steps = {
    "one VAE step": vae_step,
    "one operator step": operator_step,
    "predict": lambda: co.predict(adata, vae, operators, perturbation="drug 1", context="type A"),
    "smallest hold-out": smallest_holdout,
}
