"""Variable genes: scanpy's own, on training cells, in the order of the data, by either flavor."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc

from cellop_nb import datasets, select_genes
from cellop_nb.data import genes
from cellop_nb.data.contract import Keys
from cellop_nb.data.genes import FLAVORS
from cellop_nb.errors import LabelError, ModelError

every_flavor = pytest.mark.parametrize("flavor", FLAVORS)


@pytest.fixture
def screen():
    found = datasets.synthetic(n_contexts=2, n_perturbations=2, n_cells=60, n_genes=60, library=300.0)
    found.obs["split"] = np.where(np.arange(found.n_obs) % 3 == 0, "test", "train")
    return found


@every_flavor
def test_genes_are_chosen_on_training_cells_only(screen, flavor):
    chosen = select_genes(screen, 20, flavor=flavor)
    assert len(chosen) == 20 and chosen == [gene for gene in screen.var_names if gene in set(chosen)]
    test = (screen.obs["split"] == "test").to_numpy()
    x = screen.X.toarray()
    x[test] = np.random.default_rng(0).poisson(5, x[test].shape)
    screen.X = x
    assert select_genes(screen, 20, flavor=flavor) == chosen
    assert select_genes(screen, 20, flavor=flavor, split=None) != chosen
    assert select_genes(screen, 1000, flavor=flavor) == list(screen.var_names)
    with pytest.raises(LabelError, match="split 'val'.*none"):
        select_genes(screen, 20, split="val")


@every_flavor
def test_rare_genes_are_not_chosen(screen, flavor):
    x = screen.X.toarray()
    x[:, :6] = 0
    x[:3, 5] = 9
    screen.X = x
    assert not set(select_genes(screen, 58, flavor=flavor, split=None)) & set(screen.var_names[:5])
    assert screen.var_names[5] in select_genes(screen, 60, flavor=flavor, split=None, min_cells=3)
    common = select_genes(screen, 60, flavor=flavor, split=None, min_cells=4)
    assert common == list(screen.var_names[(x > 0).sum(0) >= 4])


@every_flavor
def test_the_counts_are_left_alone(screen, flavor):
    before = screen.X.copy()
    select_genes(screen, 20, flavor=flavor, split=None)
    assert (before != screen.X).nnz == 0


@pytest.mark.parametrize(
    ("wrong", "message"), [({"n_genes": 0}, "at least 2"), ({"flavor": "Seurat"}, "'seurat'")]
)
def test_what_cannot_be_chosen_by_is_refused(screen, wrong, message):
    with pytest.raises((ModelError, LabelError), match=message):
        select_genes(screen, **wrong)


def test_they_are_scanpys_on_a_real_screen(kang_file):
    """And the ones that interferon changes are among them."""
    kang = ad.read_h5ad(kang_file)
    Keys().write(kang)
    theirs = kang[:, np.asarray((kang.X > 0).sum(0)).ravel() >= 10].copy()
    sc.experimental.pp.highly_variable_genes(theirs, n_top_genes=1000, flavor="pearson_residuals")
    by_residuals = list(theirs.var_names[theirs.var["highly_variable"]])
    sc.pp.normalize_total(theirs, target_sum=1e4)
    sc.pp.log1p(theirs)
    sc.pp.highly_variable_genes(theirs, n_top_genes=1000, flavor="seurat")
    by_dispersion = list(theirs.var_names[theirs.var["highly_variable"]])
    asked = {"split": None, "min_cells": 10}
    assert select_genes(kang, 1000, **asked) == by_residuals
    assert select_genes(kang, 1000, flavor="seurat", **asked) == by_dispersion
    assert {"ISG15", "IFI6", "IFIT1", "IFIT3", "MX1"} <= set(by_residuals)


def test_of_a_file_random_cells_are_ranked(screen, tmp_path, monkeypatch):
    screen.X = screen.X.toarray()
    screen.X[:, 0] = np.arange(screen.n_obs) + 1
    screen.write_h5ad(tmp_path / "screen.h5ad")
    backed = datasets.load(str(tmp_path / "screen.h5ad"), backed=True)
    monkeypatch.setattr(genes, "MAX_CELLS", 40)
    rows = genes._counts_of(backed, np.arange(screen.n_obs))[:, 0].toarray().ravel() - 1
    assert len(rows) == 40 and rows.max() > 0.8 * screen.n_obs and (np.diff(rows) > 0).all()
