"""What objects say of themselves at the end of a cell: the numbers are theirs, and every word is text."""

from __future__ import annotations

import re

import pytest
import torch

import cellop_nb as co
from cellop_nb.views import card


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


def test_a_trainer_tells_where_it_is(trainer):
    assert facts(trainer._repr_html_())["epochs"].startswith("0 of 2")
    trainer.change("kl_weight", 0.5)
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
    norms = {name: family.norm(co.Condition((name,), "x")) for name in "ab"}
    worst = max(norms, key=norms.get)
    assert facts(family._repr_html_())["largest spectral norm"] == f"{norms[worst]:.3f} (x, {worst})"


def test_an_operator_tells_how_far_it_moves():
    operator = co.OperatorModel(3, ["a"], ["x"]).operator(co.Condition(("a",), "x"))
    said = facts(operator._repr_html_())
    assert said["largest singular value"] == "1"
    assert said["length of the shift"] == f"{float(operator.shift.norm()):.4g}"


@pytest.mark.parametrize("table", ["history", "split"])
def test_tables_are_shown_as_tables(trainer, table):
    adata = co.datasets.synthetic(n_contexts=2, n_perturbations=1, n_cells=20, n_genes=20)
    shown = trainer.history if table == "history" else co.split(adata)
    assert "<table" in shown._repr_html_()
