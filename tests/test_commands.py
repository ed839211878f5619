"""The command line as a user types it: what it refuses, what it runs, what it leaves behind."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from cellop_nb.__main__ import build_parser, main
from cellop_nb.commands import environment, tools
from cellop_nb.commands import run as run_command
from cellop_nb.notebook import runs

BOOKS = {
    "00_quickstart": "seed: int = 0",
    "01_data": 'data: str = "synthetic_screen"\nlayer: str | None = None\n'
    'perturbation_key: str = "perturbation"\n'
    'context_key: str | list[str] | None = "cell_type"\ncontrol: str = "control"\nseed: int = 0  # seeds (at least 0)',
    "02_train_vae": "latent_dim: int = 32  # size (2 to 512)\nshuffle: bool = True\nmax_epochs: int = 60\nseed: int = 0",
}


WORK = """from cellop_nb.notebook import runs
numbers = {{name: value for name, value in list(globals().items()) if name in batch_names}}
runs.write_json(runs.metrics_file(run_dir, "{name}"), numbers)"""


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Three small numbered notebooks; the second one fails where the seed is 13."""
    import nbformat

    folder = tmp_path_factory.mktemp("books")
    for name, declared in BOOKS.items():
        names = [line.partition(":")[0] for line in declared.splitlines()]
        sources = [f"batch_names = {names}", WORK.format(name=name)]
        if name == "01_data":
            sources.append("if seed == 13:\n    raise ValueError('unlucky')")
        first = nbformat.v4.new_code_cell(
            declared + "\nrun_dir: str = '.'", metadata={"tags": ["parameters"]}
        )
        cells = [first, *map(nbformat.v4.new_code_cell, sources)]
        book = nbformat.v4.new_notebook(cells=cells)
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, folder / f"{name}.ipynb")
    return folder


