"""Groups match controls inside a context, and draws are without replacement and fair."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from cellop_nb.data.contract import Keys
from cellop_nb.data.groups import Draws, Groups, prime_from
from cellop_nb.errors import DataError, LabelError


def numbered(contexts: list[str], perturbations: list[str], **columns) -> AnnData:
    """Cells whose one latent is their row number."""
    obs = pd.DataFrame({"cell_type": contexts, "perturbation": perturbations, **columns})
    obs.index = [f"c{k}" for k in range(len(obs))]
    adata = AnnData(np.ones((len(obs), 1), dtype=np.float32), obs=obs)
    adata.obsm["X_nbvae"] = np.arange(len(obs), dtype=np.float32)[:, None]
    return adata


def groups(
    adata: AnnData, *, use_rep="X_nbvae", split=None, control_split=None, min_cells=2, **keys
) -> Groups:
    """The index of these cells, under the usual keys or others."""
    Keys(**keys).write(adata)
    return Groups(adata, use_rep=use_rep, split=split, control_split=control_split, min_cells=min_cells)


labels = st.lists(
    st.tuples(st.sampled_from("AB"), st.sampled_from(["control", "p", "q"])), min_size=8, max_size=60
)


@settings(max_examples=40, deadline=None)
@given(labels, st.one_of(st.none(), st.integers(1, 9)), st.integers(0, 10**6))
def test_groups_never_mix_contexts_or_sides(cells, n_cells, seed):
    cells = cells + [(c, p) for c in "AB" for p in ("control", "p") for _ in range(2)]
    adata = numbered([c for c, _ in cells], [p for _, p in cells])
    screen = groups(adata)
    sample = screen.sample(n_cells, torch.Generator().manual_seed(seed))
    controls = sample.control[:, 0].long().split(sample.control_sizes)
    perturbed = sample.perturbed[:, 0].long().split(sample.perturbed_sizes)
    for group, left, right in zip(screen, controls, perturbed, strict=True):
        assert {cells[k] for k in left.tolist()} == {(group.context, "control")}
        assert {cells[k] for k in right.tolist()} == {(group.context, group.perturbation)}
        for drawn, available in ((left, cells.count((group.context, "control"))), (right, len(group))):
            assert len(set(drawn.tolist())) == len(drawn) == min(n_cells or available, available)
    for group in screen:
        np.testing.assert_array_equal(group.cells[:, 0].numpy(), group.rows)
    for context, rows in screen.control_rows.items():
        np.testing.assert_array_equal(screen.control[context][:, 0].numpy(), rows)


def test_table_and_labels():
    adata = numbered(list("AAAAAABBBB"), ["control"] * 3 + ["p"] * 3 + ["control"] * 2 + ["p"] * 2)
    screen = groups(adata)
    assert screen.labels == ["A, p", "B, p"]
    assert screen.table()[["cells", "controls"]].to_numpy().tolist() == [[3, 3], [2, 2]]
    assert screen.contexts == ["A", "B"] and screen.perturbations == ["p"] and screen.dim == 1
    assert "2 groups" in repr(screen)


def test_doses_and_several_context_columns():
    adata = numbered(
        ["A"] * 8,
        ["control"] * 2 + ["p"] * 4 + ["q"] * 2,
        donor=list("xxxxxxxx"),
        dose=[0, 0, 1, 1, 0.5, 0.5, 2, 2],
    )
    screen = groups(adata, context_key=("cell_type", "donor"), dose_key="dose")
    assert screen.labels == ["A | x, p @ 0.5", "A | x, p @ 1", "A | x, q"]
    assert [group.dose for group in screen] == [0.5, 1, 2]
    assert screen.strongest("A | x", "p").dose == 1
    assert groups(adata, context_key=None).labels == ["all, p", "all, q"]


def test_which_names_the_groups_to_draw():
    adata = numbered(list("AAAABBBB"), ["control", "control", "p", "p"] * 2)
    sample = groups(adata).sample(None, which=[1])
    assert sample.perturbed[:, 0].tolist() == [6, 7] and sample.control[:, 0].tolist() == [4, 5]
    assert sample.which == [1]


def test_equal_generators_draw_equal_cells():
    adata = numbered(["A"] * 200, ["control"] * 100 + ["p"] * 100)
    screen = groups(adata)
    one, two = (screen.sample(20, torch.Generator().manual_seed(3)).perturbed for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, screen.sample(20, torch.Generator().manual_seed(4)).perturbed)


def test_draws_are_fair_to_cells_and_pairs():
    # 100 cells, 20 drawn: each cell in 1/5 of the draws, each pair in 20*19/(100*99) of them
    draws, generator = Draws([100], [0]), torch.Generator().manual_seed(0)
    cells, pairs = np.zeros(100), np.zeros((100, 100))
    for _ in range(4000):
        drawn = draws.draw([0], 20, generator)[0].numpy()
        cells[drawn] += 1
        pairs[np.ix_(drawn, drawn)] += 1
    np.testing.assert_allclose(cells / 4000, 0.2, atol=0.03)
    pair_share = pairs[~np.eye(100, dtype=bool)] / 4000
    expected = 20 * 19 / (100 * 99)
    # binomial noise alone has a spread of sqrt(expected / 4000)
    assert abs(pair_share.mean() - expected) < 1e-9
    assert pair_share.std() < 1.6 * np.sqrt(expected / 4000)


def test_first_place_is_uniform():
    draws, generator = Draws([8], [5]), torch.Generator().manual_seed(0)
    first = Counter(int(draws.draw([0], 3, generator)[0][0]) for _ in range(4000))
    assert set(first) == set(range(5, 13))
    assert min(first.values()) > 400


@pytest.mark.parametrize(("number", "prime"), [(1, 2), (2, 2), (8, 11), (97, 97), (7908, 7919)])
def test_prime_from(number, prime):
    assert prime_from(number) == prime


@pytest.fixture
def split_screen():
    """Context B: its perturbed cells are test, its controls are not; A has all three splits."""
    contexts, perturbations = (
        list("A" * 12 + "B" * 6),
        ["control"] * 6 + ["p"] * 6 + ["control"] * 3 + ["p"] * 3,
    )
    splits = ["train", "train", "val", "val", "test", "test"] * 2 + ["train", "train", "val"] + ["test"] * 3
    return numbered(contexts, perturbations, split=splits)


def test_training_groups_read_training_cells_only(split_screen):
    screen = groups(split_screen, split="train")
    assert screen.labels == ["A, p"]
    assert screen.items[0].rows.tolist() == [6, 7] and screen.control_rows["A"].tolist() == [0, 1]


def test_held_out_context_starts_from_its_own_controls(split_screen):
    screen = groups(split_screen, split="test")
    assert {context: rows.tolist() for context, rows in screen.control_rows.items()} == {
        "A": [4, 5],
        "B": [12, 13, 14],
    }
    assert [group.rows.tolist() for group in screen] == [[10, 11], [15, 16, 17]]


def test_controls_from_named_splits(split_screen):
    screen = groups(split_screen, split="val", control_split=("train", "val"))
    assert screen.control_rows["A"].tolist() == [0, 1, 2, 3]


def test_training_never_borrows_controls_from_other_splits(split_screen):
    split_screen.obs.loc["c0", "split"] = "val"
    with pytest.raises(DataError, match="at least 2 control cells in every context.*1 in context 'A'"):
        groups(split_screen, split="train")


def test_small_groups_are_left_out_by_name():
    adata = numbered(["A"] * 7, ["control"] * 3 + ["p"] * 3 + ["q"])
    assert groups(adata).dropped.to_numpy().tolist() == [["A", "q", 1]]
    with pytest.raises(DataError, match="at least one perturbed group"):
        groups(adata, min_cells=4)


def broken_latents(adata):
    adata.obsm["X_nbvae"][3] = np.nan
    return {}


BAD = [
    (lambda a: {"use_rep": "X_nbvea"}, DataError, "did you mean 'X_nbvae'"),
    (lambda a: {"use_rep": np.ones((3, 2))}, DataError, r"shape \(6, d\).*shape \(3, 2\)"),
    (broken_latents, DataError, "finite latents.*Found 1 cell with.*'c3'"),
    (lambda a: {"control": "ctrl"}, LabelError, "control cells 'ctrl'.*did you mean 'control'"),
    (lambda a: {"split": "train"}, LabelError, "a column 'split' in obs"),
    (lambda a: {"context_key": ("celltype",)}, LabelError, "did you mean 'cell_type'"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), BAD)
def test_bad_input_is_refused(spoil, error, message):
    adata = numbered(["A"] * 6, ["control"] * 3 + ["p"] * 3)
    with pytest.raises(error, match=message):
        groups(adata, **spoil(adata))


def test_context_without_controls_is_refused():
    adata = numbered(list("AAAABB"), ["control", "control", "p", "p", "p", "p"])
    with pytest.raises(DataError, match="0 in context 'B'"):
        groups(adata)


def test_real_screen_has_its_groups(kang_file):
    import anndata

    adata = anndata.read_h5ad(kang_file)
    adata.obsm["X_nbvae"] = np.zeros((adata.n_obs, 2))
    table = groups(adata).table()
    expected = adata.obs.groupby(["cell_type", "perturbation"], observed=True).size().unstack()
    assert dict(zip(table["context"], table["cells"], strict=True)) == expected["IFNb"].to_dict()
    assert dict(zip(table["context"], table["controls"], strict=True)) == expected["control"].to_dict()


def test_a_context_with_controls_alone_is_in_the_index():
    adata = numbered(list("AAAABB"), ["control", "control", "p", "p", "control", "control"])
    screen = groups(adata)
    assert screen.contexts == ["A", "B"] and screen.pairs == [("A", "p")]
    assert screen.controls("B").tolist() == [4, 5] and screen.rows("B", "p").tolist() == []
    assert screen.contexts_of("p") == ["A"]
    with pytest.raises(LabelError, match="a context with control cells.*'C'"):
        screen.controls("C")


def test_means_are_those_of_a_loop_over_groups():
    rng = np.random.default_rng(0)
    adata = numbered(list("AAAABBBBBB"), ["control", "control", "p", "p", "control", "control", *"pqpq"])
    for cells in (rng.normal(size=(10, 3)), sparse.csr_matrix(rng.poisson(1.0, (10, 3)))):
        screen = groups(adata)
        means, controls = screen.means(cells)
        dense = cells.toarray() if sparse.issparse(cells) else cells
        expected = [dense[group.rows].mean(0) for group in screen]
        np.testing.assert_allclose(means, expected)
        np.testing.assert_allclose(controls, [dense[screen.controls(c)].mean(0) for c in screen.contexts])


def test_an_index_without_latents_knows_its_rows():
    adata = numbered(list("AAAA"), ["control", "control", "p", "p"])
    screen = groups(adata, use_rep=None)
    assert screen.dim == 0 and screen.rows("A", "p").tolist() == [2, 3]


def test_data_that_were_not_set_up_are_refused_with_the_likely_call():
    adata = numbered(["A"] * 4, ["control"] * 2 + ["p"] * 2, condition=["x"] * 4, celltype=["A"] * 4)
    adata.obs = adata.obs[["condition", "celltype"]]
    with pytest.raises(
        LabelError, match="set up.*setup\\(adata, perturbation_key='condition', context_key='celltype'"
    ):
        Groups(adata)


def test_many_groups_are_indexed_in_linear_time():
    """Work is counted, not timed: no pass over all cells or all groups may happen once per group."""
    n = 3000
    adata = numbered(["A"] * (2 * n + 2), ["control"] * 2 + [f"p{k}" for k in range(n) for _ in range(2)])
    calls = Counter()

    def count(frame, event, _):
        calls[event] += event == "call" and "groups.py" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        screen = groups(adata)
    finally:
        sys.setprofile(None)
    assert len(screen) == n and calls["call"] < 20 * n
