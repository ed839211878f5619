"""What a VAE gives back of the counts, and what can be read off its latent space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.contract import keys_of, label_table, library_size, obs_labels
from ..data.counts import model_counts
from ..data.groups import representation
from ..data.splits import rows_of
from ..errors import LabelError, three_beats
from ..models.likelihood import nb_log_likelihood
from ..models.vae import NBVAE, elbo_loss, sample_z
from ..training.vae import new_vae

__all__ = [
    "leaks",
    "posterior_check",
]

FEWEST = 5
"""Cells that a label needs, one for each fold of the cross-validation."""


@dataclass(frozen=True, eq=False)
class PosteriorCheck:
    """What :func:`posterior_check` gives back.

    Attributes
    ----------
    observed, sampled : ndarray
        (cell, gene) counts of the held-out cells, and counts drawn from the model for the same cells.
    zeros : Series
        Mean gap in the share of zeros per gene, of the model beside noise and a Poisson.
    loss : Series
        Nats per held-out cell, of the model (a bound from above) beside the likelihood of mean profiles; lower is better.
    kl : ndarray
        (d,) divergence of each latent dimension from its prior in nats, the largest first; 0 carries nothing.
    dimension : float
        Participation ratio of the posterior means: 1 for a line, d for a ball.
    """

    observed: np.ndarray = field(repr=False)
    sampled: np.ndarray = field(repr=False)
    zeros: pd.Series
    loss: pd.Series
    kl: np.ndarray
    dimension: float


@torch.no_grad()
def posterior_check(
    adata, vae: NBVAE, *, split: str = "test", max_cells: int = 5000, seed: int = 0
) -> PosteriorCheck:
    r"""Check whether the VAE reproduces the counts of unseen cells, and better than their group's mean profile does.

    For each held-out cell a latent is drawn from its posterior, and counts from the decoder at the cell's own library
    size. The bound on :math:`-\log p(x)` stands beside the exact likelihood of a negative binomial around the mean
    profile of all training cells, and around that of the training cells of the same (context, perturbation).

    Parameters
    ----------
    adata
        A screen that was set up, with ``obs["split"]``.
    vae
        Trained on the training cells.
    split
        The held-out cells.
    max_cells
        Held-out cells, and training cells, looked at; a random choice of more.
    seed
        Seeds the draws.

    Returns
    -------
    PosteriorCheck

    Raises
    ------
    LabelError
        If no cell is in `split`, or the data were not set up.

    References
    ----------
    Gelman, Meng & Stern 1996, Stat. Sinica 6:733 (posterior predictive checks).
    """
    keys, vae = keys_of(adata), vae.cpu().eval()
    matrix = model_counts(adata, vae)
    rng = np.random.default_rng(seed)
    train, test = (np.sort(rng.permutation(rows_of(adata, part))[:max_cells]) for part in ("train", split))
    batch, seen = matrix.batch(test), matrix.batch(train)
    generator = torch.Generator().manual_seed(seed)
    posterior = vae.encode(batch.x, batch.library, batch.covariates)
    decoded = vae.decode(sample_z(posterior, generator), batch.library, batch.covariates)
    x, train_x = batch.x[:, : vae.n_genes], seen.x[:, : vae.n_genes]
    bound = float(sum(elbo_loss(decoded.log_prob(x), posterior).values()))
    dispersion = new_vae(adata, genes=vae.genes, seed=seed).decoder.dispersion[: vae.n_genes].detach()
    labels = label_table(adata, keys)
    groups = (labels["context"] + "\0" + labels["perturbation"]).to_numpy()
    pooled = _profile_loss(x, batch.library, train_x, seen.library, dispersion)
    own = torch.empty(len(test))
    for group in np.unique(groups[test]):
        to, of = (torch.as_tensor(groups[rows] == group) for rows in (test, train))
        own[to] = _profile_loss(x[to], batch.library[to], train_x[of], seen.library[of], dispersion, train_x)
    loss = {
        "one profile": float(pooled.mean()),
        "profile of the group": float(own.mean()),
        "VAE (bound)": bound,
    }
    variance = posterior.scale.square()
    kl = 0.5 * (posterior.loc.square() + variance - 1 - variance.log()).mean(0)
    spread = np.linalg.eigvalsh(np.cov(posterior.loc.numpy().T))
    return PosteriorCheck(
        observed=x.numpy(),
        sampled=decoded.sample(generator).numpy(),
        zeros=_gaps_in_zeros(x, batch.library, train_x, seen.library, decoded),
        loss=pd.Series(loss, name="nats per cell"),
        kl=np.sort(kl.numpy())[::-1],
        dimension=float(spread.sum() ** 2 / (spread**2).sum()),
    )


def _profile_loss(
    x: Tensor,
    library: Tensor,
    train_x: Tensor,
    train_library: Tensor,
    dispersion: Tensor,
    every: Tensor | None = None,
) -> Tensor:
    """(cell,) negative log-likelihood of counts `x` (cell, gene) around the mean profile of the cells `train_x`.

    Half a cell of the profile of `every` training cell keeps genes that the group has not shown possible.
    """
    share = train_x.sum(0) + 0.5 * (train_x if every is None else every).mean(0) + 1e-6
    share = share * (
        train_x.sum() / train_library.sum() / share.sum()
    )  # the rest of the library are other genes
    return -nb_log_likelihood(x, library[:, None] * share, dispersion)


def _gaps_in_zeros(x: Tensor, library: Tensor, train_x: Tensor, train_library: Tensor, decoded) -> pd.Series:
    """Mean gap in the share of zeros per gene: two samples of cells, the VAE, a Poisson around one profile."""
    observed, share = (x == 0).float().mean(0), train_x.sum(0) / train_library.sum()
    zeros = {
        "two samples of cells (noise)": (train_x == 0).float().mean(0),
        "VAE": torch.exp(-decoded.r * torch.log1p(decoded.mean / decoded.r)).mean(0),
        "Poisson, one profile": torch.exp(-library[:, None] * share).mean(0),
    }
    gaps = {name: float((part - observed).abs().mean()) for name, part in zeros.items()}
    return pd.Series(gaps, name="mean gap in zeros per gene")


def leaks(
    adata,
    covariate_keys: Sequence[str] = (),
    *,
    use_rep: str = "X_nbvae",
    n_permutations: int = 5,
    max_cells: int = 2500,
    seed: int = 0,
) -> pd.DataFrame:
    """Test whether a linear model can read donor, batch or depth off the latents, within groups.

    Labels are read by a linear classifier (balanced accuracy), depth by a linear regression of log library size (R²),
    both in five folds. Taking out group means keeps an unequal share of donors per cell type from counting.

    Parameters
    ----------
    adata
        A screen that was set up, with latents in ``obsm[use_rep]``.
    covariate_keys
        Columns of ``obs``; those with one label, or with a label of fewer than 5 cells, are left out.
    n_permutations
        Runs with permuted values: the largest score of them is what chance can reach.
    max_cells
        Cells looked at, a random choice of more.

    Returns
    -------
    DataFrame
        ``what, score, chance, permuted, excess``: `permuted` is the largest score of permuted values, `excess` how
        far the score lies above it.

    Raises
    ------
    LabelError
        For a column that is not there, or data that were not set up.
    """
    keys, rng = keys_of(adata), np.random.default_rng(seed)
    absent = [key for key in covariate_keys if key not in adata.obs]
    if absent:
        fix = "name the columns of donors and batches, or none"
        raise LabelError(three_beats("columns of adata.obs", repr(absent[0]), fix))
    some = np.sort(rng.permutation(adata.n_obs)[:max_cells])
    labels = label_table(adata, keys).iloc[some]
    groups = (labels["context"] + "\0" + labels["perturbation"]).to_numpy()
    z = _without_group_means(pd.DataFrame(representation(adata, use_rep).numpy()[some]), groups)
    library = np.log10(np.maximum(library_size(adata, keys.layer)[some], 1))
    depth = _without_group_means(pd.DataFrame({"depth": library}), groups)[:, 0]
    values, rows = {"depth (R²)": depth}, []
    for key in reversed(covariate_keys):
        column = obs_labels(adata, key).iloc[some]
        if column.nunique() > 1 and column.value_counts().min() >= FEWEST:
            values = {key: column.to_numpy()} | values
    for name, value in values.items():
        permuted = max(_readable(z, rng.permutation(value)) for _ in range(n_permutations))
        chance = 0.0 if value.dtype == float else 1 / len(set(value))
        score = _readable(z, value)
        rows.append((name, score, chance, permuted, score - permuted))
    return pd.DataFrame(rows, columns=["what", "score", "chance", "permuted", "excess"])


def _without_group_means(table: pd.DataFrame, groups: np.ndarray) -> np.ndarray:
    """(cell, column) values less the mean of their group, in units of their common spread."""
    centred = (table - table.groupby(groups).transform("mean")).to_numpy(float)
    return centred / (centred.std() + 1e-12)


def _readable(z: np.ndarray, values: np.ndarray) -> float:
    """How well numbers (R²) or labels (balanced accuracy) are read off latents (cell, d) in five folds."""
    from sklearn.linear_model import Ridge, RidgeClassifier
    from sklearn.model_selection import cross_val_score

    if values.dtype == float:
        return float(cross_val_score(Ridge(1.0), z, values, cv=FEWEST, scoring="r2").mean())
    model = RidgeClassifier(class_weight="balanced")
    return float(cross_val_score(model, z, values, cv=FEWEST, scoring="balanced_accuracy").mean())
