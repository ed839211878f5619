"""Score experiments: predicted AnnData against real ones, and hold-outs in which every method runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from ..data.contract import context_labels, obs_labels
from ..display import Scores
from ..errors import DataError, HoldoutError, did_you_mean, three_beats
from .baselines import BASELINES, run
from .library import measured_totals
from .noise import noise
from .score_table import table_of
from .scores import METRICS, Truth, score, shared_shift
from .space import EvaluationSpace, evaluation_genes, log1p_cp10k
from .targets import Baseline, Prediction, Screen, Target

__all__ = [
    "METRICS",
    "EvaluationSpace",
    "Truth",
    "evaluate",
    "log1p_cp10k",
    "noise",
    "score",
    "score_contexts",
    "score_holdout",
    "score_split",
]

logger = logging.getLogger("cellop_nb")


def evaluate(
    predicted: AnnData,
    real: AnnData,
    control: AnnData,
    *,
    space: EvaluationSpace,
    metrics: Iterable[str] | None = None,
    method: str = "prediction",
    training: Screen | None = None,
    layer: str | None = None,
    predicted_layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    max_cells: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predicted cells against the real ones of the same (context, perturbation) group.

    Parameters
    ----------
    predicted, real, control : AnnData
        Raw counts: sampled predictions, real perturbed cells, and the control cells of the same contexts.
    space : EvaluationSpace
        Fitted on training cells only.
    metrics : names, optional
        All of :data:`METRICS` and "discrimination" (PDS) by default.
    method : str
        Name of the prediction in the column `method`.
    training : Screen, optional
        Training cells in this space; without them the Systema correlation is undefined.
    layer, predicted_layer : str, optional
        Where the counts of (real and control) and of predicted cells are.
    max_cells : int
        Cells a side in the energy distance; more are subsampled (seeded).

    Returns
    -------
    DataFrame
        ``context, perturbation, group, method, metric, value, reason``: rows for `method`, and for the
        noise floor and ceiling of the real cells. `e_distance` is Euclidean, U-statistic, in the components of
        `space`.

    Raises
    ------
    HoldoutError
        No group is in both tables, or a group has too few cells.
    """
    keys = {"perturbation_key": perturbation_key, "context_key": context_key}
    truth_rows, guess_rows = _groups(real, **keys), _groups(predicted, **keys)
    _matching(truth_rows, guess_rows)
    contexts = context_labels(control, context_key).to_numpy()
    shift = None if training is None else shared_shift(training)
    truths, guesses = {}, {}
    for (context, perturbation), rows in truth_rows.items():
        start = space.transform(space.select(control[contexts == context], layer))
        counts = space.select(real[rows], layer)
        options = {"shared_shift": shift, "max_cells": max_cells, "seed": seed}
        options |= {"counts": counts, "library": measured_totals(real[rows])}
        truths[context, perturbation] = Truth(space.transform(counts), start, space, **options)
        guess = Prediction(method, reason="no predicted cells of this group")
        if (context, perturbation) in guess_rows:
            cells = predicted[guess_rows[context, perturbation]]
            chosen = space.select(cells, predicted_layer)
            guess = Prediction.of_counts(method, chosen, space, measured_totals(cells))
        guesses[context, perturbation] = guess
    return table_of(truths, {method: guesses}, metrics)


