"""Virtual cells: what the explorer asks and shows, and series of questions as tables; no widget, no drawing.

One question (context, perturbation, strength, direction) has one answer: where the source cells go, how far they
end from the real ones, which genes change, how healthy the operator is, and what is known about the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from ..analysis.cellop import CellOp
from ..analysis.combinations import combine, sequence
from ..analysis.diagnose import affine_health
from ..analysis.metrics import log1p_cp10k
from ..analysis.predict import REP, Start, assemble, embed, modelled_counts
from ..data.counts import measured_totals
from ..data.groups import Groups, controls_by_context
from ..data.splits import SPLIT_KEY, rows_of
from ..display import card
from ..errors import DataError, LabelError, did_you_mean
from ..models.affine import AffineOperator, check_strength
from ..models.energy import energy_distance, noise_floor, self_distance
from ..models.operators import perturbation_parts

__all__ = [
    "Question",
    "VirtualCells",
    "dose_response",
    "ways_to_combine",
]

MOST_DRAWN, MOST_COMPARED, MOST_DECODED = 5000, 1000, 300
"""Cells at most that are moved and drawn, on each side of an energy distance, and decoded for the genes."""

MIN_REAL = 50
"""Held-out cells below which a moved cloud is compared with all cells of the group."""


@dataclass(frozen=True)
class Question:
    """What is asked of the virtual cells.

    Parameters
    ----------
    perturbation
        ``"A"``, a combination ``"A+B"``, or a sequence ``("A", "B")``, the first acting first.
    context
        Whose control cells are moved.
    strength
        Power of the operator, 0 to 1.5; each step of a sequence is taken at this strength.
    rule
        How a combination is built: ``"axes"``, ``"composition"``, ``"generator"`` (``co.combinations``).
    reverse
        Lead the perturbed cells back to the controls instead.
    """

    perturbation: str | tuple[str, ...]
    context: str
    strength: float = 1.0
    rule: str = "axes"
    reverse: bool = False

    @property
    def label(self) -> str:
        """``"A+B"``, ``"A, then B"``, with strength and direction where they are not the plain ones."""
        label = self.perturbation if isinstance(self.perturbation, str) else ", then ".join(self.perturbation)
        if self.strength != 1:
            label += f" at strength {self.strength:g}"
        return f"{label}, reversed" if self.reverse else label


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of the source cells.

    Attributes
    ----------
    question
        What was asked.
    standing
        ``"fitted"`` where training cells of this very condition took part in the fit; else ``"prediction"``.
    why
        The standing in words.
    operator
        The map that moved the cells, strength and direction included.
    start, moved, real
        (cell, 2) the source cells, the same moved, and the real cells aimed at, in the fixed plane.
    energy, energy_start, floor
        Energy distance (Euclidean, U-statistic, latent) of the moved and of the unmoved cells to the real ones, and
        the noise floor; NaN without real cells. `n_moved` and `n_real` cells are compared.
    planned
        Whether the cells are carried to the planned mean response; if not, the moved cells' own change is shown.
    genes
        DataFrame with all genes, largest absolute change first: ``gene, change, low, high`` (change of mean log1p-CP10k,
        with the calibrated interval of :meth:`CellOp.intervals`; NaN away from strength 1, and without a plan),
        ``measured`` (of the real cells; NaN without) and ``lfc`` (log2 fold change of mean counts per 10,000 of
        the virtual cells).
    counts
        Chosen gene: cloud name to log1p-CP10k of its cells, (cell,).
    health
        :func:`cellop_nb.analysis.diagnose.affine_health` of the operator at full strength.
    """

    question: Question
    standing: str
    why: str
    operator: AffineOperator
    planned: bool
    start: np.ndarray
    moved: np.ndarray
    real: np.ndarray
    energy: float
    energy_start: float
    floor: float
    n_moved: int
    n_real: int
    genes: pd.DataFrame
    gene: str
    counts: dict[str, np.ndarray]
    health: dict

    @property
    def sentence(self) -> str:
        """The answer in one line."""
        head = f"{self.question.context}, {self.question.label} | {self.why}"
        if np.isnan(self.energy):
            return f"{head} | no real cells of this condition to compare with"
        return (
            f"{head} | energy distance to {self.n_real:,} real cells {self.energy:.3f} "
            f"(no change {self.energy_start:.3f}, noise floor {self.floor:.3f})"
        )

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {"what is known": self.why, "energy distance": "no real cells"}
        if np.isfinite(self.energy):
            facts["energy distance"] = f"{self.energy:.4f} ({self.n_moved:,} to {self.n_real:,} cells)"
            facts |= {"no change": self.energy_start, "noise floor": self.floor}
        genes = [f"{row.gene} {row.change:+.2f}" for row in self.genes.head(6).itertuples()]
        facts |= {"genes that change most": genes, "stability": self.verdict}
        note = (
            "Energy distances are Euclidean, U-statistic, in the latent space; genes are changes of mean log1p counts "
            f"per 10,000, {'as planned' if self.planned else 'of the moved cells, without a plan'}."
        )
        return card(f"{self.question.context}: {self.question.label}", facts, note=note)

    @property
    def verdict(self) -> str:
        """Stability of the operator in words."""
        return f"{self.health['verdict']}: {self.health['advice']}"


