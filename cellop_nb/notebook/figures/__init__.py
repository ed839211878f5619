"""Figures of a sweep, and of a training."""

from __future__ import annotations

from cellop_nb.notebook.figures.sweep import parallel_coordinates, sweep_effects, sweep_map
from cellop_nb.notebook.figures.training import training_curves

__all__ = ["parallel_coordinates", "sweep_effects", "sweep_map", "training_curves"]
