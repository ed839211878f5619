"""The operators of a screen: started from the moments of its groups, trained by energy distance per group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from ..data.groups import Groups, GroupSample, evenly
from ..errors import ModelError, check_values, checked
from ..models.energy import grouped_energy_distance, moved_energy_distance, noise_floor, self_distance
from ..models.operators import ConditionEncoder, Design, OperatorModel, shared_effects, spectral_excess
from .callbacks import Callback
from .checkpoint import digest
from .loop import Machine, Trainer

MIN_SHOWN = 8
"""Held-out cells below which a group has no column of its own in the history: its energy is mostly noise."""

GROUPS_AT_ONCE = 256
"""Groups of one step, and groups whose held-out cells are looked at: of more, others in each step, evenly spread ones."""

_REFERENCE = 2048  # cells of a group that its cells are compared with: beyond, cost without precision
_ROWS = 1024


@checked
def new_operators(
    adata,
    *,
    use_rep: str = "X_nbvae",
    form: Callable[..., OperatorModel] = OperatorModel,
    n_axes: int | None = None,
    rank: int | None = None,
    context_rank: int | None = 0,
) -> OperatorModel:
    """An operator family for the conditions among the training cells, started from their moments.

    Parameters
    ----------
    adata
        A screen that was set up and split, with latents in ``obsm[use_rep]`` (:func:`cellop_nb.embed`).
    form
        A subclass of :class:`OperatorModel`, for operators of another form; ``functools.partial`` of one sets
        arguments of its own.
    n_axes, rank, context_rank
        As in :class:`OperatorModel`.

    Returns
    -------
    OperatorModel; untrained, but its shifts already match the group means.

    Raises
    ------
    LabelError
        If the data were not set up.
    DataError
        If the latents are missing or not finite, a context has no controls, or no perturbed group is left.
    """
    data = Groups(adata, use_rep=use_rep, split="train")
    parts = sorted({part for label in data.perturbations for part in data.parts(label)})
    conditions = [group.condition(parts) for group in data.items]
    pairs = sorted({pair for c in conditions for pair in combinations(sorted(c.perturbations), 2)})
    contexts = sorted({str(condition.context) for condition in conditions})
    controls = [data.control[group.context] for group in data.items]
    perturbed = [group.cells for group in data.items]
    n_latent = perturbed[0].shape[1]
    if n_axes is None:
        design = ConditionEncoder(parts, contexts, 1).design(conditions)
        _, n_axes = shared_effects(design, len(parts), controls, perturbed)
    model = form(
        n_latent,
        parts,
        contexts,
        pairs=pairs,
        n_axes=n_axes,
        rank=rank,
        context_rank=context_rank,
    )
    return model.start_from(conditions, controls, perturbed)


class WithinTerm:
    r"""Mean distance within the drawn perturbed cells of each group, without visiting their pairs.

    .. math:: \hat w = \frac{2}{m} \sum_{j} h(y_j) - \bar h, \qquad
        h(y) = \frac{1}{n - 1} \sum_{k:\, y_k \ne y} \|y - y_k\|

    with j over the m drawn cells, k over all n of the group, and the mean of h over all n. It is unbiased, and
    follows the draw to first order: so does the cross term of the energy distance, and the noise of the two
    cancels in their sum as it does with all pairs. No parameter enters it. For a whole group it is exact.

    References
    ----------
    Hoeffding (1948), Annals of Mathematical Statistics 19:293 (the projection of a U-statistic).
    """

    def __init__(self, groups: Groups):
        parts = [_mean_distances(group.cells) for group in groups]
        controls = groups.pool.new_zeros(len(groups.pool) - sum(map(len, parts)))
        self.per_cell = torch.cat([controls, *parts])  # in the order of the pool
        self.means = torch.stack([part.mean() for part in parts])
        self._all = list(range(len(parts)))

    def of(self, sample: GroupSample) -> Tensor:
        """(group,) constant term of the sampled groups, in the order of ``sample.which``."""
        drawn, sizes = self.per_cell.index_select(0, sample.perturbed_rows), sample.perturbed_sizes
        if min(sizes) == max(sizes):
            means = drawn.view(len(sizes), -1).mean(1)
        else:
            lengths = _on_device(tuple(sizes), drawn.device)
            means = torch.segment_reduce(drawn, "mean", lengths=lengths, unsafe=True)  # the sizes are our own
        over_all = self.means if sample.which == self._all else self.means[sample.which]
        return torch.add(-over_all, means, alpha=2)


@lru_cache(maxsize=64)
def _on_device(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Sizes (group,) as a tensor; remembered, since each step asks for the same."""
    return torch.tensor(sizes, device=device)


