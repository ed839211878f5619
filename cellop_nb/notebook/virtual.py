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
from torch import Tensor

from ..analysis.cellop import CellOp
from ..analysis.combinations import combine, sequence
from ..analysis.diagnose import affine_health
from ..analysis.plan import Plan
from ..analysis.predict import REP, Drawn, Start, assemble, embed, modelled_counts
from ..data.counts import model_counts
from ..data.groups import Groups, controls_by_context
from ..data.splits import SPLIT_KEY, rows_of
from ..data.synthetic import planted_operator, planted_proportions
from ..display import card
from ..errors import DataError, LabelError, did_you_mean
from ..models.affine import AffineOperator, check_strength
from ..models.energy import energy_distance, noise_floor, self_distance
from ..models.likelihood import COUNTS_PER_CELL
from ..models.operators import perturbation_parts

__all__ = [
    "Question",
    "VirtualCells",
    "dose_response",
    "half_dose_errors",
    "ways_to_combine",
]

_SIZES = {"draw": 5000, "energy": 1000, "decode": 300}
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
        ``measured`` (of the real cells; NaN without) and ``lfc`` (log2 fold change of mean counts per 10,000).
    counts
        Chosen gene: cloud name to log1p-CP10k of its cells, (cell,).
    eigenvalues
        (d,) complex, of the operator's matrix.
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
    eigenvalues: np.ndarray
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
        self.screen = modelled_counts(model.adata, self.vae, model.keys)
        embed(self.screen, self.vae)
        self.z = torch.from_numpy(self.screen.obsm[REP])
        self._controls = controls_by_context(self.screen, model.keys)
        self.contexts = sorted(self._controls)
        if not self.contexts:
            fix = f"give cells with obs[{model.keys.perturbation_key!r}] == {self.control!r}"
            raise DataError("control cells to start from", "none", fix)
        alone = sum(map(len, self._controls.values())) == self.screen.n_obs
        self.groups = None if alone else Groups(self.screen, min_cells=1)
        self._test = np.zeros(self.screen.n_obs, dtype=bool)
        if SPLIT_KEY in self.screen.obs and (self.screen.obs[SPLIT_KEY] == "test").any():
            self._test[rows_of(self.screen, "test")] = True
        self._fit_plane()
        self._counts = model_counts(self.screen, self.vae)
        self._gene_names = np.array(self.vae.genes, dtype=object)
        self._column = {gene: i for i, gene in enumerate(self.vae.genes)}

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
        moving, (source, target) = self._at(question, whole), self._sides(question)
        start, planned, moved = self._start(source), self._plan(question), moving(self._latents(source))
        standing, why = self._standing(question)
        energy, energy_start, floor, n_moved, n_real = self._energies(moved, source, target)
        draw = torch.Generator(device=start.z.device).manual_seed(self.seed)
        if planned is None:
            drawn = start.moved(moving, generator=draw)
        else:
            growth = question.strength * self.model.means.growth_of(question.context, planned.perturbation)
            drawn = start.moved(whole, question.strength, planned, growth, draw)
        genes = self._changes(question, whole, moving, drawn)
        gene = str(genes["gene"].iloc[0]) if gene is None else gene
        if gene not in self._column:
            raise LabelError("a gene of the model", repr(gene), did_you_mean(gene, self._column))
        key = ("health", question.context, question.perturbation, question.rule)
        return Answer(
            question=question, standing=standing, why=why, operator=moving,
            planned=planned is not None,
            start=self._still(source), moved=self._on_map(moved), real=self._still(target),
            energy=energy, energy_start=energy_start, floor=floor, n_moved=n_moved, n_real=n_real,
            genes=genes, gene=gene, counts=self._gene_counts(gene, source, target, drawn),
            eigenvalues=np.linalg.eigvals(moving.homogeneous[:-1, :-1]),
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
        return whole.power(check_strength(strength))

    def measured(self, context: str) -> list[str]:
        """Perturbations, combinations included, of which there are cells in this context."""
        pairs = () if self.groups is None else self.groups.pairs
        return [name for own, name in pairs if own == context]

    def source(self, question: Question) -> Tensor:
        """Latents (cell, d) of the cells that a question moves, at most as many as an energy distance takes."""
        return self._latents(self._sides(question)[0], "energy")

    def recalled(self, question: Question) -> pd.Series:
        """Log2 fold change of each gene between the real cells of both sides as the VAE gives them back.

        No operator takes part: an error that is here already is the VAE's.
        """
        before, after = (
            self.vae.decode(start.z, start.library, start.covariates).mean / start.library[:, None]
            for start in map(self._start, self._sides(question))
        )
        change = torch.log2(_level(after.mean(0)) / _level(before.mean(0)))
        return pd.Series(change.detach().cpu().numpy(), index=self.vae.genes)

    def counted(self, question: Question) -> pd.Series:
        """Log2 fold change of each gene's mean counts per 10,000 between the real cells of both sides."""
        before, after = (
            (self._counts.csr[rows].T @ (1 / self._counts.library[rows].numpy()))[: self.vae.n_genes]
            / len(rows)
            for rows in self._sides(question)
        )
        return pd.Series(np.log2(_level(after) / _level(before)), index=self.vae.genes)

    def to_adata(self, question: Question) -> ad.AnnData:
        """The virtual cells with their counts, as :meth:`CellOp.predict` gives them, for further analysis.

        Returns
        -------
        AnnData of the source cells; ``uns["cellop_nb"]["prediction"]`` says what was asked and whether it is a
        prediction.
        """
        whole = self.operator(question.context, question.perturbation, question.rule)
        moving, context = self._at(question, whole), question.context
        if question.reverse:
            rows = self._sides(question)[0]
            draw = torch.Generator(device=next(self.vae.parameters()).device).manual_seed(self.seed)
            drawn = Start.of(self.screen, self.vae, rows).moved(moving, generator=draw)
            cells = assemble(self.model.adata[rows], self.model.keys, self.vae.genes, drawn, question.label)
        elif self._plan(question) is not None:
            cells = self.model.predict(
                context=context, perturbation=cast(str, question.perturbation), strength=question.strength
            )
        else:
            cells = self.model.predict(context=context, perturbation=question.label, operator=moving)
        cells.obs[self.model.keys.perturbation_key] = question.label
        standing, why = self._standing(question)
        about = vars(question) | {"perturbation": question.label, "operator": moving.label, "seed": self.seed}
        about |= {"standing": standing, "why": why}
        cells.uns["cellop_nb"] = dict(cells.uns.get("cellop_nb", {})) | {"prediction": about}
        return cells

    def forget(self) -> None:
        """Drop what earlier questions left behind; the next ones take as long as the first."""
        self._cached.clear()

    def _keep(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, computed once for each key."""
        if key not in self._cached:
            self._cached[key] = compute()
        return self._cached[key]

    # -- parts of the answer

    def _at(self, question: Question, whole: AffineOperator) -> AffineOperator:
        """The operator at the strength that is asked for, and in its direction."""
        strength = check_strength(question.strength)
        if isinstance(question.perturbation, str):
            moving = whole.power(strength)
        else:
            moving = self.operator(question.context, question.perturbation, strength=strength)
        return moving.inverse() if question.reverse else moving

    def _plan(self, question: Question) -> Plan | None:
        """Where the moved cells are carried to; None where there is no plan: the other rules, sequences, the way back."""
        if question.reverse or question.rule != "axes" or not isinstance(question.perturbation, str):
            return None
        name = self._as_measured(question.context, question.perturbation)
        return self._keep(("plan", question.context, name), lambda: self.model.plan(question.context, name))

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

    def _sides(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
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

    def _take(self, rows: np.ndarray, kind: str = "draw") -> np.ndarray:
        """At most as many of the rows as this kind of work takes, in random order (seeded)."""
        return np.random.default_rng(self.seed).permutation(rows)[: _SIZES[kind]]

    def _latents(self, rows: np.ndarray, kind: str = "draw") -> Tensor:
        """Latents (cell, d) of the rows that :meth:`_take` draws."""
        return self._keep(("latents", kind, rows.tobytes()), lambda: self.z[self._take(rows, kind)])

    def _still(self, rows: np.ndarray) -> np.ndarray:
        """(cell, 2) where the drawn cells of a group lie on the map, unmoved."""
        return self._keep(("map", rows.tobytes()), lambda: self._on_map(self._latents(rows)))

    def _energies(self, moved: Tensor, source: np.ndarray, target: np.ndarray):
        """Energy distance of moved and of unmoved cells to the real ones, floor, and how many cells a side."""
        moved = moved[: _SIZES["energy"]]
        if len(target) < 2:
            return math.nan, math.nan, math.nan, len(moved), len(target)
        real = self._latents(target, "energy")

        def fixed():
            unmoved = self._latents(source, "energy")
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

    def _start(self, rows: np.ndarray) -> Start:
        """The cells that stand for a group, decoded as they are."""
        return self._keep(
            ("start", rows.tobytes()), lambda: Start.of(self.screen, self.vae, self._take(rows, "decode"))
        )

    def _changes(
        self, question: Question, whole: AffineOperator, moving: AffineOperator, drawn: Drawn
    ) -> pd.DataFrame:
        """What :class:`Answer` calls `genes`."""
        source, target = self._sides(question)
        start, planned, strength = self._start(source), self._plan(question), question.strength
        low = high = np.full(len(self._column), np.nan)
        if planned is None:
            change = start.change(moving)
        elif strength == 1:
            change, low, high = planned.change, planned.low, planned.high
        else:
            change = start.change(moving) + strength * (planned.change - start.change(whole))
        library = start.library.cpu().numpy()
        before = _level((start.x.cpu().numpy() / library[:, None]).mean(0))
        after = _level(drawn.mean.multiply(math.exp(-drawn.growth) / library[:, None]).mean(0).A1)
        order = np.argsort(-np.abs(change), kind="stable")
        table = {
            "gene": self._gene_names, "change": change, "low": low, "high": high,
            "measured": self._measured(source, target), "lfc": np.log2(after / before),
        }  # fmt: skip
        return pd.DataFrame({name: values[order] for name, values in table.items()})

    def _gene_counts(
        self, gene: str, source: np.ndarray, target: np.ndarray, drawn: Drawn
    ) -> dict[str, np.ndarray]:
        """Log1p-CP10k of one gene: source cells, virtual cells, real cells."""
        column, library = self._column[gene], self._start(source).library.cpu().numpy()
        virtual = drawn.counts[:, [column]].toarray().ravel()
        return {
            "start": self._log_counts(column, source),
            "moved": np.log1p(virtual / (library * math.exp(drawn.growth)) * COUNTS_PER_CELL),
            "real": self._log_counts(column, target),
        }

    def _measured(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Measured change (gene,) of mean log1p-CP10k between the real cells of both sides."""
        if not len(target):
            return np.full(len(self._column), np.nan)
        before, after = (self._mean_level(rows) for rows in (source, target))
        return after - before

    def _mean_level(self, rows: np.ndarray) -> np.ndarray:
        """Mean log1p-CP10k (gene,) of the cells' own counts."""

        def compute() -> np.ndarray:
            counts = self._counts.csr[rows][:, : self.vae.n_genes]
            shares = counts.multiply(COUNTS_PER_CELL / self._counts.library[rows].numpy()[:, None])
            return np.asarray(shares.log1p().mean(0), dtype=float).ravel()

        return self._keep(("level", rows.tobytes()), compute)

    def _log_counts(self, column: int, rows: np.ndarray) -> np.ndarray:
        every = self._keep(("gene", column), lambda: self._counts.csr[:, [column]].toarray().ravel())
        return np.log1p(every[rows] / self._counts.library[rows].numpy() * COUNTS_PER_CELL)


def _level(share):
    """Counts per 10,000, plus one: what fold changes are taken of."""
    return COUNTS_PER_CELL * share + 1


def leading(genes: pd.DataFrame, n: int) -> pd.DataFrame:
    """The `n` genes that rise most, largest first, then the `n` that fall most, largest last."""
    change = genes["change"].to_numpy()
    up, down = (np.flatnonzero(sign * change > 0)[:n] for sign in (1, -1))
    return genes.iloc[np.concatenate([up, down[::-1]])].reset_index(drop=True)


# -- series of questions

ORDERS, AT_ONCE, SHARED = ("in the label's order", "in the other order"), "sum of generators", "shared axes"

HALF, FULL = "operator at strength 0.5", "operator at strength 1"
HALVED = "half of the operator's full change"
VAE_ALONE, COUNTED = "no operator: perturbed cells through the VAE", "no model: counts of the perturbed cells"


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
    source = cells.source(question)
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


def half_dose_errors(cells: VirtualCells, question: Question) -> pd.Series:
    """How far predicted changes of expression are from the planted ones, and how much of it is the operator's.

    The truth at strength t is the planted operator to the power t, applied to the true latents of the control cells, and
    the exact mean expression there. An error is relative: the length of the difference of the log2 fold changes of all
    genes over the length of the true ones. :data:`VAE_ALONE` is the change between real cells as encoder and decoder give
    them back, and :data:`COUNTED` that of their counts, which holds the noise of the sample.

    Returns
    -------
    Series of what was compared to its error, over the modelled genes; empty where nothing was planted, genes were cut
    from the data, or the planted change is none.
    """
    adata = cells.model.adata
    truth = adata.uns.get("cellop_nb", {}).get("truth")
    if truth is None or planted_proportions(adata, adata.obsm["X_truth"][:1]).shape[1] != adata.n_vars:
        return pd.Series(dtype=float)
    z = torch.as_tensor(adata.obsm["X_truth"][cells.rows(question.context, cells.control)]).double()
    matrix, shift = planted_operator(adata, cast(str, question.perturbation), question.context)
    planted = AffineOperator(torch.as_tensor(matrix), torch.as_tensor(shift))

    def level(latent):
        return np.log2(COUNTS_PER_CELL * planted_proportions(adata, latent.numpy()).mean(0) + 1)

    true = {strength: level(planted.power(strength)(z)) - level(z) for strength in (0.5, 1.0)}
    if not np.linalg.norm(true[1.0]) > 0:
        return pd.Series(dtype=float)
    half, full = (cells.ask(replace(question, strength=s)).genes.set_index("gene") for s in (0.5, 1.0))
    changes = {HALF: (half["lfc"], 0.5), HALVED: (full["lfc"] / 2, 0.5), FULL: (full["lfc"], 1.0)}
    changes |= {VAE_ALONE: (cells.recalled(question), 1.0), COUNTED: (cells.counted(question), 1.0)}
    modelled = adata.var_names.isin(cells.model.genes)
    errors = {
        name: np.linalg.norm((change.reindex(adata.var_names) - true[strength])[modelled])
        / np.linalg.norm(true[strength][modelled])
        for name, (change, strength) in changes.items()
    }
    return pd.Series(errors)
