"""Virtual cells as plain functions: what the explorer asks and shows, without a widget.

One question (context, perturbation, strength, direction) has one answer: where the source cells go, how far they
end from the real ones, which genes change, how healthy the operator is, and what is known about the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
from torch import Tensor

from ..analysis.combinations import combine, sequence
from ..analysis.predict import decode_cells, latents
from ..analysis.stability import affine_health
from ..data.batches import model_counts
from ..data.contract import context_labels, obs_labels, perturbation_parts
from ..data.on_disk import DiskCounts
from ..errors import DataError, LabelError, did_you_mean, three_beats
from ..models.affine import AffineOperator, check_strength
from ..models.operators import OperatorModel
from ..models.vae import NBVAE
from .clouds import Clouds, Memory
from .expression import Expression
from .questions import Answer, Question


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
    contexts, perturbations
        What can be asked: contexts with control cells in the data, perturbations known to the operators.
    clouds
        The cells by group, their latents, and the plane of the map.
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
        self.layer, self.use_rep, self.perturbation_key = layer, use_rep, perturbation_key
        self.control, self.seed, self._memory = control, seed, Memory()
        column = adata.obs.get(split_key)
        self.clouds = Clouds(
            latents(adata, use_rep),
            obs_labels(adata, perturbation_key).to_numpy(),
            np.asarray(context_labels(adata, context_key), dtype=object),
            np.full(len(adata), "train") if column is None else column.to_numpy(),
            sizes={"draw": max_cells, "energy": n_energy, "decode": n_decoded},
            control=control, seed=seed, memory=self._memory,
        )  # fmt: skip
        self.contexts = self.clouds.contexts
        self.perturbations = list(operators.conditions.perturbations)
        if not self.contexts:
            fix = f"give cells with obs[{perturbation_key!r}] == {control!r}"
            raise DataError(three_beats("control cells to start from", "none", fix))
        counts = model_counts(adata, vae, layer=layer)
        if isinstance(counts, DiskCounts):  # every move reads them: the model's genes are held in memory
            counts = counts.held(np.arange(len(counts)))
        self.expression = Expression(vae, counts, self.clouds, n_replicates=n_replicates)

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
        moving, (source, target) = self._at(question, whole), self.clouds.sides(question)
        moved = moving(self.clouds.latents(source))
        genes, decoded = self.expression.changes(source, target, moving)
        gene = self.expression.named(gene, genes)
        return Answer(  # type: ignore[call-arg]
            question, *self._standing(question), moving,
            self.clouds.still(source), self.clouds.on_map(moved), self.clouds.still(target),
            *self.clouds.energies(moved, source, target),
            genes, gene, self.expression.counts(gene, source, target, decoded),
            np.linalg.eigvals(moving.homogeneous[:-1, :-1]), self._health(question, whole),
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
            return self._memory.keep(
                ("operator", context, perturbation, rule),
                lambda: combine(self.operators, perturbation, context, rule=rule, **known),
            ).power(check_strength(strength))
        return sequence(self.operators, [(step, strength) for step in steps], context, **known)

    def measured(self, context: str) -> list[str]:
        """Perturbations, combinations included, of which the data hold cells in this context."""
        return self.clouds.measured(context)

    def source(self, question: Question) -> Tensor:
        """Latents (cell, d) of the cells that a question moves, at most as many as an energy distance takes."""
        return self.clouds.latents(self.clouds.sides(question)[0], "energy")

    def target(self, question: Question) -> Tensor:
        """Latents (cell, d) of the real cells that the moved ones are compared with."""
        return self.clouds.latents(self.clouds.sides(question)[1], "energy")

    def recalled(self, question: Question) -> pd.Series:
        """Log2 fold change of each gene between the real cells of both sides as the VAE gives them back.

        No operator takes part: an error that is here already is the VAE's.
        """
        return self.expression.recalled(*self.clouds.sides(question))

    def to_adata(self, question: Question) -> ad.AnnData:
        """The moved cells with sampled counts, as :func:`cellop_nb.predict` gives them, for further analysis.

        Returns
        -------
        AnnData of the source cells; ``uns["cellop_nb"]["prediction"]`` says what was asked and whether it is a
        prediction.
        """
        whole = self.operator(question.context, question.perturbation, question.rule)
        moving, (source, _) = self._at(question, whole), self.clouds.sides(question)
        cells, z = self.adata[source], self.clouds.z[source]
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

    def _standing(self, question: Question) -> tuple[str, str]:
        given, context = question.perturbation, question.context
        if context not in self.operators.conditions.contexts:
            return (
                "prediction",
                "prediction: the fit had no cells of this context, the shared response is used",
            )
        if not isinstance(given, str):
            return "prediction", "prediction: a sequence (real cells, if any, got all at once)"
        if not self.clouds.trained(context, given):
            kind = "combination" if "+" in given else "condition"
            return "prediction", f"prediction: the fit had no cells of this {kind}"
        if question.strength not in (0.0, 1.0):
            where = (
                "beyond the measured strength" if question.strength > 1 else "between control and measured"
            )
            return "prediction", f"prediction: {where}"
        return "fitted", "fitted: training cells of this condition took part"

    def _health(self, question: Question, whole: AffineOperator) -> dict:
        key = ("health", question.context, question.perturbation, question.rule)
        return self._memory.keep(key, lambda: affine_health(whole.matrix.numpy(), whole.shift.numpy()))

    def forget(self) -> None:
        """Drop what earlier questions left behind; the next ones take as long as the first."""
        self._memory.clear()
