"""Choosing the VAE's sizes by what its operators predict: groups left out of the VAE and of the operators alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..data.contract import context_labels, obs_labels
from ..errors import ModelError, three_beats
from .fits import Fits, latents_only
from .fitted import fit_vae, view_of
from .selection import QUICK, folds_over, left_out, share_left
from .space import EvaluationSpace
from .transfer import Complexity


def compare_latents(
    train,
    settings: Sequence[Mapping],
    candidates: Sequence[Complexity],
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
) -> pd.DataFrame:
    """Energy distance of every candidate under every setting of the VAE, on cells that neither has seen.

    The training groups are dealt into `n_folds` folds. For each fold and setting a VAE is trained without the
    fold's perturbed cells, every candidate's operators are fitted without them, and asked for them.

    Parameters
    ----------
    train
        Raw counts with ``obs["split"]``, without the cells that are to be predicted in the end.
    settings
        Settings of :func:`new_vae`, such as ``{"n_latent": 16}``.
    candidates
        Complexities of the operators.
    over
        What is left out, as in :func:`leave_out`.
    space
        In which energy distances are computed.
    training
        Settings of :class:`VAETrainer`.

    Returns
    -------
    DataFrame
        ``setting, vae, fold, candidate, complexity, group, e_distance, no_change``: energy distances Euclidean,
        U-statistic, one per group.

    Raises
    ------
    ModelError
        Where fewer than two groups can be left out.
    """
    groups = [group for group in _labels(train, keys).unique() if group[1] != keys["control"]]
    folds = list(folds_over(over, groups).values())
    n_folds = min(n_folds, len(folds))
    if n_folds < 2:
        expected = f"two or more {over}s to leave out in turn"
        raise ModelError(three_beats(expected, f"{len(folds)}", "name one setting of the VAE"))
    dealt = np.random.default_rng(seed).permutation(len(folds)) % n_folds
    tries = [(place, fold) for place in range(len(settings)) for fold in range(n_folds)]
    rows = []
    for place, fold in tqdm(tries, desc="choosing the latent space", disable=not progress):
        out = [group for k, part in enumerate(folds) if dealt[k] == fold for group in part]
        labels = {"setting": place, "vae": sizes_in_words(settings[place]), "fold": fold}
        options = {"sizes": settings[place], "training": training or {}, "layer": layer, "seed": seed}
        fits = _fits_without(train, out, space, keys, features, options)
        for number, candidate in enumerate(candidates):
            named = labels | {"candidate": number, "complexity": str(candidate)}
            rows += [named | row for row in left_out(fits, out, candidate)]
    return pd.DataFrame(rows)


def choose_latent(table: pd.DataFrame) -> int:
    """The setting whose best candidate leaves the smallest mean share of the effect; of equals the first."""
    mean = share_left(table).groupby([table["setting"], table["candidate"]]).mean()
    best = mean.groupby("setting").min()
    return int(best.index[np.isclose(best, best.min(), rtol=1e-6)].min())


def _fits_without(train, out: list, space, keys: Mapping, features, options: Mapping) -> Fits:
    """Fits in the latent space of a VAE that has not seen the groups `out`; the cells themselves stay to be judged."""
    seen = train.copy()
    hidden = _labels(seen, keys).isin(out)
    seen.obs["split"] = np.where(hidden, "test", seen.obs["split"].astype(str))
    vae, z = fit_vae(seen, progress=False, **options)
    view = view_of(train, vae, z, space, layer=options["layer"], keys=keys)
    cells = latents_only(train, "X_nbvae", "split")
    keys = dict(keys) | {"use_rep": "X_nbvae", "split_key": "split"}
    return Fits(cells, view, keys=keys, features=features, seed=options["seed"], training=QUICK)


def _labels(adata, keys: Mapping) -> pd.MultiIndex:
    """(context, perturbation) of every cell."""
    contexts = context_labels(adata, keys["context_key"])
    return pd.MultiIndex.from_arrays(
        [contexts.to_numpy(), obs_labels(adata, keys["perturbation_key"]).to_numpy()]
    )


def sizes_in_words(setting: Mapping) -> str:
    """A setting of the VAE, for a table."""
    return ", ".join(f"{name} {value}" for name, value in setting.items()) or "defaults"
