"""The table of scores: every method and the noise of the real cells, group by group, in one space."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from ..data.contract import Keys, keys_of, label_table, library_size
from ..data.contract import counts as raw_counts
from ..data.counts import measured_totals, require_in_memory
from ..data.splits import SPLIT_KEY, rows_of
from ..display import Scores
from ..errors import DataError, HoldoutError, LabelError, checked, did_you_mean
from ..models.energy import noise_floor, noise_limit
from ..packages import same_threads
from . import metrics as formulas
from .baselines import BASELINES, Method, Prediction, Target, Training, run
from .metrics import EvaluationSpace, Undefined, log1p_cp10k

logger = logging.getLogger("cellop_nb")

FDR = 0.05
MAX_CELLS = 500
"""Cells a side of an energy distance; more are subsampled (seeded)."""

FLOOR = "noise floor (split half)"
CEILING = "noise ceiling (Spearman-Brown)"
COLUMNS = ["context", "perturbation", "group", "method", "metric", "value", "reason"]
MIN_DISCRIMINATION = 20  # PDS moves in steps of 1/N: with fewer perturbations it says little
N_SPLITS = 10


@same_threads()
def differential(cells: np.ndarray, control: np.ndarray) -> pd.DataFrame:
    """Wilcoxon tests of log1p-CP10k cells (cell, gene) against control cells by scanpy: ``score, p, fdr`` of each gene,
    and ``lfc``, log2 of the ratio of back-transformed means; a mean that a shift made negative counts as 0.
    """
    import scanpy as sc

    both = AnnData(np.concatenate([cells, control]).astype(np.float32))
    both.obs["side"] = pd.Categorical(np.repeat(["cells", "control"], [len(cells), len(control)]))
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # its own fold change of negative means, not used here
        sc.tl.rank_genes_groups(
            both, "side", groups=["cells"], reference="control", method="wilcoxon", tie_correct=True
        )
    ranked = sc.get.rank_genes_groups_df(both, "cells")
    ranked = ranked.set_index(ranked["names"].astype(int)).sort_index().rename_axis(None)
    names = {"scores": "score", "pvals": "p", "pvals_adj": "fdr"}
    table = ranked[[*names]].rename(columns=names).astype(float)
    return table.assign(lfc=_log_fold_change(cells.mean(axis=0), control.mean(axis=0)))


def _log_fold_change(mean: np.ndarray, reference: np.ndarray) -> np.ndarray:
    back = [np.expm1(np.maximum(x, 0.0).astype(np.float64)) + 1e-9 for x in (mean, reference)]
    return np.log2(back[0] / back[1])


@dataclass(frozen=True, eq=False)
class Truth:
    """The real cells of one group, and all that every method is compared with (computed once, on demand).

    Attributes
    ----------
    real, control : (cell, gene) perturbed cells, and control cells of the same context, log1p-CP10k; two or more of each
    counts : (cell, gene) counts of the real cells
    library : (cell,) their counts over all measured genes, where `counts` holds only some of them
    shared_shift : (gene,) mean shift of the training groups; with the control mean it is Systema's reference
    whole : of which this one is a part or a resample: it keeps the whole's ranking of genes
    """

    real: np.ndarray = field(repr=False)
    control: np.ndarray = field(repr=False)
    space: EvaluationSpace
    counts: Any = field(default=None, repr=False)
    library: np.ndarray | None = field(default=None, repr=False)
    shared_shift: np.ndarray | None = field(default=None, repr=False)
    seed: int = 0
    whole: Truth | None = field(default=None, repr=False)

    @classmethod
    def of(cls, real: AnnData, control: AnnData, space: EvaluationSpace, seed: int = 0) -> Truth:
        """The cells of a screen in `space`."""
        library = measured_totals(real)
        return cls(space.cells(real), space.cells(control), space, space.select(real), library, seed=seed)

    @cached_property
    def mean(self) -> np.ndarray:
        return self.real.mean(axis=0, dtype=np.float64)

    @cached_property
    def control_mean(self) -> np.ndarray:
        return self.control.mean(axis=0, dtype=np.float64)

    def points(self, cells: np.ndarray, stream: int = 1) -> np.ndarray:
        """Principal components of at most :data:`MAX_CELLS` of the cells, (cell, component)."""
        rows = np.random.default_rng([self.seed, stream]).permutation(len(cells))[:MAX_CELLS]
        return self.space.project(cells[np.sort(rows)])

    @cached_property
    def real_points(self) -> np.ndarray:
        return self.points(self.real, stream=0)

    @cached_property
    def de(self) -> pd.DataFrame:
        return differential(self.real, self.control)

    @property
    def significant(self) -> np.ndarray:
        return (self.de["fdr"] < FDR).to_numpy()

    @cached_property
    def top_genes(self) -> np.ndarray:
        """Genes of the real cells by falling absolute Wilcoxon score, (gene,) indices."""
        if self.whole is not None:
            return self.whole.top_genes
        return np.argsort(-self.de["score"].abs().to_numpy(), kind="stable")

    @property
    def systema_reference(self) -> np.ndarray:
        if self.shared_shift is None:
            raise Undefined("no perturbed training groups were given, so their mean is unknown")
        return self.control_mean + self.shared_shift


class Scored:
    """A prediction beside the truth, with its differential expression, computed once for the metrics that share it."""

    def __init__(self, prediction: Prediction, truth: Truth) -> None:
        assert prediction.mean is not None, "only what was predicted is scored"
        self.prediction, self.truth, self.mean = prediction, truth, prediction.mean

    @property
    def cells(self) -> np.ndarray:
        if self.prediction.cells is None:
            raise Undefined("needs predicted cells; this method predicts a mean only")
        return self.prediction.cells

    def delta(self, genes=None) -> float:
        return formulas.pearson_delta(self.mean, self.truth.mean, self.truth.control_mean, genes)

    def centred(self) -> np.ndarray:
        """Components of the predicted cells with their mean moved onto that of the real cells: what is left is shape."""
        return self.truth.points(self.cells - self.mean + self.truth.mean)

    def counts(self) -> tuple[Any, Any]:
        if self.truth.counts is None:
            raise Undefined("no real counts")
        if self.prediction.counts is None:
            raise Undefined("needs counts; this method predicts none")
        return self.prediction.counts, self.truth.counts

    def sums(self) -> list[np.ndarray]:
        """Counts of each predicted and each real cell over the genes of the table."""
        return [np.asarray(counts.sum(axis=1)).ravel() for counts in self.counts()]

    def libraries(self) -> Sequence[np.ndarray]:
        """Counts of each predicted and each real cell over all measured genes."""
        predicted, real = self.prediction.library, self.truth.library
        if real is None:
            return self.sums()
        if predicted is None:
            raise Undefined("needs counts over all measured genes; this method predicts none")
        return predicted, real

    @cached_property
    def de(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Arguments of the gene-set metrics: predicted and real (lfc, significant)."""
        if len(self.cells) < 2:
            raise Undefined("differential expression needs two predicted cells")
        table, real = differential(self.cells, self.truth.control), self.truth
        predicted = table["lfc"].to_numpy(), (table["fdr"] < FDR).to_numpy()
        return *predicted, real.de["lfc"].to_numpy(), real.significant

    def lfc(self, n: int | None = None) -> tuple:
        """Arguments of the fold-change metrics, of the n genes that differ most or all; a mean alone has them, too."""
        truth, leading = self.truth, np.zeros(len(self.mean), dtype=bool)
        leading[truth.top_genes[:n]] = True
        predicted = _log_fold_change(self.mean, truth.control_mean)
        return predicted, truth.de["lfc"].to_numpy(), truth.significant & leading


