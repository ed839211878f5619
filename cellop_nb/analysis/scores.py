"""The table of scores: every method and the noise of the real cells, group by group, in one space."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from ..data.contract import Keys, keys_of, label_table
from ..data.counts import measured_totals, require_in_memory
from ..data.splits import SPLIT_KEY, rows_of
from ..display import Scores
from ..errors import HoldoutError, LabelError, did_you_mean, three_beats
from ..models.energy import noise_floor, noise_limit
from ..packages import same_threads
from . import metrics as formulas
from .baselines import BASELINES, Method, Prediction, Target, Training, run
from .metrics import EvaluationSpace, Undefined
from .predicted import Predicted, shared_genes

logger = logging.getLogger("cellop_nb")

FDR = 0.05
MAX_CELLS = 500
"""Cells a side of an energy distance; more are subsampled (seeded)."""

FLOOR = "noise floor (split half)"
CEILING = "noise ceiling (Spearman-Brown)"
COLUMNS = ["context", "perturbation", "group", "method", "metric", "value", "reason"]
MIN_DISCRIMINATION = 20  # PDS moves in steps of 1/N: with fewer perturbations it says little


@same_threads()
def differential(cells: np.ndarray, control: np.ndarray) -> pd.DataFrame:
    """Differential expression of log1p-CP10k cells against control cells: Wilcoxon and Benjamini-Hochberg by
    scanpy.

    Parameters
    ----------
    cells, control : (cell, gene)

    Returns
    -------
    DataFrame
        One row per gene in the given order: ``score`` (Wilcoxon z, ties corrected), ``p``, ``fdr``,
        ``lfc`` (log2 of the ratio of back-transformed means, as scanpy; a mean that a shift made negative counts
        as 0).
    """
    import scanpy as sc

    values = np.concatenate([cells, control]).astype(np.float32)
    work = AnnData(values, obs=pd.DataFrame(index=[str(i) for i in range(len(values))]))
    work.obs["side"] = pd.Categorical(["cells"] * len(cells) + ["control"] * len(control))
    options = {"method": "wilcoxon", "corr_method": "benjamini-hochberg", "tie_correct": True}
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # its own fold change of negative means, not used here
        sc.tl.rank_genes_groups(work, "side", groups=["cells"], reference="control", **options)
    ranked = work.uns["rank_genes_groups"]
    order = ranked["names"]["cells"].astype(int)
    table = pd.DataFrame(index=range(values.shape[1]), columns=["score", "p", "fdr", "lfc"], dtype=float)
    for column, key in (("score", "scores"), ("p", "pvals"), ("fdr", "pvals_adj")):
        table.loc[order, column] = ranked[key]["cells"].astype(float)
    table["lfc"] = _log_fold_change(cells.mean(axis=0), control.mean(axis=0))
    return table


def _log_fold_change(mean: np.ndarray, reference: np.ndarray) -> np.ndarray:
    back = [np.expm1(np.maximum(x, 0.0).astype(np.float64)) + 1e-9 for x in (mean, reference)]
    return np.log2(back[0] / back[1])


class Truth:
    """The real cells of one group, and all that every method is compared with (computed once, on demand).

    Parameters
    ----------
    real, control : (cell, gene)
        Real perturbed cells, and the control cells of the same context, log1p-CP10k.
    counts : (cell, gene), optional
        Counts of the real cells.
    library : (cell,), optional
        Their counts over all measured genes, where `counts` holds only some of them.
    shared_shift : (gene,), optional
        Mean shift of the training groups; control mean + shared shift is the reference of Systema's
        correlation.
    max_cells : int
        Cells a side of the E-distance, seeded subsample; the same real cells for all methods.
    """

    def __init__(
        self,
        real,
        control,
        space: EvaluationSpace,
        *,
        counts=None,
        library=None,
        shared_shift=None,
        max_cells: int = MAX_CELLS,
        seed: int = 0,
    ) -> None:
        if min(len(real), len(control)) < 2:
            problem = f"{len(real)} real and {len(control)} control cells"
            raise HoldoutError(
                three_beats("at least 2 real and 2 control cells", problem, "leave this group out")
            )
        self.real, self.control, self.space, self.counts, self.library = real, control, space, counts, library
        self.shared_shift, self.max_cells, self.seed = shared_shift, max_cells, seed
        self.mean = real.mean(axis=0, dtype=np.float64)
        self.control_mean = control.mean(axis=0, dtype=np.float64)

    def points(self, cells: np.ndarray, stream: int = 1) -> np.ndarray:
        """Principal components of at most `max_cells` of the cells, (cell, component)."""
        rows = np.random.default_rng([self.seed, stream]).permutation(len(cells))[: self.max_cells]
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
        return np.argsort(-self.de["score"].abs().to_numpy(), kind="stable")

    @property
    def systema_reference(self) -> np.ndarray:
        if self.shared_shift is None:
            raise Undefined("no perturbed training groups were given, so their mean is unknown")
        return self.control_mean + self.shared_shift


class Scored:
    """A prediction with its differential expression, computed once for the metrics that share it."""

    def __init__(self, prediction: Prediction, truth: Truth) -> None:
        self.prediction, self.truth = prediction, truth

    @property
    def mean(self) -> np.ndarray:
        assert self.prediction.mean is not None, "only what was predicted is scored"
        return self.prediction.mean

    @property
    def cells(self) -> np.ndarray:
        if self.prediction.cells is None:
            raise Undefined("needs predicted cells; this method predicts a mean only")
        return self.prediction.cells

    def centred(self) -> np.ndarray:
        """Components of the predicted cells with their mean moved onto that of the real cells: what is left is shape."""
        return self.truth.points(self.cells - self.mean + self.truth.mean)

    def counts(self) -> tuple:
        if self.prediction.counts is None or self.truth.counts is None:
            raise Undefined(
                "needs counts; this method predicts none"
                if self.truth.counts is not None
                else "no real counts"
            )
        return self.prediction.counts, self.truth.counts

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of each predicted and each real cell over the genes of the table."""
        predicted, real = (np.asarray(counts.sum(axis=1)).ravel() for counts in self.counts())
        return predicted, real

    def libraries(self) -> tuple[np.ndarray, np.ndarray]:
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

    @property
    def lfc(self) -> tuple:
        """Arguments of the fold-change metrics; fold changes of means, so they exist for a mean alone."""
        truth = self.truth
        return _log_fold_change(self.mean, truth.control_mean), truth.de["lfc"].to_numpy(), truth.significant


