"""The index of a screen: which cells form each (context, perturbation[, dose]) group, and which are its controls."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from ..errors import DataError, LabelError, checked, counted, did_you_mean
from ..models.operators import Condition, perturbation_parts
from .contract import Keys, context_labels, keys_of, label_table, require_control
from .counts import sent
from .splits import rows_of

logger = logging.getLogger("cellop_nb")


@dataclass(frozen=True)
class Group:
    """The perturbed cells of one (context, perturbation, dose).

    Attributes
    ----------
    rows : ndarray
        Rows of the cells in the AnnData object, (cell,) ascending.
    label : str
        "context, perturbation", with the dose where several were measured.
    cells : Tensor
        Their latents, (cell, d) float32; empty (cell, 0) where the index was made without a representation.
    """

    context: str
    perturbation: str
    dose: float
    rows: np.ndarray = field(repr=False)
    label: str
    cells: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def condition(self, perturbations: Sequence[str]) -> Condition:
        """What was done to these cells; a combination where its parts are among the names of `perturbations`."""
        return Condition.parse(self.perturbation, self.context, dose=self.dose, perturbations=perturbations)


class Groups(Sequence[Group]):
    """Cells by (context, perturbation[, dose]), each group with the controls of its context.

    Made once in time linear in cells and groups; it walks groups, draws samples, and slices latents or any other table
    of cells. The keys are those that :func:`cellop_nb.setup` kept in the data.

    Parameters
    ----------
    adata
        A screen that was set up.
    use_rep
        Key of `obsm` with latents (cell, d), or an array; None for an index of rows alone.
    split
        Use only the perturbed cells of this split (or these); None for all.
    control_split
        Where the controls come from; by default the same split. A test group whose context has too few
        controls there (they were not held out with it) starts from all controls of its context.
    min_cells
        Smaller groups are left out and listed in `dropped`; 0 allows an index of controls alone.

    Attributes
    ----------
    keys : Keys
        Which columns and labels mean what.
    items : list of Group
        The perturbed groups, by context, perturbation and dose.
    control_rows : dict
        Rows of each context's controls, (cell,) ascending; contexts that have controls alone are among them.
    control : dict
        Their latents, (cell, d).
    pool : Tensor
        All control and perturbed latents, (cell, d). Those of `control` and `items` are views of it: there is one copy.
    dropped : DataFrame
        Groups (context, perturbation, cells) that were left out because they have too few cells.

    Raises
    ------
    LabelError
        If the data were not set up, or a column or the control label is missing.
    DataError
        If the representation is missing or not finite, a context has no controls, or no group is left.
    """

    @checked
    def __init__(
        self,
        adata: AnnData,
        *,
        use_rep: str | np.ndarray | None = None,
        split: str | Sequence[str] | None = None,
        control_split: str | Sequence[str] | None = None,
        min_cells: int = 2,
    ) -> None:
        self.keys: Keys = keys_of(adata)
        labels = label_table(adata, self.keys).assign(row=np.arange(adata.n_obs))
        inside = _inside(adata, split)
        usable = inside if control_split is None else _inside(adata, control_split)
        fallback = np.ones(adata.n_obs, dtype=bool) if split == "test" and control_split is None else usable
        is_control = require_control(labels["perturbation"], self.keys.control, self.keys.perturbation_key)
        members = _rows_by(labels[inside & ~is_control], ["context", "perturbation", "dose"])
        kept = {key: rows for key, rows in members.items() if len(rows) >= min_cells}
        self.dropped = self._dropped(members, kept, min_cells)
        controls = _rows_by(labels[is_control], "context")
        self.control_rows = _controls(controls, usable, fallback, {key[0] for key in kept}, min_cells)
        z = representation(adata, use_rep)
        self.pool = z[np.concatenate([*self.control_rows.values(), *kept.values()])]
        n_doses = Counter(key[:2] for key in kept)
        self.items = [
            Group(
                context, p, dose, rows, _label(context, p, dose if n_doses[context, p] > 1 else None), z[:0]
            )
            for (context, p, dose), rows in kept.items()
        ]
        self._share_pool()

    @staticmethod
    def _dropped(members: dict, kept: dict, min_cells: int) -> pd.DataFrame:
        small = [(*key[:2], len(rows)) for key, rows in members.items() if key not in kept]
        if small:
            logger.warning(
                "left out, as they have fewer than %d cells: %s, such as %s",
                min_cells,
                counted(len(small), "group"),
                small[:5],
            )
        if not kept and min_cells:
            problem = f"{counted(len(members), 'group')}, none with {min_cells} cells"
            fix = "check the split and the control label, or lower min_cells"
            raise DataError("at least one perturbed group", problem, fix)
        return pd.DataFrame(small, columns=["context", "perturbation", "cells"])

    def _share_pool(self) -> None:
        """Let the latents of controls and groups be views of the pool, and lay out the sets to draw from."""
        sizes = [*map(len, self.control_rows.values()), *map(len, self.items)]
        cells = self.pool.split(sizes)
        n_contexts = len(self.control_rows)
        self.control = dict(zip(self.control_rows, cells, strict=False))
        self.items = [replace(g, cells=z) for g, z in zip(self.items, cells[n_contexts:], strict=True)]
        starts = [0, *accumulate(sizes)]
        position = {context: k for k, context in enumerate(self.control_rows)}
        # The controls of every group first, then its perturbed cells.
        sets = [*(position[group.context] for group in self.items), *range(n_contexts, len(sizes))]
        self._draws = Draws([sizes[k] for k in sets], [starts[k] for k in sets])
        self._by_name: dict[tuple[str, str], list[Group]] = {}
        self._contexts: dict[str, list[str]] = {}
        for group in self.items:
            self._by_name.setdefault((group.context, group.perturbation), []).append(group)
        for context, perturbation in self._by_name:
            self._contexts.setdefault(perturbation, []).append(context)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position):
        return self.items[position]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.items)

    def __repr__(self) -> str:
        cells = sum(map(len, self.items))
        size = f"{counted(len(self), 'group')}, {counted(cells, 'cell')}, {counted(len(self.control), 'context')}"
        return f"Groups({size}, d={self.dim})"

    def _repr_html_(self) -> str:
        return self.table().to_html(index=False, max_rows=40)

    @staticmethod
    def context_of_cells(adata: AnnData) -> pd.Series:
        """Context of each cell, (cell,) strings, indexed by cell; labels of several columns are joined with " | "."""
        return context_labels(adata, keys_of(adata))

    @property
    def dim(self) -> int:
        """Dimension d of the latents; 0 without a representation."""
        return self.pool.shape[1]

    @property
    def labels(self) -> list[str]:
        """Label of each group, "context, perturbation"."""
        return [group.label for group in self.items]

    @property
    def contexts(self) -> list[str]:
        """The contexts that have controls."""
        return list(self.control_rows)

    @property
    def perturbations(self) -> list[str]:
        """The perturbations, in order of first appearance."""
        return list(self._contexts)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The measured (context, perturbation), in order of first appearance."""
        return list(self._by_name)

    def strongest(self, context: str, perturbation: str) -> Group:
        """The measured group of this name of its largest dose."""
        return max(self._by_name[context, perturbation], key=lambda group: group.dose)

    def rows(self, context: str, perturbation: str) -> np.ndarray:
        """Rows of a group's cells over all doses, or of a context's controls, (cell,); none where not measured."""
        if perturbation == self.keys.control:
            return self.control_rows.get(context, np.zeros(0, dtype=int))
        parts = [group.rows for group in self._by_name.get((context, perturbation), ())]
        return np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype=int)

    def controls(self, context: str) -> np.ndarray:
        """Rows of a context's control cells, (cell,).

        Raises
        ------
        LabelError
            For a context that has none.
        """
        if context not in self.control_rows:
            fix = did_you_mean(context, self.control_rows)
            raise LabelError("a context with control cells", repr(context), fix)
        return self.control_rows[context]

    def contexts_of(self, perturbation: str) -> list[str]:
        """The contexts in which a perturbation was measured."""
        return list(self._contexts.get(perturbation, ()))

    def parts(self, label: str) -> tuple[str, ...]:
        """The measured perturbations that a label combines: "A+B" gives ("A", "B"), any other label itself."""
        return perturbation_parts(label, self._contexts, self.keys.singles)

    def table(self) -> pd.DataFrame:
        """One row per group: context, perturbation, dose, perturbed cells and control cells."""
        columns = ["context", "perturbation", "dose", "cells", "controls"]
        rows = [
            (g.context, g.perturbation, g.dose, len(g), len(self.control_rows[g.context])) for g in self.items
        ]
        return pd.DataFrame(rows, columns=columns)

    def means(self, cells) -> tuple[np.ndarray, np.ndarray]:
        """Mean rows of any table of cells, in one pass.

        Parameters
        ----------
        cells
            (cell, feature) for all cells of the AnnData object: sparse or dense counts, latents, log1p-CP10k.

        Returns
        -------
        groups, controls
            (group, feature) in the order of `items`, (context, feature) in the order of `contexts`; float64.
        """
        sets = [g.rows for g in self.items] + list(self.control_rows.values())
        sizes = np.array([len(rows) for rows in sets])
        weights = np.repeat(1.0 / sizes, sizes)
        start = np.concatenate([[0], np.cumsum(sizes)])
        picker = sparse.csr_matrix((weights, np.concatenate(sets), start), (len(sets), cells.shape[0]))
        product = picker @ cells
        means = product.toarray() if sparse.issparse(product) else np.asarray(product)
        return means[: len(self.items)], means[len(self.items) :]

    def to(self, device: torch.device | str) -> Groups:
        """The same groups with their latents on another device; these where they are there already."""
        pool = self.pool.to(device)
        if pool is self.pool:
            return self
        moved = copy.copy(self)
        moved.pool = pool
        moved._share_pool()
        return moved

    def sample(
        self,
        n_cells: int | None = None,
        generator: torch.Generator | None = None,
        which: Sequence[int] | None = None,
    ) -> GroupSample:
        """Draw cells of both sides of several groups, without replacement inside a draw.

        Parameters
        ----------
        n_cells
            Cells per side and group, all where a side has fewer; None takes all cells in their order.
        generator
            Source of the draw; equal states give equal cells.
        which
            Positions of the groups; None for all.

        Returns
        -------
        GroupSample
        """
        chosen = [int(k) for k in (range(len(self)) if which is None else which)]
        rows, sizes = self._draws.draw([*chosen, *(k + len(self) for k in chosen)], n_cells, generator)
        rows, n_groups = sent(rows, self.pool.device), len(chosen)
        control_rows, perturbed_rows = rows.tensor_split([sum(sizes[:n_groups])])
        return GroupSample(
            control=self.pool.index_select(0, control_rows),
            perturbed=self.pool.index_select(0, perturbed_rows),
            control_sizes=sizes[:n_groups],
            perturbed_sizes=sizes[n_groups:],
            which=chosen,
            control_rows=control_rows,
            perturbed_rows=perturbed_rows,
        )