METRICS: dict[str, Callable[[Scored], float]] = {
    "e_distance": lambda s: formulas.e_distance(s.truth.points(s.cells), s.truth.real_points),
    "e_distance_centred": lambda s: formulas.e_distance(s.centred(), s.truth.real_points),
    "pearson_delta": Scored.delta,
    "pearson_delta_de20": lambda s: s.delta(s.truth.top_genes[:20]),
    "pearson_delta_de100": lambda s: s.delta(s.truth.top_genes[:100]),
    "pearson_systema": lambda s: formulas.pearson_delta(s.mean, s.truth.mean, s.truth.systema_reference),
    "mae": lambda s: formulas.mae(s.mean, s.truth.mean),
    "rmse": lambda s: formulas.rmse(s.mean, s.truth.mean),
    "l2_top1000": lambda s: formulas.l2_top_expressed(s.mean, s.truth.mean, s.truth.control_mean),
    "r2_determination": lambda s: formulas.coefficient_of_determination(s.mean, s.truth.mean),
    "r2_pearson_squared": lambda s: formulas.squared_pearson(s.mean, s.truth.mean),
    "direction_match_de50": lambda s: formulas.direction_match(*s.lfc(50)),
    "direction_match": lambda s: formulas.direction_match(*s.lfc()),
    "lfc_spearman": lambda s: formulas.lfc_spearman(*s.lfc()),
    "precision_at_50": lambda s: formulas.precision_at_k(*s.de, k=50),
    "de_score": lambda s: formulas.de_score(*s.de),
    "library_ratio": lambda s: formulas.ratio_of_means(*s.libraries()),
    "counts_ratio": lambda s: formulas.ratio_of_means(*s.sums()),
    "zero_fraction_difference": lambda s: formulas.zero_fraction_difference(*s.counts()),
    "zero_error_de100": lambda s: formulas.zero_error(*s.counts(), s.truth.top_genes[:100]),
    "variance_ratio_de100": lambda s: formulas.variance_ratio(s.cells, s.truth.real, s.truth.top_genes[:100]),
    "classifier_auc": lambda s: formulas.classifier_auc(s.truth.points(s.cells), s.truth.real_points),
}
PDS = "discrimination"  # over all perturbations of a context, so it stands beside the table of single groups
SHARE = "replicate_share"  # of one method beside the others, likewise
BESIDE = (PDS, SHARE)


