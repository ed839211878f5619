"""Leave each perturbation out, foresee it from descriptors, and compare: `python -m benchmarks.unmeasured DATA`.

DATA is the folder of both subsets; ``--out docs/unmeasured.csv`` keeps the table. Mean effects alone, no VAE: 20 seconds
of CPU. "half of the cells" describes perturbations by what they did to other cells: the best descriptors there can be.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import cellop_nb as co
from cellop_nb.analysis.baselines import linear_map
from cellop_nb.analysis.means import Means
from cellop_nb.analysis.metrics import Undefined, pearson_delta
from cellop_nb.analysis.plan import Measured
from cellop_nb.analysis.predict import modelled_counts
from cellop_nb.analysis.unmeasured import EffectMap
from cellop_nb.commands.terminal import say

FILES = {"norman": "norman19_k562_subset.h5ad", "mcfaline": "mcfaline23_glioma_subset.h5ad"}
GENE_SETS = Path(__file__).with_name("gene_families.gmt")
LEAST_SHARE = 0.01


def main(words: list[str] | None = None) -> int:
    """Print and write a row per descriptor, question and method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", help="CSV file of the whole table")
    args = parser.parse_args(words)
    screens = {name: _screen(args.data / file) for name, file in FILES.items()}
    rows = []
    for name, adata in screens.items():
        half = _half(adata)
        descriptors = {
            "gene families": co.features.from_gene_sets(GENE_SETS),
            "other screen": co.features.from_screen(
                next(a for n, a in screens.items() if n != name), n_components=5
            ),
            "random": _random(adata),
            "half of the cells": co.features.from_screen(adata[half].copy(), n_components=5),
        }
        for source, table in descriptors.items():
            seen = adata[~half].copy() if source == "half of the cells" else adata
            rows += [{"screen": name, "descriptors": source} | row for row in _left_out(seen, table)]
    table = pd.DataFrame(rows)
    if args.out:
        table.round(4).to_csv(args.out, index=False)
    for metric in ("pearson_control", "pearson_perturbed", "left"):
        wide = table.pivot_table(
            index=["screen", "descriptors", "kind"], columns="method", values=metric, sort=False
        )
        sizes = table.groupby(["screen", "descriptors", "kind"], sort=False)["question"].nunique()
        say(f"\n{metric}, mean over questions\n{wide.assign(questions=sizes).round(2).to_string()}")
    return 0


def _screen(path: Path):
    adata = co.datasets.load(path)
    adata.obs["total_counts"] = adata.obs["n_counts_total"]
    co.setup(adata, perturbation_key="perturbation", context_key="cell_type", control="control")
    return adata


def _half(adata) -> np.ndarray:
    """(cell,) every other cell of each group."""
    return (adata.obs.groupby(["cell_type", "perturbation"], observed=True).cumcount() % 2 == 0).to_numpy()


def _random(adata) -> pd.DataFrame:
    names = sorted({part for label in adata.obs["perturbation"].unique() for part in label.split("+")})
    return pd.DataFrame(np.random.default_rng(0).normal(size=(len(names), 5)), index=names)


def _left_out(adata, table: pd.DataFrame):
    """Singles that were left out; then doubles of two measured singles, one of which was left out with its doubles."""
    groups = co.Groups(adata)
    seen = np.asarray((adata.X > 0).mean(0)).ravel() >= LEAST_SHARE
    means = Means.of(modelled_counts(adata, list(adata.var_names[seen]), groups.keys), groups)
    doubles = [p for p in groups.perturbations if len(groups.parts(p)) == 2]
    singles = [p for p in groups.perturbations if p in table.index and "+" not in p]
    for context in groups.contexts:
        control = means.control[means.contexts.index(context)]
        effect = {p: means.near(context, p) for p in groups.perturbations}
        for name in singles:
            rest = [p for p in singles if p != name]
            said = _foreseen(table, effect, rest, name)
            others = np.mean([effect[p][0] for p in effect if name not in groups.parts(p)], axis=0)
            ways = {
                "no change": np.zeros_like(control),
                "mean of perturbed": said.pop("mean of perturbed"),
                **said,
            }
            yield from _scores(context, "single", name, effect[name], ways, control, others)
            for double in (p for p in doubles if name in groups.parts(p)):
                partner = next(p for p in groups.parts(double) if p != name)
                with_partner = {way: change + effect[partner][0] for way, change in ways.items()}
                with_partner["no change"] = np.zeros_like(control)
                with_partner["additive, both measured"] = effect[name][0] + effect[partner][0]
                labels = context, "double, one gene never measured", f"{double} without {name}"
                yield from _scores(*labels, effect[double], with_partner, control, others)


def _foreseen(table, effect, rest: list[str], name: str) -> dict[str, np.ndarray]:
    x = table.loc[rest].to_numpy(dtype=float)
    change, noise = (np.stack(part) for part in zip(*(effect[p] for p in rest), strict=True))
    plan = EffectMap(Measured(tuple(rest), x, change, noise)).plan(
        table.loc[name].to_numpy(dtype=float), genes=range(change.shape[1]), context="", perturbation=name
    )
    linear = linear_map(change.T, x, table.loc[name].to_numpy(dtype=float))
    return {"mean of perturbed": change.mean(0), "linear features": linear, "CellOp's map": plan.change}


def _scores(context, kind, question, truth, ways, control, others):
    """A row per method: PearsonDelta against the control and against the mean of perturbed, share of the effect left."""
    change, noise = truth
    size = max(float(change @ change - noise.sum()), float(noise.sum()))
    for method, said in ways.items():
        row = {"context": context, "kind": kind, "question": question, "method": method}
        for metric, reference in (("pearson_control", np.zeros_like(said)), ("pearson_perturbed", others)):
            try:
                row[metric] = pearson_delta(said, change, reference)
            except Undefined:
                row[metric] = np.nan
        residual = change - said
        yield row | {"left": float(residual @ residual - noise.sum()) / size}


if __name__ == "__main__":
    raise SystemExit(main())