def controls_by_context(adata: AnnData, keys: Keys) -> dict[str, np.ndarray]:
    """Rows of each context's control cells, (cell,) by the cells' names; of data that may hold controls alone."""
    labels = label_table(adata, replace(keys, dose_key=None)).assign(row=np.arange(adata.n_obs))
    controls = labels[labels["perturbation"] == keys.control]
    names = adata.obs_names.to_numpy()
    rows = _rows_by(controls, "context")
    return {context: part[np.argsort(names[part], kind="stable")] for context, part in rows.items()}


def _rows_by(labels: pd.DataFrame, columns: str | list[str]) -> dict:
    """Rows (cell,) of each label; copies, since pandas 3 lends its own, read-only."""
    return {key: rows.to_numpy(copy=True) for key, rows in labels.groupby(columns).row}


def _inside(adata: AnnData, split: str | Sequence[str] | None) -> np.ndarray:
    """Mask of the cells in the split, (cell,)."""
    if split is None:
        return np.ones(adata.n_obs, dtype=bool)
    mask = np.zeros(adata.n_obs, dtype=bool)
    mask[rows_of(adata, split)] = True
    return mask


def _controls(
    by_context: dict[str, np.ndarray],
    preferred: np.ndarray,
    fallback: np.ndarray,
    needed: set[str],
    min_cells: int,
) -> dict[str, np.ndarray]:
    """Rows of every context's controls, from the fallback where too few are preferred; refused where a context that
    has perturbed cells has too few."""
    controls = {}
    for context in sorted(needed | set(by_context)):
        rows = by_context.get(context, np.zeros(0, dtype=int))
        chosen = rows[preferred[rows]]
        chosen = chosen if len(chosen) >= min_cells else rows[fallback[rows]]
        if len(chosen) >= min_cells:
            controls[context] = chosen
        elif context in needed:
            problem = f"{len(chosen)} in context {context!r}"
            fix = "leave this context out, merge it with another, or measure its controls"
            raise DataError(f"at least {min_cells} control cells in every context", problem, fix)
    return controls


