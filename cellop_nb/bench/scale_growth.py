"""How time and memory of a stage grow with the number of cells."""

from __future__ import annotations

import numpy as np


def growth(rows: list[dict]) -> list[dict]:
    """One row per variant, stage and file measured at several numbers of cells.

    Returns
    -------
    Rows with ``time_exponent``, the slope of the logarithm of CPU seconds against that of cells (1: linear), and
    ``bytes_per_cell``, the slope of extra memory; both over all sizes, by least squares.
    """
    series: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get("cells_per_cpu_s"):
            series.setdefault((row["variant"], row["stage"], row["file"]), []).append(row)
    return [_slopes(key, points) for key, points in series.items() if len(points) > 1]


def _slopes(key: tuple, points: list[dict]) -> dict:
    cells = np.array([row["cells"] for row in points], dtype=float)
    seconds = cells / [row["cells_per_cpu_s"] for row in points]
    memory = 1e6 * np.array([row["extra_mb"] for row in points])
    row = dict(zip(("variant", "stage", "file"), key, strict=True))
    row["what"] = f"growth from {cells.min():,.0f} to {cells.max():,.0f} cells"
    row["time_exponent"] = float(np.polyfit(np.log(cells), np.log(seconds), 1)[0])
    return row | {"bytes_per_cell": float(np.polyfit(cells, memory, 1)[0]), "note": None}
