"""Nested choices: groups are left out of the VAE and of the operators alike, and then predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..data.contract import context_labels, obs_labels
from ..errors import ModelError, three_beats
from .fits import Fits, latents_only
from .fitted import fit_vae, view_of
from .selection import QUICK, enough, folds_over, left_out, share_left
from .space import EvaluationSpace
from .transfer import Complexity, Group

MOST_JUDGED = 24
"""Groups of a fold that candidates are judged by; the others are left out all the same."""


class NestedFits:
    """Models that have not seen what they are asked for.

    The training groups are dealt into folds. For each fold and setting a VAE is trained without the fold's perturbed
    cells, when it is first asked for; operators are fitted in its latent space without them, too. A VAE that has seen
    them, as the final one has, makes flexible operators look better than they are: on cells of a context whose
    response the encoder knows, an affine map of its latents is easily found.

    Parameters
    ----------
    train
        Raw counts with ``obs["split"]``, without the cells that are to be predicted in the end.
    settings
        Settings of :func:`new_vae`, such as ``{"n_latent": 16}``.
    over
        What is left out, as in :func:`leave_out`.
    space
        In which energy distances are computed.
    training
        Settings of :class:`VAETrainer`.
    n_folds
        Folds at most; as many VAEs for each setting.

    Raises
    ------
    ModelError
        Where fewer than two groups can be left out.
    """

    def __init__(
        self,
        train,
        settings: Sequence[Mapping],
        *,
        over: str,
        space: EvaluationSpace,
        keys: Mapping,
        training: Mapping | None = None,
        features: pd.DataFrame | None = None,
        layer: str | None = None,
        n_folds: int = 3,
        seed: int = 0,
        progress: bool = True,
    ):
        groups = [group for group in _labels(train, keys).unique() if group[1] != keys["control"]]
        parts = folds_over(over, groups)
        if not enough(over, parts):
            expected = f"two or more {over}s to leave out in turn"
            raise ModelError(three_beats(expected, f"{len(parts)}", "name one setting and one complexity"))
        folds, n_folds = list(parts.values()), min(n_folds, len(parts))  # one, of a single combination
        dealt = _dealt(folds, n_folds, seed)
        self.out: list[list[Group]] = [
            [group for k, part in enumerate(folds) if dealt[k] == fold for group in part]
            for fold in range(n_folds)
        ]
        self.train, self.settings, self.space, self.features = train, list(settings), space, features
        self.keys, self.seed, self.progress = dict(keys), seed, progress
        self.options = {"training": training or {}, "layer": layer, "seed": seed}
        self._fits: dict[tuple[int, int], Fits] = {}

    def compare(
        self, candidates: Sequence[Complexity], settings: Sequence[int] | None = None
    ) -> pd.DataFrame:
        """Energy distance of every candidate under every setting (of those at the places `settings`).

        Returns
        -------
        DataFrame
            ``setting, vae, fold, candidate, complexity, group, e_distance, no_change``: energy distances Euclidean,
            U-statistic, one per group.

        Raises
        ------
        ModelError
            Where no fold leaves anything to learn the left-out perturbations from.
        """
        places = range(len(self.settings)) if settings is None else settings
        tries = [(place, fold) for place in places for fold in range(len(self.out))]
        rows = []
        for place, fold in tqdm(tries, desc="choosing, nested", disable=not self.progress):
            fits, judged = self._fitted(place, fold), self._judged(fold)
            labels = {"setting": place, "vae": sizes_in_words(self.settings[place]), "fold": fold}
            for number, candidate in enumerate(candidates):
                named = labels | {"candidate": number, "complexity": str(candidate)}
                rows += [named | row for row in left_out(fits, judged, candidate, without=self.out[fold])]
        if not rows:
            expected = "folds that leave some group of each perturbation to learn from"
            found = f"perturbations that are left out whole ({len(self.out)} folds)"
            raise ModelError(
                three_beats(expected, found, "pass nested=False, one complexity, or another seed")
            )
        return pd.DataFrame(rows)

    def errors(self, perturbation: str, complexity: Complexity, setting: int = 0) -> np.ndarray:
        """(context, gene) real less predicted mean expression of the measured contexts.

        Empty where fewer than two contexts could be predicted from others.
        """
        found = []
        for fold, out in enumerate(self.out):
            asked = [group for group in out if group[1] == perturbation]
            if asked:
                fits = self._fitted(setting, fold)
                response = fits.response(frozenset(out), complexity, asked=asked)
                if set(perturbation.split("+")) <= set(response.operators.conditions.perturbations):
                    found += [fits.error(response, *group) for group in asked]
        return np.stack(found) if len(found) > 1 else np.zeros((0, 0))

    def _judged(self, fold: int) -> list[Group]:
        out = self.out[fold]
        kept = np.random.default_rng(self.seed).permutation(len(out))[:MOST_JUDGED]
        return [out[k] for k in sorted(kept)]

    def _fitted(self, place: int, fold: int) -> Fits:
        """Fits in the latent space of a VAE that has not seen the fold; its cells themselves stay to be judged."""
        if (place, fold) not in self._fits:
            seen = self.train.copy()
            hidden = _labels(seen, self.keys).isin(self.out[fold])
            seen.obs["split"] = np.where(hidden, "test", seen.obs["split"].astype(str))
            vae, z = fit_vae(seen, sizes=self.settings[place], progress=False, **self.options)
            view = view_of(self.train, vae, z, self.space, layer=self.options["layer"], keys=self.keys)
            cells = latents_only(self.train, "X_nbvae", "split")
            keys = self.keys | {"use_rep": "X_nbvae", "split_key": "split"}
            known = {"keys": keys, "features": self.features, "seed": self.seed}
            self._fits[place, fold] = Fits(cells, view, training=QUICK, **known)
        return self._fits[place, fold]


def _dealt(folds: list[list[Group]], n_folds: int, seed: int) -> np.ndarray:
    """Fold of each part, at random; groups of one perturbation go to different folds, where others can tell of it."""
    chance = np.random.default_rng(seed).permutation(len(folds))
    alike = [part[0][1] if len(part) == 1 else "" for part in folds]
    dealt: np.ndarray = np.empty(len(folds), dtype=int)
    dealt[sorted(range(len(folds)), key=lambda k: (alike[k], chance[k]))] = np.arange(len(folds)) % n_folds
    return dealt


def choose_latent(table: pd.DataFrame) -> int:
    """The setting whose best candidate leaves the smallest mean share of the effect; of equals the first."""
    mean = share_left(table).groupby([table["setting"], table["candidate"]]).mean()
    best = mean.groupby("setting").min()
    return int(best.index[np.isclose(best, best.min(), rtol=1e-6)].min())


def _labels(adata, keys: Mapping) -> pd.MultiIndex:
    """(context, perturbation) of every cell."""
    contexts = context_labels(adata, keys["context_key"])
    return pd.MultiIndex.from_arrays(
        [contexts.to_numpy(), obs_labels(adata, keys["perturbation_key"]).to_numpy()]
    )


def sizes_in_words(setting: Mapping) -> str:
    """A setting of the VAE, for a table."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "defaults"