def known_metrics(metrics: Iterable[str] | None) -> list[str]:
    """Names of metrics, all of them for None; an unknown one is refused."""
    every = [*METRICS, *BESIDE]
    names = every if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in every:
            raise LabelError("names of metrics", repr(name), did_you_mean(name, every))
    return names


def score_prediction(
    prediction: Prediction, truth: Truth, metrics: Iterable[str] | None = None
) -> list[dict]:
    """Score one prediction: rows ``method, metric, value, reason``; NaN and a reason where undefined."""
    names = [name for name in known_metrics(metrics) if name in METRICS]
    if prediction.mean is None:
        reason = prediction.reason or "nothing was predicted"
        return [_row(prediction.method, name, np.nan, reason) for name in names]
    scored = Scored(prediction, truth)
    return [_defined(prediction.method, name, partial(METRICS[name], scored)) for name in names]


def _row(method: str, metric: str, value: float, reason: str = "") -> dict:
    return {"method": method, "metric": metric, "value": value, "reason": reason}


def _defined(method: str, metric: str, value: Callable[[], float]) -> dict:
    """A row of the table; NaN and the reason where the value is undefined."""
    try:
        return _row(method, metric, float(value()))
    except Undefined as refusal:
        return _row(method, metric, np.nan, str(refusal))


# what the score of one half against the other says about a perfect prediction
_BOUNDS: dict[str, tuple[str, Callable[[float], float]]] = {
    **dict.fromkeys(("e_distance", "e_distance_centred", "classifier_auc"), (FLOOR, float)),
    **{name: (FLOOR, lambda half: half / 2) for name in ("mae", "rmse", "l2_top1000")},
    **{name: (CEILING, formulas.spearman_brown) for name in METRICS if name.startswith("pearson_")},
}


