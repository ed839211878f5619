"""Many hold-outs in one call: every context, donor, perturbation or combination in turn, over seeds, in parallel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..errors import CellopError, HoldoutError, check_settings, three_beats
from ..packages import require
from .combinations import RULES
from .fitted import check_vae_settings, settings_of
from .holdout import OPERATORS, holdout
from .holdout_plan import plan_of
from .nested import sizes_in_words

FEWEST_CELLS = 10
"""Held-out cells of a group below which its scores are mostly noise."""

_NOT_BASELINES = (OPERATORS, *RULES)


@dataclass(frozen=True)
class Holdouts:
    """What :func:`holdout_all` gives back.

    Attributes
    ----------
    table : DataFrame
        ``heldout, seed, context, perturbation, group, method, metric, value, reason``.
    choices : DataFrame
        ``heldout, seed, complexity, vae``: what was chosen each time, and the tried candidates' ``e_distance``.
    left_out : DataFrame
        ``heldout, seed, reason``: hold-outs that could not be made, and why.
    """

    table: pd.DataFrame
    choices: pd.DataFrame
    left_out: pd.DataFrame

    def summary(self, metric: str = "e_distance", *, by: str = "group") -> pd.DataFrame:
        """Groups by methods: the mean of a metric over seeds, with a last row for the mean over groups.

        `by="heldout"` gives a row for each hold-out instead, such as each donor: the mean over its groups.
        """
        rows = self.table[self.table["metric"] == metric]
        order = list(dict.fromkeys(rows["method"]))
        wide = rows.pivot_table(index=by, columns="method", values="value", sort=False)
        wide = wide.reindex(columns=[method for method in order if method in wide])
        wide.loc["mean"] = wide.mean()
        return wide

    def behind(self, metric: str = "e_distance", *, share: float = 0.1, margin: float = 0.1) -> pd.DataFrame:
        """Groups where the operators are farther from the truth than the best baseline, mean over seeds.

        Parameters
        ----------
        metric
            One that is smaller where the prediction is better.
        share, margin
            Reported where the operators exceed the baseline by more than this share and by more than this much.

        Returns
        -------
        DataFrame ``group, operators, best_baseline, baseline, excess``, the worst first; empty is good.
        """
        wide = self.summary(metric).drop(index="mean")
        noise = [name for name in wide if "noise" in name]
        baselines = wide.drop(columns=[name for name in (*_NOT_BASELINES, *noise) if name in wide])
        best = baselines.min(axis=1)
        found = pd.DataFrame(
            {
                "operators": wide[OPERATORS],
                "best_baseline": baselines.idxmin(axis=1),
                "baseline": best,
                "excess": wide[OPERATORS] - best,
            }
        )
        behind = found["excess"] > np.maximum(share * best.abs(), margin)
        return found[behind].sort_values("excess", ascending=False).rename_axis("group").reset_index()

    def _repr_html_(self) -> str:
        return self.summary().to_html(float_format="%.3f")


def holdout_all(
    adata,
    *,
    over: str = "context",
    where: Mapping[str, object] | None = None,
    perturbation_key: str = "perturbation",
    context_key: str | Sequence[str] | None = "cell_type",
    control: str = "control",
    min_cells: int = FEWEST_CELLS,
    n_seeds: int = 1,
    n_pooled: int = 1,
    seed: int = 0,
    cluster=None,
    progress: bool = True,
    **options,
) -> Holdouts:
    """Hold out every context, donor, perturbation or combination in turn, for several seeds, and score all.

    Parameters
    ----------
    over
        ``"context"``: the perturbed cells of each context; ``"combination"``: each measured ``"A+B"`` whose
        parts were measured alone; ``"group"``: each (context, perturbation) that was measured in another context;
        or a column of ``obs`` (donor, perturbation): the perturbed cells of each of its labels.
    where
        Further columns and labels that every hold-out must match, such as ``{"perturbation": "IFNb"}``.
    min_cells
        Hold-outs without any (context, perturbation) group of this size are left out, and listed.
    n_seeds
        Independent runs of each hold-out, with the seeds `seed`, `seed` + 1, ...
    n_pooled
        Fits pooled in each run (`n_seeds` of :func:`holdout`).
    cluster
        A Dask ``Client`` or cluster, or a number of local worker processes; None runs here, one after the other.
        The tables are the same.
    **options
        As in :func:`holdout`: `layer`, `n_genes`, `vae`, `training`, `candidates`, `features`, `methods`, `metrics`.

    Returns
    -------
    Holdouts: ``table`` over all hold-outs and seeds, ``choices``, and what was ``left_out`` with reasons.

    Raises
    ------
    HoldoutError
        Where `over` gives nothing to hold out, with the numbers of each refusal.
    LabelError
        For a column, label or setting that is not known.
    """
    if min(n_seeds, n_pooled) < 1:
        found = f"n_seeds={n_seeds}, n_pooled={n_pooled}"
        raise HoldoutError(three_beats("at least one seed", found, "pass positive numbers"))
    keys = {"perturbation_key": perturbation_key, "context_key": context_key, "control": control}
    check_settings(
        options, holdout, of="holdout", taken=("adata", "heldout", "n_seeds", "seed", "progress", *keys)
    )
    for sizes in settings_of(options.get("vae")):
        check_vae_settings(sizes, options.get("training") or {})
    plan, refused = plan_of(adata, over, dict(where or {}), min_cells, keys)
    if not plan:
        found = "; ".join(f"{row['heldout']}: {row['reason']}" for row in refused) or "none"
        fix = "lower min_cells, or hold out something else (over=...)"
        raise HoldoutError(three_beats(f"something to hold out over {over!r}", found, fix))
    tasks = [(name, held, seed + k) for name, held in plan.items() for k in range(n_seeds)]
    work = partial(_one, n_pooled=n_pooled, options=options | keys)
    bar = partial(tqdm, total=len(tasks), desc="hold-outs", disable=not progress)
    with _runner(cluster, adata, len(tasks)) as run:
        made = sorted(bar(run(work, tasks)), key=lambda result: result["place"])
    tables = [result["table"] for result in made if "table" in result]
    refused += [
        {"heldout": r["heldout"], "seed": r["seed"], "reason": r["reason"]} for r in made if "reason" in r
    ]
    if not tables:
        reasons = "; ".join(f"{row['heldout']}: {row['reason']}" for row in refused)
        raise HoldoutError(three_beats("a hold-out that can be made", reasons, "change the hold-out"))
    return Holdouts(
        pd.concat(tables, ignore_index=True),
        pd.concat([result["choice"] for result in made if "choice" in result], ignore_index=True),
        pd.DataFrame(refused, columns=["heldout", "seed", "reason"]),
    )


def _one(adata, place: int, name: str, held: dict, seed: int, *, n_pooled: int, options: dict) -> dict:
    """One hold-out at one seed; a refusal becomes a reason, so that it does not sink the others."""
    labels = {"heldout": name, "seed": seed}
    try:
        result = holdout(adata, heldout=held, n_seeds=n_pooled, seed=seed, progress=False, **options)
    except CellopError as refusal:
        return labels | {"place": place, "reason": str(refusal)}
    table = result.table.assign(**labels)[[*labels, *result.table.columns]]
    return labels | {"place": place, "table": table, "choice": _choice(result).assign(**labels)}


def _choice(result) -> pd.DataFrame:
    """Mean energy distance of each candidate over the groups left out, the chosen one marked."""
    chosen = str(result.complexity)
    mean = pd.DataFrame({"complexity": [chosen], "e_distance": [np.nan]})
    if len(result.choice):
        mean = result.choice.groupby("complexity", sort=False)["e_distance"].mean().reset_index()
    return mean.assign(vae=sizes_in_words(result.sizes), chosen=mean["complexity"] == chosen)


@contextmanager
def _runner(cluster, adata, n_tasks: int) -> Iterator:
    """A function (work, tasks) -> results in any order, here or on Dask."""
    if cluster is None:
        yield lambda work, tasks: (work(adata, place, *task) for place, task in enumerate(tasks))
        return
    with _client(cluster, n_tasks) as client:
        shared = client.scatter(adata, broadcast=True, hash=False)

        def run(work, tasks):
            from distributed import as_completed

            futures = [client.submit(work, shared, k, *task, pure=False) for k, task in enumerate(tasks)]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                client.cancel(futures)

        yield run


@contextmanager
def _client(cluster, n_tasks: int) -> Iterator:
    """The caller's client; or one of our own, closed at the end, on a given cluster or on local workers."""
    require("distributed", "notebook", of="cluster=")
    from distributed import Client, LocalCluster

    if isinstance(cluster, Client):
        yield cluster
        return
    if not isinstance(cluster, int):
        with Client(cluster) as client:
            yield client
        return
    if cluster < 1:
        raise HoldoutError(three_beats("at least one worker", f"cluster={cluster}", "pass a positive number"))
    workers = {"n_workers": min(cluster, n_tasks), "threads_per_worker": 1, "processes": True}
    with LocalCluster(**workers, dashboard_address=None) as local, Client(local) as client:
        yield client