def _mean_distances(cells: Tensor) -> Tensor:
    """(cell,) mean distance of each cell (cell, d) to the others, or to evenly spread ones where they are many."""
    n = len(cells)
    chosen = torch.arange(n, device=cells.device)
    if n > _REFERENCE:
        chosen = torch.linspace(0, n - 1, _REFERENCE, device=cells.device).round().long()
    others = torch.full((n,), len(chosen), dtype=cells.dtype, device=cells.device)
    others[chosen] -= 1
    centred = cells - cells.mean(0)
    sums = [torch.cdist(part, centred[chosen]).sum(1) for part in centred.split(_ROWS)]
    return torch.cat(sums) / others


@dataclass(frozen=True)
class Penalties:
    """Weights of the penalties that hold operators near the identity and bound their norms.

    Attributes
    ----------
    ridge
        Weight of the departure from the identity, :meth:`OperatorModel.ridge`.
    context_ridge
        Weight of the contexts' own parts, :meth:`OperatorModel.context_ridge`.
    stability_weight, max_norm
        Weight of :func:`spectral_excess` and the norm rho beyond which it acts.
    weight_decay
        Decay of all parameters in the optimiser.

    Raises
    ------
    ModelError
        For a negative or infinite weight.
    """

    ridge: float = 0.1
    context_ridge: float = 1.0
    stability_weight: float = 1.0
    max_norm: float = 3.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_values(vars(self))