def representation(adata: AnnData, use_rep: str | np.ndarray | None) -> Tensor:
    """(cell, d) float32 latents of a key of `obsm`, or these; d is 0 for None. Refuses what is missing or not finite."""
    if use_rep is None:
        return torch.empty(adata.n_obs, 0)
    if isinstance(use_rep, str):
        if use_rep not in adata.obsm:
            fix = f"embed the cells first, or name another key ({did_you_mean(use_rep, adata.obsm)})"
            raise DataError(f"obsm[{use_rep!r}]", "no such key", fix)
        use_rep = adata.obsm[use_rep]
    z = np.asarray(use_rep, dtype=np.float32)
    if z.ndim != 2 or len(z) != adata.n_obs:
        fix = "pass one row per cell"
        raise DataError(f"a representation of shape ({adata.n_obs}, d)", f"shape {z.shape}", fix)
    broken = ~np.isfinite(z).all(axis=1)
    if broken.any():
        problem = (
            f"{counted(broken.sum(), 'cell')} with NaN or infinity, such as {adata.obs_names[broken][0]!r}"
        )
        raise DataError("finite latents", problem, "embed the cells again with a model that is finite")
    return torch.from_numpy(z)


def evenly(n_cells: int, most: int) -> Tensor:
    """Positions of at most `most` of n cells, evenly over their order, which may be by donor or batch."""
    return torch.arange(n_cells) if n_cells <= most else torch.linspace(0, n_cells - 1, most).round().long()


