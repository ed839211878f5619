"""Combinations and sequences of perturbations: three rules for A+B, order effects, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from ..data.contract import Keys, perturbation_parts
from ..data.groups import Groups
from ..display import Distances
from ..errors import LabelError, ModelError, did_you_mean, three_beats
from ..models.affine import AffineOperator, check_strength, commutator, compose, sum_generators
from ..models.energy import energy_distance, noise_floor
from ..models.operators import OperatorModel
from .formulas import Undefined
from .predict import latents, operator_for, source_cells
from .transfer import Response

RULES = ("axes", "composition", "generator")


def combine(
    operators: OperatorModel,
    perturbation: str,
    context: str | None = None,
    *,
    rule: str = "axes",
    control: str = "control",
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

    def operator(name: str) -> AffineOperator:
        return operator_for(operators, name, context, control=control)[0]

    return _by_rule(operator, perturbation, rule)


def response_operator(
    response: Response, perturbation: str, context: str, *, rule: str | None = None
) -> AffineOperator:
    """As :func:`combine`, for a context that may take over from others (:meth:`Response.operator`).

    Parameters
    ----------
    rule
        That of the response's complexity where None; a single perturbation then has its operator.

    Raises
    ------
    Undefined
        Where a perturbation was not trained on, or the rule is not defined for it, with the reason.
    """
    single = len(perturbation_parts(perturbation)) < 2
    if rule is None:
        rule = "axes" if single else response.complexity.rule
    if rule != "axes" and single:
        raise Undefined(f"{perturbation!r} is not a combination")
    try:
        return _by_rule(lambda name: response.operator(name, context), perturbation, rule)
    except (LabelError, ModelError) as refusal:
        raise Undefined(str(refusal)) from None


def _by_rule(operator: Callable[[str], AffineOperator], perturbation: str, rule: str) -> AffineOperator:
    if rule not in RULES:
        raise LabelError(three_beats(f"a rule among {list(RULES)}", repr(rule), did_you_mean(rule, RULES)))
    if rule == "axes":
        return operator(perturbation)
    parts = [operator(name) for name in perturbation_parts(perturbation)]
    return compose(parts) if rule == "composition" else sum_generators(parts)


def sequence(
    operators: OperatorModel,
    steps: Iterable[str | tuple[str, float]],
    context: str | None = None,
    *,
    control: str = "control",
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
        operator, _ = operator_for(operators, name, context, control=control)
        parts.append(operator.power(check_strength(strength)))
    return compose(parts)


def order_effects(
    adata,
    operators: OperatorModel,
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    contexts: Sequence[str] | None = None,
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
) -> pd.DataFrame:
    """How much it matters which of two perturbations comes first.

    Parameters
    ----------
    adata
        With latents in ``obsm[use_rep]``; the control cells of each context are moved in both orders.
    operators
        Fitted operators.
    pairs
        Which pairs; all of the model's perturbations where None.
    contexts
        Which contexts; all that the operators were fitted with where None.

    Returns
    -------
    DataFrame
        A row per context and pair, largest order effect first: ``context, first, second``,
        ``commutator`` (relative Frobenius norm, 0 where they commute), ``gap`` (mean length of the difference
        between the two orders' cells), ``effect`` (mean length of the move), ``relative`` (their ratio), and
        ``energy`` between the two orders' clouds (Euclidean, U-statistic, latent).
    """
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    pairs = list(combinations(operators.conditions.perturbations, 2)) if pairs is None else list(pairs)
    z, rows = latents(adata, use_rep), []
    for context in operators.conditions.contexts if contexts is None else contexts:
        start = z[source_cells(adata, context, **keys)]
        for first, second in pairs:
            both = [operator_for(operators, name, context, control=control)[0] for name in (first, second)]
            rows.append({"context": context, "first": first, "second": second, **_order(start, *both)})
    columns = ["context", "first", "second", "commutator", "gap", "effect", "relative", "energy"]
    return pd.DataFrame(rows, columns=columns).sort_values("energy", ascending=False, ignore_index=True)


def _order(start: torch.Tensor, first: AffineOperator, second: AffineOperator) -> dict:
    found = commutator(first, second)
    forth, back = compose([first, second])(start), compose([second, first])(start)
    gap = float(np.linalg.norm(found.displacement(start.numpy()), axis=1).mean())
    effect = float((forth - start).norm(dim=1).mean())
    return {
        "commutator": found.relative,
        "gap": gap,
        "effect": effect,
        "relative": gap / effect if effect > 0 else 0.0,
        "energy": float(energy_distance(forth, back)),
    }


def reversal(
    adata,
    operators: OperatorModel,
    *,
    split: str | None = "test",
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    split_key: str = "split",
    seed: int = 0,
) -> pd.DataFrame:
    """Perturbed cells led back by the inverse operators, compared with real control cells.

    Parameters
    ----------
    operators
        Fitted operators.
    split
        Whose perturbed cells are led back, all cells where None; they are compared with the training controls
        of their context (all controls where None).

    Returns
    -------
    DataFrame
        A row per group and method: ``context, perturbation, group, cells, method, energy, floor,
        reason``. Methods: "no change" (perturbed against control cells), "mean shift" (less the difference of the
        training means), "operator" (the inverse; NaN and the reason where it has none). Energy distances are
        Euclidean, U-statistic, in the latent space; the floor compares parts of the control cells.

    Raises
    ------
    LabelError
        For a key, split or perturbation that is not known.
    """
    keys = {
        "use_rep": use_rep,
        "keys": Keys(None, perturbation_key, context_key, control),
        "split_key": split_key,
    }
    training = None if split is None else "train"
    seen = Groups(adata, split=training, **keys)
    back = Groups(adata, split=split, control_split=training, **keys)
    means = {group.label: group.cells.mean(0) - seen.control[group.context].mean(0) for group in seen}
    rows = []
    for group in back:
        real = back.control[group.context]
        floor = noise_floor(real, len(group), seed=seed)
        operator, _ = operator_for(operators, group.perturbation, group.context, control=control)
        for method, cells, reason in _led_back(group, operator, means.get(group.label)):
            energy = float("nan") if cells is None else float(energy_distance(cells, real))
            labels = (group.context, group.perturbation, group.label, len(group))
            rows.append((*labels, method, energy, floor, reason))
    columns = ["context", "perturbation", "group", "cells", "method", "energy", "floor", "reason"]
    return Distances(rows, columns=columns)


def _led_back(group, operator: AffineOperator, shift: torch.Tensor | None):
    yield "no change", group.cells, ""
    if shift is None:
        yield "mean shift", None, "no training cells of this group"
    else:
        yield "mean shift", group.cells - shift, ""
    try:
        yield "operator", operator.inverse()(group.cells), ""
    except ModelError as refusal:
        yield "operator", None, str(refusal)
