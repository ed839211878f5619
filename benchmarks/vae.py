"""Training the VAE: cells per second of ours and of scvi-tools' SCVI, on the same counts and sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from anndata import AnnData
from scipy import sparse

from cellop_nb.data.contract import Keys
from cellop_nb.training.callbacks import Callback
from cellop_nb.training.loop import Machine, Trainer
from cellop_nb.training.vae import VAETrainer, new_vae

from .measure import (
    bandwidth,
    compared,
    counts,
    guard_share,
    in_fresh_process,
    live_share,
    missing,
    no_compiler,
    product_rate,
)

LATENT = 32
CPU = Machine(accelerator="cpu")
SIZES = ((128, 128), (128, 512), (512, 512))  # hidden, batch
PEER, BFLOAT, COMPILED = "scvi-tools SCVI", "cellop_nb, bf16-mixed", "cellop_nb, compiled"
BETWEEN = (
    "the sparse first layer, a dozen passes over (cell, gene) for softmax, likelihood and gradient, and Python "
    "between the calls, which weighs more the smaller the batch"
)


def screen(n_cells: int = 20_000, n_genes: int = 2_000, *, nonzero: float = 0.10, seed: int = 0) -> AnnData:
    """Counts (cell, gene) with about the share `nonzero` of non-zeros, every tenth cell for validation.

    Genes differ in their mean by orders of magnitude, cells in their library size, as in a screen.
    """
    rng = np.random.default_rng(seed)
    level = rng.gamma(0.5, 1.0, n_genes) + 0.01
    depth = rng.gamma(4.0, 0.25, (n_cells, 1))
    low, high = 0.0, 10.0
    sample = depth[:500]
    for _ in range(30):  # the overall level that gives the wanted share
        middle = (low + high) / 2
        share = 1 - np.exp(-sample * (level * middle)).mean()
        low, high = (middle, high) if share < nonzero else (low, middle)
    blocks = [sparse.csr_matrix(rng.poisson(part * (level * low)).astype(np.float32))  # type: ignore[attr-defined]
              for part in np.array_split(depth, max(1, n_cells // 2_000))]  # fmt: skip
    adata = AnnData(sparse.vstack(blocks, format="csr"))
    adata.obs["split"] = np.where(np.arange(n_cells) % 10 == 0, "val", "train")
    adata.obs["perturbation"] = np.where(np.arange(n_cells) % 2, "drug 1", "control")
    Keys(context_key=None).write(adata)  # as setup does, which would refuse cells without counts
    return adata


class _Clock(Callback):
    """Wall and CPU seconds of each epoch without its validation."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, float]] = []

    def on_fit_start(self, trainer) -> None:
        """Start."""
        self._cpu = time.process_time()

    def on_step_end(self, trainer) -> None:
        """Remember the end of the last step."""
        self._last = time.process_time()

    def on_epoch_end(self, trainer, row: dict) -> None:
        """Keep the epoch."""
        self.taken.append((row["seconds"], self._last - self._cpu))
        self._cpu = time.process_time()


def ours(
    adata: AnnData, hidden: int, batch: int, machine: Machine = CPU
) -> Callable[[], tuple[float, float]]:
    """One more epoch at each call; returns its wall and CPU seconds."""
    clock = _Clock()
    model = new_vae(adata, n_latent=LATENT, n_hidden=hidden)
    settings = {"progress": False, "callbacks": [clock]}
    trainer = VAETrainer(adata, model, batch_size=batch, machine=machine, **settings)

    def epoch() -> tuple[float, float]:
        trainer.fit(trainer.epoch + 1)
        return clock.taken[-1]

    return epoch


def step(adata: AnnData, hidden: int, batch: int) -> Callable[[], object]:
    """One step of ours, after one that warms up."""
    model = new_vae(adata, n_latent=LATENT, n_hidden=hidden)
    return trainer_step(VAETrainer(adata, model, batch_size=batch, progress=False, machine=CPU))


