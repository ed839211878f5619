"""Is a fit sound? What the loss reaches, how far operators can be trusted, what a VAE gives back and its latents hold."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from types import FrameType

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.contract import keys_of, label_table, library_size, obs_labels
from ..data.counts import model_counts
from ..data.groups import representation
from ..data.splits import rows_of
from ..errors import LabelError, ModelError, checked
from ..models.affine import AffineOperator
from ..models.likelihood import nb_log_likelihood
from ..models.operators import Condition
from ..models.vae import NBVAE, elbo_loss, sample_z
from ..training.locate import (
    RunningModules,
    caller,
    is_finite,
    owner_of_parameter,
    storage_address,
    tensors_in,
    unchanged_buffers,
)
from ..training.vae import new_vae

__all__ = [
    "affine_health",
    "gradient_audit",
    "leaks",
    "operator_health",
    "posterior_check",
]

MAX_CONDITION = 1e7  # the limit of AffineOperator.inverse
SLOW_GROWTH = 1.05  # spectral radius that ten applications turn into a factor of 1.6

_ADVICE = {
    "ok": "",
    "frozen": "right if this part shall not be trained; else set requires_grad",
    "not reached": "the optimiser will never change it: see path_ends",
    "zero gradient": "the gradient is 0: look for saturated or dead units, or a clamp",
    "non-finite": "train under the non-finite guard, which names the operation",
}


@dataclass
class _Cut:
    """An operation that passes values on but no gradient.

    Autograd itself detaches what it keeps for the backward pass; such a copy takes no part in what follows.
    """

    text: str
    parameters: frozenset[str]
    addresses: frozenset[int]
    followed: bool = False


def gradient_audit(model: nn.Module, loss: Callable) -> pd.DataFrame:
    """What the gradient of a loss does at each parameter of a model.

    Parameters
    ----------
    model
        Any module.
    loss
        Function without arguments that computes a 0-d tensor, or a dictionary of named terms; it is watched.

    Returns
    -------
    One row per parameter:

    - ``parameter``, ``module``, ``shape``
    - ``reached``: the loss has a gradient there (a zero gradient is one)
    - ``grad_norm``, ``weight_norm`` (Euclidean) and ``grad_to_weight``, their ratio
    - ``zero_share``: share of entries with a gradient of exactly zero
    - ``dead_units``: rows (first axis) whose whole gradient is zero
    - ``status``: ok, frozen, not reached, zero gradient or non-finite
    - ``path_ends``: first operation that cut the path from parameter to loss
    - ``advice``

    Gradients held in ``.grad``, buffers and the global random state are left as they were.

    Raises
    ------
    ModelError
        If `loss` is no function, or its result is not a scalar.
    """
    if not callable(loss):
        fix = "pass lambda: ... around what computes it: only what is watched can be explained"
        raise ModelError("a function that computes the loss", type(loss).__name__, fix)
    flow = _Flow(model)
    with unchanged_buffers(model):  # until after the backward pass, which may need them as they became
        with torch.random.fork_rng(devices=[]), flow.scopes, flow:
            value = loss()
            value = reduce(add, value.values()) if isinstance(value, dict) else value
        if not isinstance(value, Tensor) or value.numel() != 1:
            problem = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ModelError("a scalar loss", problem, "take the mean or sum of it")
        gradients = _gradients(model, value)
    rows = [_row(name, p, gradients.get(name), flow) for name, p in model.named_parameters()]
    return pd.DataFrame(rows)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained or not loss.requires_grad:
        return {}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {name: grad for name, grad in zip(trained, gradients, strict=True) if grad is not None}


def _row(name: str, parameter: nn.Parameter, gradient: Tensor | None, flow: _Flow) -> dict:
    status, weight = _status(parameter, gradient), parameter.detach()
    slope = torch.zeros_like(weight) if gradient is None else gradient
    units = slope.reshape(*(slope.shape[:1] or (1,)), math.prod(slope.shape[1:]))
    norm, size = float(slope.double().norm()), float(weight.double().norm())
    return {
        "parameter": name,
        "module": owner_of_parameter(name),
        "shape": tuple(parameter.shape),
        "reached": gradient is not None,
        "grad_norm": norm,
        "weight_norm": size,
        "grad_to_weight": norm / size if size else math.nan,
        "zero_share": float((slope == 0).double().mean()),
        "dead_units": int((units == 0).all(1).sum()),
        "status": status,
        "path_ends": flow.end_of(name) if status == "not reached" else "",
        "advice": _ADVICE[status],
    }


def _status(parameter: nn.Parameter, gradient: Tensor | None) -> str:
    if gradient is None:
        return "not reached" if parameter.requires_grad else "frozen"
    if not is_finite(gradient):
        return "non-finite"
    return "ok" if bool((gradient != 0).any()) or not gradient.numel() else "zero gradient"


class _Flow(TorchDispatchMode):
    """Follows which parameters each value depends on, and notes operations that cut the gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scopes = RunningModules(model)
        self._kept: list[Tensor] = []  # so that no storage address is used twice
        self._depends: dict[int, frozenset[str]] = {}
        self._cuts: list[_Cut] = []
        self._last_use: dict[str, str] = {}
        self._own = {name: storage_address(p) for name, p in model.named_parameters() if p.numel()}
        for name, address in self._own.items():
            self._depends[address] = self._depends.get(address, frozenset()) | {name}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors_in([args, kwargs])
        self._follow(inputs)
        parameters = [self._depends.get(storage_address(tensor), frozenset()) for tensor in inputs]
        out = func(*args, **kwargs)
        depends = frozenset().union(*parameters)
        if not depends:
            return out
        outputs = tensors_in(out)
        self._note(func.overloadpacket.__name__, inputs, outputs, depends)
        for tensor in outputs:
            self._kept.append(tensor)
            address = storage_address(tensor)
            self._depends[address] = self._depends.get(address, frozenset()) | depends
        return out

    def _note(self, name: str, inputs: list, outputs: list, depends: frozenset[str]) -> None:
        position = self._position(name)
        self._last_use.update(dict.fromkeys(depends, position))
        if not any(tensor.requires_grad for tensor in inputs):
            return
        text = ""
        if name == "detach":
            text = position
        elif not torch.is_grad_enabled():
            text = f"no_grad around {position}"
        elif not any(tensor.is_floating_point() for tensor in outputs):
            text = f"no derivative of {position}"
        if text and not _in_function():
            self._cuts.append(_Cut(text, depends, frozenset(map(storage_address, outputs))))

    def _follow(self, inputs: list) -> None:
        """Mark the cuts whose result, now without a gradient, is used: the latest where several share it."""
        constants = {storage_address(tensor) for tensor in inputs if not tensor.requires_grad}
        for cut in reversed(self._cuts):
            cut.followed = cut.followed or bool(cut.addresses & constants)
            constants -= cut.addresses

    def _position(self, name: str) -> str:
        module, line = self.scopes.current, caller("diagnose.py")
        return f"{name}{f' in module {module!r}' if module else ''}{f' at {line}' if line else ''}"

    def end_of(self, parameter: str) -> str:
        """Where the path from a parameter to the loss ends."""
        last = self._last_use.get(parameter)
        for cut in self._cuts:
            ends_here = cut.followed or (last is not None and cut.text.endswith(last))
            if parameter in cut.parameters and ends_here:
                return cut.text
        return f"its last use is {last}; that result does not enter the loss" if last else "never used"


