"""One call for an honest hold-out: split, train on the rest, predict from controls, score beside the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape

import anndata as ad
import pandas as pd

from ..data.batches import TOTAL_KEY
from ..data.contract import context_labels, library_size
from ..data.on_disk import require_in_memory
from ..data.splits import rows_of, split
from ..display import Scores
from ..errors import DataError, HoldoutError, LabelError, three_beats
from .abstain import group_support
from .baselines import BASELINES
from .choices import Choice, groups_of
from .combinations import RULES
from .fits import fit_response
from .fitted import (
    LATENT_SHIFT,
    Fitted,
    check_vae_settings,
    fit_vae,
    pooled_shift,
    settings_of,
    view_of,
    virtual_cells,
)
from .formulas import Undefined
from .library import measured_totals
from .metrics import score_split
from .selection import CANDIDATES
from .space import EvaluationSpace, evaluation_genes
from .targets import Baseline, Prediction, Screen, Target
from .transfer import Complexity

OPERATORS = "operators"

FEWEST_CELLS = 4
"""Held-out cells that the energy distance and its noise floor need."""


@dataclass(frozen=True)
class Holdout:
    """What a hold-out gives back.

    Attributes
    ----------
    table : DataFrame
        ``context, perturbation, group, method, metric, value, reason, outlier``; every method beside the noise
        floor. Outliers are groups outside the support of the training contexts.
    predictions : AnnData
        Sampled counts of the virtual cells, pooled over seeds; ``layers["mean"]``, ``obsm``, the source cells' ``obs``,
        of which ``total_counts`` (counts over all measured genes) is predicted.
    real : AnnData
        The held-out cells, over the same genes.
    control : AnnData
        The control cells that the predictions start from.
    choice : DataFrame
        Energy distance of each candidate complexity on training groups left out in turn.
    complexity : Complexity
        What was chosen.
    support : DataFrame
        A row per group: how far its context is from those that its perturbation was measured in (:func:`support`).
    latent_choice : DataFrame
        The same for each setting of the VAE; empty where one was given.
    sizes : dict
        The setting of the VAE that was taken.
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
    support: pd.DataFrame = field(default_factory=pd.DataFrame)
    latent_choice: pd.DataFrame = field(default_factory=pd.DataFrame)
    sizes: dict = field(default_factory=dict)
    measured: list[tuple[str, str]] = field(default_factory=list, repr=False)

    def summary(self, metrics: Sequence[str] = ("e_distance", "pearson_delta")) -> pd.DataFrame:
        """Methods by metrics, the mean over the held-out groups."""
        chosen = self.table[self.table["metric"].isin(metrics)]
        order = list(dict.fromkeys(chosen["method"]))
        return chosen.pivot_table(index="method", columns="metric", values="value").reindex(order)

    def _repr_html_(self) -> str:
        outside = self.support.loc[self.support["outlier"].astype(bool), "group"] if len(self.support) else []
        warning = (
            f"<p>outside the training contexts: {escape('; '.join(outside))}</p>" if len(outside) else ""
        )
        chosen = f"<p>chosen: {escape(str(self.complexity))}</p>"
        return chosen + warning + self.summary().to_html(float_format="%.3f")


