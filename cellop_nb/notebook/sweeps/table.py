"""What a sweep found: one row per run, the effect of each parameter, and how sure the seeds make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from cellop_nb.errors import LabelError, did_you_mean, three_beats
from cellop_nb.notebook.sweeps import store
from cellop_nb.notebook.sweeps.plan import Run

HEAD, TAIL = ["run"], ["status", "seconds", "error", "notebook"]
_HIGH_IS_GOOD = ("pearson", "r2", "gain", "score", "accuracy", "auc", "correlation", "recall", "precision")
_MANY = 8  # values of a parameter beyond which it is taken as continuous


def collect(folder: Path, runs: Sequence[Run], notebook: str) -> pd.DataFrame:
    """One row per run, in the order of the plan.

    Parameters
    ----------
    folder
        Folder of the sweep.
    runs
        The planned runs.
    notebook
        Name of the notebook, without suffix.

    Returns
    -------
    DataFrame
        ``run`` (the folder), every parameter, every number of ``metrics.json`` (nested ones as ``a.b``; one named
        like a parameter as ``metric.a``), ``status`` (done, failed, missing), ``seconds``, ``error`` and
        ``notebook`` (the executed one, relative to `folder`).
    """
    rows = []
    for run in runs:
        key = run.key
        result = store.result_of(folder / key) or {"status": "missing", "metrics": {}}
        values = {name: _cell(value) for name, value in run.values.items()}
        metrics = {
            name if name not in values else f"metric.{name}": v for name, v in _numbers(result["metrics"])
        }
        file = f"{key}/{notebook}.ipynb"
        end = {"status": result["status"], "seconds": result.get("seconds", np.nan)}
        end |= {"error": result.get("error", ""), "notebook": file if (folder / file).is_file() else ""}
        rows.append({"run": key} | values | metrics | end)
    names = dict.fromkeys(name for row in rows for name in row if name not in HEAD + TAIL)
    return pd.DataFrame(rows, columns=[*HEAD, *names, *TAIL])


def _cell(value: Any) -> Any:
    """A parameter's value as a cell of a table: lists and None as text."""
    return ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else value


def _numbers(metrics: Mapping[str, Any], prefix: str = ""):
    """Names and values of the numbers; what a notebook repeats of its inputs is left out."""
    for name, value in metrics.items():
        if not prefix and name in ("parameters", "inputs"):
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, float(value)