def score_split(
    training: AnnData,
    real: AnnData,
    methods: Mapping[str, Baseline] | None = None,
    *,
    space: EvaluationSpace | None = None,
    genes: Sequence[str] | None = None,
    metrics: Iterable[str] | None = None,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    max_cells: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Run every method on every held-out group of `real`, starting from the training controls of its context.

    Parameters
    ----------
    training, real : AnnData
        Raw counts of the training cells (with the controls of all contexts) and of the held-out perturbed
        cells.
    methods : mapping of name to ``(Screen, Target) -> Prediction``
        Beside, or in place of, :data:`~cellop_nb.analysis.baselines.BASELINES` (the default). `Screen.adata`,
        `Target.adata` and `Target.space` hold what a model needs.
    space : EvaluationSpace, optional
        Fitted on `training` by default, over `genes`, or over the variable genes of `training`.

    Returns
    -------
    DataFrame
        As :func:`evaluate`. A baseline that the training cells do not determine has NaN and its reason, and so
        have all methods where a group of several has fewer than two cells.

    Raises
    ------
    HoldoutError
        Held-out cells stand in `training` too, or no group has two cells and two controls there.
    """
    _no_leak(training, real)
    keys = {"perturbation_key": perturbation_key, "context_key": context_key}
    if space is None:
        genes = evaluation_genes(training, layer=layer) if genes is None else genes
        space = EvaluationSpace.fit(training, genes=genes, layer=layer, seed=seed)
    counts = space.select(training, layer)
    screen = Screen.of(training, space.transform(counts), control=control, **keys)
    shift, methods = shared_shift(screen), BASELINES if methods is None else methods
    guesses: dict[str, dict] = {name: {} for name in methods}
    truths, unscored = {}, {}
    for group, rows in _groups(real, **keys).items():
        if group[1] == control:
            continue
        start = np.flatnonzero(screen.rows(group[0], control))
        if min(len(rows), len(start)) < 2:
            found = f"{len(rows)} held-out cells and {len(start)} training control cells in {group[0]!r}"
            unscored[group] = f"{found}; 2 of each are needed"
            continue
        held = space.select(real[rows], layer)
        options = {"shared_shift": shift, "max_cells": max_cells, "seed": seed}
        options |= {"counts": held, "library": measured_totals(real[rows])}
        truths[group] = Truth(space.transform(held), screen.cells[start], space, **options)
        target = Target(*group, screen.cells[start], counts[start], training[start], space)
        for name, rule in methods.items():
            guesses[name][group] = run(name, rule, screen, target)
    if not truths:
        found = "; ".join(f"{', '.join(group)}: {reason}" for group, reason in unscored.items()) or "no group"
        fix = "hold out a larger group, and keep its controls in training"
        raise HoldoutError(three_beats("held-out cells and controls to start from", found, fix))
    return table_of(truths, guesses, metrics, unscored)


def score_holdout(
    adata: AnnData,
    methods: Mapping[str, Baseline] | None = None,
    *,
    context: str,
    perturbation: str,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    **options,
) -> pd.DataFrame:
    """Hold out one (context, perturbation) group and score every method on it; `options` as
    :func:`score_split`.

    With ``genes=None`` the variable genes are chosen without the held-out cells.
    """
    contexts = context_labels(adata, context_key).to_numpy()
    perturbations = obs_labels(adata, perturbation_key).to_numpy()
    held = (contexts == context) & (perturbations == perturbation)
    if not held.any() or perturbation == options.get("control", "control"):
        known = sorted(set(zip(contexts, perturbations, strict=True)))
        hint = did_you_mean(f"{context}, {perturbation}", [", ".join(group) for group in known])
        found = f"{int(held.sum())} cells of {perturbation!r} in {context!r}"
        raise HoldoutError(three_beats("a perturbed group to hold out", found, hint))
    keys = {"perturbation_key": perturbation_key, "context_key": context_key}
    return score_split(adata[~held], adata[held], methods, **keys, **options)


def score_contexts(
    adata: AnnData,
    methods: Mapping[str, Baseline] | None = None,
    *,
    perturbation: str,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    **options,
) -> pd.DataFrame:
    """Hold out this perturbation in each context in turn: the tables of :func:`score_holdout` together."""
    perturbed = obs_labels(adata, perturbation_key).to_numpy() == perturbation
    contexts = sorted(context_labels(adata, context_key)[perturbed].unique())
    if len(contexts) < 2:
        found = f"{len(contexts)} with {perturbation!r}"
        raise HoldoutError(
            three_beats("two contexts or more, to leave one out", found, "name another perturbation")
        )
    keys = {"perturbation": perturbation, "perturbation_key": perturbation_key, "context_key": context_key}
    tables = [score_holdout(adata, methods, context=context, **keys, **options) for context in contexts]
    return Scores(pd.concat(tables, ignore_index=True))


def _groups(adata: AnnData, *, perturbation_key: str, context_key) -> dict[tuple[str, str], np.ndarray]:
    """Rows of each (context, perturbation) group, sorted by name."""
    labels = pd.DataFrame({"c": context_labels(adata, context_key), "p": obs_labels(adata, perturbation_key)})
    return dict(sorted(labels.groupby(["c", "p"]).indices.items()))


def _matching(real: Mapping, predicted: Mapping) -> None:
    if not set(real) & set(predicted):
        found = f"predicted {list(predicted)[:4]}, real {list(real)[:4]}"
        raise HoldoutError(
            three_beats("at least one group both predicted and real", found, "check the labels in obs")
        )
    extra = sorted(set(predicted) - set(real))
    if extra:
        logger.warning("evaluate: no real cells for %d predicted groups, such as %s", len(extra), extra[0])


def _no_leak(training: AnnData, real: AnnData) -> None:
    shared = training.obs_names.intersection(real.obs_names)
    if len(shared):
        found = f"{len(shared)} cells in both, such as {shared[0]!r}"
        raise HoldoutError(
            three_beats("held-out cells that are not in training", found, "split the cells first")
        )
    if real.n_obs == 0:
        raise DataError(three_beats("held-out cells", "none", "check the hold-out"))
