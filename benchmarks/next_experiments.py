"""Which perturbation to measure next, in hindsight: `python -m benchmarks.next_experiments norman19_k562_subset.h5ad`.

Some of Norman's singles are taken as measured, more are added by each rule, and the rest are foreseen. Share of squared
effect left, mean over starts with its 95 % interval: of perturbations that no rule chose, and of all that were not
measured at the start (those that a rule measured count as known). Descriptors are effects in the other half of the cells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import cellop_nb as co
from benchmarks.unmeasured import LEAST_SHARE, _half, _screen
from cellop_nb.analysis.means import Means
from cellop_nb.analysis.plan import Measured
from cellop_nb.analysis.predict import modelled_counts
from cellop_nb.analysis.uncertainty import choose
from cellop_nb.analysis.unmeasured import EffectMap
from cellop_nb.commands.terminal import say


def main(words: list[str] | None = None) -> int:
    """Print a row per rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--start", type=int, default=5)
    parser.add_argument("--add", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=60)
    args = parser.parse_args(words)
    adata = _screen(args.data)
    half = _half(adata)
    table, adata = co.features.from_screen(adata[half].copy(), n_components=5), adata[~half].copy()
    groups = co.Groups(adata)
    seen = np.asarray((adata.X > 0).mean(0)).ravel() >= LEAST_SHARE
    means = Means.of(modelled_counts(adata, list(adata.var_names[seen]), groups.keys), groups)
    names = [p for p in groups.perturbations if "+" not in p]
    x = table.loc[names].to_numpy()
    change, noise = (np.stack(part) for part in zip(*(means.near("k562", p) for p in names), strict=True))
    rows = [_once(args, x, change, noise, seed) for seed in range(args.repeats)]
    result = pd.DataFrame(rows)
    result.columns = pd.MultiIndex.from_tuples(result.columns)
    said = pd.DataFrame({"left": result.mean(), "+-": 1.96 * result.sem()})
    for of in ("of never chosen", "of all"):
        gap = result.xs(of, axis=1, level=1).sub(result["expected reduction", of], axis=0)
        for name in gap:
            said.loc[(name, of), ["less expected reduction", "+- of it"]] = (
                gap[name].mean(),
                1.96 * gap[name].sem(),
            )
    say(said.round(3).to_string())
    return 0


def _once(args, x, change, noise, seed: int) -> dict[tuple[str, str], float]:
    chance = np.random.default_rng(seed)
    order = chance.permutation(len(x))
    start, rest = order[: args.start], order[args.start :]
    variance = np.square(change[start] - change[start].mean(0)).sum(1).mean()
    chosen = choose([x], start, rest, rest, args.add, noise[start].sum(1) / variance)[0]
    effects = EffectMap(Measured(tuple(map(str, start)), x[start], change[start], noise[start]))
    said = [
        effects.plan(x[k], genes=range(change.shape[1]), context="", perturbation=str(k)).change for k in rest
    ]
    strongest = rest[np.argsort([-np.linalg.norm(row) for row in said], kind="stable")[: args.add]]
    rules = {
        "none": [],
        "expected reduction": chosen,
        "random": rest[: args.add],
        "strongest foreseen": strongest,
    }
    never = [k for k in rest if not any(k in more for more in rules.values())]
    row = {}
    for name, more in rules.items():
        measured = [*start, *more]
        for of, targets in (("of never chosen", never), ("of all", rest)):
            row[name, of] = _left(x, change, noise, measured, list(targets))
    return row


def _left(x, change, noise, measured: list[int], targets: list[int]) -> float:
    """Share of the squared effects of the targets that is left; nothing is left of measured ones."""
    effects = EffectMap(Measured(tuple(map(str, measured)), x[measured], change[measured], noise[measured]))
    others = [k for k in targets if k not in measured]
    genes = range(change.shape[1])
    residuals = [
        change[k] - effects.plan(x[k], genes=genes, context="", perturbation="").change for k in others
    ]
    size = np.square(change[targets]).sum() - noise[targets].sum()
    return float((np.square(residuals).sum() - noise[others].sum()) / size)


if __name__ == "__main__":
    raise SystemExit(main())
