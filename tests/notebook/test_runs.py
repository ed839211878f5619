"""Notebooks executed by papermill, with throw-away notebooks."""

from __future__ import annotations

import json
import os

import nbformat
import numpy as np
import pytest

from cellop_nb.errors import LabelError
from cellop_nb.notebook import runs

PARAMETERS = "n: int = 2  # how many\nlayer: str | None = None\nrun_dir: str = '.'"
WORK = """from cellop_nb.notebook import runs
runs.write_json(runs.metrics_file(run_dir, "90_mine"), {"square": n * n, "layer": layer})"""


@pytest.fixture
def book(tmp_path, write_notebook):
    return write_notebook(tmp_path / "books" / "90_mine.ipynb", PARAMETERS, WORK, "print(n)")


def test_a_notebook_runs_in_its_folder_with_its_values(book, tmp_path, caplog):
    seen = []
    outcome = runs.execute(book, tmp_path / "run", {"n": 3}, on_cell=lambda i, n: seen.append((i, n)))
    assert outcome.error == ""
    assert outcome.metrics == {"square": 9, "layer": None}
    assert (tmp_path / "run" / "90_mine" / "metrics.json").is_file()
    assert outcome.seconds > 0
    assert seen[-1] == (3, 3)
    executed = nbformat.read(outcome.output, 4)
    assert executed.cells[-1].outputs[0].text == "3\n"
    assert "widgets" not in executed.metadata
    assert not caplog.records


def test_the_folder_is_that_of_the_kernel_and_not_of_this_process(tmp_path, write_notebook):
    """Notebooks run side by side in threads: a folder of the process would send results where another lane stood."""
    book = write_notebook(tmp_path / "90_mine.ipynb", PARAMETERS, "import os; print(os.getcwd())")
    before, seen = os.getcwd(), []
    outcome = runs.execute(book, tmp_path / "run", on_cell=lambda *_: seen.append(os.getcwd()))
    assert set(seen) == {before}
    printed = nbformat.read(outcome.output, 4).cells[-1].outputs[0].text
    assert printed.strip() == str((tmp_path / "run").resolve())


def test_a_failing_notebook_is_kept_and_tells_its_cell(tmp_path, write_notebook):
    book = write_notebook(tmp_path / "90_mine.ipynb", PARAMETERS, "raise KeyError('gone')", "print('later')")
    folder = tmp_path / "run"
    runs.write_json(runs.metrics_file(folder, "90_mine"), {"square": 1})
    outcome = runs.execute(book, folder)
    assert outcome.error == "KeyError: 'gone'"
    executed = nbformat.read(outcome.output, 4)
    failing = next(
        c for c in executed.cells if "gone" in c.source and "error-code-cell" not in str(c.metadata)
    )
    assert outcome.cell == failing.execution_count
    assert outcome.output.is_file()
    assert outcome.metrics == {}, "the metrics of an earlier run must not stand for this one"


def test_a_dead_kernel_and_a_slow_cell_are_outcomes(tmp_path, write_notebook, monkeypatch):
    monkeypatch.setattr(runs, "_PATIENCE", 1.0)
    dying = write_notebook(
        tmp_path / "91_dying.ipynb", "n = 1", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert "DeadKernelError" in runs.execute(dying, tmp_path / "run").error
    slow = write_notebook(tmp_path / "92_slow.ipynb", "n = 1", "import time; time.sleep(60)")
    assert "CellTimeoutError" in runs.execute(slow, tmp_path / "run", timeout=1).error


LINGERS = """import inspect, time
handlers = get_ipython().kernel.shell_handlers
answer = handlers["kernel_info_request"]
async def lingers(*request):
    reply = answer(*request)
    if inspect.isawaitable(reply): await reply
    time.sleep(3)
handlers["kernel_info_request"] = lingers"""


def test_a_kernel_is_not_interrupted_while_it_ends_its_last_answer(
    tmp_path, write_notebook, capfd, monkeypatch
):
    """As on a busy machine: it would report the interrupt on the terminal, where nothing went wrong."""
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # what old kernels have to say about debuggers
    book = write_notebook(tmp_path / "90_mine.ipynb", "n = 1", LINGERS)
    assert runs.execute(book, tmp_path / "run").error == ""
    assert capfd.readouterr().err == ""


def test_a_kernel_that_was_given_up_ends_with_what_its_cell_does_when_interrupted(
    tmp_path, write_notebook, monkeypatch
):
    monkeypatch.setattr(runs, "_PATIENCE", 1.0)
    cell = """import pathlib, time
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path("interrupted").touch()"""
    book = write_notebook(tmp_path / "90_mine.ipynb", "n = 1", cell)
    assert "CellTimeoutError" in runs.execute(book, tmp_path / "run", timeout=1).error
    assert (tmp_path / "run" / "interrupted").exists()


def test_wrong_values_stop_it_before_it_runs(book, tmp_path):
    with pytest.raises(LabelError, match="a parameter of 90_mine"):
        runs.execute(book, tmp_path / "run", {"m": 3})
    assert not (tmp_path / "run").exists()


def test_metrics_are_written_as_plain_json(tmp_path):
    metrics = {
        "a": np.float32(0.5),
        "b": np.arange(2),
        "c": float("nan"),
        "d": {"e": (1, True)},
        "f": tmp_path,
    }
    path = runs.metrics_file(tmp_path, "90_mine")
    runs.write_json(path, metrics)
    content = json.loads(path.read_text())
    assert content == {"a": 0.5, "b": [0, 1], "c": None, "d": {"e": [1, True]}, "f": str(tmp_path)}
    assert runs.read_metrics(tmp_path, "90_mine") == content
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]
    assert runs.read_metrics(tmp_path, "91_other") == {}
