"""Where the error of a prediction sits: noise, decoder or operator."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from ..data.contract import context_labels
from .formulas import e_distance
from .holdout import OPERATORS, Holdout
from .noise import FLOOR
from .predict import decode_cells, embed

STAGES = ("noise floor", "decoder, control cells", "decoder, true perturbed cells", "operators", "no change")


def error_budget(
    result: Holdout,
    *,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | list[str] | None = "cell_type",
    max_cells: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Energy distance (Euclidean, U-statistic, evaluation components) of each stage of a prediction, per group.

    The stages: split halves of the real cells; control cells encoded and decoded, against the real control
    cells; real perturbed cells encoded and decoded, against themselves; the prediction; no change at all. The
    last but one minus the one before is what better operators could win; the third is what they cannot.

    Returns
    -------
    DataFrame
        ``group, stage, energy``; with several fits the decoder's stages are means over them.
    """
    scored = result.table[result.table["metric"] == "e_distance"].set_index(["group", "method"])["value"]
    rows = []
    for group in scored.index.get_level_values("group").unique():
        context, perturbation = (
            result.table[result.table["group"] == group][["context", "perturbation"]].iloc[0].tolist()
        )
        control = result.control[(context_labels(result.control, context_key) == context).to_numpy()]
        here = (context_labels(result.real, context_key) == context).to_numpy()
        real = result.real[here & (result.real.obs[perturbation_key].astype(str) == perturbation).to_numpy()]
        energies = (
            scored[group, FLOOR],
            _round_trip(result, control, layer, max_cells, seed),
            _round_trip(result, real, layer, max_cells, seed),
            scored[group, OPERATORS],
            scored[group, "no change"],
        )
        rows += [{"group": group, "stage": s, "energy": e} for s, e in zip(STAGES, energies, strict=True)]
    return pd.DataFrame(rows)


def _round_trip(result: Holdout, cells, layer, max_cells: int, seed: int) -> float:
    """Energy distance between cells and their own encoded and decoded counts, mean over the fits."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(cells.n_obs)[:max_cells])
    cells = cells[rows].copy()
    truth = result.space.project(result.space.transform(result.space.select(cells, layer)))
    values = []
    for fitted in result.fits:
        embed(cells, fitted.vae, layer=layer)
        again = decode_cells(
            cells, fitted.vae, torch.as_tensor(cells.obsm["X_nbvae"]), layer=layer, seed=seed
        )
        values.append(e_distance(result.space.project(result.space.transform(again.X)), truth))
    return float(np.mean(values))


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
    floor, decoder, whole = row["noise floor"], row["decoder, true perturbed cells"], row["operators"]
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
        f"{1 - max(decoder, 0.0) / whole:.0%} of the error is the operator's: measure a context nearer to this "
        "one, or more cells; compare with the nearest context in the table."
    )