def noise(truth: Truth, metrics: Iterable[str] | None = None) -> list[dict]:
    r"""What a perfect prediction would score, from random halves of the real cells (mean over ten splits).

    E-distance: :func:`~cellop_nb.models.energy.noise_floor` (about 0). Errors of means: half of the error between the
    halves, which is what the truth's own sampling leaves. Correlations of changes: Spearman-Brown :math:`2r/(1+r)`; the
    halves share the control cells, as prediction and truth do. Other metrics have no row.
    """
    names = [name for name in known_metrics(metrics) if name in _BOUNDS]
    return [_defined(_BOUNDS[name][0], name, partial(_perfect, truth, name)) for name in names]


def _perfect(truth: Truth, metric: str) -> float:
    return _BOUNDS[metric][1](_halves(truth, metric))


def _halves(truth: Truth, metric: str) -> float:
    """Mean over splits of the metric with one half of the real cells as the prediction of the other."""
    if len(truth.real) < 4:
        raise Undefined(f"{len(truth.real)} real cells cannot be split in two clouds")
    if metric == "e_distance":
        return noise_floor(torch.from_numpy(truth.real_points), n_splits=N_SPLITS, seed=truth.seed)
    rng, values = np.random.default_rng([truth.seed, 2]), []
    for _ in range(N_SPLITS):
        first, second = np.array_split(rng.permutation(len(truth.real)), 2)
        half = replace(truth, real=truth.real[second], counts=None, library=None, whole=truth)
        values.append(METRICS[metric](Scored(Prediction.of_cells("half", truth.real[first]), half)))
    return float(np.mean(values))


def _replicate_shares(energies: list[dict], truth: Truth) -> list[dict]:
    """How far each method comes from the best simple baseline of this group to another half of its real cells."""
    simple = [row["value"] for row in energies if row["method"] in BASELINES]
    best = min((value for value in simple if np.isfinite(value)), default=np.nan)
    points = torch.from_numpy(truth.real_points)
    floor, limit = noise_floor(points, seed=truth.seed), noise_limit(points, seed=truth.seed)
    reason = ""
    if not np.isfinite(best) or not np.isfinite(floor):
        reason = "no simple baseline or no noise floor to compare with"
    elif best <= limit:
        reason = f"the best simple baseline ({best:.2f}) is as near as another half of the real cells ({limit:.2f})"
    rows = []
    for row in energies:
        why = row["reason"] or reason
        value = np.nan if why else formulas.replicate_share(row["value"], best, floor)
        rows.append(_row(row["method"], SHARE, value, why))
    return rows


def _discrimination(truths: Mapping, guesses: Mapping) -> dict[tuple[str, str], tuple[float, str]]:
    """PDS of every group that one method predicted, among the perturbations of its context, or the reason for none."""
    values = {group: (np.nan, guesses[group].reason) for group in truths}
    for context in {group[0] for group in truths}:
        groups = [g for g in truths if g[0] == context and guesses[g].mean is not None]
        if len(groups) < MIN_DISCRIMINATION:
            reason = f"{len(groups)} perturbations; below {MIN_DISCRIMINATION} it says little"
            values |= dict.fromkeys(groups, (np.nan, reason))
            continue
        start = [truths[g].control_mean for g in groups]
        predicted = np.stack([guesses[g].mean for g in groups]) - start
        real = np.stack([truths[g].mean for g in groups]) - start
        genes = pd.Index(truths[groups[0]].space.genes)
        left_out = [np.flatnonzero(genes.isin(g[1].split("+"))) for g in groups]
        ranks = formulas.perturbation_discrimination(predicted, real, left_out)
        values |= {group: (float(value), "") for group, value in zip(groups, ranks, strict=True)}
    return values


