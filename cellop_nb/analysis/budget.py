"""Where the error of a prediction sits: noise, decoder or operator."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from ..data.contract import keys_of
from .holdout import CELLOP, Fit, Holdout
from .metrics import e_distance
from .predict import Start, modelled_counts
from .scores import FLOOR, MAX_CELLS, rows_by_group

STAGES = ("noise floor", "decoder, control cells", "decoder, true perturbed cells", "CellOp", "no change")


def error_budget(result: Holdout, *, seed: int = 0) -> pd.DataFrame:
    """Energy distance (Euclidean, U-statistic, evaluation components) of each stage of a prediction, per group.

    The stages: split halves of the real cells; control cells encoded and decoded, against the real control
    cells; real perturbed cells encoded and decoded, against themselves; the prediction; no change at all. The
    last but one minus the one before is what better operators and plans could win; the third is what they cannot.

    Returns
    -------
    DataFrame
        ``group, stage, energy``; with several seeds means over them.
    """
    rows, scored = [], result.scores[result.scores["metric"] == "e_distance"]
    mean = scored.groupby(["group", "method"])["value"].mean()
    labels = scored[["question", "context", "perturbation", "group"]].drop_duplicates()
    for question, context, perturbation, group in labels.itertuples(index=False, name=None):
        fits = [fit for fit in result.fits if fit.question == question]
        control = keys_of(fits[0].real).control
        trips = [
            np.mean([_round_trip(fit, part, (context, label), seed) for fit, part in parts])
            for label, parts in (
                (control, [(fit, fit.control) for fit in fits]),
                (perturbation, [(fit, fit.real) for fit in fits]),
            )
        ]
        energies = (mean[group, FLOOR], *trips, mean[group, CELLOP], mean[group, "no change"])
        rows += [{"group": group, "stage": s, "energy": e} for s, e in zip(STAGES, energies, strict=True)]
    return pd.DataFrame(rows)


def _round_trip(fit: Fit, cells, pair: tuple[str, str], seed: int) -> float:
    """Energy distance between cells and their own encoded and decoded counts."""
    keys = keys_of(cells)
    rows = rows_by_group(cells, keys)[pair]
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MAX_CELLS])
    truth = fit.space.project(fit.space.transform(fit.space.select(cells[rows])))
    start = Start.of(modelled_counts(cells[rows], fit.vae, keys), fit.vae)
    again = start.fresh(start.z, torch.Generator().manual_seed(seed))
    return e_distance(fit.space.project(fit.space.transform(again)), truth)


def advice(budget: pd.DataFrame) -> pd.DataFrame:
    """What to improve, in words, for each group of :func:`error_budget`.

    Returns
    -------
    DataFrame
        ``group, advice``.
    """
    wide = budget.pivot(index="group", columns="stage", values="energy")
    return pd.DataFrame({"group": wide.index, "advice": [_sentence(row) for _, row in wide.iterrows()]})


def _sentence(row: pd.Series) -> str:
    floor, decoder, whole = row["noise floor"], row["decoder, true perturbed cells"], row["CellOp"]
    if row["no change"] <= max(2 * floor, 0.1):
        return "There is hardly an effect to predict: no change is as near as the noise floor."
    if whole <= max(2 * floor, 0.1):
        return "The prediction is as near to the real cells as they are to themselves: nothing to improve."
    if decoder > 0.5 * whole:
        share = f"{decoder / whole:.0%} of the error remains with the true latents"
        if decoder > whole:  # they are decoded afresh, while a prediction keeps the cells' own counts
            share = f"The true latents decode no nearer ({decoder:.2f}) than the prediction is ({whole:.2f})"
        return f"{share}: improve the VAE (longer training, more latent dimensions, a larger hidden layer)."
    return (
        f"{1 - max(decoder, 0.0) / whole:.0%} of the error is the operators' and the plan's: measure a context nearer to "
        "this one, or more cells; compare with the nearest context in the table."
    )