def trainer_step(trainer: Trainer) -> Callable[[], object]:
    """A trainer's step on one batch, after one that warms up."""
    batch = next(iter(trainer.batches()))
    trainer.model.train()
    trainer._run_step(batch)
    return lambda: trainer._run_step(batch)


def _peer_model(adata: AnnData, hidden: int):
    import logging
    import warnings

    import scvi

    for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    copy = AnnData(adata.X, obs=adata.obs)  # the peer adds columns of its own
    scvi.model.SCVI.setup_anndata(copy)
    return scvi.model.SCVI(copy, n_layers=1, n_latent=LATENT, n_hidden=hidden, gene_likelihood="nb")


def _peer_train(model, adata: AnnData, batch: int, epochs: int, callbacks: list) -> None:
    rows = {split: np.flatnonzero(adata.obs["split"] == split) for split in ("train", "val")}
    model.train(
        max_epochs=epochs,
        batch_size=batch,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        logger=False,
        datasplitter_kwargs={"external_indexing": [rows["train"], rows["val"]]},
        plan_kwargs={"lr": 1e-3, "n_epochs_kl_warmup": 20},
    )


def peer(adata: AnnData, hidden: int, batch: int) -> Callable[[], tuple[float, float]]:
    """The same for SCVI: one layer, negative binomial, the same latent size and split."""
    import lightning.pytorch as pl

    class Clock(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            self.begin = time.perf_counter(), time.process_time()

        def on_train_epoch_end(self, trainer, module):
            self.taken = time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]

    model, clock = _peer_model(adata, hidden), Clock()

    def epoch() -> tuple[float, float]:
        _peer_train(model, adata, batch, 1, [clock])
        return clock.taken

    return epoch


VARIANTS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "cellop_nb": (ours, ()),
    BFLOAT: (partial(ours, machine=Machine(accelerator="cpu", precision="bf16-mixed")), ()),
    COMPILED: (partial(ours, machine=Machine(accelerator="cpu", compile=True)), ()),
    PEER: (peer, ("scvi",)),
}


def epoch(variant: str, hidden: int, batch: int, n_cells: int) -> Callable[[], object]:
    """For the fresh process: one epoch, after one on a few cells."""
    make = VARIANTS[variant][0]
    make(screen(max(batch, 50)), hidden, batch)()
    return make(screen(n_cells), hidden, batch)


def step_bounds(hidden: int, batch: int, n_genes: int) -> dict[str, float]:
    """CPU seconds of one step that the decoder's three dense products, and the traffic with memory, take alone.

    Traffic: the (cell, gene) array is written and read by the products and by the likelihood; each weight is
    read for value and gradient, and passed over by the optimiser with its gradient and two moments.
    """
    operations = 3 * 2.0 * batch * n_genes * (hidden + LATENT)
    weights, entries = n_genes * (2 * hidden + 2 * LATENT), batch * n_genes
    return {
        "products": operations / product_rate(batch, hidden, n_genes),
        "memory": 4.0 * (10 * weights + 5 * entries) / bandwidth(),
    }


def validation(
    adata: AnnData, epochs: int, *, hidden: int = 128, batch: int = 128, peers: bool = True
) -> list[dict]:
    """Negative ELBO of the validation cells, nats per cell, after the same number of epochs."""
    model = new_vae(adata, n_latent=LATENT, n_hidden=hidden)
    settings = {"batch_size": batch, "progress": False, "machine": CPU}
    history = VAETrainer(adata, model, max_epochs=epochs, **settings).fit()
    common = {"hidden": hidden, "batch": batch, "epochs": epochs}
    best = float(history["val_loss"].min())
    rows = [{"variant": "cellop_nb", "negative_elbo": best, "note": None} | common]
    note, value = missing("scvi", wanted=peers), None
    if note is None:
        model = _peer_model(adata, hidden)
        _peer_train(model, adata, batch, epochs, [])
        held = np.flatnonzero(adata.obs["split"] == "val")
        value = abs(float(model.get_elbo(indices=held)))
    return [*rows, {"variant": PEER, "negative_elbo": value, "note": note} | common]


