"""The six defects of the report that this package grew from, in their old form, and how they are measured.

Everything named ``old_*`` is wrong on purpose. It is kept to be shown beside the right form (``own_*``, which
calls the package's own code) in the tests; nothing of the package uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from statistics import median
from types import SimpleNamespace

import pandas as pd
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from cellop_nb.errors import CellopError
from cellop_nb.models.energy import energy_distance
from cellop_nb.models.likelihood import nb_log_likelihood, nb_log_likelihood_logits
from cellop_nb.models.vae import DecoderNB, Encoder, kl_to_standard_normal, sample_z

# -- 1, critical: a chunked energy distance keeps the gradient of its last block only ------------------------


def old_energy(x: Tensor, y: Tensor, tile: int) -> Tensor:
    """Energy distance (Euclidean, U-statistic) in blocks; all blocks but the last are added as numbers."""
    n, m = len(x), len(y)
    total = torch.zeros(())
    for block in x.split(tile):
        cross, within = torch.cdist(block, y).sum(), torch.cdist(block, x).sum()
        total = total.detach() + 2 * cross / (n * m) - within / (n * (n - 1))
    return total - torch.cdist(y, y).sum() / (m * (m - 1))


def dense_energy(x: Tensor, y: Tensor) -> Tensor:
    """The same without blocks, by autograd through all pairs: right, but in memory O(n m)."""
    return old_energy(x, y, len(x))


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Gradient of a scalar function, of the shape of `at`."""
    leaf = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((value - reference).norm() / reference.norm())


# -- 2, critical: gradients of a frozen encoder; A and b kept for every cell ---------------------------------


def old_operator_loss(vae, operators, batch, target: Tensor, design) -> Tensor:
    """The encoder runs with its graph in every step, and each cell gets its own copy of the operator.

    Parameters
    ----------
    batch
        Control cells with ``x``, ``library`` and ``covariates``.
    target
        (cell, d) latents of the perturbed cells.
    design
        Of one condition.
    """
    z = vae.encode(batch.x, batch.library, batch.covariates).loc
    matrices, shifts = operators.affine(design)
    per_cell, shift = matrices.repeat(len(z), 1, 1), shifts.repeat(len(z), 1)
    moved = (per_cell * z.unsqueeze(1)).sum(-1) + shift
    return dense_energy(moved, target)


def cached_operator_loss(operators, z: Tensor, target: Tensor, design) -> Tensor:
    """The right form: latents (cell, d) from the cache, one operator for the group."""
    return energy_distance(operators(z, [len(z)], *operators.affine(design)), target)


