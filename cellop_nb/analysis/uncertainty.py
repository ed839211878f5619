"""How sure is a number: metrics and operators drawn again, where the error sits, which experiment would tell most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from scipy.linalg import solve_triangular
from scipy.spatial.distance import cdist
from scipy.stats import t
from torch import Tensor
from tqdm.auto import tqdm

from ..data.contract import context_name, keys_of
from ..data.groups import Groups, evenly
from ..errors import DataError, LabelError, ModelError, checked
from ..models.operators import Condition, OperatorModel
from ..training.loop import Machine
from ..training.operators import OperatorTrainer, Penalties, new_operators
from .baselines import Prediction
from .cellop import CellOp, Context
from .holdout import CELLOP, Fit, Holdout
from .metrics import e_distance
from .predict import Start, modelled_counts
from .scores import FLOOR, MAX_CELLS, METRICS, Truth, known_metrics, rows_by_group, score_prediction

__all__ = [
    "bootstrap_operators",
    "error_advice",
    "error_budget",
    "metric_intervals",
    "next_experiments",
    "operator_intervals",
]


# -- operators: refits on cells drawn anew ---------------------------------------------------------------------------


@checked
def bootstrap_operators(
    adata: AnnData,
    operators: OperatorModel,
    *,
    n_replicates: int = 20,
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
        raise ModelError("two refits or more", str(n_replicates), "raise n_replicates")
    config = operators.config
    groups = Groups(adata, use_rep=use_rep, split=("train", "val") if config["rank"] else "train")
    members = []
    for k in tqdm(range(n_replicates), desc="refitting operators", disable=not progress):
        sample = _drawn_anew(adata, groups, use_rep, np.random.default_rng([seed, k]))
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


def _drawn_anew(adata: AnnData, groups: Groups, use_rep: str, rng: np.random.Generator) -> AnnData:
    """Labels and latents of the groups' cells, drawn with replacement inside each group and split."""
    chosen = []
    for rows in (*groups.control_rows.values(), *(group.rows for group in groups)):
        parts = pd.Series(rows).groupby(adata.obs["split"].to_numpy()[rows].astype(str))
        chosen += [rng.choice(part, len(part)) for _, part in parts]
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
    groups = data if isinstance(data, Groups) else Groups(data, use_rep=use_rep)
    encoder, (_, high), tables = members[0].conditions, _ends(level), []
    names = ["context", "perturbation", "quantity"]
    for context in encoder.contexts:
        groups.controls(context)  # refuses one without
        start = groups.control[context].mean(0)
        conditions = [Condition((name,), context) for name in encoder.perturbations]
        values = torch.stack([_quantities(member, conditions, start) for member in members]).double().numpy()
        mean = values.mean(axis=0).ravel()  # of few refits: their quantiles would be too narrow
        margin = t.ppf(high, len(members) - 1) * values.std(axis=0, ddof=1).ravel()
        quantities = [*(f"move[{k}]" for k in range(len(start))), "length", "norm"]
        index = pd.MultiIndex.from_product([[context], encoder.perturbations, quantities], names=names)
        ends = {"estimate": mean, "low": mean - margin, "high": mean + margin}
        tables.append(pd.DataFrame(ends, index).reset_index())
    table = pd.concat(tables, ignore_index=True)
    table.insert(2, "group", table["context"] + ", " + table["perturbation"])
    return table


def _quantities(member: OperatorModel, conditions: Sequence[Condition], start: Tensor) -> Tensor:
    """(condition, d + 2): the move of the mean cell `start` (d,), its length, and the norm of the matrix."""
    matrices, shifts = member.affine(member.conditions.design(conditions))
    moves = matrices @ start + shifts - start
    norms = torch.linalg.matrix_norm(matrices, 2)
    return torch.cat([moves, moves.norm(dim=1, keepdim=True), norms.unsqueeze(1)], dim=1)


def _ends(level: float) -> tuple[float, float]:
    """The quantiles at the two ends of an interval."""
    if not 0 < level < 1:
        raise DataError("a level between 0 and 1", f"{level}", "pass level=0.95")
    return (1 - level) / 2, (1 + level) / 2


