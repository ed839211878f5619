"""The catalogue of bad inputs: what a person may do wrong, each as a few lines that do it.

`test_errors.py` runs every case and demands the three beats and a clean folder; `python -m tests.bad_inputs PAGE`
writes a page of the docs, the messages as a person sees them.
"""

from importlib import import_module

from .cases import CASES, Place
from .page import message, page

__all__ = ["CASES", "Place", "message", "page"]

for area in (
    "data",
    "models",
    "files",
    "notebooks",
    "sweeps",
    "holdouts",
    "machine",
):  # the order of the page
    import_module(f".{area}", __package__)
