"""Make the README's figure: `python docs/readme_figure.py` writes docs/images/held_out.png.

The perturbed cells of one context of the embedded synthetic screen are held out, predicted from its control cells, and
compared with the real cells: the clouds, the change of every gene, and the energy distances of the methods.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import cellop_nb as co
from cellop_nb.notebook import style

CONTEXT, PERTURBATION = "type C", "drug 1"
METHODS = ["no change", "mean shift", "near mean shift", "linear", "latent shift", "CellOp"]
BLUE, ORANGE, GREEN = style.BLUE, style.ORANGE, style.GREEN


def held_out():
    """The hold-out of one context; about half a minute on one core."""
    adata = co.datasets.load("synthetic_screen")
    model = co.CellOp(adata, n_genes=None)
    return co.holdout(model, only=[CONTEXT], metrics=["e_distance"])


def cells_of(result) -> dict[str, np.ndarray]:
    """Control, predicted and real cells of the group, (cell, gene) log1p-CP10k."""
    (fit,) = result.fits
    space, predicted, real = fit.space, result.predictions, fit.real
    parts = {
        "control": fit.control[fit.control.obs["cell_type"] == CONTEXT],
        "predicted": predicted[predicted.obs["perturbation"] == PERTURBATION],
        "real": real[real.obs["perturbation"] == PERTURBATION],
    }
    return {name: space.transform(space.select(part, "X")) for name, part in parts.items()}


def clouds(ax, result) -> None:
    """Control, predicted and real cells, in the two components (fitted on training cells) of the largest change."""
    parts = {name: result.fits[0].space.project(cells) for name, cells in cells_of(result).items()}
    change = np.abs(parts["real"].mean(0) - parts["control"].mean(0))
    first, second = np.argsort(-change)[:2]
    for (name, cells), colour, marker in zip(parts.items(), (BLUE, ORANGE, GREEN), "so^", strict=True):
        points = cells[:, [first, second]]
        shown = points[np.random.default_rng(0).permutation(len(points))[:150]]
        ax.scatter(*shown.T, s=7, c=colour, marker=marker, alpha=0.45, linewidths=0)
        ax.scatter(*points.mean(0), s=60, c=colour, marker=marker, edgecolors="black", label=name, zorder=3)
    ax.set(xlabel=f"PC {first + 1}", ylabel=f"PC {second + 1}", title=f"{CONTEXT}, {PERTURBATION}: held out")
    ax.legend(frameon=False, fontsize=8)


def changes(ax, result) -> None:
    """Predicted against real change of each gene's mean log expression."""
    control, predicted, real = (cells.mean(0) for cells in cells_of(result).values())
    ax.axline((0, 0), slope=1, color="0.6", linewidth=1)
    ax.scatter(real - control, predicted - control, s=7, c=ORANGE, linewidths=0)
    ends = min((real - control).min(), -1) - 0.1, (real - control).max() + 0.1
    ax.set(
        xlabel="real change, log1p CP10k", ylabel="predicted change", title="every gene", xlim=ends, ylim=ends
    )


def distances(ax, result) -> None:
    """Energy distance of each method's cells to the real cells, and the noise floor."""
    rows = result.scores[result.scores["perturbation"] == PERTURBATION]
    table = rows[rows["metric"] == "e_distance"].set_index("method")["value"]
    values = [table[method] for method in METHODS]
    colours = ["0.7"] * (len(values) - 1) + [ORANGE]
    bars = ax.barh(METHODS, values, color=colours)
    ax.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    floor = table[[name for name in table.index if "floor" in name][0]]
    ax.axvline(floor, color="black", linewidth=1, linestyle=":", label=f"noise floor {floor:.2f}")
    ax.set(xlabel="energy distance to the real cells", title="smaller is better", xlim=(0, 1.2 * max(values)))
    ax.invert_yaxis()
    ax.legend(frameon=False, fontsize=8, loc="lower right")


def main() -> None:
    """Draw the three panels and write the picture."""
    result = held_out()
    fig, axes = style.canvas(1, 3, width=10.5, height=3.3)
    for draw, ax in zip((clouds, changes, distances), axes, strict=True):
        draw(ax, result)
    style.finish(fig, save=Path(__file__).parent / "images" / "held_out.png")


if __name__ == "__main__":
    main()
