"""What is held out one after the other: every context, group, combination, or label of a column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.contract import context_labels, obs_labels, require_control
from ..data.splits import split
from ..errors import HoldoutError, three_beats
from .selection import combinations_of


def plan_of(adata, over: str, where: dict, min_cells: int, keys: dict) -> tuple[dict, list[dict]]:
    """Name to hold-out of every run, and those refused before any training with their numbers."""
    contexts = context_labels(adata, keys["context_key"])
    perturbations = obs_labels(adata, keys["perturbation_key"])
    perturbed = ~require_control(perturbations, keys["control"], keys["perturbation_key"])
    plan, refused = {}, []
    for name, held in _candidates(adata, over, perturbed, keys).items():
        held = where | held
        mask = perturbed.copy()
        for column, value in held.items():
            wanted = [str(v) for v in value] if isinstance(value, (list, tuple, set)) else [str(value)]
            mask &= obs_labels(adata, column).isin(wanted).to_numpy()
        sizes = (contexts[mask] + ", " + perturbations[mask]).value_counts()
        if len(sizes) and sizes.max() >= min_cells:
            reason = _refusal(adata, held, keys)
        else:
            largest = f"the largest group has {sizes.max()} cells" if len(sizes) else "no cells match"
            reason = f"{largest}; {min_cells} are needed"
        if reason:
            refused.append({"heldout": name, "seed": np.nan, "reason": reason})
        else:
            plan[name] = held
    return plan, refused


def _candidates(adata, over: str, perturbed: np.ndarray, keys: dict) -> dict[str, dict]:
    """Name to hold-out."""
    key = keys["perturbation_key"]
    perturbations = obs_labels(adata, key)[perturbed]
    contexts = context_labels(adata, keys["context_key"])[perturbed]
    groups = sorted(set(zip(contexts, perturbations, strict=True)))
    if over == "combination":
        return {label: {key: label} for label in combinations_of(groups)}
    if over not in ("context", "group") or over in adata.obs:
        labels = obs_labels(adata, over)[perturbed]
        return {label: {over: label} for label in sorted(set(labels))}
    columns = _columns(keys["context_key"])
    places = adata.obs[perturbed].assign(_context=contexts.to_numpy()).drop_duplicates("_context")
    where = {row["_context"]: {c: str(row[c]) for c in columns} for _, row in places.iterrows()}
    if over == "context":
        return {context: where[context] for context in sorted(where)}
    repeated = [(c, p) for c, p in groups if any(q == p and d != c for d, q in groups)]
    return {f"{c}, {p}": where[c] | {key: p} for c, p in repeated}


def _columns(context_key: str | Sequence[str] | None) -> list[str]:
    if not context_key:
        fix = "name one (context_key=...), or hold out combinations or perturbations"
        raise HoldoutError(three_beats("a column of contexts to hold out", "context_key=None", fix))
    return [context_key] if isinstance(context_key, str) else list(context_key)


def _refusal(adata, held: dict, keys: dict) -> str:
    """Why this split would be refused, or nothing."""
    labels = adata.obs.copy()
    bare = type(adata)(obs=labels)
    try:
        split(bare, holdout=held, **keys)
    except HoldoutError as refusal:
        return str(refusal)
    return ""
