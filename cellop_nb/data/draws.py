"""Random cells of many sets at once, without replacement, at a cost independent of the sets' sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


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
        control, perturbed = (
            [*accumulate(sizes, initial=0)] for sizes in (self.control_sizes, self.perturbed_sizes)
        )

        def cut(cells: Tensor, starts: list[int]) -> Tensor:
            return torch.cat([cells[starts[k] : starts[k + 1]] for k in chosen])

        return GroupSample(
            control=cut(self.control, control),
            perturbed=cut(self.perturbed, perturbed),
            control_sizes=[self.control_sizes[k] for k in chosen],
            perturbed_sizes=[self.perturbed_sizes[k] for k in chosen],
            which=[self.which[k] for k in chosen],
            control_rows=cut(self.control_rows, control),
            perturbed_rows=cut(self.perturbed_rows, perturbed),
        )


class Draws:
    """Sets of consecutive rows, from which cells are drawn.

    Parameters
    ----------
    sizes
        Rows of each set.
    starts
        First row of each set; sets may overlap.
    """

    def __init__(self, sizes: Sequence[int], starts: Sequence[int]) -> None:
        self.sizes, self.starts = torch.tensor(sizes), torch.tensor(starts)
        self.primes = torch.tensor([prime_from(size) for size in sizes])
        self._plans: dict[tuple, _Plan] = {}

    def draw(
        self, which: Sequence[int], n_cells: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, list[int]]:
        """Rows of `n_cells` cells of each named set: all where it has fewer, or for None.

        Returns
        -------
        rows : Tensor
            (sum of sizes,) int64, one set after the other.
        sizes : list of int
            Cells drawn from each set.
        """
        key = (n_cells, tuple(which))
        if key not in self._plans:
            if len(self._plans) > 64:  # callers that draw ever new subsets must not grow the cache
                self._plans.clear()
            self._plans[key] = self._plan(list(which), n_cells)
        plan = self._plans[key]
        place = plan.position if n_cells is None else _scatter(plan, generator)
        return place + plan.start, plan.sizes

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
    place = (slope * plan.position + shift) % plan.modulus
    outside = (place >= plan.available).nonzero().view(-1)
    while len(outside):
        again = (slope[outside] * place[outside] + shift[outside]) % plan.modulus[outside]
        place[outside] = again
        outside = outside[again >= plan.available[outside]]
    return place


def prime_from(number: int) -> int:
    """The smallest prime that is not below `number` (and at least 2)."""
    candidate = max(number, 2)
    while any(candidate % divisor == 0 for divisor in range(2, int(candidate**0.5) + 1)):
        candidate += 1
    return candidate
