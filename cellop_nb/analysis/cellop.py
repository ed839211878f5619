"""`CellOp`, the fitted predictor of a screen: what a perturbation does to the cells of any context that has controls."""

from __future__ import annotations

import logging
import resource
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import blake2b, sha256
from io import StringIO
from numbers import Real
from operator import attrgetter
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from tqdm.auto import tqdm

from .. import __version__
from ..data.contract import (
    Keys,
    check_names,
    check_values,
    context_name,
    counts,
    is_set_up,
    keys_of,
    obs_labels,
)
from ..data.counts import TOTAL_KEY, count_matrix, require_in_memory
from ..data.genes import select_genes
from ..data.groups import Groups, controls_by_context
from ..data.splits import SPLIT_KEY, outside_test
from ..display import card
from ..errors import CheckpointError, LabelError, ModelError, checked, counted, did_you_mean
from ..models.affine import AffineOperator, check_strength
from ..models.carry import balanced_counts
from ..models.energy import noise_floor
from ..models.operators import Condition, OperatorModel, perturbation_parts
from ..models.vae import NBVAE
from ..training.callbacks import Callback, callback_list
from ..training.checkpoint import Saved, digest, model_file, read_models, write_models
from ..training.operators import OperatorTrainer, Penalties, new_operators
from ..training.vae import VAETrainer, new_vae
from .distances import etest
from .doses import DoseCurve, dose_curves
from .features import described
from .means import Factors, Means
from .metrics import EvaluationSpace, e_distance, log1p_cp10k
from .plan import (
    ADDITIVE,
    NO_CHANGE,
    SIMPLE,
    Evidence,
    Plan,
    combination_evidence,
    estimates,
    evidence,
    foresee,
    plan,
    plan_combination,
    weigh,
)
from .predict import REP, Start, assemble, carry_others, embed, kept_parts, modelled_counts, write_parts
from .unmeasured import Described, borrowed_operator, check_described
from .unmeasured import verdict as verdict_of_described

logger = logging.getLogger("cellop_nb")

Context = str | Sequence[str] | Mapping[str, str]
"""A context: its label, or the levels of its factors."""
CELLS_AT_ONCE = 4096
MOST_CELLS = 100_000_000
_LEFT_OUT = ["context", "perturbation", "method", "energy", "floor"]
MATRIX_SHARES = (1.0, 0.5, 0.0)
"""Shares of the operators' matrices among which leaving contexts out chooses; with none of it operators are shifts."""
LEAST_CELLS = 10
"""Training cells in which a gene must be counted to be modelled, or planned."""


@dataclass(frozen=True)
class Recipe:
    """How a :class:`CellOp` trains its parts and finds its weights; the same for every screen, context and perturbation.

    Parameters
    ----------
    n_hidden, vae_epochs, vae_lr, warmup_epochs, batch_size
        The VAE, first trained on the controls of all contexts: it has seen no response, and every fold starts from it.
    finish_epochs
        Epochs with the perturbed cells that a fold, or the final model, may see.
    most_visits
        Cells that a training of a VAE looks at in all: of many cells there are fewer epochs.
    operator_epochs, operator_lr, ridge
        The operators, in the latent space of their VAE.
    n_folds
        Parts into which the measured contexts are dealt; each is predicted from the others.
    most_judged, most_cells, most_moved
        Groups that the choice looks at in all, cells of a context that are moved to know a mean response, and moves of
        cells in all to know what operators miss: of many groups there are fewer cells, at least 25.
    dose_curve
        Form of the curves of doses: "linear", "log", "saturating", or "chosen" by leaving doses out.
    """

    n_hidden: int = 128
    vae_epochs: int = 40
    vae_lr: float = 3e-3
    warmup_epochs: int = 5
    batch_size: int = 128
    finish_epochs: int = 20
    most_visits: int = 300_000
    operator_epochs: int = 5
    operator_lr: float = 2e-2
    ridge: float = 0.1
    n_folds: int = 3
    most_judged: int = 48
    most_cells: int = 400
    most_moved: int = 100_000
    dose_curve: str = "chosen"


RECIPE = Recipe()