def score_rules(
    rules: Mapping[str, Method],
    groups: Sequence[tuple[str, str]],
    training: Training,
    real: AnnData,
    control: Callable[[str], AnnData],
    space: EvaluationSpace,
    *,
    metrics: Iterable[str] | None = None,
    seed: int = 0,
) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The table of all rules for (context, perturbation) groups of real cells, and the groups that could be scored.

    `control` gives the control cells of a context, from which every rule starts. Refused without any group of two cells.
    """
    truths: dict[tuple[str, str], Truth] = {}
    unscored: dict[tuple[str, str], str] = {}
    guesses: dict[str, dict] = {name: {} for name in rules}
    measured, shift = rows_by_group(real, training.groups.keys), training.shared_shift()
    for pair in groups:
        rows, start = measured.get(pair, np.zeros(0, int)), control(pair[0])
        if min(len(rows), start.n_obs) < 2:
            problem = f"{len(rows)} held-out cells and {start.n_obs} control cells in {pair[0]!r}"
            unscored[pair] = f"{problem}; 2 of each are needed"
            continue
        truth = truths[pair] = replace(Truth.of(real[rows], start, space, seed), shared_shift=shift)
        target = Target(*pair, truth.control, space.select(start), start, space)
        for name, rule in rules.items():
            guesses[name][pair] = run(name, rule, training, target)
    if not truths:
        problem = "; ".join(f"{', '.join(pair)}: {reason}" for pair, reason in unscored.items()) or "no group"
        raise HoldoutError("held-out cells and controls to start from", problem, "hold out more")
    return _table(truths, guesses, known_metrics(metrics), unscored), list(truths)


def _table(truths: Mapping, guesses: Mapping[str, Mapping], metrics: list[str], unscored: Mapping) -> Scores:
    """All rows; `guesses` is method -> group -> Prediction, `unscored` group -> reason."""
    rows, needed = [], [*metrics, *({"e_distance"} - {*metrics} if SHARE in metrics else ())]
    for group, truth in truths.items():
        scores = [
            row for by_group in guesses.values() for row in score_prediction(by_group[group], truth, needed)
        ]
        energies = [row for row in scores if row["metric"] == "e_distance"]
        scores = [row for row in scores if row["metric"] in metrics] + noise(truth, metrics)
        rows += _labelled(scores + (_replicate_shares(energies, truth) if SHARE in metrics else []), group)
    for method, by_group in guesses.items() if PDS in metrics else ():
        for group, (value, reason) in _discrimination(truths, by_group).items():
            rows += _labelled([_row(method, PDS, value, reason)], group)
    for group, reason in unscored.items():
        names = [name for name in metrics if name in METRICS]
        rows += _labelled([_row(m, name, np.nan, reason) for m in guesses for name in names], group)
    return Scores(rows, columns=COLUMNS)


def _labelled(rows: list[dict], group: tuple[str, str]) -> list[dict]:
    labels = {"context": group[0], "perturbation": group[1], "group": ", ".join(group)}
    return [labels | row for row in rows]


def check_names(names: Iterable[str], others: Iterable[str]) -> None:
    """A method by the name of another one would silently take its place, or lose its own."""
    shared = [name for name in names if name in {*others, FLOOR, CEILING}]
    if shared:
        fix = "give it another name"
        raise LabelError("a name that no other method of the table has", repr(shared[0]), fix)


def rows_by_group(adata: AnnData, keys: Keys) -> dict[tuple[str, str], np.ndarray]:
    """Rows of each (context, perturbation), controls among them, sorted by name."""
    labels = label_table(adata, replace(keys, dose_key=None))
    return dict(sorted(labels.groupby(["context", "perturbation"]).indices.items()))


# -- predicted cells of any package ------------------------------------------------------------------------------------

SPACES = ("counts", "log1p")
LARGEST_LOG = 30.0  # log1p of any count below 10^13
LEAST_LOG = -1.0  # what a decoder without a lower bound may say of a gene that is off


@checked
def score(
    predictions: AnnData | Mapping[str, AnnData],
    real: AnnData,
    *,
    space: str | None = None,
    genes: Sequence[str] | None = None,
    metrics: Iterable[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predicted cells of any package beside every baseline and the noise floor, in one table.

    All are compared alike: over the same genes, in log1p of shares of 10,000 counts over all measured genes, in
    components of training cells, with the same real cells and the same controls. The real cells of the predicted groups
    are compared with and nothing else.

    Parameters
    ----------
    predictions
        Name to predicted cells (cell, gene), values in ``X``, with the label columns of `real` in ``obs``; or one alone.
        A group of a single row is a predicted mean: it has no metrics of clouds. Control cells among them are ignored.
    real
        A screen that was set up, with the controls, the groups to compare with, and those that baselines learn from.
        Where it was split, the test cells are compared with and the others are learnt from; else the predicted groups
        are compared with and all others are learnt from.
    space
        What ``X`` of the predictions holds: "counts" (drawn, or expected ones) or "log1p" (the logarithm of expression
        normalised over all measured genes to 10,000 or another power of ten). None guesses for each prediction: whole
        numbers are counts, and of other values that reading is taken whose mean profile is more like the real one.
    genes
        Genes to compare; those that all predictions and `real` share where None.
    metrics
        Names in :data:`METRICS`, "replicate_share" and "discrimination" (PDS); all where None.

    Returns
    -------
    DataFrame
        A row per group, method and metric: ``context, perturbation, group, method, metric, value, reason``. Methods are
        the predictions, the baselines, and the noise floor and ceiling of the real cells. ``.summary()`` has the means
        over the groups that all methods have, ``.summary(metric)`` the groups; ``attrs["inputs"]`` says of every
        prediction its space, cells, missing genes, missing groups and values below 0.

    Raises
    ------
    HoldoutError
        No group is both predicted and real, or none has enough cells.
    LabelError
        A label column, gene or metric is not there, a prediction has the name of a baseline, or `real` was not set up.
    DataError
        Values that are neither counts nor logarithms: not finite, or scaled.
    """
    predictions = {"prediction": predictions} if isinstance(predictions, AnnData) else predictions
    others = [predictions] if not isinstance(predictions, Mapping) else list(predictions.values())
    wrong = [other for other in others if not isinstance(other, AnnData)]
    if wrong:
        fix = "pass predicted cells, or {name: predicted cells}"
        raise DataError("AnnData objects of predicted cells", f"a {type(wrong[0]).__name__}", fix)
    keys, metrics = keys_of(real), known_metrics(metrics)
    require_in_memory(real)
    check_names(predictions, BASELINES)
    shared = _shared_genes(predictions, real, genes)
    rows = {name: _perturbed_rows(name, adata, keys) for name, adata in predictions.items()}
    read = {name: _read(name, adata, rows[name], real, shared, space) for name, adata in predictions.items()}
    left_out = _left_out(real, keys, {pair for by_group in rows.values() for pair in by_group})
    training_cells, truth = real[~left_out].copy(), real[left_out]
    evaluation = EvaluationSpace.fit(training_cells, genes=shared, all_measured=True, seed=seed)
    controls, groups = rows_by_group(training_cells, keys), list(rows_by_group(truth, keys))
    table, _ = score_rules(
        {**BASELINES, **{name: rule for name, (rule, _) in read.items()}},
        groups,
        Training.of(training_cells, evaluation),
        truth,
        lambda context: training_cells[controls.get((context, keys.control), np.zeros(0, int))],
        evaluation,
        metrics=metrics,
        seed=seed,
    )
    for name, (_, facts) in read.items():
        facts["groups without predicted cells"] = [", ".join(p) for p in groups if p not in rows[name]]
        facts["groups without real cells"] = [", ".join(p) for p in rows[name] if p not in groups]
        logger.info("score: %s: %s", name, facts)
        if facts["missing genes"] and genes is None:
            logger.warning("score: %s lacks %d genes of the screen", name, facts["missing genes"])
    table.attrs["inputs"] = {name: facts for name, (_, facts) in read.items()}
    return table


