"""Held-out loss against CPU seconds, by schedule: `python -m benchmarks.schedules [FILE ...] [--out CSV]`.

Each data set is trained with today's defaults, with those of the first edition, and, where scvi-tools is installed, by
SCVI with its own. Files are screens with the columns of ``co.setup``; without any, synthetic ones of three sizes.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import torch

import cellop_nb as co
from cellop_nb.commands.terminal import say
from cellop_nb.training.callbacks import Callback

from .measure import missing

SCHEDULES: dict[str, dict] = {
    "defaults": {},
    "first edition": {"lr": 1e-3, "warmup_epochs": 20, "max_epochs": 100},
}


class _Clock(Callback):
    """CPU seconds at the end of each epoch, its validation included."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def on_epoch_end(self, trainer, row: dict) -> None:
        """Look at the clock."""
        self.taken.append(time.process_time())


def ours(adata, genes, settings: dict, seed: int) -> pd.DataFrame:
    """Validation loss (nats per cell) after each epoch, and the CPU seconds until then."""
    clock, start = _Clock(), time.process_time()
    trainer = co.VAETrainer(
        adata,
        co.new_vae(adata, genes=genes, seed=seed),
        callbacks=[clock],
        progress=False,
        seed=seed,
        **settings,
    )
    loss = trainer.fit()["val_loss"].to_numpy()
    return pd.DataFrame(
        {"epoch": np.arange(1, len(loss) + 1), "val_loss": loss, "cpu_seconds": clock.taken}
    ).assign(cpu_seconds=lambda table: table["cpu_seconds"] - start)


def scvi(adata, genes, seed: int) -> pd.DataFrame:
    """The same of SCVI with its own defaults, on the same genes and cells; only the end is known."""
    import scvi as peer

    peer.settings.seed = seed
    cells = adata[:, genes].copy() if genes is not None else adata.copy()
    rows = [np.flatnonzero(cells.obs["split"] == split) for split in ("train", "val")]
    peer.model.SCVI.setup_anndata(cells)
    model = peer.model.SCVI(cells, gene_likelihood="nb")
    start = time.process_time()
    model.train(
        accelerator="cpu", enable_progress_bar=False, logger=False,
        datasplitter_kwargs={"external_indexing": rows},
    )  # fmt: skip
    end = {"epoch": model.history["elbo_train"].index.max() + 1, "cpu_seconds": time.process_time() - start}
    return pd.DataFrame([end | {"val_loss": abs(float(model.get_elbo(indices=rows[1])))}])


def main(words: list[str] | None = None) -> int:
    """Train, and print the end of each curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*")
    parser.add_argument("--context-key", default="cell_type")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[1_000, 10_000, 30_000], help="synthetic cells"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", help="CSV file of all curves")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    tables = []
    for name in args.data or args.sizes:
        for seed in range(args.seeds):
            if args.data:
                adata = co.datasets.load(name)
            else:
                adata = co.datasets.synthetic(n_perturbations=5, n_cells=name // 24, seed=seed)
            co.setup(adata, context_key=args.context_key)
            co.split(adata, seed=seed)
            genes = co.select_genes(adata, args.genes) if adata.n_vars > args.genes else None
            curves = {label: ours(adata, genes, settings, seed) for label, settings in SCHEDULES.items()}
            note = missing("scvi")
            if note is None:
                curves["SCVI"] = scvi(adata, genes, seed)
            else:
                say(f"SCVI: {note}")
            for label, curve in curves.items():
                tables.append(curve.assign(data=str(name), cells=adata.n_obs, seed=seed, schedule=label))
                end = curve.iloc[-1]
                loss, seconds = curve["val_loss"].min(), end["cpu_seconds"]
                say(
                    f"{name}, {adata.n_obs} cells, seed {seed}, {label}: {loss:.3f} nats in {seconds:.1f} CPU s"
                )
    if args.out:
        pd.concat(tables).round(4).to_csv(args.out, index=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
