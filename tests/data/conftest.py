"""A small screen for the tests of this folder."""

from __future__ import annotations

import pytest

from cellop_nb.data.synthetic import synthetic


@pytest.fixture(scope="session")
def small_screen():
    """2 contexts, 3 perturbations and a pair, 40 cells a group; copy it before writing to it."""
    return synthetic(n_contexts=2, n_perturbations=3, combinations=1, n_cells=40, n_genes=60, seed=1)


@pytest.fixture
def screen(small_screen):
    """The small screen, to write to."""
    return small_screen.copy()
