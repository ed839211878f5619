"""How sure is a number: metrics on cells and fits drawn again, operators fitted again, where the error sits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.spatial.distance import cdist
from scipy.stats import t
from torch import Tensor
from tqdm.auto import tqdm

from ..data.contract import keys_of
from ..data.counts import measured_totals
from ..data.groups import Groups
from ..errors import DataError, ModelError, three_beats
from ..models.operators import Condition, OperatorModel
from ..training.loop import Machine
from ..training.operators import OperatorTrainer, Penalties, new_operators
from .baselines import Prediction
from .holdout import CELLOP, Fit, Holdout
from .metrics import e_distance
from .predict import Start, modelled_counts
from .scores import FLOOR, MAX_CELLS, Truth, known_metrics, rows_by_group, score_prediction

__all__ = [
    "bootstrap_operators",
    "error_advice",
    "error_budget",
    "metric_intervals",
    "operator_intervals",
]


def _form(w: np.ndarray, distance: np.ndarray, v: np.ndarray) -> np.ndarray:
    """w_b' D v_b for every replicate b, (replicate,)."""
    return ((w @ distance) * v).sum(axis=1)


# -- operators: refits on cells drawn anew ---------------------------------------------------------------------------


def bootstrap_operators(
    adata: AnnData,
    operators: OperatorModel,
    *,
    n_replicates: int = 20,
    resample: bool = True,
    use_rep: str = "X_nbvae",
    max_epochs: int = 5,
    penalties: Penalties = Penalties(),  # noqa: B008 (frozen)
    progress: bool = True,
    seed: int = 0,
) -> list[OperatorModel]:
    """Fit operators several times, each time on training cells drawn anew and with another seed.

    Cells are drawn with replacement inside each group, each context's controls, and each split, so that all keep their
    sizes. The latents stay as they are: the spread of the VAE is that between fits with several seeds.

    Parameters
    ----------
    adata
        A screen that was set up, with latents in ``obsm[use_rep]`` and ``obs["split"]``; test cells are never read.
    operators
        Whose form and sizes the refits have.
    n_replicates
        How many refits.
    resample
        False keeps the cells and changes the seed alone.
    max_epochs, penalties
        As in :class:`OperatorTrainer`; pure shifts (rank 0) are not trained, since they start at the group means.

    Returns
    -------
    list of OperatorModel, for :func:`operator_intervals`.

    Raises
    ------
    ModelError
        For fewer than two refits.
    """
    if n_replicates < 2:
        raise ModelError(three_beats("two refits or more", str(n_replicates), "raise n_replicates"))
    config = operators.config
    groups = Groups(adata, use_rep=use_rep, split=("train", "val") if config["rank"] else "train")
    members = []
    for k in tqdm(range(n_replicates), desc="refitting operators", disable=not progress):
        sample = _drawn_anew(adata, groups, use_rep, np.random.default_rng([seed, k]), resample)
        model = new_operators(
            sample, form=type(operators), n_axes=config["n_axes"],
            rank=config["rank"], context_rank=config["context_rank"], use_rep=use_rep,
        )  # fmt: skip
        if config["rank"]:
            OperatorTrainer(
                sample, model, max_epochs=max_epochs, lr=2e-2, penalties=penalties, progress=False, seed=seed + k,
                machine=Machine(accelerator="cpu"), use_rep=use_rep,
            ).fit()  # fmt: skip
        members.append(model.cpu().eval())
    return members


def _drawn_anew(
    adata: AnnData, groups: Groups, use_rep: str, rng: np.random.Generator, resample: bool
) -> AnnData:
    """Labels and latents of the groups' cells, drawn with replacement inside each group and split."""
    chosen = []
    for rows in (*groups.control_rows.values(), *(group.rows for group in groups)):
        parts = pd.Series(rows).groupby(adata.obs["split"].to_numpy()[rows].astype(str))
        chosen += [rng.choice(part, len(part)) if resample else part for _, part in parts]
    drawn = np.sort(np.concatenate(chosen))
    obs = adata.obs.iloc[drawn].set_axis([str(k) for k in range(len(drawn))])  # drawn twice, named apart
    sample = AnnData(obs=obs, obsm={use_rep: np.asarray(adata.obsm[use_rep])[drawn]})
    groups.keys.write(sample)
    return sample


