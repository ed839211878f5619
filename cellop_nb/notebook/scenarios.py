"""Series of questions to virtual cells, as tables: every way to build a combination, every strength."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pandas as pd

from ..models.energy import energy_distance
from .figures.explorer import leading
from .questions import Question
from .virtual import VirtualCells

ORDERS, AT_ONCE, SHARED = ("in the label's order", "in the other order"), "sum of generators", "shared axes"


def ways_to_combine(cells: VirtualCells, context: str) -> pd.DataFrame:
    """Four ways to build each measured pair of perturbations, compared with the cells that got both.

    Shared axes learn a pair's interaction from its own cells where these were among the training cells; the other ways
    know the two single perturbations alone.

    Returns
    -------
    DataFrame with a row per pair and method: ``group, method, energy, floor``; energy distances are Euclidean,
    U-statistic, latent.
    """
    pairs = [name for name in cells.measured(context) if name.count("+") == 1]
    rows = []
    for pair in pairs:
        a, b = pair.split("+")
        ways = dict(zip(ORDERS, (Question((a, b), context), Question((b, a), context)), strict=True))
        ways |= {AT_ONCE: Question(pair, context, rule="generator"), SHARED: Question(pair, context)}
        answers = {way: cells.ask(question) for way, question in ways.items()}
        floor = answers[SHARED].floor
        rows.append((pair, "no change", answers[SHARED].energy_start, floor))
        rows += [(pair, way, answer.energy, floor) for way, answer in answers.items()]
    return pd.DataFrame(rows, columns=["group", "method", "energy", "floor"])


def dose_response(
    cells: VirtualCells, question: Question, strengths: Iterable[float], *, n_genes: int = 3
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A question at several strengths.

    Parameters
    ----------
    strengths
        Each between 0 and 1.5.
    n_genes
        Genes up and down, those that lead at strength 1.

    Returns
    -------
    tuple of DataFrame
        Distances: ``strength, energy, target`` (to the source cells as they were, and to the real cells aimed at);
        genes: ``strength, gene, lfc, low, high``.
    """
    leaders = leading(cells.ask(replace(question, strength=1.0)).genes, n_genes)["gene"]
    source = cells.source(question)
    rows, genes = [], []
    for strength in map(float, strengths):
        answer = cells.ask(replace(question, strength=strength))
        rows.append((strength, float(energy_distance(answer.operator(source), source)), "the unmoved cells"))
        rows.append((strength, answer.energy, "the real cells aimed at"))
        shown = answer.genes.set_index("gene").loc[leaders, ["lfc", "low", "high"]].reset_index()
        genes.append(shown.assign(strength=strength))
    distances = pd.DataFrame(rows, columns=["strength", "energy", "target"])
    return distances.sort_values("target", kind="stable", ignore_index=True), pd.concat(
        genes, ignore_index=True
    )
