"""From models to cells: embed counts, move latents, and give the moved cells back as AnnData."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from ..data.batches import model_counts
from ..data.contract import context_labels, obs_labels
from ..errors import DataError, LabelError, did_you_mean, three_beats
from ..models.affine import AffineOperator, check_strength
from ..models.carry import Observed, Remainder, carry_counts
from ..models.likelihood import SparseCounts
from ..models.operators import Condition, OperatorModel
from ..models.vae import NBVAE


@torch.no_grad()
def embed(
    adata, vae: NBVAE, *, layer: str | None = None, key_added: str = "X_nbvae", batch_size: int = 2048
) -> None:
    """Posterior means of all cells.

    Parameters
    ----------
    adata
        Raw counts with the model's genes.
    vae
        A trained VAE.
    layer
        Layer that holds the counts; ``X`` where None.
    batch_size
        Cells that are encoded at a time.

    Returns
    -------
    None; writes ``obsm[key_added]``, (cell, latent) float32.
    """
    vae.eval()
    device = next(vae.parameters()).device
    counts = model_counts(adata, vae, layer=layer)
    loader = counts.loader(batch_size=batch_size, shuffle=False, device=device)
    # A bar is for work that takes long enough to wonder about.
    loader = tqdm(loader, desc="embedding", disable=len(loader) < 20)
    latents, start = np.empty((adata.n_obs, vae.n_latent), dtype=np.float32), 0
    for batch in loader:
        found = vae.encode(SparseCounts.of(batch), batch.library, batch.covariates).loc
        latents[start : (start := start + len(found))] = found.float().cpu().numpy()
    adata.obsm[key_added] = latents


def operator_for(
    operators: OperatorModel, perturbation: str, context: str | None, *, control: str = "control"
) -> tuple[AffineOperator, bool]:
    """The operator of a perturbation in a context, and whether the context is one that it was fitted with.

    A context never seen gets the shared response: this is a prediction, and callers say so.
    """
    known = context in operators.conditions.contexts
    condition = Condition.parse(perturbation, context if known else None, control=control)
    return operators.operator(condition), known


@torch.no_grad()
def predict(
    adata,
    vae: NBVAE,
    operators: OperatorModel | AffineOperator,
    *,
    perturbation: str,
    context: str | None = None,
    strength: float = 1.0,
    layer: str | None = None,
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    carry: bool = True,
    max_cells: int | None = None,
    seed: int = 0,
) -> ad.AnnData:
    """Virtual cells: the control cells of a context, moved by an operator and decoded to counts.

    Parameters
    ----------
    adata
        With raw counts and latents (:func:`embed`); its control cells of `context` are the source.
    vae, operators
        Trained models; an :class:`AffineOperator` (a composition, an inverse) may stand for the family.
    perturbation
        Label of the perturbation, or ``"A+B"``; for an :class:`AffineOperator` the label that is written.
    context
        Whose control cells are moved; all control cells where None. A context that the operators were not
        fitted with is moved by the shared response, and marked.
    strength
        Power of the operator, 0 to 1.5: 0 leaves the cells, 1 is the measured strength.
    carry
        Whether each cell keeps its own counts and gains or loses what the decoder says
        (:class:`cellop_nb.models.carry.Observed`); otherwise counts are drawn afresh.
    max_cells
        Take at most this many source cells, drawn with `seed`.
    seed
        Seeds the sampled counts.

    Returns
    -------
    AnnData
        Of the source cells, with sampled counts in ``X``, expected
        counts in ``layers["mean"]``, moved latents in ``obsm[use_rep]``, the source cells' ``obs`` with
        ``obs[perturbation_key]`` set, and ``uns["cellop_nb"]["prediction"]``.

    Raises
    ------
    LabelError
        For an unknown context or perturbation.
    ModelError
        For a strength out of range, or a part strength of an operator without a real logarithm.
    """
    check_strength(strength)
    source = source_cells(
        adata, context, perturbation_key=perturbation_key, context_key=context_key, control=control
    )
    if max_cells is not None and len(source) > max_cells:
        source = np.sort(np.random.default_rng(seed).choice(source, max_cells, replace=False))
    known = True
    if isinstance(operators, OperatorModel):
        operator, known = operator_for(operators, perturbation, context, control=control)
    else:
        operator = operators
    start = latents(adata[source], use_rep)
    moved = operator.power(strength)(start.to(operator.matrix))
    options = {"layer": layer, "key_added": use_rep, "seed": seed}
    predicted = decode_cells(adata[source], vae, moved, start=start if carry else None, **options)
    predicted.obs[perturbation_key] = perturbation
    predicted.uns["cellop_nb"] = {
        "prediction": {
            "operator": operator.label,
            "perturbation": perturbation,
            "context": "" if context is None else context,
            "strength": float(strength),
            "context_was_trained": bool(known),
            "seed": int(seed),
        }
    }
    return predicted


def source_cells(
    adata,
    context: str | None,
    *,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
) -> np.ndarray:
    """Rows of the control cells of a context (of all contexts where None)."""
    is_source = (obs_labels(adata, perturbation_key) == control).to_numpy()
    if context is not None:
        labels = context_labels(adata, context_key)
        if context not in set(labels):
            raise LabelError(
                three_beats("a context of the data", repr(context), did_you_mean(context, labels.unique()))
            )
        is_source = is_source & (labels == context).to_numpy()
    if not is_source.any():
        raise DataError(
            three_beats(
                f"control cells to start from in {context or 'the data'}",
                "none",
                f"give cells with obs[{perturbation_key!r}] == {control!r}",
            )
        )
    return np.flatnonzero(is_source)


def latents(adata, use_rep: str = "X_nbvae") -> Tensor:
    """Latents (cell, d) float32 of ``obsm[use_rep]``."""
    if use_rep not in adata.obsm:
        raise DataError(
            three_beats(
                f"latents in obsm[{use_rep!r}]", f"{list(adata.obsm)}", "call embed(adata, vae) first"
            )
        )
    return torch.as_tensor(np.asarray(adata.obsm[use_rep]), dtype=torch.float32)


_CELLS_AT_ONCE = 1024
"""Cells decoded together: what lies between latents and counts is held of so many."""


@torch.no_grad()
def decode_cells(
    adata,
    vae: NBVAE,
    moved: Tensor,
    *,
    start: Tensor | None = None,
    remainder: Remainder | None = None,
    layer: str | None = None,
    key_added: str = "X_nbvae",
    seed: int = 0,
) -> ad.AnnData:
    """Cells of `adata` with the latents `moved` (cell, d), as counts.

    Counts are sampled, since log1p of an expected count is not the expectation of log1p counts.

    Parameters
    ----------
    start
        (cell, d) latents before the move. With them, each cell keeps its own counts and gains or loses what
        the decoder says (:class:`Observed`); without, counts are drawn afresh from the decoder at the cells'
        library sizes.
    remainder
        What the prediction is known to miss, added to cells that have a `start`.

    Returns
    -------
    AnnData
        ``X`` (sampled counts, CSR), ``layers["mean"]``, ``obsm[key_added]`` and a copy of ``obs``.
    """
    vae.eval()
    matrix = model_counts(adata, vae, layer=layer)
    device = next(vae.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    means: np.ndarray = np.empty((len(matrix), vae.n_genes), dtype=np.float32)
    counts = []
    for rows in np.split(np.arange(len(matrix)), range(_CELLS_AT_ONCE, len(matrix), _CELLS_AT_ONCE)):
        batch = matrix.batch(rows, device)
        end = vae.decode(moved[rows].to(device), batch.library, batch.covariates)
        if start is None:
            mean, sampled = end.mean, end.sample(generator)
        else:
            begin = vae.decode(start[rows].to(device), batch.library, batch.covariates)
            mean = Observed(batch.x[:, : vae.n_genes], batch.library, begin).mean(end, remainder)
            sampled = carry_counts(mean, generator)
        means[rows] = mean.cpu().numpy()
        counts.append(sparse.csr_matrix(sampled.cpu().numpy()))
    cells = ad.AnnData(X=sparse.vstack(counts, format="csr"), obs=adata.obs.copy(), layers={"mean": means})
    cells.var_names = vae.genes
    cells.obsm[key_added] = moved.cpu().numpy()
    return cells