def _label(context: str, perturbation: str, dose: float | None) -> str:
    return f"{context}, {perturbation}" + ("" if dose is None else f" @ {dose:g}")


# -- random cells of many sets at once, at a cost independent of the sets' sizes ------------------------------------


@dataclass(frozen=True)
class _Plan:
    """A draw's fixed part: `prime` per set, the rest per drawn cell."""

    sizes: list[int]
    prime: Tensor
    owner: Tensor
    position: Tensor
    start: Tensor
    modulus: Tensor
    available: Tensor


@dataclass(frozen=True)
class GroupSample:
    """Cells of several groups, one group after the other.

    Attributes
    ----------
    control, perturbed : Tensor
        Latents, (sum of sizes, d).
    control_sizes, perturbed_sizes : list of int
        Cells per group, in the order of `which`.
    which : list of int
        Positions of the groups.
    control_rows, perturbed_rows : Tensor
        Rows of the cells in `Groups.pool`, so that values cached per cell can be looked up.
    """

    control: Tensor
    perturbed: Tensor
    control_sizes: list[int]
    perturbed_sizes: list[int]
    which: list[int]
    control_rows: Tensor
    perturbed_rows: Tensor

    def part(self, chosen: Sequence[int]) -> GroupSample:
        """Some of the groups, by their positions in `which`."""

        def cut(cells: Tensor, sizes: list[int]) -> Tensor:
            parts = cells.split(sizes)
            return torch.cat([parts[k] for k in chosen])

        controls, perturbed = self.control_sizes, self.perturbed_sizes
        return GroupSample(
            control=cut(self.control, controls),
            perturbed=cut(self.perturbed, perturbed),
            control_sizes=[controls[k] for k in chosen],
            perturbed_sizes=[perturbed[k] for k in chosen],
            which=[self.which[k] for k in chosen],
            control_rows=cut(self.control_rows, controls),
            perturbed_rows=cut(self.perturbed_rows, perturbed),
        )