def _delta(s: Scored, genes=None) -> float:
    return formulas.pearson_delta(s.mean, s.truth.mean, s.truth.control_mean, genes)


def _leading_direction(s: Scored, n: int) -> float:
    """Direction of the n genes that differ most, among the significant ones."""
    leading = np.zeros(len(s.truth.mean), dtype=bool)
    leading[s.truth.top_genes[:n]] = True
    predicted, real, significant = s.lfc
    return formulas.direction_match(predicted, real, leading & significant)


def _leading_zeros(s: Scored, n: int) -> float:
    """Zeros of the n genes that differ most."""
    predicted, real = s.counts()
    return formulas.zero_error(predicted, real, s.truth.top_genes[:n])


METRICS: dict[str, Callable[[Scored], float]] = {
    "e_distance": lambda s: formulas.e_distance(s.truth.points(s.cells), s.truth.real_points),
    "e_distance_centred": lambda s: formulas.e_distance(s.centred(), s.truth.real_points),
    "pearson_delta": _delta,
    "pearson_delta_de20": lambda s: _delta(s, s.truth.top_genes[:20]),
    "pearson_delta_de100": lambda s: _delta(s, s.truth.top_genes[:100]),
    "pearson_systema": lambda s: formulas.pearson_delta(s.mean, s.truth.mean, s.truth.systema_reference),
    "mae": lambda s: formulas.mae(s.mean, s.truth.mean),
    "rmse": lambda s: formulas.rmse(s.mean, s.truth.mean),
    "l2_top1000": lambda s: formulas.l2_top_expressed(s.mean, s.truth.mean, s.truth.control_mean),
    "r2_determination": lambda s: formulas.coefficient_of_determination(s.mean, s.truth.mean),
    "r2_pearson_squared": lambda s: formulas.squared_pearson(s.mean, s.truth.mean),
    "direction_match_de50": lambda s: _leading_direction(s, 50),
    "direction_match": lambda s: formulas.direction_match(*s.lfc),
    "lfc_spearman": lambda s: formulas.lfc_spearman(*s.lfc),
    "precision_at_50": lambda s: formulas.precision_at_k(*s.de, k=50),
    "de_score": lambda s: formulas.de_score(*s.de),
    "library_ratio": lambda s: formulas.ratio_of_means(*s.libraries()),
    "counts_ratio": lambda s: formulas.ratio_of_means(*s.sums()),
    "zero_fraction_difference": lambda s: formulas.zero_fraction_difference(*s.counts()),
    "zero_error_de100": lambda s: _leading_zeros(s, 100),
    "variance_ratio_de100": lambda s: formulas.variance_ratio(s.cells, s.truth.real, s.truth.top_genes[:100]),
    "classifier_auc": lambda s: formulas.classifier_auc(s.truth.points(s.cells), s.truth.real_points),
}
PDS = "discrimination"  # over all perturbations of a context, so it stands beside the table of single groups
SHARE = "replicate_share"  # of one method beside the others, likewise
BESIDE = (PDS, SHARE)
QUICK = ("e_distance", "pearson_delta", "mae", "rmse")


