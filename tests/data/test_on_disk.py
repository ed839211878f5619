"""Counts on disk give the batches that counts in memory give, whatever the format and the order."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cellop_nb.data import counts as counts_module
from cellop_nb.data import genes, on_disk
from cellop_nb.data.contract import setup
from cellop_nb.data.counts import CountLoader, count_matrix, covariate_categories
from cellop_nb.data.datasets import load
from cellop_nb.data.genes import select_genes
from cellop_nb.data.splits import split
from cellop_nb.errors import DataError
from cellop_nb.training.vae import new_vae


@pytest.fixture(params=["h5ad", "zarr", "dense", "backed"])
def pair(request, screen, tmp_path):
    """A screen in memory and the same one on disk."""
    screen.layers["counts"] = screen.X.copy()
    if request.param == "dense":
        screen.X = screen.X.toarray()
    path = tmp_path / f"screen.{'zarr' if request.param == 'zarr' else 'h5ad'}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata announces another default of zarr
        (screen.write_zarr if request.param == "zarr" else screen.write_h5ad)(path)
    if request.param == "backed":
        return screen, ad.read_h5ad(path, backed="r")
    return screen, load(path, backed=True)


def same(one, two):
    assert torch.equal(one.x, two.x) and torch.equal(one.library, two.library)
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.values, two.values)
    assert one.covariates.keys() == two.covariates.keys()
    assert all(torch.equal(two.covariates[key], code) for key, code in one.covariates.items())


def test_batches_on_disk_are_those_in_memory(pair):
    memory, disk = pair
    assert on_disk.is_on_disk(disk.X) and not on_disk.is_on_disk(memory.X)
    genes = list(memory.var_names[[5, 0, 17]])
    donors = covariate_categories(memory, ["donor"])
    for wanted in ({"covariates": donors}, {"genes": genes}, {"genes": list(memory.var_names)}):
        ours, theirs = count_matrix(disk, **wanted), count_matrix(memory, **wanted)
        assert ours.csr is None and ours.shape == theirs.shape and len(ours) == len(theirs)
        assert torch.equal(ours.library, theirs.library)
        rows = np.random.default_rng(0).choice(memory.n_obs, 37, replace=False)
        same(ours.batch(rows), theirs.batch(rows))


def test_a_pass_visits_every_chosen_cell_once_in_the_same_order(pair, monkeypatch):
    monkeypatch.setattr(counts_module, "PART", 64)
    batches = covariate_categories(pair[0], ["batch"])
    memory, disk = (count_matrix(adata, covariates=batches) for adata in pair)
    rows = np.flatnonzero(np.random.default_rng(1).uniform(size=len(memory)) < 0.7)
    loaders = [
        CountLoader(matrix, rows, batch_size=10, generator=torch.Generator().manual_seed(4))
        for matrix in (memory, disk)
    ]
    for loader in loaders:
        loader.order = counts_module.chunked_order(8, 64)
    for _ in range(2):
        seen = []
        for one, two in zip(*loaders, strict=True):
            same(one, two)
            seen += two.index.tolist()
        assert sorted(seen) == rows.tolist() and seen != rows.tolist()
    plain = list(CountLoader(disk, rows, batch_size=10, shuffle=False))
    assert torch.cat([batch.index for batch in plain]).tolist() == rows.tolist()
    assert len(plain) == len(loaders[0])


def test_totals_over_genes_that_are_not_kept_become_a_column(pair):
    memory, disk = pair
    for adata in pair:
        adata.obs["total_counts"] = np.asarray(memory.layers["counts"].sum(1)).ravel() + 5.0
    wanted = {"genes": list(memory.var_names[:7]), "total_key": "total_counts"}
    ours, theirs = count_matrix(disk, **wanted), count_matrix(memory, **wanted)
    assert ours.shape == theirs.shape == (memory.n_obs, 8)
    rows = np.arange(20, 50)
    same(ours.batch(rows), theirs.batch(rows))


def test_the_checks_read_by_blocks(pair):
    memory, disk = pair
    assert setup(disk).equals(setup(memory))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 120), st.integers(0, 99))
def test_a_chunked_order_is_a_permutation_of_windows_from_few_blocks(n, block, window, seed):
    order = counts_module.chunked_order(block, window)(n, torch.Generator().manual_seed(seed)).numpy()
    assert np.array_equal(np.sort(order), np.arange(n))
    for start in range(0, n, window):
        part = order[start : start + window]
        assert len(np.unique(part // block)) <= window // block + 3, "two are cut, one is short"


def test_a_window_mixes_a_sorted_file():
    """Labels sorted in the file: batches of a chunked pass look like batches of a full shuffle."""
    n, labels = 200_000, np.repeat(np.arange(4), 50_000)
    order = counts_module.chunked_order()(n, torch.Generator().manual_seed(0)).numpy()
    share = np.stack([np.bincount(labels[part], minlength=4) / 200 for part in np.split(order, n // 200)])
    assert share.mean(0) == pytest.approx([0.25] * 4)
    assert share.std(0).max() < 2 * np.sqrt(0.25 * 0.75 / 200), "a file read in its order has 0.43"


def test_rows_are_read_in_runs(screen, tmp_path, monkeypatch):
    screen.write_h5ad(tmp_path / "screen.h5ad")
    reader = on_disk.RowReader(load(tmp_path / "screen.h5ad", backed=True).X)
    plain, reads = reader.runs, []
    monkeypatch.setattr(reader, "runs", lambda a, b: reads.append((b - a).tolist()) or plain(a, b))
    rows = np.concatenate([np.arange(0, 100, 2), np.arange(300, 400)])[::-1]
    assert (reader.read(rows) != screen.X[rows]).nnz == 0
    assert reads == [[99, 100]]


def test_rows_asked_for_twice_and_empty_rows_are_read(screen, tmp_path):
    x = screen.X.tolil()
    x[3:6] = 0
    screen.X = sparse.csr_matrix(x)
    screen.write_h5ad(tmp_path / "screen.h5ad")
    reader = on_disk.RowReader(load(tmp_path / "screen.h5ad", backed=True).X)
    for rows in ([3], [5, 4, 4, 200, 3, 200], [0]):
        found = reader.read(np.array(rows))
        assert found.dtype == np.float32 and (found != screen.X[rows]).nnz == 0


def test_values_on_disk_are_checked_as_they_are_read(screen, tmp_path):
    """No pass for the check alone: the block that holds a wrong value is refused, cell and gene by name."""
    x = screen.X.toarray()
    x[200, 11] = 0.5
    screen.X = sparse.csr_matrix(x)
    screen.write_h5ad(tmp_path / "screen.h5ad")
    counts = count_matrix(load(tmp_path / "screen.h5ad", backed=True), checked=True)
    counts.batch(np.arange(150))
    with pytest.raises(DataError, match="whole numbers in X.*cell 'cell_00200', gene 'GENE0011'"):
        counts.batch(np.array([230, 190, 210]))


def test_batches_go_to_a_gpu_from_pinned_memory_without_waiting(pair, monkeypatch):
    """On a machine without one: what is asked of torch. Each of the six parts of a batch, from memory and from disk."""
    pinned, moves = [], []

    def to(tensor, device, non_blocking=False):
        moves.append((str(device), non_blocking, id(tensor) in pinned))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(id(tensor)) or tensor)
    for adata in pair:
        counts = count_matrix(adata, covariates=covariate_categories(adata, ["batch"]))
        loader = CountLoader(counts, np.arange(30), batch_size=10, device="cuda")
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", to)
            list(loader)
            counts.batch(np.arange(5), "cuda")
        assert len(moves) >= 4 * 6 and set(moves) == {("cuda", True, True)}
        moves.clear()


def test_a_matrix_stored_by_genes_is_refused(screen, tmp_path):
    screen.X = sparse.csc_matrix(screen.X)
    screen.write_h5ad(tmp_path / "screen.h5ad")
    with pytest.raises(DataError, match=r"stored by cells \(CSR\).*tocsr"):
        count_matrix(load(tmp_path / "screen.h5ad", backed=True))


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "broken.h5ad").write_bytes(b"no hdf5")
    (tmp_path / "broken.zarr").mkdir()
    for name in ("broken.h5ad", "broken.zarr"):
        with pytest.raises(DataError, match="a readable"):
            load(tmp_path / name, backed=True)


def test_genes_are_chosen_from_a_file_as_in_memory(screen, tmp_path, monkeypatch):
    split(screen)
    screen.write_h5ad(tmp_path / "screen.h5ad")
    disk = load(tmp_path / "screen.h5ad", backed=True)
    whole = select_genes(screen, 20)
    assert select_genes(disk, 20) == whole
    monkeypatch.setattr(genes, "MAX_CELLS", 100)
    fewer = select_genes(disk, 20)
    assert fewer == select_genes(screen, 20) != whole and len({*fewer} & {*whole}) >= 10
    total = np.asarray(screen.X.sum(1)).ravel()
    for adata in (disk, screen):
        adata.obs["total_counts"] = total
    ours, theirs = new_vae(disk, genes=fewer), new_vae(screen, genes=fewer)
    assert ours.genes == fewer and ours.total_key == "total_counts"
    assert all(torch.equal(theirs.state_dict()[name], value) for name, value in ours.state_dict().items())
