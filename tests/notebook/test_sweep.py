"""Sweeps: which runs there are, how they are executed and survive kills, who can reach them, and what the report says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest

from cellop_nb.__main__ import main
from cellop_nb.errors import DataError, LabelError
from cellop_nb.notebook import runs
from cellop_nb.notebook import sweep as s
from cellop_nb.notebook.parameters import ParameterError

from ..families import hangs_up

# -- which runs

TYPED = """width: int = 2  # how many
rate: float = 0.1
keys: list[str] = ["a"]
layer: str | None = None
data: str = "synthetic_screen"
seed: int = 0
run_dir: str = "." """


@pytest.fixture
def book(tmp_path, write_notebook):
    """A notebook of typed parameters; nobody runs it."""
    return write_notebook(tmp_path / "90_mine.ipynb", TYPED, "width * rate")


def axes(book, *texts):
    return [s.read_axis(book, text) for text in texts]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("width=8,16, 32", (8, 16, 32)),
        ("width=0..3", (0, 1, 2, 3)),
        ("rate=1e-3,1", (1e-3, 1.0)),
        ("keys=a,b;b,c", (["a", "b"], ["b", "c"])),
        ("layer=none,counts", (None, "counts")),
    ],
)
def test_axes_are_read_in_their_types(book, text, values):
    assert tuple(s.read_axis(book, text).values) == values


@pytest.mark.parametrize("log", [False, True])
def test_a_continuous_range_is_read_and_drawn_from(book, log):
    axis = s.read_axis(book, f"rate={'log:' * log}1e-4..1")
    assert (axis.low, axis.high, axis.log) == (1e-4, 1.0, log)
    rates = [run.values["rate"] for run in s.Space(book, [axis]).sample(300)]
    assert min(rates) >= 1e-4 and max(rates) <= 1
    assert np.mean(np.array(rates) < 1e-2) == pytest.approx(0.5 if log else 0.01, abs=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width", "NAME=VALUES"),
        ("width=", "NAME=VALUES"),
        ("witdh=1,2", "did you mean 'width'"),
        ("width=1.5,2", "Expected int.*'1.5'"),
        ("width=4..1", "LOW below HIGH"),
        ("rate=log:-1..1", "above 0"),
        ("width=1,1", "different values"),
        ("run_dir=a,b", "set by the sweep"),
    ],
)
def test_wrong_axes_are_refused(book, text, message):
    with pytest.raises((LabelError, ParameterError), match=message):
        s.read_axis(book, text)


def test_limits_of_the_typed_parameters_hold_here_too():
    with pytest.raises(ParameterError, match="2 to 512"):
        s.read_axis("02_train_vae", "latent_dim=8,1024")


def test_a_grid_is_every_combination_and_carries_the_defaults(book):
    runs = s.Space(book, axes(book, "width=1,2", "seed=0..2"), {"rate": 0.5}).grid()
    assert [(run.values["width"], run.values["seed"]) for run in runs] == [
        (w, s) for w in (1, 2) for s in (0, 1, 2)
    ]
    assert all(run.values["rate"] == 0.5 and run.values["layer"] is None for run in runs)
    assert all("run_dir" not in run.values for run in runs)
    assert len({run.key for run in runs}) == 6


def test_a_continuous_axis_needs_sampling(book):
    with pytest.raises(LabelError, match="--random N"):
        s.Space(book, axes(book, "rate=0..1")).grid()


@pytest.mark.parametrize("named", [[], ["width=1,2", "width=3,4"]])
def test_nothing_or_the_same_twice_is_refused(book, named):
    with pytest.raises(LabelError, match="each named once"):
        s.Space(book, axes(book, *named))
    with pytest.raises(LabelError, match="'width' named twice"):
        s.Space(book, axes(book, "width=1,2"), {"width": 3})


def test_sampling_is_seeded_and_without_repetition(book):
    space = s.Space(book, axes(book, "width=0..9", "seed=0..4"))
    one, two, other = ([run.key for run in space.sample(20, seed=seed)] for seed in (1, 1, 2))
    assert one == two != other and len(set(one)) == 20
    assert len(space.sample(500)) == 50, "a grid has no more"
    lists = s.Space(book, axes(book, "keys=a,b;b,c", "layer=none,counts", "rate=0..1"))
    drawn = [(run.values["keys"], run.values["layer"]) for run in lists.sample(20)]
    assert all(keys in (["a", "b"], ["b", "c"]) and layer in (None, "counts") for keys, layer in drawn)


def test_more_runs_than_anybody_can_mean_are_refused_before_any_is_made(book):
    many = s.Space(book, axes(book, "seed=0..99999999", "width=1,2"))
    with pytest.raises(LabelError, match="at most 10,000 runs. Found 200,000,000"):
        many.grid()
    assert len(many.sample(5)) == 5, "a sample of them is not many"
    with pytest.raises(LabelError, match="at most 10,000 runs. Found 20,000"):
        many.sample(20_000)


def test_a_run_is_named_by_what_its_result_depends_on(book, tmp_path, write_notebook, monkeypatch):
    def key(notebook=book, fixed=None):
        return s.Space(notebook, axes(notebook, "width=3,4"), fixed).grid()[0].key

    first = key()
    other_grid = s.Space(book, axes(book, "seed=0..3", "width=4,3")).grid()
    assert first in {run.key for run in other_grid}, "the same run in another grid is the same run"
    assert key(fixed={"rate": 0.1}) == first, "a default that is spelt out changes nothing"
    assert key(fixed={"rate": 0.2}) != first
    edited = write_notebook(tmp_path / "91_mine.ipynb", TYPED, "width + rate")
    assert key(edited) != first
    screen, folder = tmp_path / "screen.h5ad", tmp_path / "screen.zarr"
    (folder / "X").mkdir(parents=True)
    for data, file in ((screen, screen), (folder, folder / "X" / "0")):
        file.write_bytes(b"one")
        before = key(fixed={"data": str(data)})
        os.utime(file, ns=(0, 0))
        assert key(fixed={"data": str(data)}) == before, "the same content at another time is the same"
        file.write_bytes(b"two")
        os.utime(file, ns=(1, 1))
        assert key(fixed={"data": str(data)}) != before != first, "other content of the same size is not"
    monkeypatch.setattr(s.cellop_nb, "__version__", "99.0.0")
    assert key() != first


def test_words_and_outputs_of_a_notebook_do_not_change_a_run(book):
    import nbformat

    before = s.Space(book, axes(book, "width=3,4")).grid()[0].key
    notebook = nbformat.read(book, 4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("# More words"))
    notebook.cells[-1].execution_count = 7
    nbformat.write(notebook, book)
    assert s.Space(book, axes(book, "width=3,4")).grid()[0].key == before


# -- what came out


def test_the_best_setting_is_not_one_lucky_seed():
    rows = [(f"r{w}{d}{k}", w, d, k, 50 - w + d) for w in (8, 16) for d in (1, 2) for k in range(3)]
    table = pd.DataFrame(rows, columns=["run", "width", "depth", "seed", "loss"])
    table["loss"] -= np.where((table["width"] == 8) & (table["seed"] == 1), 9.5, 0.0)
    sweep = s.Sweep(table.assign(status="done"), ["width", "depth", "seed"], "loss")
    assert sweep.done["width"].iloc[0] == 8
    assert sweep.settings(1)[["width", "depth", "runs"]].values.tolist() == [[16, 1, 3]]
    assert s.Sweep(sweep.runs, ["width", "depth", "seed"], "loss", "max").done["depth"].iloc[0] == 2
    trials = sweep.study().trials
    assert len(trials) == 12 and {name for trial in trials for name in trial.params} == set(sweep.varied)
    assert sweep.study().best_value == table["loss"].min()


def finished(folder, key, values, status="done", **metrics):
    error = "" if status == "done" else "ValueError: unlucky"
    result = {"status": status, "error": error, "seconds": 2.0, "values": values, "metrics": metrics}
    work = s.empty(folder / key)
    (work / "90_mine.ipynb").touch()
    runs.write_json(work / s.RESULT, result)


def test_the_table_has_a_row_for_every_planned_run(tmp_path):
    values = {
        "b": {"width": 2, "keys": ["x"], "layer": None},
        "a": {"width": 1, "keys": ["x", "y"], "layer": None},
        "c": {"width": 3, "keys": ["x"], "layer": None},
    }
    metrics = {"loss": 1.5, "deep": {"er": 2}, "width": 9, "name": "text", "yes": True}
    finished(tmp_path, "a", values["a"], **metrics, parameters={"width": 1}, inputs={"n": 1})
    finished(tmp_path, "b", values["b"], "failed")
    table = s.collect(tmp_path, [s.Run(values[key], key) for key in "bac"], "90_mine")
    assert table["run"].tolist() == ["b", "a", "c"]
    assert table["status"].tolist() == ["failed", "done", "missing"]
    row = table.set_index("run").loc["a"]
    assert row[["keys", "layer", "loss", "deep.er", "metric.width"]].tolist() == [
        "x,y",
        "none",
        1.5,
        2.0,
        9.0,
    ]
    assert {"name", "yes", "parameters", "inputs.n"}.isdisjoint(table.columns)
    assert table["notebook"].tolist() == ["b/90_mine.ipynb", "a/90_mine.ipynb", ""]
    names = ["width", "keys", "layer"]
    assert (s.Sweep(table, names).varied, s.Sweep(table, names).metric) == (["width", "keys"], "loss")
    with pytest.raises(LabelError, match="did you mean 'loss'"):
        s.Sweep(table, names, "los")


def test_low_is_good_unless_the_name_says_otherwise():
    table = pd.DataFrame({"run": ["a"], "test_loss": [1.0], "pearson_delta": [1.0], "status": ["done"]})
    assert s.Sweep(table, [], "test_loss").best == "min"
    assert s.Sweep(table, [], "pearson_delta").best == "max"
    assert s.Sweep(table, [], "test_loss", "max").best == "max"


@pytest.mark.parametrize("text", ["", '{"status": "do', "[]", '{"status": "done"}', "\\x00"])
def test_a_damaged_result_counts_as_none_and_is_replaced(tmp_path, text):
    finished(tmp_path, "a", {"width": 1}, loss=1.0)
    run = s.Run({"width": 1}, "a")
    assert not s.missing(tmp_path, [run])
    (tmp_path / "a" / s.RESULT).write_text(text)
    assert s.missing(tmp_path, [run]) == [run]


# -- executing

RUN = """width: int = 2  # how many
seed: int = 0
wait: float = 0.0  # seconds
log: str = ""
run_dir: str = "." """
WORK = """import os, time
from cellop_nb.notebook import runs

