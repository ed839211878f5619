"""Conditions: from names, doses and contexts to the numbers that an operator family is driven by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import LabelError, ModelError, did_you_mean, three_beats


@dataclass(frozen=True)
class Condition:
    """A perturbation (or combination) with its doses, in a context.

    Parameters
    ----------
    perturbations
        Names of the parts, ``()`` for control.
    context
        Cell type, donor or the like; None for any context, which uses the shared response alone.
    doses
        One strength per part, 1 for the measured one.
    like
        For a context that was never seen: known contexts with weights that sum to one, whose own parts of the
        response are borrowed in these shares; ``()`` borrows none.

    Raises
    ------
    ModelError
        If there are not as many doses as perturbations.
    """

    perturbations: tuple[str, ...]
    context: str | None = None
    doses: tuple[float, ...] = ()
    like: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        if not self.doses:
            object.__setattr__(self, "doses", (1.0,) * len(self.perturbations))
        if len(self.doses) != len(self.perturbations):
            raise ModelError(
                three_beats(
                    f"one dose for each of {len(self.perturbations)} perturbations",
                    f"{len(self.doses)} doses",
                    "give the doses in the order of the perturbations",
                )
            )

    @classmethod
    def parse(
        cls, label: str, context: str | None = None, *, control: str = "control", dose: float = 1.0
    ) -> Condition:
        """Read ``"A"``, ``"A+B"`` or the control label."""
        parts = () if label == control else tuple(label.split("+"))
        return cls(parts, context, (float(dose),) * len(parts))

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """Contexts whose own parts of the response act, with their weights."""
        own = () if self.context is None else ((self.context, 1.0),)
        return self.like or own

    @property
    def label(self) -> str:
        """``"A+B"``, ``"A (dose 0.5)"``, or ``"control"``."""
        named = [
            name if dose == 1 else f"{name} (dose {dose:g})"
            for name, dose in zip(self.perturbations, self.doses, strict=True)
        ]
        return "+".join(named) or "control"

    def __str__(self) -> str:
        return self.label if self.context is None else f"{self.context}, {self.label}"


@dataclass(frozen=True)
class Design:
    """Conditions as tensors: doses (condition, perturbation), context one-hot, pair products, strength."""

    doses: Tensor
    contexts: Tensor
    pairs: Tensor
    strength: Tensor

    @property
    def weight(self) -> Tensor:
        """Weight of each context's own part, (condition, context)."""
        return self.contexts * self.strength.unsqueeze(1)


def first_embedding(n_rows: int, n_axes: int) -> Tensor:
    """Orthogonal embeddings (row, axis): non-zero, so that gradients reach axes that still are zero."""
    start = torch.empty(n_rows, n_axes)
    scale = max(n_rows / n_axes, 1.0) ** 0.5
    return nn.init.orthogonal_(start, scale, generator=torch.Generator().manual_seed(0))


class ConditionEncoder(nn.Module):
    r"""Conditions to the coefficients of the shared axes.

    .. math::
        h(\theta) = \Big(\sum_p s_p e_p + \sum_{p<q} s_p s_q e_{pq}\Big) \odot (1 + m_c), \quad
        \beta = h, \quad \alpha = W h

    with doses s, embeddings e (learned, or a linear map of given features), interactions of the pairs that
    were measured, and a modulation m of the context that is zero for a context never seen.

    Parameters
    ----------
    perturbations, contexts
        Known names, without the control.
    n_axes
        K, the number of shared response axes.
    pairs
        Measured pairs of perturbations, each of which gets an interaction term that starts at zero.
    features
        (perturbation, feature) given descriptors in the order of `perturbations`; embeddings are then linear
        in them, and perturbations that were never seen can be asked for.
    """

    def __init__(
        self,
        perturbations: Sequence[str],
        contexts: Sequence[str],
        n_axes: int,
        *,
        pairs: Sequence[tuple[str, str]] = (),
        features: Tensor | None = None,
    ):
        super().__init__()
        self.perturbations, self.contexts = list(perturbations), list(contexts)
        self.pairs = [tuple(sorted(pair)) for pair in pairs]
        for name in {name for pair in self.pairs for name in pair}:
            self._index(name, self.perturbations, "perturbation")
        if features is not None and len(features) != len(self.perturbations):
            fix = "give one row of features per perturbation, in the same order"
            expected = f"features of {len(self.perturbations)} perturbations"
            raise ModelError(three_beats(expected, f"{len(features)} rows", fix))
        self.features: Tensor | None
        self.register_buffer("features", features)
        n_rows = len(self.perturbations) if features is None else features.shape[1]
        self.embedding = nn.Parameter(first_embedding(n_rows, n_axes))
        self.interaction = nn.Parameter(torch.zeros(len(self.pairs), n_axes))
        self.modulation = nn.Parameter(torch.zeros(len(self.contexts), n_axes))
        self.to_alpha = nn.Parameter(torch.eye(n_axes))

    def design(self, conditions: Sequence[Condition]) -> Design:
        """Tensors of the conditions.

        Raises
        ------
        LabelError
            For a perturbation or context that the model does not know; close names are suggested.
        """
        device, dtype = self.embedding.device, self.embedding.dtype
        doses = torch.zeros(len(conditions), len(self.perturbations), dtype=dtype)
        contexts = torch.zeros(len(conditions), len(self.contexts), dtype=dtype)
        for row, condition in enumerate(conditions):
            for name, dose in zip(condition.perturbations, condition.doses, strict=True):
                doses[row, self._index(name, self.perturbations, "perturbation")] += dose
            for name, share in condition.shares:
                contexts[row, self._index(name, self.contexts, "context")] += share
        index = [[self.perturbations.index(name) for name in pair] for pair in self.pairs]
        pairs = torch.stack([doses[:, a] * doses[:, b] for a, b in index], 1) if index else doses[:, :0]
        strength = doses.amax(1) if self.perturbations else doses.sum(1)
        return Design(*(part.to(device) for part in (doses, contexts, pairs, strength)))

    def forward(self, design: Design) -> tuple[Tensor, Tensor]:
        """Coefficients alpha and beta, each (condition, axis)."""
        embedding = self.embedding if self.features is None else self.features @ self.embedding
        main = design.doses @ embedding + design.pairs @ self.interaction
        beta = main * (1 + design.contexts @ self.modulation)
        return beta @ self.to_alpha.T, beta

    @staticmethod
    def _index(name: str, known: list[str], kind: str) -> int:
        if name not in known:
            fix = f"{did_you_mean(name, known)} (a {kind} that was not trained on has no operator of its own)"
            raise LabelError(three_beats(f"a {kind} the model was fitted with", repr(name), fix))
        return known.index(name)

    def extra_repr(self) -> str:
        return (
            f"{len(self.perturbations)} perturbations, {len(self.contexts)} contexts, {len(self.pairs)} measured "
            f"pairs -> {self.embedding.shape[1]} axes{'' if self.features is None else ', from given features'}"
        )
