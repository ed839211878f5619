"""The published table with us in it: its numbers by other people's code, and the page by its file."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy.spatial.distance import cdist

from benchmarks import scperturbench as bench

RNG = np.random.default_rng(0)


def test_the_numbers_are_those_of_the_protocol():
    predicted, real, control = (
        RNG.gamma(1.0, scale, (n, 30)) for n, scale in ((40, 1.3), (50, 1.0), (60, 0.8))
    )
    value = bench.measures(predicted, real, control)
    expected = (
        2 * cdist(predicted, real).mean() - cdist(predicted, predicted).mean() - cdist(real, real).mean()
    )
    assert value["energy"] == pytest.approx(expected, rel=1e-9)
    assert value["mse"] == pytest.approx(((predicted.mean(0) - real.mean(0)) ** 2).mean())
    change = np.corrcoef(predicted.mean(0) - control.mean(0), real.mean(0) - control.mean(0))[0, 1]
    assert value["pearson"] == pytest.approx(change)


def test_the_leading_genes_are_those_of_scanpy():
    real, control = (
        np.log1p(RNG.poisson(RNG.gamma(1, 2, 300), (40, 300))),
        np.log1p(RNG.poisson(1.5, (50, 300))),
    )
    both = ad.AnnData(np.concatenate([real, control]).astype(np.float32))
    both.obs["side"] = pd.Categorical(["real"] * 40 + ["control"] * 50)
    sc.tl.rank_genes_groups(both, "side", groups=["real"], reference="control", method="t-test")
    table = sc.get.rank_genes_groups_df(both, "real").sort_values("scores", key=np.abs, ascending=False)
    assert set(table["names"][:100].astype(int)) == {*bench.leading(real, control)}


def test_the_page_is_that_of_its_file(root):
    table = pd.read_csv(root / "docs" / "scperturbench.csv")
    guide = (root / "docs" / "guides" / "compare.md").read_text(encoding="utf-8")
    assert bench.page(table) in guide and bench.donors(table) in guide
    assert "published" in bench.report(table, "cell_type") and not table["cpu_seconds"].dropna().empty
