"""The table of scores: every method and the noise of the real cells, group by group, and discrimination among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from ..data.contract import perturbation_parts
from ..display import Scores
from . import formulas
from .noise import noise
from .scores import PDS, known_metrics, score

COLUMNS = ["context", "perturbation", "group", "method", "metric", "value", "reason"]
MIN_DISCRIMINATION = 20  # PDS moves in steps of 1/N: with fewer perturbations it says little


def table_of(
    truths: Mapping,
    guesses: Mapping[str, Mapping],
    metrics: Iterable[str] | None,
    unscored: Mapping | None = None,
) -> pd.DataFrame:
    """All rows of the table; `guesses` is method -> group -> Prediction, `unscored` group -> reason."""
    names, rows = known_metrics(metrics), []
    for group, truth in truths.items():
        for found in guesses.values():
            rows += _labelled(score(found[group], truth, names), group)
        rows += _labelled(noise(truth, names), group)
    if metrics is None or PDS in ([metrics] if isinstance(metrics, str) else list(metrics)):
        for method, found in guesses.items():
            rows += _discrimination(truths, found, method)
    for group, reason in (unscored or {}).items():
        bare = {"value": np.nan, "reason": reason}
        rows += _labelled([bare | {"method": m, "metric": name} for m in guesses for name in names], group)
    return Scores(rows, columns=COLUMNS)


def _labelled(rows: list[dict], group: tuple[str, str]) -> list[dict]:
    labels = {"context": group[0], "perturbation": group[1], "group": ", ".join(group)}
    return [labels | row for row in rows]


def _discrimination(truths: Mapping, guesses: Mapping, method: str) -> list[dict]:
    """PDS rows of one method, among the perturbations of each context."""
    rows = []
    for context in sorted({group[0] for group in truths}):
        groups = [group for group in truths if group[0] == context]
        predicted = [group for group in groups if guesses[group].mean is not None]
        values, reason = _pds(predicted, truths, guesses)
        known = dict(zip(predicted, values, strict=True))
        for group in groups:
            why = reason if group in known else guesses[group].reason
            row = {"method": method, "metric": PDS, "value": known.get(group, np.nan), "reason": why}
            rows += _labelled([row], group)
    return rows


def _pds(groups: Sequence, truths: Mapping, guesses: Mapping) -> tuple[np.ndarray, str]:
    if len(groups) < MIN_DISCRIMINATION:
        reason = f"{len(groups)} perturbations; below {MIN_DISCRIMINATION} it says little"
        return np.full(len(groups), np.nan), reason
    start = [truths[g].control_mean for g in groups]
    predicted = np.stack([guesses[g].mean for g in groups]) - start
    real = np.stack([truths[g].mean for g in groups]) - start
    genes = pd.Index(truths[groups[0]].space.genes)
    left_out = [np.flatnonzero(genes.isin(perturbation_parts(g[1]))) for g in groups]
    return formulas.perturbation_discrimination(predicted, real, left_out), ""
