"""Screens whose operators are known: latent clouds, planted affine operators, a nonlinear decoder, NB counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations as pairs_of
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.linalg import expm

from ..errors import DataError, LabelError, checked, did_you_mean
from ..models.operators import perturbation_parts
from .contract import Keys

EXAMPLE: dict[str, Any] = {"combinations": 2, "n_genes": 500, "n_cells": 160, "n_controls": 240, "seed": 0}
"""Arguments of :func:`synthetic` that give the example screen."""
CONTROL = "control"


@checked
def synthetic(
    *,
    n_contexts: int = 4,
    n_perturbations: int = 4,
    combinations: int | Sequence[str] = 0,
    doses: Sequence[float] = (1.0,),
    n_cells: int = 150,
    n_controls: int | None = None,
    n_genes: int = 300,
    n_latent: int = 6,
    library: float | None = None,
    batch_effect: float = 0.0,
    context_deviation: float = 0.0,
    seed: int = 0,
) -> AnnData:
    r"""A perturbation screen with planted operators.

    Controls of each context are drawn from a mixture of two correlated Gaussians. A cell treated with p at
    dose t is another draw from the same mixture, moved by

    .. math:: z \mapsto A_p(t) z + b_p(t), \qquad
        \begin{pmatrix} A_p(t) & b_p(t) \\ 0 & 1 \end{pmatrix} = \exp(t\, G_p),

    with generators of low rank, shared by all contexts. Counts are negative binomial around a nonlinear
    decoder's proportions times a log-normal library size. With three or more perturbations the last one does
    nothing, and the one before it is weak.

    Parameters
    ----------
    n_contexts, n_perturbations, n_genes, n_latent
        Sizes of the screen.
    combinations
        How many pairs of perturbations to add ("A+B": first A, then B, so A_B A_A), or their labels.
    doses
        Doses of each single perturbation; several write `obs["dose"]`. Combinations are given at dose 1.
    n_cells, n_controls
        Cells per perturbed group, and controls per context (by default as many).
    library
        Median counts per cell; by default 0.35 per gene, which leaves about 90 % zeros.
    batch_effect
        Standard deviation of each gene's log fold change between the two batches.
    context_deviation
        Standard deviation of each context's own addition to the generators' entries; 0 shares them exactly.

    Returns
    -------
    AnnData
        Counts in `X` (CSR float32). `obs` has perturbation, context, donor, batch, and dose where there are
        several. `obsm["X_truth"]`: true latents (cell, d). `uns["cellop_nb"]["truth"]`: `condition`,
        `context`, `dose` (condition,), with their `A` (condition, d, d), `b` (condition, d); the `decoder`;
        the `dispersion` (gene,) of the NB and the second batch's `batch_shift` in logits (gene,). It is set up
        (:func:`cellop_nb.setup`).

    Raises
    ------
    DataError
        If a size is too small.

    See Also
    --------
    planted_operator, planted_proportions

    References
    ----------
    Higham (2008), Functions of Matrices, chapter 10 (the exponential of the homogeneous matrix).
    """
    _check_sizes(n_contexts=n_contexts, n_perturbations=n_perturbations, n_cells=n_cells, n_genes=n_genes)
    if n_latent < 4:
        fix = "generators have two directions in and two out, so ask for at least 4"
        raise DataError("n_latent of at least 4", str(n_latent), fix)
    rng = np.random.default_rng(seed)
    contexts = [f"type {_letters(k)}" for k in range(n_contexts)]
    singles = [f"drug {k + 1}" for k in range(n_perturbations)]
    doubles = _combination_labels(combinations, singles)
    clouds = {context: Cloud.draw(rng, n_latent) for context in contexts}
    generators = draw_generators(rng, singles, contexts, n_latent, context_deviation)
    plan = _plan(contexts, singles, doubles, doses, n_cells, n_controls or n_cells)
    operators = [
        operator_of(generators, row.context, row.perturbation, row.dose) for row in plan.itertuples()
    ]
    decoder = Decoder.draw(rng, n_latent, n_genes)
    dispersion = np.exp(rng.normal(1.5, 0.5, n_genes))
    batch_shift = batch_effect * rng.normal(size=n_genes)
    latents = [
        clouds[row.context].sample(rng, row.cells) @ matrix.T + shift
        for row, (matrix, shift) in zip(plan.itertuples(), operators, strict=True)
    ]
    z = np.concatenate(latents)
    obs = _obs(rng, plan)
    offset = (obs["batch"].to_numpy() == "batch 2")[:, None] * batch_shift
    depth = rng.lognormal(np.log(library or 0.35 * n_genes), 0.35, len(z))
    # Single precision keeps the draws equal where another machine's sums differ in the last bits.
    mean = (depth[:, None] * decoder.proportions(z, offset)).astype(np.float32)
    rate = rng.gamma(dispersion, size=mean.shape).astype(np.float32) * mean / dispersion
    counts = np.asarray(rng.poisson(rate))
    order = rng.permutation(len(z))
    obs = obs.iloc[order].set_index(pd.Index([f"cell_{k:05d}" for k in range(len(z))]))
    adata = AnnData(sparse.csr_matrix(counts[order].astype(np.float32)), obs=obs)
    adata.var_names = [f"GENE{k:04d}" for k in range(n_genes)]
    adata.obsm["X_truth"] = z[order].astype(np.float32)
    adata.uns["cellop_nb"] = {
        "truth": {
            "condition": plan["perturbation"].to_numpy(dtype=str),
            "context": plan["context"].to_numpy(dtype=str),
            "dose": plan["dose"].to_numpy(dtype=float),
            "A": np.stack([matrix for matrix, _ in operators]),
            "b": np.stack([shift for _, shift in operators]),
            "decoder": dict(vars(decoder)),
            "dispersion": dispersion,
            "batch_shift": batch_shift,
            "seed": int(seed),
        }
    }
    Keys(dose_key="dose" if "dose" in obs else None).write(adata)
    return adata


def planted_operator(
    adata: AnnData, perturbation: str, context: str | None = None, *, dose: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The planted A and b of a condition.

    Parameters
    ----------
    perturbation
        A perturbation of the screen, or a combination "A+B".
    context
        Matters only where contexts deviate; None takes the first.
    dose
        A dose that was planted.

    Returns
    -------
    tuple of ndarray
        A (d, d) and b (d,), in the units of the true latent.

    Raises
    ------
    LabelError
        If the condition was not planted.
    """
    truth = _truth(adata)
    hit = (truth["condition"] == perturbation) & np.isclose(truth["dose"], dose)
    if context is not None:
        hit &= truth["context"] == context
    if not hit.any():
        hint = did_you_mean(perturbation, dict.fromkeys(truth["condition"]))
        problem = f"{perturbation!r} at dose {dose:g} in {context or 'any context'}"
        raise LabelError("a planted condition", problem, f"name one that was planted ({hint})")
    first = int(np.flatnonzero(hit)[0])
    return truth["A"][first], truth["b"][first]