def note(word):
    with open(log, "a") as file:
        file.write(f"{word} {width} {seed} {time.time()} {os.environ['OMP_NUM_THREADS']}\\n")

note("start")
runs.write_json(runs.metrics_file(run_dir, "90_mine"), {"half": 1})
time.sleep(wait)
if width == 5 and seed == 1:
    raise ValueError("unlucky")
runs.write_json(runs.metrics_file(run_dir, "90_mine"), {"loss": (width - 4) ** 2 + 0.1 * seed})
note("end")"""


@pytest.fixture
def working(tmp_path, write_notebook):
    """A notebook that notes when it starts and ends."""
    return write_notebook(tmp_path / "90_mine.ipynb", RUN, WORK)


def command_of(working, *more, grid=("width=3,5", "seed=0,1"), wait=0.0, workers=2):
    axes = [word for axis in grid for word in ("-g", axis)]
    fixed = ["-p", "wait", str(wait), "-p", "log", str(working.parent / "log")]
    return [
        "sweep",
        str(working),
        *axes,
        *fixed,
        "--workers",
        str(workers),
        "--runs",
        str(working.parent),
        *more,
    ]


def log(working, word=None):
    path = working.parent / "log"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if word in (None, line[0])]


def folders(working):
    """Of the runs that have ended."""
    return [path.parent for path in (working.parent / "90_mine").glob(f"*/{s.RESULT}")]


@pytest.fixture
def no_cluster(monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("a run was executed")

    monkeypatch.setattr(s, "_here", never)


def test_a_sweep_from_command_to_report(working, capsys):
    assert main(command_of(working)) == 1
    captured = capsys.readouterr()
    assert "unlucky" in captured.err and "4/4" in captured.err and "failed=1" in captured.err
    folder = working.parent / "90_mine"
    table = pd.read_csv(folder / "runs.csv", keep_default_na=False, na_values=[""]).fillna({"error": ""})
    assert table["status"].tolist() == ["done", "done", "done", "failed"]
    assert table["loss"].tolist()[:3] == pytest.approx([1.0, 1.1, 1.0])
    assert table["error"][3] == "ValueError: unlucky"
    assert table["half"].isna()[:3].all(), "only what a run wrote last counts"
    assert {path.name for path in folders(working)} == set(table["run"])
    failed = nbformat.read(folder / table["notebook"][3], 4)
    assert any(o.output_type == "error" for c in failed.cells for o in c.get("outputs", []))

    summary = nbformat.read(folder / "summary.ipynb", 4)
    outputs = [o for c in summary.cells for o in c.get("outputs", [])]
    shown = " ".join(str(o.get("data", {})) for o in outputs)
    assert not any(o.output_type == "error" for o in outputs)
    assert table["run"][0] in shown and shown.count("image/png") == 1 and "unlucky" in shown

    started = len(log(working, "start"))
    assert started == 4
    again = command_of(working, grid=("width=3,5", "seed=0..2"), workers=1)
    assert main([*again, "--dry-run"]) == 0
    assert "4 finished, 2 to do" in capsys.readouterr().out
    assert main(again) == 1
    assert len(log(working, "start")) == started + 2, "only the two new runs"


CURVE = """from types import SimpleNamespace
from cellop_nb.training.callbacks import Pruning
pruning, trainer = Pruning(run_dir), SimpleNamespace(monitor="val_loss", max_epochs=10)
for epoch in range(1, 11):
    pruning.on_epoch_end(trainer, {"epoch": epoch, "val_loss": (width - 12) ** 2 + 10.0 / epoch})
