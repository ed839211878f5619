"""Combinations and sequences of perturbations: three rules for A+B, order effects, and the way back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from ..data.groups import Group, Groups, evenly
from ..display import Distances
from ..errors import LabelError, ModelError, checked, did_you_mean
from ..models.affine import AffineOperator, check_strength, commutator, compose, sum_generators
from ..models.energy import energy_distance, noise_floor, noise_limit, self_distance
from ..models.operators import Condition, OperatorModel, perturbation_parts
from .distances import NO_CHANGE, OPERATOR, OWN_MEAN

__all__ = ["combine", "order_effects", "reversal", "sequence"]

RULES = ("axes", "composition", "generator")


def combine(
    operators: OperatorModel,
    perturbation: str,
    context: str | None = None,
    *,
    rule: str = "axes",
) -> AffineOperator:
    r"""The operator of ``"A+B"`` by one of three rules.

    ``axes``
        The coefficients on the shared response axes add, plus the interaction of pairs that were measured.
    ``composition``
        :math:`K_B \circ K_A`: first A, then B, in the order of the label.
    ``generator``
        :math:`e^{L_A + L_B}` with :math:`K = e^L`: both at once, without an order.

    Give the result to :func:`cellop_nb.predict` for cells in gene space.

    Parameters
    ----------
    operators
        Fitted operators.
    perturbation
        ``"A"``, ``"A+B"``, ``"A+B+C"``; rules agree for a single one.
    context
        One that the operators were fitted with has its own part of the response; any other, or None, has the
        shared part.
    rule
        ``"axes"``, ``"composition"`` or ``"generator"``.

    Returns
    -------
    AffineOperator

    Raises
    ------
    LabelError
        For a rule or a perturbation that is not known.
    ModelError
        For ``rule="generator"`` where a part has no real logarithm.

    References
    ----------
    Higham (2008), Functions of Matrices, section 10.1 (exponential of a sum against the product).
    """
    if rule not in RULES:
        raise LabelError(f"a rule among {list(RULES)}", repr(rule), did_you_mean(rule, RULES))
    if rule == "axes":
        return _operator(operators, perturbation, context)
    names = perturbation_parts(perturbation, operators.conditions.perturbations)
    parts = [_operator(operators, name, context) for name in names]
    return compose(parts) if rule == "composition" else sum_generators(parts)


def _operator(
    operators: OperatorModel, perturbation: str, context: str | None, dose: float = 1.0
) -> AffineOperator:
    """The operator in a context; that of the shared response in a context that the operators were not fitted with."""
    own = context if context in operators.conditions.contexts else None
    return operators.operator(
        Condition.parse(perturbation, own, dose=dose, perturbations=operators.conditions.perturbations)
    )


def sequence(
    operators: OperatorModel,
    steps: Iterable[str | tuple[str, float]],
    context: str | None = None,
) -> AffineOperator:
    """Perturbations given one after the other, each at a strength.

    Parameters
    ----------
    steps
        Labels, or pairs (label, strength) with a strength between 0 and 1.5; the first acts first.
    operators, context
        As in :func:`combine`.

    Returns
    -------
    AffineOperator

    Raises
    ------
    LabelError
        For a perturbation that is not known.
    ModelError
        For a strength out of range, or a part strength of an operator without a real logarithm.
    """
    parts = []
    for step in steps:
        name, strength = (step, 1.0) if isinstance(step, str) else step
        parts.append(_operator(operators, name, context).power(check_strength(strength)))
    return compose(parts)


@checked
def order_effects(
    data: AnnData | Groups,
    operators: OperatorModel,
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    contexts: Sequence[str] | None = None,
    use_rep: str = "X_nbvae",
    max_pairs: int = 100,
    max_cells: int = 1000,
) -> pd.DataFrame:
    """How much it matters which of two perturbations comes first.

    Parameters
    ----------
    data
        A screen that was set up, with latents in ``obsm[use_rep]``, or its groups; the control cells of each context
        are moved in both orders.
    operators
        Fitted operators.
    pairs
        Which pairs. None takes all of the model's perturbations where that is at most `max_pairs` pairs, otherwise all
        pairs of those few perturbations that move the mean control cells furthest: an order effect needs two moves.
    contexts
        Which contexts; all that the operators were fitted with where None.
    max_pairs
        Most pairs that are taken without being asked for.
    max_cells
        Control cells moved, evenly spread over the data where a context has more.

    Returns
    -------
    DataFrame
        A row per context and pair, largest order effect first: ``context, first, second``,
        ``commutator`` (relative Frobenius norm, 0 where they commute), ``gap`` (mean length of the difference
        between the two orders' cells), ``effect`` (mean length of the move), ``relative`` (their ratio), and
        ``energy`` between the two orders' clouds (Euclidean, U-statistic, latent).

    Raises
    ------
    LabelError
        For a context without control cells, or a perturbation that the operators do not know.
    """
    groups = data if isinstance(data, Groups) else Groups(data, use_rep=use_rep)
    starts = {}
    for context in operators.conditions.contexts if contexts is None else contexts:
        groups.controls(context)  # refuses an unknown one
        cells = groups.control[context]
        starts[context] = cells[evenly(len(cells), max_cells)]
    if pairs is None:
        pairs = list(combinations(_strongest(operators, starts, max_pairs), 2))
    rows = []
    for context, start in starts.items():
        names = dict.fromkeys(name for pair in pairs for name in pair)
        single = {name: _operator(operators, name, context) for name in names}
        for first, second in pairs:
            effects = _order(start, single[first], single[second])
            rows.append({"context": context, "first": first, "second": second, **effects})
    columns = ["context", "first", "second", "commutator", "gap", "effect", "relative", "energy"]
    return pd.DataFrame(rows, columns=columns).sort_values("energy", ascending=False, ignore_index=True)


@torch.no_grad()
def _strongest(operators: OperatorModel, starts: Mapping[str, torch.Tensor], max_pairs: int) -> list[str]:
    """The perturbations, in the model's order, that make at most `max_pairs` pairs: those that move mean cells most."""
    names = operators.conditions.perturbations
    most = int((1 + math.sqrt(1 + 8 * max_pairs)) / 2)  # n (n - 1) / 2 pairs
    if len(names) <= most:
        return list(names)
    lengths = torch.zeros(len(names))
    for context, start in starts.items():
        own = context if context in operators.conditions.contexts else None
        matrices, shifts = operators.affine(
            operators.conditions.design([Condition((n,), own) for n in names])
        )
        mean = start.mean(0).to(shifts)
        lengths += (matrices @ mean + shifts - mean).norm(dim=1).cpu()
    return [names[k] for k in sorted(lengths.topk(most).indices.tolist())]


def _order(start: torch.Tensor, first: AffineOperator, second: AffineOperator) -> dict[str, float]:
    departure = commutator(first, second)
    forth, back = compose([first, second])(start), compose([second, first])(start)
    gap = float(np.linalg.norm(departure.displacement(start.numpy()), axis=1).mean())
    effect = float((forth - start).norm(dim=1).mean())
    return {
        "commutator": departure.relative,
        "gap": gap,
        "effect": effect,
        "relative": gap / effect if effect > 0 else 0.0,
        "energy": float(energy_distance(forth, back)),
    }


@checked
def reversal(
    adata: AnnData,
    operators: OperatorModel,
    *,
    split: str | None = "test",
    use_rep: str = "X_nbvae",
    seed: int = 0,
) -> Distances:
    """Perturbed cells led back by the inverse operators, compared with real control cells.

    Parameters
    ----------
    adata
        A screen that was set up, with latents in ``obsm[use_rep]`` and ``obs["split"]``.
    operators
        Fitted operators.
    split
        Whose perturbed cells are led back, all cells where None; they are compared with the training controls
        of their context (all controls where None).

    Returns
    -------
    Distances
        A row per group and method: ``context, perturbation, group, cells, method, energy, floor, limit,
        reason``. Methods: "no change" (perturbed against control cells), "own mean" (less the difference of the
        group's training means, an oracle), "operator" (the inverse; NaN and the reason where it has none). Energy
        distances are Euclidean, U-statistic, in the latent space; floor and limit are those of the control cells, the
        limit of as many as are led back.

    Raises
    ------
    LabelError
        For a split or perturbation that is not known, or data that were not set up.
    """
    training = None if split is None else "train"
    seen = Groups(adata, use_rep=use_rep, split=training)
    back = Groups(adata, use_rep=use_rep, split=split, control_split=training)
    shifts = {group.label: group.cells.mean(0) - seen.control[group.context].mean(0) for group in seen}
    own = {context: self_distance(cells) for context, cells in back.control.items()}
    floors = {context: noise_floor(cells, seed=seed) for context, cells in back.control.items()}

    @cache
    def limit(context: str, n_cells: int) -> float:
        return noise_limit(back.control[context], n_cells, seed=seed)

    rows = []
    for group in back:
        context, labels = group.context, (group.context, group.perturbation, group.label, len(group))
        noise = floors[context], limit(context, len(group))
        operator = _operator(operators, group.perturbation, context, group.dose)
        for method, cells, reason in _led_back(group, operator, shifts.get(group.label)):
            energy = math.nan
            if cells is not None:
                energy = float(energy_distance(cells, back.control[context], y_self=own[context]))
            rows.append((*labels, method, energy, *noise, reason))
    columns = ["context", "perturbation", "group", "cells", "method", "energy", "floor", "limit", "reason"]
    return Distances(rows, columns=columns)


def _led_back(group: Group, operator: AffineOperator, shift: torch.Tensor | None) -> Iterator[tuple]:
    """Method, its cells (cell, d) or None, and the reason for None."""
    yield NO_CHANGE, group.cells, ""
    if shift is None:
        yield OWN_MEAN, None, "no training cells of this group"
    else:
        yield OWN_MEAN, group.cells - shift, ""
    try:
        yield OPERATOR, operator.inverse()(group.cells), ""
    except ModelError as refusal:
        yield OPERATOR, None, str(refusal)