@checked
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
    ends, rows = _ends(level), []
    names = result.scores["metric"].unique() if metrics is None else known_metrics(metrics)
    names = [name for name in names if name in METRICS]
    others = [name for name in names if name != "e_distance"]
    for number, (group, truth, fits) in enumerate(_sides(result, seed)):
        rng = np.random.default_rng([seed, number])
        bar = tqdm(range(n_replicates), desc=f"bootstrap {group}", disable=not progress)
        replicates = pd.DataFrame([_redrawn(truth, fits, others, rng) for _ in bar] if others else [])
        scored = result.scores[(result.scores["group"] == group) & (result.scores["method"] == CELLOP)]
        by_metric = scored.groupby("metric")[["value", "reason"]].agg({"value": "mean", "reason": "first"})
        for name in names:
            estimate, reason = by_metric.loc[name]
            low = high = np.nan
            if np.isfinite(estimate):
                if name == "e_distance":
                    drawn = energy_replicates(truth, fits, n_replicates, rng)
                else:
                    drawn = replicates[name].dropna().to_numpy()
                if len(drawn):
                    low, high = np.quantile(drawn, ends) - drawn.mean() + estimate
                else:
                    reason = "needs the training cells, which the result does not keep"
            rows.append((group, name, estimate, low, high, level, reason))
    columns = ["group", "metric", "value", "low", "high", "level", "reason"]
    return pd.DataFrame(rows, columns=columns)


def _sides(result: Holdout, seed: int) -> Iterator[tuple[str, Truth, list[Prediction]]]:
    """Name, real cells and each fit's predicted cells of every predicted group, in the space of its first fit."""
    labels = result.scores[["question", "context", "perturbation", "group"]].drop_duplicates()
    for question, context, perturbation, group in labels.itertuples(index=False, name=None):
        fit = next(fit for fit in result.fits if fit.question == question)
        keys, space = keys_of(fit.real), fit.space
        cells = result.predictions[(result.predictions.obs["question"] == question).to_numpy()]
        cells = cells[rows_by_group(cells, keys).get((context, perturbation), np.zeros(0, int))]
        if not cells.n_obs:
            continue  # its reason stands in the table
        real = fit.real[rows_by_group(fit.real, keys)[context, perturbation]]
        control = fit.control[rows_by_group(fit.control, keys)[context, keys.control]]
        of_seed = [(cells.obs["seed"] == seed).to_numpy() for seed in cells.obs["seed"].unique()]
        fits = [Prediction.of_adata(CELLOP, cells[mask], space) for mask in of_seed]
        yield group, Truth.of(real, control, space, seed), fits


def _redrawn(
    truth: Truth, fits: list[Prediction], names: list[str], rng: np.random.Generator
) -> dict[str, float]:
    """The metrics of one bootstrap sample."""
    cells, counts, libraries = [], [], []
    for fit in [fits[k] for k in _drawn(fits, rng)]:
        whole = np.asarray(fit.cells)
        rows = _drawn(whole, rng)
        cells.append(whole[rows])
        counts.append(sparse.csr_matrix(fit.counts[rows]))
        libraries += [] if fit.library is None else [fit.library[rows]]
    real, control = _drawn(truth.real, rng), _drawn(truth.control, rng)
    again = replace(
        truth,
        real=truth.real[real],
        control=truth.control[control],
        counts=truth.counts[real],
        library=None if truth.library is None else truth.library[real],
        whole=truth,
    )
    library = np.concatenate(libraries) if libraries else None
    guess = Prediction.of_cells(CELLOP, np.concatenate(cells), sparse.vstack(counts, "csr"), library)
    return {row["metric"]: row["value"] for row in score_prediction(guess, again, names)}


def _drawn(items, rng: np.random.Generator) -> np.ndarray:
    """As many positions as there are items, with replacement."""
    return rng.integers(len(items), size=len(items))