"""


@pytest.mark.slow
def test_optuna_chooses_and_prunes_and_goes_on_after_a_kill(tmp_path, write_notebook):
    """kill -9 between two runs and one line of the journal cut off: every run that ended is kept, and counts."""
    working = write_notebook(tmp_path / "90_mine.ipynb", RUN, WORK.replace("time.sleep(wait)", CURVE))
    command = command_of(
        working, "--tpe", "10", "--prune", "--metric", "loss", grid=("width=6..60",), workers=1
    )
    client = start(working, *command)
    wait_for(lambda: len(folders(working)) >= 3)
    client.send_signal(signal.SIGKILL)
    client.wait()
    journal = working.parent / "90_mine" / "study.log"
    with journal.open("a") as file:
        file.write('{"op_code": 5, "stu')
    before = {str(s.result_of(path)["values"]["width"]) for path in folders(working)}
    assert main(command) == 0
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    table = pd.read_csv(working.parent / "90_mine" / "runs.csv")
    assert len(table) == 10 and set(table["status"]) <= {"done", "pruned"}
    assert before <= set(table["width"].astype(str)), "what had ended before the kill"
    started = [line[1] for line in log(working, "start")]
    assert not [width for width in before if started.count(width) > 1]


def test_a_search_needs_a_metric_that_the_notebook_writes(working, no_cluster, capsys):
    command = ["sweep", str(working), "-g", "width=0..9", "--runs", str(working.parent)]
    for more, message in (
        (["--tpe", "3"], "--tpe with a --metric"),
        (["--tpe", "3", "--metric", "loss", "--random", "3"], "not with --random"),
        (["--prune"], "--prune beside --tpe"),
        (["--tpe", "0", "--metric", "loss"], "at least 1"),
    ):
        assert main([*command, *more]) == 2
        assert message in capsys.readouterr().err
    space = s.Space(working, axes(working, "width=0..9"))
    (working.parent / "found").mkdir()
    search = s.Search(space, working.parent / "found", "los")
    run = next(search.choose(2))
    with pytest.raises(LabelError, match="did you mean 'loss'"):
        search.tell(run, {"status": "done", "metrics": {"loss": 1.0}})


def test_a_finished_sweep_starts_nothing(working, no_cluster, capsys):
    assert main([*command_of(working), "--dry-run"]) == 0
    keys = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("to do")][1:]
    for key in keys:
        values = {"width": 3, "seed": 0, "wait": 0.0, "log": ""}
        finished(working.parent / "90_mine", key, values, loss=1.0)
    assert main(command_of(working)) == 0


def test_what_failed_is_run_again_where_it_is_asked_for_alone(working, no_cluster, capsys):
    command, folder = command_of(working), working.parent / "90_mine"
    planned = s.Space(
        working, axes(working, "width=3,5", "seed=0,1"), {"wait": 0.0, "log": str(working.parent / "log")}
    ).grid()
    for run in planned:
        finished(folder, run.key, run.values, "failed" if run is planned[1] else "done", loss=1.0)
    assert s.missing(folder, planned) == []
    assert s.missing(folder, planned, retry_failed=True) == [planned[1]]
    assert main([*command, "--dry-run"]) == 0
    assert "4 finished, 0 to do" in capsys.readouterr().out
    assert main([*command, "--dry-run", "--retry-failed"]) == 0
    told = capsys.readouterr().out
    assert "3 finished, 1 to do" in told
    assert [line.split()[0] for line in told.splitlines()[1:] if line.endswith("to do")] == [planned[1].key]


def test_a_search_runs_again_what_failed_where_it_is_asked_to(working, no_cluster):
    folder = working.parent / "found"
    folder.mkdir()
    space = s.Space(working, axes(working, "width=0..40"))
    search = s.Search(space, folder, "loss")
    chosen = []
    for run in search.choose(3):
        finished(folder, run.key, run.values, "failed" if len(chosen) == 1 else "done", loss=1.0)
        search.tell(run, s.result_of(folder / run.key))
        chosen.append(run.key)
    assert list(s.Search(space, folder, "loss").choose(3)) == []
    assert [run.key for run in s.Search(space, folder, "loss").choose(3, retry_failed=True)] == chosen[1:2]


@pytest.mark.parametrize("flag", [[], ["--retry-failed"]])
def test_the_command_passes_on_whether_failed_runs_are_chosen_again(working, monkeypatch, flag):
    asked = []
    monkeypatch.setattr(
        s.Search, "choose", lambda self, n_runs, *, retry_failed=False: iter(asked.append(retry_failed) or ())
    )
    monkeypatch.setattr(s, "execute", lambda notebook, folder, chosen, **settings: chosen)
    monkeypatch.setattr("cellop_nb.commands.sweep._report", lambda *arguments: 0)
    command = ["sweep", str(working), "-g", "width=0..9", "--runs", str(working.parent)]
    assert main([*command, "--tpe", "2", "--metric", "loss", *flag]) == 0
    assert asked == [bool(flag)]


def test_one_sweep_at_a_time(working, no_cluster, capsys):
    with s.locked(working.parent / "90_mine"):
        assert main(command_of(working)) == 2
    assert "another at work" in capsys.readouterr().err


def test_the_number_of_runs_is_refused_by_the_command_too(working, no_cluster, capsys):
    assert main(["sweep", str(working), "-g", "seed=0..99999999"]) == 2
    assert "Found 100,000,000" in capsys.readouterr().err


@pytest.mark.parametrize(
    "repeated", [["--workers", "1", "--workers=2"], ["-p", "wait", "1", "-p", "wait", "2"]]
)
def test_an_option_that_is_there_twice_is_refused(working, no_cluster, capsys, repeated):
    with pytest.raises(SystemExit) if "--workers" in repeated else contextlib.nullcontext() as stopped:
        assert main(["sweep", str(working), "-g", "width=1,2", *repeated]) == 2
    assert stopped is None or stopped.value.code == 2
    assert "twice" in capsys.readouterr().err


# -- kills ------------------------------------------------------------------------------------------------


def start(working, *arguments, **variables):
    command = [sys.executable, "-m", "cellop_nb", *arguments]
    with open(working.parent / "client.log", "w") as out:
        return subprocess.Popen(
            command,
            cwd=working.parent,
            stdout=out,
            stderr=out,
            env={**os.environ, **variables},
            preexec_fn=hangs_up,
        )


def wait_for(condition, seconds=90):
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)
    return value


def kernels_of(client):
    """Kernels below a process."""
    children = psutil.Process(client.pid).children(recursive=True)
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "ipykernel" in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_killed_kernel_and_a_killed_client_lose_nothing(working):
    """kill -9 a kernel, then the client; the same command again does what is missing, and nothing twice."""
    command = command_of(working, grid=("width=2,3,4", "seed=0,1"), wait=1.0)
    client = start(working, *command)
    try:
        wait_for(lambda: log(working, "end"))
        victim = wait_for(lambda: kernels_of(client))[0]
        victim.send_signal(signal.SIGKILL)
        wait_for(lambda: len(folders(working)) >= 3)
        family = psutil.Process(client.pid).children(recursive=True)
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, "kernels of a killed client end"
    before = {path.name: json.loads((path / s.RESULT).read_text()) for path in folders(working)}
    assert 3 <= len(before) < 6
    failed = {name for name, result in before.items() if result["status"] == "failed"}
    assert len(failed) <= 1 and all("DeadKernelError" in before[name]["error"] for name in failed)
    before = {name: result for name, result in before.items() if name not in failed}
    assert all("loss" in result["metrics"] for result in before.values())
    ended = {tuple(line[1:3]) for line in log(working, "end")}
    n_before = len(log(working, "start"))

    assert main([*command, "--retry-failed"]) == 0
    table = pd.read_csv(working.parent / "90_mine" / "runs.csv")
    assert (table["status"] == "done").all() and len(table) == 6
    done_before = {(str(r["values"]["width"]), str(r["values"]["seed"])) for r in before.values()}
    again = [tuple(line[1:3]) for line in log(working, "start")[n_before:]]
    assert set(again).isdisjoint(done_before) and len(again) == len(set(again)) == 6 - len(before)
    assert done_before <= ended
    assert {path.name for path in folders(working)} >= set(before)
    # kernels are counted: at no time more than two at work
    marks = sorted((float(line[3]), 1 if line[0] == "start" else -1) for line in log(working)[2 * n_before :])
    assert max(sum(step for _, step in marks[: i + 1]) for i in range(len(marks))) <= 2


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_ends_a_sweep_in_order(working, number):
    """Kernels and temporary folders are gone, what had ended is kept, said, and not done again."""
    temporary = working.parent / "tmp"
    temporary.mkdir()
    grid = ["-g", "width=3,4", "-g", "wait=0,60", "-p", "log", str(working.parent / "log")]
    command = ["sweep", str(working), *grid, "--workers", "1", "--runs", str(working.parent)]
    client = start(working, *command, TMPDIR=str(temporary))
    wait_for(lambda: len(log(working, "start")) == 2)
    kernels = kernels_of(client)
    client.send_signal(number)
    assert client.wait(60) == 128 + number
    text = (working.parent / "client.log").read_text()
    assert "Traceback" not in text and text.strip().endswith(f"Stopped by {number.name}.")
    assert f"1 of 4 runs are kept in {working.parent / '90_mine'}; the same command does the rest" in text
    assert kernels and not psutil.wait_procs(kernels, timeout=20)[1]
    assert [s.result_of(path)["status"] for path in folders(working)] == ["done"]
    assert list(temporary.iterdir()) == []
    left = {path.name for path in (working.parent / "90_mine").iterdir()}
    assert left == {folders(working)[0].name, ".notebook", ".lock"}, "no half run"
    assert main([*command, "--dry-run"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the stand-in for a batch system is a shell script")
def test_jobs_of_a_batch_system(working, monkeypatch):
    """A stand-in for SLURM that starts its jobs at once: the job script, the worker and the kernel are real."""
    tools = working.parent / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(
        # as the real one, it keeps a copy: the script is deleted as soon as it has answered
        f'#!/bin/sh\ncp "$1" {working.parent}/job.sh\n'
        f"setsid sh {working.parent}/job.sh >{working.parent}/job.log 2>&1 &\n"
        'echo "Submitted batch job $!"\n'
    )
    (tools / "scancel").write_text('#!/bin/sh\nkill -- "-$1" 2>/dev/null\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    command = command_of(
        working, "--cluster", "slurm", "--job", "walltime=00:10:00", "--job", "queue=short", "--job", "account=lab7",
        grid=("width=3,4",),
    )  # fmt: skip
    assert main(command) == 0, (working.parent / "job.log").read_text()
    script = Path(working.parent / "job.sh").read_text()
    assert "#SBATCH -p short" in script and "#SBATCH -t 00:10:00" in script and "--nthreads 1" in script
    assert "#SBATCH -A lab7" in script and f"#SBATCH -o {working.parent}/90_mine/jobs/" in script
    assert [line[4] for line in log(working, "start")] == ["1", "1"]


# -- doors: a scheduler runs whatever code who connects to it sends


@pytest.fixture
def certificate(tmp_path, monkeypatch):
    """Dask's configuration, here and in other processes, names the certificate of a cluster that is there."""
    import dask
    from distributed.security import Security

    own = Security.temporary()
    tls = own.get_tls_config_for_role("client")
    for name, variable in (("ca_file", "CA_FILE"), ("key", "CLIENT__KEY"), ("cert", "CLIENT__CERT")):
        (tmp_path / name).write_text(tls[name])
        monkeypatch.setenv(f"DASK_DISTRIBUTED__COMM__TLS__{variable}", str(tmp_path / name))
    with dask.config.set():
        dask.config.refresh()
        yield own


