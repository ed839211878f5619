"""Choosing how complex the operators may be, by leaving training contexts or combinations out in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..data.contract import perturbation_parts
from ..errors import ModelError, three_beats
from .fits import Fits, latents_only
from .formulas import Undefined
from .transfer import Complexity, Group
from .views import LatentView

_POWERS = (0.0, 1.0, 2.0, 3.0, 4.0)  # beyond, the nearest context alone is copied, whatever it is
_SHIFT, _LOOSE, _LOOSER = (Complexity(rank=0, ridge=0.0), Complexity(ridge=0.1), Complexity(ridge=0.03))
CANDIDATES: tuple[Complexity, ...] = (
    replace(_SHIFT, locality=0.0),
    *(replace(_SHIFT, locality=near, remainder=True) for near in _POWERS),
    *(replace(form, locality=near) for form in (_LOOSE, _LOOSER) for near in (0.0, 2.0, 4.0)),
)
"""Tried by default, from the simplest to the most flexible; the pure shift is among them."""

QUICK = {"cells_per_group": 64, "max_epochs": 4}
"""Training of operators that is enough to rank candidates."""


def leave_out(
    adata,
    candidates: Sequence[Complexity] = CANDIDATES,
    *,
    over: str = "context",
    view: LatentView | None = None,
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    split_key: str = "split",
    features: pd.DataFrame | None = None,
    max_folds: int = 12,
    seed: int = 0,
    progress: bool = True,
    **training,
) -> pd.DataFrame:
    """Energy distance of each candidate on training groups that took no part in its fit.

    Only cells of train and val are used: held-out cells take no part in the choice.

    Parameters
    ----------
    over
        What is left out in turn: the perturbed cells of each ``"context"`` that shares a perturbation with
        another one, each ``"group"`` of a context that keeps other perturbed cells, each measured
        ``"combination"`` whose parts were measured alone, or each ``"perturbation"``, which `features`
        must then describe.
    view
        The training cells as they are judged (:class:`CountView`); latents where None.
    features
        As in :func:`new_operators`.
    max_folds
        At most this many are left out, drawn with `seed`.
    **training
        Settings of :class:`OperatorTrainer`.

    Returns
    -------
    DataFrame
        ``candidate, complexity, group, e_distance, no_change``: energy distance (Euclidean, U-statistic,
        one per group, in the space of `view`) after and without the operator.

    Raises
    ------
    ModelError
        Where fewer than two can be left out in turn.
    """
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    keys |= {"use_rep": use_rep}
    cells = latents_only(adata, use_rep, split_key)
    view = LatentView(cells, **keys) if view is None else view
    folds = _some(folds_over(over, view.groups), max_folds, seed)
    if not enough(over, folds):
        found = f"{len(folds)} {over}s that the other groups could predict"
        expected = f"two or more {over}s to leave out in turn"
        raise ModelError(three_beats(expected, found, "name the complexity"))
    keys |= {"split_key": split_key}
    fits = Fits(cells, view, keys=keys, features=features, seed=seed, training=QUICK | training)
    tries = [(fold, candidate) for fold in folds for candidate in candidates]
    rows = []
    for fold, candidate in tqdm(tries, desc="choosing complexity", disable=not progress):
        labels = {"candidate": candidates.index(candidate), "complexity": str(candidate)}
        rows += [labels | row for row in left_out(fits, folds[fold], candidate)]
    return pd.DataFrame(rows)


def left_out(
    fits: Fits, fold: list[Group], candidate: Complexity, without: list[Group] | None = None
) -> list[dict]:
    """One row per group of the fold: how far the candidate's prediction is from its cells.

    The fit lacks the groups `without`, the fold itself where None.
    """
    out = frozenset(fold if without is None else without)
    response, view, rows = fits.response(out, candidate, asked=fold), fits.view, []
    known = set(response.operators.conditions.perturbations)
    for context, perturbation in fold:
        if not set(perturbation.split("+")) <= known:
            continue
        real = view.rows(context, perturbation)
        start = view.rows(context, view.control)
        unmoved = view.energy(view.moved(start, view.z[start], None), real)
        try:
            energy = view.energy(fits.predict(response, context, perturbation)[1], real)
        except Undefined:  # a rule without an answer leaves the effect where it is
            energy = unmoved
        energies = {"e_distance": energy, "no_change": unmoved}
        rows.append({"group": f"{context}, {perturbation}", **energies})
    return rows


def _some(folds: dict, most: int, seed: int) -> dict:
    """At most `most` of the folds, in their order."""
    if len(folds) <= most:
        return folds
    kept = set(np.random.default_rng(seed).permutation(len(folds))[:most].tolist())
    return {name: fold for k, (name, fold) in enumerate(folds.items()) if k in kept}


def leave_contexts_out(adata, candidates: Sequence[Complexity] = CANDIDATES, **options) -> pd.DataFrame:
    """:func:`leave_out` over contexts."""
    return leave_out(adata, candidates, over="context", **options)


def _context_folds(groups: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    shared = sorted({c for c, p in groups if any(q == p and d != c for d, q in groups)})
    return {context: [group for group in groups if group[0] == context] for context in shared}


def _group_folds(groups: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Each group whose context keeps other perturbed cells, and whose perturbation another context."""
    contexts, perturbations = [c for c, _ in groups], [p for _, p in groups]
    kept = [(c, p) for c, p in groups if contexts.count(c) > 1 and perturbations.count(p) > 1]
    return {", ".join(group): [group] for group in kept}