def _shared_genes(
    predictions: Mapping[str, AnnData], real: AnnData, genes: Sequence[str] | None
) -> list[str]:
    """Names of the genes to compare, in the order of the screen."""
    shared = real.var_names if genes is None else pd.Index(list(genes))
    for name, adata in [("real", real), *predictions.items()]:
        if not adata.var_names.is_unique:
            fix = "run var_names_make_unique() on it"
            raise LabelError(f"genes of {name!r} named once", "repeated names", fix)
        inside = shared.isin(adata.var_names)
        if not (inside.any() if genes is None else inside.all()):
            lost = shared[~inside][0]
            problem = f"{lost!r} of the screen, not in {list(adata.var_names[:3])}"
            fix = f"use the gene names of the screen ({did_you_mean(lost, adata.var_names)})"
            raise LabelError(f"genes that {name!r} and the screen share", problem, fix)
        shared = shared[inside]
    return [str(gene) for gene in shared]


def _perturbed_rows(name: str, adata: AnnData, keys: Keys) -> dict[tuple[str, str], np.ndarray]:
    try:
        return {pair: rows for pair, rows in rows_by_group(adata, keys).items() if pair[1] != keys.control}
    except LabelError as refusal:
        raise LabelError(f"{name}: {refusal}") from None


def _left_out(real: AnnData, keys: Keys, predicted: set[tuple[str, str]]) -> np.ndarray:
    """Mask (cell,) of the real cells to compare with: perturbed test cells, or all cells of the predicted groups."""
    by_group = _perturbed_rows("real", real, keys)
    mask = np.zeros(real.n_obs, dtype=bool)
    for pair, rows in by_group.items():
        mask[rows] = SPLIT_KEY in real.obs or pair in predicted
    if SPLIT_KEY in real.obs:
        mask &= np.isin(np.arange(real.n_obs), rows_of(real, "test"))
    if not any(mask[by_group[pair]].any() for pair in predicted & set(by_group)):
        problem = f"predicted {sorted(predicted)[:4]}, real {list(by_group)[:4]}"
        fix = "write the labels of obs as the screen does"
        if predicted & set(by_group):
            fix = "predict the test cells of the split, or drop obs['split']"
        raise HoldoutError("at least one group both predicted and real", problem, fix)
    return mask


