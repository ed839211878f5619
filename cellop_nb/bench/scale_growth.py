"""How time and memory of a stage grow with the number of cells."""

from __future__ import annotations

import numpy as np

from .scale_bounds import LATENT, OURS


def growth(rows: list[dict]) -> list[dict]:
    """One row per variant, stage and file measured at several numbers of cells.

    Returns
    -------
    Rows with ``time_exponent``, the slope of the logarithm of CPU seconds against that of cells (1: linear), and
    ``bytes_per_cell``, the slope of extra memory; both over all sizes, by least squares. The note says what of that
    are names and labels of the cells, and latents, which are held whole.
    """
    series: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get("cells_per_cpu_s"):
            series.setdefault((row["variant"], row["stage"], row["file"]), []).append(row)
    rows = [_slopes(key, points) for key, points in series.items() if len(points) > 1]
    names = next((row["bytes_per_cell"] for row in rows if row["stage"] == "names"), None)
    return [row | {"note": _held(row, names)} for row in rows]


def _held(row: dict, names: float | None) -> str | None:
    """What a stage of ours that reads from the file holds of every cell."""
    if row["variant"] != OURS or row["stage"] == "names" or names is None:
        return None
    copies = {"encode": 1, "predict": 2}.get(row["stage"], 0)  # the operators' groups hold them once more
    latents = f", {4 * LATENT * copies} latents" if copies else ""
    return f"of these bytes {names:.0f} names and labels{latents}"


def _slopes(key: tuple, points: list[dict]) -> dict:
    cells = np.array([row["cells"] for row in points], dtype=float)
    seconds = cells / [row["cells_per_cpu_s"] for row in points]
    memory = 1e6 * np.array([row["extra_mb"] for row in points])
    row = dict(zip(("variant", "stage", "file"), key, strict=True))
    row["what"] = f"growth from {cells.min():,.0f} to {cells.max():,.0f} cells"
    row["time_exponent"] = float(np.polyfit(np.log(cells), np.log(seconds), 1)[0])
    return row | {"bytes_per_cell": float(np.polyfit(cells, memory, 1)[0]), "note": None}
