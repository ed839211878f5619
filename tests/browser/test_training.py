"""A person at the controls of a training: JupyterLab in a real browser, on a copy of a committed notebook."""

from __future__ import annotations

import json
import re

import pytest

from .lab import Lab, NotebookPage, wait_for

pytestmark = pytest.mark.browser


def number(name: str, line: str) -> float:
    """The number after a word in a status line."""
    return float(re.search(rf"{name} ([\d.,e+-]+)", line).group(1).replace(",", ""))


def test_watch_steer_pause_resume_and_stop_a_training(browser, root, tmp_path):
    lab = Lab(tmp_path)
    name = lab.copy(root / "notebooks" / "02_train_vae.ipynb", max_epochs=5000, run_dir="runs")
    with lab:
        notebook = NotebookPage(browser, lab.url(name))
        notebook.run_all()
        first = notebook.said(r"^running \| epoch [1-9]", 120)
        assert number("learning rate", first) == pytest.approx(2e-3)

        before = set(wait_for(notebook.pictures, 30, "a live picture"))
        wait_for(lambda: set(notebook.pictures()) - before, 60, "another live picture")

        notebook.slide("learning rate", times=3)
        notebook.said(r"running .* learning rate 0\.00399")
        notebook.slide("kl weight", "ArrowLeft", times=2)

        notebook.press("Pause")
        held = number("step", notebook.said(r"^paused"))
        notebook.press("Save checkpoint")
        notebook.said(r"^saved .*by_hand\.pt")
        notebook.page.wait_for_timeout(500)
        assert number("step", notebook.said(r"^paused")) == held, "nothing moves while paused"
        notebook.press("Resume")
        wait_for(lambda: number("step", notebook.said(r"^running")) > held, 30, "training to go on")

        notebook.press("Stop")
        notebook.said(r"^stopped .* stopped by hand")
        notebook.wait_until_run(120)
        assert notebook.errors_in_cells() == []
        assert notebook.problems == []
        notebook.page.close()
    made = json.loads((lab.root / "runs" / "02_train_vae" / "metrics.json").read_text())["changed_by_hand"]
    last = {change["name"]: change["value"] for change in made}  # quick presses arrive as one change
    assert last == {
        "learning_rate": pytest.approx(2e-3 * 10**0.3), "kl_weight": pytest.approx(0.9), "stop": "stopped by hand",
    }  # fmt: skip
    assert (lab.root / "by_hand.pt").is_file()
