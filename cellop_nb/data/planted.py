"""What a synthetic screen is made of: clouds of control cells, planted affine operators, a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.linalg import expm

from ..models.operators import perturbation_parts


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
    generators: Mapping, context: str, perturbation: str, dose: float, control: str
) -> tuple[np.ndarray, np.ndarray]:
    """A (d, d) and b (d,) of a condition; a combination applies its parts from left to right."""
    labels = [part for _, part in generators]
    whole = np.eye(next(iter(generators.values())).shape[0])
    for part in () if perturbation == control else perturbation_parts(perturbation, labels):
        whole = expm(dose * generators[context, part]) @ whole
    return whole[:-1, :-1], whole[:-1, -1]
