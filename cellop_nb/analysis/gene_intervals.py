"""How sure is every gene's predicted change: sampling, fits and the model's own errors; how often the truth is inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from ..errors import HoldoutError, three_beats
from .holdout import Holdout
from .scores import FDR, differential
from .sides import sides_of
from .uncertainty import change_error, gene_change, pool

LEVELS = (0.5, 0.8, 0.9, 0.95)


def change_intervals(
    result: Holdout,
    *,
    n_replicates: int = 200,
    level: float = 0.95,
    widen: float = 1.0,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    seed: int = 0,
) -> pd.DataFrame:
    """Interval of every gene's predicted change: the wider of what sampling and what the model's own errors say.

    Sampling is bootstrapped, over cells and over the fits. The model's errors are what predictions of the measured
    contexts, each made without its own cells, were off by (:func:`model_error`); where the perturbation was measured
    in fewer than two contexts nothing tells them.

    Parameters
    ----------
    result
        Of :func:`holdout`.
    n_replicates, level
        Bootstrap samples per fit, and the nominal coverage.
    widen
        Factor on the distance of both ends to the prediction; :func:`widening` measures it on contexts that
        were trained on.

    Returns
    -------
    DataFrame
        A row per group and gene: ``group, gene, predicted, low, high, true, true_error`` (standard error of the
        measured change), ``is_de`` (Wilcoxon, Benjamini-Hochberg below 5 % in the real cells) and ``inside``
        (whether the measured change lies in the interval, allowing for its own error). Changes of mean
        log1p-CP10k against the control cells.
    """
    tables = []
    for sides in sides_of(result, layer, perturbation_key, context_key):
        members = [
            gene_change(cells, sides.control, n_replicates=n_replicates, level=level, seed=seed + k)
            for k, cells in enumerate(sides.fits)
        ]
        interval = pool(members)
        error = model_error(result, sides.perturbation, level)
        true = sides.real.mean(0, dtype=np.float64) - sides.control.mean(0, dtype=np.float64)
        columns = {
            "group": sides.group,
            "gene": np.asarray(result.space.genes, dtype=str),
            "predicted": interval.estimate,
            "low": interval.estimate - widen * np.maximum(interval.estimate - interval.low, error),
            "high": interval.estimate + widen * np.maximum(interval.high - interval.estimate, error),
            "true": true,
            "true_error": change_error(sides.real, sides.control),
            "is_de": (differential(sides.real, sides.control)["fdr"] < FDR).to_numpy(),
        }
        tables.append(pd.DataFrame(columns))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(inside=_inside(table, level))


def model_error(result: Holdout, perturbation: str, level: float = 0.95) -> np.ndarray | float:
    r"""Half-width of each gene's interval that is owed to the model itself, (gene,); 0 where nothing tells it.

    .. math:: t_{n-1,\,(1 + \text{level}) / 2}\; \sqrt{1 + 1/n}\; \sqrt{\tfrac{1}{n} \sum_c e_c^2}

    with the errors :math:`e_c` of the n measured contexts (``Response.errors``), mean over the fits: a prediction
    interval for one more context, somewhat too wide where the errors have no bias (it would be exact with their standard
    deviation about a mean that is corrected for; with few contexts that mean is known too loosely to correct).

    References
    ----------
    Geisser 1993, Predictive Inference, section 2.2 (normal prediction interval).
    """
    found = [fit.response.errors.get(perturbation) for fit in result.fits]
    widths = [
        t.ppf((1 + level) / 2, len(rows) - 1)
        * np.sqrt((1 + 1 / len(rows)) * np.mean(np.square(rows), axis=0))
        for rows in found
        if rows is not None
    ]
    return np.mean(widths, axis=0) if widths else 0.0


def _inside(table: pd.DataFrame, level: float) -> pd.Series:
    margin = norm.ppf((1 + level) / 2) * table["true_error"]
    below = np.hypot(table["predicted"] - table["low"], margin)
    above = np.hypot(table["high"] - table["predicted"], margin)
    return (table["true"] >= table["predicted"] - below) & (table["true"] <= table["predicted"] + above)


def coverage_table(result: Holdout, *, levels: Sequence[float] = LEVELS, **options) -> pd.DataFrame:
    """Nominal against empirical coverage of the genes' intervals: ``group, level, coverage, genes``.

    `options` as in :func:`change_intervals`; below nominal the intervals are too narrow.
    """
    rows = []
    for level in levels:
        table = change_intervals(result, level=level, **options)
        for group, genes in table.groupby("group", sort=False):
            rows.append((group, level, float(genes["inside"].mean()), len(genes)))
    return pd.DataFrame(rows, columns=["group", "level", "coverage", "genes"])


def widening(results: Iterable[Holdout], *, level: float = 0.95, **options) -> float:
    r"""The factor by which intervals of hold-outs with a known answer must be widened to cover as they say.

    Split-conformal: the smallest `widen` at which a share `level` of all genes of `results` is inside. Use
    hold-outs of *other* contexts than the one it is then applied to; with few of them it is a rough guide.

    References
    ----------
    Vovk, Gammerman, Shafer 2005, Algorithmic Learning in a Random World; Angelopoulos and Bates 2023, Found
    Trends Mach Learn 16:494 (normalised scores).
    """
    needed = []
    for result in results:
        table = change_intervals(result, level=level, **options)
        gap = table["true"] - table["predicted"]
        width = np.where(gap < 0, table["predicted"] - table["low"], table["high"] - table["predicted"])
        margin = norm.ppf((1 + level) / 2) * table["true_error"]
        excess = np.sqrt(np.maximum(gap**2 - margin**2, 0))
        needed.append(np.where(excess > 0, excess / np.maximum(width, 1e-12), 0.0))
    if not needed:
        raise HoldoutError(three_beats("hold-outs with a known answer", "none", "hold out training contexts"))
    values = np.concatenate(needed)
    rank = min(int(np.ceil((len(values) + 1) * level)), len(values))
    return float(np.sort(values)[rank - 1])