@dataclass(frozen=True, eq=False)
class Member:
    """A VAE and the operators that were fitted in its latent space."""

    vae: NBVAE
    operators: OperatorModel


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen by leaving measured contexts out, and why.

    Attributes
    ----------
    table : DataFrame
        A row per estimator of the mean response: ``estimator, left, weight``; `left` is the share of the response that it
        leaves of contexts it has not seen, the mean over them.
    n_contexts : float
        How many contexts that evidence is worth.
    matrices : Series
        By share of the operators' matrices that is used (:data:`MATRIX_SHARES`): how far the moved cells of contexts left
        out, carried to their plans, then lie from the real ones, as a share of the energy distance of no change.
    """

    table: pd.DataFrame
    n_contexts: float = 0.0
    matrices: pd.Series = field(default_factory=lambda: pd.Series(dtype=float))

    @classmethod
    def of(cls, seen: Evidence | None, matrices: pd.Series | None = None) -> Choice:
        """From the evidence of the contexts left out; None where there was nothing to leave out."""
        matrices = pd.Series(dtype=float) if matrices is None else matrices
        if seen is None:
            return cls(pd.DataFrame(columns=["estimator", "left", "weight"]), matrices=matrices)
        rows = {"estimator": seen.names, "left": seen.errors, "weight": weigh(seen)}
        return cls(pd.DataFrame(rows), seen.n_contexts, matrices)

    @property
    def matrix_share(self) -> float:
        """The share of the matrices that comes nearest; all where nothing tells it."""
        return 1.0 if self.matrices.empty else float(self.matrices.idxmin())

    def _of_matrices(self) -> str:
        if self.matrices.empty:
            return ""
        left = {share: f"{100 * value:.1f} %" for share, value in self.matrices.items()}
        said = f"operators with their matrices leave {left[1.0]} of the distance of no change, shifts alone {left[0.0]}"
        used = {1.0: "the matrices are used", 0.0: "no matrix is left: the operators are shifts here"}
        return f" There, {said}; {used.get(self.matrix_share, f'{self.matrix_share:.0%} of the matrices is used')}."

    def __str__(self) -> str:
        if not len(self.table):
            return "No context could be held out: no perturbation was measured in two contexts."
        rows = self.table.sort_values("weight", ascending=False)
        said = [f"{row.estimator} {row.weight:.2f}" for row in rows.itertuples() if row.weight > 0.005]
        left = self.table.set_index("estimator")["left"]
        best = left.drop(NO_CHANGE, errors="ignore").idxmin()
        return (
            f"The mean response is planned from {', '.join(said)}. In held-out contexts no change misses "
            f"{100 * left.get(NO_CHANGE, 1):.0f} % of the squared response; the best single estimator, {best}, misses "
            f"{100 * left[best]:.0f} %.{self._of_matrices()}"
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return card("Choice", {}, note=str(self)) + self.table.round(3).to_html(index=False)


class CellOp:
    """Predict any perturbation of a screen in any context that has control cells, after one fit.

    Control cells are *moved* by an operator in the latent space of a negative-binomial VAE, each from its own state;
    their mean response is *planned* from several estimators, with weights found by leaving measured contexts out;
    the moved cells are *carried* to it and keep their noise, zeros, library sizes and differences.

    Parameters
    ----------
    adata
        A screen that was set up (:func:`cellop_nb.setup`). Cells with ``obs["split"] == "test"`` never train.
    n_latent
        Dimension of the latent space.
    n_genes
        Variable genes to model, chosen on training cells; None for all.
    features
        DataFrame (perturbation, descriptor), so that perturbations that were never measured can be asked for.
    vae, operators
        Trained parts, which are not trained again; operators need the VAE in whose latent space they were fitted.
    n_members
        Models of further seeds, whose mean responses are averaged and whose cells are mixed.
    seed
        Seeds everything; draws follow the names of cells and contexts, not the order of rows.

    Attributes
    ----------
    vae, operators, genes
        The parts of the first member, and the modelled genes; after :meth:`fit`.
    choice : Choice
        What was chosen by leaving contexts out, in words and as a table.
    history : DataFrame
        A row per epoch, of all stages: ``stage, epoch, ...``.
    effects : DataFrame
        The energy-distance test of every measured group (:func:`~cellop_nb.analysis.distances.etest`).
    left_out : DataFrame
        How far predictions of measured groups that were left out lie from their real cells: ``context, perturbation,
        method, energy, floor``.
    costs : DataFrame
        A row per stage: ``stage, wall, cpu`` (seconds), ``peak_mb`` of the process.

    Raises
    ------
    LabelError
        If the data were not set up.
    ModelError
        For sizes that cannot be, or parts that do not fit the data or each other.
    """

    @checked
    def __init__(
        self,
        adata: ad.AnnData,
        *,
        n_latent: int = 32,
        n_genes: int | None = 2000,
        features: pd.DataFrame | None = None,
        vae: NBVAE | None = None,
        operators: OperatorModel | None = None,
        n_members: int = 1,
        seed: int = 0,
    ) -> None:
        self.adata, self.keys = adata, keys_of(adata)
        _check_parts(vae, operators, n_members)
        self.n_latent = n_latent if vae is None else vae.n_latent
        self.n_genes, self.features = n_genes, features
        self.n_members, self.seed, self.recipe = n_members, seed, RECIPE
        self._ready_vae, self._ready_operators = vae, operators
        self.members: list[Member] = []
        self.choice = Choice.of(None)
        self.history, self.costs = pd.DataFrame(), pd.DataFrame()
        self.effects, self.left_out = pd.DataFrame(), pd.DataFrame(columns=_LEFT_OUT)
        self.means: Means = None  # type: ignore[assignment]  # fit() makes them
        self.others: list[str] = []
        self.other_means: Means | None = None
        self.curves: dict[str, DoseCurve] = {}
        self._evidence: Evidence | None = None
        self._combination_evidence: Evidence | None = None
        self._described: Described | None = None
        self._plans: dict[tuple[str, str], Plan] = {}
        self._last: dict[tuple[str, str], Any] = {}
        self._index: dict[str, np.ndarray] | None = None
        self._labels: list[str] | None = None
        self._missing_genes = "refuse"
        self._shared: dict = {}
        self._unfinished: dict = {}

    def unfitted(self, adata: ad.AnnData, seed: int | None = None) -> CellOp:
        """The same settings on other data, not fitted."""
        model = CellOp(
            adata,
            n_latent=self.n_latent,
            n_genes=self.n_genes,
            features=self.features,
            n_members=self.n_members,
            seed=self.seed if seed is None else seed,
        )
        model.recipe = self.recipe
        return model

    def on(self, adata: ad.AnnData) -> CellOp:
        """This model asked of the control cells of `adata`, under its own keys where it was set up, else the model's."""
        other = copy(self)
        keys = keys_of(adata) if is_set_up(adata) else self.keys
        other.adata, other.keys, other._plans, other._last, other._index = adata, keys, {}, {}, None
        check_values(adata, keys.layer)
        return other

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def vae(self) -> NBVAE:
        """The VAE of the first member."""
        return self._fitted().members[0].vae

    @property
    def operators(self) -> OperatorModel:
        """The operators of the first member."""
        return self._fitted().members[0].operators

    @property
    def genes(self) -> list[str]:
        """The modelled genes."""
        return self.vae.genes

    @property
    def perturbations(self) -> list[str]:
        """What can be asked for, combinations of these besides; before a fit, what the training cells will tell."""
        if self.members:
            named = [] if self._described is None else self._described.names
            return list(dict.fromkeys([*self.operators.conditions.perturbations, *named]))
        if self._labels is None:
            groups = Groups(self.adata[outside_test(self.adata)])
            measured = [part for label in groups.perturbations for part in groups.parts(label)]
            named = [] if self.features is None else described(self.features)
            self._labels = list(dict.fromkeys([*measured, *named]))
        return self._labels

    def _fitted(self) -> CellOp:
        if not self.members:
            raise ModelError("a fitted CellOp", "one that was not fitted", "call model.fit() first")
        return self

    # -- fitting --------------------------------------------------------------------------------------------------

    def fit(self, callbacks: Sequence[Callback] = (), *, progress: bool = True) -> CellOp:
        """Train VAE and operators, and learn from held-out contexts how to plan a mean response.

        A fit that was interrupted goes on when it is called again: trainings that had ended are kept.

        Parameters
        ----------
        callbacks
            Of the trainings, such as ``co.LivePlot()``.
        progress
            Show what is done, and an estimate of the time left.

        Returns
        -------
        CellOp
            Itself, fitted.

        Raises
        ------
        DataError
            If the counts lie on disk, or no perturbed group is left for training.
        KeyboardInterrupt
            When it is interrupted; the model is then as it was before.
        """
        require_in_memory(self.adata)
        callbacks = callback_list(callbacks)
        stages = _Stages(2 + 2 * self.n_members + self.recipe.n_folds, progress)
        with self._as_before_on_failure(), stages:
            with stages("data"):
                cells = self._training_cells()
                groups = Groups(cells)
                if self.features is not None:
                    check_described(self.features, groups)
                _check_batches(cells, groups)
                space = EvaluationSpace.fit(cells, seed=self.seed)
                points = space.project(log1p_cp10k(space.select(cells)))
                self.effects = etest(Groups(cells, use_rep=points, min_cells=1), seed=self.seed)
                groups = self._at_strengths(cells, groups)
                self.means = Means.of(cells, groups)
                self.others, self.other_means = self._means_of_others(cells.var_names, groups)
                self._described = None if self.features is None else Described(self.features, self.means)
            members = [self._fit_member(cells, groups, k, stages, callbacks) for k in range(self.n_members)]
            self._latent_means = self._means_of_latents(cells, groups)
            matrices = self._judge(cells, groups, members, space, stages)
            self._judge_combinations(cells, groups, members[0], stages)
        self.members, self._plans, self._last, self._unfinished = members, {}, {}, {}
        self.choice = Choice.of(self._evidence, matrices)
        self.history, self.costs = stages.history(), stages.costs()
        return self

    @contextmanager
    def _as_before_on_failure(self) -> Iterator[None]:
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def _training_rows(self) -> np.ndarray:
        """Rows of the cells that may train, sorted by name."""
        check_names(self.adata)
        rows = np.flatnonzero(outside_test(self.adata))
        return rows[np.argsort(self.adata.obs_names.to_numpy()[rows], kind="stable")]

    def _training_cells(self) -> ad.AnnData:
        """Counts of the modelled genes of all cells that may train, with a split of their own."""
        adata, chosen = self.adata, self.adata[self._training_rows()]
        genes = list(adata.var_names)
        if self._ready_vae is not None:
            genes = self._ready_vae.genes
        elif self.n_genes is not None and self.n_genes < adata.n_vars:
            genes = select_genes(chosen, self.n_genes, split=None, min_cells=LEAST_CELLS)
        cells = modelled_counts(chosen, genes if self._ready_vae is None else self._ready_vae, self.keys)
        if SPLIT_KEY not in adata.obs or not (cells.obs[SPLIT_KEY] == "val").any():
            cells.obs[SPLIT_KEY] = self._split(cells)
        return cells

    def _at_strengths(self, cells: ad.AnnData, groups: Groups) -> Groups:
        """Find the curve of every perturbation, and write strengths in place of the doses of the training cells."""
        key = self.keys.dose_key
        if key is None:
            return groups
        self.curves = dose_curves(cells, groups, self.recipe.dose_curve)
        strengths = np.ones(cells.n_obs)
        for group in groups:
            strengths[group.rows] = self.curves[group.perturbation].strength(group.dose)
        cells.obs[key] = np.maximum(strengths, np.finfo(np.float32).eps)
        return Groups(cells)

    def _means_of_others(self, modelled: Sequence[str], groups: Groups) -> tuple[list[str], Means | None]:
        """Expressed genes that are not modelled, and what was measured of them in the same cells."""
        chosen = self.adata[self._training_rows()]
        seen = sparse.csr_matrix(counts(chosen, self.keys.layer)).getnnz(0) >= LEAST_CELLS
        others = list(chosen.var_names[seen & ~chosen.var_names.isin(modelled)])
        if not others:
            return [], None
        return others, Means.in_few_rows(modelled_counts(chosen, others, self.keys), groups)

    def _split(self, cells: ad.AnnData) -> pd.Categorical:
        """A tenth of each group for validation, by a hash of the cells' names: what else is measured does not matter."""
        rank = np.array([crc32(f"{self.seed} {name}".encode()) for name in cells.obs_names])
        index = Groups(cells, min_cells=1)
        labels = np.full(cells.n_obs, "train", dtype=object)
        for rows in (*index.control_rows.values(), *(group.rows for group in index)):
            n = max(int(len(rows) * 0.1 + 0.5), 2) if len(rows) > 3 else 0  # two make an energy distance
            labels[rows[np.argsort(rank[rows], kind="stable")[:n]]] = "val"
        return pd.Categorical(labels, ["train", "val", "test"])

    def _fit_member(self, cells, groups, k: int, stages: _Stages, callbacks) -> Member:
        seed = self.seed + k
        if self._ready_vae is not None:
            vae = deepcopy(self._ready_vae)
        else:
            with stages("VAE"):
                start = self._control_vae(cells, groups, seed, stages, callbacks)
                vae = self._finish(cells, start, seed, stages, callbacks)
        with stages("operators"):
            embed(cells, vae)
            operators = self._ready_operators or self._train_operators(cells, seed, stages, callbacks)
        return Member(vae.cpu().eval(), operators.cpu().eval())

    @staticmethod
    def _means_of_latents(cells, groups: Groups) -> dict[tuple[str, str], np.ndarray]:
        perturbed, control = groups.means(cells.obsm[REP])
        means = {(g.context, g.perturbation): row for g, row in zip(groups, perturbed, strict=True)}
        controls = {
            (context, groups.keys.control): row for context, row in zip(groups.contexts, control, strict=True)
        }
        return means | controls

    def _control_vae(self, cells, groups, seed: int, stages: _Stages, callbacks=()) -> NBVAE:
        """A VAE of the controls of all contexts; folds and questions that share these cells share it."""
        visible = cells[np.sort(np.concatenate(list(groups.control_rows.values())))].copy()

        def train():
            vae = new_vae(visible, n_latent=self.n_latent, n_hidden=self.recipe.n_hidden, seed=seed)
            return self._vae_trainer(visible, vae, self.recipe.vae_epochs, seed, callbacks)

        return self._trained("VAE, controls", visible, seed, train, stages, self._shared)

    def _finish(self, cells, start: NBVAE, seed: int, stages: _Stages, callbacks=()) -> NBVAE:
        """The VAE `start` after some epochs more, with all cells that are not "test"."""

        def train():
            return self._vae_trainer(cells, deepcopy(start), self.recipe.finish_epochs, seed, callbacks)

        return self._trained("VAE, all cells", cells, seed, train, stages, self._unfinished)

    def _vae_trainer(self, cells, vae, epochs: int, seed: int, callbacks) -> VAETrainer:
        r = self.recipe
        return VAETrainer(
            cells,
            vae,
            batch_size=r.batch_size,
            warmup_epochs=r.warmup_epochs if epochs == r.vae_epochs else 0,
            max_epochs=min(epochs, max(2, r.most_visits // cells.n_obs)),
            lr=r.vae_lr,
            callbacks=callbacks,
            progress=False,
            seed=seed,
        )

    def _train_operators(self, cells, seed: int, stages: _Stages, callbacks=()) -> OperatorModel:
        r = self.recipe

        def train():
            return OperatorTrainer(
                cells,
                new_operators(cells, context_rank=None),
                penalties=Penalties(ridge=r.ridge),
                max_epochs=r.operator_epochs,
                lr=r.operator_lr,
                callbacks=callbacks,
                progress=False,
                seed=seed,
            )

        return self._trained("operators", cells, seed, train, stages, self._unfinished)

    def _trained(self, stage: str, cells, seed: int, trainer_of: Callable, stages: _Stages, kept: dict):
        """A model after its training; the one `kept` of the same training, so that a fit that was stopped goes on."""
        key = stage, seed, self.n_latent, self.recipe, _digest(cells)
        if key not in kept:
            trainer = trainer_of()
            trainer.fit()
            if trainer.stop_reason == "interrupted":  # a half-trained part is no part
                raise KeyboardInterrupt
            kept[key] = trainer.model.cpu().eval(), pd.DataFrame(trainer.rows).assign(stage=stage)
        model, stages.histories[key] = kept[key]
        return model

    # -- the choice -----------------------------------------------------------------------------------------------

    def _judge(self, cells, groups: Groups, members, space: EvaluationSpace, stages: _Stages) -> pd.Series:
        """Predict measured contexts by models that have not seen their perturbed cells, weigh the estimators, and say how
        near the cells come by share of the matrices (:attr:`Choice.matrices`).
        """
        shared = [pair for pair in groups.pairs if len(groups.contexts_of(pair[1])) > 1]
        with stages("choice"):
            self.means.missed.update(self._missed(cells, groups, members, shared))
        contexts = sorted({context for context, _ in shared})
        chance = np.random.default_rng([self.seed, 3])
        if len(shared) > self.recipe.most_judged:
            shared = [shared[k] for k in np.sort(chance.permutation(len(shared))[: self.recipe.most_judged])]
        n_folds = min(self.recipe.n_folds, len(contexts))
        dealt = dict(zip(self._alike(contexts), np.arange(len(contexts)) % max(n_folds, 1), strict=True))
        folds = []
        for fold in range(n_folds):
            with stages("choice"):
                out = {context for context, k in dealt.items() if k == fold}
                judged = [pair for pair in shared if pair[0] in out]
                folds += self._judge_fold(cells, groups, out, judged, stages)
        self._evidence = self._gather(sorted({p for _, p in shared}))
        table = self._distances_left_out(cells, groups, folds, space)
        above = (table["energy"] - table["floor"]).groupby(table["method"]).sum()
        shares = above[[share for share in MATRIX_SHARES if share in above]] / above.get(NO_CHANGE, np.nan)
        shares = shares.astype(float) if above.get(NO_CHANGE, 0) > 0 else pd.Series(dtype=float)
        chosen = 1.0 if shares.empty else shares.idxmin()
        self.left_out = table[~table["method"].isin(MATRIX_SHARES) | (table["method"] == chosen)]
        self.left_out = self.left_out.replace({"method": {chosen: "CellOp"}}).reset_index(drop=True)
        return shares

    def _judge_combinations(self, cells, groups: Groups, member: Member, stages: _Stages) -> None:
        """Foresee measured combinations by operators that have seen none: weights of additive rule and moved cells."""
        measured = set(groups.pairs)
        parts = {label: groups.parts(label) for label in groups.perturbations}
        several = [(c, p) for c, p in groups.pairs if len(parts[p]) > 1]
        judged = [(c, p) for c, p in several if all((c, part) in measured for part in parts[p])]
        self._combination_evidence = None
        if len(judged) < 2:
            return
        hidden = np.zeros(cells.n_obs, dtype=bool)
        for pair in several:
            hidden[groups.rows(*pair)] = True
        operators = self._train_operators(cells[~hidden].copy(), self.seed, stages)
        alone = Member(member.vae, operators)
        rows, starts = [], {}
        for context, label in judged[: self.recipe.most_judged]:
            if context not in starts:
                starts[context] = Start.of(cells, alone.vae, self._some(cells, groups.controls(context)))
            change, noise = self.means.change_of(context, label)
            added = np.sum([self.means.change_of(context, part)[0] for part in parts[label]], axis=0)
            moved = starts[context].change(self._whole_operator(alone, label, context))
            rows.append((change, noise, added, moved))
        self._combination_evidence = combination_evidence(*map(np.stack, zip(*rows, strict=True)))

    def _alike(self, contexts: Sequence[str]) -> list[str]:
        """The contexts with like ones side by side: dealt in turn, they go to different folds and tell of each other."""
        if len(contexts) < 2:
            return list(contexts)
        rows = self.means.control[[self.means.contexts.index(context) for context in contexts]]
        main = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[0][:, 0]
        sign = -1 if main[np.abs(main).argmax()] < 0 else 1
        order = np.argsort(sign * main, kind="stable")
        return [contexts[k] for k in order]

    def _judge_fold(self, cells, groups: Groups, out: set[str], judged, stages: _Stages) -> list[tuple]:
        """Change of the moved cells of the judged pairs; the member that moved them, and the pairs that it could move."""
        hidden = np.zeros(cells.n_obs, dtype=bool)
        for group in groups:
            hidden[group.rows] |= group.context in out
        judged = [pair for pair in judged if set(groups.contexts_of(pair[1])) - out]
        if not judged:
            return []
        seen = cells[~hidden].copy()
        vae = self._finish(seen, self._control_vae(cells, groups, self.seed, stages), self.seed, stages)
        embed(seen, vae)
        operators = self._train_operators(seen, self.seed, stages)
        member, labels = Member(vae, operators), set(operators.conditions.perturbations)
        judged = [pair for pair in judged if set(groups.parts(pair[1])) <= labels]
        perturbations = {perturbation for _, perturbation in judged}
        told = [pair for pair in groups.pairs if pair[1] in perturbations and pair[0] not in out]
        missed = self._missed(cells, groups, [member], told)
        for start, context, perturbation in self._moved_apart(cells, groups, member, judged):
            moved = start.change(self._operator_of(member, perturbation, None))
            level = self.means.control[self.means.contexts.index(context)]
            pair = context, perturbation
            self.means.moved[pair] = moved
            self.means.corrected[pair] = self.means.correct(moved, *pair, level, missed)
        return [(member, judged)]

    def _missed(self, cells, groups: Groups, members: Sequence[Member], pairs) -> dict:
        """What members miss of the measured changes of `pairs` that they have seen; of too many pairs nothing."""
        most = self.recipe.most_moved // max(len(pairs), 1)
        missed: dict[tuple[str, str], np.ndarray] = {}
        for member in members if most >= 25 else ():
            for start, context, perturbation in self._moved_apart(cells, groups, member, pairs, most):
                moved = start.change(self._operator_of(member, perturbation, None))
                miss = (self.means.change_of(context, perturbation)[0] - moved) / len(members)
                missed[context, perturbation] = missed.get((context, perturbation), 0.0) + miss
        return missed

    def _moved_apart(
        self, cells, groups: Groups, member: Member, judged, most: int | None = None
    ) -> Iterator[tuple[Start, str, str]]:
        """Some control cells, as a member sees them, of every judged (context, perturbation)."""
        start, last = None, None
        for context, perturbation in sorted(judged):
            if context != last:
                start = Start.of(cells, member.vae, self._some(cells, groups.controls(context), most))
            last = context
            yield cast(Start, start), context, perturbation

    def _distances_left_out(self, cells, groups: Groups, folds, space: EvaluationSpace) -> pd.DataFrame:
        """How far predictions of groups left out lie from their real cells: models, weights and plan have not seen them.

        Levels are over all measured genes, along the components of `space`; the simple rules add their shift to each
        control cell. The floor is that of random halves of the real cells.
        """
        rows, plans = [], {}
        library = count_matrix(cells, total_key=TOTAL_KEY if TOTAL_KEY in cells.obs else None).library.numpy()

        def points(x, total) -> np.ndarray:
            return space.project(log1p_cp10k(np.asarray(x), np.asarray(total)))

        for member, judged in folds:
            for start, context, perturbation in self._moved_apart(cells, groups, member, judged):
                measured = self.means.of_perturbation(perturbation)
                if perturbation not in plans:
                    plans[perturbation] = foresee(measured, self._evidence_of_others(perturbation))
                if not plans[perturbation]:
                    continue
                at = measured.contexts.index(context)
                changes = {name: change[at] for name, change in plans[perturbation].items()}
                chosen = self._some(cells, groups.strongest(context, perturbation).rows)
                real = points(cells.X[chosen].toarray(), library[chosen])
                before = points(start.x, start.library)
                operator = self._operator_of(member, perturbation, None)
                clouds: dict[object, np.ndarray] = {NO_CHANGE: before}
                for share in MATRIX_SHARES:
                    expected = start.expected(operator.with_share(share, start.z.mean(0))(start.z))
                    carried = start.carried(expected, changes["plan"])
                    whole = balanced_counts(carried, torch.Generator().manual_seed(self.seed))
                    clouds[share] = points(whole, start.library)
                clouds |= {
                    name: before + changes[name] @ space.components.T for name in SIMPLE if name in changes
                }
                floor = noise_floor(torch.from_numpy(real), seed=self.seed)
                for name, cloud in clouds.items():
                    rows.append((context, perturbation, name, e_distance(cloud, real), floor))
        return pd.DataFrame(rows, columns=_LEFT_OUT)

    def _some(self, cells, rows: np.ndarray, most: int | None = None) -> np.ndarray:
        """At most `most_cells` of the rows, by the cells' names, and at most `most`."""
        order = np.argsort(
            [crc32(f"{self.seed} {name}".encode()) for name in cells.obs_names[rows]], kind="stable"
        )
        return rows[np.sort(order[: min(self.recipe.most_cells, most or len(rows))])]

    def _evidence_of_others(self, perturbation: str) -> Evidence | None:
        """What leaving contexts out says of the estimators, over all judged perturbations but this one."""
        own = self._gather([perturbation])
        return self._evidence if own is None or self._evidence is None else self._evidence.without(own)

    def _gather(self, perturbations: Sequence[str]) -> Evidence | None:
        """What leaving contexts out says of the estimators, over all judged perturbations."""
        total = None
        for perturbation in perturbations:
            measured = self.means.of_perturbation(perturbation)
            pairs = [(context, perturbation) for context in measured.contexts]
            judged = [k for k, pair in enumerate(pairs) if pair in self.means.moved]
            if not judged:
                continue
            moved, corrected = (
                np.stack([by_pair.get(pair, np.zeros(len(self.means.shares))) for pair in pairs])
                for by_pair in (self.means.moved, self.means.corrected)
            )
            measured = replace(measured, moved=moved, corrected=corrected)
            by_name, _ = estimates(measured, measured.control.mean(0), moved.mean(0), corrected.mean(0))
            seen = evidence(measured, by_name, judged)
            total = seen if total is None else total if seen is None else total + seen
        return total

    # -- asking ---------------------------------------------------------------------------------------------------

    def operator(self, context: Context, perturbation: str) -> AffineOperator:
        """The operator of a perturbation in a context, in the latent space of the first member.

        Raises
        ------
        LabelError
            For a perturbation that is neither measured, described by features, nor a combination of such.
        """
        context = context_name(context, self.keys)
        return self._operator_of(self._fitted().members[0], perturbation, context)

    def _operator_of(self, member: Member, perturbation: str, context: str | None) -> AffineOperator:
        """With the share of its matrix that is used, in a context; the whole that contexts share where None."""
        whole, share = self._whole_operator(member, perturbation, context), self.choice.matrix_share
        return (
            whole if context is None or share == 1 else whole.with_share(share, self._centre(member, context))
        )

    def _whole_operator(self, member: Member, perturbation: str, context: str | None) -> AffineOperator:
        conditions = member.operators.conditions
        own = context if context in conditions.contexts else None
        parts = [] if self._described is None else self._parts(perturbation)
        if context is not None and not set(parts) <= set(conditions.perturbations):
            return borrowed_operator(member.operators, own, self._borrowed(context, parts), perturbation)
        condition = Condition.parse(perturbation, own, perturbations=conditions.perturbations)
        return member.operators.operator(condition)

    def _centre(self, member: Member, context: str) -> torch.Tensor:
        """(d,) mean latent of a context's control cells; of the training contexts where the data have none."""
        rows = self._some(self.adata, self.control_rows(context))
        if len(rows):
            return Start.of(self._cells(rows), member.vae).z.mean(0)
        control = [z for (_, name), z in self._latent_means.items() if name == self.keys.control]
        return torch.as_tensor(np.mean(control, axis=0))

    def _borrowed(self, context: str, parts: Sequence[str]) -> dict[str, float]:
        """In which shares the measured perturbations stand for these parts of a perturbation, measured or described."""
        each = [
            pd.Series({part: 1.0})
            if len(self.means.of_perturbation(part))
            else self.plan(context, part).shares
            for part in parts
        ]
        return pd.concat(each).groupby(level=0, sort=False).sum().to_dict()

    def plan(self, context: Context, perturbation: str) -> Plan:
        """The planned mean response: what each estimator says, their weights, and an interval for every gene.

        Raises
        ------
        LabelError
            For a context without control cells, or a perturbation that cannot be asked for.
        ModelError
            Where nothing tells the response.
        """
        context = context_name(context, self.keys)
        self._fitted().check_question(context, perturbation)
        if (context, perturbation) not in self._plans:
            self._plans[context, perturbation] = self._new_plan(context, perturbation)
        return self._plans[context, perturbation]

    def _new_plan(self, context: str, perturbation: str) -> Plan:
        if (foreseen := self._foreseen(perturbation)) is not None:
            return foreseen.plan(context, perturbation, self.genes)
        starts = self._starts(context)
        moved = np.mean(
            [
                s.change(self._operator_of(m, perturbation, context))
                for s, m in zip(starts, self.members, strict=True)
            ],
            axis=0,
        )
        parts = self._parts(perturbation)
        if len(parts) > 1 and not len(self.means.of_perturbation(perturbation)):
            each = [self.plan(context, part) for part in parts]
            return plan_combination(each, moved, self._combination_evidence, perturbation=perturbation)
        own, pair = self.means.own(context, perturbation), (context, perturbation)
        corrected = self.means.correct(moved, *pair, starts[0].mean_level, self.means.missed)
        if own is not None:  # what a model that has not seen it says, where there is one
            moved, corrected = self.means.moved.get(pair, moved), self.means.corrected.get(pair, corrected)
        return plan(
            self.means.of_perturbation(perturbation, without=context),
            starts[0].mean_level,
            moved,
            corrected,
            genes=self.genes,
            context=context,
            perturbation=perturbation,
            also=self._evidence_of_others(perturbation),
            own_change=None if own is None else own[0],
            own_noise=None if own is None else own[1],
        )

    def _others_are_planned(self, perturbation: str) -> bool:
        """Whether measured groups tell of the genes that are not modelled: of a combination, of all its parts."""
        measured = () if self.other_means is None else self.other_means.perturbations
        parts = self._parts(perturbation) if len(measured) else ()
        told = bool(parts) and all(part in measured or self._foreseen(part) is not None for part in parts)
        return perturbation in measured or told

    def _planned_others(self, context: str, perturbation: str) -> np.ndarray | None:
        """(gene,) planned change of the genes that are not modelled, by the estimators that need no model; None where
        nothing tells it."""
        means = self.other_means
        if means is None or not self._others_are_planned(perturbation):
            return None
        if self._foreseen(perturbation) is not None:
            shares = self.plan(context, perturbation).shares.items()
            return np.sum([share * means.near(context, name)[0] for name, share in shares], axis=0)
        if perturbation not in means.perturbations:
            return np.sum([self._planned_others(context, part) for part in self._parts(perturbation)], axis=0)
        measured = means.of_perturbation(perturbation, without=context)
        own = means.own(context, perturbation)
        if not len(measured):
            return None if own is None else own[0]
        change, noise = (None, None) if own is None else own
        level = self._once("others", context, self._level_of_others)
        return plan(measured, level, context=context, own_change=change, own_noise=noise).change

    def _level_of_others(self, context: str) -> np.ndarray:
        """(gene,) mean level of the genes that are not modelled in control cells; of those that the data lack 0."""
        cells = modelled_counts(
            self.adata[self._some(self.adata, self.control_rows(context))], self.others, self.keys, "zero"
        )
        total = cells.obs[TOTAL_KEY].to_numpy() if TOTAL_KEY in cells.obs else None
        return np.asarray(log1p_cp10k(cells.X, total).mean(0), dtype=np.float64).ravel()

    def _carried_others(self, rows, library, change, growth: float, generator):
        """Counts (cell, gene) over all genes of the data, those that are not modelled carried by their planned `change`
        (gene,), and what each cell gains by it: see :func:`~cellop_nb.analysis.predict.carry_others`.
        """
        cells = self.adata[rows]
        x = sparse.csc_matrix(counts(cells, self.keys.layer), dtype=np.float32)
        column = cells.var_names.get_indexer(self.others)
        there, column = column >= 0, column[column >= 0]
        carried, gained = carry_others(x[:, column], library, change[there], growth, generator)
        order = np.arange(x.shape[1])
        order[column] = x.shape[1] + np.arange(len(column))
        return sparse.csr_matrix(sparse.hstack([x, carried], "csc")[:, order]), gained

    def _foreseen(self, perturbation: str) -> Described | None:
        """What tells of a perturbation that is known by its descriptor alone; None of any other."""
        by_descriptor = self._described is not None and perturbation in self._described.names
        return self._described if by_descriptor and perturbation not in self.means.perturbations else None

    def _starts(self, context: str) -> list[Start]:
        """Some control cells of the context, as each member sees them."""
        return self._once("starts", context, self._new_starts)

    def _once(self, what: str, context: str, make: Callable[[str], Any]):
        """What is made of a context's control cells: kept for the questions of one context, which often follow."""
        if (what, context) not in self._last:
            self._last = {key: value for key, value in self._last.items() if key[1] == context}
            self._last[what, context] = make(context)
        return self._last[what, context]

    def _new_starts(self, context: str) -> list[Start]:
        rows = self._some(self.adata, self.control_rows(context))
        cells = self._cells(rows)
        return [Start.of(cells, member.vae) for member in self.members]

    def control_rows(self, context: str) -> np.ndarray:
        """Rows of the control cells of a context, in the order of their names; none where it has none."""
        if self._index is None:
            self._index = controls_by_context(self.adata, self.keys)
        return self._index.get(context, np.zeros(0, dtype=int))

    def _cells(self, rows: np.ndarray) -> ad.AnnData:
        """Counts of the modelled genes of some cells of the data."""
        return modelled_counts(self.adata[rows], self.vae, self.keys, self._missing_genes, self.means.shares)

    def check_question(self, context: str, perturbation: str) -> None:
        """Refuse a context without controls and a perturbation that nothing tells of, before or after a fit.

        Raises
        ------
        LabelError
        """
        if not len(self.control_rows(context)):
            fix = did_you_mean(context, self._index or ())
            raise LabelError("a context with control cells in the data", repr(context), fix)
        labels = self.perturbations
        pieces = perturbation.split("+")
        if not set(self._parts(perturbation)) <= set(labels):
            unknown = [piece for piece in pieces if piece.strip() and piece not in labels]
            unknown = unknown if 0 < len(unknown) < len(pieces) else [perturbation]
            fix = f"{did_you_mean(unknown[0], labels)}, or describe perturbations with features=..."
            raise LabelError("a perturbation that was measured", repr(unknown[0]), fix)

    def _parts(self, perturbation: str) -> tuple[str, ...]:
        """The perturbations that a label names: one that the operators know, or those that it combines."""
        return perturbation_parts(perturbation, self.perturbations, self.perturbations)

    def dose_curve(self, perturbation: str) -> DoseCurve:
        """How strong a perturbation is at a dose: ``predict(..., strength=model.dose_curve(p).strength(dose))``.

        Raises
        ------
        LabelError
            For a perturbation whose doses were not measured, such as a combination.
        """
        curves = self._fitted().curves
        if perturbation not in curves:
            expected = f"a perturbation whose doses were measured: {list(curves)[:10]}"
            fix = "name the column of doses, setup(dose_key=...), and ask for one perturbation"
            raise LabelError(expected, repr(perturbation), fix)
        return curves[perturbation]

    def intervals(self, context: Context, perturbation: str) -> pd.DataFrame:
        """Change of every gene with its interval, the largest first.

        Returns
        -------
        DataFrame
            ``gene, change, low, high``: change of mean log1p-CP10k; the interval holds what the plan missed of measured
            contexts left out (95 %), NaN where fewer than two contexts tell it.
        """
        context = context_name(context, self.keys)
        planned = self.plan(context, perturbation)
        table = pd.DataFrame(
            {"gene": self.genes, "change": planned.change, "low": planned.low, "high": planned.high}
        )
        return table.iloc[np.argsort(-np.abs(planned.change), kind="stable")].reset_index(drop=True)

    def support(self, context: Context, perturbation: str) -> pd.DataFrame:
        """From which measured contexts a response is borrowed, how near they are, and whether its size is extrapolated.

        Returns
        -------
        DataFrame
            A row per measured context, the nearest first: ``context, distance, share, response``, or per measured
            perturbation (``perturbation, ...``) of one that was never measured; distances of mean
            control cells in units of the usual distance between nearest measured contexts, `response` the length of
            the measured change, beside the planned one in ``attrs["planned"]``; ``attrs["extrapolated"]`` says
            whether that is larger than every measured one.
        """
        context = context_name(context, self.keys)
        said = self.plan(context, perturbation)
        if (foreseen := self._foreseen(perturbation)) is not None:
            table = foreseen.near(context, perturbation)
        else:
            measured = self.means.of_perturbation(perturbation, without=context)
            table = measured.near(self._starts(context)[0].mean_level)
        table["share"] = said.shares.to_numpy()
        table = table.sort_values("distance").reset_index(drop=True)
        table.attrs = {"planned": float(np.linalg.norm(said.change)), "extrapolated": said.extrapolated}
        return table

    def explained(self, context: Context, perturbation: str) -> pd.Series:
        r"""Share of a perturbation's change that each method explained in held-out contexts.

        .. math:: 1 - \frac{\sum_c (E_c - f_c)}{\sum_c (E^0_c - f_c)}

        with the energy distance E of predicted to real cells of context c, that of no change :math:`E^0`, and the floor
        f, the mean distance between random halves of the real cells. Models, weights and plans have not seen c.

        Returns
        -------
        Series
            "CellOp" and the simple rules; empty where no other context was left out, or its change is not above the
            floor. :attr:`left_out` has the distances.
        """
        context = context_name(context, self.keys)
        rows = self.left_out.query("perturbation == @perturbation and context != @context")
        above = (rows["energy"] - rows["floor"]).groupby(rows["method"]).sum()
        if not above.get(NO_CHANGE, 0) > 0:
            return pd.Series(dtype=float)
        return (1 - above / above[NO_CHANGE]).drop(NO_CHANGE)

    def verdict(self, context: Context, perturbation: str, dose: float | None = None) -> str:
        """Say in a sentence with numbers how far to trust a prediction, at a dose where one is given."""
        if dose is not None and self.dose_curve(perturbation).extrapolates(dose):
            curve = self.dose_curve(perturbation)
            return (
                f"{self.verdict(context, perturbation)} A dose of {dose:g} is extrapolated: {curve.smallest:g} to "
                f"{curve.largest:g} were measured."
            )
        context = context_name(context, self.keys)
        said, name = self.plan(context, perturbation), f"{perturbation} in {context}"
        if said.across == "perturbations":
            return verdict_of_described(said, name)
        tests = self.effects[self.effects["perturbation"] == perturbation]
        if len(tests) and not tests["different"].any():
            none = f"none of {len(tests)} measured groups differs from its controls"
            none = none if len(tests) > 1 else "the only measured group does not differ from its controls"
            return f"{name}: no effect to predict; {none} (energy-distance test, smallest p {tests['p'].min():.2g})."
        own = tests[tests["context"] == context]
        if said.measured and len(own) and not own["different"].any():
            return (
                f"{name}: no effect to predict; it was measured here and does not differ from its controls "
                f"(energy-distance test, p {own['p'].min():.2g}), while {tests['different'].sum()} of {len(tests)} "
                f"measured groups do."
            )
        if said.measured:
            return (
                f"{name}: measured here; the prediction is the measured mean. The noisier it is, the more it is pulled "
                "towards what other measurements predict."
            )
        doubt = " Its size is extrapolated beyond all measured ones." if said.extrapolated else ""
        genes = ", ".join(self._doubtful(said))
        doubt += f" Trust the direction, not the size, of {genes}." if genes else ""
        if said.rival == ADDITIVE and np.isfinite(said.explained):
            return (
                f"{name}: in held-out combinations such predictions explained {100 * said.explained:.0f} % of the "
                f"squared mean response, the {said.rival} rule {100 * said.rival_explained:.0f} %.{doubt}"
            )
        explained = self.explained(context, perturbation)
        if explained.empty:
            return f"{name}: cannot be checked; no measured group of it could be held out and compared."
        rules = explained.drop("CellOp")
        if explained.max() <= 0:
            return (
                f"{name}: cannot be known; there is an effect, but in held-out contexts neither the prediction nor "
                f"any simple rule came nearer to the real cells than no change."
            )
        rows = self.left_out.query("perturbation == @perturbation and context != @context")
        n_contexts = rows["context"].nunique()
        return (
            f"{name}: in {counted(n_contexts, 'held-out context')} such predictions explained "
            f"{100 * explained['CellOp']:.0f} % of the change; the best simple rule, {rules.idxmax()}, explained "
            f"{100 * rules.max():.0f} % (energy distance above the noise floor, compared with no change).{doubt}"
        )

    def _doubtful(self, said: Plan, n: int = 2) -> list[str]:
        """Genes among the ten largest changes whose interval is widest beside the change, and does not hold 0."""
        top = np.argsort(-np.abs(said.change), kind="stable")[:10]
        width = said.quantile * said.error[top] / np.maximum(np.abs(said.change[top]), 1e-9)
        doubtful = [k for k in np.argsort(-width, kind="stable") if width[k] > 0.5]
        return [str(said.genes[top[k]]) for k in doubtful[:n]]

    def latent_shift(self, contexts: Sequence[str], perturbation: str) -> np.ndarray:
        """(d,) mean latent shift of a measured perturbation over contexts, each counting once, in the first member."""
        rows = [
            self._latent_means[c, perturbation] - self._latent_means[c, self.keys.control] for c in contexts
        ]
        return np.mean(rows, axis=0)

    def fresh(self, cells: ad.AnnData, shift: np.ndarray):
        """Counts (cell, gene) of the modelled genes, drawn anew from the decoder at shifted latents of control cells."""
        start = Start.of(modelled_counts(cells, self.vae, self.keys), self.vae)
        z = start.z + torch.as_tensor(shift, dtype=start.z.dtype, device=start.z.device)
        return start.fresh(z, torch.Generator(device=z.device).manual_seed(self.seed))

    # -- predicting -----------------------------------------------------------------------------------------------

    @checked
    def predict(
        self,
        conditions: pd.DataFrame | Sequence[tuple[str, str]] | None = None,
        *,
        context: Context | None = None,
        perturbation: str | None = None,
        operator: AffineOperator | None = None,
        strength: float = 1.0,
        n_cells: int | None = None,
        missing_genes: str = "refuse",
        out: str | Path | None = None,
        client=None,
        seed: int | None = None,
    ) -> ad.AnnData | Path:
        """Virtual cells: raw counts of control cells under a perturbation, measured or not.

        Parameters
        ----------
        conditions
            Pairs (context, perturbation), or a DataFrame with these columns, and ``n_cells``, ``strength`` or ``dose``
            where they differ; in place of `context` and `perturbation`.
        context, perturbation
            One question. "A+B" asks for a combination. Where several columns are contexts, a tuple or a dict names their
            levels, ``context={"cell_type": "B", "donor": "d1"}``, and a table may have a column of each.
        operator
            An affine operator to move the cells by: a sequence, a reversal, a product; its planned change is the moved
            cells' own. `perturbation` is then only the label that is written.
        strength
            Power of the operator, 0 to 1.5: 0 leaves the cells, 1 is the measured strength.
        n_cells
            Cells of each condition; None for every control cell once, more than there are with replacement.
        missing_genes
            What becomes of modelled genes that the data lack: "refuse", "zero" (no counts), or "impute" (their mean share
            in the controls of training).
        out
            An .h5ad to write to, condition by condition, where the cells would not fit into memory; without the expected
            counts. Until it is whole, finished ones of several conditions lie in the folder `out`.parts: where a call was
            ended, the same call goes on from there.
        client
            A Dask client that shares the conditions out; the numbers are the same.
        seed
            Seeds the draws; that of the model where None.

        Returns
        -------
        AnnData
            Counts in ``X`` over all genes of the data, in their order; ``layers["mean"]`` expected counts of the
            modelled genes beside the others of ``X``; in ``obs`` that of the control cell, its name in
            ``source_cell``, the perturbation, and ``predicted``; in ``var["modelled"]`` which genes the VAE holds, in
            ``var["prediction"]`` how each gene was predicted: "moved" and carried to its planned mean, "planned" (not
            modelled: the control cell's counts carried to a mean that the estimators without a model plan), or "kept"
            (seen in hardly any training cell: the control cell's counts); moved latents in ``obsm["X_nbvae"]``;
            ``uns["cellop_nb"]["predictions"]``, a row per condition, whose column `others` says "kept" where nothing
            tells of the genes that are not modelled, and these keep their counts. Or the path, where `out` is one.

        Raises
        ------
        LabelError
            For an unknown context, perturbation or column.
        DataError
            For genes that the data lack, under "refuse".
        ModelError
            For a strength out of range, or a part strength of an operator without a real logarithm.
        """
        self._fitted()
        asked = question_table(conditions, context, perturbation, strength, n_cells, operator, self.keys)
        if "dose" in asked:
            named = zip(asked["perturbation"], asked["dose"], strict=True)
            asked["dose"] = [check_strength(self.dose_curve(name).strength(dose)) for name, dose in named]
            asked = asked.rename(columns={"dose": "strength"})
        if missing_genes not in ("refuse", "zero", "impute"):
            expected = "missing_genes among 'refuse', 'zero', 'impute'"
            raise LabelError(expected, repr(missing_genes), "name one of them")
        for one in asked.itertuples():
            self.check_question(
                one.context, self.perturbations[0] if operator is not None else one.perturbation
            )
        seed = self.seed if seed is None else seed
        model = self
        if missing_genes != self._missing_genes:
            model = copy(self)
            model._missing_genes, model._plans, model._last = missing_genes, {}, {}
        rows = [
            (*row[:3], None if np.isnan(row[3]) else int(row[3])) for row in asked.itertuples(index=False)
        ]
        tasks = [(row, operator, seed, out is None) for row in rows]
        about = self._provenance(asked, operator, seed)
        if out is not None and len(tasks) > 1:
            names, folder = model._fingerprints(rows, operator, seed), Path(f"{out}.parts")
            kept = kept_parts(
                folder, names, lambda left: shared_out(client, CellOp.answer, model, [tasks[k] for k in left])
            )
            path = write_parts(out, kept, about, total=len(asked))
            shutil.rmtree(folder)
            return path
        parts = shared_out(client, CellOp.answer, model, tasks)
        if out is not None:
            return write_parts(out, parts, about, total=1)
        cells = list(tqdm(parts, "predicting", total=len(asked), disable=len(asked) < 20))
        pooled = cells[0] if len(cells) == 1 else ad.concat(cells, merge="same", index_unique=None)
        pooled.uns["cellop_nb"] = about
        return pooled

    def _fingerprints(self, rows: Sequence[tuple], operator: AffineOperator | None, seed: int) -> list[str]:
        """Of each condition, of all that its cells depend on: weights, means, settings and control cells."""
        contexts = sorted({row[0] for row in rows})
        cells = self.adata[np.concatenate([self.control_rows(context) for context in contexts])]
        x = sparse.csr_matrix(counts(cells, self.keys.layer))
        parts = [part for member in self.members for part in (member.vae, member.operators)]
        arrays = [value for part in parts for value in part.state_dict().values()]
        arrays += [self.means.change, self.means.control, x.data, x.indices, x.indptr]
        arrays += [pd.util.hash_pandas_object(cells.obs).to_numpy().view(np.int64)]
        arrays += [] if operator is None else [operator.matrix, operator.shift]
        choice = self.choice.table.to_json(), self.choice.matrices.to_json()
        told = [
            __version__,
            self.recipe,
            choice,
            self._missing_genes,
            seed,
            *cells.var_names,
            *map(digest, arrays),
        ]
        shared = "\0".join(map(str, told))
        return [sha256(f"{shared} {row}".encode()).hexdigest()[:16] for row in rows]

    def answer(
        self, question, operator: AffineOperator | None, seed: int, with_mean: bool = True
    ) -> ad.AnnData:
        """Virtual cells of one condition: (context, perturbation, strength, n_cells)."""
        context, perturbation, strength, n_cells = question
        draw = crc32(f"{seed} {context} {perturbation} {strength:g}".encode())
        rng, source = np.random.default_rng(draw), self.control_rows(context)
        if n_cells is not None:
            source = source[np.sort(rng.choice(len(source), n_cells, replace=n_cells > len(source)))]
        planned = None if operator is not None else self.plan(context, perturbation)
        change = None if operator is not None else self._planned_others(context, perturbation)
        growth = 0.0 if operator is not None else strength * self._growth(context, perturbation)
        label = perturbation if strength == 1 else f"{perturbation} at strength {strength:g}"
        repeat = pd.Series(source).groupby(source).cumcount()
        names = [
            f"{self.adata.obs_names[row]}, {label}" + (f", {k}" if k else "")
            for row, k in zip(source, repeat, strict=True)
        ]
        parts = []
        shares = np.array_split(np.arange(len(source)), min(self.n_members, len(source)))
        pieces = [(k, at) for k, share in enumerate(shares) for at in _chunks(share)]
        for number, (k, at) in enumerate(pieces):
            member, rows = self.members[k], source[at]
            start = Start.of(self._cells(rows), member.vae)
            act = operator if operator is not None else self._operator_of(member, perturbation, context)
            generator = torch.Generator().manual_seed(draw + number)
            others, gained = None, None
            if change is not None and strength != 0:
                others, gained = self._carried_others(
                    rows, start.library, strength * change, growth, generator
                )
            drawn = start.moved(act, strength, planned, growth, generator, gained)
            source_cells = self.adata[rows]
            parts.append(
                assemble(source_cells, self.keys, self.genes, drawn, perturbation, others, with_mean)
            )
            parts[-1].obs_names = [names[k] for k in at]
            if operator is None and perturbation in self.curves and self.keys.dose_key in parts[-1].obs:
                parts[-1].obs[self.keys.dose_key] = self.curves[perturbation].dose(strength)
        cells = parts[0] if len(parts) == 1 else ad.concat(parts, merge="same")
        ways = np.where(cells.var_names.isin(self.others) & (operator is None), "planned", "kept")
        cells.var["prediction"] = pd.Categorical(np.where(cells.var["modelled"], "moved", ways))
        return cells

    def _growth(self, context: str, perturbation: str) -> float:
        """Change of the log of the mean library."""
        if self._described is None or perturbation in self.means.perturbations:
            return self.means.growth_of(context, perturbation)
        shares = self._borrowed(context, self._parts(perturbation))
        return float(sum(share * self.means.growth_of(context, name) for name, share in shares.items()))

    def _provenance(self, asked: pd.DataFrame, operator, seed: int) -> dict:
        table = asked.assign(n_cells=pd.to_numeric(asked["n_cells"]).fillna(-1).astype(int), seed=seed)
        table["operator"] = "" if operator is None else operator.label
        table["measured"] = [
            self.means.own(c, p) is not None
            for c, p in zip(table["context"], table["perturbation"], strict=True)
        ]
        table["others"] = [
            "planned" if operator is None and self._others_are_planned(p) else "kept"
            for p in table["perturbation"]
        ]
        return {"predictions": table.reset_index(drop=True)}

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the model to one file: weights, genes, keys, group means, and what was chosen; no counts.

        Parameters
        ----------
        path
            File to write; ``.safetensors`` is added where it is missing. An unfitted CellOp writes the parts it was
            given.

        Returns
        -------
        The path.

        Raises
        ------
        ModelError
            Where there is nothing to save.
        StorageError
            Where the disk refuses; an earlier file is left as it was.
        """
        path = model_file(path)
        keys = asdict(self.keys)
        if not self.members:
            if self._ready_vae is None:
                self._fitted()
            return write_models(path, self._ready_vae, self._ready_operators, keys=keys)
        means, judged = self.means, list(self.means.moved)
        arrays = {name: getattr(means, name) for name in _MEANS}
        for name in ("moved", "corrected", "missed"):
            rows = list(getattr(means, name).values())
            arrays[name] = np.stack(rows) if rows else np.zeros((0, 0))
        if self.other_means is not None:
            arrays |= _in_arrays(self.other_means)
        arrays["latents"] = np.stack(list(self._latent_means.values()))
        both = {"contexts": self._evidence, "combinations": self._combination_evidence}
        if self.features is not None:
            arrays["features"] = self.features.dropna(how="all").to_numpy(dtype=float)
        evidence_of = {name: seen for name, seen in both.items() if seen is not None}
        arrays |= {f"evidence_{name}": seen.products for name, seen in evidence_of.items()}
        about = {
            "settings": {name: getattr(self, name) for name in ("n_latent", "n_genes", "n_members", "seed")},
            "recipe": asdict(self.recipe),
            "contexts": means.contexts,
            "others": self.others,
            "pairs": means.pairs,
            "judged": judged,
            "missed": list(means.missed),
            "latents": list(self._latent_means),
            "evidence": {
                name: {"names": seen.names, "n_contexts": seen.n_contexts}
                for name, seen in evidence_of.items()
            },
            "features": None
            if self._described is None
            else [self._described.names, self._described.columns, self._described.marked],
            "curves": {
                name: asdict(replace(curve, table=None)) | {"table": curve.table.to_dict("list")}
                for name, curve in self.curves.items()
            },
            "effects": self.effects.to_json(orient="split"),
            "left_out": self.left_out.to_json(orient="split", double_precision=15),
            "matrices": {str(share): left for share, left in self.choice.matrices.items()},
            "history": self.history.to_json(orient="split"),
            "costs": self.costs.to_json(orient="split"),
        }
        first, *others = self.members
        pairs = [(member.vae, member.operators) for member in others]
        return write_models(
            path, first.vae, first.operators, keys=keys, members=pairs, arrays=arrays, predictor=about
        )

    # -- how it shows itself ----------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        genes = "all genes" if self.n_genes is None else f"{self.n_genes} genes"
        head = f"CellOp({self.adata.n_obs} cells, {genes}, n_latent={self.n_latent}, seed={self.seed})"
        return f"{head}, not fitted" if not self.members else f"{head}\n{self.choice}"

    def _repr_html_(self) -> str:
        facts = {
            "cells": self.adata.n_obs,
            "genes": ("all" if self.n_genes is None else self.n_genes)
            if not self.members
            else len(self.genes),
            "latent dimensions": self.n_latent,
            "state": "not fitted: model.fit()" if not self.members else "fitted",
        }
        if self.members:
            facts |= {
                "perturbations": self.perturbations,
                "CPU seconds": float(self.costs["cpu"].sum()) if len(self.costs) else None,
            }
        return card("CellOp: the predictor of a screen", facts, note=str(self.choice) if self.members else "")


_MEANS = ("control", "change", "noise", "growth", "shares")
_OTHERS = ("control", "change.left", "change.right", "noise.left", "noise.right")


def _in_arrays(others: Means) -> dict[str, np.ndarray]:
    """What a file keeps of the genes that are not modelled, by name."""
    return {f"others.{name}": attrgetter(name)(others) for name in _OTHERS}


def load(path: str | Path, adata: ad.AnnData | None = None) -> CellOp | Saved:
    """Read a model that :meth:`CellOp.save` wrote, to predict from the control cells of `adata`.

    Parameters
    ----------
    path
        The file; ``.safetensors`` is added where it is missing.
    adata
        Cells whose controls are moved. Where it was not set up, the keys of the model's own data hold.

    Returns
    -------
    CellOp
        Fitted. A file that holds trained parts alone, as the first edition wrote them, has no plan: what comes back
        is then :class:`~cellop_nb.training.checkpoint.Saved` with ``.vae`` and ``.operators``, or, with `adata`, an
        unfitted CellOp of these parts; a log message says so.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, of another kind, or of a later version.
    """
    file = model_file(path)
    path = file if file.exists() or not Path(path).exists() else Path(path)
    saved = read_models(path)
    if not saved.predictor:
        logger.warning("%s holds trained parts and no plan: call CellOp(adata, vae=, operators=).fit()", path)
        return saved if adata is None else CellOp(adata, vae=saved.vae, operators=saved.operators)
    try:
        model = _restored(saved)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"a damaged description ({type(error).__name__}: {error})"
        expected = f"the predictor in {path}"
        raise CheckpointError(expected, problem, "save the model again") from error
    return model if adata is None else model.on(adata)


def _restored(saved: Saved) -> CellOp:
    """A fitted CellOp without data."""
    about, arrays = saved.predictor, saved.arrays
    if saved.vae is None or saved.operators is None:
        raise ValueError("no models")
    names = [field.name for field in fields(Keys)]
    keys: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in saved.keys.items() if name in names
    }
    empty = ad.AnnData(
        np.zeros((0, len(saved.vae.genes)), np.float32), var=pd.DataFrame(index=saved.vae.genes)
    )
    empty.obs = empty.obs.assign(
        **{key: [] for key in (keys["perturbation_key"], *(keys["context_key"] or ()))}
    )
    Keys(**keys).write(empty)
    model = CellOp(empty, **about["settings"])
    model.recipe = Recipe(**about["recipe"])
    model.members = [Member(saved.vae, saved.operators), *(Member(*pair) for pair in saved.members)]
    pairs = [tuple(pair) for pair in about["pairs"]]
    moved, corrected, missed = (
        dict(zip([tuple(pair) for pair in about[pairs]], arrays[name], strict=True))
        for pairs, name in (("judged", "moved"), ("judged", "corrected"), ("missed", "missed"))
    )
    control, change, noise, growth, shares = (arrays[name] for name in _MEANS)
    n_factors = len(keys["context_key"] or ("",))
    model.means = Means(
        about["contexts"],
        control,
        pairs,
        change,
        noise,
        growth,
        shares,
        moved,
        n_factors,
        corrected,
        missed,
    )
    model.curves = {
        name: DoseCurve(**fields | {"table": pd.DataFrame(fields["table"])})
        for name, fields in about.get("curves", {}).items()
    }
    model.others = about.get("others", [])  # of a file of an earlier version none
    if model.others:
        level, *factors = (arrays[f"others.{name}"] for name in _OTHERS)
        changes, noises = Factors(*factors[:2]), Factors(*factors[2:])
        model.other_means = Means(
            about["contexts"], level, pairs, changes, noises, np.zeros(len(pairs)), np.zeros(0), {}, n_factors
        )
    if about.get("features"):
        index, columns, *marked = about["features"]  # of a file of an earlier version none is marked
        table = pd.DataFrame(arrays["features"], index, columns)
        model.features = table.reindex([*index, *sum(marked, [])])
        model._described = Described(model.features, model.means)
    model._latent_means = dict(
        zip([tuple(pair) for pair in about["latents"]], arrays["latents"], strict=True)
    )
    seen = {
        name: Evidence(tuple(said["names"]), arrays[f"evidence_{name}"], said["n_contexts"])
        for name, said in about["evidence"].items()
    }
    model._evidence, model._combination_evidence = seen.get("contexts"), seen.get("combinations")
    matrices = {float(share): left for share, left in about.get("matrices", {}).items()}
    model.choice = Choice.of(model._evidence, pd.Series(matrices, dtype=float))
    tables = {
        name: pd.read_json(StringIO(about[name]), orient="split", precise_float=True, dtype=False)
        for name in ("effects", "history", "costs", "left_out")
        if name in about  # a file of an earlier version has no distances
    }
    model.effects, model.history, model.costs = (tables[name] for name in ("effects", "history", "costs"))
    model.left_out = tables.get("left_out", model.left_out)
    return model


def _check_batches(cells, groups: Groups) -> None:
    """The VAE starts from control cells: it must have seen every batch."""
    key = groups.keys.batch_key
    if key is None:
        return
    batches = obs_labels(cells, key).to_numpy()
    controls = np.concatenate(list(groups.control_rows.values()))
    lacking = sorted(set(batches) - set(batches[controls]))
    if lacking:
        problem = f"none in {len(lacking)} of them, such as {lacking[0]!r}"
        fix = "leave these cells out, or call setup without batch_key"
        raise LabelError("control cells in every batch", problem, fix)


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    """Cells that are moved together: what lies between latents and counts is held of so many."""
    return np.array_split(rows, -(-len(rows) // CELLS_AT_ONCE))


def _check_parts(vae, operators, n_members: int) -> None:
    if operators is not None and vae is None:
        fix = "pass vae=... too: operators act in the latent space of the VAE they were fitted with"
        raise ModelError("a VAE beside the operators", "operators alone", fix)
    if vae is not None and n_members > 1:
        raise ModelError("n_members=1 with trained parts", str(n_members), "leave n_members out")
    if operators is not None and operators.config["n_latent"] != vae.n_latent:
        problem = f"operators of {operators.config['n_latent']} and a VAE of {vae.n_latent} dimensions"
        raise ModelError("parts of one latent space", problem, "pass parts that were fitted together")


def question_table(
    conditions,
    context=None,
    perturbation=None,
    strength=1.0,
    n_cells=None,
    operator=None,
    keys: Keys | None = None,
) -> pd.DataFrame:
    """A row per condition: context, perturbation, strength (or dose), n_cells (NaN for every control cell once).

    Raises
    ------
    LabelError
        For columns that are unknown or missing, no row, no whole number of cells, or a dose that is no positive number.
    ModelError
        For a strength that is no number, or out of range.
    """
    if conditions is None:
        if context is None or (perturbation is None and operator is None):
            fix = "pass context=... and perturbation=..., or a table of conditions"
            raise LabelError("a context and a perturbation", f"{context!r} and {perturbation!r}", fix)
        conditions = [(context, operator.label if perturbation is None else perturbation)]
    elif context is not None or perturbation is not None:
        fix = "pass conditions, or context and perturbation"
        raise LabelError("one way of asking", "both a table and a single question", fix)
    columns = ["context", "perturbation"]
    try:
        table = (
            conditions
            if isinstance(conditions, pd.DataFrame)
            else pd.DataFrame(list(conditions), columns=columns)
        )
    except (TypeError, ValueError) as error:
        fix = "pass a list of pairs, [(context, perturbation), ...]"
        raise LabelError("conditions that are pairs", f"{conditions!r:.80}", fix) from error
    keys = keys or Keys()
    factors = list(keys.context_key or ())
    if "context" not in table and len(factors) > 1 and set(factors) <= set(table):
        table = table.assign(context=[tuple(row) for row in table[factors].to_numpy()]).drop(columns=factors)
    if "context" in table:
        table = table.assign(context=[context_name(label, keys) for label in table["context"]])
    amount = "dose" if "dose" in table and "strength" not in table else "strength"
    unknown = [str(c) for c in table.columns if c not in (*columns, "n_cells", amount)]
    missing = [column for column in columns if column not in table]
    if unknown or missing or not len(table):
        problem = f"columns {list(map(str, table.columns))} of {len(table)} rows"
        fix = "name the columns context, perturbation, and n_cells and strength or dose where they differ"
        raise LabelError("conditions with columns context and perturbation", problem, fix)
    table = table.astype(dict.fromkeys(columns, str))
    sizes = [np.nan if n is None or n is pd.NA else n for n in table.get("n_cells", [n_cells] * len(table))]
    for n in sizes:
        whole = isinstance(n, Real) and not isinstance(n, bool) and (n != n or float(n).is_integer())
        if not whole or n <= 0 or n > MOST_CELLS:
            problem, fix = repr(n), "ask for one cell or more, of huge numbers for a part at a time"
            raise LabelError(f"n_cells a whole number above 0, at most {MOST_CELLS:,}", problem, fix)
    told = table[amount] if amount in table else pd.Series(strength, table.index)
    numbers = pd.to_numeric(told, errors="coerce").astype(float)
    table = table.assign(n_cells=np.array(sizes, dtype=float), **{amount: numbers})
    for value in numbers.unique() if amount == "strength" else ():
        check_strength(value)
    if amount == "dose" and not (positive := (numbers > 0) & np.isfinite(numbers)).all():
        fix = "write numbers alone, in the unit of the measured doses; controls need no prediction"
        raise LabelError("positive numbers as doses", repr(told[~positive].iloc[0]), fix)
    twice = table[table.duplicated([*columns, amount])]
    if len(twice):
        problem = f"{twice['perturbation'].iloc[0]!r} in {twice['context'].iloc[0]!r} twice"
        fix = "ask once, for the cells of both: n_cells=..."
        raise LabelError("conditions that differ: draws follow their names", problem, fix)
    return table[[*columns, amount, "n_cells"]]


_AHEAD = 32
"""Tasks that workers may be ahead of what is asked of their results, which are held until then."""


def shared_out(client, work: Callable, shared, tasks: Sequence[tuple]) -> Iterator:
    """Results of ``work(shared, *task)`` in the order of the tasks, made here or by the workers of a Dask client."""
    if client is None:
        yield from (work(shared, *task) for task in tasks)
        return
    remote = client.scatter(shared, broadcast=True, hash=False)
    futures: deque = deque()
    try:
        for task in tasks:
            futures.append(client.submit(work, remote, *task, pure=False))
            if len(futures) > _AHEAD:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        client.cancel(list(futures))


def _digest(cells) -> str:
    """Of the counts, labels and latents that a training reads."""
    x, keys = sparse.csr_matrix(cells.X), keys_of(cells)
    names = {*vars(keys).values(), *(keys.context_key or ()), SPLIT_KEY, TOTAL_KEY}
    labels = cells.obs[[name for name in cells.obs if name in names]].astype(str)
    digest = blake2b("\0".join(cells.var_names).encode(), digest_size=16)
    digest.update(pd.util.hash_pandas_object(labels).to_numpy())
    for part in (x.data, x.indices, x.indptr, cells.obsm.get(REP, x.indptr)):
        digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()


class _Stages:
    """What each stage of a fit costs, and a bar that says how long the rest will take."""

    def __init__(self, total: int, progress: bool) -> None:
        self._bar = tqdm(total=total, desc="fitting", disable=not progress)
        self._costs: list[dict] = []
        self.histories: dict[tuple, pd.DataFrame] = {}

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._bar.set_postfix_str(stage)
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        self._costs.append({"stage": stage, **spent, "peak_mb": peak})
        self._bar.update()

    def history(self) -> pd.DataFrame:
        """The histories of all trainings."""
        table = pd.concat([pd.DataFrame({"stage": []}), *self.histories.values()], ignore_index=True)
        return table[["stage", *(column for column in table if column != "stage")]]

    def costs(self) -> pd.DataFrame:
        table = pd.DataFrame(self._costs)
        return (
            table.groupby("stage", sort=False)
            .agg({"wall": "sum", "cpu": "sum", "peak_mb": "max"})
            .reset_index()
        )