def score_prediction(
    prediction: Prediction, truth: Truth, metrics: Iterable[str] | None = None
) -> list[dict]:
    """Score one prediction: rows ``method, metric, value, reason``; NaN and a reason where undefined."""
    scored, rows = Scored(prediction, truth), []
    for name in known_metrics(metrics):
        value, reason = np.nan, prediction.reason or "nothing was predicted"
        if prediction.mean is not None:
            value, reason = value_of(METRICS[name], scored)
        rows.append({"method": prediction.method, "metric": name, "value": value, "reason": reason})
    return rows


def value_of(metric: Callable, *arguments) -> tuple[float, str]:
    """The metric and no reason; NaN and the reason where it is undefined."""
    try:
        return float(metric(*arguments)), ""
    except Undefined as refusal:
        return np.nan, str(refusal)


def known_metrics(metrics: Iterable[str] | None) -> list[str]:
    """Names of the metrics of single groups, all of them for None; an unknown one is refused."""
    names = list(METRICS) if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in METRICS and name not in BESIDE:
            hint = did_you_mean(name, [*METRICS, *BESIDE])
            raise LabelError(three_beats("names of metrics", repr(name), hint))
    return [name for name in names if name not in BESIDE]


def _beside(metrics: Iterable[str] | None) -> set[str]:
    """Which metrics that need all methods or perturbations are asked for."""
    return {*BESIDE} & (
        {*BESIDE} if metrics is None else {metrics} if isinstance(metrics, str) else {*metrics}
    )


def noise(truth: Truth, metrics: Iterable[str] | None = None, *, n_splits: int = 10) -> list[dict]:
    r"""What a perfect prediction would score, from random halves of the real cells (mean over the splits).

    E-distance: :func:`~cellop_nb.models.energy.noise_floor` (about 0). Errors of means (mae, rmse, l2): half of the
    error between the halves, which is the error that the truth's own sampling leaves. Correlations of changes:
    Spearman-Brown :math:`2r/(1+r)`; the halves share the control cells, as prediction and truth do. Other metrics have no
    row.

    Returns
    -------
    rows ``method, metric, value, reason``, method being :data:`FLOOR` or :data:`CEILING`.
    """
    rows = []
    for name in known_metrics(metrics):
        if name not in _BOUNDS:
            continue
        method, bound = _BOUNDS[name]
        value, reason = value_of(lambda n=name, b=bound: b(_halves(truth, n, n_splits)))
        rows.append({"method": method, "metric": name, "value": value, "reason": reason})
    return rows


# what the score of one half against the other says about a perfect prediction
_BOUNDS: dict[str, tuple[str, Callable[[float], float]]] = {
    **dict.fromkeys(("e_distance", "e_distance_centred", "classifier_auc"), (FLOOR, float)),
    **{name: (FLOOR, lambda half: half / 2) for name in ("mae", "rmse", "l2_top1000")},
    **{name: (CEILING, formulas.spearman_brown) for name in METRICS if name.startswith("pearson_")},
}


def _halves(truth: Truth, metric: str, n_splits: int) -> float:
    """Mean over splits of the metric with one half of the real cells as the prediction of the other."""
    if len(truth.real) < 4:
        raise Undefined(f"{len(truth.real)} real cells cannot be split in two clouds")
    if metric == "e_distance":
        return noise_floor(torch.from_numpy(truth.real_points), n_splits=n_splits, seed=truth.seed)
    rng, values = np.random.default_rng([truth.seed, 2]), []
    for _ in range(n_splits):
        first, second = np.array_split(rng.permutation(len(truth.real)), 2)
        half = _Half(truth, second)
        values.append(METRICS[metric](Scored(Prediction.of_cells("half", truth.real[first]), half)))
    return float(np.mean(values))


