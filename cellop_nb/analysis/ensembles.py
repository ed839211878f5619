"""How sure are the operators themselves: refits on resampled cells and other seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.stats import t
from tqdm.auto import tqdm

from ..data.contract import context_labels, obs_labels
from ..errors import ModelError, three_beats
from ..models.affine import AffineOperator
from .fits import fit_response, latents_only
from .intervals import Interval
from .predict import latents
from .transfer import Complexity, Response


def bootstrap_operators(
    adata,
    complexity: Complexity,
    *,
    n_replicates: int = 20,
    resample: bool = True,
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    split_key: str = "split",
    seed: int = 0,
    progress: bool = True,
    **training,
) -> list[Response]:
    """Operators fitted again and again, each time on training cells drawn anew and with another seed.

    Cells are drawn with replacement inside each (context, perturbation) group and split, so that every group
    keeps its size. The latents stay as they are: the spread of the VAE is that between the fits of
    :func:`holdout` with several seeds.

    Parameters
    ----------
    adata
        With latents in ``obsm[use_rep]`` and ``obs[split_key]``; test cells are never read.
    complexity
        Form and ridge of the operators.
    n_replicates
        How many refits.
    resample
        False keeps the cells and changes the seed alone.
    **training
        As in :func:`~cellop_nb.analysis.fits.fit_response`, for instance `features`.

    Returns
    -------
    list of Response, for :func:`operator_intervals`.

    Raises
    ------
    ModelError
        For fewer than two refits.
    """
    if n_replicates < 2:
        raise ModelError(three_beats("two refits or more", str(n_replicates), "raise n_replicates"))
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    cells = latents_only(adata, use_rep, split_key)
    parts = (
        context_labels(cells, context_key),
        obs_labels(cells, perturbation_key),
        obs_labels(cells, split_key),
    )
    labels = pd.DataFrame({k: part.to_numpy() for k, part in enumerate(parts)})
    groups = [rows.to_numpy() for rows in labels.groupby([0, 1, 2]).groups.values()]
    members = []
    for k in tqdm(range(n_replicates), desc="refitting operators", disable=not progress):
        rng = np.random.default_rng([seed, k])
        drawn = [rng.choice(rows, len(rows)) if resample else rows for rows in groups]
        chosen = np.sort(np.concatenate(drawn))
        obs = cells.obs.iloc[chosen].set_axis(
            [str(i) for i in range(len(chosen))]
        )  # drawn twice, named apart
        sample = AnnData(obs=obs, obsm={use_rep: cells.obsm[use_rep][chosen]})
        options = keys | {"use_rep": use_rep, "split_key": split_key, "seed": seed + k}
        members.append(fit_response(sample, complexity, **options, **training))
    return members


def operator_intervals(
    adata,
    members: Sequence[Response],
    *,
    level: float = 0.95,
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
) -> pd.DataFrame:
    """Intervals of what each operator does to the mean control cell, and of how it stretches.

    Parameters
    ----------
    adata
        With latents; its control cells give the mean control latent z0 of each context.
    members
        Of :func:`bootstrap_operators`.
    level
        Nominal coverage.

    Returns
    -------
    DataFrame
        A row per group and quantity: ``context, perturbation, group, quantity, estimate, low, high``.
        Quantities: ``move[i]``, coordinate i of (A - I) z0 + b; ``length`` of that move; ``norm``,
        the largest singular value of A. The estimate is the members' mean, the ends
        are Student's t times their standard deviation away.

    References
    ----------
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 12 (standard intervals).
    """
    contexts = context_labels(adata, context_key).to_numpy()
    is_control = (obs_labels(adata, perturbation_key) == control).to_numpy()
    z, rows = latents(adata, use_rep), []
    model = members[0].operators.conditions
    for context in model.contexts:
        start = z[torch.as_tensor(is_control & (contexts == context))]
        for perturbation in model.perturbations:
            operators = [member.operator(perturbation, context) for member in members]
            group = {"context": context, "perturbation": perturbation, "group": f"{context}, {perturbation}"}
            for quantity, values in _quantities(operators, start.mean(0, keepdim=True)).items():
                found = _standard_interval(np.asarray(values), level)
                ends = {"estimate": found.estimate, "low": found.low, "high": found.high}
                rows.append({**group, "quantity": quantity, **{k: float(v) for k, v in ends.items()}})
    return pd.DataFrame(rows)


def operator_interval(operators: Sequence[AffineOperator], *, level: float = 0.95) -> Interval:
    """Interval of every entry of A and b: of the homogeneous matrices (d + 1, d + 1) of one condition."""
    matrices = np.stack([operator.homogeneous for operator in operators])
    return _standard_interval(matrices, level)


def _standard_interval(values: np.ndarray, level: float) -> Interval:
    """Mean and Student's t times the standard deviation of the refits: quantiles of a few would be too narrow."""
    mean, margin = values.mean(axis=0), t.ppf((1 + level) / 2, len(values) - 1) * values.std(axis=0, ddof=1)
    return Interval(mean, mean - margin, mean + margin, level, values)


def _quantities(operators: Sequence[AffineOperator], mean: torch.Tensor) -> dict[str, list[float]]:
    moves = torch.cat([operator(mean) - mean for operator in operators])
    found = {f"move[{i}]": moves[:, i].tolist() for i in range(moves.shape[1])}
    return found | {"length": moves.norm(dim=1).tolist(), "norm": [operator.norm for operator in operators]}
