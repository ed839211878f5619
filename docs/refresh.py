"""Execute the committed notebooks again, in place and at their defaults.

``python -m docs.refresh [NAME or NUMBER ...]`` brings each parameters cell in step with
`parameters`, runs the notebook in a fresh kernel, and keeps outputs and execution counts, for these are what
the tests compare. Times, widget state and text on stderr are left out: they differ from run to run.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import nbformat

from cellop_nb.commands.run import choose
from cellop_nb.files import write_whole
from cellop_nb.notebook import runs

logger = logging.getLogger("cellop_nb")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [
    *sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")),
    ROOT / "benchmarks" / "benchmark.ipynb",
]
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def refresh(path: str | Path, *, timeout: int | None = None) -> float:
    """Execute one notebook in place; seconds that it took.

    Parameters
    ----------
    path
        The notebook; replaced as a whole, and only when all its cells ran.
    timeout
        Seconds that one cell may take; None: no limit.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        When a cell fails; the file is left as it was.
    """
    from nbclient import NotebookClient

    path = Path(path)
    book = nbformat.read(path, 4)
    start = time.monotonic()
    with runs.kernel_settings() as settings:
        resources = {"metadata": {"path": str(path.parent.resolve())}}
        NotebookClient(book, resources=resources, timeout=timeout, **settings).execute()
    seconds = time.monotonic() - start
    _write(clean(book), path)
    return seconds


def clean(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave out of an executed notebook what differs from run to run; outputs and counts stay."""
    book.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number:02d}"
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                _keep_words(output.get("metadata", {}))
                # without its kernel a widget is an error message; the words beside it stay
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return book


def _keep_words(metadata: dict) -> None:
    """Of an output's metadata, only what pictures say to those who cannot see them."""
    words = {
        kind: {"alt": told["alt"]}
        for kind, told in metadata.items()
        if isinstance(told, dict) and "alt" in told
    }
    metadata.clear()
    metadata.update(words)


def _write(book: nbformat.NotebookNode, path: Path) -> None:
    write_whole(path, lambda part: nbformat.write(book, part))


def main(arguments: list[str] | None = None) -> None:
    """The command; all notebooks where none is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="names or numbers of notebooks; none: all")
    names = parser.parse_args(arguments).names
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for path in [choose(name, NOTEBOOKS, "notebooks") for name in names] or NOTEBOOKS:
        seconds = refresh(path)
        logger.info("%s  %.1f s  %.0f kB", path.stem, seconds, path.stat().st_size / 1e3)


if __name__ == "__main__":
    main()
