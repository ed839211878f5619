"""Descriptors of perturbations: each reader finds what was planted, and no perturbation is described by zeros."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import pairwise_distances

import cellop_nb as co
from cellop_nb import features
from cellop_nb.errors import DataError, LabelError, MissingExtraError, ModelError

from .screens import screen


def nearest(table: pd.DataFrame, name: str) -> str:
    return (table.drop(index=name) - table.loc[name]).pow(2).sum(axis=1).idxmin()


@pytest.fixture(scope="module")
def modules():
    """Genes g0..g4 go together in the controls, and so do g5..g9; treated cells do otherwise."""
    adata, rng = screen(n=80, genes=20, contexts=("B", "T")), np.random.default_rng(0)
    counts = rng.poisson(5.0, adata.shape)
    for start in (0, 5):
        counts[:, start : start + 5] = rng.poisson(
            5 * rng.gamma(2.0, 0.5, (adata.n_obs, 1)), (adata.n_obs, 5)
        )
    treated = (adata.obs["perturbation"] != "control").to_numpy()
    counts[treated] = counts[np.ix_(treated, rng.permutation(20))]
    adata.X = counts.astype(np.float32)
    return adata


def test_genes_that_go_together_in_controls_are_alike(modules):
    table = features.from_expression(modules, n_components=2)
    assert table.shape == (20, 2)
    assert {nearest(table, "g0"), nearest(table, "g7")} <= {f"g{k}" for k in range(10)}
    distance = pairwise_distances(table.iloc[:10])
    apart = distance[:5, 5:].min()
    assert distance[:5, :5].max() < apart and distance[5:, 5:].max() < apart


def test_expression_is_of_training_controls_alone(modules):
    table = features.from_expression(modules)
    other = modules.copy()
    treated = (other.obs["perturbation"] != "control").to_numpy()
    other.X[treated] = 1
    other.obs["split"] = "train"
    pd.testing.assert_frame_equal(table, features.from_expression(other))
    symbols = modules.copy()
    symbols.var["symbol"] = [f"S{k}" for k in range(20)]
    assert list(features.from_expression(symbols, symbols="symbol").index[:2]) == ["S0", "S1"]
    with pytest.raises(LabelError, match="column 'symbl' in var"):
        features.from_expression(symbols, symbols="symbl")


def test_effects_of_another_screen():
    other = screen(n=100, perturbations=("p", "q", "r", "s"))
    counts, labels = other.X.toarray(), other.obs["perturbation"].to_numpy()
    counts[labels == "s"] = counts[labels == "p"]
    other.X = counts
    table = features.from_screen(other)
    assert table.shape == (4, 3) and nearest(table, "p") == "s" and nearest(table, "s") == "p"


def test_members_of_one_set_are_alike_and_genes_of_no_set_have_no_row(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("kinases\t-\tA\tB\tC\nfactors\t-\tD\tE\nlone\t-\tF\nall\t-\tA\tB\tC\tD\tE\tF\n")
    table = features.from_gene_sets(path)
    assert list(table.columns) == ["factors", "kinases"] and set(table.index) == set("ABCDE")
    assert table.loc["A"].equals(table.loc["B"].rename("A")) and table.loc["A", "kinases"] == pytest.approx(
        np.log(2)
    )
    assert (table != 0).any(axis=1).all()
    assert features.from_gene_sets({"x": "AB", "y": "CD", "z": "BC"}, n_components=2).shape == (4, 2)
    with pytest.raises(DataError, match="two genes or more share"):
        features.from_gene_sets({"x": "A", "y": "B"})


def test_neighbours_in_a_network_are_near():
    """Two cliques on one bridge; a pair that is connected to neither has no place."""
    edges = [(a + str(i), a + str(j)) for a in "AB" for i in range(5) for j in range(i)]
    table = features.from_network(pd.DataFrame([*edges, ("A0", "B0"), ("lone", "pair")]), n_components=2)
    assert set(table.index) == {a + str(i) for a in "AB" for i in range(5)}
    assert table.attrs["left_out"] == ["lone", "pair"]
    assert all(nearest(table, name)[0] == name[0] for name in table.index.drop(["A0", "B0"]))
    with pytest.raises(DataError, match="positive weights"):
        features.from_network(pd.DataFrame([("a", "b", -1.0)]))


def test_chemistry_is_an_extra():
    if find_spec("rdkit") is None:
        with pytest.raises(MissingExtraError, match=r'pip install "cellop_nb\[chemistry\]"'):
            features.from_smiles({"ethanol": "CCO"})
        return
    drugs = {"ethanol": "CCO", "propanol": "CCCO", "benzene": "c1ccccc1", "toluene": "Cc1ccccc1"}
    table = features.from_smiles(pd.Series(drugs))
    assert nearest(table, "ethanol") == "propanol" and nearest(table, "toluene") == "benzene"
    with pytest.raises(DataError, match="'C1' of 'bad'"):
        features.from_smiles(drugs | {"bad": "C1"})


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet", "npz by name", "npz of two"])
def test_tables_as_people_have_them(form, tmp_path):
    values = pd.DataFrame(
        [[1.0, 400.0], [2.0, 300.0], [4.0, 100.0]], index=["A", "B", "C"], columns=["x", "y"]
    )
    path = tmp_path / f"table.{form.split()[0]}"
    if form == "parquet":
        values.to_parquet(path)
    elif form == "npz by name":
        np.savez(path, **dict(zip(values.index, values.to_numpy(), strict=True)))
    elif form == "npz of two":
        np.savez(path, names=np.array(values.index, dtype=str), embedding=values.to_numpy())
    else:
        values.rename_axis("gene").to_csv(path, sep="," if form == "csv" else "\t")
    table = features.from_table(path, scale=False)
    assert list(table.index) == ["A", "B", "C"]
    np.testing.assert_array_equal(table, values)
    np.testing.assert_allclose(features.from_table(path).std(ddof=0), 1)


def test_tables_that_are_refused(tmp_path):
    (tmp_path / "words.csv").write_text("gene,x\nA,1\nB,high\n")
    (tmp_path / "twice.csv").write_text("gene,x\nA,1\nA,2\n")
    np.savez(tmp_path / "objects.npz", A=np.array([{}], dtype=object))
    np.savez(tmp_path / "ragged.npz", A=np.ones(2), B=np.ones(3))
    for name, message in {
        "words.csv": "'high' for 'B'",
        "twice.csv": "'A' twice",
        "objects.npz": "objects in objects.npz",
        "ragged.npz": r"shapes \[\(2,\), \(3,\)\]",
        "table.pkl": "no file",
        "none.npz": "no file",
    }.items():
        with pytest.raises(DataError, match=message):
            features.from_table(tmp_path / name)
    (tmp_path / "table.pkl").write_bytes(b"")
    with pytest.raises(DataError, match="a pickle could run any code"):
        features.from_table(tmp_path / "table.pkl")


def table(names: str, **columns) -> pd.DataFrame:
    return pd.DataFrame(columns, index=list(names), dtype=float)


def test_joined_tables_count_alike_and_nothing_is_filled_with_zeros():
    one, two = table("ABC", x=[1, 2, 6]), table("ABCD", y=[100, 700, 300, 690], z=[0, 1, 0, 1])
    with pytest.raises(LabelError, match="none of 1 of them, such as .'D'"):
        features.join(one, two)
    dropped = features.join(one, two, missing="drop")
    assert list(dropped.index) == ["A", "B", "C"]
    filled = features.join(one, two, missing="nearest")
    assert (
        filled.loc["D", "1 x"] == filled.loc["B", "1 x"] and filled.loc["D", "2 y"] != filled.loc["B", "2 y"]
    )
    alike = features.join(one, two.loc[list("ABC")])
    sizes = [alike.filter(regex=f"^{k} ").var(ddof=0).sum() for k in (1, 2)]
    np.testing.assert_allclose(sizes, 1)
    with pytest.raises(LabelError, match="missing among"):
        features.join(one, two, missing="zero")
    with pytest.raises(DataError, match="perturbations in common"):
        features.join(one, table("XY", x=[1, 2]))


def test_what_lacks_a_descriptor_is_reported_and_decided(modules):
    adata = screen(n=20, genes=20, contexts=("B",), perturbations=("g0", "g1", "g0+g1", "other"))
    partial = table(["g0", "g9"], x=[1, 2])
    report = features.coverage(partial, adata)
    assert report.attrs["share"] == pytest.approx(1 / 3)
    assert dict(zip(report["perturbation"], report["described"], strict=True)) == {
        "g1": False, "other": False, "g0": True,
    }  # fmt: skip
    assert dict(zip(report["perturbation"], report["cells"], strict=True)) == {
        "g0": 40,
        "g1": 40,
        "other": 20,
    }
    with pytest.raises(LabelError, match="none of 2 of them, such as .'g1', 'other'"):
        features.cover(partial, adata)
    marked = features.cover(partial, adata, missing="drop")
    assert marked.loc[["g1", "other"]].isna().all(axis=None) and features.described(marked) == ["g0", "g9"]
    by = table(["g0", "g9", "g1", "other"], x=[0, 10, 9, 1])
    filled = features.cover(partial, adata, missing="nearest", by=by)
    assert filled["x"].to_dict() == {"g0": 1, "g9": 2, "g1": 2, "other": 1}
    with pytest.raises(
        LabelError, match="such as .'other'"
    ):  # it is no gene: the controls do not describe it
        features.cover(partial, adata, missing="nearest")
    assert features.coverage(filled, adata)["described"].all()
    with pytest.raises(ModelError, match="'g0'"):
        features.described(table(["g0", "g0"], x=[1, 2]))
    with pytest.raises(ModelError, match="columns of numbers.*'kinase'"):
        features.described(pd.DataFrame({"kind": ["kinase", "other"]}, index=["g0", "g1"]))


def test_the_module_is_public():
    assert co.features is features and set(features.__all__) >= {"from_screen", "join", "cover"}