def backward_seconds(loss: Callable[[], Tensor], *, repeats: int = 9) -> float:
    """Median seconds of the backward pass alone."""
    seconds = []
    for _ in range(repeats):
        value = loss()
        wanted = [leaf for leaf in _leaves(value) if leaf.requires_grad]
        start = time.perf_counter()
        torch.autograd.grad(value, wanted, allow_unused=True)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def _leaves(value: Tensor) -> list[Tensor]:
    """Parameters that a graph ends in."""
    found, waiting, seen = [], [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [parent for parent, _ in node.next_functions]
    return found


# -- 3, high: exp(logvar) overflows; 6, medium: exp(log_dispersion) can vanish -------------------------------


def old_variance(log_variance: Tensor) -> Tensor:
    """No bound: infinite above 88.7 in single precision, and far too large long before."""
    return torch.exp(log_variance)


def old_kl(log_variance: Tensor) -> Tensor:
    """Divergence of N(0, exp(logvar)) from N(0, 1), summed."""
    return 0.5 * (old_variance(log_variance) - 1 - log_variance).sum()


def old_sample(log_variance: Tensor) -> Tensor:
    """Reparameterised sample with noise 1 and mean 0."""
    return torch.exp(0.5 * log_variance).sum()


def own_posterior(log_variance: Tensor) -> Normal:
    """What the encoder makes of a log variance that its last layer gives, with mean 0."""
    flat = log_variance.reshape(-1)
    encoder, zeros = Encoder(1, len(flat), n_hidden=1), torch.zeros(len(flat), 1)
    mean = {"mean.weight": zeros, "mean.bias": zeros[:, 0]}
    given = {"log_variance.weight": zeros, "log_variance.bias": flat, **mean}
    return torch.func.functional_call(encoder, given, (torch.ones(1, 1), torch.ones(1)))


def own_kl(log_variance: Tensor) -> Tensor:
    """The right form of :func:`old_kl`: the log variance is bounded, and its gradient goes through."""
    return kl_to_standard_normal(own_posterior(log_variance)).sum()


def own_sample(log_variance: Tensor) -> Tensor:
    """The right form of :func:`old_sample`."""
    return sample_z(own_posterior(log_variance), torch.Generator().manual_seed(0)).sum()


def old_dispersion(log_dispersion: Tensor) -> Tensor:
    """No lower bound: exactly 0 below -103 in single precision."""
    return torch.exp(log_dispersion)


def own_dispersion(log_dispersion: Tensor) -> Tensor:
    """The right form, as the decoder has it: inside [1e-4, 1e6]."""
    return DecoderNB.dispersion.fget(SimpleNamespace(log_dispersion=log_dispersion))  # type: ignore[attr-defined]


# -- 4, high: lgamma is NaN or infinite for r near 0 and x < 0 -----------------------------------------------


def old_nb(x: Tensor, mu: Tensor, r: Tensor) -> Tensor:
    """Log-likelihood (cell,) of NB(mu, r) as in the textbook: no bounds, and nothing is refused."""
    terms = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    return (terms + r * torch.log(r / (r + mu)) + x * torch.log(mu / (r + mu))).sum(-1)


def old_decoder_nb(x: Tensor, logits: Tensor, library: Tensor, r: Tensor) -> Tensor:
    """The same from logits (cell, gene): exp, without subtracting the largest logit first."""
    odds = torch.exp(logits)
    return old_nb(x, library.unsqueeze(-1) * odds / odds.sum(-1, keepdim=True), r)


# -- 5, high: the loop goes on after a NaN -------------------------------------------------------------------


def bare_loop(model: nn.Module, terms: Callable, batches: Iterable, *, guard=None, lr: float = 0.01) -> None:
    """Train `model` in place: the report's loop without `guard`, which goes on after a NaN.

    Parameters
    ----------
    terms
        batch -> dictionary of named loss terms.
    guard
        ``guard(model, optimizer)`` gives a guard, as :class:`cellop_nb.training.guard.NonFiniteGuard` does.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    guard = guard and guard(model, optimizer)
    trainer = SimpleNamespace(epoch=0, loss_terms=terms)
    for trainer.step, trainer.batch in enumerate(batches):
        optimizer.zero_grad()
        loss = terms(trainer.batch)
        if guard:
            guard.begin_step(trainer)
        sum(loss.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if guard:
            guard.check(trainer, loss, norm)
        optimizer.step()
        if guard:
            guard.after_step(trainer)


def nonfinite_parameters(model: nn.Module) -> int:
    """How many numbers among a model's parameters are NaN or infinite."""
    return sum(int((~torch.isfinite(parameter)).sum()) for parameter in model.parameters())


# -- what happens --------------------------------------------------------------------------------------------


def path_gradients(loss: Tensor, stops: dict[str, Tensor]) -> pd.DataFrame:
    """Gradient of a loss at each stop of a path, first stop first.

    Returns
    -------
    One row per stop: its name, ``shape``, ``grad_norm``, ``zero_share`` and whether it is ``finite``.
    """
    slopes = torch.autograd.grad(loss, list(stops.values()), allow_unused=True)
    rows = []
    for (name, place), slope in zip(stops.items(), slopes, strict=True):
        slope = torch.zeros_like(place) if slope is None else slope
        numbers = float(slope.norm()), float((slope == 0).double().mean()), bool(slope.isfinite().all())
        rows.append((name, " x ".join(map(str, place.shape)), *numbers))
    return pd.DataFrame(rows, columns=["stop", "shape", "grad_norm", "zero_share", "finite"])


def outcome(function: Callable[[Tensor], Tensor], at: Tensor | float) -> dict:
    """Value and gradient of a function at one place, or its refusal.

    Returns
    -------
    Dictionary with ``value`` (summed), ``gradient`` (its norm), ``sound`` (both finite, or refused with a
    reason), ``huge`` (one of them not below 1e9, where it drowns all else) and ``words``.
    """
    leaf = torch.as_tensor(at, dtype=torch.float32).clone().requires_grad_()
    nothing = float("nan")
    try:
        value = function(leaf).sum()
        slope = torch.autograd.grad(value, leaf)[0].norm()
    except CellopError as refusal:
        words = "refused: " + str(refusal).partition(" To fix it")[0]
        return {"value": nothing, "gradient": nothing, "sound": True, "huge": False, "words": words}
    sound = bool(torch.isfinite(value) & torch.isfinite(slope))
    found = {"value": float(value.detach()), "gradient": float(slope), "sound": sound}
    huge = not max(abs(found["value"]), found["gradient"]) < 1e9
    return found | {"huge": huge, "words": f"value {found['value']:.3g}, gradient {found['gradient']:.3g}"}


def extremes() -> pd.DataFrame:
    """The risk points at inputs where plain code breaks: the old form and the right one, evaluated now.

    Returns
    -------
    One row per input: ``place``, ``input``, ``defect`` (its number in the report, 0 for none), ``old`` and
    ``ours`` (what happened, in words), ``old_faulty`` (not finite, or above 1e9), ``ours_sound`` (finite, or
    refused with a reason) and ``how``, what makes the difference.
    """
    rows = []
    for place, given, defect, old, own, at, how in _pairs():
        before, now = outcome(old, at), outcome(own, at)
        faulty = not before["sound"] or before["huge"]
        rows.append((place, given, defect, before["words"], now["words"], faulty, now["sound"], how))
    names = ["place", "input", "defect", "old", "ours", "old_faulty", "ours_sound", "how"]
    return pd.DataFrame(rows, columns=names)


def _pairs() -> list[tuple]:
    x, mu, three = torch.tensor([[0.0, 1.0, 50.0]]), torch.full((1, 3), 2.0), torch.ones(3)
    library, far = torch.full((1,), 100.0), torch.tensor([[0.0, 100.0, 0.0]])

    def by_r(nb):
        return lambda r: nb(x, mu, r.expand(3))

    def by_x(nb):
        return lambda first: nb(torch.stack([first, x[0, 1], x[0, 2]]).unsqueeze(0), mu, three)

    def by_logits(nb):
        return lambda logits: nb(x, logits, library, three)

    def by_dispersion(nb, dispersion):
        return lambda log_dispersion: nb(x, mu, dispersion(log_dispersion).expand(3))

    ours = nb_log_likelihood
    thin = by_dispersion(old_nb, old_dispersion), by_dispersion(ours, own_dispersion)
    softmax = by_logits(old_decoder_nb), by_logits(nb_log_likelihood_logits)
    bounded, refused = "bounded, the gradient lives on", "refused, with the reason"
    return [
        ("sample_z", "logvar = 800", 3, old_sample, own_sample, 800.0, bounded),
        ("ELBO", "logvar = 25", 3, old_kl, own_kl, 25.0, bounded),
        ("ELBO", "logvar = 800", 3, old_kl, own_kl, 800.0, bounded),
        ("NB log likelihood", "r = 1e-30", 4, by_r(old_nb), by_r(ours), 1e-30, "r bounded below"),
        ("NB log likelihood", "r = 0", 4, by_r(old_nb), by_r(ours), 0.0, refused),
        ("NB log likelihood", "count = -1", 4, by_x(old_nb), by_x(ours), -1.0, refused),
        ("decoder", "log dispersion = -120", 6, *thin, -120.0, bounded),
        ("decoder", "one logit = 100", 0, *softmax, far, "softmax, largest logit first"),
    ]
