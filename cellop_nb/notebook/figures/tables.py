"""What figures need from a table: columns, group labels, wide counts."""

from __future__ import annotations

import pandas as pd

from cellop_nb.errors import LabelError, did_you_mean, three_beats


def need(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table without `columns`.

    Raises
    ------
    LabelError
        Names the first missing column and the closest one there is.
    """
    for column in columns:
        if column not in table:
            raise LabelError(
                three_beats(
                    f"a table with the columns {', '.join(columns)}",
                    f"no column {column!r} among {list(map(str, table.columns))}",
                    f"rename or add it; {did_you_mean(column, table.columns)}",
                )
            )


def group_labels(table: pd.DataFrame) -> pd.Series:
    """One label per row: column `group`, or `context, perturbation`, or whichever of the two is there."""
    if "group" in table:
        return table["group"].astype(str)
    parts = [table[name].astype(str) for name in ("context", "perturbation") if name in table]
    if not parts:
        return pd.Series(table.index.map(str), index=table.index)
    return parts[0].str.cat(parts[1:], sep=", ") if len(parts) > 1 else parts[0]


def wide_counts(table: pd.DataFrame) -> pd.DataFrame:
    """Cells as (context, perturbation), from the long or the wide form; groups without cells become 0."""
    if {"context", "perturbation"} <= set(table.columns):
        need(table, "context", "perturbation", "cells")
        table = table.astype({"context": str, "perturbation": str})
        table = table.pivot_table(
            index="context", columns="perturbation", values="cells", aggfunc="sum", sort=False
        )
    return table.fillna(0)
