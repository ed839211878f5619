"""Figures of the notebooks: tidy tables and arrays in, `matplotlib.figure.Figure` out.

No pyplot, no global settings. A figure shows itself at the end of a cell; `show(fig, path)` also writes it.
Categories differ in colour (Okabe and Ito) and in marker, line or hatch; ranges use cividis.

References
----------
Okabe and Ito (2008), Color universal design.
"""

from __future__ import annotations

from cellop_nb.notebook.figures.data import group_counts, library_sizes, noise_floor
from cellop_nb.notebook.figures.genes import response_genes
from cellop_nb.notebook.figures.latent import embedding, predictive_checks, transport
from cellop_nb.notebook.figures.operators import gradient_map, planted_vs_learned, response_axes, spectra
from cellop_nb.notebook.figures.results import coverage, energy_bars, error_budget, predicted_vs_true
from cellop_nb.notebook.figures.similarity import condition_similarity
from cellop_nb.notebook.figures.style import (
    DIVERGING,
    OKABE_ITO,
    RANGE,
    canvas,
    label,
    legend,
    png,
    safe,
    show,
)
from cellop_nb.notebook.figures.sweep import parallel_coordinates, sweep_effects, sweep_map
from cellop_nb.notebook.figures.training import training_curves
from cellop_nb.notebook.figures.virtual import strength_curves

__all__ = [
    "DIVERGING",
    "OKABE_ITO",
    "RANGE",
    "canvas",
    "condition_similarity",
    "coverage",
    "embedding",
    "energy_bars",
    "error_budget",
    "gradient_map",
    "group_counts",
    "label",
    "legend",
    "library_sizes",
    "noise_floor",
    "parallel_coordinates",
    "planted_vs_learned",
    "png",
    "predicted_vs_true",
    "predictive_checks",
    "response_axes",
    "response_genes",
    "safe",
    "show",
    "spectra",
    "strength_curves",
    "sweep_effects",
    "sweep_map",
    "training_curves",
    "transport",
]
