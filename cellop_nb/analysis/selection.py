"""Choosing how complex the operators may be, by leaving training contexts or combinations out in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import anndata as ad
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..data.contract import context_labels, obs_labels
from ..errors import ModelError, three_beats
from ..models.affine import AffineOperator
from ..models.conditions import Condition
from ..models.energy import energy_distance
from ..models.operators import OperatorModel
from ..training.operators import OperatorTrainer, new_operators
from .predict import latents


@dataclass(frozen=True)
class Complexity:
    """How much freedom the operators get, and how much a new context borrows from similar ones.

    Parameters
    ----------
    rank
        Rank of the matrices; 0 is a pure shift, None full rank.
    ridge
        Weight of the departure from the identity.
    context_rank, context_ridge
        Rank and weight of the contexts' own parts; None gives them none.
    locality
        How fast borrowing falls with distance: 0 borrows from all contexts alike, see :func:`borrowing`.
    """

    rank: int | None = None
    ridge: float = 0.1
    context_rank: int | None = None
    context_ridge: float = 0.01
    locality: float | None = None

    def __str__(self) -> str:
        form = "shift" if self.rank == 0 else f"affine, ridge {self.ridge:g}"
        if self.locality is not None:
            return f"{form}, borrowing {self.locality:g}"
        return form if self.context_rank is None else f"{form}, own parts"

    @property
    def model(self) -> dict:
        """Keywords of :func:`new_operators`."""
        return {"rank": self.rank, "context_rank": self.context_rank}

    @property
    def training(self) -> dict:
        """Keywords of :class:`OperatorTrainer`."""
        return {"ridge": self.ridge, "context_ridge": self.context_ridge}


_SHIFT = Complexity(rank=0, ridge=0.0)
_FORMS = (_SHIFT, Complexity(ridge=0.3), Complexity(ridge=0.1))
CANDIDATES: tuple[Complexity, ...] = tuple(
    replace(form, context_rank=rank, locality=locality)
    for locality, rank in ((None, None), (1.0, 0), (4.0, 0))
    for form in _FORMS
)
"""Tried by default, from the simplest to the most flexible; the pure shift is among them."""

_QUICK = {"cells_per_group": 64, "max_epochs": 4}  # enough to rank candidates


def borrowing(
    start: torch.Tensor, controls: dict[str, torch.Tensor], locality: float
) -> tuple[tuple[str, float], ...]:
    r"""Shares in which a new context borrows the own parts of known ones.

    .. math:: w_c \propto \exp(-\lambda\, \|m - m_c\|^2 / \min_{c'} \|m - m_{c'}\|^2)

    Parameters
    ----------
    start
        (cell, d) control latents of the new context, with mean m.
    controls
        Control latents of the known contexts.
    locality
        :math:`\lambda`; 0 weighs all alike.
    """
    names = list(controls)
    means = torch.stack([controls[name].mean(0) for name in names])
    distance = (means - start.mean(0)).square().sum(1)
    shares = torch.softmax(-locality * distance / distance.min().clamp_min(1e-12), 0)
    return tuple(zip(names, shares.tolist(), strict=True))


@dataclass(frozen=True)
class Response:
    """Operators fitted on some contexts, ready to be asked for one more."""

    operators: OperatorModel
    controls: dict[str, torch.Tensor] = field(repr=False)
    complexity: Complexity
    control: str = "control"

    def operator(self, perturbation: str, context: str, start: torch.Tensor) -> AffineOperator:
        """The operator of a perturbation for the control latents `start` (cell, d) of a context.

        A context that was trained on with this perturbation uses its own parts; any other one borrows.
        """
        known = self.operators.conditions.contexts
        like: tuple[tuple[str, float], ...] = ()
        own = context if context in known else None
        if own is None and self.complexity.locality is not None:
            sources = {name: self.controls[name] for name in known}
            like = borrowing(start, sources, self.complexity.locality)
        condition = replace(Condition.parse(perturbation, own, control=self.control), like=like)
        return self.operators.operator(condition)


def fit_response(
    adata,
    complexity: Complexity,
    *,
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    split_key: str = "split",
    features: pd.DataFrame | None = None,
    seed: int = 0,
    **training,
) -> Response:
    """Operators of given complexity on the training cells' latents; `training` goes to :class:`OperatorTrainer`."""
    keys = {
        "use_rep": use_rep,
        "perturbation_key": perturbation_key,
        "context_key": context_key,
        "control": control,
        "split_key": split_key,
    }
    model = new_operators(adata, features=features, **keys, **complexity.model)
    settings = {"progress": False, "max_epochs": 5, "steps_per_epoch": 20, "lr": 2e-2, "accelerator": "cpu"}
    trainer = OperatorTrainer(adata, model, seed=seed, **keys, **complexity.training, **(settings | training))
    if complexity.rank != 0:  # shifts already are where the moments put them
        trainer.fit()
    return Response(model.cpu().eval(), trainer.groups.control, complexity, control)


