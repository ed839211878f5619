"""What objects say of themselves at the end of a cell: the numbers are theirs, and every word is text."""

from __future__ import annotations

import pickle
import re

import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup

import cellop_nb as co
from cellop_nb.display import Distances, History, Scores, card, styled
from cellop_nb.models.operators import Condition


def facts(html: str) -> dict[str, str]:
    """Rows of a card."""
    return dict(re.findall(r"<th[^>]*>(.*?)</th><td[^>]*>(.*?)</td>", html))


@pytest.fixture(scope="module")
def trainer():
    adata = co.datasets.synthetic(n_contexts=2, n_perturbations=2, n_cells=30, n_genes=20)
    co.split(adata)
    return co.VAETrainer(adata, co.new_vae(adata, n_latent=3), max_epochs=2, progress=False)


def test_a_card_shows_words_as_text_and_long_lists_short():
    html = card("<b>", {"a": ["<i>"] * 9, "b": 1234567, "c": 0.123456, "d": None}, note="x & y")
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    said = facts(html)
    assert said["a"] == ", ".join(["&lt;i&gt;"] * 6) + ", ... (9 in all)"
    assert (said["b"], said["c"]) == ("1,234,567", "0.1235")
    assert "d" not in said
    assert "x &amp; y" in html
    assert not re.search(r"color|background", html), "the page's own colours, light or dark"


def test_a_styled_table_shows_words_as_text():
    html = styled(pd.DataFrame({"<b>": ["<i>", "a"], "x": [0.123456, 7.0]}), precision=4).to_html()
    assert "&lt;b&gt;" in html and "&lt;i&gt;" in html and "<i>" not in html and "0.1235" in html


def test_a_trainer_tells_where_it_is(trainer):
    assert facts(trainer._repr_html_())["epochs"].startswith("0 of 2")
    trainer.change("kl_weight", 0.5 + 1e-15)
    trainer.fit()
    said = facts(trainer._repr_html_())
    assert said["status"] == "finished"
    assert said["best val_loss"] == f"{trainer.best_value:.4g} in epoch {trainer.best_epoch + 1}"
    assert said["changed by hand"] == "kl_weight 0.5 after step 0"
    assert f"val_loss {trainer.rows[-1]['val_loss']:.4g}" in said["last epoch"]


def test_a_vae_tells_its_sizes(trainer):
    said = facts(trainer.model._repr_html_())
    assert said["latent dimensions"] == "3"
    assert said["parameters"] == f"{sum(p.numel() for p in trainer.model.parameters()):,}"
    assert "(20 in all)" in said["genes"]


def test_an_operator_family_tells_its_largest_norm():
    family = co.OperatorModel(3, ["a", "b"], ["x"])
    with torch.no_grad():
        family.axis_left += 0.3 * torch.eye(3)
    norms = {name: family.operator(Condition((name,), "x")).norm for name in "ab"}
    worst = max(norms, key=norms.get)
    assert facts(family._repr_html_())["largest spectral norm"] == f"{norms[worst]:.3f} (x, {worst})"


def test_an_operator_tells_how_far_it_moves():
    operator = co.OperatorModel(3, ["a"], ["x"]).operator(Condition(("a",), "x"))
    said = facts(operator._repr_html_())
    assert said["largest singular value"] == "1"
    assert said["length of the shift"] == f"{float(operator.shift.norm()):.4g}"


# -- tables


def cells(html: str) -> list[list[str]]:
    """The rows of the second table of a view, its head first: the numbers themselves."""
    table = BeautifulSoup(html, "html.parser").find_all("table")[1]
    return [[cell.text for cell in row.find_all(["th", "td"])] for row in table.find_all("tr")]


