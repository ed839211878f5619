r"""Negative-binomial likelihood of softmax proportions with its gradient, some cells at a time.

At a zero count only :math:`-r \log(1 + \mu/r)` is left of log p. A count x > 0 adds

.. math::
    x \left(\log\mu - \log(1 + \mu/r)\right) + \sum_{k<x} \log(1 + k/r) - \log x!

whose sum depends on gene and count alone: for counts up to :data:`TABLE` it is read from a table that all cells
share. Larger counts, where these terms would cancel, take the deviance form of :mod:`.likelihood`. Cells are
visited in turns, so that the arrays of a turn stay in the cache and its extra memory is small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import host
from .counts import SparseCounts
from .stirling import stirling

TABLE = 16
"""Largest count that is looked up."""

MIN_MEAN = 1e-20
"""Lower bound of the mean: a softmax that underflows to 0 is taken as this."""

MIN_INVERSE_DISPERSION = 1e-12
"""Lower bound of r; below it the variance of any count would exceed 1e12 times its mean squared."""

_TURN = 1 << 19  # entries of each of a turn's arrays


@dataclass(frozen=True)
class RowsGradient:
    """What the gradient of each cell's log-likelihood needs.

    Attributes
    ----------
    by_library
        (cell,) derivative by the library size.
    by_logits
        (cell, gene) derivative by the logits.
    minus_by_r
        (cell, gene) minus the derivative by r, as far as it is not in the table.
    place, slope
        (nonzero,) place of each non-zero in the table, and the table's derivative by r, (count, gene); None where
        nothing is looked up.
    """

    by_library: Tensor
    by_logits: Tensor
    minus_by_r: Tensor
    place: Tensor | None
    slope: Tensor | None

    def by_r(self, upstream: Tensor, rows: Tensor) -> Tensor:
        """(gene,) derivative by r of the sum of upstream (cell,) times value; `rows` (nonzero,) are the cells."""
        if self.slope is None:
            return -(upstream @ self.minus_by_r)
        weight = torch.zeros_like(self.slope)
        weight.view(-1).index_add_(0, self.place, upstream.index_select(0, rows))
        return (weight * self.slope).sum(0).sub_(upstream @ self.minus_by_r)


def softmax_nb(
    logits: Tensor, counts: SparseCounts, library: Tensor, r: Tensor
) -> tuple[Tensor, RowsGradient]:
    """Log-likelihood (cell,) of `counts` (cell, gene) under NB(library * softmax(logits), r), and its gradient.

    `logits` becomes its own gradient. r (gene,) lies within its bounds; all arrays share one floating dtype.
    """
    # Where looks are free: counts sorted into small and large ones, and cells visited in turns.
    (cells, genes), table = counts.shape, host.looks_are_free(logits.device)
    terms, slope = _tables(r) if table else (r, None)
    place, near = _places(counts) if table else (None, None)
    step = max(1, _TURN // genes) if table else cells
    gradient = RowsGradient(torch.empty_like(library), logits, torch.empty_like(logits), place, slope)
    known, value = (terms.view(-1), r, r.reciprocal(), r.new_full((), -1.0)), torch.empty_like(library)
    ends = counts.indptr[[*range(0, cells, step), cells]].tolist() if table else [0, len(counts.values)]
    for turn, start in enumerate(range(0, cells, step)):
        rows, nonzeros = slice(start, min(start + step, cells)), slice(ends[turn], ends[turn + 1])
        value[rows] = _turn(gradient, counts, library[rows], known, rows, nonzeros, near)
    return value.sub_(counts.constant), gradient


def _tables(r: Tensor) -> tuple[Tensor, Tensor]:
    r"""Per count up to :data:`TABLE` and gene: :math:`\sum_{k<x} \log(1 + k/r) - x \log x + x`, and the
    derivative of log Gamma(x + r) / Gamma(r)."""
    x = torch.arange(TABLE + 1, dtype=r.dtype, device=r.device).unsqueeze(1)
    zero = torch.zeros_like(r).unsqueeze(0)
    terms = torch.cat([zero, (x[:-1] / r).log1p_().cumsum(0)]).sub_(torch.xlogy(x, x)).add_(x)
    return terms, torch.cat([zero, (x[:-1] + r).reciprocal_().cumsum(0)])


def _places(counts: SparseCounts) -> tuple[Tensor, Tensor]:
    """(nonzero,) places in the tables, and which non-zeros have one; the others point to a zero."""
    whole = counts.values.long()
    near = (whole == counts.values) & (whole <= TABLE)
    return torch.add(counts.columns, whole, alpha=counts.shape[1]).mul_(near), near


def _turn(found: RowsGradient, counts, library, known, rows: slice, nonzeros: slice, near) -> Tensor:
    """Log-likelihood of the cells `rows`, with their `nonzeros`; their part of the gradient is written."""
    terms, r, inverse, _ = known
    slope, log_ratio = found.by_logits[rows], found.minus_by_r[rows]
    mu = torch.softmax(slope, -1).mul_(library.unsqueeze(1))
    torch.mul(mu, inverse, out=log_ratio)
    torch.div(mu, torch.sub(known[3], log_ratio, out=slope), out=slope)  # d log p / d log mu at x = 0
    log_ratio.log1p_()
    # index_select and scatter_ here, not brackets: the same numbers, two to four times faster on a CPU.
    at, columns = counts.flat[nonzeros] - rows.start * counts.shape[1], counts.columns[nonzeros]
    x, mu_at = counts.values[nonzeros], mu.view(-1).index_select(0, at).clamp_min_(MIN_MEAN)
    if near is None or found.place is None:
        value = torch.empty_like(x)
        far = slice(None)
    else:
        value = mu_at.log().sub_(log_ratio.view(-1).index_select(0, at)).mul_(x)
        value += terms.index_select(0, found.place[nonzeros])
        ratio = mu_at * inverse.index_select(0, columns)
        slope.view(-1).scatter_add_(0, at, x / ratio.add_(1))
        far = (~near[nonzeros]).nonzero().view(-1)
    late = None
    if near is None or len(far):
        late = _deviance(x[far], mu_at[far], r.index_select(0, columns[far]))
        value[far] = late[0]
        slope.view(-1).scatter_(0, at[far], late[1])
        log_ratio.view(-1).scatter_(0, at[far], 0)
    offsets = counts.indptr[rows.start : rows.stop + 1] - nonzeros.start
    sums = torch.segment_reduce(value, "sum", offsets=offsets, unsafe=True)  # the offsets are our own
    value = sums - torch.mv(log_ratio, r)
    if late is not None:
        log_ratio.view(-1).scatter_(0, at[far], late[2])
    total = slope.sum(1).div_(library)
    found.by_library[rows] = total
    log_ratio.addcmul_(slope, inverse)
    slope.addcmul_(mu, total.unsqueeze(1), value=-1)
    return value


def _deviance(x: Tensor, mu: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per non-zero: log p without count constants, d log p / d log mu, and the rest of minus the slope in r."""
    value, t, log_t = at_nonzeros(x, mu, r)
    reached, start = stirling(x + r), stirling(r)
    return value + reached[0] - start[0], r * t, start[1] - reached[1] - log_t


def at_nonzeros(x: Tensor, mu: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per non-zero: the two logarithmic terms of log p, t = (x - mu) / (r + mu), and log(1 + t)."""
    both, reached = r + mu, x + r
    t = (x - mu) / both
    log_t = log_of_ratio(t, reached / both)
    log_u = log_of_ratio(-t * (r / x), (mu / both) * (reached / x))
    return r * log_t + x * log_u, t, log_t


def log_of_ratio(change: Tensor, ratio: Tensor) -> Tensor:
    """log(ratio) where change = ratio - 1 is known without cancellation."""
    return torch.where(change.abs() < 0.5, change.log1p(), ratio.log())
