"""Carrying a response over to a context where it was not measured: a shared operator, and what near contexts add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.contract import perturbation_parts
from ..models.affine import AffineOperator
from ..models.conditions import Condition
from ..models.operators import OperatorModel
from ..training.operators import OperatorTrainer, new_operators
from .predict import latents
from .views import LatentView

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
        Whether the mean change of expression levels that the operators missed in the measured contexts, each
        left out in turn, is added to the prediction.
    """

    rank: int | None = None
    ridge: float = 0.1
    context_rank: int | None = None
    context_ridge: float = 0.01
    locality: float | None = None
    remainder: bool = False

    def __str__(self) -> str:
        form = "shift" if self.rank == 0 else f"affine, ridge {self.ridge:g}"
        own = ", own parts" if self.context_rank is not None else ""
        borrowed = "" if self.locality is None else f", locality {self.locality:g}"
        return form + own + borrowed + (", remainder" if self.remainder else "")

    @property
    def form(self) -> Complexity:
        """The part that is fitted; the rest only changes what is asked of a fit."""
        return replace(self, locality=None, remainder=False)

    @property
    def model(self) -> dict:
        """Keywords of :func:`new_operators`."""
        return {"rank": self.rank, "context_rank": self.context_rank}

    @property
    def training(self) -> dict:
        """Keywords of :class:`OperatorTrainer`."""
        return {"ridge": self.ridge, "context_ridge": self.context_ridge}


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
        Perturbation to (gene,): mean change of level that the operators missed.
    missed : dict
        (context, perturbation) to (gene,): change of level that they miss there, for parts of combinations.
    """

    operators: OperatorModel
    complexity: Complexity
    control: str = "control"
    profiles: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    departures: Mapping[Group, Tensor] = field(default_factory=dict, repr=False)
    remainders: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    missed: dict[Group, np.ndarray] = field(default_factory=dict, repr=False)

    def remainder(self, perturbation: str, context: str) -> np.ndarray | None:
        """(gene,) change of level to add to a prediction; of an unmeasured combination, the sum of its parts'."""
        parts = perturbation_parts(perturbation)
        if perturbation in self.remainders or len(parts) < 2:
            return self.remainders.get(perturbation)
        found = [self.missed.get((context, part), self.remainders.get(part)) for part in parts]
        return None if any(part is None for part in found) else np.sum(found, axis=0)

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
            return sum(share * self.departures[c, perturbation] for c, share in shares.items())
        parts = perturbation_parts(perturbation)
        found = [self._departure(part, context) for part in parts] if len(parts) > 1 else []
        found = [departure for departure in found if departure is not None]
        return sum(found) if found else None


def own_condition(operators: OperatorModel, perturbation: str, context: str, control: str) -> Condition:
    """A perturbation with the context's own part where the operators were trained on the context."""
    own = context if context in operators.conditions.contexts else None
    return Condition.parse(perturbation, own, control=control)