def planted_proportions(adata: AnnData, z: np.ndarray) -> np.ndarray:
    """Noise-free gene proportions of true latents, in the first batch.

    Parameters
    ----------
    z
        True latents, (cell, d), as in ``obsm["z_true"]``.

    Returns
    -------
    ndarray
        Proportions (cell, gene); each row sums to one.

    Raises
    ------
    DataError
        If `adata` holds no planted truth.
    """
    return Decoder(**_truth(adata)["decoder"]).proportions(np.asarray(z, dtype=float))


def _truth(adata: AnnData) -> dict:
    try:
        return adata.uns["cellop_nb"]["truth"]
    except KeyError:
        fix = "use data made by cellop_nb.datasets.synthetic()"
        raise DataError("planted operators in uns", "none", fix) from None


def _plan(contexts, singles, doubles, doses, n_cells: int, n_controls: int) -> pd.DataFrame:
    """One row per group: context, perturbation, dose, cells."""
    rows = []
    for context in contexts:
        rows.append((context, CONTROL, 1.0, n_controls))
        rows += [(context, single, float(dose), n_cells) for single in singles for dose in doses]
        rows += [(context, double, 1.0, n_cells) for double in doubles]
    return pd.DataFrame(rows, columns=["context", "perturbation", "dose", "cells"])


def _obs(rng, plan: pd.DataFrame) -> pd.DataFrame:
    obs = plan.loc[plan.index.repeat(plan["cells"])].reset_index(drop=True)
    obs = obs.rename(columns={"context": "cell_type"})[["cell_type", "perturbation", "dose"]]
    obs["donor"] = [f"donor {k + 1}" for k in rng.integers(3, size=len(obs))]
    obs["batch"] = [f"batch {k + 1}" for k in rng.integers(2, size=len(obs))]
    labels = ("perturbation", "cell_type", "donor", "batch")
    obs = obs.astype(dict.fromkeys(labels, "category"))
    return obs if plan["dose"].nunique() > 1 else obs.drop(columns="dose")


def _combination_labels(combinations: int | Sequence[str], singles: list[str]) -> list[str]:
    if not isinstance(combinations, int):
        return list(combinations)
    return ["+".join(pair) for pair in pairs_of(singles, 2)][:combinations]


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"{name} of at least 1", str(size), "ask for a larger screen")


