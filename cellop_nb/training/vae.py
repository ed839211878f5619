"""Training of the VAE on raw counts."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from ..data.contract import keys_of
from ..data.counts import (
    TOTAL_KEY,
    CountBatch,
    CountLoader,
    CountMatrix,
    ResidentBatch,
    covariate_categories,
    has_other_genes,
    model_counts,
    resident,
)
from ..data.splits import rows_of
from ..errors import checked
from ..models.likelihood import SparseCounts
from ..models.vae import NBVAE, elbo_loss, moment_dispersion
from .callbacks import Callback
from .checkpoint import digest
from .loop import Machine, Trainer

EPOCHS, MOST_VISITS = 32, 1_000_000
"""Length of a training for which none is said: epochs, and cells that it looks at in all."""


@checked
def new_vae(
    adata,
    *,
    genes: Sequence[str] | None = None,
    covariate_keys: Sequence[str] | None = None,
    total_key: str | None = TOTAL_KEY,
    n_latent: int = 32,
    n_hidden: int = 128,
    n_layers: int = 1,
    dropout: float = 0.0,
    encode_covariates: bool = False,
    seed: int = 0,
) -> NBVAE:
    """A VAE for the genes of `adata`, its decoder started at the training cells' gene means and dispersions.

    Parameters
    ----------
    adata
        A screen that was set up and split (:func:`cellop_nb.setup`, :func:`cellop_nb.split`).
    genes
        Names of the genes to model (:func:`cellop_nb.select_genes`), all where None: for data on disk,
        whose columns cannot be cut.
    covariate_keys
        Columns of ``obs`` (batch, donor, tissue) that the decoder is told; the batches that the screen was set up with
        where None.
    total_key
        Column of ``obs`` with each cell's counts over all measured genes, as scanpy's ``calculate_qc_metrics``
        writes it; the genes that `adata` no longer has are then modelled as one column (:class:`NBVAE`). The
        default column is used where it is there and says that genes were left out.
    n_latent, n_hidden, n_layers, dropout, encode_covariates
        As in :class:`NBVAE`.
    seed
        Seeds the initial weights.

    Returns
    -------
    NBVAE, untrained.

    Raises
    ------
    LabelError
        If the data were not set up, a covariate, the column of totals or the split is missing, or a size is not known.
    DataError
        If the layer is missing, or the totals are smaller than the counts.
    ModelError
        For a size that cannot be.
    """
    keys = keys_of(adata)
    if covariate_keys is None:
        covariate_keys = () if keys.batch_key is None else (keys.batch_key,)
    covariates = covariate_categories(adata, covariate_keys)
    fewer = genes is not None and TOTAL_KEY in adata.obs
    has_others = total_key != TOTAL_KEY or fewer or has_other_genes(adata)
    total = total_key if has_others else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        names = list(adata.var_names) if genes is None else [str(gene) for gene in genes]
        vae = NBVAE(
            names, n_latent=n_latent, n_hidden=n_hidden, n_layers=n_layers, covariates=covariates,
            encode_covariates=encode_covariates, dropout=dropout, total_key=total,
        )  # fmt: skip
    matrix, rows = model_counts(adata, vae), rows_of(adata, "train")
    totals, gene_mean, variance = _moments(matrix, rows)
    # Differences in library size are the model's own, not over-dispersion.
    explained = gene_mean**2 * (totals.var() / totals.mean() ** 2)
    dispersion = moment_dispersion(torch.as_tensor(gene_mean), torch.as_tensor(variance - explained))
    return vae.start_from(torch.as_tensor(gene_mean / totals.mean()).float(), dispersion.float())


def _moments(matrix: CountMatrix, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Totals (cell,) of the cells `rows`, and mean and variance (gene,) of their counts, in float64."""
    totals, sums, squares = [], np.zeros(()), np.zeros(())
    for _, part in matrix.blocks(rows):
        values = part.data.astype(np.float64)
        totals.append(np.asarray(part.sum(1, dtype=np.float64)).ravel())
        sums = sums + np.bincount(part.indices, values, part.shape[1])
        squares = squares + np.bincount(part.indices, np.square(values, out=values), part.shape[1])
    mean = sums / len(rows)
    return np.concatenate(totals), mean, squares / len(rows) - mean**2


