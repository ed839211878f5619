"""The explorer's widgets, without a browser: each move asks one question, and the picture answers it."""

from __future__ import annotations

import threading

import anndata as ad
import numpy as np
import pytest

from cellop_nb.errors import CellopError, StorageError
from cellop_nb.notebook import style
from cellop_nb.notebook.explorer import N_GENES, NOTHING, Explorer
from cellop_nb.notebook.virtual import Question, leading


@pytest.fixture
def explorer(model, tmp_path) -> Explorer:
    return Explorer(model, folder=tmp_path)


def test_each_widget_asks_its_question(explorer):
    explorer.strength.value = 0.5
    assert explorer.question.strength == 0.5
    explorer.context.value = "type B"
    explorer.first.value = "drug 2"
    assert (explorer.question.context, explorer.question.perturbation) == ("type B", "drug 2")
    explorer.second.value = "drug 3"
    assert explorer.question.perturbation == "drug 2+drug 3"
    explorer.together.value = "second, then first"
    assert explorer.question.perturbation == ("drug 3", "drug 2")
    assert (explorer.first.value, explorer.second.value) == ("drug 2", "drug 3"), (
        "no list jumps under the hand"
    )
    explorer.second.value = NOTHING
    explorer.reverse.value = True
    assert explorer.question.reverse
    assert explorer.answer.question == explorer.question
    assert explorer.refusal == ""


def test_a_move_changes_the_picture_and_the_printed_energy(explorer):
    before = explorer.image.value, explorer.status.value
    explorer.strength.value = 0.25
    assert explorer.image.value != before[0]
    assert bytes(explorer.image.value).startswith(b"\x89PNG")
    assert f"{explorer.answer.energy:.3f}" in explorer.status.value
    assert explorer.status.value != before[1]


def test_a_refusal_is_said_and_the_picture_stays(explorer):
    before, question = explorer.image.value, explorer.question
    explorer.gene_box.value = "no such gene"
    assert "refused: " in explorer.status.value
    assert "a gene of the model" in explorer.refusal
    assert explorer.image.value == before
    assert explorer.question == question
    with pytest.raises(CellopError):
        explorer.show(perturbation="drug 9")
    assert explorer.question == question


def test_the_widgets_follow_a_call(explorer):
    explorer.show(perturbation=("drug 2", "drug 1"), strength=0.75, context="type B", gene="GENE0003")
    shown = [explorer.first.value, explorer.second.value, explorer.together.value, explorer.strength.value]
    assert shown == ["drug 2", "drug 1", "first, then second", 0.75]
    assert explorer.context.value == "type B"
    assert explorer.gene_box.value == explorer.answer.gene == "GENE0003"
    explorer.gene_box.value = ""
    assert explorer.answer.gene == explorer.answer.genes["gene"].iloc[0]


def test_moves_that_two_threads_handle_at_once_are_all_asked(explorer, monkeypatch):
    """ipykernel 7.4 does that with quick moves; the second comes while the first is being answered."""
    ask, asked, go_on = explorer.cells.ask, threading.Event(), threading.Event()

    def slowly(question, **given):
        asked.set()
        assert go_on.wait(10)
        return ask(question, **given)

    monkeypatch.setattr(explorer.cells, "ask", slowly)
    hands = [
        threading.Thread(target=setattr, args=(widget, "value", value))
        for widget, value in ((explorer.second, "drug 2"), (explorer.reverse, True))
    ]
    hands[0].start()
    assert asked.wait(10)
    hands[1].start()
    hands[1].join(0.2)  # it waits for its turn
    assert explorer.reverse.value
    go_on.set()
    for hand in hands:
        hand.join(10)
    assert explorer.question == Question("drug 1+drug 2", "type A", reverse=True)
    assert (explorer.second.value, explorer.reverse.value) == ("drug 2", True)
    assert explorer.answer.question == explorer.question


def test_a_refused_choice_is_asked_again_with_the_next_move(explorer):
    explorer.gene_box.value = "no such gene"
    explorer.strength.value = 0.5
    assert "a gene of the model" in explorer.refusal
    assert explorer.question.strength == 1.0, "nothing is shown that the widgets do not say"
    explorer.gene_box.value = ""
    assert explorer.question.strength == 0.5
    assert "refused" not in explorer.status.value


def test_export_writes_a_file_that_says_what_it_is(explorer, tmp_path):
    explorer.export_button.click()
    made = ad.read_h5ad(tmp_path / "virtual_cells.h5ad")
    assert made.uns["cellop_nb"]["prediction"]["perturbation"] == "drug 1"
    assert "saved" in explorer.status.value
    assert [path.name for path in tmp_path.iterdir()] == ["virtual_cells.h5ad"]
    first = (tmp_path / "virtual_cells.h5ad").read_bytes()
    explorer.export_button.click()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["virtual_cells.h5ad", "virtual_cells_2.h5ad"]
    with pytest.raises(StorageError, match="a new file"):
        explorer.export(tmp_path / "virtual_cells.h5ad")
    assert (tmp_path / "virtual_cells.h5ad").read_bytes() == first, "an export replaces none"


def test_every_control_has_words_and_a_place_in_the_tab_order(explorer):
    controls = explorer.panel.children[0].children
    assert all(widget.description for widget in controls)
    assert all(getattr(widget, "tabbable", None) is not False for widget in controls)


def test_the_explorer_shows_itself_and_a_still_picture(explorer):
    bundle = explorer._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "running kernel" in data["text/plain"]
    assert explorer.figure().alt == explorer.answer.sentence


def test_a_weaker_dose_shows_the_genes_of_the_stronger(explorer):
    sheet = explorer._sheet
    before = list(sheet.leaders)
    explorer.show(strength=0.1)
    assert sheet.leaders == before == list(leading(explorer.show(strength=1.0).genes, N_GENES)["gene"])
    assert len(before) == 2 * N_GENES


def test_genes_stand_from_the_largest_rise_to_the_largest_fall(explorer):
    shown = leading(explorer.answer.genes, 3)["change"].to_numpy()
    every = np.sort(explorer.answer.genes["change"].to_numpy())
    np.testing.assert_array_equal(shown, np.concatenate([every[-3:][::-1], every[:3][::-1]]))


def clouds(explorer):
    """The map, and its three clouds of cells by name."""
    ax = explorer._sheet.axes["map"]
    return ax, dict(zip(("start", "real", "moved"), ax.lines[:3], strict=True))


def test_all_clouds_of_another_context_are_drawn(explorer):
    for change in ({}, {"context": "type B"}, {"strength": 0.4}, {"reverse": True}):
        answer, (ax, drawn) = explorer.show(**change), clouds(explorer)
        for name, line in drawn.items():
            np.testing.assert_allclose(np.column_stack(line.get_data()), getattr(answer, name))
        (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
        for cloud in (answer.start, answer.moved, answer.real):
            assert (left < cloud.mean(0)[0] < right) and (low < cloud.mean(0)[1] < high)


def test_a_colour_says_what_cells_are_in_both_directions(explorer):
    assert clouds(explorer)[1]["start"].get_color() == style.CONTROL
    explorer.show(reverse=True)
    drawn = clouds(explorer)[1]
    assert (drawn["start"].get_color(), drawn["real"].get_color()) == (style.REAL, style.CONTROL)


def test_axes_only_grow_while_the_strength_moves(explorer):
    before = {name: ax.get_xlim() for name, ax in explorer._sheet.axes.items()}
    explorer.show(strength=0.2)
    for name in ("map", "genes", "energy"):
        low, high = explorer._sheet.axes[name].get_xlim()
        assert low <= before[name][0] and high >= before[name][1], name
