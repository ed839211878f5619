"""What a terminal, and a log file in its place, gets to see."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from cellop_nb.commands.terminal import Status, clock, table
from cellop_nb.errors import DataError

from .families import hangs_up

posix = pytest.mark.skipif(os.name == "nt", reason="signals and pipes of POSIX")


def test_tables_and_times():
    text = table(["name", "s"], [["a", "1.5"], ["longer", "12.0"]], right=(1,))
    assert text.splitlines() == ["name       s", "------  ----", "a        1.5", "longer  12.0"]
    assert (clock(12.3), clock(125)) == ("12 s", "2 min 05 s")


def test_a_log_file_gets_whole_lines(capsys):
    with Status("working", every=0.05) as status:
        status.update("half way")
        time.sleep(0.3)
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("working") for line in lines)
    assert lines[-1].endswith("half way")


# -- terminals that know few letters, readers that go, signals

ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1]), "JUPYTER_PLATFORM_DIRS": "1"}
LONG = """import os, subprocess, time
child = subprocess.Popen(["sleep", "120"])
from cellop_nb.files import write_whole
def work(part):
    part.write_text("half")
    open("started", "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(120)
write_whole("result.txt", work)"""


def start(*words: object, folder: Path, **more) -> subprocess.Popen:
    command = (
        [sys.executable, *map(str, words)]
        if words[0] == "-c"
        else [sys.executable, "-m", "cellop_nb", *map(str, words)]
    )
    surroundings = {**os.environ, **ENVIRONMENT, "TMPDIR": str(folder), **more.pop("env", {})}
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "encoding": "utf-8",
        "errors": "replace",
    }
    return subprocess.Popen(command, env=surroundings, cwd=folder, preexec_fn=hangs_up, **(pipes | more))


def is_alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists() and " Z " not in Path(f"/proc/{process}/stat").read_text()


def wait_for(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_a_run_in_order(tmp_path, place, write_notebook, number):
    """Kernels and what they started are gone, run.json says what was done, nothing temporary is left."""
    write_notebook(tmp_path / "books" / "01_first.ipynb", "n: int = 1", "print(n)")
    write_notebook(tmp_path / "books" / "02_long.ipynb", "n: int = 1", LONG)
    write_notebook(tmp_path / "books" / "03_later.ipynb", "n: int = 1", "print(n)")
    started = tmp_path / "runs" / "mine" / "started"
    process = start(
        "run", "--notebooks", tmp_path / "books", "--runs", tmp_path / "runs", "--name", "mine", folder=place
    )
    wait_for(lambda: started.is_file() and len(started.read_text().split()) == 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 128 + number
    assert "Traceback" not in err and err.strip().endswith(f"Stopped by {number.name}.")
    record = json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())
    assert record["state"] == f"stopped by {number.name}"
    assert {name: told["error"] for name, told in record["notebooks"].items()} == {
        "01_first": "",
        "02_long": "stopped",
    }
    wait_for(lambda: not any(is_alive(int(one)) for one in started.read_text().split()), 20)
    assert list(place.iterdir()) == []
    assert not [path.name for path in (tmp_path / "runs").rglob("*") if path.name.startswith(".")]


@posix
def test_nohup_keeps_its_meaning():
    script = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from cellop_nb.commands.terminal import stoppable\n"
        "with stoppable(): os.kill(os.getpid(), signal.SIGHUP); print('goes on')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **ENVIRONMENT}, capture_output=True
    )
    assert (ended.returncode, ended.stdout) == (0, b"goes on\n")


@posix
def test_a_killed_hold_out_leaves_no_worker_at_work(tmp_path):
    script = (
        "import os, signal, time; from cellop_nb.commands.ask import LocalWorkers; workers = LocalWorkers(1)\n"
        "print(workers.submit(os.getpid).result(), flush=True); workers.submit(time.sleep, 100); time.sleep(0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = start("-c", script, folder=tmp_path)
    worker = int(process.stdout.readline())
    process.wait()
    wait_for(lambda: not is_alive(worker), 30)


@posix
@pytest.mark.parametrize("command", ["predict", "holdout"])
def test_a_signal_ends_a_fit_with_its_workers_and_writes_nothing(place, command):
    """A trainer takes Ctrl-C for the stop square of a notebook and goes on with what it has learned: not here."""
    words = {
        "predict": [
            "--data",
            "synthetic_screen",
            "--context",
            "type A",
            "--perturbation",
            "drug 1",
            "--out",
            "cells.h5ad",
        ],
        "holdout": ["synthetic_screen", "--workers", "1", "--out", "table.csv"],
    }[command]
    process = start(command, *words, folder=place)

    def one_is_fitting() -> bool:  # this process, or its worker
        time.sleep(1)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        return any(member.cpu_times().user > 8 for member in family)

    wait_for(one_is_fitting)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err and err.strip().endswith("Stopped by SIGTERM.")
    assert not [child for child in children if child.is_running()]
    assert [path.name for path in place.iterdir() if path.suffix or path.name.startswith(".")] == []


def test_two_runs_of_one_second_have_a_folder_each(tmp_path, monkeypatch):
    from cellop_nb.commands import run

    monkeypatch.setattr(time, "strftime", lambda form: "2026-01-31_12-00-00")
    args = argparse.Namespace(runs=str(tmp_path), name=None, only=None)
    with ThreadPoolExecutor(4) as pool:
        folders = [future.result() for future in [pool.submit(run.claim, args) for _ in range(4)]]
    assert sorted(path.name[19:] for path in folders) == ["", "_2", "_3", "_4"]
    args.name = "mine"
    assert run.claim(args).name == "mine"
    with pytest.raises(DataError, match="a new run folder"):
        run.claim(args)
    (tmp_path / "mine" / "run.json").unlink()  # another run has made the folder, and not yet written into it
    assert run.claim(args).name == "mine"
    with pytest.raises(DataError, match="a new run folder"):
        run.claim(args)


LETTERS = "naïve → 干扰素 · β"


@posix
@pytest.mark.parametrize(
    "words",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_a_terminal_of_few_letters_gets_numbers_for_the_others(place, write_notebook, words):
    book = write_notebook(
        place / "books" / "01_x.ipynb",
        f"label: str = {LETTERS!r}  # {LETTERS}",
        "print(label)",
        "raise ValueError(label)",
    )
    for command in (
        ["params", book],
        ["params", book, "--yaml"],
        ["run", "--notebooks", book.parent, "--runs", "runs"],
    ):
        process = start(*command, folder=place, env=words)
        out, err = process.communicate(timeout=240)
        assert process.returncode == (command[0] == "run"), err
        assert "Traceback" not in err and "\\u5e72\\u6270\\u7d20" in out + err
    process = start(
        "predict", "--data", LETTERS, "--context", "a", "--perturbation", "b", folder=place, env=words
    )
    assert "Traceback" not in process.communicate(timeout=240)[1]
    assert process.returncode == 2


@posix
def test_a_reader_that_goes_ends_the_output_and_not_the_work(tmp_path, place, write_notebook):
    """`run | head -1`: no traceback, and all that was to be done is done."""
    write_notebook(tmp_path / "books" / "01_x.ipynb", "n: int = 1", "print(n)")
    words = ("run", "--notebooks", tmp_path / "books", "--runs", tmp_path / "runs", "--name", "mine")
    process = start(*words, folder=place)
    process.stdout.close()
    assert process.wait(timeout=240) == 0
    assert process.stderr.read() == ""
    assert json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())["state"] == "done"
    for words in (["params"], ["--help"], ["run", "--help"]):
        process = start(*words, folder=place)
        process.stdout.close()
        assert (process.wait(timeout=240), process.stderr.read()) == (0, "")


@posix
def test_closed_and_full_outputs(place):
    """`>&-` closes it; /dev/full is a disk without room."""
    closing = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    process = start("-c", closing, "-m", "cellop_nb", "params", folder=place)
    assert (process.communicate(timeout=240)[1], process.returncode) == ("", 0)
    with open("/dev/full", "w") as full:
        process = start("params", folder=place, stdout=full)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert err.startswith("Expected to write the output. Found No space left on device. To fix it:")
    assert len(err.splitlines()) == 1
