"""Score one prediction of one group: all metrics; NaN and a reason where undefined."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np
import pandas as pd
from anndata import AnnData

from ..errors import HoldoutError, LabelError, did_you_mean, three_beats
from ..packages import same_threads
from . import formulas
from .formulas import Undefined
from .space import EvaluationSpace
from .targets import Prediction, Screen

FDR = 0.05


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
    found = work.uns["rank_genes_groups"]
    order = found["names"]["cells"].astype(int)
    table = pd.DataFrame(index=range(values.shape[1]), columns=["score", "p", "fdr", "lfc"], dtype=float)
    for column, key in (("score", "scores"), ("p", "pvals"), ("fdr", "pvals_adj")):
        table.loc[order, column] = found[key]["cells"].astype(float)
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
        max_cells: int = 500,
        seed: int = 0,
    ) -> None:
        if min(len(real), len(control)) < 2:
            found = f"{len(real)} real and {len(control)} control cells"
            raise HoldoutError(
                three_beats("at least 2 real and 2 control cells", found, "leave this group out")
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


def shared_shift(training: Screen) -> np.ndarray | None:
    """Mean over training groups of perturbed minus control mean, (gene,); None where nothing is perturbed."""
    groups = training.measured()
    return np.mean([training.shift(*group) for group in groups], axis=0) if groups else None
