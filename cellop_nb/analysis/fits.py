"""Fitting what is carried over to other contexts, with some groups left out, each operator family once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.contract import perturbation_parts
from ..errors import check_settings
from ..models.carry import Remainder
from ..models.operators import OperatorModel
from ..training.loop import Machine
from ..training.operators import OperatorTrainer, Penalties, new_operators
from .combinations import response_operator
from .predict import latents
from .transfer import Complexity, Group, Response, own_condition
from .views import LatentView


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
        taken = ("adata", "model", "seed", *keys)
        check_settings(training, OperatorTrainer, of="the operators' training", taken=taken)
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
                    response.remainders[perturbation] = self._remainder(left_out, measured, complexity)
            for group in sorted(parts & set(known)):
                level = self._missing(left_out, group, complexity)
                response.missed[group] = Remainder(level, self._growth(left_out, group, complexity, level))
        return response

    def _remainder(
        self, left_out: frozenset[Group], measured: list[Group], complexity: Complexity
    ) -> Remainder:
        """What is missed of the measured contexts, where their own cells took no part in the fit."""
        without = {group: left_out | {g for g in self.view.groups if g[0] == group[0]} for group in measured}
        level = np.mean([self._missing(without[group], group, complexity) for group in measured], axis=0)
        grown = [self._growth(without[group], group, complexity, level) for group in measured]
        return Remainder(level, float(np.mean(grown)))

    def errors(self, perturbation: str, complexity: Complexity) -> np.ndarray:
        """(context, gene) real less predicted mean expression of the measured contexts, each predicted from the others.

        Empty where fewer than two contexts were measured.
        """
        measured = [group for group in self.view.groups if group[1] == perturbation]
        if len(measured) < 2:
            return np.zeros((0, 0))
        return np.stack([self._error(group, complexity) for group in measured])

    def _error(self, group: Group, complexity: Complexity) -> np.ndarray:
        here = frozenset(other for other in self.view.groups if other[0] == group[0])
        return self.error(self.response(here, complexity, asked=[group]), *group)

    def error(self, response: Response, context: str, perturbation: str) -> np.ndarray:
        """(gene,) real less predicted mean expression of a measured group."""
        _, cells = self.predict(response, context, perturbation)
        real = self.view.cells(self.view.rows(context, perturbation))
        return self.view.expression(real) - self.view.expression(cells)

    def _missing(self, left_out: frozenset[Group], group: Group, complexity: Complexity) -> np.ndarray:
        """Real less predicted mean level of a group, (gene,)."""
        key = (left_out, group, replace(complexity, remainder=False))
        if key not in self._missed:
            rows, cells = self._plain(left_out, group, complexity)
            real = self.view.rows(*group)
            self._missed[key] = self.view.real_level(real) - self.view.level(cells, rows)
        return self._missed[key]

    def _growth(
        self, left_out: frozenset[Group], group: Group, complexity: Complexity, level: np.ndarray
    ) -> float:
        """Log of the mean size of a group's real cells over that of its predicted ones, their levels corrected."""
        _, cells = self._plain(left_out, group, complexity, Remainder(level))
        return float(np.log(self.view.real_size(self.view.rows(*group)) / self.view.size(cells)))

    def _plain(
        self, left_out: frozenset[Group], group: Group, complexity: Complexity, added: Remainder | None = None
    ):
        """Rows of the control cells of a group's context, and the prediction without a remainder of its own."""
        response = self.response(left_out, replace(complexity, remainder=False))
        return self.predict(response, *group, added=added)

    def _fit(self, left_out: frozenset[Group], form: Complexity) -> OperatorModel:
        if (left_out, form) not in self._operators:
            pairs = zip(self.view.contexts, self.view.perturbations, strict=True)
            kept = np.array([pair not in left_out for pair in pairs])
            self._operators[left_out, form] = self._train(self.cells[kept], form)
        return self._operators[left_out, form]

    def _train(self, cells, form: Complexity) -> OperatorModel:
        model = new_operators(cells, features=self.features, **self.keys, **form.model)
        if form.rank != 0:  # shifts already are where the moments put them
            penalties = Penalties(ridge=form.ridge, context_ridge=form.context_ridge)
            settings = {
                "progress": False,
                "machine": Machine(accelerator="cpu"),
                "steps_per_epoch": 20,
                "lr": 2e-2,
            } | self.training
            OperatorTrainer(cells, model, seed=self.seed, penalties=penalties, **self.keys, **settings).fit()
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

    def predict(self, response: Response, context: str, perturbation: str, added: Remainder | None = None):
        """Rows of the context's control cells, and what the response makes of them."""
        rows = self.view.rows(context, self.view.control)
        moved = response_operator(response, perturbation, context)(self.view.z[rows])
        missed = response.remainder(perturbation, context) if added is None else added
        return rows, self.view.moved(rows, moved, missed, self.seed)


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
    errors: Mapping[str, np.ndarray] | None = None,
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
    errors
        ``errors`` of the response where they are known (:class:`NestedFits`); found here where None.
    **training
        Settings of :class:`OperatorTrainer`.

    Returns
    -------
    Response

    Raises
    ------
    LabelError
        For a key or a setting that is not known.
    """
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    keys |= {"use_rep": use_rep}
    cells = latents_only(adata, use_rep, split_key)
    view = LatentView(cells, **keys) if view is None else view
    keys |= {"split_key": split_key}
    fits = Fits(cells, view, keys=keys, features=features, seed=seed, training={"max_epochs": 5} | training)
    response = fits.response(frozenset(), complexity, asked=asked)
    if errors is None:
        errors = {p: fits.errors(p, complexity) for p in sorted({p for _, p in asked or ()})}
    response.errors.update({perturbation: rows for perturbation, rows in errors.items() if len(rows)})
    return response


def latents_only(adata, use_rep: str, split_key: str) -> ad.AnnData:
    """Training and validation cells with labels and latents alone: small, and without the test cells."""
    rows = adata.obs[split_key].isin(["train", "val"]).to_numpy(copy=True)
    z = latents(adata, use_rep)[torch.as_tensor(rows)].numpy()
    return ad.AnnData(obs=adata.obs[rows].copy(), obsm={use_rep: np.ascontiguousarray(z)})