class _Half(Truth):
    """A truth of half the real cells that keeps the gene ranking of the whole."""

    def __init__(self, whole: Truth, rows: np.ndarray) -> None:
        options = {"shared_shift": whole.shared_shift, "max_cells": whole.max_cells, "seed": whole.seed}
        super().__init__(whole.real[rows], whole.control, whole.space, **options)
        self.whole = whole

    @property
    def top_genes(self) -> np.ndarray:
        return self.whole.top_genes


def table_of(
    truths: Mapping,
    guesses: Mapping[str, Mapping],
    metrics: Iterable[str] | None,
    unscored: Mapping | None = None,
) -> pd.DataFrame:
    """All rows of the table; `guesses` is method -> group -> Prediction, `unscored` group -> reason."""
    metrics = metrics if metrics is None or isinstance(metrics, str) else list(metrics)
    names, beside, rows = known_metrics(metrics), _beside(metrics), []
    needed = [*names, *({"e_distance"} - {*names} if SHARE in beside else ())]
    for group, truth in truths.items():
        energies: list[dict] = []
        for predictions in guesses.values():
            scores = score_prediction(predictions[group], truth, needed)
            rows += _labelled([row for row in scores if row["metric"] in names], group)
            energies += [row for row in scores if row["metric"] == "e_distance"]
        rows += _labelled(noise(truth, names), group)
        if SHARE in beside:
            rows += _labelled(_replicate_shares(energies, truth), group)
    if PDS in beside:
        for method, predictions in guesses.items():
            rows += _discrimination(truths, predictions, method)
    for group, reason in (unscored or {}).items():
        bare = {"value": np.nan, "reason": reason}
        rows += _labelled([bare | {"method": m, "metric": name} for m in guesses for name in names], group)
    return Scores(rows, columns=COLUMNS)


def _labelled(rows: list[dict], group: tuple[str, str]) -> list[dict]:
    labels = {"context": group[0], "perturbation": group[1], "group": ", ".join(group)}
    return [labels | row for row in rows]


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
        value = np.nan if reason or row["reason"] else formulas.replicate_share(row["value"], best, floor)
        rows.append(row | {"metric": SHARE, "value": value, "reason": row["reason"] or reason})
    return rows


def _discrimination(truths: Mapping, guesses: Mapping, method: str) -> list[dict]:
    """PDS rows of one method, among the perturbations of each context."""
    rows = []
    for context in sorted({group[0] for group in truths}):
        groups = [group for group in truths if group[0] == context]
        predicted = [group for group in groups if guesses[group].mean is not None]
        values, reason = _pds(predicted, truths, guesses)
        by_group = dict(zip(predicted, values, strict=True))
        for group in groups:
            why = reason if group in by_group else guesses[group].reason
            row = {"method": method, "metric": PDS, "value": by_group.get(group, np.nan), "reason": why}
            rows += _labelled([row], group)
    return rows


def _pds(groups: Sequence, truths: Mapping, guesses: Mapping) -> tuple[np.ndarray, str]:
    if len(groups) < MIN_DISCRIMINATION:
        reason = f"{len(groups)} perturbations; below {MIN_DISCRIMINATION} it says little"
        return np.full(len(groups), np.nan), reason
    start = [truths[g].control_mean for g in groups]
    predicted = np.stack([guesses[g].mean for g in groups]) - start
    real = np.stack([truths[g].mean for g in groups]) - start
    genes = pd.Index(truths[groups[0]].space.genes)
    left_out = [np.flatnonzero(genes.isin(g[1].split("+"))) for g in groups]
    return formulas.perturbation_discrimination(predicted, real, left_out), ""


