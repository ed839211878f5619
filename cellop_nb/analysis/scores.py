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
from ..data.counts import measured_totals
from ..display import Scores
from ..errors import HoldoutError, LabelError, did_you_mean, three_beats
from ..models.energy import noise_floor
from ..packages import same_threads
from . import metrics as formulas
from .baselines import Prediction, Training
from .metrics import EvaluationSpace, Undefined

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
    "direction_match": lambda s: formulas.direction_match(*s.lfc),
    "lfc_spearman": lambda s: formulas.lfc_spearman(*s.lfc),
    "precision_at_50": lambda s: formulas.precision_at_k(*s.de, k=50),
    "de_score": lambda s: formulas.de_score(*s.de),
    "library_ratio": lambda s: formulas.ratio_of_means(*s.libraries()),
    "counts_ratio": lambda s: formulas.ratio_of_means(*s.sums()),
    "zero_fraction_difference": lambda s: formulas.zero_fraction_difference(*s.counts()),
}
PDS = "discrimination"  # over all perturbations of a context, so it stands beside the table of single groups
QUICK = ("e_distance", "pearson_delta", "mae", "rmse")


def score(prediction: Prediction, truth: Truth, metrics: Iterable[str] | None = None) -> list[dict]:
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
        if name not in METRICS and name != PDS:
            hint = did_you_mean(name, [*METRICS, PDS])
            raise LabelError(three_beats("names of metrics", repr(name), hint))
    return [name for name in names if name != PDS]


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
    "e_distance": (FLOOR, float),
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
    names, rows = known_metrics(metrics), []
    for group, truth in truths.items():
        for predictions in guesses.values():
            rows += _labelled(score(predictions[group], truth, names), group)
        rows += _labelled(noise(truth, names), group)
    if metrics is None or PDS in ([metrics] if isinstance(metrics, str) else list(metrics)):
        for method, predictions in guesses.items():
            rows += _discrimination(truths, predictions, method)
    for group, reason in (unscored or {}).items():
        bare = {"value": np.nan, "reason": reason}
        rows += _labelled([bare | {"method": m, "metric": name} for m in guesses for name in names], group)
    return Scores(rows, columns=COLUMNS)


def _labelled(rows: list[dict], group: tuple[str, str]) -> list[dict]:
    labels = {"context": group[0], "perturbation": group[1], "group": ", ".join(group)}
    return [labels | row for row in rows]


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


def evaluate(
    predicted: AnnData,
    real: AnnData,
    control: AnnData,
    *,
    space: EvaluationSpace,
    metrics: Iterable[str] | None = None,
    method: str = "prediction",
    training: Training | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predicted cells against the real ones of the same (context, perturbation) group.

    Parameters
    ----------
    predicted, real, control : AnnData
        Raw counts: sampled predictions (in ``X``), real perturbed cells and the control cells of the same contexts, both
        of a screen that was set up.
    space : EvaluationSpace
        Fitted on training cells only.
    metrics : names, optional
        All of :data:`METRICS` and "discrimination" (PDS) by default.
    method : str
        Name of the prediction in the column `method`.
    training : Training, optional
        Training cells in this space; without them the Systema correlation is undefined.

    Returns
    -------
    DataFrame
        ``context, perturbation, group, method, metric, value, reason``: rows for `method`, and for the noise floor and
        ceiling of the real cells. `e_distance` is Euclidean, U-statistic, one per group, in the components of `space`.

    Raises
    ------
    HoldoutError
        No group is in both tables, or a group has too few cells.
    """
    keys = keys_of(real)
    truth_rows, guess_rows, start_rows = (rows_by_group(a, keys) for a in (real, predicted, control))
    _matching(truth_rows, guess_rows)
    shift = None if training is None else shared_shift(training)
    truths, guesses = {}, {}
    for (context, perturbation), rows in truth_rows.items():
        start = control[start_rows.get((context, keys.control), np.zeros(0, int))]
        counts = space.select(real[rows])
        truths[context, perturbation] = Truth(
            space.transform(counts),
            space.transform(space.select(start)),
            space,
            shared_shift=shift,
            seed=seed,
            counts=counts,
            library=measured_totals(real[rows]),
        )
        guess = Prediction(method, reason="no predicted cells of this group")
        if (context, perturbation) in guess_rows:
            cells = predicted[guess_rows[context, perturbation]]
            guess = Prediction.of_counts(method, space.select(cells, "X"), space, measured_totals(cells))
        guesses[context, perturbation] = guess
    return table_of(truths, {method: guesses}, metrics)


def rows_by_group(adata: AnnData, keys: Keys) -> dict[tuple[str, str], np.ndarray]:
    """Rows of each (context, perturbation), controls among them, sorted by name."""
    return dict(
        sorted(
            label_table(adata, replace(keys, dose_key=None))
            .groupby(["context", "perturbation"])
            .indices.items()
        )
    )


def _matching(real: Mapping, predicted: Mapping) -> None:
    if not set(real) & set(predicted):
        problem = f"predicted {list(predicted)[:4]}, real {list(real)[:4]}"
        raise HoldoutError(
            three_beats("at least one group both predicted and real", problem, "check the labels in obs")
        )
    extra = sorted(set(predicted) - set(real))
    if extra:
        logger.warning("evaluate: no real cells for %d predicted groups, such as %s", len(extra), extra[0])