@pytest.mark.slow
def test_a_cluster_that_is_there(working, certificate):
    """A scheduler with one worker, started by somebody else: a killed worker loses nothing, and it stands afterwards."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0",
        protocol="tls://", security=certificate,
    ) as there:  # fmt: skip
        command = command_of(working, "--cluster", there.scheduler_address, grid=("width=3,4",), wait=1.0)
        client = start(working, *command)
        wait_for(lambda: log(working, "start"))
        worker = psutil.Process(next(iter(there.workers.values())).pid)
        worker.send_signal(signal.SIGKILL)
        assert client.wait(120) == 0, (working.parent / "client.log").read_text()
        assert len({line[1] for line in log(working, "end")}) == 2 and there.status.name == "running"


def test_a_stranger_cannot_connect_to_the_scheduler_of_a_sweep(tmp_path):
    """It has the address and even a certificate, but not the one that was made for this run."""
    from distributed import Client
    from distributed.security import Security

    with s.queue_cluster("slurm", s.read_job([]), tmp_path / "jobs") as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tls://")
        assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "jobs").iterdir())
        with Client(cluster, set_as_default=False) as owner:
            assert owner.scheduler_info()["address"] == address
        for stranger, security in ((address.replace("tls", "tcp"), None), (address, Security.temporary())):
            with pytest.raises((OSError, TimeoutError)):
                Client(stranger, security=security, timeout=2, set_as_default=False)


def test_an_address_needs_certificates():
    import dask

    nothing = dask.config.set({"distributed.comm.tls.ca-file": None})
    with nothing, pytest.raises(DataError, match="certificates in Dask's configuration"):
        s.connected("tls://127.0.0.1:9")


def test_a_scheduler_without_tls_is_refused(monkeypatch, certificate):
    with pytest.raises(LabelError, match="tls://HOST:PORT. Found tcp://10.0.0.1:8786, where whoever"):
        s.check_where("tcp://10.0.0.1:8786")
    with pytest.raises(LabelError, match="local, slurm, pbs, sge or tls"):
        s.check_where("cloud")
    monkeypatch.setattr(s, "_SEARCH_SECONDS", 0.5)
    with pytest.raises(DataError, match="a Dask scheduler at tls://127.0.0.1:9.*dask scheduler"):
        s.connected("tls://127.0.0.1:9")


@pytest.fixture
def looking(tmp_path, write_notebook):
    look = """import psutil
