"""How far moved controls are from the real perturbed cells in the latent space: baselines, noise floor."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from ..data.contract import Keys
from ..data.groups import Group, Groups
from ..display import Distances
from ..models.energy import energy_distance
from ..models.operators import Condition, OperatorModel

NO_CHANGE, MEAN_SHIFT, OPERATOR = "no change", "mean shift", "operator"


def noise_floor(
    cells: Tensor, n_cells: int | None = None, *, repeats: int = 20, quantile: float = 0.95, seed: int = 0
) -> float:
    """What two samples of one cloud show: a quantile of the energy distance between random parts of it.

    An energy distance (Euclidean, U-statistic) below it is what resampling the same cells gives, 19 times
    out of 20 by default. The mean over splits is 0 by construction and says nothing.

    Parameters
    ----------
    cells
        (cell, d) of one group.
    n_cells
        Cells of the first part, the others make the second; half where None.
    repeats, quantile
        Random splits, and which quantile of their distances is given back.

    Returns
    -------
    float; NaN where a part would have fewer than 2 cells.
    """
    first = len(cells) // 2 if n_cells is None else min(n_cells, len(cells) - 2)
    if first < 2 or len(cells) - first < 2:
        return float("nan")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(cells), generator=generator) for _ in range(repeats)]
    values = _split_energies(cells, [order[:first] for order in orders])
    return float(values.quantile(quantile))


def _split_energies(cells: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """(split,) energy distance between the cells of each part and the other cells.

    The distances within one cloud are measured once: every split is a sum over some of them.
    """
    if len(cells) > 4000:  # the matrix would take more than 128 MB
        every = torch.arange(len(cells))
        others = [every[~torch.isin(every, part)] for part in parts]
        return torch.stack(
            [energy_distance(cells[part], cells[other]) for part, other in zip(parts, others, strict=True)]
        )
    centred = cells.double() - cells.double().mean(
        0
    )  # products then lose nothing that counts, and are faster
    distance = torch.cdist(centred, centred, compute_mode="use_mm_for_euclid_dist").fill_diagonal_(0.0)
    inside = torch.stack([torch.zeros(len(cells)).index_fill(0, part, 1.0) for part in parts]).double()
    n, m = len(parts[0]), len(cells) - len(parts[0])
    to_inside = inside @ distance
    within, from_inside = (to_inside * inside).sum(1), to_inside.sum(1)
    cross, outside = from_inside - within, distance.sum() - 2 * from_inside + within
    return 2 * cross / (n * m) - within / (n * (n - 1)) - outside / (m * (m - 1))


def group_energies(data: Groups, *, repeats: int = 20, seed: int = 0) -> pd.DataFrame:
    """Effect of every group: its energy distance to the controls of its context, beside its noise floor.

    Returns
    -------
    DataFrame
        A row per group: ``context, perturbation, group, cells, energy, floor``; energy distances
        are Euclidean, U-statistic, per group.
    """
    rows = []
    for group in data:
        energy = float(energy_distance(data.control[group.context], group.cells))
        floor = noise_floor(group.cells, repeats=repeats, seed=seed)
        rows.append((group.context, group.perturbation, group.label, len(group), energy, floor))
    return pd.DataFrame(rows, columns=["context", "perturbation", "group", "cells", "energy", "floor"])


@torch.no_grad()
def transport_scores(
    adata,
    operators: OperatorModel,
    *,
    split: str = "test",
    use_rep: str = "X_nbvae",
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    dose_key: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Training controls moved to held-out perturbed cells of the same group, in the latent space.

    The mean shift adds the difference of the group's training means to every control cell: it is told the
    group's own answer, so a contextual operator must do at least as well. The noise floor compares as many
    random training cells of the group as were held out with the group's other training cells.

    Returns
    -------
    DataFrame
        A row per group and method: ``context, perturbation, group, cells, method, energy, floor``;
        the methods are "no change", "mean shift" and "operator", energy distances Euclidean, U-statistic.
    """
    keys = {"use_rep": use_rep, "keys": Keys(None, perturbation_key, context_key, control, dose_key)}
    training = Groups(adata, split="train", **keys)
    held_out = Groups(adata, split=split, control_split="train", **keys)
    known = {group.label: group for group in training}
    rows = []
    for group in held_out:
        source, seen = held_out.control[group.context], known[group.label].cells
        floor = noise_floor(seen, len(group), seed=seed)
        for method, moved in _moved(source, seen, group, operators, control).items():
            energy = float(energy_distance(moved, group.cells))
            rows.append((group.context, group.perturbation, group.label, len(group), method, energy, floor))
    columns = ["context", "perturbation", "group", "cells", "method", "energy", "floor"]
    return Distances(rows, columns=columns)


def _moved(source: Tensor, seen: Tensor, group: Group, operators: OperatorModel, control: str):
    """The control cells (cell, d) as each method leaves them."""
    condition = Condition.parse(group.perturbation, group.context, control=control, dose=group.dose)
    return {
        NO_CHANGE: source,
        MEAN_SHIFT: source + seen.mean(0) - source.mean(0),
        OPERATOR: operators.operator(condition)(source),
    }
