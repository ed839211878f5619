"""The models of one seed, trained without the held-out cells, and the cells that they predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import anndata as ad
import numpy as np
import torch
from scipy import sparse

from ..data.batches import TOTAL_KEY
from ..errors import HoldoutError, check_settings, three_beats
from ..models.vae import NBVAE
from ..training.callbacks import EarlyStopping
from ..training.vae import VAETrainer, new_vae
from .baselines import latent_shift
from .combinations import response_operator
from .library import library_growth
from .predict import decode_cells, embed, source_cells
from .space import EvaluationSpace
from .targets import Prediction, Screen, Target
from .transfer import Response
from .views import CountView

LATENT_SHIFT = "latent shift"

SIZES = ({"n_latent": 32, "n_hidden": 256}, {"n_latent": 16, "n_hidden": 128})
"""Settings of the VAE that hold-outs choose from by default: the first for screens of thousands of cells, the second
for those too small for it."""


@dataclass(frozen=True)
class Fitted:
    """Models of one seed, trained without the held-out cells."""

    vae: NBVAE = field(repr=False)
    response: Response
    latents: np.ndarray = field(repr=False)
    seed: int = 0


def fit_vae(
    train,
    *,
    sizes: Mapping,
    training: Mapping,
    layer: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[NBVAE, np.ndarray]:
    """A VAE of the training cells, and their latents (cell, d).

    Parameters
    ----------
    train
        Raw counts with ``obs["split"]``; only cells of train and val are read.
    sizes, training
        Settings of :func:`new_vae` and :class:`VAETrainer`, those of :data:`SIZES` first where nothing is said.

    Raises
    ------
    LabelError
        For a setting that neither knows.
    """
    check_vae_settings(sizes, training)
    sizes = SIZES[0] | dict(sizes)
    training = {"max_epochs": 120, "lr": 1e-3, "patience": 40} | dict(training)
    model = new_vae(train, layer=layer, seed=seed, **sizes)
    stop = EarlyStopping(patience=training.pop("patience"))
    VAETrainer(train, model, layer=layer, seed=seed, progress=progress, callbacks=[stop], **training).fit()
    embed(train, model, layer=layer)
    return model, train.obsm["X_nbvae"].copy()


def settings_of(vae: Mapping | Sequence[Mapping] | None, nested: bool = True) -> list[Mapping]:
    """The settings of the VAE to choose from."""
    if vae is None:
        return list(SIZES if nested else SIZES[:1])
    found = [vae] if isinstance(vae, Mapping) else list(vae)
    if not found:
        raise HoldoutError(three_beats("settings of the VAE", "vae=[]", "leave vae out for the defaults"))
    return found


def check_vae_settings(sizes: Mapping, training: Mapping) -> None:
    """Refuse what neither :func:`new_vae` nor :class:`VAETrainer` takes, and what a hold-out sets itself."""
    ours = ("adata", "layer", "seed")
    known_sizes = ("genes", "covariates", "split_key")
    check_settings(sizes, new_vae, NBVAE, of="vae={...}", taken=(*ours, *known_sizes))
    known = (*ours, "model", "split_key", "progress", "callbacks", "min_delta")
    check_settings(training, VAETrainer, EarlyStopping, of="training={...}", taken=known)


def view_of(
    train, vae: NBVAE, z: np.ndarray, space: EvaluationSpace, *, layer: str | None, keys: Mapping
) -> CountView:
    """The training cells as one fit sees them; writes its latents to ``obsm["X_nbvae"]``."""
    train.obsm["X_nbvae"] = z
    return CountView(train, vae, space, layer=layer, **keys)


def virtual_cells(
    train,
    fits: Sequence[Fitted],
    context: str,
    perturbation: str,
    *,
    layer: str | None,
    keys: Mapping,
    rule: str | None = None,
) -> ad.AnnData:
    """The context's control cells, moved by the operator of each fit and decoded; pooled over the fits.

    `rule` as in :func:`response_operator`.
    """
    rows = source_cells(train, context, **keys)
    parts = []
    for fitted in fits:
        start = torch.as_tensor(fitted.latents[rows])
        moved = response_operator(fitted.response, perturbation, context, rule=rule)(start)
        missed = fitted.response.remainder(perturbation, context)
        options = {"start": start, "remainder": missed, "layer": layer, "seed": fitted.seed}
        cells = decode_cells(train[rows], fitted.vae, moved, **options)
        cells.obs["source_cell"] = cells.obs_names
        cells.obs["fit"] = fitted.seed
        cells.obs_names = [f"{name}, {perturbation}, fit {fitted.seed}" for name in cells.obs_names]
        parts.append(cells)
    pooled = ad.concat(parts)
    pooled.obs[keys["perturbation_key"]] = perturbation
    if TOTAL_KEY in pooled.obs:
        pooled.obs[TOTAL_KEY] *= np.exp(library_growth(train, context, perturbation, **keys))
    return pooled


def pooled_shift(
    training: Screen, target: Target, *, fits: Sequence[Fitted], layer: str | None
) -> Prediction:
    """scGen's rule in each fit's latent space, pooled over the fits."""
    rows = np.flatnonzero(training.rows(target.context, training.control))
    counts = []
    for fitted in fits:

        def decode(z: np.ndarray, fitted=fitted):
            moved = torch.as_tensor(z, dtype=torch.float32)
            return decode_cells(target.adata, fitted.vae, moved, layer=layer, seed=fitted.seed).X

        known = {"latents": fitted.latents, "start": fitted.latents[rows]}
        counts.append(latent_shift(training, target, decode=decode, **known).counts)
    library = None if target.library is None else np.tile(target.library, len(fits))
    return Prediction.of_counts(LATENT_SHIFT, sparse.vstack(counts).tocsr(), target.space, library)
