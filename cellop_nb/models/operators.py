"""The operator family: one affine map per condition, built from shared response axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ModelError, three_beats
from ..views import card
from .affine import AffineOperator
from .conditions import Condition, ConditionEncoder, Design, first_embedding
from .spectral import identity_like


def gaussian_map(control: Tensor, perturbed: Tensor, *, shrink: float = 0.1) -> Tensor:
    r"""Matrix (d, d) of the optimal transport map between the Gaussians with the clouds' covariances.

    .. math:: A = S_0^{-1/2} (S_0^{1/2} S_1 S_0^{1/2})^{1/2} S_0^{-1/2}

    Covariances are shrunk towards their mean variance by the share `shrink`.

    References
    ----------
    Dowson and Landau (1982), J. Multivariate Anal. 12:450.
    """
    first, second = (_shrunk_covariance(cloud, shrink) for cloud in (control, perturbed))
    root, inverse_root = _matrix_power(first, 0.5), _matrix_power(first, -0.5)
    return inverse_root @ _matrix_power(root @ second @ root, 0.5) @ inverse_root


def _shrunk_covariance(cloud: Tensor, shrink: float) -> Tensor:
    covariance = torch.cov(cloud.T)
    target = covariance.diagonal().mean() * torch.eye(len(covariance), dtype=cloud.dtype, device=cloud.device)
    return (1 - shrink) * covariance + shrink * target


def _matrix_power(symmetric: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp_min(1e-8).pow(power) @ vectors.T


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
    features
        (perturbation, feature) given descriptors in the order of `perturbations`; without them each
        perturbation has a learned embedding.

    Raises
    ------
    ModelError
        If there is no perturbation, or not one row of features for each.

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
        features: Tensor | None = None,
    ):
        super().__init__()
        if not perturbations:
            raise ModelError(
                three_beats("at least one perturbation", "none", "check perturbation_key and control")
            )
        n_axes = min(len(perturbations), 8) if n_axes is None else n_axes
        rank = n_latent if rank is None else min(rank, n_latent)
        self.config = {
            "n_latent": n_latent,
            "perturbations": list(perturbations),
            "contexts": list(contexts),
            "n_axes": n_axes,
            "rank": rank,
            "context_rank": context_rank,
            "pairs": [list(pair) for pair in pairs],
        }
        self.conditions = ConditionEncoder(perturbations, contexts, n_axes, pairs=pairs, features=features)
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
        departure = alpha @ self._axes().flatten(1)
        if self.context_left.shape[2]:
            departure = departure + weight @ (self.context_left @ self.context_right.mT).flatten(1)
        departure = departure.unflatten(1, (-1, len(self.center)))
        shift = torch.addmm(beta @ self.axis_shift, weight, self.context_shift)
        return identity_like(departure) + departure, shift - departure @ self.center

    def _axes(self) -> Tensor:
        """Matrices of the shared axes, (axis, d, d)."""
        return torch.bmm(self.axis_left, self.axis_right.mT)

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

    def matrix(self, condition: Condition) -> Tensor:
        """A of the condition, (d, d)."""
        return self.operator(condition).matrix

    def shift(self, condition: Condition) -> Tensor:
        """b of the condition, (d,)."""
        return self.operator(condition).shift

    def norm(self, condition: Condition) -> float:
        """Largest singular value of the condition's A."""
        return self.operator(condition).norm

    # -- what is added to the energy distance ---------------------------------------------------------------

    def ridge(self, matrices: Tensor) -> Tensor:
        r"""Departure from the identity: mean over conditions of :math:`\|A_\theta - I\|_F^2`."""
        return (matrices - identity_like(matrices)).square().sum() / len(matrices)

    def context_ridge(self) -> Tensor:
        r"""Size of the contexts' own parts: mean over contexts of
        :math:`\|D_c\|_F^2 + \|b_c\|^2 + \|m_c\|^2`."""
        parts = [self.context_shift, self.conditions.modulation]
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
        means = torch.stack([cells.mean(0) for cells in controls])
        shifts = torch.stack([cells.mean(0) for cells in perturbed]) - means
        self.center.copy_(means.mean(0))
        self._forget()
        design = self.conditions.design(conditions)
        self._start_embedding(design, shifts)
        self._start_matrices(design, controls, perturbed)
        alpha, _ = self.conditions(design)
        departure = torch.einsum("nk,kij->nij", alpha, self.axis_left @ self.axis_right.mT)
        wanted = shifts - torch.einsum("nij,nj->ni", departure, means - self.center)
        self.axis_shift.copy_(_least_squares(alpha, wanted))
        if self.context_shift.requires_grad:
            left_over = wanted - alpha @ self.axis_shift
            self.context_shift.copy_(_least_squares(design.weight, left_over))
        return self

    def _forget(self) -> None:
        """Back to what a new model holds, wherever the start below does not write."""
        own = (self.context_left, self.context_shift, self.conditions.interaction, self.conditions.modulation)
        for parameter in (*own, self.axis_left, self.axis_shift):
            parameter.zero_()
        nn.init.eye_(self.conditions.to_alpha)

    def _start_embedding(self, design: Design, shifts: Tensor) -> None:
        """Embeddings along the main directions of the perturbations' mean shifts, of length about one."""
        single = _least_squares(design.doses, shifts)
        scores, _, _ = torch.linalg.svd(single, full_matrices=False)
        n_axes = self.axis_shift.shape[0]
        # Axes beyond the number of directions keep a first embedding: at zero they would never get a gradient.
        embedding = first_embedding(len(single), n_axes).to(single)
        kept = min(n_axes, scores.shape[1])
        embedding[:, :kept] = scores[:, :kept] * len(single) ** 0.5
        features = self.conditions.features
        self.conditions.embedding.copy_(
            embedding if features is None else _least_squares(features, embedding)
        )

    def _start_matrices(
        self, design: Design, controls: Sequence[Tensor], perturbed: Sequence[Tensor]
    ) -> None:
        d, rank = self.axis_left.shape[1:]
        enough = [min(len(a), len(b)) > 2 * d for a, b in zip(controls, perturbed, strict=True)]
        if not rank or not any(enough):
            return
        pairs = zip(controls, perturbed, enough, strict=True)
        maps = torch.stack([gaussian_map(a, b) for a, b, good in pairs if good])
        departure = maps - torch.eye(d, dtype=maps.dtype, device=maps.device)
        alpha, _ = self.conditions(design)
        alpha = alpha[torch.tensor(enough, device=alpha.device)]
        axes = _least_squares(alpha, departure.flatten(1)).unflatten(1, (d, d))
        left, size, right = torch.linalg.svd(axes)
        root = size[:, :rank].sqrt().unsqueeze(1)
        self.axis_left.copy_(left[:, :, :rank] * root)
        self.axis_right.copy_(right[:, :rank].mT * root)

    @torch.no_grad()
    def _repr_html_(self) -> str:
        c, known = self.config, self.conditions
        places: list[str | None] = [*known.contexts] or [None]
        wanted = [Condition((name,), context) for context in places for name in known.perturbations]
        matrices, _ = self.affine(known.design(wanted))
        norms = torch.linalg.matrix_norm(matrices, 2)
        largest = int(norms.argmax())
        facts = {
            "perturbations": known.perturbations,
            "contexts": known.contexts,
            "measured pairs": ["+".join(pair) for pair in known.pairs] or None,
            "latent dimensions": c["n_latent"],
            "shared axes": f"{c['n_axes']} of rank {c['rank']}",
            "largest spectral norm": f"{float(norms[largest]):.3f} ({wanted[largest]})",
            "mean departure from the identity": float(
                (matrices - torch.eye(matrices.shape[-1]).to(matrices)).norm(dim=(1, 2)).mean()
            ),
        }
        return card("Operator family: z -> A z + b for every condition", facts)

    def extra_repr(self) -> str:
        c = self.config
        return f"d={c['n_latent']}, {c['n_axes']} axes of rank {c['rank']}, context rank {c['context_rank']}"


def _least_squares(design: Tensor, target: Tensor) -> Tensor:
    """Minimum-norm least squares; `design` may lack columns' worth of groups (then those rows stay zero)."""
    return torch.linalg.pinv(design) @ target
