"""How long a move of the explorer takes in a browser, from key to picture: `python -m tests.browser.moves`.

Three clouds of 5,000 cells and 1,000 genes, untrained models, as in `bench explorer`, which times the kernel alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import nbformat

from .lab import Lab, NotebookPage, chromium, launch

_CELL = """
from cellop_nb.bench.explorer import CELLS, GENES, _cells
from cellop_nb.notebook.explorer import Explorer
known = _cells(CELLS, GENES)
Explorer(known.adata, known.vae, known.operators, context="T", perturbation="A").panel
"""
# Milliseconds until the picture is another one and the browser has had the time to paint it.
_UNTIL_PAINTED = """press => new Promise(done => {
    const image = document.querySelector('img.widget-image'), start = performance.now();
    const changed = () => image.decode().finally(() => requestAnimationFrame(() => setTimeout(
        () => done(performance.now() - start))));
    new MutationObserver((_, watch) => { watch.disconnect(); changed(); }).observe(image, {attributeFilter: ['src']});
    const handle = [...document.querySelectorAll('.noUi-handle')].find(
        found => found.closest('.widget-hslider').textContent.includes('strength'));
    handle.dispatchEvent(new KeyboardEvent('keydown', {key: press, bubbles: true}));
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
            keys = ["ArrowLeft", "ArrowRight"] * (n_moves // 2)
            spent = [_move(notebook, key) for key in keys]
    middle, few, many = statistics.median(spent), min(spent), max(spent)
    sys.stdout.write(
        f"strength by one step, {n_moves} times: {middle:.0f} ms (median), {few:.0f} to {many:.0f} ms\n"
    )


def _move(notebook: NotebookPage, key: str) -> float:
    found = notebook.page.evaluate(_UNTIL_PAINTED, key)
    notebook.wait_until_idle(30)
    return found


if __name__ == "__main__":
    main()
