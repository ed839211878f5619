"""Ask for a context whose perturbed cells were put aside, and compare: `python -m benchmarks.held_out FILE [options]`.

With Kang et al.'s interferon screen: ``python -m benchmarks.held_out kang18_pbmc_ifnb.h5ad --context "CD14 Mono"``.
"""

from __future__ import annotations

import argparse
import time

import cellop_nb as co
from cellop_nb.analysis.baselines import BASELINES, Prediction, Target, Training
from cellop_nb.analysis.metrics import EvaluationSpace, e_distance
from cellop_nb.commands.terminal import say

RIVALS = ("no change", "mean shift", "near mean shift", "linear")


def main(words: list[str] | None = None) -> int:
    """Fit without the perturbed cells of one context, predict them, and print energy distances beside the rivals'."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--context", default="CD14 Mono")
    parser.add_argument("--perturbation", default="IFNb")
    parser.add_argument("--perturbation-key", default="perturbation")
    parser.add_argument("--context-key", default="cell_type")
    parser.add_argument("--control", default="control")
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    asked = args.context, args.perturbation

    whole = co.datasets.load(args.data)
    here = (whole.obs[args.context_key] == args.context) & (whole.obs[args.perturbation_key] != args.control)
    adata, aside = whole[~here].copy(), whole[here].copy()
    start = time.process_time()
    co.setup(
        adata, perturbation_key=args.perturbation_key, context_key=args.context_key, control=args.control
    )
    model = co.CellOp(adata, n_genes=args.genes, seed=args.seed)
    model.fit(progress=False)
    cells = model.predict(context=args.context, perturbation=args.perturbation)
    say(f"{model.verdict(*asked)}\n{time.process_time() - start:.0f} CPU seconds\n")
    say(model.intervals(*asked).head(10).round(2).to_string(index=False))
    say(
        "\nenergy distance to the cells put aside (Euclidean, U-statistic, 20 components of the training cells):"
    )
    space = EvaluationSpace.fit(adata, genes=model.genes, seed=args.seed)
    real = space.project(space.transform(space.select(aside, "X" if model.keys.layer is None else None)))
    for name, predicted in _predictions(model, adata, cells, space, asked):
        points = space.project(predicted.cells)
        say(f"{name:>16} {e_distance(points[:500], real[:500]):6.2f}")
    return 0


def _predictions(model: co.CellOp, adata, cells, space: EvaluationSpace, asked: tuple[str, str]):
    training, rows = Training.of(adata, space), model.control_rows(asked[0])
    counts = space.select(adata[rows])
    target = Target(*asked, space.transform(counts), counts, adata[rows], space)
    for name in RIVALS:
        yield name, BASELINES[name](training, target)
    yield "CellOp", Prediction.of_counts("CellOp", space.select(cells, "X"), space)


if __name__ == "__main__":
    raise SystemExit(main())