def shared_shift(training: Training) -> np.ndarray | None:
    """Mean over training groups of perturbed minus control mean, (gene,); None where nothing is perturbed."""
    pairs = training.groups.pairs
    return np.mean([training.shift(*pair) for pair in pairs], axis=0) if pairs else None


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
    predictions = {"prediction": predictions} if isinstance(predictions, AnnData) else dict(predictions)
    keys, metrics = keys_of(real), metrics if metrics is None or isinstance(metrics, str) else list(metrics)
    known_metrics(metrics)
    require_in_memory(real)
    check_names(predictions, BASELINES)
    shared = shared_genes(predictions, real, genes)
    files = {name: _read(name, adata, real, shared, space) for name, adata in predictions.items()}
    left_out = _left_out(real, keys, files)
    training_cells, truth = real[~left_out].copy(), real[left_out]
    evaluation = EvaluationSpace.fit(training_cells, genes=shared, all_measured=True, seed=seed)
    controls = rows_by_group(training_cells, keys)
    groups = list(rows_by_group(truth, keys))
    table, _ = score_rules(
        {**BASELINES, **{name: file.predict for name, file in files.items()}},
        groups,
        Training.of(training_cells, evaluation),
        truth,
        lambda context: training_cells[controls.get((context, keys.control), np.zeros(0, int))],
        evaluation,
        metrics=metrics,
        seed=seed,
    )
    table.attrs["inputs"] = {name: file.facts(groups) for name, file in files.items()}
    for name, facts in table.attrs["inputs"].items():
        logger.info("score: %s: %s", name, facts)
        if facts["missing genes"] and genes is None:
            logger.warning("score: %s lacks %d genes of the screen", name, facts["missing genes"])
    return table


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

    `control` gives the control cells of a context, from which every rule starts.

    Raises
    ------
    HoldoutError
        No group has two real and two control cells.
    """
    truths: dict[tuple[str, str], Truth] = {}
    unscored: dict[tuple[str, str], str] = {}
    guesses: dict[str, dict] = {name: {} for name in rules}
    measured, shift = rows_by_group(real, training.groups.keys), shared_shift(training)
    for pair in groups:
        rows, start = measured.get(pair, np.zeros(0, int)), control(pair[0])
        if min(len(rows), start.n_obs) < 2:
            problem = f"{len(rows)} held-out cells and {start.n_obs} control cells in {pair[0]!r}"
            unscored[pair] = f"{problem}; 2 of each are needed"
            continue
        target = Target(*pair, space.cells(start), space.select(start), start, space)
        truths[pair] = Truth(
            space.cells(real[rows]),
            target.control,
            space,
            counts=space.select(real[rows]),
            library=measured_totals(real[rows]),
            shared_shift=shift,
            seed=seed,
        )
        for name, rule in rules.items():
            guesses[name][pair] = run(name, rule, training, target)
    if not truths:
        problem = "; ".join(f"{', '.join(pair)}: {reason}" for pair, reason in unscored.items()) or "no group"
        raise HoldoutError(three_beats("held-out cells and controls to start from", problem, "hold out more"))
    return table_of(truths, guesses, metrics, unscored), list(truths)


def check_names(names: Iterable[str], taken: Iterable[str]) -> None:
    """A method by the name of another one would silently take its place, or lose its own."""
    shared = [name for name in names if name in {*taken, FLOOR, CEILING}]
    if shared:
        fix = "give it another name"
        raise LabelError(three_beats("a name that no other method of the table has", repr(shared[0]), fix))


def _read(name: str, adata: AnnData, real: AnnData, genes: Sequence[str], space: str | None) -> Predicted:
    keys = keys_of(real)
    try:
        rows = {pair: r for pair, r in rows_by_group(adata, keys).items() if pair[1] != keys.control}
    except LabelError as refusal:
        raise LabelError(f"{name}: {refusal}") from None
    same = [r for pair, r in rows_by_group(real, keys).items() if pair in rows]
    alike = np.concatenate(same) if same else np.arange(real.n_obs)
    return Predicted.of(name, adata, rows, real, genes, space, alike)


def _left_out(real: AnnData, keys: Keys, files: Mapping[str, Predicted]) -> np.ndarray:
    """Mask (cell,) of the real cells to compare with: perturbed test cells, or all cells of the predicted groups."""
    by_group = {pair: rows for pair, rows in rows_by_group(real, keys).items() if pair[1] != keys.control}
    predicted = {pair for file in files.values() for pair in file.rows}
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
        raise HoldoutError(three_beats("at least one group both predicted and real", problem, fix))
    return mask


def rows_by_group(adata: AnnData, keys: Keys) -> dict[tuple[str, str], np.ndarray]:
    """Rows of each (context, perturbation), controls among them, sorted by name."""
    return dict(
        sorted(
            label_table(adata, replace(keys, dose_key=None))
            .groupby(["context", "perturbation"])
            .indices.items()
        )
    )