@pytest.fixture
def run(books, tmp_path, monkeypatch, capsys):
    """Run a command line in this process, from an empty folder, with this interpreter."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        if words[:1] == ("run",) and "--help" not in words and "--notebooks" not in words:
            words = (*words, "--notebooks", str(books), "--runs", str(tmp_path / "runs"))
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def nothing_runs(monkeypatch):
    """Make it an error to reach a kernel or to set up an environment."""

    def never(*args, **kwargs):
        raise AssertionError("something ran although the input was wrong")

    monkeypatch.setattr(runs, "execute", never)
    monkeypatch.setattr(environment, "make", never)
    monkeypatch.setattr(environment, "restart", never)


REFUSED = [
    (["run", "--only", "07"], r"'07'.*known: '00_quickstart'"),
    (["run", "--only", "02_train_vea"], "did you mean '02_train_vae'"),
    (["run", "--only", ""], "after --only"),
    (["run", "-p", "latnt_dim", "8"], "parameter of 00_quickstart, 01_data, 02_train_vae.*'latent_dim'"),
    (["run", "--only", "00", "-p", "latent_dim", "8"], "a parameter of 00_quickstart"),
    (["run", "-p", "latent_dim", "0"], r"2 to 512.*Found int 0"),
    (["run", "-p", "latent_dim", "8.5"], "Expected int.*'8.5'"),
    (["run", "-p", "latent_dim", "many"], "Expected int.*'many'"),
    (["run", "-p", "shuffle", "maybe"], "Expected bool.*'maybe'"),
    (["run", "-p", "seed", "-1"], "at least 0"),
    (["run", "-p", "00.latent_dim", "8"], "'00.latent_dim'"),
    (["run", "-p", "run_dir", "elsewhere"], "--runs and --name"),
    (["run", "-p", "seed"], "expected 2 arguments"),
    (["run", "-f", "absent.yaml"], "no file absent.yaml"),
    (["run", "-f", "broken.yaml"], "Expected a YAML file"),
    (["run", "-f", "list.yaml"], "a list in list.yaml"),
    (["run", "-f", "unknown.yaml"], "did you mean 'latent_dim'"),
    (["run", "-f", "wrong.yaml"], "Expected int.*'eight'"),
    (["run", "--data", "absent.h5ad"], "no file absent.h5ad.*a relative path starts in the current folder"),
    (["run", "--data", "screns/screen.h5ad"], "no file screns/screen.h5ad"),
    (["run", "--data", "here/scren.h5ad"], "did you mean 'screen.h5ad'"),
    (["run", "--data", "here/screen.h5ad"], "Expected a readable .h5ad"),
    (["run", "--only", "00", "--data", "pbmc"], "a parameter of 00_quickstart.*'data'"),
    (["run", "--name", "a/b"], "'a/b'"),
    (["run", "--name", ".."], r"'\.\.'"),
    (["run", "--name", "taken"], "results in .*taken.*--only"),
    (["run", "--notebooks", "here"], "Expected numbered notebooks"),
    (["run", "--dat", "x"], "did you mean '--data'"),
    (["run", "extra"], "unrecognized arguments: extra"),
    (["rnu"], "did you mean 'run'"),
    ([], "required: COMMAND"),
    (["params", "12"], "the name or number of a notebook"),
    (["params", "02", "--yaml", "--cell"], "not allowed with"),
    (["params", "here/empty.ipynb"], "Jupyter notebook"),
]


@pytest.mark.parametrize(
    ("words", "message"), REFUSED, ids=[" ".join(words) or "nothing" for words, _ in REFUSED]
)
def test_bad_input_is_refused_before_anything_runs(words, message, run, tmp_path, nothing_runs):
    import re

    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "runs" / "taken" / "result").touch()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "screen.h5ad").write_text("not HDF5")
    (tmp_path / "here" / "empty.ipynb").write_text("")
    (tmp_path / "broken.yaml").write_text("a: [1")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "unknown.yaml").write_text("latent_dims: 8\n")
    (tmp_path / "wrong.yaml").write_text("latent_dim: eight\n")
    code, out, err = run(*words)
    assert code == 2
    assert re.search(message, err, re.DOTALL), err
    assert "Traceback" not in err
    assert all(beat in err for beat in ("Expected ", "Found ", "To fix it: "))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["taken"]


@pytest.fixture
def normalised():
    """A screen as an analysis leaves it: X normalised, the counts in raw."""
    from cellop_nb import datasets

    screen = datasets.synthetic(n_cells=20, n_genes=20, n_latent=4, library=50.0)
    screen.raw = screen.copy()
    screen.X = screen.X.log1p()
    return screen


@pytest.mark.parametrize("name", ["my screen", "bob's $1"])
def test_counts_in_raw_are_pointed_to_by_a_command_that_takes_them_out(name, run, normalised, tmp_path):
    normalised.write_h5ad(tmp_path / f"{name}.h5ad")
    code, _, err = run("run", "--only", "01", "--data", f"{name}.h5ad")
    assert code == 2 and "looks log-normalised" in err
    subprocess.run(err.split("`")[1], shell=True, check=True, timeout=120)
    code, _, err = run("run", "--only", "01", "--data", f"{name}_counts.h5ad")
    assert code == 0, err


def test_a_raw_slot_without_counts_is_not_pointed_to(run, normalised, tmp_path, nothing_runs):
    normalised.raw = normalised.copy()
    normalised.write_h5ad(tmp_path / "screen.h5ad")
    code, _, err = run("run", "--only", "01", "--data", "screen.h5ad")
    assert code == 2 and "looks log-normalised" in err and "raw slot" not in err


def test_run_leaves_notebooks_metrics_and_a_closing_table(run, tmp_path):
    (tmp_path / "values.yaml").write_text("latent_dim: 4\nmax_epochs: 5\n")
    code, out, err = run(
        "run", "--name", "first", "-f", "values.yaml", "-p", "latent_dim", "8", "-p", "shuffle", "no"
    )
    assert code == 0, err
    folder = tmp_path / "runs" / "first"
    assert {path.stem for path in folder.glob("*.ipynb")} == set(BOOKS)
    # -p wins over -f, and false is a bool, not the text 'false'
    metrics = runs.read_metrics(folder, "02_train_vae")
    assert metrics == {"latent_dim": 8, "shuffle": False, "max_epochs": 5, "seed": 0}
    record = json.loads((folder / "run.json").read_text())
    assert record["notebooks"]["02_train_vae"]["parameters"]["latent_dim"] == 8
    assert record["versions"]["torch"]
    assert str(folder) in out
    assert "latent_dim 8, max_epochs 5, seed 0" in out
    assert len(out.splitlines()) == 2 + len(BOOKS), "ten lines with our eight notebooks"

    (folder / "report.html").write_text(
        "<!-- notebooks --><!-- end of notebooks -->"
    )  # 06_predict writes one
    # a chosen notebook is run again in the same folder; the data set's keys reach it
    words = (
        "--context-key",
        "cell_type,donor",
        "--layer",
        "none",
        "--control",
        "DMSO",
        "--data",
        "some_screen",
    )
    code, out, err = run("run", "--name", "first", "--only", "01", *words)
    assert code == 0, err
    assert f"Report: {folder / 'report.html'}" in out
    assert '<a href="01_data.ipynb">' in (folder / "report.html").read_text()
    metrics = runs.read_metrics(folder, "01_data")
    assert metrics["context_key"] == ["cell_type", "donor"]
    assert (metrics["layer"], metrics["control"], metrics["data"]) == (None, "DMSO", "some_screen")


def test_a_failing_notebook_ends_the_run_with_exit_code_1(run, tmp_path):
    code, out, err = run("run", "--name", "bad", "--only", "01,02", "-p", "seed", "13")
    assert code == 1
    assert "01_data failed in cell In [5]: ValueError: unlucky" in err
    assert "not run" in out
    assert (tmp_path / "runs" / "bad" / "01_data.ipynb").is_file()
    assert not (tmp_path / "runs" / "bad" / "02_train_vae.ipynb").exists()
    assert (
        "ValueError"
        in json.loads((tmp_path / "runs" / "bad" / "run.json").read_text())["notebooks"]["01_data"]["error"]
    )


@pytest.fixture
def small_screen(tmp_path):
    import anndata
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"condition": ["DMSO", "drug"] * 40, "kind": ["B"] * 40 + ["T"] * 40},
        index=[f"c{i}" for i in range(80)],
    )
    var = pd.DataFrame(index=[f"g{i}" for i in range(5)])
    adata = anndata.AnnData(rng.poisson(2.0, (80, 5)).astype("float32"), obs=obs, var=var)
    adata.write_h5ad(tmp_path / "mine.h5ad")
    return tmp_path / "mine.h5ad"


def test_the_users_file_is_looked_at_before_the_first_kernel(run, small_screen, nothing_runs):
    code, _, err = run("run", "--data", small_screen.name)
    assert code == 2
    assert "known: 'condition', 'kind'" in err
    keys = ("--perturbation-key", "condition", "--context-key", "kind")
    code, _, err = run("run", "--data", small_screen.name, *keys, "--control", "DSMO")
    assert code == 2
    assert "DMSO" in err
    assert "Traceback" not in err


def test_a_relative_path_is_the_callers(run, small_screen, tmp_path):
    keys = ("--perturbation-key", "condition", "--context-key", "kind", "--control", "DMSO")
    code, _, err = run("run", "--only", "01", "--name", "mine", "--data", small_screen.name, *keys)
    assert code == 0, err
    assert runs.read_metrics(tmp_path / "runs" / "mine", "01_data")["data"] == str(small_screen)


def test_help_reads_well(run):
    code, out, _ = run("--help")
    assert code == 0
    commands = subcommands()
    assert all(command in out for command in commands)
    for command in commands:
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "usage: python3 -m cellop_nb" in out


def test_params_shows_every_parameter_and_round_trips(run, tmp_path, write_notebook):
    code, out, _ = run("params", "02")
    assert code == 0
    assert "latent_dim" in out
    assert "2 to 512" in out
    code, out, _ = run("params")
    assert len(out.splitlines()) >= 7
    code, cell, _ = run("params", "02", "--cell")
    book = write_notebook(tmp_path / "02_train_vae.ipynb", cell, "latent_dim")
    assert run("params", str(book), "--cell")[1] == cell
    code, out, _ = run("params", "02", "--yaml")
    assert "latent_dim: 32  # " in out


def test_it_works_from_another_folder(root, tmp_path):
    surroundings = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "cellop_nb", "params", "02"]
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "latent_dim" in done.stdout


def subcommands() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    return next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def test_every_command_says_what_it_is_runs_and_needs():
    for command in subcommands().values():
        assert command.description[0].isupper() and command.description.endswith(".")
        assert all(map(callable, map(command.get_default, ("main", "check"))))
        assert isinstance(command.get_default("extras"), tuple | None)


def test_test_passes_options_on_and_finds_paths(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    options, paths = tools._split(["-k", "energy", "tests/models", "mine.py::test_x", "-n", "0"])
    assert options == ["-k", "energy", "-n", "0"]
    assert paths == ["tests/models", f"{tmp_path / 'mine.py'}::test_x"]


def test_the_two_suites_are_all_tests(root):
    """Every folder and file of tests/ belongs to one of them; the notebooks are of the second."""
    science, tooling = map(tools.suite, tools.SUITES)
    assert all((root / path).is_dir() for path in science)
    assert tooling == ["tests", "notebooks", "benchmarks", *(f"--ignore={path}" for path in science)]
    assert tools.suite(None) == ["tests", "notebooks", "benchmarks"]


def test_a_suite_that_there_is_not_is_refused(run):
    code, _, err = run("test", "scince")
    assert code == 2 and "did you mean 'science'" in err


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--name", "a" * 300),
        ("run", "--data", "a" * 300),
        ("predict", "a" * 300, "--data", "synthetic_screen"),
    ],
    ids=["run", "data", "table"],
)
def test_a_name_that_no_disk_takes_is_refused(run, words):
    code, _, err = run(*words)
    assert code == 2 and ("too long" in err or "at most 200" in err)


def test_a_table_that_could_not_be_written_is_refused_before_the_hold_outs(run, tmp_path):
    code, _, err = run("holdout", "synthetic_screen", "--out", tmp_path)
    assert code == 2 and "a new file for --out" in err


def test_lab_opens_the_notebooks_of_the_project(run, monkeypatch, root):
    calls = []
    monkeypatch.setattr(environment, "become", lambda command, env: calls.append(command) or 0)
    code, out, _ = run("lab", "--", "--no-browser")
    assert code == 0
    assert calls[0][1:3] == ["-m", "jupyterlab"]
    assert f"--ServerApp.root_dir={root}" in calls[0]
    assert calls[0][-1] == "--no-browser"
    assert "--ServerApp.ip=127.0.0.1" in calls[0]
    assert not [word for word in calls[0] if "token" in word or "password" in word]


@pytest.mark.parametrize(("command", "behind"), [("lab", "jupyter lab"), ("test", "pytest")])
def test_an_argument_of_the_program_behind_is_told_its_place(command, behind, capsys):
    """As root, Jupyter itself asks for `--allow-root`."""
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--allow-root"])
    assert f"write -- --allow-root for what is passed on to {behind};" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--hepl"])
    assert "did you mean '--help'" in capsys.readouterr().err


def test_the_real_screen_passes_the_first_look(run, kang_file, monkeypatch, tmp_path):
    """The main real input: accepted with the default keys, executed with its absolute path."""
    done = []

    def execute(path, target, values, **_):
        done.append(values)
        return runs.Outcome(Path(path).stem, Path(target), 0.0)

    monkeypatch.setattr(runs, "execute", execute)
    code, _, err = run("run", "--only", "01", "--data", os.path.relpath(kang_file, tmp_path))
    assert code == 0, err
    assert Path(done[0]["data"]) == kang_file.resolve()


def test_a_run_that_could_not_be_recorded_is_no_success(tmp_path, monkeypatch, write_notebook):
    write_notebook(tmp_path / "books" / "01_first.ipynb", "n: int = 1", "print(n)")
    monkeypatch.setattr(environment, "ensure", lambda *_: None)
    ran = runs.Outcome("01_first", tmp_path, 0.0)
    monkeypatch.setattr(
        run_command, "_execute", lambda selected, target, values, outcomes: outcomes.append(ran)
    )
    words = ["run", "--notebooks", str(tmp_path / "books"), "--runs", str(tmp_path / "runs")]
    assert main(words) == 0
    monkeypatch.setattr(run_command, "_record", lambda *_: False)
    assert main(words) == 1


def test_a_hold_out_says_what_was_not_asked(tmp_path, monkeypatch, small_screen, capsys):
    monkeypatch.setattr(environment, "ensure", lambda *_: None)
    table = pd.DataFrame({"CellOp": [0.5]}, index=["type A, drug 1"])
    table.attrs["left_out"] = {"groups": ["type B, drug 1"]}
    refused = pd.DataFrame({"question": ["type C"], "reason": ["3 cells are too few"]})
    behind = pd.DataFrame(columns=["group", "cellop", "baseline", "best_baseline"])
    result = SimpleNamespace(summary=lambda metric: table, refused=refused, behind=lambda: behind)
    monkeypatch.setattr("cellop_nb.holdout", lambda *_, **__: result)
    keys = ("--perturbation-key", "condition", "--context-key", "kind", "--control", "DMSO")
    assert main(["holdout", str(tmp_path / "mine.h5ad"), *keys]) == 0
    told = capsys.readouterr().out
    assert (
        "not asked: type C: 3 cells are too few" in told and "not in the mean, groups: type B, drug 1" in told
    )
