"""How a notebook ends, `co.results`: a folder for its results, an answer in words and numbers, checks that can fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ..display import markdown
from ..errors import CellopError
from ..files import inside, storing
from . import runs

__all__ = ["answer", "check", "folder"]


class CheckFailed(CellopError):
    """A number of a notebook left the bounds it was shown with."""


def folder(run_dir: str | Path, notebook: str) -> Path:
    """The folder of a notebook's results inside the run folder, made where it is not there.

    Parameters
    ----------
    run_dir, notebook
        The run folder, and the notebook's name. An empty run folder is that of papermill's output where papermill runs
        the notebook; ``../runs/notebooks`` where the notebook lies in the current folder; else the current folder.

    Returns
    -------
    Path
        ``run_dir/notebook``: write into it with ``table.to_csv(folder / "scores.csv")``.

    Raises
    ------
    StorageError
        If the folder cannot be made, or the name leads out of the run folder.
    """
    path = inside(run_dir or _run_folder(notebook), notebook)
    with storing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def _run_folder(notebook: str) -> Path:
    executor = _executor()
    books = [word for word in executor if word.endswith(".ipynb")]
    if any("papermill" in word for word in executor[:3]) and len(books) > 1:
        return Path(books[1]).parent
    return Path("../runs/notebooks") if Path(f"{notebook}.ipynb").is_file() else Path(".")


def _executor() -> list[str]:
    """The command line of the program that started this kernel; empty outside of one."""
    if "ipykernel" not in sys.modules:
        return []
    import psutil

    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def answer(text: str, numbers: Mapping[str, object] | None = None, folder: str | Path | None = None):
    """Show the answer to the question of a notebook, and write its numbers to a file.

    Parameters
    ----------
    text
        Markdown; names from data may stand in it as they are.
    numbers
        Name to number, text, or nested dicts and lists of them: the key numbers of the notebook.
    folder
        Of :func:`folder`; ``metrics.json`` there gets the numbers and the text, for the table that ends a run, for
        sweeps and for the report.

    Returns
    -------
    `IPython.display.Markdown`
    """
    if folder is not None:
        path = Path(folder) / "metrics.json"
        runs.write_json(path, {**(numbers or {}), "answer": text})
    return markdown(f"> {text}")


def check(
    name: str,
    value: float,
    *,
    expected: float | None = None,
    rtol: float = 0.1,
    at_least: float = float("-inf"),
    at_most: float = float("inf"),
    when: bool = True,
) -> str:
    """Say that a number is as expected, or raise an error: ``print(check("loss", loss, at_most=2))``.

    The text does not depend on the number, so that executed notebooks can be compared.

    Parameters
    ----------
    name
        What the number is, in words.
    value
        The number.
    expected, rtol
        What it must be, and how far it may be off, as a share of it.
    at_least, at_most
        Bounds, where there is no `expected`.
    when
        False where nothing is known about the value (other data, other parameters): nothing is claimed then.

    Returns
    -------
    str

    Raises
    ------
    CheckFailed
        When the value lies outside its bounds.
    """
    if not when:
        return f"not checked with these data and parameters: {name}"
    if expected is not None:
        margin = rtol * abs(expected)
        at_least, at_most = expected - margin, expected + margin
    if not at_least <= value <= at_most:
        bounds = f"{name} between {at_least:.4g} and {at_most:.4g}"
        fix = "find out what changed since this was written"
        raise CheckFailed(bounds, f"{value:.4g}", fix)
    return f"as expected: {name}"
