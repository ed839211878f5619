"""The report: one page that stands alone, made of what model and hold-out say, whatever the labels are."""

from __future__ import annotations

import json
import re
from html import unescape

import pandas as pd
import pytest

import cellop_nb as co
from cellop_nb.errors import ModelError, StorageError
from cellop_nb.notebook import report as page
from tests.analysis.screens import screen, tiny

NASTY = "<script>alert(1)</script>&"
CONTROL = "<script>vehicle"


@pytest.fixture(scope="module")
def fitted():
    """A model of a screen with a context of controls alone, and a hold-out of another."""
    adata = screen(n=30, contexts=("B", "NK", "T", "M"), perturbations=("ifn", NASTY))
    adata.obs["perturbation"] = adata.obs["perturbation"].replace("control", CONTROL)
    co.setup(adata, control=CONTROL)
    hidden = (adata.obs["cell_type"] == "M") & (adata.obs["perturbation"] != CONTROL)
    model = tiny(adata[~hidden].copy()).fit(progress=False)
    return model, co.holdout(tiny(adata), only=["M"], metrics=["e_distance"], progress=False)


@pytest.fixture(scope="module")
def text(fitted, tmp_path_factory):
    path = co.report(*fitted, out=tmp_path_factory.mktemp("report") / "report.html")
    return path.read_text(encoding="utf-8")


def test_it_says_what_model_and_holdout_say(fitted, text):
    model, holdout = fitted
    said = unescape(text)
    for perturbation in ("ifn", NASTY):
        assert model.verdict("M", perturbation) in said
        leading = model.intervals("M", perturbation).iloc[0]
        assert f"{leading.gene} {leading.change:+.2f} ({leading.low:+.2f} to {leading.high:+.2f})" in said
    energy = holdout.summary().loc["M, ifn"]
    assert f"(energy distance {energy['CellOp']:.2f}; " in said
    assert str(model.choice) in said


def test_it_stands_alone_and_labels_are_no_markup(text):
    assert "<script" not in text
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", text)
    pictures = re.findall(r'<img width="\d+" src="data:image/png;base64,[^"]+" alt="[^"]+">', text)
    assert len(pictures) == text.count("<img") == 2


def test_an_earlier_report_is_replaced_and_another_file_is_not(fitted, tmp_path):
    model, _ = fitted
    path = co.report(model, out=tmp_path / "report.html")
    assert co.report(model, out=path) == path
    (tmp_path / "mine.html").write_text("my own page")
    with pytest.raises(StorageError, match="an earlier report"):
        co.report(model, out=tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "my own page"


def test_an_unfitted_model_has_nothing_to_report(tmp_path):
    with pytest.raises(ModelError, match="fitted"):
        co.report(tiny(screen()), out=tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_notebooks_beside_it_are_linked_with_their_answers(fitted, tmp_path):
    path = co.report(fitted[0], out=tmp_path / "report.html")
    assert "The notebooks" not in path.read_text()
    (tmp_path / "01_data.ipynb").write_text("{}")
    (tmp_path / "01_data").mkdir()
    (tmp_path / "01_data" / "metrics.json").write_text(json.dumps({"answer": f"**2** of {NASTY}"}))
    for _ in range(2):
        page.link_notebooks(path)
    text = path.read_text()
    assert text.count('<a href="01_data.ipynb">01_data</a>: 2 of &lt;script&gt;') == 1


def test_of_many_groups_the_strongest_and_the_weakest_are_named(tmp_path):
    labels = [f"p{k:03d}" for k in range(150)]
    adata = screen(n=4, genes=12, contexts=("B", "T"), perturbations=labels)
    text = co.report(tiny(adata).fit(progress=False), out=tmp_path / "report.html").read_text()
    assert len(re.findall(r"\bp\d{3} in ", text)) < 100
    assert "of 300 groups" in text and "of 300 questions" in text
    assert len(text) < 1_000_000


def test_held_out_groups_get_a_verdict_though_they_were_measured(fitted):
    model, _ = fitted
    scored = pd.DataFrame(
        {"no change": [2.0, 2.0], "mean shift": [1.0, 1.0], "CellOp": [0.5, 2.5]},
        index=pd.MultiIndex.from_tuples([("B", "ifn"), ("T", "ifn")]),
    )
    asked, _ = page._questions(model, scored)
    assert {("B", "ifn"), ("T", "ifn"), ("M", "ifn")} <= {*asked} and ("NK", "ifn") not in asked
    assert "explains 75 % of the change" in page._checked(scored, "B", "ifn")
    assert "is no nearer than untreated cells" in page._checked(scored, "T", "ifn")