class OperatorTrainer(Trainer):
    """Fits an :class:`OperatorModel` so that moved control cells match the perturbed cells of every group.

    The latents are read once from ``obsm``: the VAE and the genes take no part in training. The loss is the
    mean over (context, perturbation) groups of the energy distance (Euclidean, U-statistic), plus ridge and
    stability penalties on the operators. A step takes all groups, of more than 256 so many, each as often as any other;
    validation looks at 256, evenly spread.

    Parameters
    ----------
    adata
        A screen that was set up and split, with ``obsm[use_rep]``; test cells are never read.
    model
        The operators; see :func:`new_operators`.
    cells_per_group
        Cells drawn per side and group in each step.
    steps_per_epoch
        Steps between two lines of the history.
    penalties
        What holds the operators near the identity and their norms bounded.
    max_epochs, lr
        Lines of the history, and the base learning rate of Adam.
    clip_norm, callbacks, folder, on_nonfinite, progress, seed, machine
        As in :class:`~cellop_nb.training.loop.Trainer`.

    Raises
    ------
    LabelError
        If the data were not set up, a condition of the training cells is unknown to the model, or a setting is not
        known.
    DataError
        If the latents are missing or not finite, or a context has no controls.
    """

    unit = "operators"
    recordable = True
    model: OperatorModel
    compilable = ("affine",)

    @checked
    def __init__(
        self,
        adata,
        model: OperatorModel,
        *,
        use_rep: str = "X_nbvae",
        cells_per_group: int = 128,
        steps_per_epoch: int = 20,
        penalties: Penalties = Penalties(),  # noqa: B008 (frozen)
        max_epochs: int = 30,
        lr: float = 1e-2,
        clip_norm: float = 10.0,
        callbacks: Sequence[Callback] = (),
        folder: str | Path | None = None,
        on_nonfinite: str = "stop",
        progress: bool = True,
        seed: int = 0,
        machine: Machine = Machine(),  # noqa: B008 (frozen)
    ):
        super().__init__(
            model, max_epochs=max_epochs, lr=lr, weight_decay=penalties.weight_decay, clip_norm=clip_norm,
            callbacks=callbacks, folder=folder, on_nonfinite=on_nonfinite, progress=progress, seed=seed,
            machine=machine,
        )  # fmt: skip
        device = self.fabric.device
        self.groups = Groups(adata, use_rep=use_rep, split="train").to(device)
        if len(self.groups) < self.processes.size:
            problem = f"{len(self.groups)} groups for {self.processes.size} processes"
            raise ModelError("a condition for every process", problem, "start fewer processes")
        self.held_out = Groups(adata, use_rep=use_rep, split="val", control_split="train").to(device)
        self.weights = {
            "ridge": penalties.ridge,
            "context_ridge": penalties.context_ridge,
            "stability_weight": penalties.stability_weight,
        }
        self.cells_per_group, self.max_norm = cells_per_group, penalties.max_norm
        self._steps = steps_per_epoch
        self.parameters |= {
            "cells_per_group": int(cells_per_group), "steps_per_epoch": int(steps_per_epoch),
            "max_norm": float(self.max_norm), **self.weights,
        }  # fmt: skip
        self.made_from |= {
            "cells_per_group": int(cells_per_group),
            "split": {"train": _rows_of(self.groups), "val": _rows_of(self.held_out)},
            "latents": digest(self.groups.pool),
        }
        names = model.conditions.perturbations
        self.conditions = [group.condition(names) for group in self.groups.items]
        self.design = model.conditions.design(self.conditions)
        self.within = WithinTerm(self.groups)
        self.module.mark_forward_method("affine")
        self._prepare_validation(names)

    @cached_property
    def floors(self) -> dict[str, float]:
        """:func:`noise_floor` of each group's training cells, where there are 4 or more."""
        return {
            group.label: noise_floor(group.cells, seed=self.seed) for group in self.groups if len(group) >= 4
        }

    def _prepare_validation(self, names: Sequence[str]) -> None:
        """Cut the held-out groups to at most 256 cells a side, and cache what does not change."""
        items = [self.held_out[int(k)] for k in evenly(len(self.held_out), GROUPS_AT_ONCE)]
        self.val_labels = [group.label for group in items]
        self.val_design = self.model.conditions.design([group.condition(names) for group in items])
        controls = [_some(self.held_out.control[group.context]) for group in items]
        perturbed = [_some(group.cells) for group in items]
        kind = self.model.axis_shift.dtype  # that of the chosen precision
        self.val_control, self.val_sizes = torch.cat(controls).to(kind), [len(cells) for cells in controls]
        self.val_perturbed, self.val_counts = (
            torch.cat(perturbed).to(kind),
            [len(cells) for cells in perturbed],
        )
        self.val_self = self_distance(self.val_perturbed, self.val_counts)

    def batches(self) -> Iterator:
        share = self.processes.share(self._at_once)
        for which in self._groups_of_steps():
            # Drawn for all groups of the step, so that the draw of one does not depend on who has the others.
            sample = self.groups.sample(self.cells_per_group, self.cpu_generator, which)
            yield sample if self.processes.size == 1 else sample.part(share)

    def _groups_of_steps(self) -> Iterator[list[int] | None]:
        """Positions of the groups of each step of an epoch, the next of a random order; None for all."""
        order: list[int] = []
        for _ in range(self._steps):
            if len(self.groups) == self._at_once:
                yield None
                continue
            if len(order) < self._at_once:
                order += torch.randperm(len(self.groups), generator=self.cpu_generator).tolist()
            yield sorted(order[: self._at_once])
            order = order[self._at_once :]

    @property
    def _at_once(self) -> int:
        return min(len(self.groups), GROUPS_AT_ONCE)

    def steps_per_epoch(self) -> int:
        return self._steps

    def batch_size_of(self, batch) -> int:
        return len(batch.control) + len(batch.perturbed)

    def loss_terms(self, batch) -> dict[str, Tensor]:
        matrices, shifts = self.module.affine(self._design_of(batch))
        clouds = batch.control, batch.perturbed, batch.control_sizes, batch.perturbed_sizes
        within = self.within.of(batch)
        # NaN must reach the loss: the guard says where it came from, and may roll back.
        energy = moved_energy_distance(*clouds, matrices, shifts, y_self=within)
        terms = {"energy": energy.mean()} | self._penalties(matrices)
        terms = self.processes.weighted(terms, len(energy), self._at_once)
        if self.model.context_shift.requires_grad:
            terms["ridge"] = terms["ridge"] + self.in_force["context_ridge"] * self.model.context_ridge()
        return terms

    def _design_of(self, batch: GroupSample) -> Design:
        if len(batch.which) == len(self.groups):
            return self.design
        return self.design.of(torch.tensor(batch.which, device=self.design.strength.device))

    def _penalties(self, matrices: Tensor) -> dict[str, Tensor]:
        weights = self.in_force
        return {
            "ridge": weights["ridge"] * self.model.ridge(matrices),
            "stability": weights["stability_weight"] * spectral_excess(matrices, self.max_norm),
        }

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Energy distance of each group's held-out cells to the moved controls of its context, and their mean
        weighted by held-out cells."""
        matrices, shifts = self.model.affine(self.val_design)
        moved = self.model(self.val_control, self.val_sizes, matrices, shifts)
        energy = grouped_energy_distance(
            moved, self.val_perturbed, self.val_sizes, self.val_counts, y_self=self.val_self
        )
        named = zip(self.val_labels, energy.tolist(), self.val_counts, strict=True)
        least = min(MIN_SHOWN, max(self.val_counts))
        per_group = {f"val_energy[{label}]": value for label, value, cells in named if cells >= least}
        # A group of three held-out cells is mostly noise: it must not decide which epoch is best.
        weight = torch.tensor(self.val_counts, dtype=energy.dtype, device=energy.device)
        mean = float((weight * energy).sum() / weight.sum())
        norm = float(torch.linalg.matrix_norm(matrices, 2).max())
        return {"val_loss": mean, "val_energy": mean, "operator_norm": norm, **per_group}

    def shape_of(self, batch: GroupSample) -> Hashable | None:
        if len(self.groups) > self._at_once:
            return None
        return tuple(batch.which), tuple(batch.control_sizes), tuple(batch.perturbed_sizes)

    def inputs_of(self, batch: GroupSample) -> dict[str, Tensor]:
        return {"control_rows": batch.control_rows, "perturbed_rows": batch.perturbed_rows}

    def with_inputs(self, batch: GroupSample, inputs: dict[str, Tensor]) -> GroupSample:
        pool = self.groups.pool
        rows, changed = inputs["control_rows"], inputs["perturbed_rows"]
        control, perturbed = pool.index_select(0, rows), pool.index_select(0, changed)
        return replace(batch, control=control, perturbed=perturbed, control_rows=rows, perturbed_rows=changed)

    def describe_batch(self, batch) -> dict[str, list[str]]:
        return {"groups": [self.groups[k].label for k in batch.which]}


def _rows_of(data: Groups) -> Tensor:
    """Rows of the AnnData object that the groups and their controls hold, in their order."""
    parts = [*data.control_rows.values(), *(group.rows for group in data.items)]
    return torch.cat([torch.as_tensor(part, dtype=torch.int64) for part in parts])


def _some(cells: Tensor) -> Tensor:
    """At most 256 of the cells."""
    return cells[evenly(len(cells), 256).to(cells.device)]
