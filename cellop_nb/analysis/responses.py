"""Which genes the operators move: responses and response axes, carried to gene space by the decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.batches import count_matrix, model_counts
from ..data.contract import context_labels, obs_labels
from ..data.matrices import CountMatrix
from ..data.on_disk import DiskCounts
from ..models.likelihood import COUNTS_PER_CELL
from ..models.operators import Condition, OperatorModel
from ..models.vae import NBVAE
from .predict import latents, source_cells


@torch.no_grad()
def response_genes(
    adata,
    vae: NBVAE,
    operators: OperatorModel,
    *,
    n_top: int | None = 10,
    pseudocount: float = 1.0,
    use_rep: str = "X_nbvae",
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
) -> pd.DataFrame:
    r"""Genes that each learned response changes most.

    The control cells of a context are moved by the operator. With p their mean decoded counts per 10,000
    before (0) and after (1):

    .. math:: \mathrm{lfc}_g = \log_2 \frac{p_{1g} + c}{p_{0g} + c}

    Parameters
    ----------
    adata
        With raw counts and latents (:func:`cellop_nb.embed`).
    n_top
        Genes per group, by absolute change; all of them where None.
    pseudocount
        c, in counts per 10,000; it keeps genes with hardly any counts from leading.

    Returns
    -------
    DataFrame
        The columns ``context, perturbation, gene, lfc``, for every (context, perturbation) group
        of the data that the operators know, largest absolute change first.
    """
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    z, covariates = latents(adata, use_rep), _one_hot(adata, vae, layer)
    tables = []
    for context, perturbation, _ in _groups(adata, **keys):
        condition = Condition.parse(perturbation, context, control=control)
        if context not in operators.conditions.contexts:
            continue
        rows = source_cells(adata, context, **keys)
        given = None if covariates is None else covariates[rows]
        moved = operators.operator(condition)(z[rows])
        before, after = (_mean_proportions(vae, cells, given) for cells in (z[rows], moved))
        tables.append(_table(vae.genes, before, after, pseudocount, context, perturbation, n_top))
    return pd.concat(tables, ignore_index=True)


def _mean_shares(matrix: CountMatrix | DiskCounts, rows: np.ndarray) -> np.ndarray:
    """Each gene's share of a cell's counts, mean over the cells `rows`, (gene,); read in parts."""
    total, library = np.zeros(matrix.shape[1]), matrix.library.double().numpy()
    for part, counts in matrix.blocks(rows):
        total += np.asarray(counts.multiply(1.0 / library[part, None]).sum(0)).ravel()
    return total / len(rows)


def measured_genes(
    adata,
    *,
    n_top: int | None = None,
    split: str | None = "test",
    split_key: str = "split",
    pseudocount: float = 1.0,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
) -> pd.DataFrame:
    """What :func:`response_genes` predicts, measured: means of the cells' own counts per 10,000.

    Perturbed cells are those of `split` (all of them where None); groups without such cells are left out.
    Control cells are all of the context. The columns are the same.
    """
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    matrix = count_matrix(adata, layer=layer)
    inside = np.ones(len(adata), bool) if split is None else (adata.obs[split_key] == split).to_numpy()
    tables = []
    for context, perturbation, cells in _groups(adata, **keys):
        rows = np.flatnonzero(cells & inside)
        if len(rows):
            both = (source_cells(adata, context, **keys), rows)
            before, after = (_mean_shares(matrix, chosen) for chosen in both)
            tables.append(_table(adata.var_names, before, after, pseudocount, context, perturbation, n_top))
    return pd.concat(tables, ignore_index=True)


def axis_genes(
    adata,
    vae: NBVAE,
    operators: OperatorModel,
    *,
    n_axes: int = 4,
    use_rep: str = "X_nbvae",
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
) -> pd.DataFrame:
    r"""Main directions of all learned responses, and what each does to every gene.

    The model's own axes are known only up to an invertible mixture. What they span is: the displacement of
    each context's mean control cell,
    :math:`\delta_\theta = (A_\theta - I) \bar z_c + b_\theta`. Their singular vectors are the axes here, with
    the sign that makes most responses positive and the length of a typical response. The decoder's Jacobian
    of log proportions, at the mean control cell of all contexts, carries them to genes.

    Returns
    -------
    DataFrame
        The columns ``axis`` (1, 2, ...), ``share`` (of the squared length of all displacements),
        ``gene``, ``effect`` (signed, log2 fold change to first order).
    """
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    z, covariates = latents(adata, use_rep), _one_hot(adata, vae, layer)
    sources, steps = [], []
    for context, perturbation, _ in _groups(adata, **keys):
        if context in operators.conditions.contexts:
            rows = source_cells(adata, context, **keys)
            operator = operators.operator(Condition.parse(perturbation, context, control=control))
            mean = z[rows].mean(0, keepdim=True)
            steps.append((operator(mean) - mean)[0])
            sources.append(rows)
    scores, size, axes = torch.linalg.svd(torch.stack(steps), full_matrices=False)
    sign = torch.where(scores.sum(0) < 0, -1.0, 1.0)
    directions = axes * (sign * size / len(steps) ** 0.5).unsqueeze(1)
    rows = np.unique(np.concatenate(sources))
    given = None if covariates is None else covariates[rows].mean(0, keepdim=True)
    effects = _log2_slopes(vae, z[rows].mean(0, keepdim=True), directions[:n_axes], given)
    share = (size.square() / size.square().sum()).tolist()
    tables = [
        pd.DataFrame({"axis": k + 1, "share": share[k], "gene": vae.genes, "effect": effect.numpy()})
        for k, effect in enumerate(effects)
    ]
    return pd.concat(tables, ignore_index=True)


def _groups(adata, *, perturbation_key, context_key, control):
    """(context, perturbation, mask of its cells) of every perturbed group."""
    contexts = context_labels(adata, context_key).to_numpy()
    labels = obs_labels(adata, perturbation_key).to_numpy()
    pairs = pd.DataFrame({"context": contexts, "perturbation": labels}).drop_duplicates()
    for context, perturbation in sorted(pairs.itertuples(index=False, name=None)):
        if perturbation != control:
            yield context, perturbation, (contexts == context) & (labels == perturbation)


def _one_hot(adata, vae: NBVAE, layer: str | None) -> Tensor | None:
    matrix = model_counts(adata, vae, layer=layer)
    return vae.one_hot(matrix.covariates, len(matrix))


def _mean_proportions(vae: NBVAE, z: Tensor, covariates: Tensor | None) -> np.ndarray:
    return vae.log_proportions(z, covariates).exp().mean(0).numpy()


def _log2_slopes(vae: NBVAE, z: Tensor, directions: Tensor, covariates: Tensor | None) -> Tensor:
    """(direction, gene) derivative of the log2 proportions at z (1, d) along each direction (d,)."""

    def log_proportions(place: Tensor) -> Tensor:
        return vae.log_proportions(place, covariates)[0]

    jacobian = torch.autograd.functional.jacobian(log_proportions, z)[:, 0]
    return (directions @ jacobian.T / np.log(2)).detach()


def _table(genes, before, after, pseudocount: float, context: str, perturbation: str, n_top: int | None):
    before, after = (COUNTS_PER_CELL * mean.astype(float) + pseudocount for mean in (before, after))
    lfc = np.log2(after / before)
    order = np.argsort(-np.abs(lfc), kind="stable")[:n_top]
    columns = {"context": context, "perturbation": perturbation, "gene": np.asarray(genes)[order]}
    return pd.DataFrame({**columns, "lfc": lfc[order]})
