"""Predictions in the form that other evaluation software reads."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd

from ..data.contract import context_labels
from ..errors import HoldoutError, did_you_mean, three_beats
from .holdout import Holdout


def cell_eval_pair(
    result: Holdout,
    *,
    context: str | None = None,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
) -> tuple[ad.AnnData, ad.AnnData]:
    """A hold-out as the pair of AnnData that cell-eval compares: predicted and real, both with the same controls.

    ``cell_eval.MetricsEvaluator(predicted, real, control_pert=control, pert_col=perturbation_key)`` then gives
    the numbers of :func:`cellop_nb.evaluate`. cell-eval knows no contexts, so there is one pair per context.

    Parameters
    ----------
    result
        Of :func:`holdout`.
    context
        Which one; None where there is one alone.

    Returns
    -------
    (predicted, real) : AnnData
        ``X`` is log1p-CP10k over the genes of the evaluation, (cell, gene) float32; ``obs`` has the perturbation.

    Raises
    ------
    HoldoutError
        For a context that was not held out, or several to choose from.
    """
    contexts = list(dict.fromkeys(context_labels(result.real, context_key)))
    if context is None and len(contexts) == 1:
        context = contexts[0]
    if context not in contexts:
        fix = did_you_mean(context, contexts) if context else "pass context=..."
        raise HoldoutError(three_beats(f"one of the held-out contexts {contexts[:5]}", repr(context), fix))

    def side(adata, layer: str | None) -> ad.AnnData:
        parts = [(result.control, layer), (adata, layer if adata is result.real else None)]
        here = [(a[(context_labels(a, context_key) == context).to_numpy()], slot) for a, slot in parts]
        cells = [result.space.transform(result.space.select(a, slot)) for a, slot in here]
        obs = pd.concat([a.obs[[perturbation_key]].astype(str) for a, _ in here])
        genes = pd.DataFrame(index=[str(gene) for gene in result.space.genes])
        return ad.AnnData(np.concatenate(cells), obs=obs, var=genes)

    return side(result.predictions, layer), side(result.real, layer)
