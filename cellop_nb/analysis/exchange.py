"""Predictions in the form that other evaluation software reads, and the numbers of that software."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from ..data.contract import counts as raw_counts
from ..data.contract import keys_of
from ..errors import DataError, HoldoutError, LabelError, checked, did_you_mean
from ..packages import require, same_threads
from .scores import rows_by_group

__all__ = [
    "cell_eval2",
    "cell_eval_pair",
    "vcc2026",
]

TARGET, NON_TARGETING = "target", "non-targeting"
VCC2026 = (
    "pds_cosine",
    "expr_mse_unbiased_capped_norm",
    "de_wilcoxon_direction_fidelity_yield_raw",
    "de_wilcoxon_direction_reach_raw",
    "de_wilcoxon_sig_jaccard",
    "de_wilcoxon_lfc_nmae",
)
"""The six scored metrics of the Virtual Cell Challenge 2026, as cell-eval2 names them."""


class HeldOut(Protocol):
    """What is read of the result of :func:`cellop_nb.holdout`, which itself calls :func:`vcc2026`."""

    scores: pd.DataFrame
    predictions: ad.AnnData
    fits: Any


@checked
def cell_eval_pair(
    result: HeldOut, *, context: str | None = None, seed: int | None = None
) -> tuple[ad.AnnData, ad.AnnData]:
    """A hold-out as the pair of AnnData that cell-eval compares: predicted and real, both with the same controls.

    ``cell_eval.MetricsEvaluator(predicted, real, control_pert=control, pert_col=perturbation_key)`` then gives
    the numbers of :func:`cellop_nb.score`. cell-eval knows no contexts, so there is one pair per context.

    Parameters
    ----------
    result
        Of :func:`cellop_nb.holdout`.
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
    LabelError
        For a context that was not held out, or several to choose from.
    """
    questions = result.scores[["question", "context"]].drop_duplicates()
    contexts = list(dict.fromkeys(questions["context"]))
    context = _one_context(context, contexts, "held-out")
    question = questions[questions["context"] == context]["question"].iloc[0]
    fit = next(fit for fit in result.fits if fit.question == question and seed in (None, fit.seed))
    keys, space = keys_of(fit.real), fit.space
    mine = (result.predictions.obs["question"] == question) & (result.predictions.obs["seed"] == fit.seed)

    def here(adata: ad.AnnData, slot: str | None) -> ad.AnnData:
        rows = [rows for pair, rows in rows_by_group(adata, keys).items() if pair[0] == context]
        some = adata[np.sort(np.concatenate(rows))]
        obs, genes = some.obs[[keys.perturbation_key]].astype(str), pd.Index(space.genes).astype(str)
        return ad.AnnData(space.transform(space.select(some, slot)), obs=obs, var=pd.DataFrame(index=genes))

    sides = here(result.predictions[mine.to_numpy()], "X"), here(fit.real, None)
    control = here(fit.control, None)
    predicted, real = (ad.concat([control, side]) for side in sides)
    return predicted, real


def _one_context(context: str | None, contexts: list[str], kind: str) -> str:
    """The context that is asked for, or the only one."""
    chosen = contexts[0] if context is None and len(contexts) == 1 else context
    if chosen not in contexts:
        fix = did_you_mean(chosen, contexts) if chosen else "pass context=..."
        raise LabelError(f"one of the {kind} contexts {contexts[:5]}", repr(chosen), fix)
    return chosen


def cell_eval2(
    predicted: ad.AnnData, real: ad.AnnData, *, context: str | None = None, folder: str | Path | None = None
) -> tuple[ad.AnnData, ad.AnnData]:
    """Predicted and real cells of one context as cell-eval2 reads them: raw counts over all genes, its labels.

    ``cell-eval2 run -ap pred.h5ad -ar real.h5ad --preset vcc2026`` then scores the files; :func:`vcc2026` does it here.
    Both sides carry the same control cells, as its validator wants them.

    Parameters
    ----------
    predicted
        Predicted counts (cell, gene) in ``X``, with the label columns of `real` in ``obs``.
    real
        A screen that was set up, with real cells and controls of the context.
    context
        Which one; None where the predictions are of one alone.
    folder
        Where to write ``pred.h5ad`` and ``real.h5ad``; nowhere where None.

    Returns
    -------
    (predicted, real) : AnnData
        ``X`` (cell, gene) float32 counts over all genes of `real`; ``obs["target"]`` has the perturbation, controls are
        "non-targeting". Only perturbations on both sides.

    Raises
    ------
    HoldoutError
        No group of the context is on both sides, or it has no controls.
    LabelError
        For a context that was not predicted, or a gene of `real` that is not predicted.
    DataError
        Predictions that are not whole numbers of at least 0.
    """
    keys = keys_of(real)
    rows = [rows_by_group(adata, keys) for adata in (predicted, real)]
    contexts = sorted({c for c, p in rows[0] if p != keys.control})
    context = _one_context(context, contexts, "predicted")
    shared = [(c, p) for c, p in rows[0] if c == context and p != keys.control and (c, p) in rows[1]]
    control = rows[1].get((context, keys.control))
    if not shared or control is None:
        problem = f"{len(shared)} groups on both sides and {'no controls' if control is None else 'controls'}"
        fix = "give real cells and controls of the predicted groups"
        raise HoldoutError(f"groups and controls of {context!r}", problem, fix)
    column = predicted.var_names.get_indexer(real.var_names)
    if (column < 0).any():
        lost = real.var_names[column < 0]
        fix = f"predict all genes of the screen ({did_you_mean(lost[0], predicted.var_names)})"
        raise LabelError("all genes of the screen", f"{len(lost)} missing, first {lost[0]!r}", fix)
    guess = sparse.csr_matrix(raw_counts(predicted)[:, column])
    if (guess.data < 0).any() or (guess.data != np.rint(guess.data)).any():
        fix = "draw counts; logarithms and expected counts are refused by cell-eval2, too"
        raise DataError("whole counts predicted in X", "other numbers", fix)
    truth = sparse.csr_matrix(raw_counts(real, keys.layer))

    def side(values: sparse.csr_matrix, by_group: dict) -> ad.AnnData:
        parts = [truth[control], *(values[by_group[pair]] for pair in shared)]
        labels = np.repeat([NON_TARGETING, *(p for _, p in shared)], [part.shape[0] for part in parts])
        obs = pd.DataFrame({TARGET: labels}, index=[f"cell {k}" for k in range(len(labels))])
        var = pd.DataFrame(index=[str(gene) for gene in real.var_names])
        return ad.AnnData(sparse.csr_matrix(sparse.vstack(parts), dtype=np.float32), obs=obs, var=var)

    pair = side(guess, rows[0]), side(truth, rows[1])
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, adata in zip(("pred", "real"), pair, strict=True):
            adata.write_h5ad(Path(folder) / f"{name}.h5ad")
    return pair


@checked
@same_threads()
def vcc2026(
    predicted: ad.AnnData,
    real: ad.AnnData,
    *,
    context: str | None = None,
    n_splits: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """The six metrics of the Virtual Cell Challenge 2026, computed by cell-eval2 and put on its scale.

    .. math:: (v - b) / (r - b)

    with the value v of the prediction, b of the mean response of the context, and r of one half of the real cells as the
    prediction of the other: 0 is the mean response, 1 a replicate. The linear scale alone: the challenge also clips and
    penalises. Labels that are no gene of the screen have no target gene to leave out.

    Parameters
    ----------
    predicted, real, context
        As :func:`cell_eval2`.
    n_splits
        Random halvings behind r.

    Returns
    -------
    DataFrame
        ``metric, value, raw, mean_response, replicate, reason``, one row per metric; NaN and a reason where a scale does
        not exist, such as discrimination among too few perturbations.

    Raises
    ------
    MissingExtraError
        Where cell-eval2 is not installed (the extra "evaluation").

    References
    ----------
    Arc Institute, cell-eval2, preset ``vcc2026``.
    """
    require("cell_eval2", "evaluation", of="the metrics of the challenge")
    import cell_eval2 as package
    from cell_eval2.anchor import compute_replicate_anchor

    guess, truth = cell_eval2(predicted, real, context=context)
    labels = truth.obs[TARGET].unique()
    genes = {label: label if label in truth.var_names else None for label in labels if label != NON_TARGETING}
    config = replace(
        package.EvalConfig.from_preset("vcc2026"),
        num_threads=1,
        device="cpu",
        cache_strict=False,
        target_gene_map=genes,
    )
    config = replace(config, de=replace(config.de, backend="scanpy"))
    raw = package.aggregate_metrics(package.compute_metrics(guess, truth, config=config))
    base = package.build_generic_baseline(truth, config=config, seed=seed, allow_degenerate=True).results
    base = package.aggregate_metrics(base)
    values, why = {"raw": _by_metric(raw, "mean"), "mean_response": _by_metric(base, "mean")}, ""
    try:
        anchor = compute_replicate_anchor(truth, config=config, base_seed=seed, n_splits=n_splits)[1]
        values["replicate"] = _by_metric(anchor, "replicate")
    except ValueError as refusal:
        why, values["replicate"] = f"no replicate: {str(refusal).splitlines()[0]}", {}
    rows, otherwise = [], "undefined for these groups, or a replicate is no better"
    for metric in VCC2026:
        row = {name: float(column.get(metric, np.nan)) for name, column in values.items()}
        head = row["replicate"] - row["mean_response"]
        scaled = (row["raw"] - row["mean_response"]) / head if abs(head) > 1e-9 else np.nan
        reason = "" if np.isfinite(scaled) else why or otherwise
        rows.append({"metric": metric, "value": scaled, **row, "reason": reason})
    return pd.DataFrame(rows)


def _by_metric(frame, column: str) -> dict[str, float]:
    """Metric to value of a polars frame."""
    pairs = zip(frame["metric"].to_list(), frame[column].to_list(), strict=True)
    return {name: np.nan if value is None else value for name, value in pairs}
