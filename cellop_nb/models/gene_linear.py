"""A linear layer on log-normalised counts that visits the non-zeros only."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from . import host
from .counts import SparseCounts

COUNTS_PER_CELL = 1e4
_STRIP = 128  # columns


class LogNormalised:
    r"""log1p of counts scaled to :data:`COUNTS_PER_CELL` per cell, dense or at the non-zeros.

    .. math:: \log(1 + 10^4\, x / l)

    Parameters
    ----------
    x
        (cell, gene) counts.
    library
        (cell,) library sizes.
    covariates
        (cell, width) further inputs, dense; None for none.
    """

    def __init__(self, x: Tensor | SparseCounts, library: Tensor, covariates: Tensor | None = None):
        self.covariates = covariates
        factor = COUNTS_PER_CELL / library.clamp_min(1.0)
        self.counts: SparseCounts | None = None
        if isinstance(x, Tensor):
            # In place: allocating a second (cell, gene) array costs as much as filling it.
            self.dense = (x * factor.unsqueeze(-1)).log1p_()
            return
        values = (x.values * factor.index_select(0, x.rows)).log1p_()
        if host.looks_are_free(values.device):
            self.counts, self.values = x, values
        else:  # there the dense product is the faster one
            self.dense = x.spread(values)

    @cached_property
    def by_gene(self) -> tuple[Tensor, Tensor, Tensor]:
        """Starts, cells and values at the non-zeros, gene by gene: the gradients of all weights need them."""
        assert self.counts is not None
        return self.counts.by_gene(self.values)


class _Product(torch.autograd.Function):
    """Inputs (cell, gene) at the non-zeros, times weight (gene, out): sums of weighted rows."""

    @staticmethod
    def forward(ctx, weight: Tensor, x: LogNormalised) -> Tensor:
        ctx.x, counts = x, x.counts
        assert counts is not None
        return _weighted_sums(weight, counts.columns, counts.indptr, x.values)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        starts, cells, values = ctx.x.by_gene
        return _weighted_sums(upstream, cells, starts, values), None


def _weighted_sums(rows: Tensor, chosen: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """(bag, out) sums of `values` (entry,) times the chosen rows (row, out), the entries of a bag one after the other.

    Each row is read many times, at random: wide ones in strips, so that a strip of all rows stays in the cache.
    """
    rows = rows.detach()  # else the gradient's bookkeeping is made too
    options = {"mode": "sum", "per_sample_weights": values, "include_last_offset": True}
    strips = rows.split(_STRIP, 1) if rows.shape[1] > 2 * _STRIP else (rows,)
    sums = [embedding_bag(chosen, strip.contiguous(), starts, **options) for strip in strips]
    return sums[0] if len(sums) == 1 else torch.cat(sums, 1)


class GeneLinear(nn.Module):
    """Linear layer on genes: weight (gene, out), one row per gene, so that a cell gathers the rows of its genes.

    Parameters
    ----------
    n_genes, n_out
        Sizes.
    n_covariates
        Width of the covariates, which have a weight of their own.
    bias
        Whether there is a bias (out,).
    """

    def __init__(self, n_genes: int, n_out: int, *, n_covariates: int = 0, bias: bool = True):
        super().__init__()
        start = nn.Linear(n_genes + n_covariates, n_out, bias=bias)
        genes, covariates = start.weight.detach().t().split([n_genes, n_covariates])
        self.weight, self.bias = nn.Parameter(genes.contiguous()), start.bias
        self.covariates = nn.Parameter(covariates.contiguous()) if n_covariates else None

    def forward(self, x: LogNormalised) -> Tensor:
        """(cell, out)."""
        out = x.dense @ self.weight if x.counts is None else _Product.apply(self.weight, x)
        if self.covariates is not None:
            assert x.covariates is not None
            out = out + x.covariates @ self.covariates
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} genes -> {self.weight.shape[1]}"
