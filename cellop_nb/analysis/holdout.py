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

from ..data.contract import label_table, obs_labels
from ..data.counts import require_in_memory
from ..data.groups import Groups, evenly
from ..display import Scores
from ..errors import CellopError, HoldoutError, LabelError, checked, did_you_mean
from ..models.operators import perturbation_parts
from ..models.vae import NBVAE
from ..packages import require
from .baselines import BASELINES, Method, Prediction, Target, Training, linear_features
from .cellop import CellOp, shared_out
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

    def behind(self, metric: str = "e_distance") -> pd.DataFrame:
        """Groups where CellOp is farther from the truth than the best baseline, by more than a tenth of it and of a unit.

        Parameters
        ----------
        metric
            One that is smaller where the prediction is better; means over seeds.

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
        worse = table["excess"] > np.maximum(0.1 * best.abs(), 0.1)
        return table[worse].sort_values("excess", ascending=False).rename_axis("group").reset_index()

    def _repr_html_(self) -> str:
        return self.summary(self.scores["metric"].iloc[0]).to_html(float_format="%.3f", max_rows=40)


@checked
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
    adata, metrics = model.adata, None if metrics is None else known_metrics(metrics)
    only = [only] if isinstance(only, str) else only
    require_in_memory(adata)
    check_names(methods or {}, (*BASELINES, LATENT_SHIFT, AFFINE, LINEAR_FEATURES, CELLOP))
    if suite is not None:
        if suite not in SUITES:
            raise LabelError(f"a suite of {[*SUITES]}", repr(suite), did_you_mean(suite, SUITES))
        require("cell_eval2", "evaluation", of=f"suite={suite!r}")
    questions, refused = questions_of(adata, over, described=model.features is not None)
    if only is not None:
        names = [*(question.name for question in questions), *(row["question"] for row in refused)]
        unknown = [name for name in only if name not in names]
        if unknown:
            fix = did_you_mean(unknown[0], names)
            raise LabelError(f"questions over {over!r}", repr(unknown[0]), fix)
        questions = [question for question in questions if question.name in only]
        refused = [row for row in refused if row["question"] in only] or refused
    if not questions:
        problem = "; ".join(f"{row['question']}: {row['reason']}" for row in refused) or "none"
        fix = "hold out something else (over=...)"
        raise HoldoutError(f"something to hold out over {over!r}", problem, fix)
    shared: dict = {}  # what questions have in common; of workers each has its own
    tasks = [(_some_groups(question), seed + k, shared) for question in questions for k in range(n_seeds)]
    work = partial(_answer, methods=methods or {}, metrics=metrics, suite=suite)
    results = shared_out(client, work, model, tasks)
    return _pooled(list(tqdm(results, desc="hold-outs", total=len(tasks), disable=not progress)), refused)


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
        raise LabelError(f"no column of obs named {WAYS}, which are ways to hold out", repr(over), fix)
    if over == "perturbation" and not described:
        fix = "pass holdout(CellOp(adata, features=...), over='perturbation')"
        raise HoldoutError("descriptors of perturbations that were never measured", "no features", fix)
    if over not in WAYS and over not in adata.obs:
        fix = did_you_mean(over, [*WAYS, *map(str, adata.obs.columns)])
        raise LabelError(f"a way to hold out, {WAYS}, or a column of obs", repr(over), fix)
    questions, refused = [], []
    for question in _every_question(adata, groups, over):
        if reason := _refusal(groups, question):
            refused.append({"question": question.name, "seed": np.nan, "reason": reason})
        else:
            questions.append(question)
    return questions, refused


def _every_question(adata: ad.AnnData, groups: Groups, over: str) -> Iterator[Question]:
    pairs = groups.pairs
    if over not in WAYS:
        labels, perturbed = obs_labels(adata, over).to_numpy(), _mask(adata, groups, pairs)
        for label in sorted(set(labels[perturbed])):
            here = labels == label
            some = [pair for pair in pairs if here[groups.rows(*pair)].any()]
            yield Question(label, here & perturbed, some, here)
        return
    if over == "context":
        sets = {context: [pair for pair in pairs if pair[0] == context] for context, _ in pairs}
    elif over == "group":
        sets = {", ".join(pair): [pair] for pair in pairs}
    else:  # a perturbation is left out with its combinations
        parts = {name: groups.parts(name) for name in groups.perturbations}
        several = over == "combination"
        sets = {
            name: [(c, p) for c, p in pairs if p == name or (not several and name in parts[p])]
            for name in parts
            if (len(parts[name]) > 1) == several
        }
    for name, out in sets.items():
        alone = [pair for pair in out if over != "perturbation" or pair[1] == name]
        yield Question(name, _mask(adata, groups, out), alone)


def _mask(adata: ad.AnnData, groups: Groups, pairs: Iterable[tuple[str, str]]) -> np.ndarray:
    """(cell,) mask of the cells of some groups."""
    mask = np.zeros(adata.n_obs, dtype=bool)
    for pair in pairs:
        mask[groups.rows(*pair)] = True
    return mask


def _refusal(groups: Groups, question: Question) -> str:
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
    source = fitted.fit(progress=False)
    if question.source is not None:
        source = fitted.on(adata[question.source & ~question.left_out].copy())
    space = EvaluationSpace.fit(train, genes=fitted.genes, seed=seed)
    cells: dict[tuple[str, str], ad.AnnData] = {}

    def by_cellop(training: Training, target: Target) -> Prediction:
        pair = target.context, target.perturbation
        cells[pair] = _defined(
            source.predict, _asked(fitted, real, *pair, len(source.control_rows(pair[0]))), seed=seed
        )
        return Prediction.of_adata(CELLOP, cells[pair], space)

    rules: dict[str, Method] = {
        **BASELINES,
        LATENT_SHIFT: partial(latent_shift, model=fitted),
        AFFINE: partial(affine_operator, model=fitted),
        **methods,
    }
    if model.features is not None:
        rules[LINEAR_FEATURES] = partial(linear_features, features=model.features)
    rules[CELLOP] = by_cellop
    scores, scored = score_rules(
        rules,
        question.pairs,
        Training.of(train, space),
        real,
        lambda context: source.adata[source.control_rows(context)],
        space,
        metrics=metrics,
        seed=seed,
    )
    contexts = sorted({context for context, _ in scored})
    pooled = ad.concat(cells.values(), merge="same") if cells else None
    starts = np.concatenate([source.control_rows(context) for context in contexts])
    fit = Fit(question.name, seed, space, fitted.vae, real, source.adata[starts].copy())
    if suite is not None and pooled is not None:
        some = adata[question.left_out | adata.obs_names.isin(fit.control.obs_names)]
        rows = [_suite_rows(suite, pooled, some, context) for context in contexts]
        scores = pd.concat([scores, *rows], ignore_index=True)
    return {"scores": scores, "cells": pooled, "choice": fitted.choice.table, "fit": fit}


def _asked(model: CellOp, real: ad.AnnData, context: str, perturbation: str, n_cells: int) -> pd.DataFrame:
    """The conditions of a group: one, or one of every dose that its real cells have, with its share of the cells."""
    asked = pd.DataFrame({"context": [context], "perturbation": [perturbation]})
    if perturbation not in model.curves:
        return asked
    labels = label_table(real, model.keys)
    own = labels[(labels["context"] == context) & (labels["perturbation"] == perturbation)]
    sizes = (own["dose"].value_counts(normalize=True).sort_index() * n_cells).round().clip(lower=1)
    return asked.merge(sizes.astype(int).rename("n_cells").reset_index(), how="cross")


def _defined(ask, *args, **question):
    """What a model says; a refusal is a reason in the table."""
    try:
        return ask(*args, **question)
    except CellopError as refusal:
        raise Undefined(str(refusal)) from None


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
    operator = _defined(model.operator, context=target.context, perturbation=target.perturbation)
    z = Start.of(modelled_counts(target.adata, model.vae, model.keys), model.vae).z
    counts = model.fresh(target.adata, (operator(z) - z).cpu().numpy())
    return Prediction.of_counts(AFFINE, counts, target.space, target.library)


def _pooled(results: list[dict], refused: list[dict]) -> Holdout:
    """All answers in one table each, with question and seed."""
    refused = refused + [result for result in results if "reason" in result]
    results = [result for result in results if "scores" in result]
    if not results:
        problem = "; ".join(f"{row['question']}: {row['reason']}" for row in refused)
        raise HoldoutError("a hold-out that the data allow", problem, "change the hold-out")
    tables: dict[str, list] = {"scores": [], "choice": []}
    cells, several = [], len({result["seed"] for result in results}) > 1
    for result in results:
        question, seed = result["question"], result["seed"]
        for name, parts in tables.items():
            parts.append(pd.DataFrame(result[name]).assign(question=question, seed=seed))
        if result["cells"] is not None:
            result["cells"].obs = result["cells"].obs.assign(question=question, seed=seed)
            if several:
                result["cells"].obs_names += f", seed {seed}"
            cells.append(result["cells"])
    scores, choices = (pd.concat(parts, ignore_index=True) for parts in tables.values())
    first = ["question", "seed"]
    return Holdout(
        scores[[*first, *(column for column in scores if column not in first)]],
        ad.concat(cells, merge="same", index_unique=None) if cells else ad.AnnData(),
        choices,
        pd.DataFrame(refused, columns=[*first, "reason"]),
        [result["fit"] for result in results],
    )