@torch.no_grad()
def operator_intervals(
    data: AnnData | Groups,
    members: Sequence[OperatorModel],
    *,
    level: float = 0.95,
    use_rep: str = "X_nbvae",
) -> pd.DataFrame:
    """Intervals of what each operator does to the mean control cell, and of how it stretches.

    Parameters
    ----------
    data
        A screen that was set up, with latents, or its groups; the control cells give the mean control latent z0 of each
        context.
    members
        Of :func:`bootstrap_operators`.
    level
        Nominal coverage.

    Returns
    -------
    DataFrame
        A row per group and quantity: ``context, perturbation, group, quantity, estimate, low, high``.
        Quantities: ``move[i]``, coordinate i of (A - I) z0 + b; ``length`` of that move; ``norm``,
        the largest singular value of A. The estimate is the members' mean, the ends
        are Student's t times their standard deviation away.

    References
    ----------
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 12 (standard intervals).
    """
    groups, encoder = (
        data if isinstance(data, Groups) else Groups(data, use_rep=use_rep),
        members[0].conditions,
    )
    tables, (_, high) = [], _ends(level)
    for context in encoder.contexts:
        groups.controls(context)  # refuses one without
        start = groups.control[context].mean(0)
        conditions = [Condition((name,), context) for name in encoder.perturbations]
        values = torch.stack([_quantities(member, conditions, start) for member in members])
        values = values.double().numpy()
        mean = values.mean(axis=0)  # of few refits: their quantiles would be too narrow
        margin = t.ppf(high, len(members) - 1) * values.std(axis=0, ddof=1)
        quantities = [*(f"move[{k}]" for k in range(len(start))), "length", "norm"]
        names = [name for name in encoder.perturbations for _ in quantities]
        columns = {
            "context": context,
            "perturbation": names,
            "group": [f"{context}, {name}" for name in names],
            "quantity": quantities * len(conditions),
            "estimate": mean.ravel(),
            "low": (mean - margin).ravel(),
            "high": (mean + margin).ravel(),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _quantities(member: OperatorModel, conditions: Sequence[Condition], start: Tensor) -> Tensor:
    """(condition, d + 2): the move of the mean cell `start` (d,), its length, and the norm of the matrix."""
    matrices, shifts = member.affine(member.conditions.design(conditions))
    moves = matrices @ start + shifts - start
    norms = torch.linalg.matrix_norm(matrices, 2)
    return torch.cat([moves, moves.norm(dim=1, keepdim=True), norms.unsqueeze(1)], dim=1)


def _ends(level: float) -> tuple[float, float]:
    """The quantiles at the two ends of an interval."""
    if not 0 < level < 1:
        raise DataError(three_beats("a level between 0 and 1", f"{level}", "pass level=0.95"))
    return (1 - level) / 2, (1 + level) / 2


def metric_intervals(
    result: Holdout,
    *,
    metrics: Iterable[str] | None = None,
    n_replicates: int = 100,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Bootstrap interval of every metric of a prediction, over cells and over the seeds' fits.

    In each replicate the fits are drawn again, and so are each fit's predicted cells, the real cells and the
    control cells. Resampling adds noise to both sides, so replicates are moved by their mean's distance to the
    estimate: the interval says how far the value may lie from that of other samples of the same size.

    Parameters
    ----------
    result
        Of :func:`holdout`, with ``n_seeds`` above 1 for the spread between fits.
    metrics
        Names; those of the result's table where None. Metrics of differential genes cost a Wilcoxon test per
        replicate.
    n_replicates, level
        Bootstrap samples, and the nominal coverage.

    Returns
    -------
    DataFrame
        ``group, metric, value, low, high, level, reason``.

    References
    ----------
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 10.
    """
    ends = _ends(level)
    names = known_metrics(result.scores["metric"].unique() if metrics is None else metrics)
    rows = []
    for number, sides in enumerate(sides_of(result)):
        truth = Truth(sides.real, sides.control, sides.space, max_cells=MAX_CELLS, seed=seed)
        rng = np.random.default_rng([seed, number])
        draws = range(n_replicates)
        bar = tqdm(draws, desc=f"bootstrap {sides.group}", disable=not progress)
        others = [name for name in names if name != "e_distance"]
        values = (
            pd.DataFrame([_redrawn(sides, truth, others, rng) for _ in bar]) if others else pd.DataFrame()
        )
        scored = result.scores[(result.scores["group"] == sides.group) & (result.scores["method"] == CELLOP)]
        by_metric = scored.groupby("metric")[["value", "reason"]].agg({"value": "mean", "reason": "first"})
        for name in names:
            estimate, reason = by_metric.loc[name]
            labels = {"group": sides.group, "metric": name, "value": estimate}
            if np.isfinite(estimate):
                replicates = (
                    _energy_replicates(sides, truth, n_replicates, rng)
                    if name == "e_distance"
                    else values[name].dropna().to_numpy()
                )
                if len(replicates):
                    low, high = np.quantile(replicates, ends) - replicates.mean() + estimate
                    labels |= {"low": float(low), "high": float(high)}
                else:
                    reason = "needs the training cells, which the result does not keep"
            rows.append({"low": np.nan, "high": np.nan, **labels, "level": level, "reason": reason})
    columns = ["group", "metric", "value", "low", "high", "level", "reason"]
    return pd.DataFrame(rows, columns=columns)


@dataclass(frozen=True, eq=False)
class Sides:
    """One held-out group in the space of its metrics: cells (cell, gene) in log1p-CP10k, their counts, and their
    libraries (cell,) where genes were left out; predicted ones for each fit."""

    group: str
    space: Any = field(repr=False)
    fits: list[np.ndarray] = field(repr=False)
    fit_counts: list = field(repr=False)
    fit_libraries: list[np.ndarray] | None = field(repr=False)
    real: np.ndarray = field(repr=False)
    real_counts: Any = field(repr=False)
    real_library: np.ndarray | None = field(repr=False)
    control: np.ndarray = field(repr=False)


def sides_of(result: Holdout) -> Iterator[Sides]:
    """The groups of a hold-out that were predicted, one after the other, in the space of their first fit."""
    labels = result.scores[["question", "context", "perturbation", "group"]].drop_duplicates()
    for question, context, perturbation, group in labels.itertuples(index=False, name=None):
        fit = next(fit for fit in result.fits if fit.question == question)
        keys, space = keys_of(fit.real), fit.space
        cells = result.predictions[(result.predictions.obs["question"] == question).to_numpy()]
        predicted = cells[rows_by_group(cells, keys).get((context, perturbation), np.zeros(0, int))]
        if not predicted.n_obs:
            continue  # its reason stands in the table
        members = [
            predicted[(predicted.obs["seed"] == seed).to_numpy()] for seed in predicted.obs["seed"].unique()
        ]
        counts = [space.select(member, "X") for member in members]
        libraries = [measured_totals(member) for member in members]
        real = fit.real[rows_by_group(fit.real, keys)[context, perturbation]]
        control = fit.control[rows_by_group(fit.control, keys)[context, keys.control]]
        yield Sides(
            group,
            space,
            [space.transform(part) for part in counts],
            counts,
            None if libraries[0] is None else libraries,
            space.transform(space.select(real)),
            space.select(real),
            measured_totals(real),
            space.transform(space.select(control)),
        )


class _Redrawn(Truth):
    """Resampled real and control cells that keep the gene ranking of the whole."""

    def __init__(self, whole: Truth, real, control, counts, library) -> None:
        super().__init__(
            real, control, whole.space, counts=counts, library=library, shared_shift=whole.shared_shift,
            max_cells=whole.max_cells, seed=whole.seed,
        )  # fmt: skip
        self.whole = whole

    @property
    def top_genes(self) -> np.ndarray:
        return self.whole.top_genes


def _redrawn(sides: Sides, truth: Truth, names: list[str], rng: np.random.Generator) -> dict[str, float]:
    """The metrics of one bootstrap sample."""
    fits = rng.integers(len(sides.fits), size=len(sides.fits))
    chosen = [(fit, rng.integers(len(sides.fits[fit]), size=len(sides.fits[fit]))) for fit in fits]
    cells = np.concatenate([sides.fits[fit][rows] for fit, rows in chosen])
    counts = np.concatenate([_dense(sides.fit_counts[fit][rows]) for fit, rows in chosen])
    real = rng.integers(len(sides.real), size=len(sides.real))
    control = rng.integers(len(sides.control), size=len(sides.control))
    sample = (sides.real[real], sides.control[control], _dense(sides.real_counts[real]))
    library, measured = None, None if sides.real_library is None else sides.real_library[real]
    if sides.fit_libraries is not None:
        library = np.concatenate([sides.fit_libraries[fit][rows] for fit, rows in chosen])
    again = _Redrawn(truth, *sample, measured)
    scored = score_prediction(Prediction.of_cells(CELLOP, cells, counts, library), again, names)
    return {row["metric"]: row["value"] for row in scored}


def _dense(counts) -> np.ndarray:
    return counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)


def _energy_replicates(sides: Sides, truth: Truth, n_replicates: int, rng) -> np.ndarray:
    r"""E-distances with multinomial weights on the cells; those of the predicted cells also redraw the fits.

    With weights w, v that sum to n, m the replicate is

    .. math:: \frac{2\,w^\top D_{xy} v}{nm} - \frac{w^\top D_{xx} w}{(n-1)^2}
                  - \frac{v^\top D_{yy} v}{(m-1)^2}

    whose mean is the U-statistic itself for one fit: :math:`E[w_i w_j] = (n-1)/n`, and repeats are at 0. (Cells drawn
    twice as points would bias it.) Drawing fits makes weights correlate, which moves the mean (the caller centres) and
    widens the spread (which is what is asked).
    """
    most = max(1, truth.max_cells // len(sides.fits))
    parts = [truth.space.project(cells[rng.permutation(len(cells))[:most]]) for cells in sides.fits]
    x, y = np.concatenate(parts), truth.real_points
    fits = rng.multinomial(len(parts), np.full(len(parts), 1 / len(parts)), size=n_replicates)
    sizes = [len(part) for part in parts]
    w = np.concatenate(
        [_multinomial(size * fits[:, k], size, rng) for k, size in enumerate(sizes)], axis=1
    )  # (replicate, cell)
    v = _multinomial(np.full(n_replicates, len(y)), len(y), rng)
    n, m = w.sum(axis=1), len(y)
    between = 2 * _form(w, cdist(x, y), v) / (n * m)
    return between - _form(w, cdist(x, x), w) / (n - 1) ** 2 - _form(v, cdist(y, y), v) / (m - 1) ** 2


def _multinomial(draws: np.ndarray, size: int, rng) -> np.ndarray:
    return rng.multinomial(draws, np.full(size, 1 / size)).astype(float)


# -- where the error sits --------------------------------------------------------------------------------------------

STAGES = ("noise floor", "decoder, control cells", "decoder, true perturbed cells", "CellOp", "no change")


def error_budget(result: Holdout, *, seed: int = 0) -> pd.DataFrame:
    """Energy distance (Euclidean, U-statistic, evaluation components) of each stage of a prediction, per group.

    The stages: split halves of the real cells; control cells encoded and decoded, against the real control
    cells; real perturbed cells encoded and decoded, against themselves; the prediction; no change at all. The
    last but one minus the one before is what better operators and plans could win; the third is what they cannot.

    Parameters
    ----------
    result
        A hold-out.

    Returns
    -------
    DataFrame
        ``group, stage, energy``; with several seeds means over them.
    """
    rows, scored = [], result.scores[result.scores["metric"] == "e_distance"]
    mean = scored.groupby(["group", "method"])["value"].mean()
    labels = scored[["question", "context", "perturbation", "group"]].drop_duplicates()
    for question, context, perturbation, group in labels.itertuples(index=False, name=None):
        fits = [fit for fit in result.fits if fit.question == question]
        control = keys_of(fits[0].real).control
        trips = [
            np.mean([_round_trip(fit, part, (context, label), seed) for fit, part in parts])
            for label, parts in (
                (control, [(fit, fit.control) for fit in fits]),
                (perturbation, [(fit, fit.real) for fit in fits]),
            )
        ]
        energies = (mean[group, FLOOR], *trips, mean[group, CELLOP], mean[group, "no change"])
        rows += [{"group": group, "stage": s, "energy": e} for s, e in zip(STAGES, energies, strict=True)]
    return pd.DataFrame(rows)


def _round_trip(fit: Fit, cells, pair: tuple[str, str], seed: int) -> float:
    """Energy distance between cells and their own encoded and decoded counts."""
    keys = keys_of(cells)
    rows = rows_by_group(cells, keys)[pair]
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MAX_CELLS])
    truth = fit.space.project(fit.space.transform(fit.space.select(cells[rows])))
    start = Start.of(modelled_counts(cells[rows], fit.vae, keys), fit.vae)
    again = start.fresh(start.z, torch.Generator().manual_seed(seed))
    return e_distance(fit.space.project(fit.space.transform(again)), truth)


def error_advice(budget: pd.DataFrame) -> pd.DataFrame:
    """What to improve, in words, for each group of :func:`error_budget`.

    Parameters
    ----------
    budget
        Its table, one row per group and stage.

    Returns
    -------
    DataFrame
        ``group, advice``.
    """
    wide = budget.pivot(index="group", columns="stage", values="energy")
    return pd.DataFrame({"group": wide.index, "advice": [_sentence(row) for _, row in wide.iterrows()]})


def _sentence(row: pd.Series) -> str:
    floor, decoder, whole = row["noise floor"], row["decoder, true perturbed cells"], row["CellOp"]
    if row["no change"] <= max(2 * floor, 0.1):
        return "There is hardly an effect to predict: no change comes about as near as the noise floor."
    if whole <= max(2 * floor, 0.1):
        return "The prediction comes about as near as the noise floor: nothing to improve."
    if decoder > 0.5 * whole:
        share = f"{decoder / whole:.0%} of the error remains when the true latents are decoded"
        if decoder > whole:  # they are decoded afresh, while a prediction keeps the cells' own counts
            share = (
                f"Decoding the true latents comes no nearer ({decoder:.2f}) than the prediction ({whole:.2f})"
            )
        return f"{share}: improve the VAE (longer training, more latent dimensions, a larger hidden layer)."
    return (
        f"{1 - max(decoder, 0.0) / whole:.0%} of the error comes from the operators and the plan: measure a nearer "
        "context, or more cells, and compare with the nearest context in the table."
    )
