"""Predictions, baselines, metrics and diagnostics as tidy tables and AnnData."""
