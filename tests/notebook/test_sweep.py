"""Sweeps: which runs there are, how they are executed and survive kills, who can reach them, and what the report says."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import re
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
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cellop_nb.__main__ import main
from cellop_nb.errors import DataError, LabelError
from cellop_nb.notebook import style
from cellop_nb.notebook import sweep as s
from cellop_nb.notebook import sweep_figures as figures
from cellop_nb.notebook.parameters import ParameterError

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
        ("rate=1e-4..1e-2", s.Interval(1e-4, 1e-2)),
        ("rate=log:1e-4..1e-2", s.Interval(1e-4, 1e-2, log=True)),
        ("keys=a,b;b,c", (["a", "b"], ["b", "c"])),
        ("layer=none,counts", (None, "counts")),
    ],
)
def test_axes_of_itare_read_in_their_types(book, text, values):
    read = s.read_axis(book, text).values
    assert (tuple(read) if isinstance(read, range) else read) == values


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
def test_wrong_axes_of_itare_refused(book, text, message):
    with pytest.raises((LabelError, ParameterError), match=message):
        s.read_axis(book, text)


def test_limits_of_the_typed_parameters_hold_here_too():
    with pytest.raises(ParameterError, match="2 to 512"):
        s.read_axis("02_train_vae", "latent_dim=8,1024")


def test_a_grid_is_every_combination_and_carries_the_defaults(book):
    runs = s.plan(book, axes(book, "width=1,2", "seed=0..2"), {"rate": 0.5})
    assert [(run.values["width"], run.values["seed"]) for run in runs] == [
        (w, s) for w in (1, 2) for s in (0, 1, 2)
    ]
    assert all(run.values["rate"] == 0.5 and run.values["layer"] is None for run in runs)
    assert all("run_dir" not in run.values for run in runs)
    assert len({run.key for run in runs}) == 6


def test_a_continuous_axis_needs_sampling(book):
    with pytest.raises(LabelError, match="--random N"):
        s.plan(book, axes(book, "rate=0..1"))


@pytest.mark.parametrize("named", [[], ["width=1,2", "width=3,4"]])
def test_nothing_or_the_same_twice_is_refused(book, named):
    with pytest.raises(LabelError, match="each named once"):
        s.plan(book, axes(book, *named))
    with pytest.raises(LabelError, match="'width' named twice"):
        s.plan(book, axes(book, "width=1,2"), {"width": 3})


def test_sampling_is_seeded_and_without_repetition(book):
    chosen = axes(book, "width=0..9", "seed=0..4")
    one, two = (s.sample(chosen, 20, seed=1) for _ in range(2))
    assert one == two != s.sample(chosen, 20, seed=2)
    assert len({json.dumps(values) for values in one}) == 20
    assert len(s.sample(chosen, 500)) == 50, "a grid has no more"
    mixed = s.sample(axes(book, "rate=log:1e-4..1e-2", "width=1,2"), 30)
    assert len({json.dumps(values) for values in mixed}) == 30
    assert {values["width"] for values in mixed} == {1, 2}


def test_more_runs_than_anybody_can_mean_are_refused_before_any_is_made(book):
    many = axes(book, "seed=0..99999999", "width=1,2")
    with pytest.raises(LabelError, match="at most 10,000 runs. Found 200,000,000"):
        s.plan(book, many)
    assert len(s.plan(book, many, n_random=5)) == 5, "a sample of them is not many"
    with pytest.raises(LabelError, match="at most 10,000 runs. Found 20,000"):
        s.plan(book, many, n_random=20_000)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e4), st.booleans(), st.integers(0, 1000))
def test_draws_stay_inside_their_interval(low, factor, log, seed):
    interval = s.Interval(low, low * factor, log)
    source = random.Random(seed)
    assert all(interval.low <= interval.draw(source) <= interval.high for _ in range(20))


def test_log_draws_are_uniform_in_the_logarithm(book):
    interval, source = s.Interval(1e-4, 1e0, log=True), random.Random(0)
    decades = [math.floor(math.log10(interval.draw(source))) for _ in range(4000)]
    assert all(abs(decades.count(d) / 4000 - 0.25) < 0.03 for d in (-4, -3, -2, -1))


def test_a_run_is_named_by_what_its_result_depends_on(book, tmp_path, write_notebook, monkeypatch):
    def key(notebook=book, fixed=None):
        return s.plan(notebook, axes(notebook, "width=3,4"), fixed)[0].key

    first = key()
    other_grid = s.plan(book, axes(book, "seed=0..3", "width=4,3"))
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

    before = s.plan(book, axes(book, "width=3,4"))[0].key
    notebook = nbformat.read(book, 4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("# More words"))
    notebook.cells[-1].execution_count = 7
    nbformat.write(notebook, book)
    assert s.plan(book, axes(book, "width=3,4"))[0].key == before


# -- what came out

PLANTED = {8: 0.0, 16: -3.0, 32: -5.0}


def grid(rng, *, noise=1.0, n_seeds=5):
    """Runs with a planted effect of `width`, one of `depth`, and seeds that move everything."""
    rows = []
    for seed in range(n_seeds):
        luck = 10 * rng.normal()
        own = {width: noise * rng.normal() for width in PLANTED}
        for width, depth in itertools.product(PLANTED, (1, 2)):
            loss = 50 + PLANTED[width] + 4 * depth + luck + own[width] + 0.1 * rng.normal()
            rows.append({"run": f"r{len(rows)}", "width": width, "depth": depth, "seed": seed, "loss": loss})
    return pd.DataFrame(rows).assign(status="done", seconds=1.0, error="", notebook="")


VARIED = ["width", "depth", "seed"]


def test_effects_are_the_differences_inside_settings_and_seeds():
    effects = (
        s.Sweep(table := grid(np.random.default_rng(0)), VARIED, "loss")
        .effects()
        .set_index(["parameter", "value"])
    )
    for width in PLANTED:
        per_seed = []
        for seed in range(5):
            differences = []
            for depth in (1, 2):
                here = table[(table["seed"] == seed) & (table["depth"] == depth)].set_index("width")["loss"]
                differences.append(here[width] - sum(here[w] for w in PLANTED) / 3)
            per_seed.append(sum(differences) / 2)
        row = effects.loc[("width", width)]
        low, high = stats.t.interval(0.95, 4, loc=np.mean(per_seed), scale=stats.sem(per_seed))
        assert [row["effect"], row["low"], row["high"]] == pytest.approx([np.mean(per_seed), low, high])
        assert (row["seeds"], row["runs"]) == (5, 10)


def test_intervals_cover_the_planted_effect_as_often_as_they_say():
    rng = np.random.default_rng(1)
    truth = {width: value - np.mean(list(PLANTED.values())) for width, value in PLANTED.items()}
    inside = []
    for _ in range(200):
        effects = s.Sweep(grid(rng), VARIED, "loss").effects().query("parameter == 'width'")
        inside += [row.low <= truth[row.value] <= row.high for row in effects.itertuples()]
    assert 0.92 < np.mean(inside) < 0.98


def test_a_failed_run_does_not_tilt_the_comparison():
    table = grid(np.random.default_rng(2), noise=0.0)
    table.loc[(table["width"] == 8) & (table["seed"] == 0) & (table["depth"] == 1), "status"] = "failed"
    effects = (
        s.Sweep(table, VARIED, "loss").effects().query("parameter == 'width'").set_index("value")["effect"]
    )
    assert effects[32] - effects[8] == pytest.approx(-5.0, abs=0.2), (
        "whatever the luck of the seed that lacks one"
    )


def test_one_seed_gives_effects_without_an_interval():
    effects = s.Sweep(grid(np.random.default_rng(0), n_seeds=1), ["width", "depth"], "loss").effects()
    assert effects["effect"].notna().all()
    assert effects[["low", "high"]].isna().all(axis=None)


def test_a_random_sample_has_trends_but_no_effects():
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"rate": rng.uniform(size=40), "width": rng.integers(1, 4, 40), "status": "done"})
    table["loss"] = -table["rate"] + 0.1 * rng.normal(size=40)
    sweep = s.Sweep(table.assign(run="r", seconds=1.0, error="", notebook=""), ["rate"], "loss")
    assert sweep.effects().empty
    effects = s.Sweep(table, ["rate", "width", "seed"], "loss").trends().set_index("parameter")
    assert effects.loc["rate", "spearman"] == pytest.approx(stats.spearmanr(table["rate"], table["loss"])[0])
    assert effects.loc["rate", "high"] < 0 < effects.loc["width", "high"]
    assert effects.loc["width", "low"] < 0


def test_the_best_setting_is_not_one_lucky_seed():
    table = grid(np.random.default_rng(4))
    lucky = (
        (table["width"] == 8)
        & (table["depth"] == 1)
        & (table["seed"] == table.loc[table["loss"].idxmin(), "seed"])
    )
    table.loc[lucky, "loss"] = table["loss"].min() - 0.5
    sweep = s.Sweep(table, VARIED, "loss")
    assert sweep.best_runs(1)["width"].item() == 8
    best = sweep.settings(1)
    assert best[["width", "depth", "runs"]].values.tolist() == [[32, 1, 5]]
    assert s.Sweep(table, VARIED, "loss", "max").best_runs(1)["depth"].item() == 2


def finished(folder, key, values, status="done", **metrics):
    error = "" if status == "done" else "ValueError: unlucky"
    result = {"status": status, "error": error, "seconds": 2.0, "values": values, "metrics": metrics}
    work = s.draft(folder, key)
    (work / "90_mine.ipynb").touch()
    assert s.finish(work, folder / key, result)


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


def test_a_draft_counts_for_nothing_and_the_first_of_two_workers_wins(tmp_path):
    work = s.draft(tmp_path, "a")
    (work / "half.csv").write_text("1,2")
    assert s.collect(tmp_path, [s.Run({"width": 1}, "a")], "90_mine")["status"].tolist() == ["missing"]
    finished(tmp_path, "a", {"width": 1}, loss=1.0)
    assert not s.finish(work, tmp_path / "a", {"status": "done", "values": {}, "metrics": {"loss": 2.0}})
    assert s.result_of(tmp_path / "a")["metrics"] == {"loss": 1.0}
    s.draft(tmp_path, "b")
    s.sweep_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_run_is_replaced_by_its_repetition(tmp_path):
    finished(tmp_path, "a", {"width": 1}, "failed")
    finished(tmp_path, "a", {"width": 1}, loss=1.0)
    assert s.result_of(tmp_path / "a")["status"] == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("text", ["", '{"status": "do', "[]", '{"status": "done"}', "\\x00"])
def test_a_damaged_result_counts_as_none_and_is_replaced(tmp_path, text):
    finished(tmp_path, "a", {"width": 1}, loss=1.0)
    (tmp_path / "a" / s.RESULT).write_text(text)
    run = s.Run({"width": 1}, "a")
    assert s.missing(tmp_path, [run]) == [run]
    finished(tmp_path, "a", {"width": 1}, loss=2.0)
    assert s.result_of(tmp_path / "a")["metrics"] == {"loss": 2.0}


def texts(fig):
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def test_the_picture_follows_the_number_of_parameters():
    table = grid(np.random.default_rng(5))
    one = figures.sweep_map(table, ["width", "seed"], "loss")
    assert one.axes[0].get_xlabel() == "width"
    two = figures.sweep_map(table, VARIED, "loss")
    means = table.groupby(["depth", "width"])["loss"].mean()
    assert {f"{value:.4g}" for value in means} == set(texts(two))
    frame = two.axes[0].lines[-1].get_xydata()[0]
    assert frame.tolist() == [2, 0], "width 32, depth 1"
    many = figures.sweep_map(table.assign(rate=np.geomspace(1e-4, 1, len(table))), [*VARIED, "rate"], "loss")
    assert len(many.axes[0].lines) == len(table) + 4
    assert {"8", "16", "32", "1e-4", "1"} <= set(texts(many))
    effect = figures.sweep_effects(s.Sweep(table, VARIED, "loss").effects(), "loss")
    assert [ax.get_xlabel() for ax in effect.axes] == ["width", "depth"]
    assert all(style.png(fig).startswith(b"\x89PNG") for fig in (one, two, many, effect))


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
runs.write_metrics(run_dir, "90_mine", {"half": 1})
time.sleep(wait)
if width == 5 and seed == 1:
    raise ValueError("unlucky")
runs.write_metrics(run_dir, "90_mine", {"loss": (width - 4) ** 2 + 0.1 * seed})
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
    return [path for path in (working.parent / "90_mine").iterdir() if path.is_dir() and path.name[0] != "."]


@pytest.fixture
def no_cluster(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(s, "_here", never)


def test_a_sweep_from_command_to_report(working, capsys):
    assert main(command_of(working)) == 1
    captured = capsys.readouterr()
    assert "unlucky" in captured.err and "4/4" in captured.err and "failed=1" in captured.err
    folder = working.parent / "90_mine"
    table = pd.read_parquet(folder / "runs.parquet")
    assert table["status"].tolist() == ["done", "done", "done", "failed"]
    assert table["loss"].tolist()[:3] == pytest.approx([1.0, 1.1, 1.0])
    assert table["error"][3] == "ValueError: unlucky"
    assert table["half"].isna()[:3].all(), "only what a run wrote last counts"
    csv = pd.read_csv(folder / "runs.csv", keep_default_na=False, na_values=[""])
    pd.testing.assert_frame_equal(csv[["run", "width", "loss"]], table[["run", "width", "loss"]])
    assert {path.name for path in folders(working)} == set(table["run"])
    failed = nbformat.read(folder / table["notebook"][3], 4)
    assert any(o.output_type == "error" for c in failed.cells for o in c.get("outputs", []))

    summary = nbformat.read(folder / "summary.ipynb", 4)
    outputs = [o for c in summary.cells for o in c.get("outputs", [])]
    shown = " ".join(str(o.get("data", {})) for o in outputs)
    assert not any(o.output_type == "error" for o in outputs)
    assert f'<a href="{table["notebook"][0]}">' in shown and "image/png" in shown and "unlucky" in shown

    started = len(log(working, "start"))
    assert started == 4 and not list(folder.glob(".unfinished*"))
    again = command_of(working, grid=("width=3,5", "seed=0..2"), workers=1)
    assert main([*again, "--dry-run"]) == 0
    assert "4 finished, 2 to do" in capsys.readouterr().out
    assert main(again) == 1
    assert len(log(working, "start")) == started + 2, "only the two new runs"


def test_a_finished_sweep_starts_nothing(working, no_cluster, capsys):
    s.finish(s.draft(working.parent / "90_mine", "x"), working.parent / "90_mine" / "x", {"status": "failed"})
    assert main([*command_of(working), "--dry-run"]) == 0
    keys = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("to do")][1:]
    for key in keys:
        values = {"width": 3, "seed": 0, "wait": 0.0, "log": ""}
        result = {"status": "done", "error": "", "seconds": 1.0, "values": values, "metrics": {"loss": 1.0}}
        s.finish(s.draft(working.parent / "90_mine", key), working.parent / "90_mine" / key, result)
    assert main(command_of(working)) == 0


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
def test_wrong_sweeps_are_refused_before_anything_runs(more, message, working, no_cluster, capsys):
    assert main(["sweep", str(working), "--runs", str(working.parent), *more]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err) and "To fix it" in err
    assert not (working.parent / "90_mine").exists()


def test_one_sweep_at_a_time(working, no_cluster):
    with s.locked(working.parent / "90_mine"), pytest.raises(DataError, match="another at work.*--name"):
        list(s.execute(working, working.parent / "90_mine", []))


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


def start(working, *arguments):
    command = [sys.executable, "-m", "cellop_nb", *arguments]
    with open(working.parent / "client.log", "w") as out:
        return subprocess.Popen(command, cwd=working.parent, stdout=out, stderr=out)


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
    assert not list((working.parent / "90_mine").glob(".unfinished*"))
    # kernels are counted: at no time more than two at work
    marks = sorted((float(line[3]), 1 if line[0] == "start" else -1) for line in log(working)[2 * n_before :])
    assert max(sum(step for _, step in marks[: i + 1]) for i in range(len(marks))) <= 2


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
        working, "--cluster", "slurm", "--walltime", "00:10:00", "--queue", "short", "--account", "lab7",
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

    with s.queue_cluster("slurm", s.Job(logs=tmp_path / "jobs")) as cluster:
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
        s._connected("tls://127.0.0.1:9")


def test_a_scheduler_without_tls_is_refused(monkeypatch, certificate):
    with pytest.raises(LabelError, match="tls://HOST:PORT. Found tcp://10.0.0.1:8786, where whoever"):
        s.check_where("tcp://10.0.0.1:8786")
    with pytest.raises(LabelError, match="local, slurm, pbs, sge or tls"):
        s.check_where("cloud")
    monkeypatch.setattr(s, "_SEARCH_SECONDS", 0.5)
    with pytest.raises(DataError, match="a Dask scheduler at tls://127.0.0.1:9.*dask scheduler"):
        s._connected("tls://127.0.0.1:9")


@pytest.fixture
def looking(tmp_path, write_notebook):
    look = """import psutil
