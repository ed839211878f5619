"""A person at the controls and at the explorer: JupyterLab in a real browser, on copies of committed notebooks."""

from __future__ import annotations

import json
import os
import re

import nbformat
import pytest

from .lab import NotebookPage, wait_for

# the second limit, should the first (`desk`) not wake the test: it ends the whole process
pytestmark = [pytest.mark.browser, pytest.mark.timeout(360, method="thread")]


def number(name: str, line: str) -> float:
    """The number after a word in a status line."""
    return float(re.search(rf"{name} ([\d.,e+-]+)", line).group(1).replace(",", ""))


def test_watch_steer_pause_resume_and_stop_a_training(desk, root):
    lab, browser = desk
    name = lab.copy(root / "notebooks" / "02_train_vae.ipynb", max_epochs=5000, run_dir="runs")
    with NotebookPage(browser, lab.url(name)) as notebook:
        if notebook.ipykernel() < (7, 0):
            pytest.skip(
                "ipykernel 6 holds clicks back while a cell runs; the next test shows that it says so"
            )
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
        before = set(notebook.pictures())
        notebook.press("Draw now")
        wait_for(lambda: set(notebook.pictures()) - before, 30, "the picture that was asked for")
        assert number("step", notebook.said(r"^paused")) == held, "nothing moves while paused"
        notebook.press("Resume")
        wait_for(lambda: number("step", notebook.said(r"^running")) > held, 30, "training to go on")

        notebook.press("Stop")
        notebook.said(r"^stopped .* stopped by hand")
        notebook.wait_until_run(120)
        assert notebook.errors_in_cells() == []
        assert notebook.problems == []
        notebook.save()
    with NotebookPage(browser, lab.url(name)) as again:  # the kernel lives: so do the controls
        again.said(r"^stopped .* stopped by hand", 60)
    made = json.loads((lab.root / "runs" / "02_train_vae" / "metrics.json").read_text())["changed_by_hand"]
    last = {change["name"]: change["value"] for change in made}  # quick presses arrive as one change
    assert last == {
        "learning_rate": pytest.approx(2e-3 * 10**0.3), "kl_weight": pytest.approx(0.9), "stop": "stopped by hand",
    }  # fmt: skip
    assert (lab.root / "runs" / "02_train_vae" / "by_hand.pt").is_file(), (
        "beside the results, not the notebooks"
    )


BLOCKING = """\
import cellop_nb as co

adata = co.datasets.synthetic(n_contexts=2, n_perturbations=2, n_cells=60, n_genes=30, library=200.0)
co.split(adata)
trainer = co.VAETrainer(adata, co.new_vae(adata, n_latent=2), max_epochs=100_000, progress=False)
controls = co.RunControls(trainer)
controls"""


def test_where_clicks_are_held_back_the_controls_say_so_and_the_stop_square_works(desk):
    """ipykernel 6 always, 7.4 during `trainer.fit()`; between them a blocking fit can be steered, too."""
    lab, browser = desk
    cells = [
        nbformat.v4.new_code_cell(code) for code in (BLOCKING, "len(trainer.fit()) > 0", "trainer.changes")
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), lab.root / "fit.ipynb"
    )
    with NotebookPage(browser, lab.url("fit.ipynb")) as notebook:
        release = notebook.ipykernel()
        wanted = os.environ.get("CELLOP_KERNEL")  # .ci/kernels asks for others than the environment's
        assert wanted is None or wanted.startswith("{}.{}.".format(*release))
        held_back = release < (7, 0) or release >= (7, 4)
        notebook.run_all()
        notebook.said(r"^running \| epoch [1-9]", 90)
        if held_back:
            notebook.said(r"^ipykernel [\d.]+ holds (back clicks|clicks back) .*stop square")
            notebook.interrupt()
            notebook.said(r"^stopped .* interrupted")
        else:
            assert not any(line.startswith("ipykernel") for line in notebook.status_lines())
            notebook.press("Stop")
            notebook.said(r"^stopped .* stopped by hand")
        notebook.wait_until_run(60)
        history, changes = notebook.page.locator(".jp-OutputArea-executeResult").all_inner_texts()[-2:]
        assert "True" in history, "the cell ends well, with the history"
        assert ("interrupted" if held_back else "stopped by hand") in changes
        assert notebook.errors_in_cells() == []
        assert notebook.problems == []


def energy(line: str) -> float:
    return float(re.search(r"real cells (-?[\d.]+)", line).group(1))


def test_move_through_the_explorer(desk, root):
    lab, browser = desk
    name = lab.copy(
        root / "notebooks" / "07_virtual_cells.ipynb",
        context="type C", perturbation="drug 2", strength=0.9, run_dir="runs",
    )  # fmt: skip
    with NotebookPage(browser, lab.url(name)) as notebook:
        notebook.run_all()
        notebook.wait_until_run(240)
        first = notebook.said(r"^type C, drug 2 at strength 0\.9 ")
        picture = notebook.explorer_picture()

        notebook.slide("strength", "ArrowLeft", times=8)
        weaker = notebook.said(r"^type C, drug 2 at strength 0\.5 \| prediction: between")
        assert energy(weaker) > energy(first), "half a dose is further from the full response"
        assert notebook.explorer_picture() != picture

        notebook.choose("perturbation", "drug 1")
        other = notebook.said(r"^type C, drug 1 at strength 0\.5 ")
        assert energy(other) != energy(weaker)
        notebook.choose("and", "drug 3")
        notebook.choose("how", "second, then first")
        notebook.said(r"^type C, drug 3, then drug 1 at strength 0\.5 \| prediction: a sequence")

        notebook.write("gene", "no such gene")
        notebook.said(r"^refused: Expected a gene of the model")
        notebook.write("gene", "")
        notebook.choose("and", "(none)")
        notebook.page.get_by_text("reverse: lead perturbed cells back").first.click()
        notebook.said(r"^type C, drug 1 at strength 0\.5, reversed ")
        notebook.press("Export")
        notebook.said(r"^saved .*virtual_cells\.h5ad")
        assert notebook.errors_in_cells() == []
        assert notebook.problems == []
    assert (lab.root / "runs" / "07_virtual_cells" / "virtual_cells.h5ad").is_file()
