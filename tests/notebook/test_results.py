"""How a notebook ends: its folder, its answer, and checks that can fail."""

from __future__ import annotations

import json
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch

import cellop_nb as co
from cellop_nb.errors import StorageError
from cellop_nb.notebook import runs
from cellop_nb.notebook.results import CheckFailed


def test_a_folder_is_made_inside_the_run_folder(tmp_path):
    folder = co.results.folder(tmp_path / "run", "01_data")
    assert folder.is_dir()
    assert folder == co.results.folder(tmp_path / "run", "01_data")
    with pytest.raises(StorageError, match="inside"):
        co.results.folder(tmp_path / "run", "../../elsewhere")


def test_an_answer_is_shown_and_its_numbers_are_kept(tmp_path):
    numbers = {"cells": np.int64(3), "loss": torch.tensor(0.5), "gone": float("nan"), "nested": {"a": 1.0}}
    shown = co.results.answer("**3** cells of <b>type A</b>", numbers, tmp_path)
    assert shown.data == "> **3** cells of &lt;b>type A&lt;/b>", "a label is no markup"
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == {
        "cells": 3, "loss": 0.5, "gone": None, "nested": {"a": 1.0}, "answer": "**3** cells of <b>type A</b>",
    }  # fmt: skip


def test_an_answer_needs_no_folder():
    assert co.results.answer("yes").data == "> yes"


@pytest.mark.parametrize(
    ("value", "bounds", "passes"),
    [
        (1.05, {"expected": 1.0}, True), (1.2, {"expected": 1.0}, False), (-1.05, {"expected": -1.0}, True),
        (3, {"expected": 3, "rtol": 0}, True), (0.4, {"at_most": 0.5}, True), (0.6, {"at_most": 0.5}, False),
        (0.4, {"at_least": 0.5}, False), (float("nan"), {"at_most": 1}, False), (float("nan"), {}, False),
    ],
)  # fmt: skip
def test_a_check_can_fail(value, bounds, passes):
    if passes:
        assert co.results.check("loss", value, **bounds) == "as expected: loss"
        return
    with pytest.raises(CheckFailed, match="Expected loss between .* Found .* To fix it"):
        co.results.check("loss", value, **bounds)


def test_with_other_parameters_nothing_is_claimed():
    text = co.results.check("loss", 5.0, at_most=1, when=False)
    assert text == "not checked with these data and parameters: loss"


def plain_papermill(tmp_path, *words: str, out: str) -> None:
    """The program itself, from another folder than the notebook's, as a user starts it."""
    book = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    source = 'run_dir: str = ""  # folder\nn: int = 1  # a number (at least 1)'
    code = 'import cellop_nb as co\nfolder = co.results.folder(run_dir, "01_data")\n(folder / "n.txt").write_text(str(n))'
    book.cells = [
        nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    (tmp_path / "books").mkdir()
    nbformat.write(book, tmp_path / "books" / "01_data.ipynb")
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(tmp_path / "books" / "01_data.ipynb"),
        out,
        "-k",
        "python3",
        *words,
    ]
    with runs.surroundings():
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=240)


@pytest.mark.slow
def test_results_of_plain_papermill_land_beside_its_output(tmp_path):
    (tmp_path / "there").mkdir()
    plain_papermill(tmp_path, "-p", "n", "5", out="there/out.ipynb")
    assert (tmp_path / "there" / "01_data" / "n.txt").read_text() == "5"
    assert (tmp_path / "there" / "out.ipynb").is_file()
    assert not (tmp_path / "books" / "01_data").exists()


def test_results_of_work_by_hand_lie_outside_of_the_notebooks(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_data.ipynb").write_text("{}")
    monkeypatch.chdir(tmp_path / "notebooks")
    assert co.results.folder("", "01_data").resolve() == tmp_path / "runs" / "notebooks" / "01_data"
    monkeypatch.chdir(tmp_path)
    assert co.results.folder("", "01_data").resolve() == tmp_path / "01_data"
