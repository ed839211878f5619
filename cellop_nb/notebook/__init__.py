"""Live plots, controls, figures and batch runs for notebooks."""