def run(quick: bool = False, memory: bool = True, peers: bool = True) -> list[dict]:
    """Measure all sizes.

    Parameters
    ----------
    quick
        Few cells and epochs: seconds instead of minutes.
    memory
        Whether peaks are taken too, in fresh processes.
    peers
        Whether the optional peers are measured, where they are installed.

    Returns
    -------
    One row per variant and size: variant, hidden, batch, cells_per_s, cells_per_cpu_s (medians over epochs,
    taken in turn), extra_mb (peak of an epoch, fresh process), ratio and cpu_ratio (of cellop_nb over the
    variant), bound_cells_per_cpu_s and distance (of ours from it), note. Rows with negative_elbo compare the fit,
    and the last ones give the share of a step that the guard and the live picture take.
    """
    n_cells = 2_400 if quick else 20_000
    adata = screen(n_cells)
    rows = []
    for hidden, batch in SIZES[::2] if quick else SIZES:
        rows += _speed(adata, hidden, batch, rounds=1 if quick else 3, memory=memory, peers=peers)
    rows += validation(adata, 2 if quick else 10, peers=peers)
    return rows + _shares(adata, quick)


def _speed(adata: AnnData, hidden: int, batch: int, *, rounds: int, memory: bool, peers: bool) -> list[dict]:
    absent = {name: missing(*needs, wanted=peers) for name, (_, needs) in VARIANTS.items()}
    absent[COMPILED] = no_compiler(quick=rounds == 1)
    calls = {name: VARIANTS[name][0](adata, hidden, batch) for name, note in absent.items() if note is None}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):  # the first one warms up
        for name, call in calls.items():
            seconds = call()
            if turn:
                taken[name].append(seconds)
    cells = int((adata.obs["split"] == "train").sum())
    rate = {name: _rates(cells, seconds) for name, seconds in taken.items()}
    limits = step_bounds(hidden, batch, adata.n_vars)
    rows = []
    for name, note in absent.items():
        row = {"variant": name, "hidden": hidden, "batch": batch, "note": note}
        if note is None:
            row |= rate[name]
            if memory and name != COMPILED:
                given = {"variant": name, "hidden": hidden, "batch": batch, "n_cells": adata.n_obs}
                row["extra_mb"] = in_fresh_process(__name__, "epoch", given)["extra_mb"]
            if name == "cellop_nb":
                made = counts(step(adata, hidden, batch))
                near = compared(batch / rate[name]["cells_per_cpu_s"], made=made, between=BETWEEN, **limits)
                row |= {"bound_cells_per_cpu_s": batch / near.pop("bound_seconds")} | near
            row["ratio"] = rate["cellop_nb"]["cells_per_s"] / rate[name]["cells_per_s"]
            row["cpu_ratio"] = rate["cellop_nb"]["cells_per_cpu_s"] / rate[name]["cells_per_cpu_s"]
        rows.append(row)
    return rows


def _rates(cells: int, taken: list[tuple[float, float]]) -> dict[str, float]:
    wall, cpu = (statistics.median(part) for part in zip(*taken, strict=True))
    return {"cells_per_s": cells / wall, "cells_per_cpu_s": cells / cpu}


def _shares(adata: AnnData, quick: bool) -> list[dict]:
    def trainer(batch: int, callbacks: tuple = ()) -> VAETrainer:
        model = new_vae(adata, n_latent=LATENT, n_hidden=128)
        settings = {"progress": False, "machine": CPU, "callbacks": callbacks}
        return VAETrainer(adata, model, batch_size=batch, max_epochs=1 if quick else 5, **settings)

    rows = [
        {"variant": "guard", "hidden": 128, "batch": batch} | guard_share(trainer(batch), 4 if quick else 200)
        for batch in (128, 512)
    ]
    return [*rows, {"variant": "live picture", "hidden": 128, "batch": 128} | live_share(trainer, 128)]
