"""cell-eval2 (Arc Institute) reads what we write, and scores planted predictions as they must be."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from cellop_nb import score
from cellop_nb.analysis.exchange import VCC2026, cell_eval2, vcc2026
from cellop_nb.errors import DataError, HoldoutError, LabelError

from .screens import rows_of, screen

package = pytest.importorskip(
    "cell_eval2", reason="cell-eval2 is not installed: pip install 'cellop_nb[evaluation]'"
)

NAMES = tuple(f"p{k}" for k in range(6))


@pytest.fixture(scope="module")
def planted():
    """Twice as many cells as are measured: the other half is a perfect prediction."""
    whole = screen(n=240, genes=90, contexts=("T",), perturbations=NAMES)
    first = np.arange(whole.n_obs) % 2 == 0
    return whole[first].copy(), whole[~first].copy()


@pytest.fixture(scope="module")
def table(planted):
    return vcc2026(planted[1], planted[0], n_splits=2).set_index("metric")


def test_a_perfect_prediction_is_a_replicate(table):
    assert list(table.index) == [*VCC2026]
    value = table["value"].dropna()
    assert len(value) >= 5 and (table["reason"][table["value"].isna()] != "").all()
    assert (value > 0.8).all() and value.median() < 2, table


def test_the_mean_response_is_nothing(planted, table):
    """Cells drawn from all perturbations alike: about 0 where means count, and nowhere as good as a replicate."""
    guess, rng = planted[1].copy(), np.random.default_rng(0)
    moved, mixed = np.flatnonzero(guess.obs["perturbation"] != "control"), guess.X.toarray()
    mixed[moved] = mixed[rng.permutation(moved)]
    guess.X = sparse.csr_matrix(mixed)
    value = vcc2026(guess, planted[0], n_splits=1).set_index("metric")["value"]
    means = value[["pds_cosine", "expr_mse_unbiased_capped_norm", "de_wilcoxon_lfc_nmae"]]
    assert (means.abs() < 0.2).all() and (value.dropna() < 0.4).all(), value


def test_no_change_is_where_the_definitions_put_it(planted):
    """An error of means and of fold changes as large as the effect, and no responding gene."""
    guess = planted[1].copy()
    control, counts = rows_of(guess, perturbation="control"), guess.X.toarray()
    for name in NAMES:
        counts[rows_of(guess, perturbation=name)] = counts[control]
    guess.X = sparse.csr_matrix(counts)
    raw = vcc2026(guess, planted[0], n_splits=1).set_index("metric")["raw"]
    assert raw["expr_mse_unbiased_capped_norm"] == pytest.approx(1, abs=0.1)
    assert raw["de_wilcoxon_lfc_nmae"] == pytest.approx(1, abs=0.1)
    assert raw["de_wilcoxon_sig_jaccard"] < 0.05


def test_the_numbers_that_both_have_agree(planted):
    """Ours over CP10k; theirs told to normalise so."""
    real, guess = planted
    config = package.EvalConfig(
        metrics=["delta_pearson", "expr_mae"], pert_col="target", control="non-targeting", version="v1",
        input_type="counts", target_sum=1e4, num_threads=1, device="cpu",
    )  # fmt: skip
    theirs = package.compute_metrics(*cell_eval2(guess, real), config=config).to_pandas()
    theirs = theirs.pivot_table(index="perturbation", columns="metric", values="value")
    ours = score(guess, real, metrics=["pearson_delta", "mae"])
    ours = ours[ours["method"] == "prediction"].pivot_table(
        index="perturbation", columns="metric", values="value"
    )
    np.testing.assert_allclose(ours[["pearson_delta", "mae"]], theirs[["pearson_delta", "mae"]], rtol=1e-5)


def test_what_is_written_is_whole_and_passes_the_validator(planted, tmp_path):
    from cell_eval2.io import validate_pair

    real, guess = planted
    pair = cell_eval2(guess[:, ::-1], real, folder=tmp_path / "out")
    validate_pair(*pair, pert_col="target", control="non-targeting")
    for adata, name in zip(pair, ("pred", "real"), strict=True):
        again = ad.read_h5ad(tmp_path / "out" / f"{name}.h5ad")
        assert (again.X != adata.X).nnz == 0 and list(again.var_names) == list(real.var_names)
        assert (again.obs["target"] == "non-targeting").sum() == rows_of(real, perturbation="control").sum()
        assert (again.X.data == np.rint(again.X.data)).all()
    of_p1 = pair[0][(pair[0].obs["target"] == "p1").to_numpy()].X
    assert (of_p1 != guess[rows_of(guess, perturbation="p1")].X).nnz == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a[:, 1:].copy(), LabelError, "all genes of the screen.*'g0'"),
        (lambda a: logged(a), DataError, "whole counts predicted"),
        (lambda a: a[rows_of(a, perturbation="control")].copy(), LabelError, "one of the predicted contexts"),
        (lambda a: renamed(a), HoldoutError, "0 groups on both sides"),
    ],
    ids=range(4),
)
def test_refusals(planted, change, error, message):
    with pytest.raises(error, match=message) as caught:
        cell_eval2(change(planted[1]), planted[0])
    assert "To fix it" in str(caught.value)


def logged(adata):
    adata = adata.copy()
    adata.X = sparse.csr_matrix(adata.X).log1p()
    return adata


def renamed(adata):
    adata = adata.copy()
    adata.obs["perturbation"] = "other"
    return adata