from cellop_nb.notebook import runs
above = psutil.Process().parent()
ports = [c.laddr for c in above.net_connections("inet") if c.status == "LISTEN"]
runs.write_metrics(run_dir, "90_mine", {"ports": len(ports), "above": above.pid})"""
    return write_notebook(tmp_path / "90_mine.ipynb", RUN, look)


def test_a_sweep_on_this_machine_listens_on_no_port(looking):
    """While a run is at work. A kernel's own socket for what its subprocesses print is ipykernel's, and takes no code."""
    client = start(looking, "sweep", str(looking), "-g", "seed=0", "--runs", str(looking.parent))
    assert client.wait(120) == 0
    table = pd.read_csv(looking.parent / "90_mine" / "runs.csv")
    assert table[["ports", "above"]].values.tolist() == [[0, client.pid]]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("account", "lab7\n#SBATCH --uid=0"),
        ("account", "lab7\n"),
        ("queue", "short; rm -rf x"),
        ("memory", "4GB\n#SBATCH -x"),
        ("walltime", "01:00:00\nreboot"),
        ("logs", Path("/tmp/my runs/jobs")),
        ("logs", Path("/tmp/$(reboot)/jobs")),
    ],
)
def test_what_would_not_stay_one_word_of_a_job_script_is_refused(option, value):
    with pytest.raises(DataError, match="To fix it"):
        s.Job(**{option: value})
    assert s.Job("8 GB", "1-02:00:00", "short", "lab_7.a", Path("/scratch/me/runs-1/jobs")).queue == "short"


def test_leaving_a_sweep_ends_its_kernels_and_keeps_no_half_run(working):
    """As Ctrl-C does."""
    folder = working.parent / "90_mine"
    axes_of_it = [s.read_axis(working, "width=3,4"), s.read_axis(working, "wait=0,60")]
    planned = s.plan(working, axes_of_it, {"log": str(working.parent / "log")})
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
