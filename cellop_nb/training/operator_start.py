"""Operators for the conditions of a screen, started from the moments of its training cells."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ..data.grouping import groups
from ..data.groups import Group
from ..errors import LabelError, ModelError, did_you_mean, three_beats
from ..models.conditions import Condition
from ..models.operators import OperatorModel
from ..settings import check_settings

_FROM_DATA = ("n_latent", "perturbations", "contexts", "pairs", "features")


def new_operators(
    adata,
    *,
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    dose_key: str | None = None,
    split_key: str = "split",
    features=None,
    form: type[OperatorModel] = OperatorModel,
    **sizes,
) -> OperatorModel:
    """An operator family for the conditions among the training cells, started from their moments.

    Parameters
    ----------
    adata
        With latents in ``obsm[use_rep]`` (:func:`cellop_nb.embed`) and ``obs[split_key]``.
    features
        DataFrame (perturbation, feature) of given descriptors; operators of perturbations that were never
        measured can then be asked for. It must hold every perturbation of the training cells.
    form
        A subclass of :class:`OperatorModel`, for operators of another form.
    **sizes
        ``n_axes``, ``rank``, ``context_rank`` of :class:`OperatorModel`, or arguments of the form's own.

    Returns
    -------
    OperatorModel; untrained, but its shifts already match the group means.

    Raises
    ------
    LabelError
        If a key, the control label, a perturbation in `features` or a size is unknown.
    DataError
        If the latents are missing or not finite, a context has no controls, or no perturbed group is left.
    """
    check_settings(sizes, form, of="new_operators", taken=_FROM_DATA)
    data = groups(
        adata,
        use_rep=use_rep,
        perturbation_key=perturbation_key,
        context_key=context_key,
        control=control,
        dose_key=dose_key,
        split="train",
        split_key=split_key,
    )
    conditions = [condition_of(group, control) for group in data.items]
    parts = sorted({part for condition in conditions for part in condition.perturbations})
    pairs = sorted({pair for c in conditions for pair in combinations(sorted(c.perturbations), 2)})
    known = parts if features is None else list(features.index.astype(str))
    given = None if features is None else _given(features, parts)
    contexts = sorted({str(condition.context) for condition in conditions})
    n_latent = data.items[0].cells.shape[1]
    model = form(n_latent, known, contexts, pairs=pairs, features=given, **sizes)
    controls = [data.control[group.context] for group in data.items]
    return model.start_from(conditions, controls, [group.cells for group in data.items])


def _given(features, parts: Sequence[str]) -> Tensor:
    """The features (perturbation, feature) as a tensor, once they are whole."""
    known = features.index.astype(str)
    missing = [part for part in parts if part not in set(known)]
    if missing:
        found = f"none of {missing[:5]}"
        fix = f"add their rows, or leave these cells out ({did_you_mean(missing[0], known)})"
        raise LabelError(three_beats("features of every perturbation in training", found, fix))
    values = torch.tensor(features.to_numpy(dtype=float, copy=True), dtype=torch.float32)
    broken = ~values.isfinite().all(1).numpy()
    if broken.any() or not known.is_unique:
        found = f"{list(known[broken | known.duplicated()][:5])} with NaN, infinity or several rows"
        raise ModelError(
            three_beats("one row of finite features per perturbation", found, "repair the table")
        )
    return values


def condition_of(group: Group, control: str = "control") -> Condition:
    """The condition of a group of cells."""
    return Condition.parse(group.perturbation, group.context, control=control, dose=group.dose)
