"""How long a move in the virtual-cell explorer takes, from the question to the PNG, on 5,000 cells."""

from __future__ import annotations

import statistics
import time

import numpy as np
from anndata import AnnData
from scipy import sparse

from cellop_nb.analysis.cellop import CellOp
from cellop_nb.data.contract import Keys
from cellop_nb.notebook.explorer import ExplorerPicture
from cellop_nb.notebook.virtual import Question, VirtualCells
from cellop_nb.training.operators import new_operators
from cellop_nb.training.vae import new_vae

from .measure import compared, counts, cpu_seconds, product_rate

CELLS, GENES, LATENT = 5_000, 1_000, 32
HIDDEN = 128
STRENGTH = "another strength"
MOVES = {
    STRENGTH: Question("A", "T", 0.6),
    "a perturbation seen before": Question("A", "T"),
    "a perturbation for the first time": Question("A", "T"),
    "reversed, for the first time": Question("A", "T", reverse=True),
}
BETWEEN = "shares of zeros, quantiles and intervals of every gene, and their ranking, in numpy and pandas"
FIRST = f"the noise floor of real cells against each other, 220 norms of the operator's powers; besides, {BETWEEN}"


def run(quick: bool = False) -> list[dict]:
    """Time of each kind of move, answer and picture together: the best of several, and the median.

    The bound: the counted products at the machine's rate, and drawing the same picture once more.
    """
    cells = _cells(200 if quick else CELLS, 50 if quick else GENES)
    sheet, rows = ExplorerPicture(), []
    _move(cells, sheet, Question("A", "T"))  # fonts are loaded once
    for name, question in MOVES.items():
        times = [_timed(cells, sheet, name, question) for _ in range(2 if quick else 7)]
        wall, cpu = (min(kind) for kind in zip(*times, strict=True))
        note = f"median {1e3 * statistics.median(spent for _, spent in times):.0f} CPU ms"
        row = {"variant": "cellop_nb", "what": name, "n": len(cells.z) // 3}
        near = _compared(cells, sheet, name, question, cpu)
        rows.append({**row, "seconds": wall, "cpu_seconds": cpu, "note": note} | near)
    return rows


def _compared(cells: VirtualCells, sheet: ExplorerPicture, name: str, question: Question, cpu: float) -> dict:
    """Bound and distance of a move that took `cpu` seconds."""
    first = _before(cells, sheet, name, question)
    made = counts(lambda: _move(cells, sheet, question))

    answer = cells.ask(question)
    products = made.operations / product_rate(1024, HIDDEN, len(cells.vae.genes))
    between = FIRST if first else BETWEEN
    return compared(
        cpu, products=products, drawing=cpu_seconds(lambda: sheet.png(answer)), made=made, between=between
    )


def _timed(cells: VirtualCells, sheet: ExplorerPicture, name: str, question: Question) -> tuple[float, float]:
    _before(cells, sheet, name, question)
    return _move(cells, sheet, question)


def _before(cells: VirtualCells, sheet: ExplorerPicture, name: str, question: Question) -> bool:
    """What was asked before this kind of move; whether the move is the first one of its perturbation."""
    first = "first time" in name
    if first:
        cells.forget()
    _move(cells, sheet, Question("A" if name == STRENGTH else "B", "T"))
    return first


def _move(cells: VirtualCells, sheet: ExplorerPicture, question: Question) -> tuple[float, float]:
    start = time.perf_counter(), time.process_time()
    sheet.png(cells.ask(question))
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
    Keys().write(adata)
    vae, operators = new_vae(adata, n_latent=LATENT, n_hidden=HIDDEN), new_operators(adata)
    model = CellOp(adata, n_latent=LATENT, n_genes=None, vae=vae, operators=operators)
    return VirtualCells(model.fit(progress=False))
