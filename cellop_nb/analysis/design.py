"""Which experiment to run next: the unmeasured (context, perturbation) that tell most of what is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from ..data.contract import context_name
from ..errors import LabelError, ModelError, three_beats
from .cellop import CellOp, Context


def next_experiments(
    model: CellOp,
    candidates: Sequence[tuple[Context, str]],
    n: int = 10,
    *,
    wanted: Sequence[tuple[Context, str]] | None = None,
) -> pd.DataFrame:
    r"""Rank unmeasured (context, perturbation) pairs by how much uncertainty their measurement would remove.

    .. math:: \text{gain}(c) = \sum_w \mathrm{cov}(w, c)^2 / (\mathrm{var}(c) + v)

    under a Gaussian process over contexts and descriptors, given what was measured and what was chosen before, so that
    the next choice tells something else. The covariance is a product of Gaussian kernels of median width, of descriptors
    and of mean control cells; v is the mean share of noise in a measured effect.

    Parameters
    ----------
    model
        Fitted with `features`.
    candidates
        Pairs that could be measured.
    n
        How many to choose.
    wanted
        Pairs whose effects are wanted; the candidates where None.

    Returns
    -------
    DataFrame
        ``context, perturbation, gain, uncertainty``: share of the wanted variance that each removes, in the order of the
        choice, and the share of the prior variance of the wanted that is left after it.

    Raises
    ------
    ModelError
        For a model without features.
    LabelError
        For no candidate, or a pair without descriptor or control cells.

    References
    ----------
    MacKay (1992), Neural Computation 4:590; Cohn, Ghahramani, Jordan (1996), JAIR 4:129 (expected reduction of variance).
    """
    if model.features is None or not model.members:
        fix = "fit CellOp(adata, features=...)"
        raise ModelError(three_beats("a fitted model that knows descriptors of perturbations", "none", fix))
    pairs = [(context_name(context, model.keys), perturbation) for context, perturbation in candidates]
    if not pairs:
        raise LabelError(
            three_beats("candidates to choose from", "none", "name pairs (context, perturbation)")
        )
    targets = pairs if wanted is None else [(context_name(c, model.keys), p) for c, p in wanted]
    means, rows = model.means, model.features.dropna(how="all")
    rows = rows.set_axis(rows.index.map(str), axis=0)
    for context, perturbation in (*pairs, *targets):
        if perturbation not in rows.index or context not in means.contexts:
            problem = f"{perturbation!r} in {context!r}"
            fix = "leave it out, or describe it and measure the context's controls"
            raise LabelError(
                three_beats("a described perturbation and a context with controls", problem, fix)
            )
    measured = [pair for pair in means.pairs if pair[1] in rows.index]
    change = means.change[[means.pairs.index(pair) for pair in measured]]
    noise = means.noise[[means.pairs.index(pair) for pair in measured]].sum(1)
    signal = max(
        float(np.square(change - change.mean(0)).sum(1).mean() - noise.mean()), 0.1 * float(noise.mean())
    )
    every = [*measured, *pairs, *targets]
    near = gaussian(rows.loc[[p for _, p in every]].to_numpy(dtype=float))
    near *= gaussian(means.control[[means.contexts.index(c) for c, _ in every]])
    first, last = len(measured), len(measured) + len(pairs)
    chosen, gains, left = choose(
        near, np.arange(first), np.arange(first, last), np.arange(last, len(every)), n, noise / signal
    )
    table = pd.DataFrame([every[k] for k in chosen], columns=["context", "perturbation"])
    return table.assign(gain=gains, uncertainty=left)


def gaussian(x: np.ndarray) -> np.ndarray:
    """(n, n) Gaussian kernel of the rows of x (n, k), of the median distance between different rows as width."""
    distance = cdist(x, x)
    apart = distance[distance > 0]
    return np.exp(-np.square(distance / (np.median(apart) if len(apart) else 1.0)) / 2)


def choose(
    kernel: np.ndarray,
    measured: np.ndarray,
    candidates: np.ndarray,
    wanted: np.ndarray,
    n: int,
    noise: np.ndarray,
) -> tuple[list[int], list[float], list[float]]:
    """Greedy choice of n candidates, the share of the wanted variance that each removes, and the share that is left.

    Parameters
    ----------
    kernel
        (m, m) prior covariance of all rows, of which the others are positions.
    noise
        Of each measured row, in units of the prior variance; a candidate is expected to have their mean.
    """
    gram = kernel[np.ix_(measured, measured)] + np.diag(noise + 1e-9)
    covariance = kernel - kernel[:, measured] @ np.linalg.solve(gram, kernel[measured])
    own, prior = float(noise.mean()) + 1e-9, float(np.trace(kernel[np.ix_(wanted, wanted)]))
    chosen: list[int] = []
    gains, left = [], []
    for _ in range(min(n, len(candidates))):
        variance = np.maximum(np.diag(covariance)[candidates], 0.0) + own
        gain = np.square(covariance[np.ix_(wanted, candidates)]).sum(0) / variance
        gain[np.isin(candidates, chosen)] = -1.0
        best = int(candidates[np.argmax(gain)])
        column = covariance[:, best].copy()
        covariance -= np.outer(column, column) / (max(column[best], 0.0) + own)
        chosen.append(best)
        gains.append(float(gain.max()) / prior)
        left.append(float(np.maximum(np.diag(covariance)[wanted], 0.0).sum()) / prior)
    return chosen, gains, left