def holdout(
    adata,
    *,
    heldout: Mapping[str, object],
    layer: str | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    n_genes: int = 1000,
    vae: Mapping | Sequence[Mapping] | None = None,
    training: Mapping | None = None,
    candidates: Sequence[Complexity] = CANDIDATES,
    features: pd.DataFrame | None = None,
    methods: Mapping[str, Baseline] | None = None,
    metrics: Sequence[str] | None = None,
    n_seeds: int = 1,
    nested: bool = True,
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
    vae
        Settings of :func:`new_vae`; of several, such as ``[{"n_latent": n} for n in (8, 16, 32)]``, the one whose
        operators predict left-out training groups best is taken (three further VAEs for each). By default a choice
        of two, 32 latents with 256 hidden units or 16 with 128; one setting alone, such as ``{}``, is taken as it is.
    training
        Settings of :class:`VAETrainer` that differ from the defaults.
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
    nested
        Choose the complexity with VAEs that have not seen the training groups left out either
        (:class:`~cellop_nb.analysis.nested.NestedFits`): three further VAEs for each setting of the VAE. False takes
        the first setting and judges the candidates in the latent space of the final VAE, three to four times faster;
        it has seen those groups and flatters flexible operators; the genes' intervals then are somewhat narrow, too.

    Returns
    -------
    Holdout
        The table of scores, the predicted and the real cells, and the fits.

    Raises
    ------
    HoldoutError
        Where the hold-out matches nothing, leaks, or leaves nothing to learn from.
    LabelError
        For a key, label or setting that is not known.
    DataError
        Where the counts lie on disk.
    """
    settings = settings_of(vae, nested)
    for sizes in settings:
        check_vae_settings(sizes, training or {})
    _own_names(methods or {})
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    if n_seeds < 1:
        raise HoldoutError(three_beats("n_seeds of at least 1", str(n_seeds), "pass a positive number"))
    require_in_memory(adata, layer)
    work = adata.copy()
    split(work, holdout=dict(heldout), seed=seed, **keys)
    work = _variable(work, n_genes, layer)
    train = work[rows_of(work, ("train", "val"))].copy()
    real = work[rows_of(work, "test")].copy()
    real = real[(real.obs[perturbation_key].astype(str) != control).to_numpy()].copy()
    wanted = groups_of(real, keys)
    _enough_cells(real, wanted, keys)
    space = EvaluationSpace.fit(train, genes=list(train.var_names), layer=layer, seed=seed)
    options = {"training": training or {}, "layer": layer, "progress": progress}
    given = {"candidates": list(candidates), "space": space, "keys": keys, "features": features}
    plan = Choice(train, wanted, settings, nested=nested, seed=seed, **given, **options)
    options["sizes"] = settings[plan.setting]
    models = [fit_vae(train, seed=seed + k, **options) for k in range(n_seeds)]
    choice, complexity = plan.complexity(view_of(train, *models[0], space, layer=layer, keys=keys))
    errors, fits = plan.errors(complexity), []
    for k, (model, z) in enumerate(models):
        view = view_of(train, model, z, space, layer=layer, keys=keys)
        asked = {"view": view, "features": features, "asked": wanted, "errors": errors}
        response = fit_response(train, complexity, seed=seed + k, **asked, **keys)
        fits.append(Fitted(model, response, z, seed + k))
    ask = partial(virtual_cells, train, fits, layer=layer, keys=keys)
    virtual = _predictable(ask, wanted)
    methods = {
        **BASELINES,
        **(methods or {}),
        LATENT_SHIFT: partial(pooled_shift, fits=fits, layer=layer),
        OPERATORS: partial(_from_operators, method=OPERATORS, ask=partial(_ready, virtual)),
    }
    if any("+" in perturbation for _, perturbation in wanted):
        for rule in RULES:
            methods[rule] = partial(_from_operators, method=rule, ask=partial(ask, rule=rule))
    table = score_split(train, real, methods, space=space, layer=layer, metrics=metrics, seed=seed, **keys)
    control_cells = train[(train.obs[perturbation_key].astype(str) == control).to_numpy()].copy()
    labels = context_labels(control_cells, context_key).to_numpy()
    inside = group_support(space, space.select(control_cells, layer), labels, wanted, plan.groups)
    return Holdout(
        table=Scores(
            table.assign(outlier=table["group"].map(inside.set_index("group")["outlier"].astype(bool)))
        ),
        predictions=ad.concat([cells for cells in virtual.values() if not isinstance(cells, str)]),
        real=real,
        control=control_cells,
        choice=choice,
        complexity=complexity,
        fits=fits,
        space=space,
        support=inside,
        latent_choice=plan.compared if len(settings) > 1 else pd.DataFrame(),
        sizes=dict(settings[plan.setting]),
        measured=plan.groups,
    )


def _own_names(methods: Mapping[str, Baseline]) -> None:
    """A method by the name of another one would silently take its place, or lose its own."""
    shared = [name for name in methods if name in (*BASELINES, LATENT_SHIFT, OPERATORS, *RULES)]
    if shared:
        fix = "give it another name"
        raise LabelError(three_beats("a name that no other method of the table has", repr(shared[0]), fix))


def _variable(work, n_genes: int, layer: str | None):
    if not 0 < n_genes < work.n_vars:
        return work
    train = work[rows_of(work, ("train", "val"))]
    work.obs[TOTAL_KEY] = library_size(work, layer)
    return work[:, evaluation_genes(train, n_genes, layer=layer)].copy()


def _enough_cells(real, wanted: list[tuple[str, str]], keys: dict) -> None:
    """Refuse a hold-out of which no group has cells enough; a small group beside larger ones gets reasons."""
    sizes = dict.fromkeys(wanted, 0)
    for group in zip(
        context_labels(real, keys["context_key"]), real.obs[keys["perturbation_key"]], strict=True
    ):
        sizes[str(group[0]), str(group[1])] += 1
    if sizes and max(sizes.values()) < FEWEST_CELLS:
        found = ", ".join(f"{number} of {', '.join(group)}" for group, number in sizes.items())
        expected = (
            f"a held-out group of {FEWEST_CELLS} cells or more (two halves of two, for the noise floor)"
        )
        raise HoldoutError(three_beats(expected, found, "hold out a larger group"))


def _predictable(ask, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], ad.AnnData | str]:
    """Virtual cells of each group, or why there are none; refused where there are none at all."""
    virtual: dict = {}
    for group in wanted:
        try:
            virtual[group] = ask(*group)
        except (Undefined, DataError) as refusal:
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
    cells = ask(target.context, target.perturbation)
    return Prediction.of_counts(method, cells.X, target.space, measured_totals(cells))