def _read(
    name: str, adata: AnnData, rows: Mapping, real: AnnData, genes: list[str], space: str | None
) -> tuple[Method, dict[str, Any]]:
    """Predicted cells as a method like the baselines, and what a reader of their scores has to know.

    Where nobody says what ``X`` holds, whole numbers are counts, and other values the space whose mean profile is nearer
    to the real one. Expected and drawn counts agree in the mean of expression, logarithms of drawn and of smooth cells in
    that of the logarithms. A doubt is a warning.
    """
    values = raw_counts(adata)
    numbers = values.data if sparse.issparse(values) else values
    _check(name, numbers, space)
    drawn = bool((numbers >= 0).all() and (numbers == np.rint(numbers)).all())
    missing = int((~real.var_names.isin(adata.var_names)).sum())
    chosen = values[:, adata.var_names.get_indexer(genes)]
    chosen = chosen.maximum(0) if sparse.issparse(chosen) else np.maximum(chosen, 0)
    share, library = _share(real, genes), measured_totals(adata)
    if library is None and not missing:
        library = _sums(values)
    levels = {"counts": log1p_cp10k(chosen, _sums(chosen) / share if library is None else library)}
    target_sum = 0.0
    if numbers.max(initial=0) <= LARGEST_LOG:
        levels["log1p"], target_sum = _from_logarithms(chosen, share)
    reading = space or ("counts" if drawn else "")
    if not drawn:
        alike = [r for pair, r in rows_by_group(real, keys_of(real)).items() if pair in rows]
        nearest = _nearest_level(
            levels, real[np.concatenate(alike)] if alike else real, genes, share, reading
        )
        if reading and nearest != reading:
            problem = "score: %s is read as %s, but its mean profile is that of %s"
            logger.warning(problem, name, reading, nearest)
        reading = reading or nearest
    cells, whole = levels[reading], drawn and reading == "counts"

    def predict(training: Training, target: Target) -> Prediction:
        group = rows.get((target.context, target.perturbation))
        if group is None:
            raise Undefined("no predicted cells of this group")
        part = cells[group].toarray() if sparse.issparse(cells) else cells[group]
        if len(group) == 1:
            return Prediction(name, part[0].astype(np.float64))
        if not whole:
            return Prediction.of_cells(name, part)
        return Prediction.of_cells(name, part, chosen[group], None if library is None else library[group])

    facts = {
        "space": f"{reading} ({'as said' if space else 'guessed'})",
        "normalised to": f"{target_sum:.0f}" if reading == "log1p" else "",
        "cells": sum(map(len, rows.values())),
        "missing genes": missing,
        "values below 0": float((numbers < 0).sum() / max(np.prod(values.shape), 1)),
    }
    return predict, facts


