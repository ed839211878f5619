"""Ask for contexts whose perturbed cells were put aside, and compare: `python -m benchmarks.held_out FILE [options]`.

One context of Kang et al.'s screen: ``python -m benchmarks.held_out kang18_pbmc_ifnb.h5ad --context "CD14 Mono"``.
Null data: ``python -m benchmarks.held_out mcfaline23_glioma_subset.h5ad --verdicts`` fits once and counts what the
verdicts say of its groups.
The README's table: the same with ``--seeds 3 --flavor seurat --out docs/kang_types.csv`` and no context: each in turn.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd

import cellop_nb as co
from cellop_nb.analysis.baselines import BASELINES, Prediction, Target, Training
from cellop_nb.analysis.metrics import EvaluationSpace, e_distance, pearson_delta
from cellop_nb.commands.terminal import say

RIVALS = ("no change", "mean shift", "near mean shift", "linear")
MOST_CELLS = 500
FEWEST_CELLS = 17


def main(words: list[str] | None = None) -> int:
    """Fit without the perturbed cells of a context, predict them, and print energy distances beside the rivals'."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--context", help="one context (default: each with 17 cells a side in turn)")
    parser.add_argument("--perturbation", default="IFNb")
    parser.add_argument("--perturbation-key", default="perturbation")
    parser.add_argument("--context-key", default="cell_type")
    parser.add_argument("--control", default="control")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--flavor", default="pearson_residuals", choices=["pearson_residuals", "seurat"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", help="CSV file of the whole table")
    parser.add_argument(
        "--verdicts", action="store_true", help="hold nothing out; the verdict of every group"
    )
    args = parser.parse_args(words)
    whole = co.datasets.load(args.data)
    if args.verdicts:
        return _verdicts(args, whole)
    labels = whole.obs[[args.context_key, args.perturbation_key]].astype(str).set_axis(["c", "p"], axis=1)
    sizes = (
        labels.groupby(["c", "p"]).size().unstack(fill_value=0)[[args.control, args.perturbation]].min(axis=1)
    )
    contexts = [args.context] if args.context else sorted(sizes.index[sizes >= FEWEST_CELLS])
    rows = []
    for context in contexts:
        aside = ((labels["c"] == context) & (labels["p"] != args.control)).to_numpy()
        for seed in range(args.seeds):
            rows += _asked(args, whole, aside, context, seed, aloud=len(contexts) == 1)
    table = pd.DataFrame(rows)
    if args.out:
        table.round(4).to_csv(args.out, index=False)
    for metric in ("energy", "pearson", "cpu_seconds"):
        wide = table.pivot_table(index="method", columns="context", values=metric, sort=False)
        say(
            f"\n{metric}, mean of {args.seeds} seeds\n{wide.assign(mean=wide.mean(axis=1)).round(3).to_string()}"
        )
    return 0


def _verdicts(args, whole) -> int:
    co.setup(
        whole, perturbation_key=args.perturbation_key, context_key=args.context_key, control=args.control
    )
    model = co.CellOp(whole, n_genes=args.genes).fit(progress=False)
    pairs = model.effects[["context", "perturbation"]].itertuples(index=False, name=None)
    said = [model.verdict(*pair) for pair in pairs]
    say("\n".join(said))
    say(f"no effect to predict: {sum('no effect to predict' in one for one in said)} of {len(said)} groups")
    return 0


def _asked(args, whole, aside: np.ndarray, context: str, seed: int, *, aloud: bool) -> list[dict]:
    adata, real = whole[~aside].copy(), whole[aside].copy()
    start, asked = time.process_time(), (context, args.perturbation)
    co.setup(
        adata, perturbation_key=args.perturbation_key, context_key=args.context_key, control=args.control
    )
    genes = co.select_genes(adata, args.genes, flavor=args.flavor, min_cells=10, split=None)
    adata = adata[:, genes].copy()
    model = co.CellOp(adata, n_genes=None, seed=seed).fit(progress=False)
    cells = model.predict(context=context, perturbation=args.perturbation)
    spent = time.process_time() - start
    if aloud:
        say(f"{model.verdict(*asked)}\n{spent:.0f} CPU seconds\n")
        say(model.intervals(*asked).head(10).round(2).to_string(index=False))
    space = EvaluationSpace.fit(adata, genes=genes, seed=seed)
    training, rows = Training.of(adata, space), model.control_rows(context)
    counts = space.select(adata[rows])
    target = Target(*asked, space.transform(counts), counts, adata[rows], space)
    truth = space.transform(space.select(real, "X"))
    predictions = [BASELINES[name](training, target) for name in RIVALS]
    predictions.append(Prediction.of_counts("CellOp", space.select(cells, "X"), space))
    chance = np.random.default_rng(seed)

    def points(values: np.ndarray) -> np.ndarray:
        return space.project(values[chance.permutation(len(values))[:MOST_CELLS]])

    return [
        {
            "context": context,
            "seed": seed,
            "method": prediction.method,
            "energy": e_distance(points(prediction.cells), points(truth)),
            "pearson": pearson_delta(prediction.mean, truth.mean(0), target.mean),
            "cpu_seconds": spent if prediction.method == "CellOp" else np.nan,
        }
        for prediction in predictions
    ]


if __name__ == "__main__":
    raise SystemExit(main())
