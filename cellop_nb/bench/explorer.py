"""How long a move in the virtual-cell explorer takes, from the question to the PNG, on 5,000 cells."""

from __future__ import annotations

import statistics
import time

import numpy as np
from anndata import AnnData
from scipy import sparse

from ..notebook.figures.explorer import ExplorerSheet
from ..notebook.questions import Question
from ..notebook.virtual import VirtualCells
from ..training.operator_start import new_operators
from ..training.vae import new_vae

CELLS, GENES, LATENT = 5_000, 1_000, 32
MOVES = {
    "another strength": Question("A", "T", 0.6),
    "a perturbation seen before": Question("A", "T"),
    "a perturbation for the first time": Question("A", "T"),
    "reversed, for the first time": Question("A", "T", reverse=True),
}


def run(quick: bool = False) -> list[dict]:
    """Time of each kind of move, answer and picture together: the best of several, and the median."""
    cells = _cells(200 if quick else CELLS, 50 if quick else GENES)
    sheet, rows = ExplorerSheet(), []
    _move(cells, sheet, Question("A", "T"))  # fonts are loaded once
    for name, question in MOVES.items():
        times = [_timed(cells, sheet, name, question) for _ in range(2 if quick else 7)]
        wall, cpu = (min(kind) for kind in zip(*times, strict=True))
        note = f"median {1e3 * statistics.median(spent for _, spent in times):.0f} CPU ms"
        row = {"variant": "cellop_nb", "what": name, "n": cells.adata.n_obs // 3}
        rows.append({**row, "seconds": wall, "cpu_seconds": cpu, "note": note})
    return rows


def _timed(cells: VirtualCells, sheet: ExplorerSheet, name: str, question: Question) -> tuple[float, float]:
    if "first time" in name:
        cells.forget()
    _move(cells, sheet, Question("A" if question.strength != 1 else "B", "T"))
    return _move(cells, sheet, question)


def _move(cells: VirtualCells, sheet: ExplorerSheet, question: Question) -> tuple[float, float]:
    start = time.perf_counter(), time.process_time()
    sheet.update(cells.ask(question))
    sheet.png()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def _cells(n: int, genes: int) -> VirtualCells:
    """Three clouds of n cells, untrained models: the time does not depend on what they learned."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 0.6, size=(3 * n, genes))).astype(np.float32)  # type: ignore[attr-defined]
    adata = AnnData(sparse.csr_matrix(counts))
    adata.obs["perturbation"] = np.repeat(["control", "A", "B"], n)
    adata.obs["cell_type"], adata.obs["split"] = "T", "train"
    shift: np.ndarray = np.repeat([0.0, 0.3, 0.6], n)[:, None]
    adata.obsm["X_nbvae"] = (rng.normal(size=(3 * n, LATENT)) + shift).astype(np.float32)
    return VirtualCells(adata, new_vae(adata, n_latent=LATENT), new_operators(adata))