def energy_replicates(truth: Truth, fits: Sequence[Prediction], n_replicates: int, rng) -> np.ndarray:
    r"""E-distances with multinomial weights on the cells; those of the predicted cells also redraw the fits.

    With weights w, v that sum to n, m the replicate is

    .. math:: \frac{2\,w^\top D_{xy} v}{nm} - \frac{w^\top D_{xx} w}{(n-1)^2}
                  - \frac{v^\top D_{yy} v}{(m-1)^2}

    whose mean is the U-statistic itself for one fit: :math:`E[w_i w_j] = (n-1)/n`, and repeats are at 0. (Cells drawn
    twice as points would bias it.) Drawing fits makes weights correlate, which moves the mean (the caller centres) and
    widens the spread (which is what is asked).
    """

    def form(w, distance, v) -> np.ndarray:
        return ((w @ distance) * v).sum(axis=1)

    def weights(draws, size: int) -> np.ndarray:
        return rng.multinomial(draws, np.full(size, 1 / size), size=None if np.ndim(draws) else n_replicates)

    most = max(1, MAX_CELLS // len(fits))
    clouds = [np.asarray(fit.cells) for fit in fits]
    parts = [truth.space.project(cells[rng.permutation(len(cells))[:most]]) for cells in clouds]
    x, y = np.concatenate(parts), truth.real_points
    per_fit = weights(len(parts), len(parts))
    w = np.concatenate([weights(len(p) * per_fit[:, k], len(p)) for k, p in enumerate(parts)], axis=1)
    v = weights(len(y), len(y))
    n, m = w.sum(axis=1), len(y)
    between = 2 * form(w, cdist(x, y), v) / (n * m)
    return between - form(w, cdist(x, x), w) / (n - 1) ** 2 - form(v, cdist(y, y), v) / (m - 1) ** 2


# -- where the error sits --------------------------------------------------------------------------------------------

STAGES = ("noise floor", "decoder, control cells", "decoder, true perturbed cells", "CellOp", "no change")


@checked
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
        start = context, keys_of(fits[0].real).control
        unmoved = np.mean([_round_trip(fit, fit.control, start, seed) for fit in fits])
        decoded = np.mean([_round_trip(fit, fit.real, (context, perturbation), seed) for fit in fits])
        energies = (mean[group, FLOOR], unmoved, decoded, mean[group, CELLOP], mean[group, "no change"])
        rows += [(group, stage, energy) for stage, energy in zip(STAGES, energies, strict=True)]
    return pd.DataFrame(rows, columns=["group", "stage", "energy"])


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
    explained = 1 - (whole - floor) / (row["no change"] - floor)
    said = f"The prediction takes off {max(explained, 0.0):.0%} of the distance. "
    if decoder > whole:  # decoded afresh, while a prediction keeps the cells' own counts
        return (
            f"{said}Decoding the true latents comes no nearer ({decoder:.2f}) than the prediction ({whole:.2f}), which "
            "keeps the cells' own counts: nothing here says what to improve."
        )
    if decoder > 0.5 * whole:
        share = f"{decoder / whole:.0%} of what is left remains when the true latents are decoded"
        return (
            f"{said}{share}: if that is too much, improve the VAE (longer training, more latent dimensions)."
        )
    return (
        f"{said}{1 - max(decoder, 0.0) / whole:.0%} of what is left comes from the operators and the plan: measure a "
        "nearer context, or more cells, and compare with the nearest context in the table."
    )


# -- what to measure next ------------------------------------------------------------------------------------------------

_MOST_MEASURED, _MOST_WANTED = 2000, 1000


def next_experiments(
    model: CellOp,
    candidates: Sequence[tuple[Context, str]],
    n: int = 10,
    *,
    wanted: Sequence[tuple[Context, str]] | None = None,
) -> pd.DataFrame:
    r"""Rank unmeasured (context, perturbation) pairs by how much uncertainty their measurement would remove.

    .. math:: \text{gain}(c) = \sum_w \mathrm{cov}(w, c)^2 / (\mathrm{var}(c) + v)

    under a Gaussian process over contexts and descriptors, given what was measured and what was chosen before, so that
    the next choice tells something else. The covariance is a product of Gaussian kernels of median width, of descriptors
    and of mean control cells; v is the mean share of noise in a measured effect. All candidates are compared; of more
    than 2,000 measured pairs and 1,000 wanted ones so many, evenly spread, stand for all.

    Parameters
    ----------
    model
        Fitted with `features`.
    candidates
        Pairs that could be measured.
    n
        How many to choose.
    wanted
        Pairs whose effects are wanted; the candidates where None.

    Returns
    -------
    DataFrame
        ``context, perturbation, gain, uncertainty``: share of the wanted variance that each removes, in the order of the
        choice, and the share of the prior variance of the wanted that is left after it.

    Raises
    ------
    ModelError
        For a model without features.
    LabelError
        For no candidate, or a pair without descriptor or control cells.

    References
    ----------
    MacKay (1992), Neural Computation 4:590; Cohn, Ghahramani, Jordan (1996), JAIR 4:129 (expected reduction of variance).
    """
    if model.features is None or not model.members:
        fix = "fit CellOp(adata, features=...)"
        raise ModelError("a fitted model that knows descriptors of perturbations", "none", fix)
    pairs = [(context_name(context, model.keys), perturbation) for context, perturbation in candidates]
    if not pairs:
        raise LabelError("candidates to choose from", "none", "name pairs (context, perturbation)")
    targets = pairs if wanted is None else [(context_name(c, model.keys), p) for c, p in wanted]
    means, rows = model.means, model.features.dropna(how="all")
    rows = rows.set_axis(rows.index.map(str), axis=0)
    for context, perturbation in (*pairs, *targets):
        if perturbation not in rows.index or context not in means.contexts:
            problem = f"{perturbation!r} in {context!r}"
            fix = "leave it out, or describe it and measure the context's controls"
            raise LabelError("a described perturbation and a context with controls", problem, fix)
    measured = [k for k, pair in enumerate(means.pairs) if pair[1] in rows.index]
    measured, told = (_spread(of, most) for of, most in ((measured, _MOST_MEASURED), (targets, _MOST_WANTED)))
    change, noise = means.change[measured], means.noise[measured].sum(1)
    signal = max(
        float(np.square(change - change.mean(0)).sum(1).mean() - noise.mean()), 0.1 * float(noise.mean())
    )
    every = [*(means.pairs[k] for k in measured), *pairs, *told]
    place = {context: k for k, context in enumerate(means.contexts)}
    descriptors = rows.loc[[p for _, p in every]].to_numpy(dtype=float)
    levels = means.control[[place[c] for c, _ in every]]
    first, last = len(measured), len(measured) + len(pairs)
    chosen, gains, left = choose(
        [descriptors, levels], range(first), range(first, last), range(last, len(every)), n, noise / signal
    )
    table = pd.DataFrame([every[k] for k in chosen], columns=["context", "perturbation"])
    return table.assign(gain=gains, uncertainty=left)


def _spread(items: list, most: int) -> list:
    """At most so many of the items, evenly spread."""
    return [items[int(k)] for k in evenly(len(items), most)]


def gaussian(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """(n, m) Gaussian kernel of the rows of x (n, k) and y (m, k)."""
    near = cdist(x, y, "sqeuclidean")
    near /= -2 * width**2
    return np.exp(near, out=near)


def median_distance(x: np.ndarray) -> float:
    """Median distance between different rows of x (n, k), of many evenly spread ones; 1 where all are the same."""
    some = x[evenly(len(x), _MOST_MEASURED).numpy()]
    apart = cdist(some, some)
    apart = apart[apart > 0]
    return float(np.median(apart)) if len(apart) else 1.0


def choose(
    factors: Sequence[np.ndarray],
    measured: Sequence[int],
    candidates: Sequence[int],
    wanted: Sequence[int],
    n: int,
    noise: np.ndarray,
) -> tuple[list[int], list[float], list[float]]:
    """Greedy choice of n candidates, the share of the wanted variance that each removes, and the share that is left.

    The prior covariance of rows is a product of Gaussian kernels, one of each of the `factors` (row, feature); all else
    are positions of rows. The `noise` of the measured is in units of the prior variance; a candidate is expected to have
    their mean. Memory grows with the candidates times the measured and the wanted.
    """
    widths = [median_distance(x) for x in factors]

    def kernel(a: Sequence[int], b: Sequence[int]) -> np.ndarray:
        parts = (gaussian(x[list(a)], x[list(b)], width) for x, width in zip(factors, widths, strict=True))
        return reduce(lambda near, other: np.multiply(near, other, out=near), parts)

    gram = np.linalg.cholesky(kernel(measured, measured) + np.diag(noise + 1e-9))
    told, aims = (solve_triangular(gram, kernel(measured, rows), lower=True) for rows in (candidates, wanted))
    between = kernel(wanted, candidates)
    between -= aims.T @ told
    variance, unknown = (1 - np.square(part).sum(0) for part in (told, aims))
    own, prior, free = float(noise.mean()) + 1e-9, len(wanted), np.ones(len(candidates), dtype=bool)
    taken: list[np.ndarray] = []  # what each choice tells of every candidate
    chosen: list[int] = []
    gains, left = [], []
    for _ in range(min(n, len(candidates))):
        gain = np.einsum("wc,wc->c", between, between) / (np.maximum(variance, 0.0) + own)
        best = int(np.argmax(np.where(free, gain, -1.0)))
        scale = np.sqrt(max(variance[best], 0.0) + own)
        column = kernel(candidates, [candidates[best]])[:, 0] - told.T @ told[:, best]
        column = (column - sum(before * before[best] for before in taken)) / scale
        seen = between[:, best] / scale
        between -= np.outer(seen, column)
        variance, unknown = variance - np.square(column), unknown - np.square(seen)
        taken.append(column)
        free[best] = False
        chosen.append(int(candidates[best]))
        gains.append(float(gain[best]) / prior)
        left.append(float(np.maximum(unknown, 0.0).sum()) / prior)
    return chosen, gains, left
