"""A decoder's last linear layers and the likelihood of counts in one function: no gradient of logits is copied."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .counts import SparseCounts
from .nb_rows import MIN_INVERSE_DISPERSION, RowsGradient, softmax_nb


class _Head(torch.autograd.Function):
    """Log-likelihood per cell of mu = library * softmax(sum of inputs times weights + bias).

    Two arrays (cell, gene) exist: the logits, which become their own gradient, and what the gradient of r needs.
    """

    @staticmethod
    def forward(ctx, counts, library, r, bias, first, first_weight, second, second_weight):
        # The bias is the weight of one more input, 1: no pass over the logits of its own, nor over their gradient.
        with_bias = torch.cat([first_weight, bias.unsqueeze(1)], 1)
        logits = torch.mm(_with_one(first), with_bias.t()).addmm_(second, second_weight.t())
        value, ctx.found = softmax_nb(logits, counts, library, r.clamp_min(MIN_INVERSE_DISPERSION))
        ctx.counts = counts
        ctx.save_for_backward(first, first_weight, second, second_weight)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        first, first_weight, second, second_weight = ctx.saved_tensors
        found: RowsGradient = ctx.found
        slope, scale, want = found.by_logits, upstream.unsqueeze(1), ctx.needs_input_grad
        # The small arrays are scaled by the upstream gradient, not the large one.
        inputs = [(slope @ weight).mul_(scale) for weight in (first_weight, second_weight)]
        of_first, of_second = (slope.t() @ (given * scale) for given in (_with_one(first), second))
        return (
            None,
            upstream * found.by_library if want[1] else None,
            found.by_r(upstream, ctx.counts.rows) if want[2] else None,
            of_first[:, -1].contiguous(),
            inputs[0],
            of_first[:, :-1].contiguous(),
            inputs[1],
            of_second,
        )


def _with_one(given: Tensor) -> Tensor:
    """(cell, feature + 1): the inputs with a last one that is 1."""
    return torch.cat([given, given.new_ones(len(given), 1)], 1)


def nb_log_likelihood_head(
    counts: SparseCounts,
    library: Tensor,
    r: Tensor,
    *,
    bias: Tensor,
    linear: tuple[Tensor, Tensor],
    output: tuple[Tensor, Tensor],
) -> Tensor:
    r"""Log-likelihood of counts under NB(library * softmax(z W^T + h V^T + a), r): the training path on a CPU.

    Same value and gradient as :func:`~cellop_nb.models.likelihood.nb_log_likelihood_logits` of these logits.

    Parameters
    ----------
    counts
        (cell, gene) counts.
    library, r
        (cell,) library sizes > 0 and (gene,) inverse dispersions > 0.
    bias
        a, (gene,).
    linear, output
        (z, W) and (h, V): inputs (cell, feature) and weights (gene, feature).

    Returns
    -------
    (cell,) log-likelihood in nats, differentiable once with respect to all but `counts`.

    References
    ----------
    Lopez et al. (2018), Nature Methods 15:1053.
    """
    return _Head.apply(counts, library, r, bias, *linear, *output)
