"""Sweeps on Dask as a user starts them: finished runs are skipped, and neither failures nor kills spoil anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest

from cellop_nb.__main__ import main
from cellop_nb.errors import DataError, LabelError
from cellop_nb.notebook.sweeps import cluster, execute, store

PARAMETERS = """width: int = 2  # how many
seed: int = 0
wait: float = 0.0  # seconds
log: str = ""
run_dir: str = "." """
WORK = """import os, time
from cellop_nb.notebook import batch

def note(word):
    with open(log, "a") as file:
        file.write(f"{word} {width} {seed} {time.time()} {os.environ['OMP_NUM_THREADS']}\\n")

note("start")
batch.write_metrics(run_dir, "90_mine", {"half": 1})
time.sleep(wait)
if width == 5 and seed == 1:
    raise ValueError("unlucky")
batch.write_metrics(run_dir, "90_mine", {"loss": (width - 4) ** 2 + 0.1 * seed})
note("end")"""


@pytest.fixture
def book(tmp_path, write_notebook):
    return write_notebook(tmp_path / "90_mine.ipynb", PARAMETERS, WORK)


def words(book, *more, grid=("width=3,5", "seed=0,1"), wait=0.0, workers=2):
    axes = [word for axis in grid for word in ("-g", axis)]
    fixed = ["-p", "wait", str(wait), "-p", "log", str(book.parent / "log")]
    return ["sweep", str(book), *axes, *fixed, "--workers", str(workers), "--runs", str(book.parent), *more]


def log(book, word=None):
    path = book.parent / "log"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if word in (None, line[0])]


def folders(book):
    return [path for path in (book.parent / "90_mine").iterdir() if path.is_dir() and path.name[0] != "."]


@pytest.fixture
def no_cluster(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(execute, "connected", never)


def test_a_sweep_from_command_to_report(book, capsys):
    assert main(words(book)) == 1
    captured = capsys.readouterr()
    assert "unlucky" in captured.err and "4/4" in captured.err and "failed=1" in captured.err
    folder = book.parent / "90_mine"
    table = pd.read_parquet(folder / "runs.parquet")
    assert table["status"].tolist() == ["done", "done", "done", "failed"]
    assert table["loss"].tolist()[:3] == pytest.approx([1.0, 1.1, 1.0])
    assert table["error"][3] == "ValueError: unlucky"
    assert table["half"].isna()[:3].all(), "only what a run wrote last counts"
    csv = pd.read_csv(folder / "runs.csv", keep_default_na=False, na_values=[""])
    pd.testing.assert_frame_equal(csv[["run", "width", "loss"]], table[["run", "width", "loss"]])
    assert {path.name for path in folders(book)} == set(table["run"])
    failed = nbformat.read(folder / table["notebook"][3], 4)
    assert any(o.output_type == "error" for c in failed.cells for o in c.get("outputs", []))

    summary = nbformat.read(folder / "summary.ipynb", 4)
    outputs = [o for c in summary.cells for o in c.get("outputs", [])]
    shown = " ".join(str(o.get("data", {})) for o in outputs)
    assert not any(o.output_type == "error" for o in outputs)
    assert f'<a href="{table["notebook"][0]}">' in shown and "image/png" in shown and "unlucky" in shown

    started = len(log(book, "start"))
    assert started == 4 and not list(folder.glob(".unfinished*"))
    again = words(book, grid=("width=3,5", "seed=0..2"), workers=1)
    assert main([*again, "--dry-run"]) == 0
    assert "4 finished, 2 to do" in capsys.readouterr().out
    assert main(again) == 1
    assert len(log(book, "start")) == started + 2, "only the two new runs"


def test_a_finished_sweep_starts_nothing(book, no_cluster, capsys):
    store.finish(
        store.draft(book.parent / "90_mine", "x"), book.parent / "90_mine" / "x", {"status": "failed"}
    )
    assert main([*words(book), "--dry-run"]) == 0
    keys = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("to do")][1:]
    for key in keys:
        values = {"width": 3, "seed": 0, "wait": 0.0, "log": ""}
        result = {"status": "done", "error": "", "seconds": 1.0, "values": values, "metrics": {"loss": 1.0}}
        store.finish(store.draft(book.parent / "90_mine", key), book.parent / "90_mine" / key, result)
    assert main(words(book)) == 0


REFUSED = [
    (["-g", "witdh=1,2"], "did you mean 'width'"),
    (["-g", "width=1,two"], "Expected int.*'two'"),
    (["-g", "width=1,2", "-p", "width", "3"], "'width' named twice"),
    (["-g", "width=1,2", "--random", "0"], "--random of at least 1"),
    (["-g", "width=1,2", "--cluster", "slrum"], "did you mean 'slurm'"),
    (["-g", "width=1,2", "--workers", "0"], "--workers of at least 1"),
    (["-g", "width=1,2", "--name", "../x"], "a folder name"),
    ([], "parameters to vary"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=lambda value: " ".join(value) or "nothing")
def test_wrong_sweeps_are_refused_before_anything_runs(more, message, book, no_cluster, capsys):
    import re

    assert main(["sweep", str(book), "--runs", str(book.parent), *more]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and "To fix it" in err
    assert not (book.parent / "90_mine").exists()


def test_one_sweep_at_a_time(book, no_cluster):
    with store.locked(book.parent / "90_mine"), pytest.raises(DataError, match="another at work.*--name"):
        list(execute.execute(book, book.parent / "90_mine", []))


def test_no_scheduler_at_the_address_is_said_so(monkeypatch):
    monkeypatch.setattr(cluster, "_SEARCH_SECONDS", 0.5)
    with pytest.raises(DataError, match="a Dask scheduler at tcp://127.0.0.1:9.*dask scheduler"), \
            cluster.connected("tcp://127.0.0.1:9", 1):  # fmt: skip
        pass
    with pytest.raises(LabelError, match="local, slurm, pbs, sge or tcp"):
        cluster.check_where("cloud")


# -- kills ------------------------------------------------------------------------------------------------


def start(book, *arguments):
    command = [sys.executable, "-m", "cellop_nb", *arguments]
    with open(book.parent / "client.log", "w") as out:
        return subprocess.Popen(command, cwd=book.parent, stdout=out, stderr=out)


def wait_for(condition, seconds=90):
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)
    return value


def workers_of(client):
    """Worker processes that have a kernel below them."""
    children = psutil.Process(client.pid).children()
    return [
        child for child in children if any("ipykernel" in " ".join(c.cmdline()) for c in child.children())
    ]


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_client_lose_nothing(book):
    """kill -9 a worker, then the client; the same command again does what is missing, and nothing twice."""
    command = words(book, grid=("width=2,3,4", "seed=0,1"), wait=1.0)
    client = start(book, *command)
    try:
        wait_for(lambda: log(book, "end"))
        victim = wait_for(lambda: workers_of(client))[0]
        victim.send_signal(signal.SIGKILL)
        wait_for(lambda: len(folders(book)) >= 3)
        family = psutil.Process(client.pid).children(recursive=True)
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, "workers and kernels of a killed client end"
    before = {path.name: json.loads((path / store.RESULT).read_text()) for path in folders(book)}
    assert 3 <= len(before) < 6
    assert all(result["status"] == "done" and "loss" in result["metrics"] for result in before.values())
    ended = {tuple(line[1:3]) for line in log(book, "end")}
    n_before = len(log(book, "start"))

    assert main(command) == 0
    table = pd.read_csv(book.parent / "90_mine" / "runs.csv")
    assert (table["status"] == "done").all() and len(table) == 6
    done_before = {(str(r["values"]["width"]), str(r["values"]["seed"])) for r in before.values()}
    again = [tuple(line[1:3]) for line in log(book, "start")[n_before:]]
    assert set(again).isdisjoint(done_before) and len(again) == len(set(again)) == 6 - len(before)
    assert done_before <= ended
    assert {path.name for path in folders(book)} >= set(before)
    assert not list((book.parent / "90_mine").glob(".unfinished*"))
    # kernels are counted: at no time more than two at work
    marks = sorted((float(line[3]), 1 if line[0] == "start" else -1) for line in log(book)[2 * n_before :])
    assert max(sum(step for _, step in marks[: i + 1]) for i in range(len(marks))) <= 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the stand-in for a batch system is a shell script")
def test_jobs_of_a_batch_system(book, monkeypatch):
    """A stand-in for SLURM that starts its jobs at once: the job script, the worker and the kernel are real."""
    tools = book.parent / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(
        # as the real one, it keeps a copy: the script is deleted as soon as it has answered
        f'#!/bin/sh\ncp "$1" {book.parent}/job.sh\nsetsid sh {book.parent}/job.sh >{book.parent}/job.log 2>&1 &\n'
        'echo "Submitted batch job $!"\n'
    )
    (tools / "scancel").write_text('#!/bin/sh\nkill -- "-$1" 2>/dev/null\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    command = words(
        book, "--cluster", "slurm", "--walltime", "00:10:00", "--queue", "short", "--account", "lab7",
        grid=("width=3,4",),
    )  # fmt: skip
    assert main(command) == 0, (book.parent / "job.log").read_text()
    script = Path(book.parent / "job.sh").read_text()
    assert "#SBATCH -p short" in script and "#SBATCH -t 00:10:00" in script and "--nthreads 1" in script
    assert "#SBATCH -A lab7" in script and f"#SBATCH -o {book.parent}/90_mine/jobs/" in script
    assert [line[4] for line in log(book, "start")] == ["1", "1"]


def test_a_cluster_that_is_there(book):
    """A scheduler with one worker, started by somebody else, still stands after the sweep."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None
    ) as there:
        command = words(book, "--cluster", there.scheduler_address, grid=("width=3,4",))
        assert main(command) == 0
        assert len(log(book, "end")) == 2 and there.status.name == "running"


def test_a_worker_that_does_not_come_is_told():
    class Slow:
        asked = 0

        def wait_for_workers(self, number, timeout):
            self.asked += 1
            if self.asked < 3:
                raise TimeoutError

    told = []
    cluster.await_first(Slow(), "slurm", told.append, every=30.0)
    assert [line.split(" s")[0] for line in told] == ["30", "60"] and "queue of slurm" in told[0]