def leave_out(
    adata,
    candidates: Sequence[Complexity] = CANDIDATES,
    *,
    over: str = "context",
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    split_key: str = "split",
    features: pd.DataFrame | None = None,
    seed: int = 0,
    max_cells: int = 300,
    progress: bool = True,
    **training,
) -> pd.DataFrame:
    """Energy distance of each candidate on training groups that took no part in its fit.

    Only cells of train and val are used: held-out cells take no part in the choice.

    Parameters
    ----------
    over
        What is left out in turn: the perturbed cells of each ``"context"`` that shares a perturbation with
        another one, each measured ``"combination"`` whose parts are known from other groups, or each
        ``"perturbation"``, which `features` must then describe.
    features
        As in :func:`new_operators`.

    Returns
    -------
    DataFrame ``candidate, complexity, group, e_distance, no_change``: energy distance in the latent space
    (Euclidean, U-statistic, one per group) after and without the operator.

    Raises
    ------
    ModelError
        Where fewer than two can be left out in turn.
    """
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    cells = latents_only(adata, use_rep, split_key)
    contexts = context_labels(cells, context_key).to_numpy()
    perturbations = obs_labels(cells, perturbation_key).to_numpy()
    groups = sorted({(c, p) for c, p in zip(contexts, perturbations, strict=True) if p != control})
    folds = _FOLDS[over](groups)
    if len(folds) < 2:
        found = f"{len(folds)} {over}s that the other groups could predict"
        expected = f"two or more {over}s to leave out in turn"
        raise ModelError(three_beats(expected, found, "name the complexity"))
    z, rows, fits = latents(cells, use_rep), [], {}
    tries = [(fold, candidate) for fold in folds for candidate in candidates]
    for fold, candidate in tqdm(tries, desc="choosing complexity", disable=not progress):
        # borrowing changes what is asked, not what is fitted
        form = (fold, replace(candidate, locality=None))
        if form not in fits:
            out = [pair in folds[fold] for pair in zip(contexts, perturbations, strict=True)]
            options = {"use_rep": use_rep, "split_key": split_key, "features": features, "seed": seed}
            options |= keys | _QUICK | training
            fits[form] = fit_response(cells[~np.array(out)], candidate, **options)
        response = replace(fits[form], complexity=candidate)
        for context, perturbation in folds[fold]:
            if not set(perturbation.split("+")) <= set(response.operators.conditions.perturbations):
                continue
            start = z[(contexts == context) & (perturbations == control)]
            real = z[(contexts == context) & (perturbations == perturbation)][:max_cells]
            moved = response.operator(perturbation, context, start)(start[:max_cells])
            rows.append(
                {
                    "candidate": candidates.index(candidate),
                    "complexity": str(candidate),
                    "group": f"{context}, {perturbation}",
                    "e_distance": float(energy_distance(moved, real)),
                    "no_change": float(energy_distance(start[:max_cells], real)),
                }
            )
    return pd.DataFrame(rows)


def leave_contexts_out(adata, candidates: Sequence[Complexity] = CANDIDATES, **options) -> pd.DataFrame:
    """:func:`leave_out` over contexts."""
    return leave_out(adata, candidates, over="context", **options)


def _context_folds(groups: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    shared = sorted({c for c, p in groups if any(q == p and d != c for d, q in groups)})
    return {context: [group for group in groups if group[0] == context] for context in shared}


def combinations_of(groups: Sequence[tuple[str, str]]) -> list[str]:
    """Combinations among the (context, perturbation) groups whose parts are all known from other labels."""
    labels = {p for _, p in groups}

    def known(part: str, whole: str) -> bool:
        return any(part in label.split("+") for label in labels - {whole})

    return sorted(p for p in labels if "+" in p and all(known(part, p) for part in p.split("+")))


def _combination_folds(groups: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    return {label: [group for group in groups if group[1] == label] for label in combinations_of(groups)}


def _perturbation_folds(groups: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Each perturbation, with the combinations that it is part of."""
    singles = sorted({p for _, p in groups if "+" not in p})
    return {single: [group for group in groups if single in group[1].split("+")] for single in singles}


_FOLDS = {"context": _context_folds, "combination": _combination_folds, "perturbation": _perturbation_folds}


def what_to_leave_out(
    groups: Sequence[tuple[str, str]], wanted: Sequence[tuple[str, str]], *, described: bool = False
) -> str | None:
    """What resembles the question most: combinations, perturbations or contexts.

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
    order = ["context"]
    if any("+" in label for label in unmeasured):
        order = ["combination", *order]
    if described and any(not set(label.split("+")) <= parts for label in unmeasured):
        order = ["perturbation", *order]
    return next((over for over in order if len(_FOLDS[over](list(groups))) > 1), None)


def choose(table: pd.DataFrame, candidates: Sequence[Complexity] = CANDIDATES) -> Complexity:
    """The simplest candidate that is within one standard error of the best.

    The standard error is that of the paired differences to the best over the groups left out.

    References
    ----------
    Hastie, Tibshirani, Friedman (2009), The Elements of Statistical Learning, section 7.10.
    """
    wide = table.pivot_table(index="group", columns="candidate", values="e_distance")
    best = wide.mean().idxmin()
    excess = wide.sub(wide[best], axis=0)
    error = excess.std() / np.sqrt(len(wide))
    near = excess.mean() <= error.fillna(0.0)
    return candidates[int(near[near].index.min())]


def latents_only(adata, use_rep: str, split_key: str) -> ad.AnnData:
    """Training and validation cells with labels and latents alone: small, and without the test cells."""
    rows = adata.obs[split_key].isin(["train", "val"]).to_numpy()
    z = latents(adata, use_rep)[torch.as_tensor(rows)].numpy()
    return ad.AnnData(obs=adata.obs[rows].copy(), obsm={use_rep: np.ascontiguousarray(z)})
