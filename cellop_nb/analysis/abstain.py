"""Whether a prediction is inside what was trained on: the distance of its context to the training contexts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..data.contract import context_labels
from .space import EvaluationSpace
from .uncertainty import support_distance

if TYPE_CHECKING:
    from .holdout import Holdout


def support(
    result: Holdout,
    *,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    threshold: float = 3.0,
) -> pd.DataFrame:
    """Whether each predicted group is inside what was trained on.

    :func:`holdout` does this with the default threshold (``Holdout.support``, and ``outlier`` in its table).

    Parameters
    ----------
    result
        Of :func:`holdout`.
    threshold
        As in :func:`~cellop_nb.analysis.uncertainty.support_distance`.

    Returns
    -------
    DataFrame
        A row per group: ``group, known_context, nearest, mean_distance, e_distance, spacing, relative,
        cell_spread, outlier, reason``. A context that was trained with the perturbation is its own nearest one. An
        outlier's prediction is an extrapolation: abstain, or measure a nearer context.
    """
    groups = result.table[["context", "perturbation"]].drop_duplicates().itertuples(index=False, name=None)
    labels = context_labels(result.control, context_key).to_numpy()
    counts = result.space.select(result.control, layer)
    return group_support(result.space, counts, labels, list(groups), result.measured, threshold=threshold)


def group_support(
    space: EvaluationSpace,
    controls,
    labels: np.ndarray,
    groups: Iterable[tuple[str, str]],
    measured: Iterable[tuple[str, str]],
    *,
    threshold: float = 3.0,
) -> pd.DataFrame:
    """The rows of :func:`support`, from the control cells themselves.

    The control cells of a group's context are compared, in the components of the evaluation, with those of the
    contexts in which its perturbation (each part of a combination) was measured.

    Parameters
    ----------
    controls
        (cell, gene) raw counts of the control cells of all contexts, over the genes of `space`.
    labels
        (cell,) their contexts.
    groups, measured
        (context, perturbation) of the predicted groups, and of the training cells.
    """
    points, rows, measured = space.project(space.transform(controls)), [], list(measured)
    for context, perturbation in groups:
        trained = _contexts_with(measured, perturbation)
        row = {"group": f"{context}, {perturbation}", "known_context": context in trained}
        if not trained:
            reason = f"{perturbation!r} was measured in no training context"
            rows.append(row | {"outlier": True, "reason": reason})
            continue
        inside = np.isin(labels, sorted(trained))
        found = support_distance(
            points[labels == context], points[inside], labels[inside], threshold=threshold
        )
        rows.append(row | found.to_dict())
    return pd.DataFrame(rows)


def _contexts_with(measured: Iterable[tuple[str, str]], perturbation: str) -> set[str]:
    """Contexts in which the perturbation, or every part of the combination, was measured."""
    known: dict[str, set[str]] = {}
    for context, label in measured:
        known.setdefault(context, set()).update({label, *label.split("+")})
    parts = set(perturbation.split("+"))
    return {context for context, labels in known.items() if perturbation in labels or parts <= labels}