def _in_function() -> bool:
    """Whether this runs in the forward of an `autograd.Function`, which has a backward of its own."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            return True
        frame = frame.f_back
    return False


# -- health of operators ---------------------------------------------------------------------------------------------


@checked
def affine_health(A, b, *, max_norm: float = 3.0) -> dict:
    r"""Numbers that say how far an affine operator :math:`K(z) = A z + b` can be trusted.

    Parameters
    ----------
    A
        Matrix (d, d).
    b
        Shift (d,), in units of the latent.
    max_norm
        Spectral norm above which one application is called too large; training penalises the same number.

    Returns
    -------
    Dictionary with

    - ``spectral_norm``: largest stretch of one application; ``spectral_radius``: growth per application in
      the long run; ``condition_number`` of A
    - ``real_logarithm``: whether a real principal logarithm exists (part strengths are defined)
    - ``growth_10``: :math:`\|A^{10}\|_2`, which shows growth that the radius hides; ``drift_10``: how far ten
      applications move the origin
    - ``verdict``: green, amber or red, and ``advice``

    References
    ----------
    Trefethen and Embree (2005), Spectra and Pseudospectra, chapters 14 to 17.
    Culver (1966), Proc. Amer. Math. Soc. 17:1146.
    """
    A, b = np.asarray(A, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not (np.isfinite(A).all() and np.isfinite(b).all()):
        nothing = dict.fromkeys(_NUMBERS, math.nan) | {"real_logarithm": False}
        advice = "the operator is not finite: load the last finite state"
        return nothing | {"verdict": "red", "advice": advice}
    operator = AffineOperator(torch.as_tensor(A), torch.as_tensor(b))
    singular = np.linalg.svd(A, compute_uv=False)
    growth = drift = math.inf
    with np.errstate(over="ignore", invalid="ignore"):
        tenth = np.linalg.matrix_power(operator.homogeneous, 10)
        if np.isfinite(tenth).all():
            growth, drift = np.linalg.norm(tenth[:-1, :-1], 2), np.linalg.norm(tenth[:-1, -1])
    health = {
        "spectral_norm": float(singular[0]),
        "spectral_radius": float(np.abs(np.linalg.eigvals(A)).max()),
        "condition_number": float(singular[0] / singular[-1]) if singular[-1] > 0 else math.inf,
        "real_logarithm": _has_logarithm(operator),
        "growth_10": float(growth),
        "drift_10": float(drift),
    }
    verdict, advice = _verdict(health, max_norm)
    return health | {"verdict": verdict, "advice": advice}


_NUMBERS = ("spectral_norm", "spectral_radius", "condition_number", "growth_10", "drift_10")


@checked
def operator_health(
    operator_model, conditions: Sequence[Condition] | None = None, *, max_norm: float = 3.0
) -> pd.DataFrame:
    """:func:`affine_health` of every condition.

    Parameters
    ----------
    operator_model
        :class:`cellop_nb.OperatorModel`, trained or not.
    conditions
        Which ones; by default each perturbation in each context.
    max_norm
        As in :func:`affine_health`.

    Returns
    -------
    One row per condition.
    """
    if conditions is None:
        encoder = operator_model.conditions
        names, contexts = encoder.perturbations, encoder.contexts or [None]
        conditions = [Condition((name,), context) for context in contexts for name in names]
    rows = {}
    for condition in conditions:
        operator = operator_model.operator(condition)
        A, b = (tensor.detach().double().cpu().numpy() for tensor in (operator.matrix, operator.shift))
        rows[str(condition)] = affine_health(A, b, max_norm=max_norm)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("condition")


def _has_logarithm(operator: AffineOperator) -> bool:
    try:
        return bool(np.isfinite(operator.generator).all())
    except ModelError:
        return False


def _verdict(health: dict, max_norm: float) -> tuple[str, str]:
    norm, radius = health["spectral_norm"], health["spectral_radius"]
    if norm > max_norm:
        fix = "fit with a larger stability_weight or ridge"
        return "red", f"one application stretches a direction {norm:.3g} times (limit {max_norm:g}): {fix}"
    warnings = []
    if radius > SLOW_GROWTH:
        steps = math.log(10) / math.log(radius)
        warnings.append(
            f"each use stretches cells {radius:.3g}-fold, {steps:.0f} uses tenfold: use it few times"
        )
    if not health["condition_number"] <= MAX_CONDITION:
        number = health["condition_number"]
        warnings.append(f"not reversible (condition number {number:.1e}): fit with a larger ridge")
    if not health["real_logarithm"]:
        warnings.append("no real logarithm: only the full strength is defined, not parts of it")
    if warnings:
        return "amber", "; ".join(warnings)
    return "green", "safe to repeat, to reverse and to scale"


# -- what the VAE gives back, and what its latents hold -----------------------------------------------------------------

FEWEST = 5
"""Cells that a label needs, one for each fold of the cross-validation."""


@dataclass(frozen=True, eq=False)
class PosteriorCheck:
    """What :func:`posterior_check` gives back.

    Attributes
    ----------
    observed, sampled : ndarray
        (cell, gene) counts of the held-out cells, and counts drawn from the model for the same cells.
    zeros : Series
        Mean gap in the share of zeros per gene, of the model beside noise and a Poisson.
    loss : Series
        Nats per held-out cell, of the model (a bound from above) beside the likelihood of mean profiles; lower is better.
    kl : ndarray
        (d,) divergence of each latent dimension from its prior in nats, the largest first; 0 carries nothing.
    dimension : float
        Participation ratio of the posterior means: 1 for a line, d for a ball.
    """

    observed: np.ndarray = field(repr=False)
    sampled: np.ndarray = field(repr=False)
    zeros: pd.Series
    loss: pd.Series
    kl: np.ndarray
    dimension: float


@checked
@torch.no_grad()
def posterior_check(
    adata, vae: NBVAE, *, split: str = "test", max_cells: int = 5000, seed: int = 0
) -> PosteriorCheck:
    r"""Check whether the VAE reproduces the counts of unseen cells, and better than their group's mean profile does.

    For each held-out cell a latent is drawn from its posterior, and counts from the decoder at the cell's own library
    size. The bound on :math:`-\log p(x)` stands beside the exact likelihood of a negative binomial around the mean
    profile of all training cells, and around that of the training cells of the same (context, perturbation).

    Parameters
    ----------
    adata
        A screen that was set up, with ``obs["split"]``.
    vae
        Trained on the training cells.
    split
        The held-out cells.
    max_cells
        Held-out cells, and training cells, looked at; a random choice of more.
    seed
        Seeds the draws.

    Returns
    -------
    PosteriorCheck

    Raises
    ------
    LabelError
        If no cell is in `split`, or the data were not set up.

    References
    ----------
    Gelman, Meng & Stern 1996, Stat. Sinica 6:733 (posterior predictive checks).
    """
    keys, vae = keys_of(adata), vae.cpu().eval()
    matrix = model_counts(adata, vae)
    rng = np.random.default_rng(seed)
    train, test = (np.sort(rng.permutation(rows_of(adata, part))[:max_cells]) for part in ("train", split))
    batch, seen = matrix.batch(test), matrix.batch(train)
    generator = torch.Generator().manual_seed(seed)
    posterior = vae.encode(batch.x, batch.library, batch.covariates)
    decoded = vae.decode(sample_z(posterior, generator), batch.library, batch.covariates)
    x, train_x = batch.x[:, : vae.n_genes], seen.x[:, : vae.n_genes]
    bound = float(sum(elbo_loss(decoded.log_prob(x), posterior).values()))
    dispersion = new_vae(adata, genes=vae.genes, seed=seed).decoder.dispersion[: vae.n_genes].detach()
    labels = label_table(adata, keys)
    groups = (labels["context"] + "\0" + labels["perturbation"]).to_numpy()
    pooled = _profile_loss(x, batch.library, train_x, seen.library, dispersion)
    own = torch.empty(len(test))
    for group in np.unique(groups[test]):
        to, of = (torch.as_tensor(groups[rows] == group) for rows in (test, train))
        own[to] = _profile_loss(x[to], batch.library[to], train_x[of], seen.library[of], dispersion, train_x)
    loss = {
        "one profile": float(pooled.mean()),
        "profile of the group": float(own.mean()),
        "VAE (bound)": bound,
    }
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).mean(0)
    spread = np.linalg.eigvalsh(np.cov(posterior.loc.numpy().T))
    return PosteriorCheck(
        observed=x.numpy(),
        sampled=decoded.sample(generator).numpy(),
        zeros=_gaps_in_zeros(x, batch.library, train_x, seen.library, decoded),
        loss=pd.Series(loss, name="nats per cell"),
        kl=np.sort(kl.numpy())[::-1],
        dimension=float(spread.sum() ** 2 / (spread**2).sum()),
    )


def _profile_loss(
    x: Tensor,
    library: Tensor,
    train_x: Tensor,
    train_library: Tensor,
    dispersion: Tensor,
    every: Tensor | None = None,
) -> Tensor:
    """(cell,) negative log-likelihood of counts `x` (cell, gene) around the mean profile of the cells `train_x`.

    Half a cell of the profile of `every` training cell keeps genes that the group has not shown possible.
    """
    share = train_x.sum(0) + 0.5 * (train_x if every is None else every).mean(0) + 1e-6
    share = share * (
        train_x.sum() / train_library.sum() / share.sum()
    )  # the rest of the library are other genes
    return -nb_log_likelihood(x, library[:, None] * share, dispersion)


def _gaps_in_zeros(x: Tensor, library: Tensor, train_x: Tensor, train_library: Tensor, decoded) -> pd.Series:
    """Mean gap in the share of zeros per gene: two samples of cells, the VAE, a Poisson around one profile."""
    observed, share = (x == 0).float().mean(0), train_x.sum(0) / train_library.sum()
    zeros = {
        "two samples of cells (noise)": (train_x == 0).float().mean(0),
        "VAE": torch.exp(-decoded.r * torch.log1p(decoded.mean / decoded.r)).mean(0),
        "Poisson, one profile": torch.exp(-library[:, None] * share).mean(0),
    }
    gaps = {name: float((part - observed).abs().mean()) for name, part in zeros.items()}
    return pd.Series(gaps, name="mean gap in zeros per gene")


@checked
def leaks(
    adata,
    covariate_keys: Sequence[str] = (),
    *,
    use_rep: str = "X_nbvae",
    max_cells: int = 2500,
    seed: int = 0,
) -> pd.DataFrame:
    """Test whether a linear model can read donor, batch or depth off the latents, within groups.

    Labels are read by a linear classifier (balanced accuracy), depth by a linear regression of log library size (R²),
    both in five folds. Taking out group means keeps an unequal share of donors per cell type from counting.

    Parameters
    ----------
    adata
        A screen that was set up, with latents in ``obsm[use_rep]``.
    covariate_keys
        Columns of ``obs``; those with one label, or with a label of fewer than 5 cells, are left out.
    max_cells
        Cells looked at, a random choice of more.

    Returns
    -------
    DataFrame
        ``what, score, chance, permuted, excess``: `permuted` is the largest score of five runs with permuted values,
        which chance can reach, `excess` how far the score lies above it.

    Raises
    ------
    LabelError
        For a column that is not there, or data that were not set up.
    """
    keys, rng = keys_of(adata), np.random.default_rng(seed)
    absent = [key for key in covariate_keys if key not in adata.obs]
    if absent:
        fix = "name the columns of donors and batches, or none"
        raise LabelError("columns of adata.obs", repr(absent[0]), fix)
    some = np.sort(rng.permutation(adata.n_obs)[:max_cells])
    labels = label_table(adata, keys).iloc[some]
    groups = (labels["context"] + "\0" + labels["perturbation"]).to_numpy()
    z = _without_group_means(pd.DataFrame(representation(adata, use_rep).numpy()[some]), groups)
    library = np.log10(np.maximum(library_size(adata, keys.layer)[some], 1))
    depth = _without_group_means(pd.DataFrame({"depth": library}), groups)[:, 0]
    values, rows = {"depth (R²)": depth}, []
    for key in reversed(covariate_keys):
        column = obs_labels(adata, key).iloc[some]
        if column.nunique() > 1 and column.value_counts().min() >= FEWEST:
            values = {key: column.to_numpy()} | values
    for name, value in values.items():
        permuted = max(_readable(z, rng.permutation(value)) for _ in range(5))
        chance = 0.0 if value.dtype == float else 1 / len(set(value))
        score = _readable(z, value)
        rows.append((name, score, chance, permuted, score - permuted))
    return pd.DataFrame(rows, columns=["what", "score", "chance", "permuted", "excess"])


def _without_group_means(table: pd.DataFrame, groups: np.ndarray) -> np.ndarray:
    """(cell, column) values less the mean of their group, in units of their common spread."""
    centred = (table - table.groupby(groups).transform("mean")).to_numpy(float)
    return centred / (centred.std() + 1e-12)


def _readable(z: np.ndarray, values: np.ndarray) -> float:
    """How well numbers (R²) or labels (balanced accuracy) are read off latents (cell, d) in five folds."""
    from sklearn.linear_model import Ridge, RidgeClassifier
    from sklearn.model_selection import cross_val_score

    if values.dtype == float:
        return float(cross_val_score(Ridge(1.0), z, values, cv=FEWEST, scoring="r2").mean())
    model = RidgeClassifier(class_weight="balanced")
    return float(cross_val_score(model, z, values, cv=FEWEST, scoring="balanced_accuracy").mean())