class Draws:
    """Sets of `sizes` consecutive rows, from which cells are drawn; sets that begin at `starts` may overlap."""

    def __init__(self, sizes: Sequence[int], starts: Sequence[int]) -> None:
        self.sizes, self.starts = torch.tensor(sizes), torch.tensor(starts)
        self.primes = torch.tensor([prime_from(size) for size in sizes])
        self._plans: dict[tuple, _Plan] = {}

    def draw(
        self, which: Sequence[int], n_cells: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, list[int]]:
        """Rows of `n_cells` cells of each named set, one set after the other, and how many each gave.

        All where a set has fewer, or for None.
        """
        key = (n_cells, tuple(which))
        if key not in self._plans:
            if len(self._plans) > 8:  # callers that draw ever new subsets must not grow the cache
                self._plans.clear()
            self._plans[key] = self._plan(list(which), n_cells)
        plan = self._plans[key]
        at = plan.position if n_cells is None else _scatter(plan, generator)
        return at + plan.start, plan.sizes

    def _plan(self, which: list[int], n_cells: int | None) -> _Plan:
        available, prime = self.sizes[which], self.primes[which]
        sizes = available if n_cells is None else available.clamp(max=int(n_cells))
        owner = torch.arange(len(which)).repeat_interleave(sizes)
        return _Plan(
            sizes=sizes.tolist(),
            prime=prime,
            owner=owner,
            position=torch.arange(len(owner)) - (sizes.cumsum(0) - sizes)[owner],
            start=self.starts[which][owner],
            modulus=prime[owner],
            available=available[owner],
        )


def _scatter(plan: _Plan, generator: torch.Generator | None) -> Tensor:
    r"""Map positions 0..m-1 of each set to distinct random places in it, (cell,) int64.

    .. math:: f(i) = (a i + c) \bmod p, \qquad a \in 1..p-1,\; c \in 0..p-1

    with p the smallest prime that is not below the set's size. Drawn over all (a, c) the map is pairwise
    independent, which is what a distance between pairs of cells needs; places beyond the set (few, as p is
    close to its size) are mapped again until they fall inside: cycle walking keeps the map one to one.

    References
    ----------
    Carter & Wegman, J. Comput. Syst. Sci. 18:143 (1979); Black & Rogaway, CT-RSA (2002).
    """
    device = "cpu" if generator is None else generator.device
    u = torch.rand(2, len(plan.prime), generator=generator, device=device, dtype=torch.float64).cpu()
    slope = (1 + (u[0] * (plan.prime - 1)).long()).index_select(0, plan.owner)
    shift = (u[1] * plan.prime).long().index_select(0, plan.owner)
    at = (slope * plan.position + shift) % plan.modulus
    outside = (at >= plan.available).nonzero().view(-1)
    while len(outside):
        again = (slope[outside] * at[outside] + shift[outside]) % plan.modulus[outside]
        at[outside] = again
        outside = outside[again >= plan.available[outside]]
    return at


def prime_from(number: int) -> int:
    """The smallest prime that is not below `number` (and at least 2)."""
    candidate = max(number, 2)
    while any(candidate % divisor == 0 for divisor in range(2, int(candidate**0.5) + 1)):
        candidate += 1
    return candidate
