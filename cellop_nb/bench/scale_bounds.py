"""What a pass over data on disk takes at least, from what the same run measured, and what stands between."""

from __future__ import annotations

from .limits import bandwidth, product_rate
from .vae import PEER, step_bounds

OURS, WITHIN = "cellop_nb", "cellop_nb, all in memory"
HIDDEN, LATENT, BATCH = 128, 32, 256
CONTEXTS, PERTURBATIONS = 4, 4
_MORE = "{over:.2f} CPU s more"
BETWEEN = {
    "read": f"{_MORE}, for chunks taken out of the file (in zarr out of their compression), copied into CSR matrices",
    "train": f"{_MORE} than in memory, where a pass over the file takes {{reading:.2f}}: starting values, library sizes "
    "and constants are a pass each, and every window of the shuffle is put together from blocks",
    "encode": f"{_MORE}, for names and labels, the check of the values, logarithms of the non-zeros, and a first layer "
    "whose rows are gathered one by one",
    "predict": f"{_MORE}, for names and labels, noise floors and starts of the operators, an epoch of theirs, sampled "
    "counts and writing them; reading takes {reading:.2f}",
    WITHIN: f"{_MORE}, for reading and checking the file, starting values and constants, and in each step what "
    "`bench vae` tells",
}


def bounded(rows: list[dict]) -> list[dict]:
    """The rows, ours with their bound; CPU seconds."""
    found = {
        (row["variant"], row["stage"], row["file"], row["cells"]): row for row in rows if "extra_mb" in row
    }
    most = max((row["cells"] for row in rows if row["variant"] == WITHIN and "extra_mb" in row), default=None)
    memory = found.get((WITHIN, "train", "h5ad", most))
    for row in found.values():
        once = found.get((OURS, "read", row["file"], row["cells"]))
        if row["variant"] == PEER or row["stage"] == "names" or once is None:
            continue
        reading, kind = _seconds(once), WITHIN if row["variant"] == WITHIN else row["stage"]
        bound = _bound(kind, row, reading, memory)
        if bound is None:
            continue
        cpu = _seconds(row)
        row |= {"bound": bound[0], "bound_seconds": bound[1], "distance": cpu / bound[1]}
        if row["distance"] > 2:
            row["between"] = BETWEEN[kind].format(reading=reading, over=cpu - bound[1])
    return rows


def _seconds(row: dict) -> float:
    return row["cells"] / row["cells_per_cpu_s"]


def _bound(kind: str, row: dict, reading: float, memory: dict | None) -> tuple[str, float] | None:
    """What bounds a row, and its CPU seconds; `reading` is those of a pass over its file."""
    cells, genes = row["cells"], row["genes"]
    if kind == "read":
        return "the file's bytes, copied once", row["file_mb"] * 1e6 / (bandwidth() / 2)
    if kind == "train":
        return None if memory is None else ("training in memory", cells / memory["cells_per_cpu_s"])
    if kind == "encode":
        return "reading the file once, encoder's products", reading + _encoding(row)
    if kind == "predict":
        # Every 16th cell is a control of the context: its neighbours are read too.
        return "reading the file once, decoder's products", reading + _decoding(cells, genes)
    return "products", cells / BATCH * step_bounds(HIDDEN, BATCH, genes)["products"]


def _encoding(row: dict) -> float:
    """CPU seconds of the products of the first layer at the non-zeros, which the share of them in the file counts."""
    nonzeros = row["file_mb"] * 1e6 / 8  # a value and a gene each take four bytes
    return 2.0 * nonzeros * (HIDDEN + LATENT) / product_rate(BATCH, HIDDEN, row["genes"])


def _decoding(cells: int, genes: int) -> float:
    """CPU seconds of the products that decode the predicted cells, before and after their move."""
    moved = cells / (CONTEXTS * PERTURBATIONS)
    return 2 * moved * 2.0 * genes * (HIDDEN + LATENT) / product_rate(1024, HIDDEN, genes)
