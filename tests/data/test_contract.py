"""The gate lets fit screens through and names what is wrong with the others."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, concat, read_h5ad, read_zarr
from scipy import sparse

from cellop_nb.data import contract, on_disk
from cellop_nb.data.contract import (
    Keys,
    context_labels,
    count_blocks,
    counts,
    keys_of,
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


def test_context_labels(screen):
    both = context_labels(screen, ["cell_type", "donor"])
    assert both.iloc[0] == f"{screen.obs['cell_type'].iloc[0]} | {screen.obs['donor'].iloc[0]}"
    assert set(context_labels(screen, None)) == {"all"}


@pytest.mark.parametrize(
    ("label", "parts"), [("A", ("A",)), ("A+B", ("A", "B")), ("drug 1+B+c", ("drug 1", "B", "c"))]
)
def test_perturbation_parts(label, parts):
    assert perturbation_parts(label) == parts


@pytest.mark.parametrize("label", ["A++B", "+A", "A+", "A + B", "A+A", "", " A"])
def test_malformed_perturbations(label):
    with pytest.raises(LabelError, match="To fix it: write"):
        perturbation_parts(label)


def with_x(change):
    """Spoil the matrix: `change` gets a dense float copy."""

    def spoil(adata):
        x = adata.X.toarray().astype(float)
        adata.X = change(x)
        return adata, {}

    return spoil


def set_at(row, column, value):
    def change(x):
        x[row, column] = value
        return sparse.csr_matrix(x)

    return with_x(change)


def labelled(column, old, new):
    """Spoil a label of one cell (old: an index) or of all cells that carry it (old: a label)."""

    def spoil(adata):
        values = adata.obs[column].astype(object).to_numpy().copy()
        values[old if isinstance(old, int) else values == old] = new
        adata.obs[column] = values
        return adata, {}

    return spoil


def argument(**arguments):
    return lambda adata: (adata, arguments)


def without_controls_in_one_context(adata):
    return adata[
        ~((adata.obs["cell_type"] == "type B") & (adata.obs["perturbation"] == "control"))
    ].copy(), {}


def repeated_cells(adata):
    adata.obs_names = ["cell_00000", "cell_00000", *adata.obs_names[2:]]
    return adata, {}


def repeated_genes(adata):
    adata.var_names = ["GENE0000", "GENE0000", *adata.var_names[2:]]
    return adata, {}


def no_matrix(adata):
    return AnnData(obs=adata.obs, var=adata.var), {}


def normalised_with_counts_beside(adata):
    adata.layers["umi"] = adata.X.copy()
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray()))
    return adata, {}


def ambiguous_contexts(adata):
    adata.obs["tissue"] = "a | b"
    return adata, {"context_key": ["cell_type", "tissue"]}


def only_controls(adata):
    return adata[adata.obs["perturbation"] == "control"].copy(), {}


def text_matrix(adata):
    adata.X = adata.X.toarray().astype(complex)
    return adata, {}


BAD = {
    "not an AnnData": (lambda a: (a.to_df(), {}), DataError, "an AnnData object.*DataFrame"),
    "no cells": (lambda a: (a[:0].copy(), {}), DataError, "0 cells and 60 genes"),
    "no genes": (lambda a: (a[:, :0].copy(), {}), DataError, "400 cells and 0 genes"),
    "repeated cells": (repeated_cells, DataError, "1 repeated in obs_names, such as 'cell_00000'"),
    "repeated genes": (
        repeated_genes,
        DataError,
        "1 repeated in var_names, such as 'GENE0000'.*var_names_make_unique",
    ),
    "no matrix": (no_matrix, DataError, "X is empty"),
    "missing layer": (argument(layer="count"), DataError, "a layer 'count'.*no such layer"),
    "log-normalised": (with_x(np.log1p), DataError, "looks log-normalised"),
    "log-normalised sparse": (
        normalised_with_counts_beside,
        DataError,
        "looks log-normalised.*layer='umi' seems",
    ),
    "normalised": (
        with_x(lambda x: x / x.sum(1, keepdims=True) * 1e4),
        DataError,
        "looks normalised to 1e\\+04 per cell",
    ),
    "scaled": (with_x(lambda x: x - x.mean(0)), DataError, "of at least 0.*negative values.*cell_00000"),
    "one negative": (
        set_at(7, 3, -2),
        DataError,
        r"negative values: -2 in cell 'cell_00007', gene 'GENE0003' \(1 such",
    ),
    "one fraction": (set_at(5, 2, 90.5), DataError, "90.5 in cell 'cell_00005', gene 'GENE0002'.*corrected"),
    "a small fraction": (set_at(5, 2, 90.001), DataError, "90.001.* in cell 'cell_00005', gene 'GENE0002'"),
    "NaN": (set_at(5, 2, np.nan), DataError, "finite counts.*nan in cell 'cell_00005', gene 'GENE0002'"),
    "infinity": (set_at(0, 0, np.inf), DataError, "finite counts.*inf in cell"),
    "not numbers": (text_matrix, DataError, "numbers in X.*complex"),
    "empty cell": (
        with_x(lambda x: x * (np.arange(len(x)) != 9)[:, None]),
        DataError,
        "1 without any, such as 'cell_00009'",
    ),
    "perturbation key": (
        argument(perturbation_key="Perturbation"),
        LabelError,
        "did you mean 'perturbation'",
    ),
    "context key": (argument(context_key="celltype"), LabelError, "did you mean 'cell_type'"),
    "one of two context keys": (
        argument(context_key=["cell_type", "doner"]),
        LabelError,
        "did you mean 'donor'",
    ),
    "no context keys": (argument(context_key=[]), LabelError, "an empty list"),
    "same keys": (argument(context_key="perturbation"), LabelError, "'perturbation' twice"),
    "control label": (
        argument(control="Control"),
        LabelError,
        "control cells 'Control'.*did you mean 'control'",
    ),
    "two controls": (
        labelled("perturbation", 4, "CONTROL"),
        LabelError,
        "one spelling.*'control' and 'CONTROL'",
    ),
    "context without control": (
        without_controls_in_one_context,
        LabelError,
        "every context.*such as 'type B'",
    ),
    "only controls": (only_controls, LabelError, "perturbed cells beside the controls"),
    "lonely cell": (labelled("perturbation", 4, "drug 9"), LabelError, "1 with one, such as 'drug 9'"),
    "missing label": (
        labelled("perturbation", 4, None),
        LabelError,
        "1 cells without one, such as .'cell_00004'",
    ),
    "missing context": (labelled("cell_type", 4, np.nan), LabelError, "label in obs.'cell_type'.*1 cells"),
    "written-out NaN": (labelled("cell_type", 4, "nan"), LabelError, "a context for every cell.*'nan'"),
    "blank": (labelled("perturbation", "drug 1", "drug 1 "), LabelError, "without blanks.*'drug 1 '"),
    "malformed pair": (
        labelled("perturbation", "drug 1+drug 2", "drug 1++drug 2"),
        LabelError,
        r"write 'drug 1\+drug 2'",
    ),
    "pair with control": (labelled("perturbation", "drug 1", "drug 1+control"), LabelError, "write 'drug 1'"),
    "pair in two orders": (
        labelled("perturbation", "drug 3", "drug 2+drug 1"),
        LabelError,
        "one label per combination",
    ),
    "joined contexts": (ambiguous_contexts, LabelError, "without ' | '"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(screen, case):
    spoil, error, message = BAD[case]
    adata, arguments = spoil(screen)
    with pytest.raises(error, match=message) as caught:
        setup(adata, **arguments)
    for beat in ("Expected ", "Found ", "To fix it: "):
        assert beat in str(caught.value)


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


DOSES = {
    "text": ("10 uM", "write numbers alone"),
    "logarithms": (-2.0, r"10 \*\* value"),
    "zero": (0.0, "others, such as 0.0"),
    "missing": (np.nan, "others, such as nan"),
}


@pytest.mark.parametrize("case", DOSES)
def test_what_is_no_dose_is_refused(screen, case):
    value, message = DOSES[case]
    treated = screen.obs["perturbation"] != "control"
    screen.obs["amount"] = np.where(treated, 1.0, np.nan).astype(object)
    setup(screen, dose_key="amount")
    screen.obs.loc[screen.obs_names[np.flatnonzero(treated)[3]], "amount"] = value
    with pytest.raises(LabelError, match=rf"positive numbers as doses.*obs\['amount'\].*{message}"):
        setup(screen, dose_key="amount")


def test_features_that_are_no_genes_are_refused(screen):
    screen.var["feature_types"] = ["Gene Expression"] * 58 + ["CRISPR Guide Capture"] * 2
    with pytest.raises(DataError, match="2 other features .CRISPR Guide Capture., such as 'GENE0058'"):
        setup(screen)
    setup(screen[:, screen.var["feature_types"] == "Gene Expression"].copy())


def test_control_labels_in_a_list_are_refused(screen):
    with pytest.raises(LabelError, match="control, a string.*replace"):
        setup(screen, control=["control"])


def test_two_columns_of_one_name_are_refused(screen):
    screen.obs = pd.concat([screen.obs, screen.obs[["cell_type"]]], axis=1)
    with pytest.raises(LabelError, match="one column 'cell_type' in obs.*2 columns"):
        setup(screen)


def test_gene_indices_outside_the_genes_are_refused(screen):
    screen.X.indices[7] = 60
    with pytest.raises(DataError, match="gene indices of 0 to 59.*the gene index 60"):
        setup(screen)
