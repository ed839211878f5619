"""How an object shows itself at the end of a cell: facts as a small table, and DataFrames that first say what they hold.

Everything made from such a DataFrame (a selection, a sum, a copy) is a plain one again.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np
import pandas as pd

from .errors import LabelError, counted, did_you_mean

_MANY, _LEFT = 6, 'style="text-align:left"'


def card(title: str, facts: Mapping[str, object], *, note: str = "") -> str:
    """A title, facts as rows, and a note, as HTML; every word is escaped, since labels come from data.

    A fact that is None is left out; a list shows its first six items and how many there are. Colours are those of the
    page, so that the card is as readable in a dark theme as in a light one.
    """
    rows = "".join(
        f'<tr><th scope="row" {_LEFT}>{escape(name)}</th><td {_LEFT}>{_said(value)}</td></tr>'
        for name, value in facts.items()
        if value is not None
    )
    below = f"<div>{escape(note)}</div>" if note else ""
    return f"<div><strong>{escape(title)}</strong><table><tbody>{rows}</tbody></table>{below}</div>"


def _said(value: object) -> str:
    if isinstance(value, (list, tuple)):
        more = f", ... ({len(value)} in all)" if len(value) > _MANY else ""
        return escape(", ".join(map(str, value[:_MANY])) + more)
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))


class Table(pd.DataFrame):
    """A DataFrame with a few facts above it; without its own columns it shows as any other."""

    _metadata = ["monitor"]
    _OWN: tuple[str, ...] = ()
    monitor = ""

    _constructor = pd.DataFrame  # what is derived from it is a plain one

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
    """A training by epochs, the best where `monitor` is lowest; shown are the first, the best and the last."""

    _OWN = ("epoch",)

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
        facts: dict[str, object] = {"epochs": len(self)}
        if best is not None:
            value = self[self.monitor].iloc[best]
            facts["best epoch"] = f"{self['epoch'].iloc[best] + 1} ({self.monitor} {value:.4g})"
            facts["epochs since"] = last - best
        if {"seconds", "cells_per_s"} <= {*self.columns}:
            facts["seconds"] = float(self["seconds"].sum())
            facts["cells per second"] = int(self["cells_per_s"].median())
        if "by_hand" in self.columns:
            changes = self["by_hand"].dropna().items()
            facts["changed by hand"] = [f"epoch {self['epoch'][i] + 1}: {said}" for i, said in changes]
        return facts

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
        parts = self[["train", "val", "test"]].sum()
        unseen = self[self["train"] == 0]
        names = [f"{row.context}, {row.perturbation}" for row in unseen.itertuples()]
        shares = 100 * parts / max(parts.sum(), 1)
        facts = {name: f"{counted(parts[name], 'cell')} ({shares[name]:.0f} %)" for name in parts.index}
        return {**facts, "groups": len(self), "held out whole": names or "none"}


SHOWN = (
    "e_distance",
    "replicate_share",
    "e_distance_centred",
    "pearson_delta",
    "direction_match_de50",
    "variance_ratio_de100",
    "zero_error_de100",
    "classifier_auc",
)
"""Metrics that a table of scores shows where it has more than these: distance, shape, mean, leading genes, spread."""


class Scores(Table):
    """Metrics of predictions, a row per group, method and metric; shown are means over the groups that all have."""

    _OWN = ("group", "method", "metric", "value")

    def summary(self, metric: str | None = None) -> pd.DataFrame:
        """Means over the groups that all methods have: methods by metrics, or of one metric with a row per group above.

        A method that predicted fewer than half of the groups, such as "additive" where few are combinations, has no mean;
        the groups that others lack are left out of every mean. What was left out of one metric stands in
        ``attrs["left_out"]``.

        Raises
        ------
        LabelError
            For a metric that is not in the table.
        """
        if metric is None:
            means = {name: self.summary(name).iloc[-1] for name in self["metric"].unique()}
            methods = self["method"].unique()
            return pd.DataFrame(means).reindex(methods).rename_axis("method").dropna(how="all")
        rows = pd.DataFrame(self[self["metric"] == metric])
        if not len(rows):
            fix = did_you_mean(metric, self["metric"].unique())
            raise LabelError("a metric of the table", repr(metric), fix)
        order = list(dict.fromkeys(rows["method"]))
        wide = rows.pivot_table(index="group", columns="method", values="value", sort=False)
        wide = wide[[method for method in order if method in wide]]
        usual = [method for method in wide if wide[method].notna().mean() >= 0.5]
        whole = wide[usual].notna().all(axis=1)
        n_groups = int(whole.sum())
        label = f"mean of {n_groups} group{'s' * (n_groups != 1)}"
        mean = wide.loc[whole, usual].mean().to_frame(label).T
        wide = pd.concat([wide, mean]).rename_axis("group")
        wide.attrs["left_out"] = {
            "groups": [str(group) for group in whole.index[~whole]],
            "methods": [str(method) for method in wide if method not in usual],
        }
        return wide.rename_axis(columns=None)

    def _title(self) -> str:
        return "Scores of predictions, means over groups"

    def _facts(self) -> Mapping[str, object]:
        missing = self[self["value"].isna()]
        why = missing["reason"].dropna().unique() if "reason" in self.columns else []
        said = [f"{len(missing)} of {len(self)}", *(str(reason) for reason in why if str(reason))]
        return {
            "groups": [str(name) for name in self["group"].unique()],
            **{
                name: "; ".join(f"{what}: {fact}" for what, fact in facts.items() if fact)
                for name, facts in self.attrs.get("inputs", {}).items()
            },
            "without a value": "; ".join(said[:3]) if len(missing) else None,
            "e_distance": "Euclidean, U-statistic, per group"
            if (self["metric"] == "e_distance").any()
            else None,
        }

    def _shown(self) -> pd.DataFrame:
        wide = self.summary()
        return wide[
            [name for name in SHOWN if name in wide] if len(wide.columns) > len(SHOWN) else [*wide]
        ].round(3)


class Distances(Table):
    """Energy distances of moved cells to real ones, a row per group and method; shown are means over groups."""

    _OWN = ("group", "method", "energy", "floor", "limit")

    def _title(self) -> str:
        return "Energy distances to the real cells, means over groups"

    def _facts(self) -> Mapping[str, object]:
        return {
            "groups": [str(name) for name in self["group"].unique()],
            "energy": "Euclidean, U-statistic, per group, in the latent space",
            "floor": "the same distance between halves of cells of one kind, mean over splits: about 0",
            "limit": "95 of 100 such distances lie below it: noise alone reaches as far",
        }

    def _shown(self) -> pd.DataFrame:
        measured = pd.DataFrame(self).dropna(subset=["energy"])
        by_method = measured.groupby("method", sort=False)
        within = measured["energy"].le(measured["limit"]).groupby(measured["method"], sort=False)
        counts = within.sum().astype(str) + " of " + within.size().astype(str)
        means = by_method[["energy", "floor", "limit"]].mean().round(3)
        return means.assign(**{"groups within the limit": counts})


def markdown(text: str):
    """Markdown for the end of a cell; names from data may stand in it as they are: ``<`` and ``&`` begin no HTML."""
    from IPython.display import Markdown

    return Markdown(text.replace("&", "&amp;").replace("<", "&lt;"))


def styled(frame: pd.DataFrame, *, precision: int | None = None, index: bool = True):
    """A table for the end of a cell, as a Styler of pandas; markup of HTML in its labels and values shows as text."""
    shown = frame.style.format(precision=precision, escape="html")
    shown = shown.format_index(escape="html").format_index(escape="html", axis="columns")
    return shown if index else shown.hide(axis="index")
