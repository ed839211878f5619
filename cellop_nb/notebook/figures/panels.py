"""Which panels a history asks for: a pure function of its column names."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SKIPPED = {"epoch", "seconds", "step"}
_ENERGY = re.compile(r"^(?:val_|train_)?energy\[(.*)\]$")
_TITLES = {
    "loss": "loss (sum of terms)",
    "reconstruction": "reconstruction (nats per cell)",
    "kl": "KL (nats per cell)",
    "energy": "energy (mean of groups)",
    "grad_norm": "gradient norm",
    "operator_norm": "largest operator norm",
    "lr": "learning rate",
    "cells_per_s": "cells per second",
}
_LAST = ("grad_norm", "operator_norm", "lr", "cells_per_s")


@dataclass(frozen=True)
class Panel:
    """One panel: `columns` maps a column of the history to the name of its line."""

    title: str
    columns: tuple[tuple[str, str], ...]
    groups: bool = False


def pick_panels(columns: Iterable[str], constant: Container[str] = ()) -> list[Panel]:
    """Panels for a history with these columns: loss, its terms, everything else, energy per group last.

    A new loss term (`train_x`, `val_x`) or any other number gets a panel by itself; numbers of the settings
    (loss weights) only once they change, so `constant` ones are left out.
    """
    names = [str(column) for column in columns]
    groups = tuple((name, found.group(1)) for name in names if (found := _ENERGY.match(name)))
    known = {name for name, _ in groups} | _SKIPPED
    rest = [name for name in names if name not in known]
    terms = list(dict.fromkeys(_term(name) for name in rest if _term(name)))
    terms.sort(key=lambda term: term != "loss")
    panels = [_term_panel(term, rest) for term in terms]
    single = [name for name in rest if not _term(name) and (name in _TITLES or name not in constant)]
    single.sort(key=lambda name: _LAST.index(name) if name in _LAST else -1)
    panels += [Panel(_title(name) + " (weight)" * (name in terms), ((name, name),)) for name in single]
    return panels + ([Panel("energy distance per group (validation)", groups, groups=True)] if groups else [])


def _term(name: str) -> str:
    """`reconstruction` for `train_reconstruction` or `val_reconstruction`, else an empty string."""
    kind, _, term = name.partition("_")
    return term if kind in {"train", "val"} else ""


def _term_panel(term: str, names: Sequence[str]) -> Panel:
    pairs = ((f"{kind}_{term}", label) for kind, label in (("train", "training"), ("val", "validation")))
    return Panel(_title(term), tuple(pair for pair in pairs if pair[0] in names))


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


class Columns:
    """Rows as growing columns; a row is read once, however often the picture is drawn."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}
        self.n_rows = 0

    def extend(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Append the rows that are new; a shorter list starts again."""
        if len(rows) < self.n_rows:
            self.values, self.n_rows = {}, 0
        for row in rows[self.n_rows :]:
            for name in row:
                self.values.setdefault(name, [np.nan] * self.n_rows)
            for name, past in self.values.items():
                past.append(_number(row.get(name)))
            self.n_rows += 1

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self.values[name], dtype=float)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def names(self) -> list[str]:
        """Columns that hold at least one finite number."""
        return [
            name for name, past in self.values.items() if np.isfinite(np.asarray(past, dtype=float)).any()
        ]

    def constant(self) -> set[str]:
        """Columns whose finite values are all the same."""
        return {name for name in self.names() if np.unique(self[name][np.isfinite(self[name])]).size == 1}

    def epochs(self) -> np.ndarray:
        """The running epoch numbers, or 0, 1, ... where the rows do not say."""
        return self["epoch"] if "epoch" in self else np.arange(self.n_rows, dtype=float)


def _number(value: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan
