"""Predictions in the form that other evaluation software reads."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

from ..data.contract import keys_of
from ..errors import HoldoutError, did_you_mean, three_beats
from .holdout import Holdout
from .scores import rows_by_group

__all__ = [
    "cell_eval_pair",
]


def cell_eval_pair(
    result: Holdout, *, context: str | None = None, seed: int | None = None
) -> tuple[ad.AnnData, ad.AnnData]:
    """A hold-out as the pair of AnnData that cell-eval compares: predicted and real, both with the same controls.

    ``cell_eval.MetricsEvaluator(predicted, real, control_pert=control, pert_col=perturbation_key)`` then gives
    the numbers of :func:`cellop_nb.score`. cell-eval knows no contexts, so there is one pair per context.

    Parameters
    ----------
    result
        Of :func:`holdout`.
    context
        Which one; None where there is one alone.
    seed
        Of which fit; the first where None.

    Returns
    -------
    (predicted, real) : AnnData
        ``X`` is log1p-CP10k over the genes of the evaluation, (cell, gene) float32; ``obs`` has the perturbation.

    Raises
    ------
    HoldoutError
        For a context that was not held out, or several to choose from.
    """
    questions = result.scores[["question", "context"]].drop_duplicates()
    contexts = list(dict.fromkeys(questions["context"]))
    if context is None and len(contexts) == 1:
        context = contexts[0]
    if context not in contexts:
        fix = did_you_mean(context, contexts) if context else "pass context=..."
        raise HoldoutError(three_beats(f"one of the held-out contexts {contexts[:5]}", repr(context), fix))
    question = questions[questions["context"] == context]["question"].iloc[0]
    fit = next(fit for fit in result.fits if fit.question == question and seed in (None, fit.seed))
    keys, space = keys_of(fit.real), fit.space
    mine = (result.predictions.obs["question"] == question) & (result.predictions.obs["seed"] == fit.seed)

    def side(adata: ad.AnnData, slot: str | None) -> ad.AnnData:
        parts = [(fit.control, None), (adata, slot)]
        rows = [
            np.concatenate([r for pair, r in rows_by_group(a, keys).items() if pair[0] == context])
            for a, _ in parts
        ]
        here = [(a[np.sort(chosen)], slot) for (a, slot), chosen in zip(parts, rows, strict=True)]
        cells = [space.transform(space.select(a, slot)) for a, slot in here]
        obs = pd.concat([a.obs[[keys.perturbation_key]].astype(str) for a, _ in here])
        genes = pd.DataFrame(index=[str(gene) for gene in space.genes])
        return ad.AnnData(np.concatenate(cells), obs=obs, var=genes)

    return side(result.predictions[mine.to_numpy()], "X"), side(fit.real, None)
