"""Leave each (cell type, donor) out and foresee it: `python -m benchmarks.factors kang18_pbmc_ifnb.h5ad [--out CSV]`.

Mean effects of the variable genes alone, no VAE: half a minute of CPU. Beside the plan with factors stand that of joined
labels, and what the type alone, or the donor alone, says: the mean effect over its other pairs, weighed by their cells.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd

import cellop_nb as co
from cellop_nb.analysis.means import Means
from cellop_nb.analysis.metrics import pearson_delta
from cellop_nb.analysis.plan import Measured, factors, plan
from cellop_nb.analysis.predict import modelled_counts
from cellop_nb.commands.terminal import say

FEWEST_CELLS = 10


def main(words: list[str] | None = None) -> int:
    """Print and write a row per pair and method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--factors", nargs="+", default=["cell_type", "donor"])
    parser.add_argument("--perturbation", default="IFNb")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--out", help="CSV file of the whole table")
    args = parser.parse_args(words)
    adata = co.datasets.load(args.data)
    sizes = adata.obs.groupby([*args.factors, "perturbation"], observed=True)["perturbation"].transform(
        "size"
    )
    pairs = adata.obs[args.factors].astype(str).agg(" | ".join, axis=1)
    enough = (sizes >= FEWEST_CELLS).groupby(pairs).transform("all") & (
        adata.obs["perturbation"].astype(str).groupby(pairs).transform("nunique") == 2
    )
    adata = adata[enough.to_numpy()].copy()
    co.setup(adata, perturbation_key="perturbation", context_key=args.factors, control="control")
    genes = co.select_genes(adata, args.genes, split=None, min_cells=10)
    groups = co.Groups(adata)
    means = Means.of(modelled_counts(adata, genes, groups.keys), groups)
    cells = dict(zip(groups.pairs, map(len, groups), strict=True))
    rows = []
    for context in groups.contexts_of(args.perturbation):
        measured = means.of_perturbation(args.perturbation, without=context)
        target = means.control[means.contexts.index(context)]
        level = context.split(" | ")
        weights = np.array([cells[name, args.perturbation] for name in measured.contexts], dtype=float)
        ways = {
            "no change": np.zeros_like(target),
            "mean shift": measured.change.mean(0),
            **{f"{key} alone": _alone(measured, weights, k, level[k]) for k, key in enumerate(args.factors)},
            "factors alone": factors(measured.levels, measured.change, level, measured.noise.sum(1)).change,
            "plan, joined labels": plan(_joined(measured), target, context=context).change,
            "plan, factors": plan(measured, target, context=context).change,
        }
        truth, noise = means.change_of(context, args.perturbation)
        size = float(truth @ truth - noise.sum())
        for method, said in ways.items():
            residual = truth - said
            row = {"context": context, "cells": cells[context, args.perturbation], "method": method}
            row["left"] = float(residual @ residual - noise.sum()) / size
            rows.append(row | {"pearson": pearson_delta(said, truth, np.zeros_like(said))})
    table = pd.DataFrame(rows)
    if args.out:
        table.round(4).to_csv(args.out, index=False)
    for metric in ("left", "pearson"):
        wide = table.pivot_table(index="context", columns="method", values=metric, sort=False)
        say(f"\n{metric}\n{pd.concat([wide, wide.mean().to_frame('mean').T]).round(3).to_string()}")
    return 0


def _alone(measured: Measured, cells: np.ndarray, factor: int, level: str) -> np.ndarray:
    here = np.array([levels[factor] == level for levels in measured.levels])
    return (
        np.average(measured.change[here], axis=0, weights=cells[here])
        if here.any()
        else measured.change.mean(0)
    )


def _joined(measured: Measured) -> Measured:
    return Measured(measured.contexts, measured.control, measured.change, measured.noise)


if __name__ == "__main__":
    raise SystemExit(main())
