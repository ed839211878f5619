"""Virtual cells: what the explorer asks and shows, and series of questions as tables; no widget, no drawing.

One question (context, perturbation, strength, direction) has one answer: where the source cells go, how far they
end from the real ones, which genes change, how healthy the operator is, and what is known about the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..analysis.combinations import combine, sequence
from ..analysis.diagnose import affine_health
from ..analysis.predict import decode_cells, latents
from ..data.contract import context_labels, obs_labels
from ..data.counts import CountMatrix, DiskCounts, model_counts
from ..data.groups import Groups
from ..data.synthetic import planted_operator, planted_proportions
from ..display import card
from ..errors import DataError, LabelError, did_you_mean, three_beats
from ..models.affine import AffineOperator, check_strength
from ..models.carry import Observed, carry_counts
from ..models.energy import energy_distance, noise_floor, self_distance
from ..models.likelihood import COUNTS_PER_CELL, NegativeBinomial
from ..models.operators import OperatorModel, perturbation_parts
from ..models.vae import NBVAE

MIN_REAL = 50
"""Held-out cells below which a moved cloud is compared with all cells of the group."""

_WITH_INTERVAL = 40
"""Genes that get an interval, those that change most: quantiles of all would take longer than the rest."""


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
        How a combination is built: ``"axes"``, ``"composition"``, ``"generator"`` (:func:`cellop_nb.combine`).
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
    genes
        DataFrame with all genes, largest absolute change first: ``gene, lfc, low, high`` (95 % bootstrap interval
        over cells) and ``measured`` (of the real cells; NaN without).
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
        compared = np.isfinite(self.energy)
        energy = f"{self.energy:.4f} ({self.n_moved:,} to {self.n_real:,} cells)"
        facts = {
            "what is known": self.why,
            "energy distance": energy if compared else "no real cells",
            "no change": self.energy_start if compared else None,
            "noise floor": self.floor if compared else None,
            "genes that change most": [
                f"{row.gene} {row.lfc:+.2f}" for row in self.genes.head(6).itertuples()
            ],
            "stability": self.verdict,
        }
        note = (
            "Energy distances are Euclidean, U-statistic, in the latent space; genes are log2 fold changes."
        )
        return card(f"{self.question.context}: {self.question.label}", facts, note=note)

    @property
    def verdict(self) -> str:
        """Stability of the operator in words."""
        return f"{self.health['verdict']}: {self.health['advice']}"


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
    plane
        (d, 2) orthonormal directions of the map: those of the largest mean responses. Fitted once.
    center
        (d,) mean of the control cells, the origin of the map.
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
        self.control, self.seed, self.n_replicates = control, seed, n_replicates
        self.perturbations = list(operators.conditions.perturbations)
        self._sizes = {"draw": max_cells, "energy": n_energy, "decode": n_decoded}
        self._cached: dict[Hashable, Any] = {}
        self.z = latents(adata, use_rep)
        labels = obs_labels(adata, perturbation_key).to_numpy()
        contexts = np.asarray(context_labels(adata, context_key), dtype=object)
        self.contexts = sorted(set(contexts[labels == control]))
        if not self.contexts:
            fix = f"give cells with obs[{perturbation_key!r}] == {control!r}"
            raise DataError(three_beats("control cells to start from", "none", fix))
        # whole numbers: a million labels are compared in a millisecond, as strings in fifty
        self._codes, self._names = pd.factorize(labels, sort=True)
        self._context_codes, self._context_names = pd.factorize(contexts)
        split = adata.obs[split_key].to_numpy() if split_key in adata.obs else np.full(len(adata), "train")
        self._train, self._test = (split == part for part in ("train", "test"))
        self._fit_plane()
        counts = model_counts(adata, vae)
        if isinstance(counts, DiskCounts):  # every move reads them: the model's genes are held in memory
            counts = counts.held(np.arange(len(counts)))
        self._counts: CountMatrix = counts
        self._gene_names = np.array(vae.genes, dtype=object)
        self._column = {gene: i for i, gene in enumerate(vae.genes)}

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
        moved = moving(self._latents(source))
        standing, why = self._standing(question)
        energy, energy_start, floor, n_moved, n_real = self._energies(moved, source, target)
        genes, after = self._changes(source, target, moving)
        gene = str(genes["gene"].iloc[0]) if gene is None else gene
        if gene not in self._column:
            raise LabelError(three_beats("a gene of the model", repr(gene), did_you_mean(gene, self._column)))
        key = ("health", question.context, question.perturbation, question.rule)
        return Answer(
            question=question, standing=standing, why=why, operator=moving,
            start=self._still(source), moved=self._on_map(moved), real=self._still(target),
            energy=energy, energy_start=energy_start, floor=floor, n_moved=n_moved, n_real=n_real,
            genes=genes, gene=gene, counts=self._gene_counts(gene, source, target, after),
            eigenvalues=np.linalg.eigvals(moving.homogeneous[:-1, :-1]),
            health=self._keep(key, lambda: affine_health(whole.matrix.numpy(), whole.shift.numpy())),
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
        if not isinstance(perturbation, str):
            return sequence(self.operators, [(step, strength) for step in steps], context)
        whole = self._keep(
            ("operator", context, perturbation, rule),
            lambda: combine(self.operators, perturbation, context, rule=rule),
        )
        return whole.power(check_strength(strength))

    def measured(self, context: str) -> list[str]:
        """Perturbations, combinations included, of which there are cells in this context."""
        codes = np.unique(self._codes[self._in(context)])
        return [name for name in self._names[codes] if name != self.control]

    def source(self, question: Question) -> Tensor:
        """Latents (cell, d) of the cells that a question moves, at most as many as an energy distance takes."""
        return self._latents(self._sides(question)[0], "energy")

    def target(self, question: Question) -> Tensor:
        """Latents (cell, d) of the real cells that the moved ones are compared with."""
        return self._latents(self._sides(question)[1], "energy")

    def recalled(self, question: Question) -> pd.Series:
        """Log2 fold change of each gene between the real cells of both sides as the VAE gives them back.

        No operator takes part: an error that is here already is the VAE's.
        """
        before, after = (_level(self._decoded(rows)["shares"].mean(0)) for rows in self._sides(question))
        return pd.Series(torch.log2(after / before).numpy(), index=self.vae.genes)

    def to_adata(self, question: Question) -> ad.AnnData:
        """The moved cells with sampled counts, as :func:`cellop_nb.predict` gives them, for further analysis.

        Returns
        -------
        AnnData of the source cells; ``uns["cellop_nb"]["prediction"]`` says what was asked and whether it is a
        prediction.
        """
        whole = self.operator(question.context, question.perturbation, question.rule)
        moving, (source, _) = self._at(question, whole), self._sides(question)
        z = self.z[source]
        moved = decode_cells(
            self.adata[source], self.vae, moving(z), start=z, layer=self.layer, key_added=self.use_rep,
            seed=self.seed,
        )  # fmt: skip
        moved.obs[self.perturbation_key] = question.label
        standing, why = self._standing(question)
        moved.uns["cellop_nb"] = {
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
        return moved

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

    def _standing(self, question: Question) -> tuple[str, str]:
        perturbation, context = question.perturbation, question.context
        if context not in self.operators.conditions.contexts:
            return (
                "prediction",
                "prediction: the fit had no cells of this context, the shared response is used",
            )
        if not isinstance(perturbation, str):
            return "prediction", "prediction: a sequence (real cells, if any, got all at once)"
        name: str = perturbation
        if not self._keep(
            ("trained", context, name), lambda: (self._inside(context, name) & self._train).any()
        ):
            kind = "combination" if "+" in name else "condition"
            return "prediction", f"prediction: the fit had no cells of this {kind}"
        if question.strength not in (0.0, 1.0):
            beyond = question.strength > 1
            part = "beyond the measured strength" if beyond else "between control and measured"
            return "prediction", f"prediction: {part}"
        return "fitted", "fitted: training cells of this condition took part"

    # -- the cells

    def _sides(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the cells that are moved, and of the real cells that they should become.

        Raises
        ------
        DataError
            For a reversal where there are no perturbed cells to lead back.
        """
        control = self.rows(question.context, self.control)
        perturbed = self.rows(question.context, together(question.perturbation))
        if question.reverse and not len(perturbed):
            received = f"none of {question.perturbation!r} in {question.context!r}"
            fix = "ask for a measured condition"
            raise DataError(three_beats("perturbed cells to lead back", received, fix))
        return (perturbed, control) if question.reverse else (control, perturbed)

    def rows(self, context: str, perturbation: str) -> np.ndarray:
        """Rows of a group: control cells all; perturbed cells those that no fit has seen, where there are enough."""

        def select() -> np.ndarray:
            inside = self._inside(context, perturbation)
            unseen = inside & self._test
            use = inside if perturbation == self.control or unseen.sum() < MIN_REAL else unseen
            return np.flatnonzero(use)

        return self._keep(("rows", context, perturbation), select)

    def _inside(self, context: str, perturbation: str) -> np.ndarray:
        """Which cells belong to a group, as booleans; "A+B" is "B+A"."""
        parts = frozenset(perturbation.split("+"))
        same = [i for i, name in enumerate(self._names) if frozenset(str(name).split("+")) == parts]
        return self._in(context) & np.isin(self._codes, same)

    def _take(self, rows: np.ndarray, kind: str = "draw") -> np.ndarray:
        """At most as many of the rows as this kind of work takes, in random order (seeded)."""
        return np.random.default_rng(self.seed).permutation(rows)[: self._sizes[kind]]

    def _latents(self, rows: np.ndarray, kind: str = "draw") -> Tensor:
        """Latents (cell, d) of the rows that :meth:`_take` draws."""
        return self._keep(("latents", kind, rows.tobytes()), lambda: self.z[self._take(rows, kind)])

    def _still(self, rows: np.ndarray) -> np.ndarray:
        """(cell, 2) where the drawn cells of a group lie on the map, unmoved."""
        return self._keep(("map", rows.tobytes()), lambda: self._on_map(self._latents(rows)))

    def _energies(self, moved: Tensor, source: np.ndarray, target: np.ndarray):
        """Energy distance of moved and of unmoved cells to the real ones, floor, and how many cells a side."""
        moved = moved[: self._sizes["energy"]]
        if len(target) < 2:
            return float("nan"), float("nan"), float("nan"), len(moved), len(target)
        real = self._latents(target, "energy")

        def fixed():
            unmoved = self._latents(source, "energy")
            own = self_distance(real, [len(real)])
            return own, float(energy_distance(unmoved, real, y_self=own)), noise_floor(real, seed=self.seed)

        own, before, floor = self._keep(("energy", source.tobytes(), target.tobytes()), fixed)
        return float(energy_distance(moved, real, y_self=own)), before, floor, len(moved), len(real)

    def _in(self, context: str) -> np.ndarray:
        """Which cells are of a context; none of one that the data do not hold."""
        return self._context_codes == next(
            (i for i, name in enumerate(self._context_names) if name == context), -2
        )

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
            self.z[rows].mean(0) - cells.mean(0)
            for context, cells in controls.items()
            for name in self._names
            if name != self.control and len(rows := self.rows(context, str(name)))
        ]
        spread = torch.linalg.svd(every - self.center, full_matrices=False)[2][:2]
        first = torch.linalg.svd(torch.stack(shifts), full_matrices=False)[2][:2] if shifts else spread[:0]
        self.plane = torch.linalg.qr(torch.cat([first, spread]).T)[0][:, :2].numpy()

    # -- genes

    @torch.no_grad()
    def _changes(self, source: np.ndarray, target: np.ndarray, moving: AffineOperator):
        """What :class:`Answer` calls `genes`, and the moved cells decoded.

        Returns
        -------
        DataFrame, and the distribution (cell, gene) after the move.
        """
        start, weights = self._decoded(source), self._weights(source)
        z = moving(self._latents(source, "decode"))
        after = self.vae.decode(z, start["library"], start["covariates"])
        shares = after.mean / start["library"][:, None]
        lfc = torch.log2(_level(shares.mean(0)) / _level(start["shares"].mean(0))).numpy()
        order = np.argsort(-np.abs(lfc), kind="stable")
        top, (low, high) = order[:_WITH_INTERVAL], np.full((2, len(lfc)), np.nan)
        ends = (_level(weights @ cells[:, top]) for cells in (shares, start["shares"]))
        replicates = torch.log2(torch.div(*ends)).numpy()
        low[: len(top)], high[: len(top)] = np.quantile(replicates, [0.025, 0.975], axis=0)
        ranked = {"gene": self._gene_names[order], "lfc": lfc[order], "low": low, "high": high}
        return pd.DataFrame({**ranked, "measured": self._measured(source, target)[order]}), after

    def _gene_counts(
        self, gene: str, source: np.ndarray, target: np.ndarray, after: NegativeBinomial
    ) -> dict[str, np.ndarray]:
        """Log1p-CP10k of one gene: source cells, the same moved (counts sampled), real cells."""
        column, start = self._column[gene], self._decoded(source)
        expected = start["observed"].mean(after)[:, column]
        sampled = carry_counts(expected, torch.Generator().manual_seed(self.seed)).numpy()
        return {
            "start": self._log_counts(column, source),
            "moved": np.log1p(sampled / start["library"].numpy() * COUNTS_PER_CELL),
            "real": self._log_counts(column, target),
        }

    def _decoded(self, group: np.ndarray) -> dict:
        """The cells that stand for a group, decoded as they are."""

        @torch.no_grad()
        def decode() -> dict:
            rows = self._take(group, "decode")
            library = self._counts.library[rows]
            covariates = {name: codes[rows] for name, codes in self._counts.covariates.items()}
            x = torch.from_numpy(self._counts.csr[rows][:, : self.vae.n_genes].toarray())
            before = self.vae.decode(self._latents(group, "decode"), library, covariates)
            observed, shares = Observed(x, library, before), before.mean / library[:, None]
            return {"library": library, "covariates": covariates, "observed": observed, "shares": shares}

        return self._keep(("decoded", group.tobytes()), decode)

    def _weights(self, group: np.ndarray) -> Tensor:
        """Bootstrap weights (replicate, cell) over the decoded cells of a group."""

        def draw() -> Tensor:
            n = len(self._decoded(group)["library"])
            random = np.random.default_rng(self.seed)
            draws = random.multinomial(n, np.full(n, 1 / n), size=self.n_replicates)
            return torch.from_numpy((draws / n).astype(np.float32))

        return self._keep(("weights", group.tobytes()), draw)

    def _measured(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Measured log2 fold change (gene,) between the real cells of both sides."""
        if not len(target):
            return np.full(len(self._column), np.nan)
        before, after = (_level(self._mean_share(rows)) for rows in (source, target))
        return np.log2(after / before)

    def _mean_share(self, rows: np.ndarray) -> np.ndarray:
        """Mean share (gene,) of the cells' own counts."""

        def compute() -> np.ndarray:
            shares = self._counts.csr[rows].T @ (1 / self._counts.library[rows].numpy())
            return shares[: self.vae.n_genes] / len(rows)

        return self._keep(("share", rows.tobytes()), compute)

    def _log_counts(self, column: int, rows: np.ndarray) -> np.ndarray:
        every = self._keep(("gene", column), lambda: self._counts.csr[:, [column]].toarray().ravel())
        return np.log1p(every[rows] / self._counts.library[rows].numpy() * COUNTS_PER_CELL)


def together(perturbation: str | tuple[str, ...]) -> str:
    """Nobody measures sequences: the nearest that there is are cells that got all of it at once."""
    if isinstance(perturbation, str):
        return perturbation
    return "+".join(dict.fromkeys(part for step in perturbation for part in step.split("+")))


def _level(share):
    """Counts per 10,000, plus one: what fold changes are taken of."""
    return COUNTS_PER_CELL * share + 1


def leading(genes: pd.DataFrame, n: int) -> pd.DataFrame:
    """The `n` genes that rise most, largest first, then the `n` that fall most, largest last."""
    change = genes["lfc"].to_numpy()
    up, down = (np.flatnonzero(sign * change > 0)[:n] for sign in (1, -1))
    return genes.iloc[np.concatenate([up, down[::-1]])].reset_index(drop=True)


# -- series of questions

ORDERS, AT_ONCE, SHARED = ("in the label's order", "in the other order"), "sum of generators", "shared axes"

NO_CHANGE, SHIFT = "no change", "mean shift of the other contexts"
LENT, OWN = "operator, lent", "operator, fitted here"
HALF, HALVED, FULL = (
    "operator at strength 0.5",
    "half of the operator's full change",
    "operator at strength 1",
)
VAE_ALONE, COUNTED = "no operator: perturbed cells through the VAE", "no model: counts of the perturbed cells"


def ways_to_combine(cells: VirtualCells, context: str) -> pd.DataFrame:
    """Four ways to build each measured pair of perturbations, compared with the cells that got both.

    Shared axes learn a pair's interaction from its own cells where these were among the training cells; the other ways
    know the two single perturbations alone.

    Returns
    -------
    DataFrame with a row per pair and method: ``group, method, energy, floor``; energy distances are Euclidean,
    U-statistic, latent.
    """
    pairs = [name for name in cells.measured(context) if name.count("+") == 1]
    rows = []
    for pair in pairs:
        a, b = pair.split("+")
        ways = dict(zip(ORDERS, (Question((a, b), context), Question((b, a), context)), strict=True))
        ways |= {AT_ONCE: Question(pair, context, rule="generator"), SHARED: Question(pair, context)}
        answers = {way: cells.ask(question) for way, question in ways.items()}
        floor = answers[SHARED].floor
        rows.append((pair, NO_CHANGE, answers[SHARED].energy_start, floor))
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
        genes: ``strength, gene, lfc, low, high``.
    """
    leaders = leading(cells.ask(replace(question, strength=1.0)).genes, n_genes)["gene"]
    source = cells.source(question)
    rows, genes = [], []
    for strength in map(float, strengths):
        answer = cells.ask(replace(question, strength=strength))
        rows.append((strength, float(energy_distance(answer.operator(source), source)), "the unmoved cells"))
        rows.append((strength, answer.energy, "the real cells aimed at"))
        shown = answer.genes.set_index("gene").loc[leaders, ["lfc", "low", "high"]].reset_index()
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
    Series of what was compared to its error; empty where nothing was planted or the planted change is none.
    """
    adata = cells.adata
    if "truth" not in adata.uns.get("cellop_nb", {}):
        return pd.Series(dtype=float)
    z = torch.as_tensor(adata.obsm["X_truth"][cells.rows(question.context, cells.control)]).double()
    planted = AffineOperator(
        *map(torch.as_tensor, planted_operator(adata, question.perturbation, question.context))
    )

    def level(latent):
        return np.log2(COUNTS_PER_CELL * planted_proportions(adata, latent.numpy()).mean(0) + 1)

    true = {strength: level(planted.power(strength)(z)) - level(z) for strength in (0.5, 1.0)}
    if not np.linalg.norm(true[1.0]) > 0:
        return pd.Series(dtype=float)
    half, full = (cells.ask(replace(question, strength=s)).genes.set_index("gene") for s in (0.5, 1.0))
    changes = {HALF: (half["lfc"], 0.5), HALVED: (full["lfc"] / 2, 0.5), FULL: (full["lfc"], 1.0)}
    changes |= {VAE_ALONE: (cells.recalled(question), 1.0), COUNTED: (full["measured"], 1.0)}
    errors = {
        name: np.linalg.norm(change.reindex(adata.var_names) - true[strength])
        / np.linalg.norm(true[strength])
        for name, (change, strength) in changes.items()
    }
    return pd.Series(errors)


def lent_responses(
    lent: VirtualCells, own: VirtualCells, training: Groups, context: str, perturbations: Iterable[str]
) -> pd.DataFrame:
    """Operators that were fitted without a context, in that context, beside the mean shift and the operators' own fit.

    Parameters
    ----------
    lent, own
        The same cells with operators that have not and that have seen the context's perturbed cells.
    training
        Groups that `lent` was fitted on; their mean shifts are averaged.

    Returns
    -------
    DataFrame with a row per perturbation and method: ``group, method, energy, floor``; energy distances are Euclidean,
    U-statistic, latent, to the same real cells.
    """
    rows = []
    for name in perturbations:
        question = Question(name, context)
        far, near = lent.ask(question), own.ask(question)
        shifts = [
            g.cells.mean(0) - training.control[g.context].mean(0) for g in training if g.perturbation == name
        ]
        shifted = own.source(question) + torch.stack(shifts).mean(0)
        ways = {
            NO_CHANGE: far.energy_start,
            SHIFT: float(energy_distance(shifted, own.target(question))),
            LENT: far.energy,
            OWN: near.energy,
        }
        rows += [(name, way, energy, far.floor) for way, energy in ways.items()]
    return pd.DataFrame(rows, columns=["group", "method", "energy", "floor"])
