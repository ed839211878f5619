"""Counts by their non-zeros: their negative-binomial likelihood in closed form, and a first layer that visits no zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy import sparse
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from ..errors import ModelError
from . import host

COUNTS_PER_CELL = 1e4
"""Counts per cell to which expression levels log(1 + counts) refer."""

TABLE = 16
"""Largest count whose part of the likelihood is looked up."""

MIN_MEAN = 1e-20
"""Lower bound of the mean: a softmax that underflows to 0 is taken as this."""

MIN_INVERSE_DISPERSION = 1e-12
"""Lower bound of r; below it the variance of any count would exceed 1e12 times its mean squared."""

_CONSTANTS = 255  # largest count whose constant is looked up
_TURN = 1 << 19  # entries of each of a turn's arrays
_STRIP = 128  # columns of a weight that are summed at once

# Stirling's series of lgamma in 1/z^2, after 1/z; and of log z - 1/(2 z) - digamma, after 1/z^2
_VALUE = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
_SLOPE = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# -- log-gamma without the part that cancels in a likelihood ---------------------------------------------------


def stirling(z: Tensor) -> tuple[Tensor, Tensor]:
    """h(z) = lgamma(z) - z log z + z and h'(z) = digamma(z) - log z, for z > 0: the remainder of Stirling's series.

    The series is used from `shift` above z, where its terms end at the precision of z, and the recurrence
    lgamma(z) = lgamma(z + n) - log z (z + 1) ... (z + n - 1) leads back; large z need no recurrence.

    References
    ----------
    Abramowitz and Stegun (1964), 6.1.15 and 6.1.41 (lgamma), 6.3.5 and 6.3.18 (digamma).
    """
    shift = 3 if z.dtype == torch.float32 else 8
    high = z + shift
    inverse, ratio = high.reciprocal(), (shift / z).log1p()
    w = inverse.square()
    product, reciprocals = z * inverse, z.reciprocal()
    for step in range(1, shift):
        product = product * ((z + step) * inverse)
        reciprocals = reciprocals + (z + step).reciprocal()
    value = (z * ratio - shift) - 0.5 * high.log() - product.log() + inverse * _horner(w, _VALUE)
    return value + _HALF_LOG_2PI, ratio - 0.5 * inverse - w * _horner(w, _SLOPE) - reciprocals


def _horner(w: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    terms = 4 if w.dtype == torch.float32 else len(coefficients)
    total = torch.full_like(w, coefficients[terms - 1])
    for coefficient in coefficients[terms - 2 :: -1]:
        total = total.mul_(w).add_(coefficient)
    return total


def count_constant(x: Tensor) -> Tensor:
    """c(x) = log x! - x log x + x of counts x > 0: the part of the likelihood that the data alone decide."""
    return stirling(x)[0] + x.log()


def _looked_up_constants(x: Tensor) -> Tensor:
    """:func:`count_constant` of each count; small whole ones, nearly all of them, are looked up on a CPU."""
    if not host.looks_are_free(x.device):
        return count_constant(x)
    whole = x.int().clamp_(0, _CONSTANTS)  # NaN and whatever else is not in the table gets an entry, too
    table = count_constant(torch.arange(_CONSTANTS + 1, dtype=x.dtype).clamp_min_(1))
    constants, others = table.index_select(0, whole), (whole != x).nonzero().view(-1)
    constants[others] = count_constant(x[others])
    return constants


# -- counts ------------------------------------------------------------------------------------------------


class SparseCounts:
    """Non-zeros of a count matrix (cell, gene) in CSR form, as encoder and likelihood visit them.

    Parameters
    ----------
    shape
        (cells, genes).
    indptr, columns
        (cell + 1,) and (nonzero,) int64: where each cell's non-zeros start, and their genes.
    values
        (nonzero,) counts > 0, floating.
    constant
        (cell,) sum of :func:`count_constant` over the non-zeros of each cell. It never changes, so a trainer
        computes it once; computed at first use where None.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        indptr: Tensor,
        columns: Tensor,
        values: Tensor,
        constant: Tensor | None = None,
    ):
        self.shape, self.indptr, self.columns, self.values = tuple(shape), indptr, columns, values
        if constant is not None:
            self.constant = constant

    @classmethod
    def of(cls, batch, constant: Tensor | None = None) -> SparseCounts:
        """The counts of a batch with ``shape``, ``indptr``, ``columns`` and ``values``."""
        return cls(batch.shape, batch.indptr, batch.columns, batch.values, constant)

    @classmethod
    def from_dense(cls, x: Tensor) -> SparseCounts:
        """Non-zeros of the dense counts x (cell, gene). Negative counts are refused."""
        rows, columns = x.nonzero(as_tuple=True)
        values = x[rows, columns]
        _refuse_negative(values)
        ends = torch.bincount(rows, minlength=len(x)).cumsum(0)
        return cls((x.shape[0], x.shape[1]), torch.cat([ends.new_zeros(1), ends]), columns, values)

    @cached_property
    def constant(self) -> Tensor:
        """(cell,) part of each cell's log-likelihood that no parameter enters, with its sign turned."""
        return self._by_cell(_looked_up_constants(self.values))

    @cached_property
    def rows(self) -> Tensor:
        """(nonzero,) int64 cell of each non-zero."""
        return torch.repeat_interleave(self.indptr.diff(), output_size=len(self.values))

    @cached_property
    def flat(self) -> Tensor:
        """(nonzero,) positions in the row-major dense matrix."""
        return torch.add(self.columns, self.rows, alpha=self.shape[1])

    def by_gene(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`values` (nonzero,) gene by gene, on a CPU: (gene + 1,) int32 starts, (nonzero,) int32 cells, the values."""
        # Narrow indices: scipy would look through wide ones first, and narrow them itself.
        indices = (self.columns.int().numpy(), self.indptr.int().numpy())
        csc = sparse.csr_matrix((values.numpy(), *indices), self.shape).tocsc()
        return torch.from_numpy(csc.indptr), torch.from_numpy(csc.indices), torch.from_numpy(csc.data)

    def spread(self, values: Tensor) -> Tensor:
        """Dense (cell, gene) array with `values` (nonzero,) at the non-zeros and 0 elsewhere."""
        cells, genes = self.shape
        return values.new_zeros(cells * genes).scatter_(0, self.flat, values).view(cells, genes)

    def to(self, target: torch.device | torch.dtype | str) -> SparseCounts:
        """The same counts on another device or in another floating dtype."""
        values, constant = self.values.to(target), self.__dict__.get("constant")
        indptr, columns = self.indptr.to(values.device), self.columns.to(values.device)
        constant = None if constant is None else constant.to(values)
        return SparseCounts((self.shape[0], self.shape[1]), indptr, columns, values, constant)

    def totals(self) -> Tensor:
        """(cell,) counts of each cell."""
        return self._by_cell(self.values)

    def _by_cell(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape[0]).index_add_(0, self.rows, values)

    def __len__(self) -> int:
        return self.shape[0]


def _refuse_negative(x: Tensor) -> None:
    """Refuse a negative count, naming where it is."""
    if x.numel() and x.amin() < 0:
        cell = tuple(int(i) for i in (x == x.amin()).nonzero()[0])
        received = f"{x.amin():g} at index {cell}"
        raise ModelError("counts x >= 0", received, "pass raw counts, not log-normalised or scaled values")


# -- the likelihood of means and dispersions ---------------------------------------------------------------------


def nb_log_likelihood(x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
    r"""Log-likelihood of counts under NB(mu, r), summed over genes: accurate at the extremes.

    .. math::
        \log p = \log\Gamma(x+r) - \log\Gamma(r) - \log x! + r \log\frac{r}{r+\mu} + x \log\frac{\mu}{r+\mu}

    This form subtracts numbers of size r log r. Here every term is small where the answer is small:

    .. math::
        \log p(x) = r \log(1 + t) + x \log(1 - t r / x) + h(x + r) - h(r) - c(x), \quad
        t = (x - \mu)/(r + \mu)

    with :math:`h(z) = \log\Gamma(z) - z \log z + z` (:func:`stirling`) and :math:`c(x) = \log x! - x \log x + x`, both
    of the size of log z. At x = 0 only :math:`-r \log(1 + \mu/r)` is left, so the special functions are needed at the
    non-zeros alone: about a tenth of a single-cell count matrix.

    Parameters
    ----------
    x
        (cell, gene) counts >= 0.
    mu
        (cell, gene) means >= 0; bounded below by :data:`MIN_MEAN`.
    r
        (gene,) or (cell, gene) inverse dispersions > 0, variance = mu + mu^2 / r; bounded below by
        :data:`MIN_INVERSE_DISPERSION`. Below the bounds the gradient is the one at the bound, not zero.

    Returns
    -------
    (cell,) log-likelihood in nats, differentiable once with respect to `mu` and `r`. NaN in `mu` or `r`
    stays NaN, for the non-finite guard of the training loop to see.

    Raises
    ------
    ModelError
        Where a count or a mean is negative, or r is not positive; where its gradient is to be differentiated again
        (``create_graph=True``).

    References
    ----------
    Lopez et al. (2018), Nature Methods 15:1053, equation 2 of the supplement; Loader (2000), Fast and accurate
    computation of binomial probabilities (the deviance form).
    """
    _refuse_negative(x)
    if r.numel() and r.amin() <= 0:
        fix = "pass r = exp(log_r), bounded below"
        raise ModelError("inverse dispersion r > 0", f"a smallest r of {r.amin():g}", fix)
    if mu.numel() and mu.amin() < 0:
        fix = "pass library size times softmax proportions"
        raise ModelError("means mu >= 0", f"a smallest mean of {mu.amin():g}", fix)
    return _NBLogLikelihood.apply(x.to(mu.dtype), mu, r)


class _NBLogLikelihood(torch.autograd.Function):
    """Log-likelihood per cell with the closed-form gradient with respect to mu and r."""

    @staticmethod
    def forward(ctx, x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
        ctx.r_shape, ctx.mu_shape = r.shape, mu.shape
        mu = mu.clamp_min(MIN_MEAN).expand_as(x)
        r = r.clamp_min(MIN_INVERSE_DISPERSION)
        flat = x.reshape(-1).nonzero().squeeze(-1)
        terms = (-r * (mu / r).log1p()).contiguous()
        x_at, mu_at, r_at = (part.reshape(-1)[flat] for part in (x, mu, r.expand_as(x)))
        value, _, _ = _at_nonzeros(x_at, mu_at, r_at)
        end, start = stirling(x_at + r_at), [part.expand_as(x).reshape(-1)[flat] for part in stirling(r)]
        terms.view(-1)[flat] = value + end[0] - start[0] - count_constant(x_at)
        ctx.save_for_backward(x, mu, r, flat, end[1] - start[1])
        return terms.sum(-1)

    @staticmethod
    @host.differentiable_once("the likelihood of counts")
    def backward(ctx, upstream: Tensor):
        x, mu, r, flat, step = ctx.saved_tensors
        upstream = upstream.unsqueeze(-1)
        t = (x - mu) / (r + mu)
        grad_mu = grad_r = None
        if ctx.needs_input_grad[1]:
            grad_mu = (upstream * (r / mu) * t).sum_to_size(ctx.mu_shape)
        if ctx.needs_input_grad[2]:
            slope = _log_of_ratio(t, (x + r) / (r + mu)) - t
            slope.view(-1)[flat] += step
            grad_r = (upstream * slope).sum_to_size(ctx.r_shape)
        return None, grad_mu, grad_r


def _at_nonzeros(x: Tensor, mu: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per non-zero: the two logarithmic terms of log p, t = (x - mu) / (r + mu), and log(1 + t)."""
    r_and_mu, r_and_x = r + mu, x + r
    t = (x - mu) / r_and_mu
    log_t = _log_of_ratio(t, r_and_x / r_and_mu)
    log_u = _log_of_ratio(-t * (r / x), (mu / r_and_mu) * (r_and_x / x))
    return r * log_t + x * log_u, t, log_t


def _log_of_ratio(change: Tensor, ratio: Tensor) -> Tensor:
    """log(ratio) where change = ratio - 1 comes without cancellation."""
    return torch.where(change.abs() < 0.5, change.log1p(), ratio.log())


class NegativeBinomial:
    """Negative-binomial distribution of counts (cell, gene).

    Parameters
    ----------
    mean
        (cell, gene) means.
    r
        (gene,) or (cell, gene) inverse dispersions; variance = mean + mean^2 / r.
    """

    def __init__(self, mean: Tensor, r: Tensor):
        self.mean, self.r = mean, r

    @property
    def variance(self) -> Tensor:
        """(cell, gene) mean + mean^2 / r."""
        return self.mean + self.mean.square() / self.r

    def log_prob(self, x: Tensor) -> Tensor:
        """(cell,) log-likelihood of counts x (cell, gene), summed over genes."""
        return nb_log_likelihood(x, self.mean, self.r)

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(cell, gene) counts drawn from the Gamma-Poisson mixture, without gradient."""
        shape = self.r.expand_as(self.mean).contiguous()
        rate = torch._standard_gamma(shape, generator=generator) * (self.mean / self.r)
        return torch.poisson(rate, generator=generator)

    def __repr__(self) -> str:
        shapes = f"mean: {tuple(self.mean.shape)}, r: {tuple(self.r.shape)}"
        return f"NegativeBinomial({shapes}, {self.mean.dtype})"


# -- the likelihood of logits: the training path -------------------------------------------------------------------


def nb_log_likelihood_logits(
    counts: Tensor | SparseCounts, logits: Tensor, library: Tensor, r: Tensor
) -> Tensor:
    r"""Log-likelihood of counts under NB(library * softmax(logits), r): the training path.

    Same value and gradient as ``nb_log_likelihood(x, library[:, None] * softmax(logits, -1), r)``, in fewer
    passes over (cell, gene), since

    .. math:: \frac{\partial \log p}{\partial \log \mu} = \frac{r (x - \mu)}{r + \mu}

    stays bounded however small mu becomes.

    Parameters
    ----------
    counts
        (cell, gene) counts, dense or as :class:`SparseCounts` (fastest: nothing has to be searched).
    logits
        (cell, gene) of the decoder.
    library
        (cell,) library sizes > 0.
    r
        (gene,) inverse dispersions > 0.

    Returns
    -------
    (cell,) log-likelihood in nats, differentiable once with respect to `logits`, `library` and `r`.

    References
    ----------
    Lopez et al. (2018), Nature Methods 15:1053.
    """
    if isinstance(counts, Tensor):
        counts = SparseCounts.from_dense(counts)
    dtype = torch.promote_types(torch.promote_types(logits.dtype, library.dtype), torch.float32)
    counts = counts if counts.values.dtype == dtype else counts.to(dtype)
    return _NBFromLogits.apply(counts, logits.to(dtype), library.to(dtype), r.to(dtype))


class _NBFromLogits(torch.autograd.Function):
    """Log-likelihood per cell of mu = library * softmax(logits), softmax and NB in one gradient."""

    @staticmethod
    def forward(ctx, counts: SparseCounts, logits: Tensor, library: Tensor, r: Tensor) -> Tensor:
        ctx.counts = counts
        with torch.autocast(logits.device.type, enabled=False):
            r = r.clamp_min(MIN_INVERSE_DISPERSION)
            value, ctx.gradient = softmax_nb(logits.clone(), counts, library, r)
        return value

    @staticmethod
    @host.differentiable_once("the likelihood of counts")
    def backward(ctx, upstream: Tensor):
        gradient, (_, logits, library, r) = ctx.gradient, ctx.needs_input_grad
        return (
            None,
            gradient.by_logits * upstream.unsqueeze(-1) if logits else None,
            gradient.by_library * upstream if library else None,
            gradient.by_r(upstream, ctx.counts.rows) if r else None,
        )


@dataclass(frozen=True)
class RowsGradient:
    """What the gradient of each cell's log-likelihood needs; without table where nothing is looked up."""

    by_library: Tensor  # (cell,)
    by_logits: Tensor  # (cell, gene)
    minus_by_r: Tensor  # (cell, gene), as far as it is not in the table
    entry: Tensor | None  # (nonzero,) entry of each non-zero in the table
    slope: Tensor | None  # (count, gene) the table's derivative by r

    def by_r(self, upstream: Tensor, rows: Tensor) -> Tensor:
        """(gene,) derivative by r of the sum of upstream (cell,) times value; `rows` (nonzero,) are the cells."""
        if self.slope is None or self.entry is None:
            return -(upstream @ self.minus_by_r)
        weight = torch.zeros_like(self.slope)
        weight.view(-1).index_add_(0, self.entry, upstream.index_select(0, rows))
        return (weight * self.slope).sum(0).sub_(upstream @ self.minus_by_r)


def softmax_nb(
    logits: Tensor, counts: SparseCounts, library: Tensor, r: Tensor
) -> tuple[Tensor, RowsGradient]:
    r"""Log-likelihood (cell,) of `counts` (cell, gene) under NB(library * softmax(logits), r), and its gradient.

    At a zero count only :math:`-r \log(1 + \mu/r)` is left of log p. A count x > 0 adds

    .. math::
        x \left(\log\mu - \log(1 + \mu/r)\right) + \sum_{k<x} \log(1 + k/r) - \log x!

    whose sum depends on gene and count alone: for counts up to :data:`TABLE` it is read from a table that all cells
    share. Larger counts, where these terms would cancel, take the deviance form of :func:`nb_log_likelihood`. Cells
    are visited in turns, so that the arrays of a turn stay in the cache and its extra memory is small.

    `logits` becomes its own gradient. r (gene,) lies within its bounds; all arrays share one floating dtype.
    """
    # Where looks are free: counts sorted into small and large ones, and cells visited in turns.
    (cells, genes), table = counts.shape, host.looks_are_free(logits.device)
    terms, slope = _tables(r) if table else (r, None)
    entry, near = _entries(counts) if table else (None, None)
    step = max(1, _TURN // genes) if table else cells
    gradient = RowsGradient(torch.empty_like(library), logits, torch.empty_like(logits), entry, slope)
    shared, value = (terms.view(-1), r, r.reciprocal(), r.new_full((), -1.0)), torch.empty_like(library)
    ends = counts.indptr[[*range(0, cells, step), cells]].tolist() if table else [0, len(counts.values)]
    for turn, start in enumerate(range(0, cells, step)):
        rows, nonzeros = slice(start, min(start + step, cells)), slice(ends[turn], ends[turn + 1])
        value[rows] = _turn(gradient, counts, library[rows], shared, rows, nonzeros, near)
    return value.sub_(counts.constant), gradient


def _tables(r: Tensor) -> tuple[Tensor, Tensor]:
    r"""Per count up to :data:`TABLE` and gene: :math:`\sum_{k<x} \log(1 + k/r) - x \log x + x`, and the
    derivative of log Gamma(x + r) / Gamma(r)."""
    x = torch.arange(TABLE + 1, dtype=r.dtype, device=r.device).unsqueeze(1)
    zero = torch.zeros_like(r).unsqueeze(0)
    terms = torch.cat([zero, (x[:-1] / r).log1p_().cumsum(0)]).sub_(torch.xlogy(x, x)).add_(x)
    return terms, torch.cat([zero, (x[:-1] + r).reciprocal_().cumsum(0)])


def _entries(counts: SparseCounts) -> tuple[Tensor, Tensor]:
    """(nonzero,) entries of the tables, and which non-zeros have one; the others point to a zero."""
    whole = counts.values.long()
    near = (whole == counts.values) & (whole <= TABLE)
    return torch.add(counts.columns, whole, alpha=counts.shape[1]).mul_(near), near


def _turn(gradient: RowsGradient, counts, library, shared, rows: slice, nonzeros: slice, near) -> Tensor:
    """Log-likelihood of the cells `rows`, with their `nonzeros`; their part of the gradient is written."""
    terms, r, inverse, minus_one = shared
    slope, log_ratio = gradient.by_logits[rows], gradient.minus_by_r[rows]
    mu = torch.softmax(slope, -1).mul_(library.unsqueeze(1))
    torch.mul(mu, inverse, out=log_ratio)
    torch.div(mu, torch.sub(minus_one, log_ratio, out=slope), out=slope)  # d log p / d log mu at x = 0
    log_ratio.log1p_()
    # index_select and scatter_ here, not brackets: the same numbers, two to four times faster on a CPU.
    at, columns = counts.flat[nonzeros] - rows.start * counts.shape[1], counts.columns[nonzeros]
    x, mu_at = counts.values[nonzeros], mu.view(-1).index_select(0, at).clamp_min_(MIN_MEAN)
    if near is None or gradient.entry is None:
        value = torch.empty_like(x)
        far: slice | Tensor = slice(None)
    else:
        value = mu_at.log().sub_(log_ratio.view(-1).index_select(0, at)).mul_(x)
        value += terms.index_select(0, gradient.entry[nonzeros])
        ratio = mu_at * inverse.index_select(0, columns)
        slope.view(-1).scatter_add_(0, at, x / ratio.add_(1))
        far = (~near[nonzeros]).nonzero().view(-1)
    late = None
    if isinstance(far, slice) or len(far):
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
    gradient.by_library[rows] = total
    log_ratio.addcmul_(slope, inverse)
    slope.addcmul_(mu, total.unsqueeze(1), value=-1)
    return value


def _deviance(x: Tensor, mu: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per non-zero: log p without count constants, d log p / d log mu, and the rest of minus the slope in r."""
    value, t, log_t = _at_nonzeros(x, mu, r)
    end, start = stirling(x + r), stirling(r)
    return value + end[0] - start[0], r * t, start[1] - end[1] - log_t


# -- a first layer on log-normalised counts ----------------------------------------------------------------------


def levels(x: Tensor, library: Tensor) -> Tensor:
    r"""Expression levels (cell, gene) of counts.

    .. math:: y = \log(1 + 10^4\, x / l)

    Parameters
    ----------
    x
        (cell, gene) counts, or expected counts.
    library
        (cell,) library sizes l.
    """
    # In place: allocating a second (cell, gene) array costs as much as filling it.
    return (x * (COUNTS_PER_CELL / library).unsqueeze(-1)).log1p_()


class LogNormalised:
    """Expression :func:`levels` as inputs of a layer, dense or at the non-zeros.

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
        self.counts: SparseCounts | None = None
        if isinstance(x, Tensor):
            self.dense = levels(x, library.clamp_min(1.0))
            return
        factor = COUNTS_PER_CELL / library.clamp_min(1.0)
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
    @host.differentiable_once("the first layer on counts")
    def backward(ctx, upstream: Tensor):
        starts, cells, values = ctx.x.by_gene
        return _weighted_sums(upstream, cells, starts, values), None


def _weighted_sums(rows: Tensor, chosen: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """(bag, out) sums of `values` (entry,) times the chosen rows (row, out), the entries of a bag one after the other.

    Each row is read many times, at random: wide ones in strips, so that a strip of all rows stays in the cache.
    """
    rows = rows.detach()  # else the gradient's bookkeeping is made too
    strips = rows.split(_STRIP, 1) if rows.shape[1] > 2 * _STRIP else (rows,)
    sums = [
        embedding_bag(
            chosen,
            strip.contiguous(),
            starts,
            mode="sum",
            per_sample_weights=values,
            include_last_offset=True,
        )
        for strip in strips
    ]
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
