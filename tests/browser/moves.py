"""How long a move of the explorer takes in a browser, from key to picture: `python -m tests.browser.moves`.

Three clouds of 5,000 cells and 1,000 genes, untrained models, as in `bench explorer`, which times the kernel alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat

from .lab import Lab, NotebookPage, chromium, launch

_CELL = """
from benchmarks.explorer import CELLS, GENES, _cells
from cellop_nb.notebook.explorer import Explorer
known = _cells(CELLS, GENES)
explorer = Explorer(known.model, context="T", perturbation="A")
explorer.panel
"""
# all but the present question, as where there are more conditions than were prepared
_FORGET = "explorer.cells.forget() or explorer.cells.ask(explorer.question).energy"
# Milliseconds until the picture is another one and the browser has had the time to paint it.
_UNTIL_PAINTED = """how => new Promise(done => {
    const image = document.querySelector('img.widget-image'), start = performance.now();
    const changed = () => image.decode().finally(() => requestAnimationFrame(() => setTimeout(
        () => done(performance.now() - start))));
    new MutationObserver((_, watch) => { watch.disconnect(); changed(); }).observe(image, {attributeFilter: ['src']});
    const named = name => [...document.querySelectorAll('.jupyter-widgets')].find(
        found => found.querySelector('.widget-label')?.textContent === name);
    if (how.press) named('strength').querySelector('.noUi-handle').dispatchEvent(
        new KeyboardEvent('keydown', {key: how.press, bubbles: true}));
    else {
        const list = named('perturbation').querySelector('select');
        list.value = how.choose;
        list.dispatchEvent(new Event('change', {bubbles: true}));
    }
})"""


def main(n_moves: int = 20) -> None:
    from playwright.sync_api import sync_playwright

    with (
        tempfile.TemporaryDirectory() as folder,
        Lab(Path(folder) / "lab") as lab,
        sync_playwright() as playwright,
    ):
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(_CELL.strip())], metadata=kernel)
        nbformat.write(book, lab.root / "moves.ipynb")
        browser = launch(playwright, chromium(), Path(folder) / "home")
        with NotebookPage(browser, lab.url("moves.ipynb")) as notebook:
            notebook.run_all()
            notebook.wait_until_run(240)
            for what, move in _kinds(notebook).items():
                _say(what, [move(i) for i in range(n_moves)])


def _kinds(notebook: NotebookPage) -> dict[str, Callable[[int], float]]:
    """Each kind of move by its number: it does one thing and the next time undoes it."""

    def strength(i: int) -> float:
        return _moved(notebook, {"press": ("ArrowLeft", "ArrowRight")[i % 2]})

    def seen(i: int) -> float:
        return _moved(notebook, {"choose": "BA"[i % 2]})

    def unseen(i: int) -> float:
        notebook.run_silently(_FORGET)
        notebook.wait_until_idle(30)
        return seen(i)

    return {
        "strength by one step": strength,
        "another perturbation, seen before": seen,
        "another perturbation, for the first time": unseen,
    }


def _moved(notebook: NotebookPage, how: dict[str, str]) -> float:
    found = notebook.page.evaluate(_UNTIL_PAINTED, how)
    notebook.wait_until_idle(30)
    return found


def _say(what: str, spent: list[float]) -> None:
    middle, few, many = statistics.median(spent), min(spent), max(spent)
    sys.stdout.write(f"{what}, {len(spent)} times: {middle:.0f} ms (median), {few:.0f} to {many:.0f} ms\n")


if __name__ == "__main__":
    main()
