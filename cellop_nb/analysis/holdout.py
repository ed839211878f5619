"""One call for an honest hold-out: split, train on the rest, predict from controls, score beside the baselines."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from ..data.batches import TOTAL_KEY
from ..data.contract import context_labels, library_size
from ..data.splits import rows_of, split
from ..errors import HoldoutError, three_beats
from ..models.vae import NBVAE
from ..training.callbacks import EarlyStopping
from ..training.vae import VAETrainer, new_vae
from .baselines import BASELINES, Baseline, Prediction, Screen, Target, latent_shift
from .combinations import response_operator
from .fits import fit_response
from .formulas import Undefined
from .metrics import score_split
from .predict import decode_cells, embed, source_cells
from .selection import CANDIDATES, choose, leave_out, what_to_leave_out
from .space import EvaluationSpace, variable_genes
from .transfer import Complexity, Response
from .views import CountView

logger = logging.getLogger("cellop_nb")

OPERATORS = "operators"
LATENT_SHIFT = "latent shift"


@dataclass(frozen=True)
class Fitted:
    """Models of one seed, trained without the held-out cells."""

    vae: NBVAE = field(repr=False)
    response: Response
    latents: np.ndarray = field(repr=False)
    seed: int = 0


@dataclass(frozen=True)
class Holdout:
    """What a hold-out gives back.

    Attributes
    ----------
    table : DataFrame
        ``context, perturbation, group, method, metric, value, reason``; every method beside the noise floor.
    predictions : AnnData
        Sampled counts of the virtual cells, pooled over seeds; ``layers["mean"]``, ``obsm``, the source cells' ``obs``.
    real : AnnData
        The held-out cells, over the same genes.
    control : AnnData
        The control cells that the predictions start from.
    choice : DataFrame
        Energy distance of each candidate complexity on training contexts left out in turn.
    complexity : Complexity
        What was chosen.
    fits : list of Fitted
        The models, one per seed.
    space : EvaluationSpace
        In which the metrics were computed.
    measured : list of (context, perturbation)
        Perturbed groups of the training cells.
    """

    table: pd.DataFrame
    predictions: ad.AnnData
    real: ad.AnnData
    control: ad.AnnData
    choice: pd.DataFrame
    complexity: Complexity
    fits: list[Fitted]
    space: EvaluationSpace
    measured: list[tuple[str, str]] = field(default_factory=list, repr=False)

    def summary(self, metrics: Sequence[str] = ("e_distance", "pearson_delta")) -> pd.DataFrame:
        """Methods by metrics, the mean over the held-out groups."""
        chosen = self.table[self.table["metric"].isin(metrics)]
        order = list(dict.fromkeys(chosen["method"]))
        return chosen.pivot_table(index="method", columns="metric", values="value").reindex(order)

    def _repr_html_(self) -> str:
        return f"<p>chosen: {escape(str(self.complexity))}</p>" + self.summary().to_html(float_format="%.3f")


def holdout(
    adata,
    *,
    heldout: Mapping[str, object],
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    n_genes: int = 1000,
    vae: Mapping | None = None,
    training: Mapping | None = None,
    candidates: Sequence[Complexity] = CANDIDATES,
    features: pd.DataFrame | None = None,
    methods: Mapping[str, Baseline] | None = None,
    metrics: Sequence[str] | None = None,
    n_seeds: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Holdout:
    """Hold cells out, train on the rest, predict them from their context's controls, and score the prediction.

    Nothing of the held-out cells reaches the variable genes, the VAE, the components of the evaluation space,
    the operators or the choice of their complexity.

    Parameters
    ----------
    adata
        Raw counts.
    heldout
        Column of ``obs`` to value(s), as `holdout` of :func:`cellop_nb.split`.
    n_genes
        Variable genes, chosen on the training cells; 0 keeps all.
    vae, training
        Settings of :func:`new_vae` and :class:`VAETrainer` that differ from the defaults.
    candidates
        Complexities to choose from; one alone is taken without a choice.
    features
        (perturbation, feature) descriptors of every perturbation, such as gene embeddings or fingerprints; a
        perturbation that was never measured can then be held out, and is refused without them.
    methods
        Further methods to score beside the baselines: name to ``(Screen, Target) -> Prediction``. They are given
        training cells and the control cells of the target, as the baselines are.
    metrics
        Names in :data:`cellop_nb.analysis.scores.METRICS`; all where None.
    n_seeds
        Fits whose predicted cells are pooled.

    Returns
    -------
    Holdout
        The table of scores, the predicted and the real cells, and the fits.

    Raises
    ------
    HoldoutError
        Where the hold-out matches nothing, leaks, or leaves nothing to learn from.
    """
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    if n_seeds < 1:
        raise HoldoutError(three_beats("n_seeds of at least 1", str(n_seeds), "pass a positive number"))
    work = adata.copy()
    split(work, holdout=dict(heldout), seed=seed, **keys)
    work = _variable(work, n_genes, layer)
    train = work[rows_of(work, ("train", "val"))].copy()
    real = work[rows_of(work, "test")].copy()
    real = real[(real.obs[perturbation_key].astype(str) != control).to_numpy()].copy()
    models = [
        _fit_vae(train, layer, seed + k, dict(vae or {}), dict(training or {}), progress)
        for k in range(n_seeds)
    ]
    wanted = _groups_of(real, keys)
    space = EvaluationSpace.fit(train, genes=list(train.var_names), layer=layer, seed=seed)
    view = _view(train, *models[0], space, layer, keys)
    choice, complexity = _choose(train, view, list(candidates), wanted, features, keys, seed, progress)
    fits = []
    for k, (model, z) in enumerate(models):
        view = _view(train, model, z, space, layer, keys)
        options = {"view": view, "features": features, "asked": wanted}
        response = fit_response(train, complexity, seed=seed + k, **options, **keys)
        fits.append(Fitted(model, response, z, seed + k))
    ask = partial(_virtual_cells, train, fits, layer=layer, keys=keys)
    virtual = _predictable(ask, wanted)
    methods = {
        **BASELINES,
        **(methods or {}),
        LATENT_SHIFT: partial(_pooled_shift, fits=fits, layer=layer),
        OPERATORS: partial(_from_operators, method=OPERATORS, ask=partial(_ready, virtual)),
    }
    if any("+" in perturbation for _, perturbation in wanted):
        for rule in ("composition", "generator"):
            methods[rule] = partial(_from_operators, method=rule, ask=partial(ask, rule=rule))
    table = score_split(train, real, methods, space=space, layer=layer, metrics=metrics, seed=seed, **keys)
    return Holdout(
        table=table,
        predictions=ad.concat([cells for cells in virtual.values() if not isinstance(cells, str)]),
        real=real,
        control=train[(train.obs[perturbation_key].astype(str) == control).to_numpy()].copy(),
        choice=choice,
        complexity=complexity,
        fits=fits,
        space=space,
        measured=[group for group in _groups_of(train, keys) if group[1] != control],
    )


def _variable(work, n_genes: int, layer: str | None):
    if not 0 < n_genes < work.n_vars:
        return work
    train = work[rows_of(work, ("train", "val"))]
    work.obs[TOTAL_KEY] = library_size(work, layer)
    return work[:, variable_genes(train, n_genes, layer=layer)].copy()


def _fit_vae(
    train, layer, seed: int, sizes: dict, training: dict, progress: bool
) -> tuple[NBVAE, np.ndarray]:
    sizes = {"n_latent": 32, "n_hidden": 256} | sizes
    training = {"max_epochs": 120, "lr": 1e-3} | training
    model = new_vae(train, layer=layer, seed=seed, **sizes)
    stop = EarlyStopping(patience=training.pop("patience", 40))
    VAETrainer(train, model, layer=layer, seed=seed, progress=progress, callbacks=[stop], **training).fit()
    embed(train, model, layer=layer)
    return model, train.obsm["X_nbvae"].copy()


def _view(train, vae: NBVAE, z: np.ndarray, space: EvaluationSpace, layer, keys: dict) -> CountView:
    """The training cells as one fit sees them; writes its latents."""
    train.obsm["X_nbvae"] = z
    return CountView(train, vae, space, layer=layer, **keys)


def _choose(
    train,
    view: CountView,
    candidates: list[Complexity],
    wanted,
    features,
    keys: dict,
    seed: int,
    progress: bool,
):
    if len(candidates) == 1:
        return pd.DataFrame(), candidates[0]
    groups = [group for group in _groups_of(train, keys) if group[1] != keys["control"]]
    over = what_to_leave_out(groups, wanted, described=features is not None)
    if len({context for context, _ in groups}) < 2:  # nobody to borrow from
        candidates = list(dict.fromkeys(replace(candidate, locality=None) for candidate in candidates))
    if over is None:
        complexity = _unchosen(candidates, wanted)
        logger.warning("holdout: no two contexts or combinations to leave out in turn; taken: %s", complexity)
        return pd.DataFrame(), complexity
    options = {"view": view, "features": features, "seed": seed, "progress": progress}
    choice = leave_out(train, candidates, over=over, **options, **keys)
    return choice, choose(choice, candidates)


def _unchosen(candidates: list[Complexity], wanted: list[tuple[str, str]]) -> Complexity:
    """What is taken where nothing can tell: the simplest; for combinations the simplest that adds what the
    decoder misses of the parts, which is the additive rule where the decoder sees no effect at all."""
    if any("+" in perturbation for _, perturbation in wanted):
        return next((candidate for candidate in candidates if candidate.remainder), candidates[0])
    return candidates[0]


def _groups_of(real, keys: dict) -> list[tuple[str, str]]:
    """The held-out (context, perturbation) groups."""
    contexts = context_labels(real, keys["context_key"])
    return sorted(set(zip(contexts, real.obs[keys["perturbation_key"]].astype(str), strict=True)))


def _predictable(ask, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], ad.AnnData | str]:
    """Virtual cells of each group, or why there are none; refused where there are none at all."""
    virtual: dict = {}
    for group in wanted:
        try:
            virtual[group] = ask(*group)
        except Undefined as refusal:
            virtual[group] = str(refusal)
    if all(isinstance(cells, str) for cells in virtual.values()):
        fix = "measure it elsewhere, give features=..., or hold out another group"
        found = next(iter(virtual.values()))
        raise HoldoutError(three_beats("a perturbation that can be predicted", found, fix))
    return virtual


def _ready(virtual: Mapping, context: str, perturbation: str) -> ad.AnnData:
    found = virtual[context, perturbation]
    if isinstance(found, str):
        raise Undefined(found)
    return found


def _from_operators(_: Screen, target: Target, *, method: str, ask) -> Prediction:
    return Prediction.of_counts(method, ask(target.context, target.perturbation).X, target.space)


def _virtual_cells(
    train, fits: list[Fitted], context: str, perturbation: str, *, layer, keys: dict, rule: str = "axes"
) -> ad.AnnData:
    """The context's control cells, moved by the operator of each fit and decoded; pooled over the fits."""
    rows = source_cells(train, context, **keys)
    parts = []
    for fitted in fits:
        start = torch.as_tensor(fitted.latents[rows])
        moved = response_operator(fitted.response, perturbation, context, rule=rule)(start)
        missed = fitted.response.remainder(perturbation, context)
        options = {"start": start, "remainder": missed, "layer": layer, "seed": fitted.seed}
        cells = decode_cells(train[rows], fitted.vae, moved, **options)
        cells.obs["source_cell"] = cells.obs_names
        cells.obs["fit"] = fitted.seed
        cells.obs_names = [f"{name}, {perturbation}, fit {fitted.seed}" for name in cells.obs_names]
        parts.append(cells)
    pooled = ad.concat(parts)
    pooled.obs[keys["perturbation_key"]] = perturbation
    return pooled


