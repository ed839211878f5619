"""The library of cells: their counts over all measured genes, of which a model may hold only some."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.batches import TOTAL_KEY
from ..data.contract import context_labels, obs_labels, perturbation_parts


def measured_totals(adata) -> np.ndarray | None:
    """Counts (cell,) over all measured genes, as ``obs["total_counts"]`` tells; None where nothing tells."""
    return adata.obs[TOTAL_KEY].to_numpy(np.float64) if TOTAL_KEY in adata.obs else None


def library_growth(
    adata,
    context: str,
    perturbation: str,
    *,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
) -> float:
    r"""By how much a perturbation changes the log of the mean library of a context.

    .. math:: g_{cp} = \log \bar l_{cp} - \log \bar l_{c0}

    where it was measured; otherwise the mean over the contexts where it was, each counting once; of a combination
    that was measured nowhere the sum over its parts; 0 of a perturbation that was measured nowhere.

    Parameters
    ----------
    adata
        Training cells with libraries l in ``obs["total_counts"]``.

    Notes
    -----
    The libraries of one group scatter by about half of their mean, so the growth of 100 cells is known to 7 %. It
    is pooled over all contexts alike: near contexts alone would be noisier and, on the interferon data, no nearer.
    """
    labels = {
        "context": context_labels(adata, context_key),
        "perturbation": obs_labels(adata, perturbation_key),
    }
    means = adata.obs[TOTAL_KEY].groupby([label.to_numpy() for label in labels.values()]).mean()
    logs = np.log(means.unstack())
    growth = logs.sub(logs[control], axis=0).drop(columns=control)
    return _growth(growth, context, perturbation)


def _growth(growth, context: str, perturbation: str) -> float:
    """From the table (context, perturbation) of measured growths, NaN where there is none."""
    if perturbation in growth and growth[perturbation].notna().any():
        measured = growth[perturbation].dropna()
        return float(measured.get(context, measured.mean()))
    parts = perturbation_parts(perturbation)
    return sum(_growth(growth, context, part) for part in parts) if len(parts) > 1 else 0.0
