"""Counts that stay on a device: gathered there, they are those of the matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cellop_nb.data.counts import CountLoader, CountMatrix, ResidentCounts, resident


def matrix(cells=40, genes=13, seed=0) -> CountMatrix:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 1.0, (cells, 1)), (cells, genes))
    counts[3] = 0
    return CountMatrix(sparse.csr_matrix(counts), covariates={"donor": rng.integers(0, 3, cells)})


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 39), min_size=1, max_size=40, unique=True))
def test_the_gathered_cells_are_those_of_the_matrix(rows):
    source = matrix()
    rows = np.array(rows)
    batch, expected = ResidentCounts(source, "cpu").batch(rows), source.batch(rows)
    padded, n, nonzeros = batch.padded(), len(rows), len(expected.values)
    assert len(batch) == n and padded.shape == (n + 1, source.shape[1])
    assert len(padded.values) == batch.room >= nonzeros
    for name in ("columns", "values"):
        assert torch.equal(getattr(padded, name)[:nonzeros], getattr(expected, name))
    for name in ("library", "index"):
        assert torch.equal(getattr(padded, name)[:n], getattr(expected, name))
    assert torch.equal(padded.indptr[: n + 1], expected.indptr) and padded.indptr[-1] == batch.room
    assert torch.equal(padded.covariates["donor"][:n], expected.covariates["donor"])
    assert torch.equal(padded.x[:n], expected.x)
    assert torch.equal(batch.whole().x, expected.x)


def test_batches_of_one_size_have_one_shape_unless_they_are_fuller_than_any_random_one():
    source = matrix(cells=5000, genes=60)
    held = ResidentCounts(source, "cpu")
    rooms = {batch.room for batch in CountLoader(held, batch_size=100)}
    fullest = np.argsort(-np.diff(source.csr.indptr))[:100]
    assert len(rooms) == 1
    assert held.batch(fullest).room > max(rooms)
    assert held.batch(fullest).padded().x[:100].sum() == source.csr[fullest].sum()


def test_a_bad_count_of_another_cell_does_not_fill_the_room():
    held = ResidentCounts(matrix(), "cpu")
    held.values[0] = torch.nan  # of the first cell
    assert held.batch(np.arange(10, 20)).padded().values.isfinite().all()
    assert not held.batch(np.arange(10)).padded().values.isfinite().all()


@pytest.mark.parametrize(("free", "stays"), [(1e9, True), (1e3, False)])
def test_counts_stay_on_a_gpu_that_has_the_memory(free, stays, monkeypatch):
    source = matrix()
    made = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr("cellop_nb.data.counts.ResidentCounts", lambda *given: made.append(given) or "held")
    assert resident(source, torch.device("cuda")) == ("held" if stays else source)
    assert len(made) == stays
    assert resident(source, torch.device("cpu")) is source
