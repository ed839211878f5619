"""The evaluation space: components of training cells alone, in their genes' order."""

from __future__ import annotations

import numpy as np
import pytest

from cellop_nb.analysis.metrics import EvaluationSpace, log1p_cp10k
from cellop_nb.errors import DataError, LabelError

from .screens import screen


def test_log1p_cp10k_matches_scanpy_and_leaves_empty_cells_at_zero():
    import scanpy as sc

    data = screen()
    levels = log1p_cp10k(data.X)
    sc.pp.normalize_total(data, target_sum=1e4)
    sc.pp.log1p(data)
    np.testing.assert_allclose(levels.toarray(), data.X.toarray(), rtol=1e-5)
    assert (log1p_cp10k(np.zeros((2, 3))) == 0).all()


def test_components_come_from_training_cells_only_and_keep_the_gene_order():
    data = screen()
    training = data[data.obs["cell_type"] != "T"]
    genes = list(data.var_names[::-1][:15])
    space = EvaluationSpace.fit(training, genes=genes, n_components=5)
    cells = space.transform(space.select(training))
    np.testing.assert_allclose(cells, log1p_cp10k(training[:, genes].X.toarray()), rtol=1e-6)
    points = space.project(cells)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-5)
    values, vectors = np.linalg.eigh(np.cov(cells.T.astype(float)))
    np.testing.assert_allclose(np.abs(space.components @ vectors[:, ::-1][:, :5]), np.eye(5), atol=1e-4)
    np.testing.assert_allclose(points.var(axis=0, ddof=1), values[::-1][:5], rtol=1e-4)


def test_space_refuses_other_genes():
    data = screen()
    space = EvaluationSpace.fit(data)
    with pytest.raises(LabelError, match="1 missing, first .*did you mean"):
        space.select(data[:, :-1])
    with pytest.raises(DataError, match="counts of 30 genes"):
        space.transform(data.X[:, :3])
    with pytest.raises(DataError, match="at least 3 training cells"):
        EvaluationSpace.fit(data[:2])
