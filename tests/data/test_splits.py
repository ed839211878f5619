"""Splits hold out what was named, nothing else, and refuse what cannot work."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from cellop_nb.data.contract import Keys
from cellop_nb.data.splits import outside_test, rows_of, split
from cellop_nb.errors import HoldoutError, LabelError

CONTEXTS, PERTURBATIONS, DONORS = ("B", "NK"), ("control", "p", "q", "p+q"), ("d1", "d2", "d3")


def table_of(cells: list[tuple[str, str, str]]) -> AnnData:
    obs = pd.DataFrame(
        cells, columns=["cell_type", "perturbation", "donor"], index=[f"c{k}" for k in range(len(cells))]
    )
    adata = AnnData(np.ones((len(cells), 1), dtype=np.float32), obs=obs)
    Keys().write(adata)
    return adata


def full_screen(repeats: int = 4) -> AnnData:
    return table_of(
        [(c, p, d) for c in CONTEXTS for p in PERTURBATIONS for d in DONORS for _ in range(repeats)]
    )


cells = st.lists(
    st.tuples(st.sampled_from(CONTEXTS), st.sampled_from(PERTURBATIONS), st.sampled_from(DONORS)), max_size=60
)
holdouts = st.fixed_dictionaries(
    {},
    optional={
        "cell_type": st.sampled_from(CONTEXTS),
        "perturbation": st.lists(st.sampled_from(PERTURBATIONS[1:]), min_size=1, max_size=3, unique=True),
        "donor": st.sampled_from(DONORS),
    },
)


@settings(max_examples=50, deadline=None)
@given(cells, holdouts, st.floats(0, 0.5), st.integers(0, 10**6))
def test_a_holdout_is_exactly_the_matching_perturbed_cells(more, holdout, val_fraction, seed):
    base = [(c, p, d) for c in CONTEXTS for p in PERTURBATIONS for d in DONORS]
    adata = table_of(base + more)
    everything = {(c, p, d) for c in CONTEXTS for p in PERTURBATIONS[1:] for d in DONORS}
    as_lists = {key: value if isinstance(value, list) else [value] for key, value in holdout.items()}
    hit = {
        t
        for t in everything
        if all(t[["cell_type", "perturbation", "donor"].index(k)] in v for k, v in as_lists.items())
    }
    if not holdout or hit == everything:
        with pytest.raises(HoldoutError):
            split(adata, holdout=holdout, seed=seed)
        return
    table = split(adata, holdout=holdout, val_fraction=val_fraction, seed=seed)
    held_out = set(adata.obs_names[rows_of(adata, "test")])
    assert held_out == {name for name, *cell in adata.obs.itertuples(name=None) if tuple(cell[:3]) in hit}
    parts = [rows_of(adata, name) for name in ("train", "val", "test") if (adata.obs["split"] == name).any()]
    assert sorted(np.concatenate(parts)) == list(range(adata.n_obs))
    assert table[["train", "val", "test"]].to_numpy().sum() == adata.n_obs


@settings(max_examples=40, deadline=None)
@given(cells, st.floats(0, 0.4), st.floats(0, 0.4), st.integers(0, 10**6))
def test_random_cells_are_shared_out_inside_each_group(more, test_fraction, val_fraction, seed):
    adata = table_of([(c, p, "d1") for c in CONTEXTS for p in PERTURBATIONS] + more)
    table = split(adata, test_fraction=test_fraction, val_fraction=val_fraction, seed=seed)
    size = table[["train", "val", "test"]].sum(axis=1)
    assert (table["train"] >= 1).all()
    assert (abs(table["test"] - size * test_fraction) <= 1).all()
    assert (abs(table["val"] - (size - table["test"]) * val_fraction) <= 1).all()


def test_seeded():
    one, two, other = full_screen(), full_screen(), full_screen()
    for adata, seed in ((one, 5), (two, 5), (other, 6)):
        split(adata, seed=seed)
    assert one.obs["split"].equals(two.obs["split"])
    assert not one.obs["split"].equals(other.obs["split"])
    assert one.uns["cellop_nb"]["split"]["seed"] == 5


def test_written_split_survives_a_file(tmp_path):
    import anndata

    adata = full_screen()
    split(adata, holdout={"donor": "d1"})
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert list(again.obs["split"].cat.categories) == ["train", "val", "test"]
    assert list(again.uns["cellop_nb"]["split"]["holdout"]["donor"]) == ["d1"]


def test_controls_stay_unless_asked_for():
    adata = full_screen()
    split(adata, holdout={"donor": "d1"})
    held = adata.obs[adata.obs["split"] == "test"]
    assert set(held["donor"]) == {"d1"} and "control" not in set(held["perturbation"])
    split(adata, holdout={"donor": "d1"}, holdout_controls=True)
    held = adata.obs[adata.obs["split"] == "test"]
    assert "control" in set(held["perturbation"])
    split(adata, holdout={"donor": "d1", "perturbation": ["control", "p"]})
    held = adata.obs[adata.obs["split"] == "test"]
    assert set(held["perturbation"]) == {"control", "p"}


def test_names_with_a_plus_are_held_out_as_they_are():
    adata = full_screen()
    names = {"p": "(+)-JQ1", "q": "anti-CD3+CD28", "p+q": "(+)-JQ1+anti-CD3+CD28"}
    adata.obs["perturbation"] = adata.obs["perturbation"].replace(names)
    split(adata, holdout={"perturbation": "anti-CD3+CD28"})
    assert set(adata.obs["perturbation"][adata.obs["split"] == "test"]) == {"anti-CD3+CD28"}


def test_a_single_may_be_held_out_while_its_combination_trains():
    adata = full_screen()
    split(adata, holdout={"perturbation": "p"})
    assert set(adata.obs["perturbation"][adata.obs["split"] == "test"]) == {"p"}


def repeated_name(adata):
    adata.obs_names = ["c0", *adata.obs_names[:-1]]
    adata.obs["perturbation"] = ["control"] * 95 + ["p"]
    adata.obs.iloc[0, 1], adata.obs.iloc[1, 1] = "p", "q"
    adata.obs.iloc[0, 2], adata.obs.iloc[1, 2] = "d1", "d2"
    return {"holdout": {"donor": "d1", "perturbation": "p"}}


def reordered(adata):
    adata.obs.loc["c40", "perturbation"] = "q+p"
    return {"holdout": {"perturbation": "p+q"}}


def unmatched_pair(adata):
    adata.obs.loc[(adata.obs["cell_type"] == "B") & (adata.obs["perturbation"] == "p"), "perturbation"] = "q"
    return {"holdout": {"cell_type": "B", "perturbation": "p"}}


BAD = [
    (lambda a: {"holdout": {"perturbation": "P"}}, LabelError, "did you mean 'p'"),
    (lambda a: {"holdout": {"celltype": "B"}}, LabelError, "did you mean 'cell_type'"),
    (lambda a: {"holdout": {"cell_type": ["B", "nk"]}}, LabelError, "'nk'.*did you mean 'NK'"),
    (lambda a: {"holdout": {}}, HoldoutError, "an empty one"),
    (lambda a: {"holdout": {"perturbation": "control"}}, HoldoutError, "with perturbed cells.*none match"),
    (unmatched_pair, HoldoutError, "with perturbed cells.*none match"),
    (lambda a: {"holdout": {"cell_type": ["B", "NK"]}}, HoldoutError, "all 72 perturbed cells"),
    (
        lambda a: {"holdout": {"cell_type": "B"}, "holdout_controls": True},
        HoldoutError,
        r"no control.*\['B'\]",
    ),
    (reordered, HoldoutError, r"'q\+p', the same combination, in training"),
    (repeated_name, HoldoutError, "1 cell name on both sides, such as 'c0'"),
    (lambda a: Keys(control="Control").write(a) or {}, LabelError, "did you mean 'control'"),
    (lambda a: a.uns.clear() or {}, LabelError, "a screen that was set up"),
    (lambda a: {"val_fraction": 1.0}, HoldoutError, "val_fraction in"),
    (lambda a: {"test_fraction": -0.1}, HoldoutError, "test_fraction in"),
    (lambda a: {"test_fraction": 0.6, "val_fraction": 0.4}, HoldoutError, "some cells left for training"),
    (lambda a: Keys(context_key=("tissue",)).write(a) or {}, LabelError, "a column 'tissue'"),
]


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
@pytest.mark.parametrize(("spoil", "error", "message"), BAD)
def test_bad_splits_are_refused_and_nothing_is_written(spoil, error, message):
    adata = full_screen()
    arguments = spoil(adata)
    with pytest.raises(error, match=message):
        split(adata, **arguments)
    assert "split" not in adata.obs


def test_rows_of_an_absent_split():
    adata = full_screen()
    split(adata, test_fraction=0)
    with pytest.raises(LabelError, match="cells of split 'test'"):
        rows_of(adata, "test")
    assert len(rows_of(adata, ("train", "val"))) == adata.n_obs


def test_real_held_out_cell_type(kang_file):
    import anndata

    adata = anndata.read_h5ad(kang_file)
    Keys().write(adata)
    table = split(adata, holdout={"cell_type": "CD4 T", "perturbation": "IFNb"}).set_index(
        ["context", "perturbation"]
    )
    assert table.loc[("CD4 T", "IFNb"), ["train", "val"]].sum() == 0
    assert table["test"].sum() == table.loc[("CD4 T", "IFNb"), "test"] == 497


def test_a_split_is_written_and_read(tmp_path):
    """Cells in another order, and more in the file than here: the same split, or a reason."""
    adata, file = full_screen(), tmp_path / "split.csv"
    table = split(adata, holdout={"cell_type": "B", "perturbation": "p"}, seed=3)
    adata.obs["split"].to_csv(file)
    other = adata[::-1][: adata.n_obs - 5].copy()
    del other.obs["split"]
    assert split(other, holdout=file)["test"].sum() == table["test"].sum()
    pd.testing.assert_series_equal(other.obs["split"], adata.obs["split"][other.obs_names])
    assert other.uns["cellop_nb"]["split"]["file"] == str(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.set_axis([f"x{k}" for k in range(len(s))]), "a split of every cell.*'c0'.*'x0'"),
        (lambda s: s.replace("val", "valid"), "splits named.*'valid'"),
        (lambda s: s.set_axis(["c0"] * len(s)), "names that repeat"),
        (lambda s: s.replace("test", "train"), "perturbed cells.*none match"),
        (lambda s: s.replace("train", "test").replace("val", "test"), "left for training"),
    ],
    ids=range(5),
)
def test_a_split_that_cannot_work_is_not_read(change, message, tmp_path):
    adata, file = full_screen(), tmp_path / "split.csv"
    split(adata, holdout={"cell_type": "B", "perturbation": "p"})
    before = adata.obs["split"].copy()
    change(before.astype(str)).to_csv(file)
    with pytest.raises(HoldoutError, match=message) as caught:
        split(adata, holdout=file)
    assert "To fix it" in str(caught.value) and (adata.obs["split"] == before).all()


def test_every_group_keeps_a_cell_for_training_and_val_may_train_a_predictor():
    adata = full_screen(1)
    assert (split(adata, test_fraction=0.0, val_fraction=0.9)["train"] >= 1).all()
    split(adata, holdout={"donor": "d1"}, val_fraction=0.5)
    labels = adata.obs["split"]
    assert set(labels) == {"train", "val", "test"} and (outside_test(adata) == (labels != "test")).all()