class VAETrainer(Trainer):
    """Fits an :class:`NBVAE` to the training cells' counts, watched on the validation cells.

    Parameters
    ----------
    adata
        A screen that was set up and split; test cells are never read.
    model
        The VAE; see :func:`new_vae`.
    batch_size
        Cells per step, of all processes together.
    kl_weight, warmup_epochs
        Final weight of the divergence and the epochs over which it grows from zero.
    max_epochs, lr
        Length and base learning rate. The length is 32 epochs where None, of many training cells as many (at least two)
        as look at a million cells in all. The defaults reach the held-out loss of three times as many epochs at a quarter
        of the rate (``benchmarks/schedules.py``).
    weight_decay, clip_norm, callbacks, folder, on_nonfinite, progress, seed, machine
        As in :class:`~cellop_nb.training.loop.Trainer`.

    Raises
    ------
    DataError
        If the counts are missing, are no raw counts, or are of other genes than the model's.
    LabelError
        If ``obs["split"]`` or a covariate is missing, or a category is unknown to the model, or a setting is
        not known.
    ModelError
        For the value of a setting that cannot be.
    """

    unit = "VAE"
    recordable = True
    model: NBVAE
    compilable = ("encoder.after_genes", "decoder.forward")

    @checked
    def __init__(
        self,
        adata,
        model: NBVAE,
        *,
        batch_size: int = 128,
        kl_weight: float = 1.0,
        warmup_epochs: int = 5,
        max_epochs: int | None = None,
        lr: float = 4e-3,
        weight_decay: float = 0.0,
        clip_norm: float = 10.0,
        callbacks: Sequence[Callback] = (),
        folder: str | Path | None = None,
        on_nonfinite: str = "stop",
        progress: bool = True,
        seed: int = 0,
        machine: Machine = Machine(),  # noqa: B008 (frozen)
    ):
        rows = {split: rows_of(adata, split) for split in ("train", "val")}
        if max_epochs is None:
            max_epochs = min(EPOCHS, max(2, MOST_VISITS // len(rows["train"])))
        super().__init__(
            model, max_epochs=max_epochs, lr=lr, weight_decay=weight_decay, clip_norm=clip_norm,
            callbacks=callbacks, folder=folder, on_nonfinite=on_nonfinite, progress=progress, seed=seed,
            machine=machine,
        )  # fmt: skip
        self.weights = {"kl_weight": kl_weight}
        self.warmup_epochs = warmup_epochs
        self.cells, self.genes = np.asarray(adata.obs_names), model.columns
        matrix = model_counts(adata, model)
        held = resident(matrix, self.fabric.device)
        device = self.fabric.device
        self.loader = CountLoader(
            held, rows["train"], batch_size=batch_size, generator=self.cpu_generator, device=device,
            share=(self.processes.rank, self.processes.size),
        )  # fmt: skip
        self.validation = CountLoader(held, rows["val"], batch_size=512, shuffle=False, device=device)
        self.parameters |= {
            "batch_size": int(batch_size), "kl_weight": float(kl_weight), "warmup_epochs": int(warmup_epochs),
        }  # fmt: skip
        constant, content = _constants(matrix, np.concatenate(list(rows.values())))
        self.made_from |= {
            "batch_size": int(batch_size),
            "split": {split: torch.as_tensor(which) for split, which in rows.items()},
            "counts": content,
        }
        self._constant = constant.to(device)

    def batches(self) -> CountLoader:
        return self.loader

    def steps_per_epoch(self) -> int:
        return len(self.loader)

    def batch_size_of(self, batch: CountBatch) -> int:
        return len(batch)

    @property
    def kl_weight(self) -> float:
        """Weight of the divergence in this epoch."""
        share = min(1.0, (self.epoch + 1) / self.warmup_epochs) if self.warmup_epochs else 1.0
        return self.weights["kl_weight"] * share

    def weights_now(self) -> dict[str, float]:
        return {"kl_weight": self.kl_weight}

    def loss_terms(self, batch: CountBatch | ResidentBatch) -> dict[str, Tensor]:
        terms = elbo_loss(*self._forward(batch, self.generator), self.in_force["kl_weight"])
        return self.processes.weighted(terms, len(batch), self.loader.joint_size)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Negative ELBO of the validation cells, in nats per cell, with the full divergence and fixed noise."""
        generator = torch.Generator(device=self.fabric.device).manual_seed(self.seed)
        sums: dict[str, Any] = {}
        cells = 0
        for batch in self.validation:
            size = self.batch_size_of(batch)
            for name, term in elbo_loss(*self._forward(batch, generator), self.weights["kl_weight"]).items():
                sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + float(term) * size
            cells += size
        means = {name: total / cells for name, total in sums.items()}
        return {"val_loss": sum(means.values()), **means}

    def _forward(
        self, batch: CountBatch | ResidentBatch, generator: torch.Generator
    ) -> tuple[Tensor, Normal]:
        """Log-likelihood and posterior of the cells of the batch."""
        if isinstance(batch, ResidentBatch):  # with one cell more, which holds the rest of the room
            value, posterior = self._forward(batch.padded(), generator)
            real = slice(len(batch))
            return value[real], Normal(posterior.loc[real], posterior.scale[real], validate_args=False)
        counts = SparseCounts.of(batch, self._constant.index_select(0, batch.index))
        return self.module(counts, batch.library, batch.covariates, generator=generator)

    def shape_of(self, batch: CountBatch | ResidentBatch) -> Hashable | None:
        return (len(batch), batch.room) if isinstance(batch, ResidentBatch) else None

    def inputs_of(self, batch: ResidentBatch) -> dict[str, Tensor]:
        return {"index": batch.index}

    def with_inputs(self, batch: ResidentBatch, inputs: dict[str, Tensor]) -> ResidentBatch:
        return replace(batch, index=inputs["index"])

    def describe_batch(self, batch: CountBatch | ResidentBatch) -> dict[str, list[str]]:
        return {"cells": self.cells[batch.index.cpu().numpy()].tolist(), "genes": self.genes}


def _constants(matrix: CountMatrix, rows: np.ndarray) -> tuple[Tensor, str]:
    """(cell,) part of each cell's log-likelihood that no parameter enters, 0 for cells not in `rows`; and a
    fingerprint of what the numbers of a training depend on: counts, library sizes and covariates of `rows`."""
    constant, rows = torch.zeros(len(matrix)), np.sort(rows)
    lengths, columns, values = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for block, counts in matrix.blocks(rows):
        lengths.update(np.diff(counts.indptr).astype(np.int64))
        columns.update(counts.indices.astype(np.int64))
        values.update(counts.data.astype(np.float32))
        for start in range(0, len(block), 4096):
            csr = counts[start : start + 4096]
            indices = (torch.from_numpy(part.astype(np.int64)) for part in (csr.indptr, csr.indices))
            part = SparseCounts(csr.shape, *indices, torch.from_numpy(csr.data))  # type: ignore[call-arg]
            constant[block[start : start + 4096]] = part.constant
    beside = {"library": matrix.library, **matrix.covariates}
    digests = [one.hexdigest() for one in (lengths, columns, values)]
    digests += [f"{name} {digest(whole[torch.from_numpy(rows)])}" for name, whole in beside.items()]
    return constant, hashlib.sha256("; ".join(digests).encode()).hexdigest()[:16]
