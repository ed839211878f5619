"""Everything that a hold-out chooses, by leaving training groups out in turn."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import anndata as ad
import pandas as pd

from ..data.contract import context_labels
from .combinations import RULES
from .latent_choice import choose_latent, compare_latents
from .selection import choose, leave_out, what_to_leave_out
from .space import EvaluationSpace
from .transfer import Complexity
from .views import CountView

logger = logging.getLogger("cellop_nb")


@dataclass(frozen=True)
class Choice:
    """What is to be predicted from what, and the choices that it takes."""

    train: ad.AnnData
    wanted: list[tuple[str, str]]
    candidates: list[Complexity]
    space: EvaluationSpace
    keys: dict
    layer: str | None
    features: pd.DataFrame | None
    seed: int
    progress: bool

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Perturbed groups of the training cells."""
        return [group for group in groups_of(self.train, self.keys) if group[1] != self.keys["control"]]

    @property
    def over(self) -> str | None:
        """What is left out, None where there is too little."""
        return what_to_leave_out(self.groups, self.wanted, described=self.features is not None)

    @property
    def possible(self) -> list[Complexity]:
        """The candidates, without borrowing where nobody is to borrow from."""
        if len({context for context, _ in self.groups}) > 1:
            return self.candidates
        return list(dict.fromkeys(replace(candidate, locality=None) for candidate in self.candidates))

    def latent(self, settings: list[Mapping], training: Mapping) -> tuple[pd.DataFrame, Mapping]:
        """The setting of the VAE."""
        if len(settings) == 1 or self.over is None:
            if len(settings) > 1:
                logger.warning("holdout: too few groups to choose the VAE by; taken: %s", settings[0])
            return pd.DataFrame(), settings[0]
        options = {"over": self.over, "space": self.space, "keys": self.keys, "training": training}
        options |= {"features": self.features, "layer": self.layer, "seed": self.seed}
        table = compare_latents(self.train, settings, self.possible, progress=self.progress, **options)
        return table, settings[choose_latent(table)]

    def complexity(self, view: CountView) -> tuple[pd.DataFrame, Complexity]:
        """The complexity of the operators in a given latent space."""
        possible = self.possible
        if len(self.candidates) == 1:
            return pd.DataFrame(), self.candidates[0]
        if self.over is None:
            found = _unchosen(possible, self.wanted)
            logger.warning("holdout: no two contexts or combinations to leave out in turn; taken: %s", found)
            return pd.DataFrame(), found
        options = {"view": view, "features": self.features, "seed": self.seed, "progress": self.progress}
        choice = leave_out(self.train, possible, over=self.over, **options, **self.keys)
        found = choose(choice, possible)
        if not any("+" in perturbation for _, perturbation in self.wanted):
            return choice, found
        return self._with_rule(choice, found, options)

    def _with_rule(
        self, choice: pd.DataFrame, found: Complexity, options: dict
    ) -> tuple[pd.DataFrame, Complexity]:
        """The rule that predicts the left-out combinations best, for the complexity found."""
        rules = [replace(found, rule=rule) for rule in RULES]
        table = leave_out(self.train, rules, over=self.over, **options, **self.keys)
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
