"""A VAE step, an operator step, a prediction and the smallest hold-out as calls: `steps`, to be counted or profiled."""

from dataclasses import replace

import cellop_nb as co
from benchmarks.vae import trainer_step

adata = co.datasets.load("synthetic_screen")
co.split(adata)
vae = co.new_vae(adata, n_latent=8)
vae_step = trainer_step(co.VAETrainer(adata, vae, max_epochs=1, progress=False, batch_size=256))
co.embed(adata, vae)
operators = co.new_operators(adata)
operator_step = trainer_step(co.OperatorTrainer(adata, operators, max_epochs=1, progress=False))


screen = co.datasets.synthetic(n_contexts=2, n_perturbations=1, n_cells=24, n_genes=30)


def small_model() -> co.CellOp:
    """Two contexts of 24 cells a group, and as little training as there can be."""
    model = co.CellOp(screen, n_latent=4, n_genes=None)
    model.recipe = replace(model.recipe, n_hidden=8, vae_epochs=1, finish_epochs=1, operator_epochs=1)
    return model


fitted = small_model().fit(progress=False)
steps = {
    "one VAE step": vae_step,
    "one operator step": operator_step,
    "predict": lambda: fitted.predict(context="type B", perturbation="drug 1"),
    "smallest hold-out": lambda: co.holdout(
        small_model(), "context", only=["type B"], metrics=["e_distance"], progress=False
    ),
}