class VirtualCells:
    """Answers questions about virtual cells quickly: everything that a move does not change is kept.

    Cells are those of the model: moved by its operators, carried to its planned mean response, as :meth:`CellOp.predict`
    gives them. Sequences, other rules and the way back have no plan: there the moved cells' own change is shown. The map
    and energy distances are of the moved latents.

    Parameters
    ----------
    model
        A fitted :class:`cellop_nb.CellOp`; the cells of its data are asked about, at most 5,000 of a group.

    Attributes
    ----------
    contexts, perturbations
        What can be asked: contexts with control cells in the data, perturbations known to the operators.
    plane
        (d, 2) orthonormal directions of the map: those of the largest mean responses. Fitted once.
    center
        (d,) mean of the control cells, the origin of the map.

    Raises
    ------
    DataError
        If the data have no control cells.
    """

    def __init__(self, model: CellOp):
        self.model, self.vae, self.operators, self.seed = model, model.vae, model.operators, model.seed
        self.control = model.keys.control
        self.perturbations = model.perturbations
        self._cached: dict[Hashable, Any] = {}
        screen = modelled_counts(model.adata, self.vae, model.keys)
        embed(screen, self.vae)
        self._modelled = model.on(screen)  # what is shown is of the modelled genes alone
        self._modelled.other_means = None
        self.z, self.levels = torch.from_numpy(screen.obsm[REP]), self._levels(screen)
        self._controls = controls_by_context(screen, model.keys)
        self.contexts = sorted(self._controls)
        if not self.contexts:
            fix = f"give cells with obs[{model.keys.perturbation_key!r}] == {self.control!r}"
            raise DataError("control cells to start from", "none", fix)
        alone = sum(map(len, self._controls.values())) == screen.n_obs
        self.groups = None if alone else Groups(screen, min_cells=1)
        self._test = np.zeros(screen.n_obs, dtype=bool)
        if SPLIT_KEY in screen.obs and (screen.obs[SPLIT_KEY] == "test").any():
            self._test[rows_of(screen, "test")] = True
        self._fit_plane()

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
        moving, (source, target) = self._moving(question), self.sides(question)
        if gene is not None and gene not in self.vae.genes:
            raise LabelError("a gene of the model", repr(gene), did_you_mean(gene, self.vae.genes))
        start = self.latents(source)
        moved, (standing, why) = moving(start), self._standing(question)
        energy, energy_start, floor, n_moved, n_real = self._energies(moved, source, target)
        virtual = self._predict(self._modelled, question, min(MOST_DECODED, len(source)))
        levels = self._levels(virtual)
        genes = self._changes(question, virtual, levels)
        gene = str(genes["gene"].iloc[0]) if gene is None else gene
        column = self.vae.genes.index(gene)
        clouds = {"start": self.levels[source], "moved": levels, "real": self.levels[target]}
        whole = self.operator(question.context, question.perturbation, question.rule)
        key = ("health", question.context, question.perturbation, question.rule)
        return Answer(
            question=question, standing=standing, why=why, operator=moving, planned=self._has_plan(question),
            start=self._on_map(start), moved=self._on_map(moved), real=self._on_map(self.latents(target)),
            energy=energy, energy_start=energy_start, floor=floor, n_moved=n_moved, n_real=n_real,
            genes=genes, gene=gene,
            counts={name: cloud[:, [column]].toarray().ravel() for name, cloud in clouds.items()},
            health=self._keep(key, lambda: affine_health(whole.matrix.numpy(), whole.shift.numpy())),
        )  # fmt: skip

    def parts(self, perturbation: str | tuple[str, ...]) -> list[str]:
        """The single perturbations of a combination or sequence, in order, each once."""
        steps = (perturbation,) if isinstance(perturbation, str) else perturbation
        names = self.perturbations
        return list(dict.fromkeys(part for step in steps for part in perturbation_parts(step, names, names)))

    def operator(
        self, context: str, perturbation: str | tuple[str, ...], rule: str = "axes", strength: float = 1.0
    ) -> AffineOperator:
        """The operator of a perturbation, a combination or a sequence in a context; unknown names are refused."""
        strength = check_strength(strength)
        if context not in self.contexts:
            fix = did_you_mean(context, self.contexts)
            raise LabelError("a context with control cells", repr(context), fix)
        for name in self.parts(perturbation):
            if name not in self.perturbations:
                fix = f"{did_you_mean(name, self.perturbations)}; no operator is guessed"
                raise LabelError("a perturbation that the operators know", repr(name), fix)
        if not isinstance(perturbation, str):
            return sequence(self.operators, [(step, strength) for step in perturbation], context)
        whole = self._keep(
            ("operator", context, perturbation, rule),
            lambda: combine(self.operators, perturbation, context, rule=rule),
        )
        return whole.power(strength)

    def measured(self, context: str) -> list[str]:
        """Perturbations, combinations included, of which there are cells in this context."""
        pairs = () if self.groups is None else self.groups.pairs
        return [name for own, name in pairs if own == context]

    def to_adata(self, question: Question) -> ad.AnnData:
        """The virtual cells with their counts, as :meth:`CellOp.predict` gives them, for further analysis.

        Returns
        -------
        AnnData of the source cells; ``uns["cellop_nb"]["prediction"]`` says what was asked and whether it is a
        prediction.
        """
        cells = self._predict(self.model, question)
        cells.obs[self.model.keys.perturbation_key] = question.label
        standing, why = self._standing(question)
        about = vars(question) | {"perturbation": question.label, "seed": self.seed}
        about |= {"operator": self._moving(question).label, "standing": standing, "why": why}
        cells.uns["cellop_nb"] = dict(cells.uns.get("cellop_nb", {})) | {"prediction": about}
        return cells

    def _predict(self, model: CellOp, question: Question, n_cells: int | None = None) -> ad.AnnData:
        """The answer of a model; of so many source cells, all where None."""
        moving, context, name = self._moving(question), question.context, question.label
        if question.reverse:
            source = model.adata[self.sides(question)[0][:n_cells]]
            draw = torch.Generator(device=next(self.vae.parameters()).device).manual_seed(self.seed)
            start = Start.of(modelled_counts(source, self.vae, model.keys), self.vae)
            return assemble(
                source, model.keys, self.vae.genes, start.moved(moving, generator=draw), question.label
            )
        if not self._has_plan(question):
            return model.predict(context=context, perturbation=name, operator=moving, n_cells=n_cells)
        name = self._as_measured(context, cast(str, question.perturbation))
        return model.predict(context=context, perturbation=name, strength=question.strength, n_cells=n_cells)

    def forget(self) -> None:
        """Drop what earlier questions left behind; the next ones take as long as the first."""
        self._cached.clear()

    def _keep(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, computed once for each key."""
        if key not in self._cached:
            self._cached[key] = compute()
        return self._cached[key]

    # -- parts of the answer

    def _moving(self, question: Question) -> AffineOperator:
        """The operator at the strength that is asked for, and in its direction."""
        moving = self.operator(question.context, question.perturbation, question.rule, question.strength)
        return moving.inverse() if question.reverse else moving

    @staticmethod
    def _has_plan(question: Question) -> bool:
        """Whether cells are carried to a planned mean: the other rules, sequences and the way back have none."""
        return isinstance(question.perturbation, str) and question.rule == "axes" and not question.reverse

    def _standing(self, question: Question) -> tuple[str, str]:
        perturbation, context = question.perturbation, question.context
        if context not in self.operators.conditions.contexts:
            why = "the fit had no cells of this context, so it uses the shared response"
        elif not isinstance(perturbation, str):
            why = "a sequence (real cells, if any, got all at once)"
        elif self.model.means.own(context, self._as_measured(context, perturbation)) is None:
            kind = "combination" if len(self.parts(perturbation)) > 1 else "condition"
            why = f"the fit had no cells of this {kind}"
        elif question.strength not in (0.0, 1.0):
            beyond = question.strength > 1
            why = "beyond the measured strength" if beyond else "between control and measured"
        else:
            return "fitted", "fitted: training cells of this condition took part"
        return "prediction", f"prediction: {why}"

    # -- the cells

    def sides(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the cells that are moved, and of the real cells that they should become."""
        control = self.rows(question.context, self.control)
        # Nobody measures sequences: the nearest that there is are cells that got all of it at once.
        perturbed = self.rows(question.context, "+".join(self.parts(question.perturbation)))
        if question.reverse and not len(perturbed):
            received = f"none of {question.perturbation!r} in {question.context!r}"
            fix = "ask for a measured condition"
            raise DataError("perturbed cells to lead back", received, fix)
        return (perturbed, control) if question.reverse else (control, perturbed)

    def rows(self, context: str, perturbation: str) -> np.ndarray:
        """Rows of a group: control cells all; perturbed cells those that no fit has seen, where there are enough."""
        if perturbation == self.control:
            return self._controls[context]
        if self.groups is None:
            return np.zeros(0, dtype=int)
        inside = self.groups.rows(context, self._as_measured(context, perturbation))
        unseen = inside[self._test[inside]]
        return inside if len(unseen) < MIN_REAL else unseen

    def _as_measured(self, context: str, perturbation: str) -> str:
        """The label under which a combination was measured in a context: "A+B" is "B+A"."""
        parts = frozenset(self.parts(perturbation))
        same = (name for name in self.measured(context) if frozenset(self.parts(name)) == parts)
        return perturbation if perturbation in self.measured(context) else next(same, perturbation)

    def latents(self, rows: np.ndarray, most: int = MOST_DRAWN) -> Tensor:
        """Latents (cell, d) of the rows, at most so many of them, in random order (seeded)."""
        return self.z[np.random.default_rng(self.seed).permutation(rows)[:most]]

    def _energies(self, moved: Tensor, source: np.ndarray, target: np.ndarray):
        """Energy distance of moved and of unmoved cells to the real ones, floor, and how many cells a side."""
        moved = moved[:MOST_COMPARED]
        if len(target) < 2:
            return math.nan, math.nan, math.nan, len(moved), len(target)
        real = self.latents(target, MOST_COMPARED)

        def fixed():
            unmoved = self.latents(source, MOST_COMPARED)
            own = self_distance(real, [len(real)])
            return own, float(energy_distance(unmoved, real, y_self=own)), noise_floor(real, seed=self.seed)

        own, before, floor = self._keep(("energy", source.tobytes(), target.tobytes()), fixed)
        return float(energy_distance(moved, real, y_self=own)), before, floor, len(moved), len(real)

    # -- the map

    def _on_map(self, cloud: Tensor) -> np.ndarray:
        """(cell, 2) where latents lie in the plane."""
        return (cloud - self.center).numpy() @ self.plane

    def _fit_plane(self) -> None:
        """The two directions in which the groups' means move most; what is missing comes from the control cells."""
        controls = {context: self.z[self.rows(context, self.control)] for context in self.contexts}
        every = torch.cat(list(controls.values()))
        self.center = every.mean(0)
        shifts = [
            self.z[self.rows(context, name)].mean(0) - cells.mean(0)
            for context, cells in controls.items()
            for name in self.measured(context)
        ]
        spread = torch.linalg.svd(every - self.center, full_matrices=False)[2][:2]
        first = torch.linalg.svd(torch.stack(shifts), full_matrices=False)[2][:2] if shifts else spread[:0]
        self.plane = torch.linalg.qr(torch.cat([first, spread]).T)[0][:, :2].numpy()

    # -- genes

    def _levels(self, cells: ad.AnnData) -> sparse.csr_matrix:
        """Log1p-CP10k (cell, gene) of cells that have the modelled genes."""
        totals = None if self.vae.total_key is None else measured_totals(cells)
        return log1p_cp10k(cells.X, totals)

    def _changes(self, question: Question, virtual: ad.AnnData, levels: sparse.csr_matrix) -> pd.DataFrame:
        """What :class:`Answer` calls `genes`; `levels` (cell, gene) are those of the virtual cells."""
        own = self.levels[self.model.adata.obs_names.get_indexer(virtual.obs["source_cell"])]
        table = pd.DataFrame({"change": _mean(levels) - _mean(own), "low": np.nan, "high": np.nan})
        table.index = pd.Index(self.vae.genes, name="gene")
        if self._has_plan(question) and question.strength == 1:
            name = self._as_measured(question.context, cast(str, question.perturbation))
            table = self.model.intervals(question.context, name).set_index("gene").loc[self.vae.genes]
        source, target = self.sides(question)
        table["measured"] = self._mean_level(target) - self._mean_level(source) if len(target) else np.nan
        table["lfc"] = np.log2((1 + _mean(levels.expm1())) / (1 + _mean(own.expm1())))
        order = np.argsort(-np.abs(table["change"].to_numpy()), kind="stable")
        return table.iloc[order].reset_index()

    def _mean_level(self, rows: np.ndarray) -> np.ndarray:
        """Mean log1p-CP10k (gene,) of the cells' own counts."""
        return self._keep(("level", rows.tobytes()), lambda: _mean(self.levels[rows]))


def _mean(levels: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(levels.mean(axis=0, dtype=float)).ravel()


def leading(genes: pd.DataFrame, n: int) -> pd.DataFrame:
    """The `n` genes that rise most, largest first, then the `n` that fall most, largest last."""
    change = genes["change"].to_numpy()
    up, down = (np.flatnonzero(sign * change > 0)[:n] for sign in (1, -1))
    return genes.iloc[np.concatenate([up, down[::-1]])].reset_index(drop=True)


# -- series of questions

ORDERS, AT_ONCE, SHARED = ("in the label's order", "in the other order"), "sum of generators", "shared axes"


def ways_to_combine(cells: VirtualCells, context: str) -> pd.DataFrame:
    """Compare four ways to predict each measured pair of perturbations with the cells that got both.

    Shared axes learn a pair's interaction from its own cells where these were among the training cells; the other ways
    know the two single perturbations alone.

    Returns
    -------
    DataFrame with a row per pair and method: ``group, method, energy, floor``; energy distances are Euclidean,
    U-statistic, latent.
    """
    pairs = {name: parts for name in cells.measured(context) if len(parts := cells.parts(name)) == 2}
    rows = []
    for pair, (a, b) in pairs.items():
        ways = dict(zip(ORDERS, (Question((a, b), context), Question((b, a), context)), strict=True))
        ways |= {AT_ONCE: Question(pair, context, rule="generator"), SHARED: Question(pair, context)}
        answers = {way: cells.ask(question) for way, question in ways.items()}
        floor = answers[SHARED].floor
        rows.append((pair, "no change", answers[SHARED].energy_start, floor))
        rows += [(pair, way, answer.energy, floor) for way, answer in answers.items()]
    return pd.DataFrame(rows, columns=["group", "method", "energy", "floor"])


def dose_response(
    cells: VirtualCells, question: Question, strengths: Iterable[float], *, n_genes: int = 3
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A question at several strengths.

    Parameters
    ----------
    strengths
        Each between 0 and 1.5.
    n_genes
        Genes up and down, those that lead at strength 1.

    Returns
    -------
    tuple of DataFrame
        Distances: ``strength, energy, target`` (to the source cells as they were, and to the real cells aimed at);
        genes: ``strength, gene, lfc``.
    """
    leaders = leading(cells.ask(replace(question, strength=1.0)).genes, n_genes)["gene"]
    source = cells.latents(cells.sides(question)[0], MOST_COMPARED)
    rows, genes = [], []
    for strength in map(float, strengths):
        answer = cells.ask(replace(question, strength=strength))
        rows.append((strength, float(energy_distance(answer.operator(source), source)), "the unmoved cells"))
        rows.append((strength, answer.energy, "the real cells aimed at"))
        shown = answer.genes.set_index("gene").loc[leaders, ["lfc"]].reset_index()
        genes.append(shown.assign(strength=strength))
    distances = pd.DataFrame(rows, columns=["strength", "energy", "target"])
    return distances.sort_values("target", kind="stable", ignore_index=True), pd.concat(
        genes, ignore_index=True
    )
