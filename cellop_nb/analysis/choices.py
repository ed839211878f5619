"""What a hold-out chooses by leaving training groups out, and the group that is worth holding out first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import anndata as ad
import numpy as np
import pandas as pd

from ..data.contract import context_labels
from ..errors import HoldoutError, three_beats
from .combinations import RULES
from .nested import NestedFits, choose_latent
from .selection import choose, leave_out, what_to_leave_out
from .space import EvaluationSpace
from .targets import Screen
from .transfer import Complexity
from .views import CountView

logger = logging.getLogger("cellop_nb")


@dataclass(frozen=True)
class Choice:
    """What is to be predicted from what, and the choices that it takes.

    `settings` of the VAE and `candidates` of the operators are chosen from; `nested` with VAEs that have not seen the
    groups left out (:class:`NestedFits`), which several settings always are.
    """

    train: ad.AnnData
    wanted: list[tuple[str, str]]
    settings: list[Mapping]
    candidates: list[Complexity]
    training: Mapping
    space: EvaluationSpace
    keys: dict
    layer: str | None
    features: pd.DataFrame | None
    nested: bool
    seed: int
    progress: bool

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Perturbed groups of the training cells."""
        return [group for group in groups_of(self.train, self.keys) if group[1] != self.keys["control"]]

    @cached_property
    def over(self) -> str | None:
        """What is left out, None where there is too little."""
        return what_to_leave_out(self.groups, self.wanted, described=self.features is not None)

    @cached_property
    def possible(self) -> list[Complexity]:
        """The candidates, without borrowing where nobody is to borrow from."""
        if len(self.candidates) == 1 or len({context for context, _ in self.groups}) > 1:
            return self.candidates
        return list(dict.fromkeys(replace(candidate, locality=None) for candidate in self.candidates))

    @cached_property
    def folds(self) -> NestedFits | None:
        """Models without the groups left out; None where nothing is chosen by them."""
        several = len(self.settings) > 1
        if self.over is None or not (several or (self.nested and len(self.candidates) > 1)):
            return None
        options = {"over": self.over, "space": self.space, "keys": self.keys, "training": self.training}
        options |= {"features": self.features, "layer": self.layer, "seed": self.seed}
        return NestedFits(self.train, self.settings, progress=self.progress, **options)

    @cached_property
    def compared(self) -> pd.DataFrame:
        """Every candidate under every setting; empty where :attr:`folds` is None."""
        return pd.DataFrame() if self.folds is None else self.folds.compare(self.possible)

    @cached_property
    def setting(self) -> int:
        """Place of the VAE's setting that is taken."""
        if len(self.settings) == 1:
            return 0
        if self.folds is None:
            words = "holdout: too few groups to choose the VAE by; taken: %s"
            logger.warning(words, self.settings[0])
            return 0
        return choose_latent(self.compared)

    def complexity(self, view: CountView) -> tuple[pd.DataFrame, Complexity]:
        """The complexity of the operators, and how the candidates did; `view` is the final latent space."""
        if len(self.candidates) == 1:
            return pd.DataFrame(), self.candidates[0]
        if self.over is None:
            found = _unchosen(self.possible, self.wanted)
            logger.warning("holdout: no two contexts or combinations to leave out in turn; taken: %s", found)
            return pd.DataFrame(), found
        choice = self._judged(self.possible, view)
        found = choose(choice, self.possible)
        if not any("+" in perturbation for _, perturbation in self.wanted):
            return choice, found
        return self._with_rule(choice, found, view)

    def errors(self, complexity: Complexity) -> dict[str, np.ndarray] | None:
        """Perturbation to (context, gene) errors of nested predictions; None where there are none."""
        if self.folds is None:
            return None
        asked = sorted({perturbation for _, perturbation in self.wanted})
        return {p: self.folds.errors(p, complexity, self.setting) for p in asked}

    def _judged(self, candidates: list[Complexity], view: CountView) -> pd.DataFrame:
        """Energy distance of each candidate on groups left out."""
        if self.folds is None:
            options = {"view": view, "features": self.features, "seed": self.seed, "progress": self.progress}
            return leave_out(self.train, candidates, over=self.over, **options, **self.keys)
        if candidates is self.possible:
            return self.compared[self.compared["setting"] == self.setting].reset_index(drop=True)
        return self.folds.compare(candidates, [self.setting])

    def _with_rule(
        self, choice: pd.DataFrame, found: Complexity, view: CountView
    ) -> tuple[pd.DataFrame, Complexity]:
        """The rule that predicts the left-out combinations best, for the complexity found."""
        rules = [replace(found, rule=rule) for rule in RULES]
        table = self._judged(rules, view)
        table = table[table["group"].str.contains("+", regex=False)]
        if not len(table):
            return choice, found
        others = table[table["candidate"] > 0]
        others = others.assign(candidate=others["candidate"] + choice["candidate"].max())
        return pd.concat([choice, others], ignore_index=True), choose(table, rules)


def _unchosen(candidates: list[Complexity], wanted: list[tuple[str, str]]) -> Complexity:
    """What is taken where nothing can tell: the simplest; for combinations the simplest that adds what the
    decoder misses of the parts, which is the additive rule where the decoder sees no effect at all."""
    if any("+" in perturbation for _, perturbation in wanted):
        return next((candidate for candidate in candidates if candidate.remainder), candidates[0])
    return candidates[0]


def groups_of(adata, keys: dict) -> list[tuple[str, str]]:
    """The (context, perturbation) groups of cells, sorted."""
    contexts = context_labels(adata, keys["context_key"])
    return sorted(set(zip(contexts, adata.obs[keys["perturbation_key"]].astype(str), strict=True)))


def strongest_group(
    adata,
    *,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
) -> tuple[str, str]:
    """The (context, perturbation) group with the largest mean shift in log1p-CP10k, among those that can be
    predicted: the same perturbation was measured in another context.

    Raises
    ------
    HoldoutError
        Where no perturbation was measured in two contexts.
    """
    space = EvaluationSpace(np.asarray(adata.var_names), np.zeros(0), np.zeros(0), adata.n_obs)
    cells = space.transform(space.select(adata, layer))
    screen = Screen.of(
        adata, cells, perturbation_key=perturbation_key, context_key=context_key, control=control
    )
    groups = screen.measured()
    repeated = [(c, p) for c, p in groups if any(q == p and d != c for d, q in groups)]
    if not repeated:
        raise HoldoutError(
            three_beats(
                "a perturbation measured in two contexts",
                "none",
                "hold out cells or combinations instead, or name another context_key",
            )
        )
    return max(repeated, key=lambda group: float(np.linalg.norm(screen.shift(*group))))
