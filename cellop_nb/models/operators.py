"""The operator family: from names, doses and contexts to one affine map per condition, built from shared axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import lsqr
from scipy.special import chdtri
from torch import Tensor, nn

from ..display import card
from ..errors import LabelError, ModelError, counted, did_you_mean
from . import host
from .affine import AffineOperator


def perturbation_parts(label: str, labels: Iterable[str], singles: Sequence[str] = ()) -> tuple[str, ...]:
    """The parts of a combination: "A+B" gives ("A", "B") where both are among `labels`, any other label itself.

    So "(+)-JQ1" or "anti-CD3+CD28" is one perturbation, and "(+)-JQ1+A" two; what stands in `singles` is one.
    """
    pieces = tuple(str(label).split("+"))
    if len(pieces) == 1 or label in singles:
        return (str(label),)
    parts = _joined(pieces, {str(one) for one in labels} - {label})
    return (str(label),) if not parts or len(set(parts)) < len(parts) else parts


def _joined(pieces: tuple[str, ...], labels: set[str]) -> tuple[str, ...] | None:
    """The pieces between "+" as labels, some of which have a "+" of their own; None where they are none."""
    if not pieces:
        return ()
    for size in range(1, len(pieces) + 1):
        first = "+".join(pieces[:size]).strip()
        others = _joined(pieces[size:], labels) if first in labels else None
        if others is not None:
            return (first, *others)
    return None


@dataclass(frozen=True)
class Condition:
    """A perturbation (or combination) with its doses, in a context.

    Parameters
    ----------
    perturbations
        Names of the parts, ``()`` for control.
    context
        Cell type, donor or the like; None for any context, which uses the shared response alone.
    doses
        One strength per part, 1 for the measured one.
    like
        For a context that was never seen: known contexts with weights that sum to one, whose own parts of the
        response are borrowed in these shares; ``()`` borrows none.

    Raises
    ------
    ModelError
        If there are not as many doses as perturbations.
    """

    perturbations: tuple[str, ...]
    context: str | None = None
    doses: tuple[float, ...] = ()
    like: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        if not self.doses:
            object.__setattr__(self, "doses", (1.0,) * len(self.perturbations))
        if len(self.doses) != len(self.perturbations):
            expected = f"one dose for each of {len(self.perturbations)} perturbations"
            fix = "give the doses in the order of the perturbations"
            raise ModelError(expected, f"{len(self.doses)} doses", fix)

    @classmethod
    def parse(
        cls, label: str, context: str | None = None, *, dose: float = 1.0, perturbations: Sequence[str] = ()
    ) -> Condition:
        """Read ``"A"``, ``"control"``, or ``"A+B"``: a combination where both parts are among `perturbations`."""
        parts = () if label == "control" else perturbation_parts(label, perturbations, perturbations)
        return cls(parts, context, (float(dose),) * len(parts))

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """Contexts whose own parts of the response act, with their weights."""
        own = () if self.context is None else ((self.context, 1.0),)
        return self.like or own

    @property
    def label(self) -> str:
        """``"A+B"``, ``"A (dose 0.5)"``, or ``"control"``."""
        parts = zip(self.perturbations, self.doses, strict=True)
        return "+".join(p if dose == 1 else f"{p} (dose {dose:g})" for p, dose in parts) or "control"

    def __str__(self) -> str:
        return self.label if self.context is None else f"{self.context}, {self.label}"


@dataclass(frozen=True)
class Design:
    """Conditions as tensors; what was done stands as indices, so that it takes no more room with more perturbations.

    Attributes
    ----------
    parts, doses : (condition, part)
        Rows of the perturbations and their doses; a row with dose 0 fills up.
    pairs, products : (condition, pair)
        Rows of the measured pairs among the parts, and the products of their doses; filled up in the same way.
    contexts : (condition, context)
        Shares of the contexts.
    strength : (condition,)
        Largest dose.
    """

    parts: Tensor
    doses: Tensor
    pairs: Tensor
    products: Tensor
    contexts: Tensor
    strength: Tensor

    @property
    def weight(self) -> Tensor:
        """Weight of each context's own part, (condition, context)."""
        return self.contexts * self.strength.unsqueeze(1)

    def of(self, which: Tensor) -> Design:
        """Some of the conditions."""
        return Design(*(getattr(self, field.name).index_select(0, which) for field in fields(self)))

    def sums(self, rows: Tensor) -> Tensor:
        """(condition, ...) sums over the parts of the perturbations' rows (perturbation, ...), times their doses."""
        return _sums(rows, self.parts, self.doses)

    def gathered(self, values: Tensor, n_perturbations: int) -> Tensor:
        """(perturbation, ...) sums over the conditions' values (condition, ...), times the doses of their parts."""
        each = self.doses.to(values.dtype).unsqueeze(2) * values.unsqueeze(1)
        rows = values.new_zeros(n_perturbations, values.shape[1])
        return rows.index_add(0, self.parts.flatten(), each.flatten(0, 1))

    def least_squares(self, target: Tensor, n_perturbations: int) -> Tensor:
        """(perturbation, ...) rows of smallest norm whose :meth:`sums` are nearest to the target (condition, ...)."""
        starts = np.arange(len(self.parts) + 1) * self.parts.shape[1]
        entries = self.doses.double().cpu().numpy().ravel(), self.parts.cpu().numpy().ravel(), starts
        rows = sparse.csr_matrix(entries, (len(self.parts), n_perturbations))
        columns = [
            lsqr(rows, column, atol=1e-12, btol=1e-12)[0] for column in target.cpu().double().T.numpy()
        ]
        return torch.from_numpy(np.stack(columns, 1)).to(target)


