"""Hold measured cells out, fit a `CellOp` without them, predict them from controls, and score it beside the baselines."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..data.contract import obs_labels
from ..data.counts import measured_totals, require_in_memory
from ..data.groups import Groups, evenly
from ..display import Scores
from ..errors import CellopError, HoldoutError, LabelError, did_you_mean, three_beats
from ..models.operators import perturbation_parts
from ..models.vae import NBVAE
from ..packages import require
from .baselines import BASELINES, Method, Prediction, Target, Training, linear_features
from .cellop import CellOp
from .exchange import vcc2026
from .metrics import EvaluationSpace, Undefined
from .predict import Start, modelled_counts
from .scores import check_names, known_metrics, score_rules

logger = logging.getLogger("cellop_nb")

CELLOP, LATENT_SHIFT, AFFINE = "CellOp", "latent shift", "affine operator"
LINEAR_FEATURES = "linear features"
SUITES = {"vcc2026": vcc2026}
WAYS = ("context", "group", "perturbation", "combination")

MOST_GROUPS = 64
"""Groups of a question that are predicted and scored; of more, so many, evenly spread, and a log message says so."""

FEWEST_CELLS = 4
"""Held-out cells that an energy distance and its noise floor need."""


@dataclass(frozen=True)
class Question:
    """What is left out together, and what is then asked.

    Attributes
    ----------
    name : what a person calls it
    left_out : (cell,) mask of the cells that take no part in fitting
    pairs : (context, perturbation) to predict
    source : (cell,) mask of the control cells to start from; None for all of the context
    """

    name: str
    left_out: np.ndarray = field(repr=False)
    pairs: list[tuple[str, str]]
    source: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Fit:
    """What one fit leaves for a closer look: the space of its scores, its VAE, the real cells and the controls."""

    question: str
    seed: int
    space: EvaluationSpace
    vae: NBVAE
    real: ad.AnnData
    control: ad.AnnData


@dataclass(frozen=True, eq=False)
class Holdout:
    """What :func:`holdout` gives back.

    Attributes
    ----------
    scores : DataFrame
        ``question, seed, context, perturbation, group, method, metric, value, reason``: every method beside the noise
        floor and ceiling of the real cells.
    predictions : AnnData
        Virtual cells of all questions and seeds, with ``obs["question"]`` and ``obs["seed"]``.
    choices : DataFrame
        ``question, seed, estimator, left, weight``: what each fit chose.
    refused : DataFrame
        ``question, seed, reason``: questions that could not be asked, and why.
    fits : list of Fit
        One per question and seed.
    """

    scores: pd.DataFrame
    predictions: ad.AnnData
    choices: pd.DataFrame
    refused: pd.DataFrame
    fits: list[Fit] = field(default_factory=list, repr=False)

    @property
    def table(self) -> pd.DataFrame:
        """A row per group, method and seed, with every metric as a column."""
        index = ["question", "context", "perturbation", "group", "method", "seed"]
        wide = self.scores.pivot_table(
            index=index, columns="metric", values="value", sort=False, dropna=False, observed=True
        )
        wide = wide.dropna(how="all").reset_index().rename_axis(columns=None)
        metrics = [name for name in dict.fromkeys(self.scores["metric"]) if name in wide]
        return wide[[*index, *metrics]]

    def summary(self, metric: str = "e_distance") -> pd.DataFrame:
        """Groups by methods, the mean over seeds, and a last row with the mean over the groups that all predicted.

        A method that predicted fewer than half of the groups, such as "additive" where few are combinations, has no mean;
        the groups that others lack are left out of every mean. What was left out stands in ``attrs["left_out"]``.
        """
        return Scores(self.scores).summary(metric)

    def behind(self, metric: str = "e_distance", *, share: float = 0.1, margin: float = 0.1) -> pd.DataFrame:
        """Groups where CellOp is farther from the truth than the best baseline, mean over seeds.

        Parameters
        ----------
        metric
            One that is smaller where the prediction is better.
        share, margin
            Reported where CellOp exceeds the baseline by more than this share and by more than this much.

        Returns
        -------
        DataFrame
            ``group, cellop, best_baseline, baseline, excess``, the worst first; empty is good.
        """
        wide = self.summary(metric).iloc[:-1]
        baselines = wide[[name for name in (*BASELINES, LATENT_SHIFT, LINEAR_FEATURES) if name in wide]]
        best = baselines.min(axis=1)
        table = pd.DataFrame(
            {
                "cellop": wide[CELLOP],
                "best_baseline": baselines.idxmin(axis=1),
                "baseline": best,
                "excess": wide[CELLOP] - best,
            }
        )
        worse = table["excess"] > np.maximum(share * best.abs(), margin)
        return table[worse].sort_values("excess", ascending=False).rename_axis("group").reset_index()

    def _repr_html_(self) -> str:
        return self.summary(self.scores["metric"].iloc[0]).to_html(float_format="%.3f", max_rows=40)


def holdout(
    adata: ad.AnnData | CellOp,
    over: str = "context",
    *,
    only: Sequence[str] | None = None,
    methods: Mapping[str, Method] | None = None,
    metrics: Iterable[str] | None = None,
    suite: str | None = None,
    n_seeds: int = 1,
    client=None,
    progress: bool = True,
    seed: int = 0,
) -> Holdout:
    """Hold out measured cells, predict them, and score the predictions beside simple baselines.

    Each question holds cells out, fits a :class:`CellOp` on the rest, predicts the missing cells from controls and
    scores the prediction. A question about hundreds of groups scores 64 of them (:data:`MOST_GROUPS`). Held-out cells
    are not in the data that the model gets, so they cannot reach genes, models, weights or the space of the scores.

    Parameters
    ----------
    adata
        A screen that was set up; or an unfitted :class:`CellOp` on it, whose settings every fit takes.
    over
        What is left out in turn: the perturbed cells of each ``"context"``; each ``"group"`` (context, perturbation) that
        was measured in another context, too; each ``"perturbation"`` everywhere, with its combinations, which
        `features` of the CellOp must then describe; each ``"combination"`` whose parts were measured alone; or a
        column of ``obs``: the perturbed cells of each of its labels, predicted from the controls of the same label.
    only
        Names of the questions to ask; all where None.
    methods
        Further methods to score: name to ``(Training, Target) -> Prediction``.
    metrics
        Names in :data:`cellop_nb.analysis.scores.METRICS`; all where None.
    suite
        "vcc2026": also the six metrics of :func:`cellop_nb.exchange.vcc2026` for CellOp, a row per context, named
        "vcc2026 ..." and scaled to 0 for the mean response and 1 for a replicate.
    n_seeds
        Independent fits of each question, with the seeds `seed`, `seed` + 1, ...
    client
        A Dask client that shares the questions out; the numbers are the same.

    Returns
    -------
    Holdout
        ``.table`` (a row per group, method and seed), ``.summary(metric)``, ``.predictions``.

    Raises
    ------
    HoldoutError
        Where `over` gives nothing that can be asked, with the reason of each refusal.
    LabelError
        For a way, column, question, method or metric that is not known, or data that were not set up.
    """
    model = adata if isinstance(adata, CellOp) else CellOp(adata, seed=seed)
    adata, metrics = model.adata, None if metrics is None else list(metrics)
    require_in_memory(adata)
    known_metrics(metrics)
    check_names(methods or {}, (*BASELINES, LATENT_SHIFT, AFFINE, LINEAR_FEATURES, CELLOP))
    if suite is not None:
        if suite not in SUITES:
            raise LabelError(three_beats(f"a suite of {[*SUITES]}", repr(suite), did_you_mean(suite, SUITES)))
        require("cell_eval2", "evaluation", of=f"suite={suite!r}")
    if n_seeds < 1:
        raise HoldoutError(three_beats("n_seeds of at least 1", str(n_seeds), "pass a positive number"))
    questions, refused = questions_of(adata, over, described=model.features is not None)
    if only is not None:
        names = [*(question.name for question in questions), *(row["question"] for row in refused)]
        unknown = [name for name in only if name not in names]
        if unknown:
            fix = did_you_mean(unknown[0], names)
            raise LabelError(three_beats(f"questions over {over!r}", repr(unknown[0]), fix))
        questions = [question for question in questions if question.name in only]
        refused = [row for row in refused if row["question"] in only] or refused
    if not questions:
        problem = "; ".join(f"{row['question']}: {row['reason']}" for row in refused) or "none"
        fix = "hold out something else (over=...)"
        raise HoldoutError(three_beats(f"something to hold out over {over!r}", problem, fix))
    tasks = [(question, seed + k) for question in questions for k in range(n_seeds)]
    tasks = [(_some_groups(question), seed) for question, seed in tasks]
    work = partial(_answer, methods=methods or {}, metrics=metrics, suite=suite)
    bar = tqdm(total=len(tasks), desc="hold-outs", disable=not progress)
    results = []
    for result in _shared_out(client, work, model, tasks):
        results.append(result)
        bar.update()
    bar.close()
    return _pooled(results, refused)


def _some_groups(question: Question) -> Question:
    """The question about at most MOST_GROUPS of its groups, evenly spread."""
    n = len(question.pairs)
    if n <= MOST_GROUPS:
        return question
    logger.warning("%s: %d of %d groups are scored, evenly spread", question.name, MOST_GROUPS, n)
    return replace(question, pairs=[question.pairs[int(k)] for k in evenly(n, MOST_GROUPS)])


# -- what is asked ----------------------------------------------------------------------------------------------------


def questions_of(
    adata: ad.AnnData, over: str, *, described: bool = False
) -> tuple[list[Question], list[dict]]:
    """The questions over contexts, groups, perturbations, combinations or a column, and those refused with the reason."""
    groups = Groups(adata, min_cells=1)
    keys = groups.keys
    is_key = {"perturbation": keys.perturbation_key == over, "context": keys.context_key == (over,)}
    if over in adata.obs and over in WAYS and not is_key.get(over, False):
        fix = f"rename the column: adata.obs.rename(columns={{{over!r}: ...}})"
        raise LabelError(
            three_beats(f"no column of obs named {WAYS}, which are ways to hold out", repr(over), fix)
        )
    if over == "perturbation" and not described:
        fix = "pass holdout(CellOp(adata, features=...), over='perturbation')"
        raise HoldoutError(
            three_beats("descriptors of perturbations that were never measured", "no features", fix)
        )
    if over in WAYS:
        plans = {
            "context": _contexts,
            "group": _pairs,
            "perturbation": _perturbations,
            "combination": _combinations,
        }
        questions = list(plans[over](adata, groups))
    elif over in adata.obs:
        questions = list(_labels(adata, groups, over))
    else:
        fix = did_you_mean(over, [*WAYS, *map(str, adata.obs.columns)])
        raise LabelError(three_beats(f"a way to hold out, {WAYS}, or a column of obs", repr(over), fix))
    asked, refused = [], []
    for question in questions:
        reason = _refusal(adata, groups, question)
        if reason:
            refused.append({"question": question.name, "seed": np.nan, "reason": reason})
        else:
            asked.append(question)
    return asked, refused


def _mask(adata: ad.AnnData, rows: Iterable[np.ndarray]) -> np.ndarray:
    mask = np.zeros(adata.n_obs, dtype=bool)
    for part in rows:
        mask[part] = True
    return mask


def _contexts(adata, groups: Groups) -> Iterator[Question]:
    for context in dict.fromkeys(c for c, _ in groups.pairs):
        pairs = [pair for pair in groups.pairs if pair[0] == context]
        yield Question(context, _mask(adata, (groups.rows(*pair) for pair in pairs)), pairs)


def _pairs(adata, groups: Groups) -> Iterator[Question]:
    for pair in groups.pairs:
        yield Question(", ".join(pair), _mask(adata, [groups.rows(*pair)]), [pair])


def _perturbations(adata, groups: Groups) -> Iterator[Question]:
    singles = [p for p in groups.perturbations if len(groups.parts(p)) == 1]
    for single in singles:
        out = [pair for pair in groups.pairs if single in groups.parts(pair[1])]
        pairs = [pair for pair in out if pair[1] == single]
        yield Question(single, _mask(adata, (groups.rows(*pair) for pair in out)), pairs)


def _combinations(adata, groups: Groups) -> Iterator[Question]:
    for label in groups.perturbations:
        if len(groups.parts(label)) > 1:
            pairs = [pair for pair in groups.pairs if pair[1] == label]
            yield Question(label, _mask(adata, (groups.rows(*pair) for pair in pairs)), pairs)


def _labels(adata, groups: Groups, column: str) -> Iterator[Question]:
    labels = obs_labels(adata, column).to_numpy()
    perturbed = _mask(adata, (group.rows for group in groups))
    for label in sorted(set(labels[perturbed])):
        here = labels == label
        pairs = [pair for pair in groups.pairs if here[groups.rows(*pair)].any()]
        yield Question(label, here & perturbed, pairs, here)


def _refusal(adata, groups: Groups, question: Question) -> str:
    """Why a question cannot be asked, before anything is trained; or nothing."""
    sizes = {", ".join(pair): int(question.left_out[groups.rows(*pair)].sum()) for pair in question.pairs}
    if not sizes or max(sizes.values()) < FEWEST_CELLS:
        largest = f"the largest group has {max(sizes.values(), default=0)} cells"
        return f"{largest}; {FEWEST_CELLS} are needed, for the energy distance and its noise floor"
    rest = [group for group in groups if not question.left_out[group.rows].all()]
    if not rest:
        return "no perturbed cells are left for training"
    left = {group.perturbation for group in rest}
    answerable = [p for _, p in question.pairs if set(perturbation_parts(p, left, sorted(left))) <= left]
    if not answerable and question.name not in groups.perturbations:
        return "none of its perturbations was measured elsewhere"
    return ""


# -- one answer -------------------------------------------------------------------------------------------------------


def _answer(model: CellOp, question: Question, seed: int, shared: dict, *, methods, metrics, suite) -> dict:
    """Scores, predictions and choice of one question; a refusal becomes a reason, so that it does not sink the others."""
    labels = {"question": question.name, "seed": seed}
    try:
        return labels | _scored(model, question, seed, shared, methods, metrics, suite)
    except CellopError as refusal:
        return labels | {"reason": str(refusal)}


def _scored(model: CellOp, question: Question, seed: int, shared: dict, methods, metrics, suite) -> dict:
    adata = model.adata
    train, real = adata[~question.left_out].copy(), adata[question.left_out].copy()
    fitted = model.unfitted(train, seed)
    fitted._shared = shared
    fitted.fit(progress=False)
    source = (
        fitted if question.source is None else fitted.on(adata[question.source & ~question.left_out].copy())
    )
    space = EvaluationSpace.fit(train, genes=fitted.genes, seed=seed)
    training = Training.of(train, space)
    cells: dict[tuple[str, str], ad.AnnData] = {}
    latent = {
        LATENT_SHIFT: partial(latent_shift, model=fitted),
        AFFINE: partial(affine_operator, model=fitted),
    }
    rules = {**BASELINES, **latent, **methods}
    if model.features is not None:
        rules[LINEAR_FEATURES] = partial(linear_features, features=model.features)
    rules[CELLOP] = partial(_by_cellop, model=source, cells=cells, seed=seed)
    scores, scored = score_rules(
        rules,
        question.pairs,
        training,
        real,
        lambda context: source.adata[source.control_rows(context)],
        space,
        metrics=metrics,
        seed=seed,
    )
    pooled = ad.concat(cells.values(), merge="same") if cells else None
    starts = np.concatenate([source.control_rows(context) for context in sorted({c for c, _ in scored})])
    fit = Fit(question.name, seed, space, fitted.vae, real, source.adata[starts].copy())
    if suite is not None and pooled is not None:
        chosen = question.left_out | adata.obs_names.isin(source.adata.obs_names[starts])
        rows = [
            _suite_rows(suite, pooled, adata[chosen], context) for context in sorted({c for c, _ in scored})
        ]
        scores = pd.concat([scores, *rows], ignore_index=True)
    return {"scores": scores, "cells": pooled, "choice": fitted.choice.table, "fit": fit}


def _by_cellop(training: Training, target: Target, *, model: CellOp, cells: dict, seed: int) -> Prediction:
    pair = target.context, target.perturbation
    try:
        predicted = model.predict(context=pair[0], perturbation=pair[1], seed=seed)
    except CellopError as refusal:
        raise Undefined(str(refusal)) from None
    cells[pair] = predicted
    return Prediction.of_counts(
        CELLOP, target.space.select(predicted, "X"), target.space, measured_totals(predicted)
    )


def _suite_rows(suite: str, cells: ad.AnnData, real: ad.AnnData, context: str) -> pd.DataFrame:
    """Rows of one context, over all its perturbations."""
    try:
        rows = SUITES[suite](cells, real, context=context)[["metric", "value", "reason"]]
    except CellopError as refusal:
        rows = pd.DataFrame([{"metric": suite, "value": np.nan, "reason": str(refusal)}])
    group = {"context": context, "perturbation": "", "group": context, "method": CELLOP}
    return rows.assign(**group, metric=suite + " " + rows["metric"])


def latent_shift(training: Training, target: Target, *, model: CellOp) -> Prediction:
    r"""scGen's rule: move control latents by the mean latent shift of the other contexts, then draw counts.

    .. math:: x \sim \mathrm{decode}\big(z + \tfrac1C \sum_c (\bar z_{c,p} - \bar z_{c,0})\big)

    References
    ----------
    Lotfollahi, Wolf, Theis 2019, Nat Methods 16:715 (contexts are balanced there by resampling, here by equal weight).
    """
    shift = model.latent_shift(training.others(target), target.perturbation)
    return Prediction.of_counts(LATENT_SHIFT, model.fresh(target.adata, shift), target.space, target.library)


def affine_operator(training: Training, target: Target, *, model: CellOp) -> Prediction:
    r"""The operator alone: control latents moved by its map, then counts drawn as for the latent shift.

    .. math:: x \sim \mathrm{decode}(A z + b)

    What it has over the latent shift, above all after both clouds are centred, is what the matrix adds.
    """
    try:
        operator = model.operator(target.context, target.perturbation)
    except CellopError as refusal:
        raise Undefined(str(refusal)) from None
    z = Start.of(modelled_counts(target.adata, model.vae, model.keys), model.vae).z
    counts = model.fresh(target.adata, (operator(z) - z).cpu().numpy())
    return Prediction.of_counts(AFFINE, counts, target.space, target.library)


def _shared_out(client, work, model: CellOp, tasks: list) -> Iterator[dict]:
    """The results of the tasks in their order, made here or by the workers of a Dask client."""
    if client is None:
        shared: dict = {}
        yield from (work(model, *task, shared) for task in tasks)
        return
    remote = client.scatter(model, broadcast=True, hash=False)
    futures = [client.submit(work, remote, *task, {}, pure=False) for task in tasks]
    try:
        yield from (future.result() for future in futures)
    finally:
        client.cancel(futures)


def _pooled(results: list[dict], refused: list[dict]) -> Holdout:
    def labelled(result: dict, table: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame(table).assign(question=result["question"], seed=result["seed"])

    good = [result for result in results if "scores" in result]
    refused = refused + [
        {"question": r["question"], "seed": r["seed"], "reason": r["reason"]}
        for r in results
        if "reason" in r
    ]
    if not good:
        problem = "; ".join(f"{row['question']}: {row['reason']}" for row in refused)
        raise HoldoutError(three_beats("a hold-out that the data allow", problem, "change the hold-out"))
    cells = []
    for result in good:
        if result["cells"] is not None:
            result["cells"].obs = result["cells"].obs.assign(question=result["question"], seed=result["seed"])
            if len({r["seed"] for r in good}) > 1:
                result["cells"].obs_names += f", seed {result['seed']}"
            cells.append(result["cells"])
    scores = pd.concat([labelled(result, result["scores"]) for result in good], ignore_index=True)
    first = ["question", "seed"]
    return Holdout(
        scores[[*first, *(column for column in scores if column not in first)]],
        ad.concat(cells, merge="same", index_unique=None) if cells else ad.AnnData(),
        pd.concat([labelled(result, result["choice"]) for result in good], ignore_index=True),
        pd.DataFrame(refused, columns=["question", "seed", "reason"]),
        [result["fit"] for result in good],
    )