class Fits:
    """Responses fitted with some groups left out, each operator family only once.

    Parameters
    ----------
    cells
        Training cells with latents and ``obs[split_key]`` (:func:`latents_only`).
    view
        The same cells, in the same order, as they are judged.
    features
        As in :func:`new_operators`.
    keys
        ``use_rep, perturbation_key, context_key, control, split_key``.
    training
        Settings of :class:`OperatorTrainer`.
    """

    def __init__(
        self, cells, view: LatentView, *, keys: Mapping, features=None, seed: int = 0, training: Mapping
    ):
        self.cells, self.view, self.keys, self.features = cells, view, keys, features
        self.seed, self.training = seed, dict(training)
        self.profiles = view.profiles()
        self._operators: dict = {}
        self._departed: dict = {}
        self._missed: dict = {}

    def response(
        self, left_out: frozenset[Group], complexity: Complexity, asked: Iterable[Group] | None = None
    ) -> Response:
        """The response without the cells of the groups `left_out`, ready for the groups `asked` (None: any)."""
        operators, control = self._fit(left_out, complexity.form), self.view.control
        known = [group for group in self.view.groups if group not in left_out]
        departures = {} if complexity.locality is None else self._departures(left_out, complexity.form, known)
        response = Response(operators, complexity, control, self.profiles, departures, {}, {})
        if complexity.remainder:
            asked = known if asked is None else list(asked)
            parts = {(c, part) for c, p in asked for part in perturbation_parts(p) if part != p}
            for perturbation in sorted({p for _, p in [*asked, *parts]}):
                measured = [group for group in known if group[1] == perturbation]
                if len(measured) > 1:  # the others predict the one left out
                    missed = [self._missing(left_out, group, complexity) for group in measured]
                    response.remainders[perturbation] = np.mean(missed, axis=0)
            plain = replace(complexity, remainder=False)
            for group in sorted(parts & set(known)):
                response.missed[group] = self._own_missing(left_out, group, plain)
        return response

    def _own_missing(self, left_out: frozenset[Group], group: Group, plain: Complexity) -> np.ndarray:
        """Real less predicted mean level of a group that was fitted."""
        key = (left_out, group, plain)
        if key not in self._missed:
            rows, cells = self.predict(self.response(left_out, plain), *group)
            self._missed[key] = self.view.real_level(self.view.rows(*group)) - self.view.level(cells, rows)
        return self._missed[key]

    def _fit(self, left_out: frozenset[Group], form: Complexity) -> OperatorModel:
        if (left_out, form) not in self._operators:
            pairs = zip(self.view.contexts, self.view.perturbations, strict=True)
            kept = np.array([pair not in left_out for pair in pairs])
            self._operators[left_out, form] = self._train(self.cells[kept], form)
        return self._operators[left_out, form]

    def _train(self, cells, form: Complexity) -> OperatorModel:
        model = new_operators(cells, features=self.features, **self.keys, **form.model)
        if form.rank != 0:  # shifts already are where the moments put them
            settings = {
                "progress": False,
                "accelerator": "cpu",
                "steps_per_epoch": 20,
                "lr": 2e-2,
            } | self.training
            OperatorTrainer(cells, model, seed=self.seed, **self.keys, **form.training, **settings).fit()
        return model.cpu().eval()

    def _departures(
        self, left_out: frozenset[Group], form: Complexity, known: list[Group]
    ) -> dict[Group, Tensor]:
        """Measured less moved mean cell of every group."""
        if (left_out, form) not in self._departed:
            operators = self._fit(left_out, form)
            conditions = [own_condition(operators, p, c, self.view.control) for c, p in known]
            with torch.no_grad():
                matrices, shifts = operators.affine(operators.conditions.design(conditions))
            start = torch.stack([self.view.mean(context, self.view.control) for context, _ in known])
            real = torch.stack([self.view.mean(*group) for group in known])
            gaps = real - torch.einsum("nij,nj->ni", matrices, start) - shifts
            self._departed[left_out, form] = dict(zip(known, gaps, strict=True))
        return self._departed[left_out, form]

    def _missing(self, left_out: frozenset[Group], group: Group, complexity: Complexity) -> np.ndarray:
        """Real less predicted mean level of a group whose context's cells took no part in the fit."""
        here = frozenset(other for other in self.view.groups if other[0] == group[0])
        plain = replace(complexity, remainder=False)
        key = (left_out | here, group, plain)
        if key not in self._missed:
            rows, cells = self.predict(self.response(key[0], plain), *group)
            self._missed[key] = self.view.real_level(self.view.rows(*group)) - self.view.level(cells, rows)
        return self._missed[key]

    def predict(self, response: Response, context: str, perturbation: str):
        """Rows of the context's control cells, and what the response makes of them."""
        rows = self.view.rows(context, self.view.control)
        moved = response.operator(perturbation, context)(self.view.z[rows])
        return rows, self.view.moved(rows, moved, response.remainder(perturbation, context), self.seed)


def fit_response(
    adata,
    complexity: Complexity,
    *,
    view: LatentView | None = None,
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    split_key: str = "split",
    features: pd.DataFrame | None = None,
    asked: Iterable[Group] | None = None,
    seed: int = 0,
    **training,
) -> Response:
    """Operators of given complexity on the training cells' latents.

    Parameters
    ----------
    view
        The cells as they are judged, which says how near contexts are and what the decoder misses; latents where
        None.
    features
        As in :func:`new_operators`.
    asked
        (context, perturbation) groups that will be asked for, any of the measured ones where None; combinations
        take over what their parts' own predictions miss.
    **training
        Settings of :class:`OperatorTrainer`.

    Returns
    -------
    Response
    """
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    keys |= {"use_rep": use_rep}
    cells = latents_only(adata, use_rep, split_key)
    view = LatentView(cells, **keys) if view is None else view
    keys |= {"split_key": split_key}
    fits = Fits(cells, view, keys=keys, features=features, seed=seed, training={"max_epochs": 5} | training)
    return fits.response(frozenset(), complexity, asked=asked)


def latents_only(adata, use_rep: str, split_key: str) -> ad.AnnData:
    """Training and validation cells with labels and latents alone: small, and without the test cells."""
    rows = adata.obs[split_key].isin(["train", "val"]).to_numpy()
    z = latents(adata, use_rep)[torch.as_tensor(rows)].numpy()
    return ad.AnnData(obs=adata.obs[rows].copy(), obsm={use_rep: np.ascontiguousarray(z)})
