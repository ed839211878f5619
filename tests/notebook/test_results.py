"""How a notebook ends: its folder, its answer, and checks that can fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import cellop_nb as co
from cellop_nb.errors import StorageError
from cellop_nb.notebook.results import CheckFailed


def test_a_folder_is_made_inside_the_run_folder(tmp_path):
    folder = co.results(tmp_path / "run", "01_data")
    assert folder.is_dir()
    assert folder == co.results(tmp_path / "run", "01_data")
    with pytest.raises(StorageError, match="inside"):
        co.results(tmp_path / "run", "../../elsewhere")


def test_an_answer_is_shown_and_its_numbers_are_kept(tmp_path):
    numbers = {"cells": np.int64(3), "loss": torch.tensor(0.5), "gone": float("nan"), "nested": {"a": 1.0}}
    shown = co.answer("**3** cells of <b>type A</b>", numbers, tmp_path)
    assert shown.data == "> **3** cells of &lt;b>type A&lt;/b>", "a label is no markup"
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == {
        "cells": 3, "loss": 0.5, "gone": None, "nested": {"a": 1.0}, "answer": "**3** cells of <b>type A</b>",
    }  # fmt: skip


def test_an_answer_needs_no_folder():
    assert co.answer("yes").data == "> yes"


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
        assert co.check("loss", value, **bounds) == "as expected: loss"
        return
    with pytest.raises(CheckFailed, match="Expected loss between .* Found .* To fix it"):
        co.check("loss", value, **bounds)


def test_with_other_parameters_nothing_is_claimed():
    text = co.check("loss", 5.0, at_most=1, when=False)
    assert text == "not checked with these data and parameters: loss"
