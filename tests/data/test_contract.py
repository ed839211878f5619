"""The gate lets fit screens through and names what is wrong with the others."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import concat, read_h5ad, read_zarr
from scipy import sparse

from cellop_nb.data import contract, on_disk
from cellop_nb.data.contract import (
    Keys,
    context_labels,
    count_blocks,
    counts,
    keys_of,
    label_table,
    library_size,
    setup,
)
from cellop_nb.data.datasets import load
from cellop_nb.errors import DataError, LabelError
from cellop_nb.models.operators import perturbation_parts


def test_table_of_groups(screen):
    table = setup(screen)
    expected = screen.obs.groupby(["cell_type", "perturbation"], observed=True).size()
    assert table.set_index(["context", "perturbation"])["cells"].to_dict() == expected.to_dict()
    first = table.iloc[0]
    here = (screen.obs["cell_type"] == first["context"]) & (
        screen.obs["perturbation"] == first["perturbation"]
    )
    assert first["counts_per_cell"] == np.median(screen[here].X.toarray().sum(1))
    assert (table["note"] == "").all()
    few = setup(screen[np.r_[np.flatnonzero(~here)[:], np.flatnonzero(here)[:9]]].copy())
    assert few.loc[few["note"] == "fewer than 10 cells", "cells"].tolist() == [9]


@pytest.mark.parametrize("store", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, np.asarray])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
@pytest.mark.parametrize("layer", [None, "counts"])
def test_any_storage_passes(screen, store, dtype, layer):
    x = store(screen.X.toarray().astype(dtype))
    if layer is None:
        screen.X = x
    else:
        screen.layers[layer], screen.X = x, np.log1p(screen.X.toarray())
    reference = setup(screen, layer=layer)
    assert reference["cells"].sum() == screen.n_obs
    found = counts(screen, layer)
    np.testing.assert_array_equal(
        found.toarray() if sparse.issparse(found) else found,
        np.asarray(x.todense() if sparse.issparse(x) else x),
    )
    np.testing.assert_array_equal(
        library_size(screen, layer),
        found.sum(1).ravel().astype(float).tolist()
        if not sparse.issparse(found)
        else np.asarray(found.sum(1)).ravel(),
    )


@pytest.mark.parametrize("store", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_backed_on_disk(screen, store, tmp_path):
    reference = setup(screen)
    screen.X = store(screen.X.toarray())
    screen.write_h5ad(tmp_path / "screen.h5ad")
    backed = read_h5ad(tmp_path / "screen.h5ad", backed="r")
    pd.testing.assert_frame_equal(setup(backed), reference)
    total = counts(backed).sum()
    backed.file.close()
    assert total == screen.X.sum()


def test_a_file_stored_by_genes_is_read_once(screen, tmp_path, monkeypatch):
    reference = library_size(screen)
    screen.X = screen.X.tocsc()
    screen.write_h5ad(tmp_path / "screen.h5ad")
    backed = load(tmp_path / "screen.h5ad", backed=True)
    parts = list(on_disk.blocks_by_genes(backed.X, size=500))
    assert len(parts) > 5 and sum(part.nnz for _, part in parts) == screen.X.nnz
    assert (sparse.hstack([part for _, part in parts]) != screen.X).nnz == 0
    monkeypatch.setattr(contract, "count_blocks", None)  # each block of cells would read the whole file
    np.testing.assert_array_equal(contract.check_values(backed), reference)


def test_half_precision_does_not_overflow(screen):
    screen.X = np.full(screen.shape, 4000, dtype=np.float16)
    assert (setup(screen)["counts_per_cell"] == 4000 * 60).all()
    assert counts(screen).dtype == np.float32


@pytest.mark.parametrize("column", ["cell_type", "perturbation"])
def test_an_index_named_like_a_column_does_no_harm(screen, column):
    reference = setup(screen)
    screen.obs.index.name = column
    pd.testing.assert_frame_equal(setup(screen), reference)


def test_labels_of_any_type_are_read_as_text(screen):
    reference = setup(screen)
    labels = screen.obs["perturbation"].astype(str)
    for typed in (
        labels.astype("string"),
        labels.astype(pd.CategoricalDtype(["unused", *sorted(set(labels))])),
    ):
        screen.obs["perturbation"] = typed
        pd.testing.assert_frame_equal(setup(screen), reference)
    for dtype in ("Int64", "boolean", int):
        screen.obs["number"] = (screen.obs["cell_type"] == "type A").astype(dtype)
        assert setup(screen, context_key="number")["cells"].sum() == screen.n_obs


def test_setup_writes_the_keys_alone(screen):
    before = screen.copy()
    setup(screen)
    pd.testing.assert_frame_equal(screen.obs, before.obs)
    assert screen.uns.keys() == before.uns.keys() and screen.layers.keys() == before.layers.keys()


@pytest.mark.parametrize("kind", ["object", "category"])
def test_labels_that_only_their_type_tells_apart_are_refused(screen, kind):
    labels = np.full(screen.n_obs, "1", dtype=object)
    labels[::2] = 1
    screen.obs["tissue"] = pd.Series(labels, index=screen.obs_names, dtype=object).astype(kind)
    with pytest.raises(LabelError, match=r"written differently.*(1 and '1'|'1' and 1)"):
        setup(screen, context_key="tissue")
    screen.obs["tissue"] = screen.obs["tissue"].astype(str)
    setup(screen, context_key="tissue")


def test_context_labels(screen):
    both = context_labels(screen, Keys(context_key=("cell_type", "donor")))
    assert both.iloc[0] == f"{screen.obs['cell_type'].iloc[0]} | {screen.obs['donor'].iloc[0]}"
    assert set(context_labels(screen, Keys(context_key=None))) == {"all"}


def set_at(row, column, value):
    """Spoil one value of the matrix."""

    def spoil(adata):
        x = adata.X.toarray().astype(float)
        x[row, column] = value
        adata.X = sparse.csr_matrix(x)
        return adata, {}

    return spoil


def labelled(old, new):
    """Spoil the label of a perturbation."""

    def spoil(adata):
        adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace({old: new})
        return adata, {}

    return spoil


def argument(**arguments):
    return lambda adata: (adata, arguments)


def normalised_with_counts_beside(adata):
    adata.layers["umi"] = adata.X.copy()
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray()))
    return adata, {}


BAD = {  # what to do; what was wrong is compared in tests/bad_inputs
    "counts in a layer": (normalised_with_counts_beside, DataError, "pass the raw counts, layer='umi' seems"),
    "repeated genes": (
        lambda a: (a[:, [0, 0, *range(2, 60)]], {}),
        DataError,
        "1 repeated in var_names, such as 'GENE0000'.*var_names_make_unique",
    ),
    "one negative": (
        set_at(7, 3, -2),
        DataError,
        r"negative values: -2 in cell 'cell_00007', gene 'GENE0003' \(1 such",
    ),
    "a small fraction": (set_at(5, 2, 90.001), DataError, "90.001.* in cell 'cell_00005', gene 'GENE0002'"),
    "one more than float32 counts": (
        set_at(4, 1, 2**24 + 1),
        DataError,
        "at most 16,777,216 in X.*cell_00004",
    ),
    "a column of another name": (
        argument(perturbation_key="Perturbation"),
        LabelError,
        "did you mean 'perturbation'",
    ),
    "one of two columns": (argument(context_key=["cell_type", "doner"]), LabelError, "did you mean 'donor'"),
    "another control": (
        argument(control="Control"),
        LabelError,
        "control cells 'Control'.*did you mean 'control'",
    ),
    "malformed pair": (labelled("drug 1+drug 2", "drug 1++drug 2"), LabelError, r"write 'drug 1\+drug 2'"),
    "pair with control": (labelled("drug 1", "drug 1+control"), LabelError, "write 'drug 1'"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_what_to_do(screen, case):
    spoil, error, message = BAD[case]
    adata, arguments = spoil(screen)
    with pytest.raises(error, match=message):
        setup(adata, **arguments)


def test_fault_in_a_late_block_is_found(screen, monkeypatch):
    monkeypatch.setattr(contract, "count_blocks", lambda a, layer, size=4096: _blocks(a, layer, 16))
    x = screen.X.toarray()
    x[200, 11] = 0.5
    screen.X = sparse.csr_matrix(x)
    with pytest.raises(DataError, match="cell 'cell_00200', gene 'GENE0011'"):
        setup(screen)


def _blocks(adata, layer, size):
    return count_blocks(adata, layer, size)


def test_real_screens_pass(kang_file, norman_file, mcfaline_file):
    assert [len(setup(read_h5ad(file))) for file in (kang_file, norman_file, mcfaline_file)] == [16, 34, 30]


KEYS = {
    "layer": "umi",
    "perturbation_key": "condition",
    "context_key": ["tissue", "donor"],
    "control": "ctrl",
    "dose_key": "amount",
    "batch_key": "batch",
}


@pytest.fixture
def renamed(screen):
    """The small screen under other names, set up."""
    screen.obs = screen.obs.rename(columns={"cell_type": "tissue", "perturbation": "condition"})
    screen.obs["condition"] = screen.obs["condition"].astype(str).replace({"control": "ctrl"})
    screen.obs["amount"] = np.where(screen.obs["condition"] == "ctrl", -1.0, 2.0)
    screen.layers["umi"] = screen.X.copy()
    setup(screen, singles=["drug 1+drug 2"], **KEYS)
    return screen


def test_keys_travel_with_the_data(renamed, tmp_path):
    expected = Keys(
        "umi", "condition", ("tissue", "donor"), "ctrl", "amount", None, "batch", ("drug 1+drug 2",)
    )
    assert keys_of(renamed) == expected
    renamed.write_h5ad(tmp_path / "screen.h5ad")
    renamed.write_zarr(tmp_path / "screen.zarr")
    halves = concat([renamed[:200], renamed[200:]], uns_merge="same")
    stored = [read_h5ad(tmp_path / "screen.h5ad"), read_zarr(tmp_path / "screen.zarr")]
    for other in (renamed[:50], renamed[:50].copy(), halves, *stored):
        assert keys_of(other) == expected


def test_one_context_is_kept_as_one_context(screen, tmp_path):
    setup(screen, context_key=None)
    screen.write_h5ad(tmp_path / "screen.h5ad")
    assert keys_of(read_h5ad(tmp_path / "screen.h5ad")).context_key is None


def test_setup_keeps_what_else_we_wrote(screen):
    truth = screen.uns["cellop_nb"]["truth"]
    setup(screen)
    assert screen.uns["cellop_nb"]["truth"] is truth


@pytest.mark.parametrize(
    ("label", "parts"),
    [
        ("A+B", ("A", "B")),
        ("(+)-JQ1", ("(+)-JQ1",)),
        ("anti-CD3+CD28", ("anti-CD3+CD28",)),
        ("Na+/K+ ATPase inhibitor", ("Na+/K+ ATPase inhibitor",)),
        ("A+C", ("A+C",)),
        ("A + B", ("A", "B")),
        ("A+A", ("A+A",)),
        ("A", ("A",)),
    ],
)
def test_a_label_is_a_combination_where_its_parts_are_labels(label, parts):
    assert perturbation_parts(label, ["A", "B", label]) == parts
    assert perturbation_parts(label, ["A", "B", label], singles=[label]) == (label,)


def test_a_combination_of_a_name_that_has_a_plus_itself():
    labels = ["(+)-JQ1", "anti-CD3+CD28", "(+)-JQ1+anti-CD3+CD28", "B"]
    assert perturbation_parts(labels[2], labels) == ("(+)-JQ1", "anti-CD3+CD28")
    assert perturbation_parts("B+(+)-JQ1", labels) == ("B", "(+)-JQ1")


def test_names_with_a_plus_pass_the_gate(screen):
    names = {"drug 1": "(+)-JQ1", "drug 2": "anti-CD3+CD28", "drug 1+drug 2": "Na+/K+ ATPase inhibitor"}
    screen.obs["perturbation"] = screen.obs["perturbation"].astype(str).replace(names)
    assert set(names.values()) <= set(setup(screen)["perturbation"])


def test_doses_of_controls_do_not_matter_and_zero_is_none(screen):
    treated = screen.obs["perturbation"] != "control"
    screen.obs["amount"] = np.where(treated, 1.0, np.nan)
    setup(screen, dose_key="amount")
    assert (label_table(screen, keys_of(screen))["dose"] == 1).all()
    screen.obs.loc[screen.obs_names[np.flatnonzero(treated)[3]], "amount"] = 0.0
    with pytest.raises(
        LabelError, match=r"positive numbers as doses.*obs\['amount'\].*other values?, such as 0.0"
    ):
        setup(screen, dose_key="amount")


def test_features_that_are_no_genes_are_refused(screen):
    screen.var["feature_types"] = ["Gene Expression"] * 58 + ["CRISPR Guide Capture"] * 2
    with pytest.raises(DataError, match="2 other features .CRISPR Guide Capture., such as 'GENE0058'"):
        setup(screen)
    setup(screen[:, screen.var["feature_types"] == "Gene Expression"].copy())


@pytest.mark.parametrize("way", ["one gene too far", "more values than there are"])
def test_a_sparse_matrix_that_points_outside_itself_is_refused(screen, way):
    x = screen.X
    if way == "one gene too far":
        x.indices[-1] = screen.n_vars
    else:
        x.indptr[-1] += 1
    with pytest.raises(DataError, match="gene indices of 0 to 59 in X.*damaged"):
        setup(screen)
