"""Small files of predictions, of the form that other packages write them: planted, so that their scores are known."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

import cellop_nb


def screen() -> ad.AnnData:
    """Three contexts with two drugs, under the column names of a user."""
    adata = cellop_nb.datasets.synthetic(n_contexts=3, n_perturbations=2, n_cells=40, n_genes=40)
    adata.obs["condition"] = adata.obs.pop("perturbation").astype(str).replace({"control": "ctrl"})
    adata.obs["celltype"] = adata.obs.pop("cell_type")
    del adata.uns["cellop_nb"]
    return adata


def log_normalised(adata: ad.AnnData, target: float = 1e4) -> np.ndarray:
    """log1p of expression normalised to a sum over the genes of `adata`, (cell, gene)."""
    counts = np.asarray(adata.X.toarray(), dtype=np.float64)
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * target).astype(np.float32)


def write(folder: Path) -> None:
    """A file for each package; "drug 1" in "type C" is the real cells, but for what the package does to them."""
    real = screen()
    real.write_h5ad(folder / "screen.h5ad")
    here = (real.obs["celltype"] == "type C").to_numpy()
    cells = real[here & (real.obs["condition"] == "drug 1").to_numpy()]
    kept = cells.obs.assign(condition="ctrl")  # as scGen: the labels of the control cells
    logs = log_normalised(cells)
    logs[0, 0] = -0.05  # a linear decoder
    ad.AnnData(logs, obs=kept, var=cells.var).write_h5ad(folder / "scgen.h5ad")

    cpa = ad.AnnData(sparse.csr_matrix(cells.shape), obs=cells.obs, var=cells.var)
    cpa.obsm["CPA_pred"] = 0.5 * (cells.X.toarray() + cells.X.toarray().mean(axis=0))
    cpa.write_h5ad(folder / "cpa.h5ad")

    cellflow = ad.AnnData(np.zeros(cells.shape, np.float32), obs=cells.obs, var=cells.var)
    cellflow.layers["X_recon"] = log_normalised(cells)
    cellflow.write_h5ad(folder / "cellflow.h5ad")

    trained = real[:, ::2].copy()  # the variable genes
    trained.write_h5ad(folder / "state_trained_on.h5ad")
    chosen = trained[here].copy()  # controls among them
    values = log_normalised(real[here], 1e5)[:, ::2]
    ad.AnnData(values, obs=pd.DataFrame(chosen.obs.to_numpy(str), columns=chosen.obs.columns)).write_h5ad(
        folder / "adata_pred.h5ad"
    )

    second = real[here & (real.obs["condition"] == "drug 2").to_numpy()]
    means = {"drug 1": log_normalised(cells).mean(axis=0), "drug 2": log_normalised(second).mean(axis=0)}
    np.savez(folder / "gears.npz", **means)
