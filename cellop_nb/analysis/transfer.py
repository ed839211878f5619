"""Carrying a response over to a context where it was not measured: a shared operator, and what near contexts add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

import numpy as np
from torch import Tensor

from ..data.contract import perturbation_parts
from ..models.affine import AffineOperator
from ..models.carry import Remainder
from ..models.operators import Condition, OperatorModel

Group = tuple[str, str]  # (context, perturbation)


@dataclass(frozen=True)
class Complexity:
    """How much freedom the operators get, and what a new context takes over from the measured ones.

    Parameters
    ----------
    rank
        Rank of the matrices; 0 is a pure shift, None full rank.
    ridge
        Weight of the departure from the identity.
    context_rank, context_ridge
        Rank and weight of the contexts' own parts; None gives them none.
    locality
        How much more near contexts count than far ones, see :func:`borrowing`; 0 counts all alike, None takes
        over the shared operator alone.
    remainder
        Whether what the operators missed in the measured contexts, each left out in turn, is added to the
        prediction: the mean change of expression levels, and of the number of counts (:class:`Remainder`).
    rule
        How combinations are asked for (:func:`combine`).
    """

    rank: int | None = None
    ridge: float = 0.1
    context_rank: int | None = None
    context_ridge: float = 0.01
    locality: float | None = None
    remainder: bool = False
    rule: str = "axes"

    def __str__(self) -> str:
        form = "shift" if self.rank == 0 else f"affine, ridge {self.ridge:g}"
        own = ", own parts" if self.context_rank is not None else ""
        borrowed = "" if self.locality is None else f", locality {self.locality:g}"
        rule = "" if self.rule == "axes" else f", {self.rule}"
        return form + own + borrowed + (", remainder" if self.remainder else "") + rule

    @property
    def form(self) -> Complexity:
        """The part that is fitted; the rest only changes what is asked of a fit."""
        return replace(self, locality=None, remainder=False, rule="axes")

    @property
    def model(self) -> dict:
        """Keywords of :func:`new_operators`."""
        return {"rank": self.rank, "context_rank": self.context_rank}


def borrowing(profile: np.ndarray, sources: Mapping[str, np.ndarray], locality: float) -> dict[str, float]:
    r"""Shares in which a context takes over what was found in others: inverse distance weighting.

    .. math:: w_c \propto \|m - m_c\|^{-\lambda}

    Parameters
    ----------
    profile
        Mean control cell m of the context.
    sources
        Mean control cells of the others.
    locality
        :math:`\lambda`; 0 weighs all alike, the nearest alone counts where it is large.

    Returns
    -------
    dict of name to share; they sum to one.

    References
    ----------
    Shepard (1968), Proc. 23rd ACM National Conference, 517.
    """
    distance = np.array([np.linalg.norm(profile - source) for source in sources.values()])
    nearest = max(distance.min(), np.finfo(np.float32).tiny)
    weight = np.maximum(distance / nearest, 1.0) ** -float(locality)
    return dict(zip(sources, (weight / weight.sum()).tolist(), strict=True))


@dataclass(frozen=True)
class Response:
    """Operators fitted on some contexts, ready to be asked for any.

    Attributes
    ----------
    operators : OperatorModel
        The fitted family.
    complexity : Complexity
        What it was fitted with.
    control : str
        Label of the unperturbed cells.
    profiles : dict
        Mean control cell of each context.
    departures : dict
        (context, perturbation) to (d,): how far the operator's mean cell was from the measured one.
    remainders : dict
        Perturbation to the :class:`Remainder` of the measured contexts.
    missed : dict
        (context, perturbation) to what is missed there, for parts of combinations.
    errors : dict
        Perturbation to (context, gene): real less predicted mean expression (log1p-CP10k) of the measured contexts,
        each predicted without its own cells. What a prediction for a new context may be off by.
    """

    operators: OperatorModel
    complexity: Complexity
    control: str = "control"
    profiles: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    departures: Mapping[Group, Tensor] = field(default_factory=dict, repr=False)
    remainders: dict[str, Remainder] = field(default_factory=dict, repr=False)
    missed: dict[Group, Remainder] = field(default_factory=dict, repr=False)
    errors: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def remainder(self, perturbation: str, context: str) -> Remainder | None:
        """What to add to a prediction; of an unmeasured combination, the sum of its parts'."""
        parts = perturbation_parts(perturbation)
        if perturbation in self.remainders or len(parts) < 2:
            return self.remainders.get(perturbation)
        found = [self.missed.get((context, part), self.remainders.get(part)) for part in parts]
        return None if any(part is None for part in found) else reduce(add, found)

    def operator(self, perturbation: str, context: str) -> AffineOperator:
        """The operator of a perturbation in a context; one that was not measured takes over from near ones.

        Raises
        ------
        LabelError
            For a perturbation that the model was not fitted with.
        """
        base = self.operators.operator(own_condition(self.operators, perturbation, context, self.control))
        added = None
        if self.complexity.locality is not None and context in self.profiles:
            added = self._departure(perturbation, context)
        return base if added is None else AffineOperator(base.matrix, base.shift + added, base.label)

    def shares(self, perturbation: str, context: str) -> dict[str, float]:
        """From which contexts the departure of a perturbation is taken, and in what shares."""
        sources = {c: self.profiles[c] for c, p in self.departures if p == perturbation}
        if context in sources:
            return {context: 1.0}
        return borrowing(self.profiles[context], sources, self.complexity.locality) if sources else {}

    def _departure(self, perturbation: str, context: str) -> Tensor | None:
        shares = self.shares(perturbation, context)
        if shares:
            return reduce(add, (share * self.departures[c, perturbation] for c, share in shares.items()))
        parts = perturbation_parts(perturbation)
        each = [self._departure(part, context) for part in parts] if len(parts) > 1 else []
        found = [departure for departure in each if departure is not None]
        return reduce(add, found) if found else None


def own_condition(operators: OperatorModel, perturbation: str, context: str, control: str) -> Condition:
    """A perturbation with the context's own part where the operators were trained on the context."""
    own = context if context in operators.conditions.contexts else None
    return Condition.parse(perturbation, own, control=control)