def test_a_history_tells_its_best_epoch_and_what_was_changed():
    rows = [
        {"epoch": i, "seconds": 2.0, "cells_per_s": 100.0, "val_loss": loss}
        for i, loss in enumerate([5, 3, 4])
    ]
    rows[2]["by_hand"] = "kl_weight 0.5 after step 9"
    history = History(rows)
    history.monitor = "val_loss"
    said = facts(history._repr_html_())
    assert said == {
        "epochs": "3", "best epoch": "2 (val_loss 3)", "epochs since": "1", "seconds": "6",
        "cells per second": "100", "changed by hand": "epoch 3: kl_weight 0.5 after step 9",
    }  # fmt: skip
    head, *shown = cells(history._repr_html_())
    assert head == ["", "first", "best", "last"]
    assert ["val_loss", "5", "3", "4"] in shown


def test_a_split_tells_its_shares_and_what_is_held_out_whole():
    adata = co.datasets.synthetic(n_contexts=2, n_perturbations=1, n_cells=20, n_genes=20)
    table = co.split(adata, holdout={"cell_type": "type B", "perturbation": "drug 1"})
    said = facts(table._repr_html_())
    counts = adata.obs["split"].value_counts()
    for part, count in counts.items():
        assert said[part] == f"{count:,} cells ({100 * count / adata.n_obs:.0f} %)"
    assert said["held out whole"] == "type B, drug 1"
    assert len(cells(table._repr_html_())) - 1 == len(table) == 4


def test_scores_show_means_over_groups_in_their_order():
    rows = [
        {"group": group, "method": method, "metric": "mae", "value": value, "reason": ""}
        for group, values in (("g", (3.0, 1.0)), ("h", (5.0, 2.0)))
        for method, value in zip(("no change", "a model"), values, strict=True)
    ]
    rows[0] |= {"value": float("nan"), "reason": "too few cells"}
    html = Scores(rows)._repr_html_()
    said, shown = facts(html), cells(html)
    assert said["groups"] == "g, h"
    assert said["without a value"] == "1 of 4; too few cells"
    assert shown[0][-1] == "mae"  # over the one group that both methods have
    assert shown[-2:] == [["no change", "5.0"], ["a model", "2.0"]]


def test_distances_show_means_and_how_many_groups_lie_within_the_noise():
    values = {"no change": (0.5, 0.7), "operator": (0.1, 0.3), "inverse": (float("nan"), 0.2)}
    rows = [
        {"group": group, "method": method, "energy": value, "floor": 0.01, "limit": limit}
        for method, pair in values.items()
        for group, value, limit in zip(("g", "h"), pair, (0.1, 0.2), strict=True)
    ]
    html = Distances(rows)._repr_html_()
    said, shown = facts(html), cells(html)
    assert said["groups"] == "g, h"
    assert said["energy"].startswith("Euclidean, U-statistic")
    assert shown[0] == ["", "energy", "floor", "limit", "groups within the limit"]
    assert shown[2:] == [
        ["no change", "0.6", "0.01", "0.15", "0 of 2"],
        ["operator", "0.2", "0.01", "0.15", "1 of 2"],
        ["inverse", "0.2", "0.01", "0.20", "1 of 1"],
    ]


@pytest.mark.parametrize("kind", ["history", "split", "scores"])
def test_a_table_is_a_data_frame_and_gives_plain_ones(trainer, kind, tmp_path):
    trainer.fit()
    scores = Scores({"group": ["g"], "method": ["m"], "metric": ["x"], "value": [1.0]})
    split = co.split(co.datasets.synthetic(n_contexts=2, n_perturbations=1, n_cells=20, n_genes=20))
    table = {"history": trainer.history, "split": split, "scores": scores}[kind]
    plain = pd.DataFrame(table)
    assert isinstance(table, pd.DataFrame)
    assert (
        type(plain)
        is type(table.head(1))
        is type(table.copy())
        is type(table[table.columns[:2]])
        is pd.DataFrame
    )
    pd.testing.assert_frame_equal(table, plain)
    table.to_csv(tmp_path / "t.csv", index=False)
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "t.csv"), plain, check_dtype=False, check_categorical=False
    )
    assert pickle.loads(pickle.dumps(table)).equals(table)
    table.drop(columns=table.columns[0], inplace=True)
    assert "<table" in table._repr_html_(), "without its own columns it shows as any other"


def test_an_empty_table_is_shown_as_such():
    assert History([])._repr_html_() == pd.DataFrame()._repr_html_()