def combinations_of(groups: Sequence[tuple[str, str]]) -> list[str]:
    """Combinations among the (context, perturbation) groups whose parts were all measured alone."""
    labels = {p for _, p in groups}
    return sorted(p for p in labels if "+" in p and set(perturbation_parts(p)) <= labels)


def _combination_folds(groups: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    return {label: [group for group in groups if group[1] == label] for label in combinations_of(groups)}


def _perturbation_folds(groups: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Each perturbation, with the combinations that it is part of."""
    singles = sorted({p for _, p in groups if "+" not in p})
    return {single: [group for group in groups if single in group[1].split("+")] for single in singles}


_FOLDS = {
    "context": _context_folds,
    "group": _group_folds,
    "combination": _combination_folds,
    "perturbation": _perturbation_folds,
}


def folds_over(over: str, groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Name to the (context, perturbation) groups that are left out together; `over` as in :func:`leave_out`."""
    return _FOLDS[over](list(groups))


def what_to_leave_out(
    groups: Sequence[tuple[str, str]], wanted: Sequence[tuple[str, str]], *, described: bool = False
) -> str | None:
    """What resembles the question most: combinations, perturbations, groups or contexts.

    Parameters
    ----------
    groups, wanted
        Perturbed (context, perturbation) groups of the training cells, and those to predict.
    described
        Whether features describe the perturbations, so that unmeasured ones can be asked for.

    Returns
    -------
    A value of `over` of :func:`leave_out`, or None where fewer than two can be left out in turn.
    """
    measured = {p for _, p in groups}
    unmeasured = {p for _, p in wanted} - measured
    parts = {part for label in measured for part in label.split("+")}
    trained = {c for c, _ in groups}
    order = ["group", "context"] if all(c in trained for c, _ in wanted) else ["context"]
    if any("+" in label for label in unmeasured):
        order = ["combination", *order]
    if described and any(not set(label.split("+")) <= parts for label in unmeasured):
        order = ["perturbation", *order]
    return next((over for over in order if enough(over, folds_over(over, groups))), None)


SMALL_EFFECT = 0.1
"""Energy distance without a change, below which a group says little about what is left of its effect."""


def enough(over: str, folds: dict[str, list[Group]]) -> bool:
    """Whether two can be left out: of one combination, the contexts where it was measured count too."""
    return (sum(map(len, folds.values())) if over == "combination" else len(folds)) > 1


def share_left(table: pd.DataFrame) -> pd.Series:
    """Share of each group's effect that is left after the operator."""
    return table["e_distance"] / table["no_change"].clip(lower=SMALL_EFFECT)


def choose(table: pd.DataFrame, candidates: Sequence[Complexity] = CANDIDATES) -> Complexity:
    """The candidate that leaves the smallest share of the effect, mean over the groups left out.

    The share is the energy distance after the operator over that without one (:data:`SMALL_EFFECT` where that is
    smaller), so that a group counts by how well it is predicted, not by how strongly it responds. Every group was
    predicted from the others, so that flexibility alone is not rewarded; of equals the simplest is taken. A
    preference for simple candidates within a standard error was tried: with few contexts that error is wide, and the
    pure shift was taken where near contexts predict clearly better.
    """
    mean = share_left(table).groupby(table["candidate"]).mean()
    return candidates[int(mean.index[np.isclose(mean, mean.min(), rtol=1e-6)].min())]
