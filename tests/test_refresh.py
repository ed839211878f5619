"""The committed notebooks executed again in place: outputs stay, noise goes, a failure changes nothing."""

from __future__ import annotations

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from docs.refresh import clean, refresh


def test_outputs_and_counts_stay_and_noise_goes(tmp_path, write_notebook):
    noisy = "import sys; sys.stderr.write('50 %'); print(seed)"
    path = write_notebook(tmp_path / "90_mine.ipynb", "seed = 3", noisy, "seed + 1")
    refresh(path)
    book = nbformat.read(path, 4)
    code = book.cells
    assert [cell.execution_count for cell in code] == [1, 2, 3]
    assert [output.get("name") for output in code[1].outputs] == ["stdout"]
    assert code[2].outputs[0].data["text/plain"] == "4"
    assert code[0].metadata == {"tags": ["parameters"]}
    assert code[1].metadata == {}
    assert set(book.metadata) == {"kernelspec", "language_info"}
    before = path.read_text()
    refresh(path)
    assert path.read_text() == before, "a second refresh changes nothing"


def test_a_failure_leaves_the_file_as_it_was(tmp_path, write_notebook):
    path = write_notebook(tmp_path / "90_mine.ipynb", "seed = 3", "1 / 0")
    before = path.read_text()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        refresh(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["90_mine.ipynb"]


def test_widget_state_is_left_out():
    book = nbformat.v4.new_notebook(metadata={"widgets": {"state": {}}})
    assert "widgets" not in clean(book).metadata


def test_a_widget_leaves_its_words_only():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "Run controls"}
    output = nbformat.v4.new_output("display_data", data=view)
    cell = nbformat.v4.new_code_cell("controls", outputs=[output])
    kept = clean(nbformat.v4.new_notebook(cells=[cell])).cells[0].outputs[0]
    assert dict(kept.data) == {"text/plain": "Run controls"}


def test_words_for_a_picture_stay():
    shown = nbformat.v4.new_output(
        "display_data",
        data={"image/png": "iVBO"},
        metadata={"image/png": {"alt": "two clouds", "width": 300}, "transient": {"display_id": "a"}},
    )
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=[shown])])
    assert clean(book).cells[0].outputs[0].metadata == {"image/png": {"alt": "two clouds"}}
