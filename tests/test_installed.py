"""Installed, not cloned: the wheel alone does what a checkout does, except the tests.

The wheel is built with `python -m build` from a copy of the tree and installed into an empty virtual
environment. What it depends on is read from the running environment, through one line in a `.pth` file: a second
installation would be 2 GB of the same files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def printed(call):
    """A function that runs a command; what it printed."""

    def run(command, **surroundings) -> str:
        done = call(command, **surroundings)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def wheel(root, printed, tmp_path_factory) -> Path:
    """Built from the source distribution, as `python -m build` does; needs the build backend."""
    folder = tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache", "_build")
    shutil.copytree(root, folder / "copy", ignore=ignore)
    printed([sys.executable, "-m", "build", "--outdir", folder, folder / "copy"])
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, printed, tmp_path_factory):
    """A function that runs `cellop` of an environment that has the wheel, in a folder that has nothing."""
    home = tmp_path_factory.mktemp("installed")
    printed([sys.executable, "-m", "venv", "--without-pip", home / "venv"])
    python = home / "venv" / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(home / "venv"), "platbase": str(home / "venv")})
    install = ["install", "--no-deps", "--no-index", "--quiet", wheel]
    printed([sys.executable, "-m", "pip", "--python", python, *install])
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (home / "work").mkdir()

    def cellop(*words, cwd=home / "work") -> str:
        return printed([home / "venv" / "bin" / "cellop", *words], cwd=cwd, env=clean)

    cellop.python, cellop.work, cellop.environment = python, home / "work", clean
    return cellop


def test_the_wheel_holds_the_notebooks_and_the_example_data(root, wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shared = [
        path for folder in ("notebooks", "data") for path in (root / folder).iterdir() if path.is_file()
    ]
    assert {f"cellop_nb/_share/{path.parent.name}/{path.name}" for path in shared} <= names
    outside = ("tests/", "benchmarks/", "docs/")
    assert not [name for name in names if name.startswith(outside) or "__pycache__" in name]
    assert "cellop_nb/notebook/summary.ipynb" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_is_the_wheel_that_runs(installed, printed):
    code = "import cellop_nb; print(cellop_nb.__file__); print(cellop_nb.datasets.example_path())"
    out = printed([installed.python, "-c", code], cwd=installed.work, env=installed.environment)
    assert [line.startswith(str(installed.python.parents[1])) for line in out.splitlines()] == [True, True]


def test_the_quickstart_runs_from_the_wheel(installed):
    """`notebooks DIR`, then `run` in DIR: the copies run, and the results land beside them."""
    installed("notebooks", "mine")
    mine = installed.work / "mine"
    out = installed("run", "--only", "00", "--name", "first", "-p", "n_genes", "60", cwd=mine)
    assert f"of {mine / 'notebooks'} into {mine / 'runs' / 'first'}" in out
    metrics = json.loads((mine / "runs" / "first" / "00_quickstart" / "metrics.json").read_text())
    assert metrics["energy_cellop"] < metrics["energy_no_change"]
    assert "donor 1" in metrics["answer"]
    assert (mine / "data" / "synthetic_screen.h5ad").is_file()


def test_a_sweep_runs_from_the_wheel(installed):
    """Without a copy the package's own notebooks are swept; workers and kernels are those of the environment."""
    there = installed.work / "swept"
    there.mkdir()
    what = ("02", "-g", "seed=7", "-p", "max_epochs", "1", "--workers", "1")
    assert "1 run done" in installed("sweep", *what, cwd=there)
    (run,) = (there / "runs" / "sweeps" / "02_train_vae").glob("*/result.json")
    assert json.loads(run.read_text())["values"]["seed"] == 7
    assert (run.parents[1] / "summary.ipynb").is_file()


def test_lab_opens_a_copy_of_the_notebooks(installed):
    """JupyterLab of this environment is started (and asked for its version alone) on notebooks that are copied out."""
    there = installed.work / "lab"
    there.mkdir()
    out = installed("lab", "--", "--version", cwd=there)
    assert f"JupyterLab on {there / 'cellop_notebooks' / 'notebooks'}" in out
    assert re.search(r"^\d+\.\d+\.\d+", out, re.MULTILINE)
    assert (there / "cellop_notebooks" / "notebooks" / "00_quickstart.ipynb").is_file()


def test_the_tests_alone_need_a_checkout(installed, call):
    command = [installed.python, "-m", "cellop_nb", "test"]
    done = call(command, cwd=installed.work, env=installed.environment)
    assert done.returncode == 2
    assert "To fix it: clone the repository" in done.stderr
