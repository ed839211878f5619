"""The constant term of the operators' loss: distances within perturbed cells, known before training."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..data.groups import Groups, GroupSample

_REFERENCE = 2048  # cells of a group that its cells are compared with: beyond, cost without precision
_ROWS = 1024


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
        found = [_mean_distances(group.cells) for group in groups]
        controls = groups.pool.new_zeros(len(groups.pool) - sum(map(len, found)))
        self.per_cell = torch.cat([controls, *found])  # in the order of the pool
        self.means = torch.stack([part.mean() for part in found])
        self._all = list(range(len(found)))

    def of(self, sample: GroupSample) -> Tensor:
        """(group,) constant term of the sampled groups, in the order of ``sample.which``."""
        drawn, sizes = self.per_cell.index_select(0, sample.perturbed_rows), sample.perturbed_sizes
        if min(sizes) == max(sizes):
            means = drawn.view(len(sizes), -1).mean(1)
        else:
            lengths = _on_device(tuple(sizes), drawn.device)
            means = torch.segment_reduce(drawn, "mean", lengths=lengths, unsafe=True)  # the sizes are our own
        known = self.means if sample.which == self._all else self.means[sample.which]
        return torch.add(-known, means, alpha=2)


@functools.lru_cache(maxsize=64)
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