from cellop_nb.notebook import runs
above = psutil.Process().parent()
ports = [c.laddr for c in above.net_connections("inet") if c.status == "LISTEN"]
runs.write_json(runs.metrics_file(run_dir, "90_mine"), {"ports": len(ports), "above": above.pid})"""
    return write_notebook(tmp_path / "90_mine.ipynb", RUN, look)


def test_a_sweep_on_this_machine_listens_on_no_port(looking):
    """While a run is at work. A kernel's own socket for what its subprocesses print is ipykernel's, and takes no code."""
    client = start(looking, "sweep", str(looking), "-g", "seed=0", "--runs", str(looking.parent))
    assert client.wait(120) == 0
    table = pd.read_csv(looking.parent / "90_mine" / "runs.csv")
    assert table[["ports", "above"]].values.tolist() == [[0, client.pid]]


@pytest.mark.parametrize(
    "text",
    [
        "account=lab7\n#SBATCH --uid=0",
        "account=lab7\n",
        "queue=short; rm -rf x",
        "memory=4GB\n#SBATCH -x",
        "walltime=01:00:00\nreboot",
        "logs=/tmp/my runs/jobs",
        "logs=/tmp/$(reboot)/jobs",
        "queue",
        "memory=lots",
    ],
)
def test_what_would_not_stay_one_word_of_a_job_script_is_refused(text):
    with pytest.raises(DataError, match="To fix it"):
        s.read_job([text])
    given = ["memory=8 GB", "walltime=1-02:00:00", "queue=short", "account=lab_7.a"]
    assert s.read_job(given) == dict(text.split("=") for text in given)


def test_leaving_a_sweep_ends_its_kernels_and_keeps_no_half_run(working):
    """As Ctrl-C does."""
    folder = working.parent / "90_mine"
    axes_of_it = [s.read_axis(working, "width=3,4"), s.read_axis(working, "wait=0,60")]
    planned = s.Space(working, axes_of_it, {"log": str(working.parent / "log")}).grid()
    ended = s.execute(working, folder, planned, workers=2)
    next(ended)
    wait_for(lambda: len(log(working, "start")) >= 2)
    began = time.monotonic()
    ended.close()
    assert time.monotonic() - began < 20
    assert not kernels_of(psutil.Process())
    assert all(s.result_of(path)["status"] == "done" for path in folders(working))


def test_a_worker_that_does_not_come_is_told():
    class Slow:
        asked = 0

        def wait_for_workers(self, number, timeout):
            self.asked += 1
            if self.asked < 3:
                raise TimeoutError

    told = []
    s.await_first(Slow(), "slurm", told.append, every=30.0)
    assert [line.split(" s")[0] for line in told] == ["30", "60"] and "queue of slurm" in told[0]
