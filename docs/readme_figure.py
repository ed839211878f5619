"""Make the README's figure: `python docs/readme_figure.py kang18_pbmc_ifnb.h5ad` writes docs/images/held_out.png.

The treated cells of one donor are held out and predicted from the donor's untreated cells. The types of the cells are not
among the keys: the model does not know them. They only colour the picture.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import cellop_nb as co

DONOR, TYPE = "101", "cell_type"
METRICS = ["e_distance", "e_distance_centred"]


def held_out(path: str):
    """The hold-out of one donor of mixed types; 44 seconds on one core."""
    adata = co.datasets.load(path)
    co.setup(adata, perturbation_key="perturbation", context_key="donor", control="control")
    model = co.CellOp(adata, n_genes=1000)
    return co.holdout(model, over="donor", only=[DONOR], metrics=METRICS, progress=False)


def clouds(result) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Real, shifted and predicted cells in the components that the distances are measured in, and what each cell is."""
    (fit,) = result.fits
    parts = {"real": fit.real, "control": fit.control, "predicted": result.predictions}
    points = {
        name: fit.space.project(fit.space.transform(fit.space.select(p, "X"))) for name, p in parts.items()
    }
    points["control"] = points["control"] + points["real"].mean(0) - points["control"].mean(0)
    return points, {name: part.obs[TYPE].to_numpy() for name, part in parts.items()}


def main(path: str) -> None:
    """Draw the three clouds and write the picture."""
    result = held_out(path)
    points, kinds = clouds(result)
    shape = result.summary("e_distance_centred").iloc[-1]
    titles = {
        "real": "real treated cells",
        "control": "untreated, right mean",
        "predicted": "predicted cells",
    }
    notes = {
        titles["control"]: f"centred energy distance {shape['mean shift']:.2f}",
        titles["predicted"]: f"centred energy distance {round(shape['CellOp'], 2) + 0:.2f}",
    }
    co.pl.shapes(
        {titles[name]: cells[:, :2] for name, cells in points.items()},
        {titles[name]: labels for name, labels in kinds.items()},
        notes=notes,
        save=Path(__file__).parent / "images" / "held_out.png",
    )
    for metric in METRICS:
        sys.stdout.write(f"{metric}\n{result.summary(metric).iloc[-1].round(3).to_string()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