def _pooled_shift(training: Screen, target: Target, *, fits: list[Fitted], layer) -> Prediction:
    """scGen's rule in each fit's latent space, pooled over the fits."""
    rows = np.flatnonzero(training.rows(target.context, training.control))
    counts = []
    for fitted in fits:

        def decode(z: np.ndarray, fitted=fitted):
            moved = torch.as_tensor(z, dtype=torch.float32)
            return decode_cells(target.adata, fitted.vae, moved, layer=layer, seed=fitted.seed).X

        start = fitted.latents[rows]
        counts.append(
            latent_shift(training, target, latents=fitted.latents, start=start, decode=decode).counts
        )
    return Prediction.of_counts(LATENT_SHIFT, sparse.vstack(counts).tocsr(), target.space)


def strongest_group(
    adata,
    *,
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
) -> tuple[str, str]:
    """The (context, perturbation) group with the largest mean shift in log1p-CP10k, among those that can be
    predicted: the same perturbation was measured in another context.

    Raises
    ------
    HoldoutError
        Where no perturbation was measured in two contexts.
    """
    space = EvaluationSpace(np.asarray(adata.var_names), np.zeros(0), np.zeros(0), adata.n_obs)
    cells = space.transform(space.select(adata, layer))
    screen = Screen.of(
        adata, cells, perturbation_key=perturbation_key, context_key=context_key, control=control
    )
    groups = screen.measured()
    repeated = [(c, p) for c, p in groups if any(q == p and d != c for d, q in groups)]
    if not repeated:
        raise HoldoutError(
            three_beats(
                "a perturbation measured in two contexts",
                "none",
                "hold out cells or combinations instead, or name another context_key",
            )
        )
    return max(repeated, key=lambda group: float(np.linalg.norm(screen.shift(*group))))