def parameters_of(table: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Those of the parameters that took more than one value, ``seed`` last."""
    varied = [name for name in names if name in table and table[name].nunique(dropna=False) > 1]
    return sorted(varied, key=lambda name: name == "seed")


def metric_of(table: pd.DataFrame, names: Sequence[str], metric: str | None = None) -> str:
    """The number to compare: the named one, else the first that the notebook wrote.

    Raises
    ------
    LabelError
        When no run wrote such a number.
    """
    known = [name for name in table.columns if name not in (*HEAD, *names, *TAIL)]
    if metric is None and known:
        return known[0]
    if metric is None or metric not in known:
        fix = f"name one with --metric ({did_you_mean(metric or '', known)})"
        raise LabelError(three_beats("a number in the runs' metrics.json", repr(metric or "none"), fix))
    return metric


def direction_of(metric: str, best: str | None = None) -> str:
    """``"min"`` or ``"max"``: as given, else low is good unless the metric is named like a score."""
    return best or ("max" if any(word in metric.lower() for word in _HIGH_IS_GOOD) else "min")


def best_runs(table: pd.DataFrame, metric: str, best: str, *, n: int = 10) -> pd.DataFrame:
    """The `n` best finished runs."""
    done = table[table["status"] == "done"].dropna(subset=[metric])
    return done.sort_values(metric, ascending=best == "min", kind="stable").head(n)


def best_settings(table: pd.DataFrame, varied: Sequence[str], metric: str, best: str, *, n: int = 10):
    """The `n` best combinations of the parameters but the seed: mean, standard error and number of runs.

    One lucky seed must not decide which setting is taken.
    """
    others = [name for name in varied if name != "seed"]
    done = table[table["status"] == "done"].dropna(subset=[metric])
    if not others or done.empty:
        return pd.DataFrame(columns=[*others, "mean", "sem", "runs"])
    found = done.groupby(others, sort=False)[metric].agg(mean="mean", sem="sem", runs="size").reset_index()
    return found.sort_values("mean", ascending=best == "min", kind="stable").head(n)


def effects(table: pd.DataFrame, varied: Sequence[str], metric: str, *, level: float = 0.95) -> pd.DataFrame:
    r"""Effect of each value of each parameter on a metric, with the uncertainty over seeds.

    For a parameter p with value v, and seed s,

    .. math:: e_{p,s}(v) = \mathrm{mean}_{o}\big(y(v, o, s) - \mathrm{mean}_{v'} y(v', o, s)\big)

    over the settings o of the other parameters that were run for every value of p: differences inside one
    setting and seed, so that neither moves the comparison. The effect is the mean over seeds, its interval
    Student's t over them; with a single seed there is none.

    Parameters
    ----------
    table
        As :func:`collect` gives it.
    varied
        Parameters that vary; ``seed`` among them gives the uncertainty and is no effect itself.
    metric
        Column of `table`.

    Returns
    -------
    DataFrame
        ``parameter, value, mean, effect, low, high, seeds, runs``. Parameters without a complete comparison
        (random sampling) are left out: :func:`trends` serves them.
    """
    done = table[table["status"] == "done"].dropna(subset=[metric])
    done = done.assign(seed=done["seed"] if "seed" in varied else 0)
    parts = [_effect(done, name, varied, metric, level) for name in varied if name != "seed"]
    columns = ["parameter", "value", "mean", "effect", "low", "high", "seeds", "runs"]
    return pd.DataFrame([row for part in parts for row in part], columns=columns)


def _effect(done: pd.DataFrame, name: str, varied: Sequence[str], metric: str, level: float) -> list[dict]:
    block = [other for other in varied if other not in (name, "seed")] + ["seed"]
    if is_continuous(done[name]):
        return []
    wide = done.pivot_table(index=block, columns=name, values=metric, aggfunc="mean", sort=False).dropna()
    if wide.empty or wide.shape[1] < 2:
        return []
    wide = wide[sorted(wide.columns)]
    by_seed = wide.sub(wide.mean(axis=1), axis=0).groupby(level="seed").mean()
    n = len(by_seed)
    half = stats.t.ppf(0.5 + level / 2, n - 1) * by_seed.sem() if n > 1 else by_seed.mean() * np.nan
    mean = by_seed.mean()
    return [
        {"parameter": name, "value": value, "mean": wide[value].mean(), "effect": mean[value],
         "low": mean[value] - half[value], "high": mean[value] + half[value], "seeds": n, "runs": len(wide)}
        for value in wide.columns
    ]  # fmt: skip


def trends(
    table: pd.DataFrame, varied: Sequence[str], metric: str, *, n_boot: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Spearman correlation of each numeric parameter with the metric, and its bootstrap interval over runs.

    Returns
    -------
    DataFrame
        ``parameter, spearman, low, high`` (95 %), ``runs``.

    References
    ----------
    Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    done = table[table["status"] == "done"].dropna(subset=[metric])
    rng, rows = np.random.default_rng(seed), []
    for name in varied:
        if name == "seed" or not pd.api.types.is_numeric_dtype(done[name]) or len(done) < 5:
            continue
        x, y = done[name].to_numpy(float), done[metric].to_numpy(float)
        draws = [_spearman(x[chosen], y[chosen]) for chosen in rng.integers(len(x), size=(n_boot, len(x)))]
        low, high = map(float, np.nanquantile(draws, [0.025, 0.975]))
        rows.append(
            {"parameter": name, "spearman": _spearman(x, y), "low": low, "high": high, "runs": len(x)}
        )
    return pd.DataFrame(rows, columns=["parameter", "spearman", "low", "high", "runs"])


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    x, y = stats.rankdata(x), stats.rankdata(y)
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else np.nan


def is_continuous(values: pd.Series) -> bool:
    """Whether a parameter is drawn as a scale rather than as separate values."""
    return pd.api.types.is_float_dtype(values) and values.nunique() > _MANY
