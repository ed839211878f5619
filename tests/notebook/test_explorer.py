"""The explorer's widgets, without a browser: each move asks one question, and the picture answers it."""

from __future__ import annotations

import threading

import anndata as ad
import numpy as np
import pytest

from cellop_nb.errors import CellopError, DataError, StorageError
from cellop_nb.notebook import style
from cellop_nb.notebook.explorer import N_GENES, NOTHING, Explorer
from cellop_nb.notebook.virtual import Question, VirtualCells, leading


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


def test_three_perturbations_stay_while_the_strength_moves(explorer):
    """The lists can say two."""
    three = ("drug 1", "drug 2", "drug 3")
    explorer.show(perturbation=three)
    explorer.strength.value = 0.5
    assert explorer.question == Question(three, "type A", 0.5)
    explorer.first.value = "drug 3"
    assert explorer.question.perturbation == ("drug 3", "drug 2")


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


def test_likely_questions_are_answered_beforehand(model, monkeypatch):
    """The present context first, one answer each; none where no time is given; a refusal breaks nothing."""
    asked = []
    answer = VirtualCells.ask

    def ask(cells, question, *, gene=None):
        asked.append((question.context, question.perturbation))
        if asked[-1] == ("type B", "drug 2") and len(asked) > 2:
            raise DataError("made up")
        return answer(cells, question, gene=gene)

    monkeypatch.setattr(VirtualCells, "ask", ask)
    shown = Explorer(model, context="type B", perturbation="drug 3", prepare=60)
    drugs = ("drug 1", "drug 2", "drug 3")
    wanted = [(place, name) for place in ("type B", "type A") for name in drugs]
    assert asked == [("type B", "drug 3"), *wanted]
    assert shown.question == Question("drug 3", "type B")
    asked.clear()
    Explorer(model, prepare=0)
    assert asked == [("type A", "drug 1")]


def test_a_weaker_dose_shows_the_genes_of_the_stronger(explorer):
    genes = explorer._sheet.genes
    before = list(genes.leaders)
    explorer.show(strength=0.1)
    assert genes.leaders == before == list(leading(explorer.show(strength=1.0).genes, N_GENES)["gene"])
    assert len(before) == 2 * N_GENES


def test_genes_stand_from_the_largest_rise_to_the_largest_fall(explorer):
    shown = leading(explorer.answer.genes, 3)["change"].to_numpy()
    every = np.sort(explorer.answer.genes["change"].to_numpy())
    np.testing.assert_array_equal(shown, np.concatenate([every[-3:][::-1], every[:3][::-1]]))


def test_all_clouds_of_another_context_are_drawn(explorer):
    for change in ({}, {"context": "type B"}, {"strength": 0.4}, {"reverse": True}):
        answer, view = explorer.show(**change), explorer._sheet.map
        for name, line in view.clouds.items():
            np.testing.assert_allclose(np.column_stack(line.get_data()), getattr(answer, name))
        (left, right), (low, high) = view.ax.get_xlim(), view.ax.get_ylim()
        for cloud in (answer.start, answer.moved, answer.real):
            assert (left < cloud.mean(0)[0] < right) and (low < cloud.mean(0)[1] < high)


def test_a_colour_says_what_cells_are_in_both_directions(explorer):
    view = explorer._sheet.map
    assert view.clouds["start"].get_color() == style.CONTROL
    explorer.show(reverse=True)
    assert (view.clouds["start"].get_color(), view.clouds["real"].get_color()) == (style.REAL, style.CONTROL)


def test_ground_is_painted_anew_only_where_it_changed(explorer):
    explorer.show(strength=0.9)
    ground = explorer._sheet.ground
    explorer.show(strength=0.8)
    assert explorer._sheet.ground is ground, "a slider moves cells, not the axes"
    live = explorer._sheet.png()
    explorer._sheet.ground = None
    assert explorer._sheet.png() == live, "copied or painted anew, it is the same picture"