def _from_logarithms(values, share: float) -> tuple[Any, float]:
    """log1p-CP10k of logarithms (cell, gene), and the power of ten, from 10,000, to which all measured genes sum."""
    expression = np.expm1(values)
    usual = max(float(np.median(_sums(expression))) / share, 1.0)
    target_sum = float(10.0 ** max(4, np.rint(np.log10(usual))))
    return log1p_cp10k(expression, np.full(values.shape[0], target_sum)), target_sum


def _check(name: str, numbers: np.ndarray, space: str | None) -> None:
    if space not in (None, *SPACES):
        problem = f"{space!r} ({did_you_mean(str(space), SPACES)})"
        raise LabelError(f"space to be one of {SPACES}, or None", problem, "name what X holds")
    if not np.isfinite(numbers).all():
        fix = "find out where the model breaks; they are not replaced"
        raise DataError(f"finite values in X of {name!r}", "NaN or infinite values", fix)
    least, most = numbers.min(initial=0), numbers.max(initial=0)
    if least < LEAST_LOG:
        problem = f"values down to {least:.3g}: scaled or centred data"
        fix = "pass counts, or log1p of expression"
        raise DataError(f"counts or logarithms in X of {name!r}", problem, fix)
    if space == "log1p" and most > LARGEST_LOG:
        problem = f"values up to {most:.4g}"
        raise DataError(f"log1p of expression in X of {name!r}", problem, "pass space='counts'")


def _nearest_level(levels: Mapping, real: AnnData, genes: list[str], share: float, reading: str) -> str:
    """The space whose mean profile is nearest to the real one; `reading` unless another errs half as much."""
    counts = raw_counts(real[:, genes], keys_of(real).layer)
    level = log1p_cp10k(counts, _sums(counts) / share)
    error = {}
    for space, cells in levels.items():
        means = [_mean(np.expm1(part) if space == "counts" else part) for part in (cells, level)]
        one, other = np.log1p(means) if space == "counts" else means
        error[space] = float(np.abs(one - other).mean())
    nearest = min(error, key=error.__getitem__)
    return reading if reading and error[nearest] >= error[reading] / 2 else nearest


def _share(real: AnnData, genes: Sequence[str]) -> float:
    """Median share of the counts of a real cell that lies in the compared genes."""
    layer, totals = keys_of(real).layer, measured_totals(real)
    totals = library_size(real, layer) if totals is None else totals
    return float(np.median(library_size(real[:, list(genes)], layer)[totals > 0] / totals[totals > 0]))


def _sums(values) -> np.ndarray:
    """(cell,) sums of cells (cell, gene)."""
    return np.asarray(values.sum(axis=1), dtype=np.float64).ravel()


def _mean(values) -> np.ndarray:
    """(gene,) mean of cells (cell, gene)."""
    return np.asarray(values.mean(axis=0), dtype=np.float64).ravel()