def _letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    head, tail = divmod(number, 26)
    return (_letters(head - 1) if head else "") + chr(ord("A") + tail)


# -- what a screen is made of: clouds of control cells, planted affine operators, a decoder ------------------------------


@dataclass(frozen=True)
class Decoder:
    """Gene proportions from latents: softmax(base + z W + tanh(z V + c) U)."""

    base: np.ndarray
    linear: np.ndarray
    inner: np.ndarray
    bias: np.ndarray
    outer: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, n_latent: int, n_genes: int, n_hidden: int = 16) -> Decoder:
        # A gene answers to few latent directions, as in a real program; most genes hardly answer.
        loud = 0.1 + rng.beta(0.7, 1.3, n_genes)
        linear = rng.normal(size=(n_latent, n_genes)) * (rng.random((n_latent, n_genes)) < 0.4)
        return cls(
            base=rng.normal(0.0, 2.0, n_genes),
            linear=0.7 * linear * loud,
            inner=rng.normal(size=(n_latent, n_hidden)) / np.sqrt(n_latent),
            bias=rng.normal(size=n_hidden),
            outer=0.25 * rng.normal(size=(n_hidden, n_genes)) * loud,
        )

    def logits(self, z: np.ndarray) -> np.ndarray:
        return self.base + z @ self.linear + np.tanh(z @ self.inner + self.bias) @ self.outer

    def proportions(self, z: np.ndarray, offset: np.ndarray | float = 0.0) -> np.ndarray:
        logits = self.logits(z) + offset
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Cloud:
    """Two correlated Gaussians in unequal shares: the control cells of one context."""

    centers: np.ndarray
    factors: np.ndarray
    share: float

    @classmethod
    def draw(cls, rng: np.random.Generator, n_latent: int) -> Cloud:
        center = rng.normal(size=n_latent) * 1.4
        apart = rng.normal(size=n_latent)
        apart *= 1.2 / np.linalg.norm(apart)
        mixing = rng.normal(size=(2, n_latent, n_latent)) / np.sqrt(n_latent)
        factors = 0.35 * np.eye(n_latent) + 0.45 * mixing
        return cls(np.stack([center + apart, center - apart]), factors, float(rng.uniform(0.55, 0.75)))

    def sample(self, rng: np.random.Generator, n_cells: int) -> np.ndarray:
        side = (rng.random(n_cells) > self.share).astype(int)
        noise = rng.normal(size=(n_cells, self.centers.shape[1]))
        return self.centers[side] + np.einsum("cij,cj->ci", self.factors[side], noise)


def draw_generators(rng, singles: list[str], contexts: list[str], n_latent: int, deviation: float) -> dict:
    """Generator of each (context, perturbation), (d + 1, d + 1) with a last row of zeros."""
    generators = {}
    for number, name in enumerate(singles):
        shared = _strength(number, len(singles)) * _draw_generator(rng, n_latent)
        for context in contexts:
            own = np.zeros_like(shared)
            own[:-1] = deviation * rng.normal(size=own[:-1].shape) * bool(shared.any())
            generators[context, name] = shared + own
    return generators


def _strength(number: int, total: int) -> float:
    """Full for most perturbations; the last of three or more does nothing, the one before it is weak."""
    if total < 3:
        return 1.0
    return {total - 1: 0.0, total - 2: 0.3}.get(number, 1.0)


def _draw_generator(rng: np.random.Generator, n_latent: int, rank: int = 2) -> np.ndarray:
    """A generator whose matrix part has the given rank and norm 0.6, and whose shift has length 1.8."""
    left, right = (
        np.linalg.qr(rng.normal(size=(n_latent, 2 * rank)))[0].reshape(n_latent, 2, rank).swapaxes(0, 1)
    )
    matrix = left @ (right + 0.8 * left @ np.diag(rng.choice([-1.0, 1.0], rank))).T
    shift = rng.normal(size=n_latent)
    generator = np.zeros((n_latent + 1, n_latent + 1))
    generator[:-1, :-1] = 0.6 * matrix / np.linalg.norm(matrix, 2)
    generator[:-1, -1] = 1.8 * shift / np.linalg.norm(shift)
    return generator


def operator_of(
    generators: Mapping, context: str, perturbation: str, dose: float
) -> tuple[np.ndarray, np.ndarray]:
    """A (d, d) and b (d,) of a condition; a combination applies its parts from left to right."""
    labels = [part for _, part in generators]
    whole = np.eye(next(iter(generators.values())).shape[0])
    for part in () if perturbation == CONTROL else perturbation_parts(perturbation, labels):
        whole = expm(dose * generators[context, part]) @ whole
    return whole[:-1, :-1], whole[:-1, -1]
