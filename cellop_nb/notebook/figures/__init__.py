"""Figures of a sweep."""

from __future__ import annotations

from cellop_nb.notebook.figures.sweep import parallel_coordinates, sweep_effects, sweep_map

__all__ = ["parallel_coordinates", "sweep_effects", "sweep_map"]
