"""Tables that explain themselves: a DataFrame that shows, at the end of a cell, first what it says.

Everything made from one (a selection, a sum, a copy) is a plain DataFrame again.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from .views import card


class Table(pd.DataFrame):
    """A DataFrame with a few facts above it; without its own columns it shows as any other."""

    _metadata = ["monitor"]
    _OWN: tuple[str, ...] = ()
    monitor = ""

    @property
    def _constructor(self):
        return pd.DataFrame

    def _repr_html_(self) -> str:
        if not len(self) or not {*self._OWN} <= {*self.columns}:
            return pd.DataFrame(self)._repr_html_()
        shown = self._shown()
        return card(self._title(), self._facts()) + pd.DataFrame(shown)._repr_html_()

    def _title(self) -> str:
        return type(self).__name__

    def _facts(self) -> Mapping[str, object]:
        return {}

    def _shown(self) -> pd.DataFrame:
        return self


class History(Table):
    """A training by epochs; shown are the first, the best and the last.

    Attributes
    ----------
    monitor
        Column whose minimum is the best epoch.
    """

    _OWN = ("epoch",)

    @classmethod
    def of(cls, rows: list[dict], monitor: str) -> History:
        """The rows of a trainer."""
        history = cls(rows)
        history.monitor = monitor
        return history

    def _title(self) -> str:
        return "History of a training"

    def _best(self) -> int | None:
        """Position of the best epoch."""
        if self.monitor not in self.columns:
            return None
        values = self[self.monitor].to_numpy(dtype=float)
        return int(np.nanargmin(values)) if np.isfinite(values).any() else None

    def _facts(self) -> Mapping[str, object]:
        best, last = self._best(), len(self) - 1
        by_hand = self["by_hand"].dropna() if "by_hand" in self.columns else pd.Series(dtype=object)
        return {
            "epochs": len(self),
            "best epoch": None
            if best is None
            else f"{self['epoch'].iloc[best] + 1} ({self.monitor} {self[self.monitor].iloc[best]:.4g})",
            "epochs since": None if best is None else last - best,
            "seconds": float(self["seconds"].sum()) if "seconds" in self.columns else None,
            "cells per second": int(self["cells_per_s"].median()) if "cells_per_s" in self.columns else None,
            "changed by hand": [f"epoch {self['epoch'][i] + 1}: {said}" for i, said in by_hand.items()]
            or None,
        }

    def _shown(self) -> pd.DataFrame:
        chosen = {"first": 0, "best": self._best(), "last": len(self) - 1}
        chosen = {name: row for name, row in chosen.items() if row is not None}
        numbers = self.select_dtypes("number").iloc[list(chosen.values())].drop(columns="epoch")
        return numbers.set_axis(chosen, axis=0).T.map("{:.4g}".format)


class SplitTable(Table):
    """Cells per (context, perturbation) group and split."""

    _OWN = ("context", "perturbation", "train", "val", "test")

    def _title(self) -> str:
        return "Split"

    def _facts(self) -> Mapping[str, object]:
        parts, total = (
            self[["train", "val", "test"]].sum(),
            int(self[["train", "val", "test"]].to_numpy().sum()),
        )
        unseen = self[self["train"] == 0]
        names = [f"{row.context}, {row.perturbation}" for row in unseen.itertuples()]
        shares = {
            name: f"{count:,} cells ({100 * count / max(total, 1):.0f} %)" for name, count in parts.items()
        }
        return {**shares, "groups": len(self), "held out whole": names or "none"}


class Scores(Table):
    """Metrics of predictions, a row per group, method and metric; shown are means over groups."""

    _OWN = ("group", "method", "metric", "value")

    def _title(self) -> str:
        return "Scores of predictions, means over groups"

    def _facts(self) -> Mapping[str, object]:
        missing = self[self["value"].isna()]
        why = missing["reason"].dropna().unique() if "reason" in self.columns else []
        said = [f"{len(missing)} of {len(self)}", *(str(reason) for reason in why if str(reason))]
        return {
            "groups": [str(name) for name in self["group"].unique()],
            "without a value": "; ".join(said[:3]) if len(missing) else None,
            "e_distance": "Euclidean, U-statistic, per group"
            if (self["metric"] == "e_distance").any()
            else None,
        }

    def _shown(self) -> pd.DataFrame:
        wide = pd.DataFrame(self).pivot_table(index="method", columns="metric", values="value", sort=False)
        return wide.round(3)


class Distances(Table):
    """Energy distances of moved cells to real ones, a row per group and method; shown are means over groups."""

    _OWN = ("group", "method", "energy", "floor")

    def _title(self) -> str:
        return "Energy distances to the real cells, means over groups"

    def _facts(self) -> Mapping[str, object]:
        return {
            "groups": [str(name) for name in self["group"].unique()],
            "energy": "Euclidean, U-statistic, per group, in the latent space",
            "floor": "the same distance between cells of the very same kind: what noise alone gives",
        }

    def _shown(self) -> pd.DataFrame:
        known = pd.DataFrame(self).dropna(subset=["energy"])
        by_method = known.groupby("method", sort=False)
        within = known["energy"].le(known["floor"]).groupby(known["method"], sort=False)
        counts = within.sum().astype(str) + " of " + within.size().astype(str)
        return by_method[["energy", "floor"]].mean().round(3).assign(**{"groups within the floor": counts})
