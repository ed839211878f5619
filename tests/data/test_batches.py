"""Minibatches hold exactly the counts of their rows, each row once."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cellop_nb.data.contract import Keys
from cellop_nb.data.counts import (
    CountLoader,
    CountMatrix,
    category_codes,
    count_matrix,
    covariate_categories,
)
from cellop_nb.errors import DataError, LabelError


def random_counts(n_cells: int, n_genes: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(3, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 17), st.integers(0, 10**6), st.booleans())
def test_each_row_comes_once_and_holds_its_counts(n_cells, n_genes, batch_size, seed, shuffle):
    x = random_counts(n_cells, n_genes, seed)
    generator = torch.Generator().manual_seed(seed)
    matrix = CountMatrix(sparse.csr_matrix(x), covariates={"donor": np.arange(n_cells)})
    loader = CountLoader(matrix, batch_size=batch_size, shuffle=shuffle, generator=generator)
    batches = list(loader)
    assert len(batches) == len(loader)
    rows = torch.cat([batch.index for batch in batches]).numpy()
    np.testing.assert_array_equal(np.sort(rows), np.arange(n_cells))
    for batch in batches:
        expected = x[batch.index.numpy()]
        np.testing.assert_array_equal(batch.x.numpy(), expected)
        np.testing.assert_array_equal(batch.library.numpy(), np.maximum(expected.sum(1), 1))
        np.testing.assert_array_equal(batch.covariates["donor"].numpy(), batch.index.numpy())
        parts = (batch.values.numpy(), batch.columns.numpy(), batch.indptr.numpy())
        np.testing.assert_array_equal(sparse.csr_matrix(parts, shape=expected.shape).toarray(), expected)
        assert torch.equal(batch.x.reshape(-1)[batch.counts.flat], batch.values)
        assert (batch.values > 0).all()


@pytest.mark.parametrize("store", [np.asarray, sparse.csr_matrix, sparse.csc_matrix, sparse.coo_matrix])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16])
def test_any_storage_gives_the_same_batch(store, dtype):
    x = random_counts(9, 5, 0)
    batch = CountMatrix(store(x.astype(dtype))).batch(np.array([8, 0, 3]))
    np.testing.assert_array_equal(batch.x.numpy(), x[[8, 0, 3]])
    assert batch.x.dtype == torch.float32


def test_repeated_and_zero_entries_are_summed_and_dropped():
    # gene 1 of cell 0 is stored as 2 + 3, gene 0 of cell 1 as an explicit zero
    csr = sparse.csr_matrix(
        (np.array([2, 3, 0], dtype=np.float32), np.array([1, 1, 0]), np.array([0, 2, 3])), shape=(2, 3)
    )
    batch = CountMatrix(csr).batch(np.array([0, 1]))
    assert batch.x.tolist() == [[0, 5, 0], [0, 0, 0]]
    assert batch.values.tolist() == [5]
    assert csr.nnz == 3, "the caller's matrix changed"


def test_order_depends_on_the_generator_alone():
    matrix = CountMatrix(random_counts(50, 4, 0))

    def order(seed):
        loader = CountLoader(matrix, batch_size=8, generator=torch.Generator().manual_seed(seed))
        return [torch.cat([b.index for b in loader]).tolist() for _ in range(2)]

    first, second = order(0)
    assert order(0) == [first, second]
    assert first != second
    assert order(1)[0] != first


def test_a_loader_visits_the_chosen_rows():
    matrix = CountMatrix(random_counts(20, 4, 0))
    loader = CountLoader(matrix, np.arange(0, 20, 2), batch_size=4, shuffle=False)
    assert [len(batch) for batch in loader] == [4, 4, 2] and len(loader) == 3
    assert torch.cat([batch.index for batch in loader]).tolist() == list(range(0, 20, 2))
    with pytest.raises(DataError, match="batch_size"):
        CountLoader(matrix, batch_size=0)


def test_batches_of_a_loader_do_not_share_memory():
    first, second = list(CountLoader(CountMatrix(random_counts(8, 4, 0)), batch_size=4, shuffle=False))
    kept = first.x.clone()
    second.x.fill_(-1)
    assert torch.equal(first.x, kept)


def test_count_matrix_orders_genes_and_refuses_unknown_ones(screen):
    genes = list(screen.var_names[[7, 3, 5]])
    batch = count_matrix(screen, genes=genes).batch(np.arange(6))
    np.testing.assert_array_equal(batch.x.numpy(), screen[:6, genes].X.toarray())
    np.testing.assert_array_equal(batch.library.numpy(), np.maximum(screen[:6, genes].X.toarray().sum(1), 1))
    with pytest.raises(DataError, match="1 of 2 missing.*GENE0O03"):
        count_matrix(screen, genes=["GENE0003", "GENE0O03"])


def test_categories_are_those_of_training_and_never_default_to_zero():
    adata = AnnData(np.ones((3, 1)), obs=pd.DataFrame({"donor": ["b", "a", "c"]}, index=list("xyz")))
    known = covariate_categories(adata, ["donor"])
    assert known == {"donor": ["a", "b", "c"]}
    assert category_codes(adata, "donor", known["donor"]).tolist() == [1, 0, 2]
    with pytest.raises(LabelError, match="seen in training.*'c'"):
        category_codes(adata, "donor", ["a", "b"])


def test_other_genes_fill_up_to_the_total(screen):
    total = np.asarray(screen.X.sum(1)).ravel() + np.arange(screen.n_obs)
    screen.obs["total_counts"] = total
    genes = list(screen.var_names[:7])
    batch = count_matrix(screen, genes=genes, total_key="total_counts").batch(np.array([4, 2]))
    assert batch.x.shape == (2, 8)
    assert batch.library.tolist() == total[[4, 2]].tolist() == batch.x.sum(1).tolist()
    np.testing.assert_array_equal(batch.x[:, :7], screen[[4, 2], genes].X.toarray())


@pytest.mark.parametrize(("total", "text"), [(0.0, "at least the cell's counts"), (np.nan, "nan")])
def test_totals_below_the_counts_are_refused(screen, total, text):
    screen.obs["total_counts"] = np.asarray(screen.X.sum(1)).ravel()
    screen.obs.loc[screen.obs_names[3], "total_counts"] = total
    with pytest.raises(DataError, match=text):
        count_matrix(screen, total_key="total_counts")


def test_missing_totals_are_named(screen):
    with pytest.raises(LabelError, match="total_counts"):
        count_matrix(screen, total_key="total_counts")


def test_real_counts(kang_file):
    import anndata

    adata = anndata.read_h5ad(kang_file)
    Keys().write(adata)
    loader = CountLoader(count_matrix(adata), batch_size=512)
    total = sum(batch.x.double().sum().item() for batch in loader)
    assert total == adata.X.sum(dtype=np.float64)
