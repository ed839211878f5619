"""Virtual cells as plain functions: what the explorer asks and shows, without a widget.

One question (context, perturbation, strength, direction) has one answer: where the source cells go, how far they
end from the real ones, which genes change, how healthy the operator is, and what is known about the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..analysis.combinations import combine, sequence
from ..analysis.predict import decode_cells, latents
from ..analysis.stability import affine_health
from ..analysis.transport import noise_floor
from ..data.batches import model_counts
from ..data.contract import context_labels, obs_labels, perturbation_parts
from ..errors import DataError, LabelError, did_you_mean, three_beats
from ..models.affine import AffineOperator
from ..models.algebra import check_strength
from ..models.coupling import carried_mean, carry_counts
from ..models.energy import energy_distance, self_distance
from ..models.gene_linear import COUNTS_PER_CELL
from ..models.likelihood import NegativeBinomial
from ..models.operators import OperatorModel
from ..models.vae import NBVAE
from .questions import Answer, Question

MIN_REAL = 50
"""Held-out cells below which a moved cloud is compared with all cells of the group."""


class VirtualCells:
    """Answers questions about virtual cells quickly: everything that a move does not change is kept.

    Parameters
    ----------
    adata
        With raw counts, latents in ``obsm[use_rep]`` and, where there was a split, ``obs[split_key]``.
    vae, operators
        Trained models.
    max_cells
        Source cells moved and drawn at most (seeded draw).
    n_energy, n_decoded, n_replicates
        Cells a side in the energy distance, cells decoded for the genes, bootstrap replicates.
    seed
        Seeds every draw.

    Attributes
    ----------
    plane
        (d, 2) orthonormal directions of the map: those of the largest mean responses. Fitted once.
    contexts, perturbations
        What can be asked: contexts with control cells in the data, perturbations known to the operators.
    """

    def __init__(
        self,
        adata,
        vae: NBVAE,
        operators: OperatorModel,
        *,
        layer: str | None = None,
        use_rep: str = "X_nbvae",
        perturbation_key: str = "perturbation",
        context_key: str | Sequence[str] | None = "cell_type",
        control: str = "control",
        split_key: str = "split",
        max_cells: int = 5000,
        n_energy: int = 1000,
        n_decoded: int = 300,
        n_replicates: int = 100,
        seed: int = 0,
    ):
        self.adata, self.vae, self.operators = adata, vae.eval(), operators
        self.layer, self.use_rep, self.perturbation_key, self.control = (
            layer,
            use_rep,
            perturbation_key,
            control,
        )
        self.sizes = {"draw": max_cells, "energy": n_energy, "decode": n_decoded}
        self.n_replicates, self.seed = n_replicates, seed
        self._labels = obs_labels(adata, perturbation_key).to_numpy()
        self._contexts = np.asarray(context_labels(adata, context_key), dtype=object)
        self._split = (
            adata.obs[split_key].to_numpy() if split_key in adata.obs else np.full(len(adata), "train")
        )
        self._z, self._matrix = latents(adata, use_rep), model_counts(adata, vae, layer=layer)
        self._names = np.unique(self._labels)
        self._column = {gene: i for i, gene in enumerate(vae.genes)}
        self.contexts = sorted(set(self._contexts[self._labels == control]))
        self.perturbations = list(operators.conditions.perturbations)
        if not self.contexts:
            fix = f"give cells with obs[{perturbation_key!r}] == {control!r}"
            raise DataError(three_beats("control cells to start from", "none", fix))
        self._kept: dict = {}
        self.plane = self._fit_plane()

    # -- what is asked

    def ask(self, question: Question, *, gene: str | None = None) -> Answer:
        """Answer one question.

        Parameters
        ----------
        question
            What is asked.
        gene
            Whose distribution is given; the one with the largest change where None.

        Raises
        ------
        LabelError
            For a context, perturbation or gene that neither data nor model know: it is refused, not guessed.
        ModelError
            For a strength out of range, or one that the operator does not have.
        DataError
            For a reversal where there are no perturbed cells to lead back.
        """
        whole = self.operator(question.context, question.perturbation, question.rule)
        moving = self._at(question, whole)
        source, target = self._sides(question)
        start = self._cloud(source)
        z = self._z[start]
        moved = moving(z)
        energies = self._energies(moved[: self.sizes["energy"]], source, target)
        genes, decoded = self._genes(source, target, moving)
        gene = self._gene(gene, genes)
        return Answer(  # type: ignore[call-arg]
            question, *self._standing(question), moving, *self._map(z, moved, target), *energies,
            genes, gene, self._counts(gene, source, target, decoded),
            np.linalg.eigvals(moving.matrix.double().numpy()), self._health(question, whole),
        )  # fmt: skip

    def operator(
        self, context: str, perturbation: str | tuple[str, ...], rule: str = "axes", strength: float = 1.0
    ) -> AffineOperator:
        """The operator of a perturbation, a combination or a sequence in a context; unknown names are refused."""
        if context not in self.contexts:
            fix = did_you_mean(context, self.contexts)
            raise LabelError(three_beats("a context with control cells", repr(context), fix))
        steps = (perturbation,) if isinstance(perturbation, str) else tuple(perturbation)
        for name in (part for step in steps for part in perturbation_parts(step)):
            if name not in self.perturbations:
                fix = f"{did_you_mean(name, self.perturbations)}; no operator is guessed"
                raise LabelError(three_beats("a perturbation that the operators know", repr(name), fix))
        known = {"control": self.control}
        if isinstance(perturbation, str):
            return self._keep(
                ("operator", context, perturbation, rule),
                lambda: combine(self.operators, perturbation, context, rule=rule, **known),
            ).power(check_strength(strength))
        return sequence(self.operators, [(step, strength) for step in steps], context, **known)

    def measured(self, context: str) -> list[str]:
        """Perturbations, combinations included, of which the data hold cells in this context."""
        return sorted(set(self._labels[self._contexts == context]) - {self.control})

    def source(self, question: Question) -> Tensor:
        """Latents (cell, d) of the cells that a question moves, at most as many as an energy distance takes."""
        return self._z[self._cloud(self._sides(question)[0], "energy")]

    def target(self, question: Question) -> Tensor:
        """Latents (cell, d) of the real cells that the moved ones are compared with."""
        return self._z[self._cloud(self._sides(question)[1], "energy")]

    def to_adata(self, question: Question) -> ad.AnnData:
        """The moved cells with sampled counts, as :func:`cellop_nb.predict` gives them, for further analysis.

        Returns
        -------
        AnnData of the source cells; ``uns["cellop_nb"]["prediction"]`` says what was asked and whether it is a
        prediction.
        """
        whole = self.operator(question.context, question.perturbation, question.rule)
        moving, (source, _) = self._at(question, whole), self._sides(question)
        cells, z = self.adata[source], self._z[source]
        options = {"layer": self.layer, "key_added": self.use_rep, "seed": self.seed}
        made = decode_cells(cells, self.vae, moving(z), start=z, **options)
        made.obs[self.perturbation_key] = question.label
        standing, why = self._standing(question)
        made.uns["cellop_nb"] = {
            "prediction": {
                "operator": moving.label,
                "perturbation": question.label,
                "context": question.context,
                "strength": float(question.strength),
                "rule": question.rule,
                "reverse": bool(question.reverse),
                "standing": standing,
                "why": why,
                "seed": int(self.seed),
            }
        }
        return made

    # -- parts of the answer

    def _at(self, question: Question, whole: AffineOperator) -> AffineOperator:
        """The operator at the strength that is asked for, and in its direction."""
        strength = check_strength(question.strength)
        if isinstance(question.perturbation, str):
            moving = whole.power(strength)
        else:
            moving = self.operator(question.context, question.perturbation, strength=strength)
        return moving.inverse() if question.reverse else moving

    def _sides(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the cells that are moved, and of the real cells that they should become."""
        control = self._rows(question.context, self.control)
        perturbed = self._rows(question.context, self._together(question.perturbation))
        if question.reverse and not len(perturbed):
            found = f"none of {question.perturbation!r} in {question.context!r}"
            raise DataError(
                three_beats("perturbed cells to lead back", found, "ask for a measured condition")
            )
        return (perturbed, control) if question.reverse else (control, perturbed)

    def _rows(self, context: str, perturbation: str) -> np.ndarray:
        """Rows of a group: control cells all; perturbed cells those that no fit has seen, where there are enough."""

        def find() -> np.ndarray:
            inside = self._inside(context, perturbation)
            unseen = inside & (self._split == "test")
            use = inside if perturbation == self.control or unseen.sum() < MIN_REAL else unseen
            return np.flatnonzero(use)

        return self._keep(("rows", context, perturbation), find)

    @staticmethod
    def _together(perturbation: str | tuple[str, ...]) -> str:
        """Nobody measures sequences: the nearest that there is are cells that got all of it at once."""
        if isinstance(perturbation, str):
            return perturbation
        return "+".join(dict.fromkeys(part for step in perturbation for part in step.split("+")))

    def _inside(self, context: str, perturbation: str) -> np.ndarray:
        """Which cells belong to a group; "A+B" is "B+A"."""
        wanted = frozenset(perturbation.split("+"))
        same = [name for name in self._names if frozenset(str(name).split("+")) == wanted]
        return (self._contexts == context) & np.isin(self._labels, same)

    def _cloud(self, rows: np.ndarray, kind: str = "draw") -> np.ndarray:
        """At most as many of the rows as this kind of work takes, in random order (seeded)."""
        return np.random.default_rng(self.seed).permutation(rows)[: self.sizes[kind]]

    def _standing(self, question: Question) -> tuple[str, str]:
        given, context = question.perturbation, question.context
        if context not in self.operators.conditions.contexts:
            return (
                "prediction",
                "prediction: the fit had no cells of this context, the shared response is used",
            )
        if not isinstance(given, str):
            return "prediction", "prediction: a sequence (real cells, if any, got all at once)"
        trained = self._inside(context, given) & (self._split == "train")
        if not trained.any():
            kind = "combination" if "+" in given else "condition"
            return "prediction", f"prediction: the fit had no cells of this {kind}"
        if question.strength not in (0.0, 1.0):
            where = (
                "beyond the measured strength" if question.strength > 1 else "between control and measured"
            )
            return "prediction", f"prediction: {where}"
        return "fitted", "fitted: training cells of this condition took part"

    def _map(self, z: Tensor, moved: Tensor, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        aim = self._z[self._cloud(target)]
        return tuple((cloud - self.center).numpy() @ self.plane for cloud in (z, moved, aim))

    def _energies(self, moved: Tensor, source: np.ndarray, target: np.ndarray):
        """Distances of moved and unmoved cells, floor, and how many cells a side."""
        if len(target) < 2:
            return float("nan"), float("nan"), float("nan"), len(moved), len(target)
        real = self._z[self._cloud(target, "energy")]

        def fixed():
            unmoved = self._z[self._cloud(source, "energy")]
            own = self_distance(real, [len(real)])
            return own, float(energy_distance(unmoved, real, y_self=own)), noise_floor(real, seed=self.seed)

        own, before, floor = self._keep(("energy", source.tobytes(), target.tobytes()), fixed)
        return float(energy_distance(moved, real, y_self=own)), before, floor, len(moved), len(real)

    @torch.no_grad()
    def _genes(self, source: np.ndarray, target: np.ndarray, moving: AffineOperator):
        """Change of every gene with its interval, and the decoded cells before and after."""
        rows, library, covariates, before, weights = self._keep(
            ("decoded", source.tobytes()), lambda: self._decoded(source)
        )
        after = self.vae.decode(moving(self._z[rows]), library, covariates).mean
        shares = after / library[:, None]
        replicates = torch.log2((COUNTS_PER_CELL * (weights @ shares) + 1) / before["replicates"])
        lfc = torch.log2((COUNTS_PER_CELL * shares.mean(0) + 1) / before["mean"]).numpy()
        order = np.argsort(-np.abs(lfc), kind="stable")
        # intervals where they are looked at: quantiles of all genes would take longer than the rest
        low, high = np.full((2, len(lfc)), np.nan)
        top = order[:40]
        low[top], high[top] = np.quantile(replicates[:, top].numpy(), [0.025, 0.975], axis=0)
        measured = self._measured(source, target)
        table = {
            "gene": np.asarray(self.vae.genes),
            "lfc": lfc,
            "low": low,
            "high": high,
            "measured": measured,
        }
        return pd.DataFrame(table).iloc[order].reset_index(drop=True), (rows, before["cells"], after)

    def _decoded(self, source: np.ndarray):
        """The cells that stand for the source, decoded as they are, and bootstrap weights over them."""
        rows = self._cloud(source, "decode")
        library = self._matrix.library[rows]
        covariates = {name: codes[rows] for name, codes in self._matrix.covariates.items()}
        cells = self.vae.decode(self._z[rows], library, covariates).mean
        shares = cells / library[:, None]
        draws = np.random.default_rng(self.seed).multinomial(
            len(rows), np.full(len(rows), 1 / len(rows)), size=self.n_replicates
        )
        weights = torch.from_numpy((draws / len(rows)).astype(np.float32))
        mean, replicates = (COUNTS_PER_CELL * part + 1 for part in (shares.mean(0), weights @ shares))
        return rows, library, covariates, {"cells": cells, "mean": mean, "replicates": replicates}, weights

    def _measured(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Measured log2 fold change (gene,) between the real cells of both sides."""

        if not len(target):
            return np.full(len(self._column), np.nan)
        before, after = (COUNTS_PER_CELL * self._mean_share(rows) + 1 for rows in (source, target))
        return np.log2(after / before)

    def _mean_share(self, rows: np.ndarray) -> np.ndarray:
        """Mean share (gene,) of the cells' own counts."""

        def find() -> np.ndarray:
            shares = self._matrix.csr[rows].T @ (1 / self._matrix.library[rows].numpy())
            return shares[: self.vae.n_genes] / len(rows)

        return self._keep(("share", rows.tobytes()), find)

    def _gene(self, gene: str | None, genes: pd.DataFrame) -> str:
        if gene is None:
            return str(genes["gene"].iloc[0])
        if gene not in self._column:
            raise LabelError(three_beats("a gene of the model", repr(gene), did_you_mean(gene, self._column)))
        return gene

    def _counts(self, gene: str, source: np.ndarray, target: np.ndarray, decoded) -> dict[str, np.ndarray]:
        """Log1p-CP10k of one gene: source cells, the same moved (counts sampled), real cells."""
        column, (rows, before, after) = self._column[gene], decoded
        library, r = self._matrix.library[rows], self.vae.decoder.dispersion[: self.vae.n_genes].detach()
        x = torch.from_numpy(self._matrix.csr[rows][:, : self.vae.n_genes].toarray())
        ends = (NegativeBinomial(mean, r) for mean in (before, after))
        expected = carried_mean(x, library, *ends)[:, column]
        sampled = carry_counts(expected, torch.Generator().manual_seed(self.seed)).numpy()
        return {
            "start": self._log_counts(column, source),
            "moved": np.log1p(sampled / library.numpy() * COUNTS_PER_CELL),
            "real": self._log_counts(column, target),
        }

    def _log_counts(self, column: int, rows: np.ndarray) -> np.ndarray:
        every = self._keep(("gene", column), lambda: self._matrix.csr[:, [column]].toarray().ravel())
        return np.log1p(every[rows] / self._matrix.library[rows].numpy() * COUNTS_PER_CELL)

    def _health(self, question: Question, whole: AffineOperator) -> dict:
        key = ("health", question.context, question.perturbation, question.rule)
        return self._keep(key, lambda: affine_health(whole.matrix.numpy(), whole.shift.numpy()))

    def _fit_plane(self) -> np.ndarray:
        """The two directions in which the groups' means move most; what is missing comes from the control cells."""
        controls = {context: self._z[self._rows(context, self.control)] for context in self.contexts}
        self.center = torch.cat(list(controls.values())).mean(0)
        shifts = [
            self._z[rows].mean(0) - cells.mean(0)
            for context, cells in controls.items()
            for name in self._names
            if name != self.control and len(rows := self._rows(context, str(name)))
        ]
        spread = torch.linalg.svd(torch.cat(list(controls.values())) - self.center, full_matrices=False)[2][
            :2
        ]
        first = torch.linalg.svd(torch.stack(shifts), full_matrices=False)[2][:2] if shifts else spread[:0]
        return torch.linalg.qr(torch.cat([first, spread]).T)[0][:, :2].numpy()

    def forget(self) -> None:
        """Drop what earlier questions left behind; the next ones take as long as the first."""
        self._kept.clear()

    def _keep(self, key, make):
        """What `make` gives, made once for each key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]