def _sums(rows: Tensor, which: Tensor, weights: Tensor) -> Tensor:
    """(condition, ...) weighted sums of the rows whose positions `which` (condition, part) holds."""
    if not which.shape[1]:
        return rows.new_zeros(len(which), rows.shape[1])
    return (nn.functional.embedding(which, rows) * weights.unsqueeze(2)).sum(1)


def _padded(rows: Sequence[dict[int, float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions and weights (row, width), filled up with position 0 at weight 0."""
    width = max(map(len, rows), default=0)
    where, weight = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=dtype),
    )
    for k, row in enumerate(rows):
        where[k, : len(row)] = torch.tensor(list(row), dtype=torch.long)
        weight[k, : len(row)] = torch.tensor(list(row.values()), dtype=dtype)
    return where, weight


def first_embedding(n_rows: int, n_axes: int) -> Tensor:
    """Orthogonal embeddings (row, axis): non-zero, so that gradients reach axes that still are zero."""
    start = torch.empty(n_rows, n_axes)
    scale = max(n_rows / n_axes, 1.0) ** 0.5
    return nn.init.orthogonal_(start, scale, generator=torch.Generator().manual_seed(0))


class ConditionEncoder(nn.Module):
    r"""Conditions to the coefficients of the shared axes.

    .. math::
        h(\theta) = \Big(\sum_p s_p e_p + \sum_{p<q} s_p s_q e_{pq}\Big) \odot (1 + m_c), \quad
        \beta = h, \quad \alpha = W h

    with doses s, learned embeddings e, interactions of the pairs that were measured, and a modulation m of the context
    that is zero for a context never seen.

    Parameters
    ----------
    perturbations, contexts
        Known names, without the control.
    n_axes
        K, the number of shared response axes.
    pairs
        Measured pairs of perturbations, each of which gets an interaction term that starts at zero.
    """

    def __init__(
        self,
        perturbations: Sequence[str],
        contexts: Sequence[str],
        n_axes: int,
        *,
        pairs: Sequence[tuple[str, str]] = (),
    ):
        super().__init__()
        self.perturbations, self.contexts = list(perturbations), list(contexts)
        self.pairs = [tuple(sorted(pair)) for pair in pairs]
        kinds = {"perturbation": self.perturbations, "context": self.contexts}
        self._rows = {kind: {name: row for row, name in enumerate(names)} for kind, names in kinds.items()}
        for name in {name for pair in self.pairs for name in pair}:
            self._index(name, "perturbation")
        self._pair = {pair: row for row, pair in enumerate(self.pairs)}
        self.embedding = nn.Parameter(first_embedding(len(self.perturbations), n_axes))
        self.interaction = nn.Parameter(torch.zeros(len(self.pairs), n_axes))
        self.modulation = nn.Parameter(torch.zeros(len(self.contexts), n_axes))
        self.to_alpha = nn.Parameter(torch.eye(n_axes))

    def design(self, conditions: Sequence[Condition]) -> Design:
        """Tensors of the conditions.

        Raises
        ------
        LabelError
            For a perturbation or context that the model does not know; close names are suggested.
        """
        device, dtype = self.embedding.device, self.embedding.dtype
        contexts = torch.zeros(len(conditions), len(self.contexts), dtype=dtype)
        parts: list[dict[int, float]] = []
        pairs: list[dict[int, float]] = []
        for row, condition in enumerate(conditions):
            doses: dict[str, float] = {}
            for name, dose in zip(condition.perturbations, condition.doses, strict=True):
                doses[name] = doses.get(name, 0.0) + dose
            parts.append({self._index(name, "perturbation"): s for name, s in doses.items()})
            both = {pair: doses[pair[0]] * doses[pair[1]] for pair in combinations(sorted(doses), 2)}
            pairs.append({self._pair[pair]: s for pair, s in both.items() if pair in self._pair})
            for name, share in condition.shares:
                contexts[row, self._index(name, "context")] += share
        strength = torch.tensor([max(doses.values(), default=0.0) for doses in parts], dtype=dtype)
        tensors = (*_padded(parts, dtype), *_padded(pairs, dtype), contexts, strength)
        return Design(*(tensor.to(device) for tensor in tensors))

    def forward(self, design: Design) -> tuple[Tensor, Tensor]:
        """Coefficients alpha and beta, each (condition, axis)."""
        main = design.sums(self.embedding) + _sums(self.interaction, design.pairs, design.products)
        beta = main * (1 + design.contexts @ self.modulation)
        return beta @ self.to_alpha.T, beta

    def _index(self, name: str, kind: str) -> int:
        if name not in self._rows[kind]:
            fix = f"{did_you_mean(name, self._rows[kind])} (a {kind} that was not trained on has no operator of its own)"
            raise LabelError(f"a {kind} the model was fitted with", repr(name), fix)
        return self._rows[kind][name]

    def extra_repr(self) -> str:
        return (
            f"{counted(len(self.perturbations), 'perturbation')}, {counted(len(self.contexts), 'context')}, "
            f"{counted(len(self.pairs), 'measured pair')} -> {self.embedding.shape[1]} axes"
        )


def shared_effects(
    design: Design, n_perturbations: int, controls: Sequence[Tensor], perturbed: Sequence[Tensor]
) -> tuple[Tensor, int]:
    r"""What each perturbation does to mean latents, with strength borrowed from all others.

    With x the raw effect of a perturbation in units of the cells' own covariance, v the variance of its noise (one over
    its cells), and m the mean over perturbations:

    .. math:: \hat x = s\, m + \sum_{k \le K} \frac{\lambda_k}{\lambda_k + v}\, u_k u_k^\top (x - m)

    The directions u are the principal ones of x - m, their number K those that rise above noise one after the other,
    lambda the variance of the effects along them, and s shrinks the mean, which has the noise of the controls.

    Parameters
    ----------
    design, n_perturbations
        Of the groups; perturbations that are in none have no effect.
    controls, perturbed
        Latents (cell, d) of each group's two sides.

    Returns
    -------
    Effects (perturbation, d), and the number of directions that rise above the noise, the common response among them.

    References
    ----------
    Johnstone (2001), Ann. Statist. 29:295 (largest eigenvalue of noise; 95 % quantile); Efron and Morris (1972),
    Biometrika 59:335 (shrinking many means at once); James and Stein (1961), Proc. 4th Berkeley Symposium 1:361.
    """
    root, shifts = _within(perturbed), _means(perturbed) - _means(controls)
    cells = torch.tensor([len(part) for part in perturbed], dtype=torch.float64, device=shifts.device)
    raw = design.least_squares(shifts, n_perturbations).double()
    squares = replace(design, doses=design.doses.double().square())
    often = squares.gathered(torch.ones_like(cells)[:, None], n_perturbations)[:, 0]
    noise = squares.gathered(1 / cells[:, None], n_perturbations)[:, 0] / often.square()
    measured = often > 0
    x, v = torch.linalg.solve_triangular(root, raw[measured].T, upper=False).T, noise[measured]
    n, d = x.shape
    weight = 1 / v
    mean = weight @ x / weight.sum()
    chance = _controls_noise(controls) + 1 / float(weight.sum())  # variance of the mean
    length = max(float(mean.square().sum()), torch.finfo(x.dtype).tiny)
    size = max(0.0, 1 - d * chance / length)
    common = bool(length / chance > chdtri(d, 0.05))  # 95 % quantile of chi-squared
    rest = x - mean
    values, vectors = torch.linalg.eigh(rest.T @ (weight.unsqueeze(1) * rest))
    values, vectors = values.flip(0), vectors.flip(1)
    rank = 0
    while rank < min(d, n - 1) and values[rank] > _largest_of_noise(n - 1 - rank, d - rank):
        rank += 1
    along = rest @ vectors[:, :rank]
    variance = (along.square().sum(0) / max(n - 1, 1) - v.mean()).clamp_min(0)
    along = along * (variance / (variance + v.unsqueeze(1)))
    shrunk = torch.zeros_like(raw)
    shrunk[measured] = (size * mean + along @ vectors[:, :rank].T) @ root.T
    return shrunk.to(shifts), min(max(rank + common, 1), n, d)


def _means(clouds: Sequence[Tensor]) -> Tensor:
    """(group, d) mean cell of each cloud (cell, d); one that serves several groups is averaged once."""
    once = {(cells.data_ptr(), len(cells)): cells for cells in clouds}
    means = {key: cells.mean(0) for key, cells in once.items()}
    return torch.stack([means[cells.data_ptr(), len(cells)] for cells in clouds])


def _within(clouds: Sequence[Tensor]) -> Tensor:
    """Cholesky root (d, d) of the covariance within the clouds (cell, d), pooled over them."""
    d = clouds[0].shape[1]
    total, free = torch.zeros(d, d, dtype=torch.float64, device=clouds[0].device), 0
    for cells in clouds:
        rest = (cells - cells.mean(0)).double()
        total, free = total + rest.T @ rest, free + len(cells) - 1
    covariance = total / max(free, 1)
    least = 1e-6 * covariance.diagonal().mean() + 1e-12
    return torch.linalg.cholesky(covariance + least * identity_like(covariance))


def _controls_noise(controls: Sequence[Tensor]) -> float:
    """Variance of the mean of the groups' control means, in units of that of a cell; groups of a context share theirs."""
    sizes = Counter((cells.data_ptr(), len(cells)) for cells in controls)
    return sum((count / len(controls)) ** 2 / size for (_, size), count in sizes.items())


def _largest_of_noise(n: int, d: int) -> float:
    """95 % quantile of the largest eigenvalue of the scatter (d, d) of n standard normal vectors."""
    a, b = max(n - 1, 1) ** 0.5, d**0.5
    return (a + b) ** 2 + 0.98 * (a + b) * (1 / a + 1 / b) ** (1 / 3)


def gaussian_map(control: Tensor, perturbed: Tensor, *, shrink: float = 0.1) -> Tensor:
    r"""Matrix (d, d) of the optimal transport map between the Gaussians with the clouds' covariances.

    .. math:: A = S_0^{-1/2} (S_0^{1/2} S_1 S_0^{1/2})^{1/2} S_0^{-1/2}

    Covariances are shrunk towards their mean variance by the share `shrink`, and no variance counts as less than 1e-8
    of that mean. Where the control cells do not differ at all, no map is told by them: the identity.

    References
    ----------
    Dowson and Landau (1982), J. Multivariate Anal. 12:450.
    """
    (first, variance), (second, later_variance) = (
        _correlated(cloud, shrink) for cloud in (control, perturbed)
    )
    if not variance > 0:
        return identity_like(first)
    root, inverse_root = _matrix_power(first, 0.5), _matrix_power(first, -0.5)
    scale = (later_variance / variance).sqrt()
    return scale * (inverse_root @ _matrix_power(root @ second @ root, 0.5) @ inverse_root)


def _correlated(cloud: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """Shrunk covariance (d, d) in units of the mean variance, and that variance, 0-d."""
    covariance = torch.cov(cloud.T)
    variance = covariance.diagonal().mean()
    in_units = covariance / variance.clamp_min(torch.finfo(variance.dtype).tiny)
    return (1 - shrink) * in_units + shrink * identity_like(in_units), variance


def _matrix_power(symmetric: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp_min(1e-8).pow(power) @ vectors.T


_MAPS = 512
"""Groups, evenly spread, whose covariances start the axes' matrices: many more than there are axes."""


class OperatorModel(nn.Module):
    r"""Affine operators of all conditions.

    .. math::
        K_\theta(z) = A_\theta z + b_\theta, \quad
        A_\theta = I + s D_c + \sum_k \alpha_k(\theta)\, U_k V_k^\top, \quad
        b_\theta = s\, b_c + \sum_k \beta_k(\theta)\, u_k - (A_\theta - I)\, m

    K shared axes, a baseline (D_c, b_c) per context, the strength s of the condition, and the centre m of the
    control cells, about which the linear part acts. Control is the identity exactly. A condition without a
    context (``Condition.context is None``) uses the shared part alone: that is how a context never seen is asked for.

    Parameters
    ----------
    n_latent
        d, the dimension of the latent space.
    perturbations, contexts
        Known names, without the control.
    n_axes
        K; by default as many as there are perturbations, at most 8.
    rank
        Rank of each axis' matrix; 0 gives pure shifts, None full rank.
    context_rank
        Rank of the contexts' own matrices D_c; 0 gives each context its own shift only, None no part of its own.
    pairs
        Measured pairs of perturbations, each of which gets an interaction term.

    Raises
    ------
    ModelError
        If there is no perturbation.

    References
    ----------
    Bunne et al. (2023), Nat. Methods 20:1759 (perturbations as maps between unpaired clouds); Lotfollahi et al.
    (2023), Mol. Syst. Biol. 19:e11517 (perturbation and context as parts that add up).
    """

    def __init__(
        self,
        n_latent: int,
        perturbations: Sequence[str],
        contexts: Sequence[str],
        *,
        n_axes: int | None = None,
        rank: int | None = None,
        context_rank: int | None = 0,
        pairs: Sequence[tuple[str, str]] = (),
    ):
        super().__init__()
        if not perturbations:
            raise ModelError("at least one perturbation", "none", "check perturbation_key and control")
        n_axes = min(len(perturbations), 8) if n_axes is None else n_axes
        rank = n_latent if rank is None else min(rank, n_latent)
        self.config: dict[str, Any] = {
            "n_latent": n_latent,
            "perturbations": list(perturbations),
            "contexts": list(contexts),
            "n_axes": n_axes,
            "rank": rank,
            "context_rank": context_rank,
            "pairs": [list(pair) for pair in pairs],
        }
        self.conditions = ConditionEncoder(perturbations, contexts, n_axes, pairs=pairs)
        self.axis_shift = nn.Parameter(torch.zeros(n_axes, n_latent))
        self.axis_left = nn.Parameter(torch.zeros(n_axes, n_latent, rank))
        self.axis_right = nn.Parameter(torch.eye(n_latent, rank).repeat(n_axes, 1, 1))
        own_rank = context_rank or 0
        self.context_shift = nn.Parameter(torch.zeros(len(contexts), n_latent))
        self.context_left = nn.Parameter(torch.zeros(len(contexts), n_latent, own_rank))
        self.context_right = nn.Parameter(torch.eye(n_latent, own_rank).repeat(len(contexts), 1, 1))
        if context_rank is None:
            self.context_shift.requires_grad_(False)
            self.conditions.modulation.requires_grad_(False)
        self.center: Tensor
        self.register_buffer("center", torch.zeros(n_latent))

    # -- operators ----------------------------------------------------------------------------------------

    def affine(self, design: Design) -> tuple[Tensor, Tensor]:
        """Matrices (condition, d, d) and shifts (condition, d), formed once per condition."""
        alpha, beta = self.conditions(design)
        weight = design.weight
        departure = alpha @ torch.bmm(self.axis_left, self.axis_right.mT).flatten(1)
        if self.context_left.shape[2]:
            departure = departure + weight @ (self.context_left @ self.context_right.mT).flatten(1)
        departure = departure.unflatten(1, (-1, len(self.center)))
        shift = torch.addmm(beta @ self.axis_shift, weight, self.context_shift)
        return identity_like(departure) + departure, shift - departure @ self.center

    def forward(self, z: Tensor, sizes: Sequence[int], matrices: Tensor, shifts: Tensor) -> Tensor:
        """Move cells (cell, d), concatenated by condition with `sizes` cells each, by :meth:`affine`'s result."""
        if len(set(sizes)) == 1:
            grouped = z.reshape(len(sizes), -1, z.shape[-1])
            return torch.baddbmm(shifts.unsqueeze(1), grouped, matrices.mT).view_as(z)
        parts = zip(z.split(list(sizes)), matrices, shifts, strict=True)
        return torch.cat([torch.addmm(shift, cells, matrix.T) for cells, matrix, shift in parts])

    @torch.no_grad()
    def operator(self, condition: Condition) -> AffineOperator:
        """The condition's operator as an object that can be applied, composed, inverted and raised to a power.

        It lies on the CPU, wherever the model is: what is asked of it is small.

        Raises
        ------
        LabelError
            For a perturbation or context that the model was not fitted with.
        """
        matrices, shifts = self.affine(self.conditions.design([condition]))
        return AffineOperator(matrices[0].cpu(), shifts[0].cpu(), str(condition))

    # -- what is added to the energy distance ---------------------------------------------------------------

    def ridge(self, matrices: Tensor) -> Tensor:
        r"""Departure from the identity: mean over conditions of :math:`\|A_\theta - I\|_F^2`."""
        return (matrices - identity_like(matrices)).square().sum() / len(matrices)

    def context_ridge(self) -> Tensor:
        r"""Size of the contexts' own parts: mean over contexts of
        :math:`\|D_c\|_F^2 + \|b_c\|^2 + \|m_c\|^2`."""
        parts: list[Tensor] = [self.context_shift, self.conditions.modulation]
        if self.context_left.shape[2]:
            parts.append((self.context_left @ self.context_right.mT).flatten(1))
        return torch.cat(parts, 1).square().sum() / len(self.context_shift)

    # -- the start --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_from(
        self, conditions: Sequence[Condition], controls: Sequence[Tensor], perturbed: Sequence[Tensor]
    ) -> OperatorModel:
        """Set shifts by matched group means, and matrices by Gaussian moment matching where cells allow.

        A group takes part in the moment matching when both of its clouds have more than 2 d cells. A model of
        rank 0, or one where no group has them, starts from shifts alone.

        Parameters
        ----------
        conditions
            One per group.
        controls, perturbed
            Latents (cell, d) of each group's matched control cells and of its perturbed cells.
        """
        means = _means(controls)
        shifts = _means(perturbed) - means
        self.center.copy_(means.mean(0))
        self._forget()
        design = self.conditions.design(conditions)
        effects, _ = shared_effects(design, len(self.conditions.perturbations), controls, perturbed)
        self._start_embedding(effects.to(self.axis_shift))
        self._start_matrices(design, controls, perturbed)
        alpha, _ = self.conditions(design)
        departure = torch.einsum("nk,kij->nij", alpha, self.axis_left @ self.axis_right.mT)
        linear = torch.einsum("nij,nj->ni", departure, means - self.center)
        self.axis_shift.copy_(_least_squares(alpha, design.sums(effects) - linear))
        if self.context_shift.requires_grad:
            left_over = shifts - linear - alpha @ self.axis_shift
            self.context_shift.copy_(_least_squares(design.weight, left_over))
        return self

    def _forget(self) -> None:
        """Back to what a new model holds, wherever the start below does not write."""
        own = (self.context_left, self.context_shift, self.conditions.interaction, self.conditions.modulation)
        for parameter in (*own, self.axis_left, self.axis_shift):
            parameter.zero_()
        nn.init.eye_(self.conditions.to_alpha)

    def _start_embedding(self, effects: Tensor) -> None:
        """Embeddings along the main directions of the perturbations' effects, of length about one."""
        scores, _, _ = torch.linalg.svd(effects, full_matrices=False)
        # Axes beyond the number of directions keep a first embedding: at zero they would never get a gradient.
        embedding = self.conditions.embedding.copy_(first_embedding(*self.conditions.embedding.shape))
        kept = min(embedding.shape[1], scores.shape[1])
        embedding[:, :kept] = scores[:, :kept] * len(effects) ** 0.5

    def _start_matrices(
        self, design: Design, controls: Sequence[Tensor], perturbed: Sequence[Tensor]
    ) -> None:
        d, rank = self.axis_left.shape[1:]
        sizes = [min(len(a), len(b)) for a, b in zip(controls, perturbed, strict=True)]
        enough = [k for k, size in enumerate(sizes) if size > 2 * d]
        if not rank or not enough:
            return
        enough = enough[:: -(-len(enough) // _MAPS)]
        maps = torch.stack([gaussian_map(controls[k], perturbed[k]) for k in enough])
        departure = maps - torch.eye(d, dtype=maps.dtype, device=maps.device)
        alpha, _ = self.conditions(design)
        alpha = alpha[enough]
        axes = _least_squares(alpha, departure.flatten(1)).unflatten(1, (d, d))
        left, size, right = torch.linalg.svd(axes)
        root = size[:, :rank].sqrt().unsqueeze(1)
        self.axis_left.copy_(left[:, :, :rank] * root)
        self.axis_right.copy_(right[:, :rank].mT * root)

    @torch.no_grad()
    def _repr_html_(self) -> str:
        c, encoder = self.config, self.conditions
        contexts: list[str | None] = [*encoder.contexts] or [None]
        conditions = [Condition((name,), context) for context in contexts for name in encoder.perturbations]
        matrices, _ = self.affine(encoder.design(conditions))
        norms = torch.linalg.matrix_norm(matrices, 2)
        largest = int(norms.argmax())
        facts = {
            "perturbations": encoder.perturbations,
            "contexts": encoder.contexts,
            "measured pairs": ["+".join(pair) for pair in encoder.pairs] or None,
            "latent dimensions": c["n_latent"],
            "shared axes": f"{c['n_axes']} of rank {c['rank']}",
            "largest spectral norm": f"{float(norms[largest]):.3f} ({conditions[largest]})",
            "mean departure from the identity": float(
                (matrices - identity_like(matrices)).norm(dim=(1, 2)).mean()
            ),
        }
        return card("Operator family: z -> A z + b for every condition", facts)

    def extra_repr(self) -> str:
        c = self.config
        return f"d={c['n_latent']}, {c['n_axes']} axes of rank {c['rank']}, context rank {c['context_rank']}"


def _least_squares(design: Tensor, target: Tensor) -> Tensor:
    """Minimum-norm least squares; `design` may lack columns' worth of groups (then those rows stay zero)."""
    return torch.linalg.pinv(design) @ target


# -- the stability penalty -------------------------------------------------------------------------------


def spectral_excess(matrices: Tensor, max_norm: float) -> Tensor:
    r"""Stability penalty of operators (condition, d, d), averaged over conditions.

    .. math:: \frac1n \sum_\theta \max(0, \|A_\theta\|_2 - \rho)^2

    It acts on the operators of the conditions themselves; bounding the norms of their parts apart would not
    bound their sum. The norm is the exact largest singular value; on a CPU the decomposition is left out where
    :math:`1 + \|A_\theta - I\|_F` or :func:`norm_bound` already is below rho.
    """
    if host.looks_are_free(matrices.device):
        departure = matrices.detach() - identity_like(matrices)
        if 1 + float(departure.flatten(1).norm(dim=1).amax()) <= max_norm:
            return matrices.new_zeros(())
        bound = norm_bound(matrices.detach())
        if bool(bound.isnan().any()):
            return matrices.sum() * torch.nan  # the decomposition would raise; the guard names what it sees
        beyond = bound > max_norm
        if not bool(beyond.any()):
            return matrices.new_zeros(())
        excess = (torch.linalg.matrix_norm(matrices[beyond], 2) - max_norm).clamp_min(0)
        return excess.square().sum() / len(matrices)
    return (_largest_singular_value(matrices) - max_norm).clamp_min(0).square().mean()


def identity_like(matrices: Tensor) -> Tensor:
    """I (d, d) for matrices (..., d, d)."""
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def _largest_singular_value(matrices: Tensor) -> Tensor:
    r"""Spectral norms (condition,) by products alone: a decomposition makes the host wait for its outcome.

    .. math:: \|A\|_2 \approx \|A v\| / \|v\|, \qquad v = (A^\top A)^{2^{12}} w

    with w the column of largest norm; low by a share of at most :math:`\log(d) / 2^{13}`, five digits or more where
    the second singular value is a per cent smaller.
    """
    with torch.no_grad():
        power = _of_size_one(torch.bmm(matrices.mT, matrices))
        for doubling in range(1, 13):
            power = torch.bmm(power, power)
            if doubling % 3 == 0:  # entries of at most 1 have grown to at most d^7
                power = _of_size_one(power)
        largest = power.square().sum(1).argmax(1)
        vector = power.gather(2, largest.view(-1, 1, 1).expand(-1, power.shape[1], 1))
        vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
    return torch.bmm(matrices, vector).norm(dim=(1, 2))


def _of_size_one(matrices: Tensor) -> Tensor:
    """Matrices (condition, d, d) scaled so that the largest entry of each is 1 (or 0)."""
    return matrices / matrices.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(matrices.dtype).tiny)


def norm_bound(matrices: Tensor) -> Tensor:
    r"""Upper bound (condition,) of the spectral norms of (condition, d, d), by products alone.

    .. math:: \|A\|_2 \le \|(A^\top A)^4\|_F^{1/8} \le d^{1/16}\, \|A\|_2

    NaN where a matrix is not finite; infinity where its powers overflow.
    """
    size = matrices.flatten(1).norm(dim=1)
    gram = torch.bmm(matrices.mT, matrices)
    for _ in range(2):
        gram = torch.bmm(gram, gram)
    bound = gram.flatten(1).norm(dim=1).pow(1 / 8)
    return torch.where(size.isfinite(), torch.where(bound.isnan(), torch.inf, bound), torch.nan)
