"""Series of questions to virtual cells, as tables: ways to build a combination, strengths, lent responses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from ..data.groups import Groups
from ..data.synthetic import planted_operator, planted_proportions
from ..models.affine import AffineOperator
from ..models.energy import energy_distance
from ..models.likelihood import COUNTS_PER_CELL
from .figures.explorer import leading
from .questions import Question
from .virtual import VirtualCells

ORDERS, AT_ONCE, SHARED = ("in the label's order", "in the other order"), "sum of generators", "shared axes"

NO_CHANGE, SHIFT = "no change", "mean shift of the other contexts"
LENT, OWN = "operator, lent", "operator, fitted here"
HALF, HALVED, FULL = (
    "operator at strength 0.5",
    "half of the operator's full change",
    "operator at strength 1",
)
VAE_ALONE, COUNTED = "no operator: perturbed cells through the VAE", "no model: counts of the perturbed cells"


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
        rows.append((pair, NO_CHANGE, answers[SHARED].energy_start, floor))
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


def half_dose_errors(cells: VirtualCells, question: Question) -> pd.Series:
    """How far predicted changes of expression are from the planted ones, and how much of it is the operator's.

    The truth at strength t is the planted operator to the power t, applied to the true latents of the control cells, and
    the exact mean expression there. An error is relative: the length of the difference of the log2 fold changes of all
    genes over the length of the true ones. :data:`VAE_ALONE` is the change between real cells as encoder and decoder give
    them back, and :data:`COUNTED` that of their counts, which holds the noise of the sample.

    Returns
    -------
    Series of what was compared to its error; empty where nothing was planted or the planted change is none.
    """
    adata, asked = cells.adata, (question.perturbation, question.context)
    if "truth" not in adata.uns.get("cellop_nb", {}):
        return pd.Series(dtype=float)
    z = torch.as_tensor(adata.obsm["X_truth"][cells.clouds.rows(question.context, cells.control)]).double()
    planted = AffineOperator(*map(torch.as_tensor, planted_operator(adata, *asked)))

    def level(latent):
        return np.log2(COUNTS_PER_CELL * planted_proportions(adata, latent.numpy()).mean(0) + 1)

    true = {strength: level(planted.power(strength)(z)) - level(z) for strength in (0.5, 1.0)}
    if not np.linalg.norm(true[1.0]) > 0:
        return pd.Series(dtype=float)
    half, full = (cells.ask(replace(question, strength=s)).genes.set_index("gene") for s in (0.5, 1.0))
    said = {HALF: (half["lfc"], 0.5), HALVED: (full["lfc"] / 2, 0.5), FULL: (full["lfc"], 1.0)}
    said |= {VAE_ALONE: (cells.recalled(question), 1.0), COUNTED: (full["measured"], 1.0)}
    off = {
        name: change.reindex(adata.var_names) - true[strength] for name, (change, strength) in said.items()
    }
    return pd.Series(
        {
            name: np.linalg.norm(off[name]) / np.linalg.norm(true[strength])
            for name, (_, strength) in said.items()
        }
    )


def lent_responses(
    lent: VirtualCells, own: VirtualCells, training: Groups, context: str, perturbations: Iterable[str]
) -> pd.DataFrame:
    """Operators that were fitted without a context, in that context, beside the mean shift and the operators' own fit.

    Parameters
    ----------
    lent, own
        The same cells with operators that have not and that have seen the context's perturbed cells.
    training
        Groups that `lent` was fitted on; their mean shifts are averaged.

    Returns
    -------
    DataFrame with a row per perturbation and method: ``group, method, energy, floor``; energy distances are Euclidean,
    U-statistic, latent, to the same real cells.
    """
    rows = []
    for name in perturbations:
        question = Question(name, context)
        far, near = lent.ask(question), own.ask(question)
        shifts = [
            g.cells.mean(0) - training.control[g.context].mean(0) for g in training if g.perturbation == name
        ]
        shifted = own.source(question) + torch.stack(shifts).mean(0)
        ways = {
            NO_CHANGE: far.energy_start,
            SHIFT: float(energy_distance(shifted, own.target(question))),
            LENT: far.energy,
            OWN: near.energy,
        }
        rows += [(name, way, energy, far.floor) for way, energy in ways.items()]
    return pd.DataFrame(rows, columns=["group", "method", "energy", "floor"])
