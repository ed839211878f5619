"""The files and the code that make the environment."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import cellop_nb
from cellop_nb import packages
from cellop_nb.commands import environment
from cellop_nb.errors import MissingExtraError
from cellop_nb.files import try_lock

CONDA_NAMES = {"matplotlib-base": "matplotlib", "python-build": "build"}


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(root):
    lines = (root / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def needed(project):
    """What the two commands of the README install."""
    extras = project["optional-dependencies"]
    return project["dependencies"] + extras["notebook"] + extras["test"]


def split(requirement):
    name, bound = re.fullmatch(r"([\w.-]+)((?:>=[\d.]+)?)", requirement).groups()
    return CONDA_NAMES.get(name, name), bound


def test_environment_yml_keeps_step_with_pyproject(root, project):
    content = yaml.safe_load((root / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    conda = [entry for entry in content["dependencies"] if isinstance(entry, str)]
    named = dict(split(entry) for entry in [*conda, *pip] if not entry.startswith("-e"))
    assert named.pop("python") == project["requires-python"]
    named.pop("pip")
    assert named == dict(split(r) for r in needed(project))
    assert "-e ." in pip
    assert content["channels"] == ["conda-forge", "nodefaults"]


# declared, and used without an import
NOT_IMPORTED = {
    "ipykernel": "the kernels of notebooks that are executed",
    "jupyterlab": "`lab` starts it as a program",
}


def imports() -> tuple[set[str], set[str]]:
    """Packages that the code imports at the top of a file, and inside a function."""
    top, inside = set(), set()
    for path in Path(cellop_nb.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            (top if node in tree.body else inside).update(name.partition(".")[0] for name in names)
    own = {*sys.stdlib_module_names, "cellop_nb"}
    return top - own, inside - own


def owners(modules: set[str]) -> dict[str, set[str]]:
    """Names of what installs each module."""
    table = packages_distributions()
    return {name: {owner.lower().replace("_", "-") for owner in table.get(name, [name])} for name in modules}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported(project):
    base = {split(r)[0] for r in project["dependencies"]}
    extras = {name: {split(r)[0] for r in rs} for name, rs in project["optional-dependencies"].items()}
    top, inside = map(owners, imports())
    assert not [m for m, names in top.items() if not names & base], "a plain installation could not import it"
    assert not [m for m, names in inside.items() if not names & base.union(*extras.values())]
    imported = set().union(*top.values(), *inside.values())
    assert base <= imported
    assert extras["notebook"] - imported == set(NOT_IMPORTED)


def test_a_function_that_needs_an_extra_says_which():
    with pytest.raises(
        MissingExtraError, match=r"no_such_package for speed.*not installed.*cellop_nb\[cluster\]"
    ):
        packages.require("no_such_package", "cluster", of="speed")


def test_an_extra_is_added_to_what_the_environment_has(fresh):
    (environment.ROOT / "pyproject.toml").write_text(
        '[project]\ndependencies = ["no-such-package-xyz>=1"]\n'
        "[project.optional-dependencies]\nnotebook = []\ntest = []\n"
    )
    environment.ensure(("notebook",), ["run"])
    assert environment.is_ready(("notebook",)) and not environment.is_ready(("notebook", "test"))
    environment.ensure(("test",), ["test"])
    assert kinds(fresh) == ["venv", "pip", "restart", "pip", "restart"]
    assert fresh[3][-1].endswith("[notebook,test]")


def test_the_tested_versions_meet_the_declared_bounds(project, pins):
    for requirement in needed(project):
        name, bound = split(requirement)
        assert packages.numbers(pins[name]) >= packages.numbers(bound.removeprefix(">=")), requirement
    assert pins["torch"] == "2.13.0"
    assert not [name for name in pins if name.startswith(("nvidia", "triton", "cuda"))]


def test_the_version_stands_once(root, project):
    assert project["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", cellop_nb.__version__)


def test_the_console_script_exists(project):
    module, function = project["scripts"]["cellop"].split(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_ci_runs_the_test_command(root):
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.rstrip().endswith("\npython3 -m cellop_nb test")
    assert "CELLOP_REQUIRE_REAL_DATA=1" in text


def test_this_interpreter_has_what_the_tests_need():
    assert packages.missing(packages.requirements("notebook", "test")) == []


def test_absent_and_old_packages_are_missing():
    wanted = ["pytest", "pytest>=1", "pytest>=1000", "no-such-package-xyz>=1"]
    assert packages.missing(wanted) == ["pytest>=1000", "no-such-package-xyz>=1"]


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A project folder without an environment; commands are recorded instead of run."""
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["no-such-package-xyz>=1"]\n')
    (tmp_path / "constraints.txt").write_text("")
    venv = tmp_path / ".venv"
    monkeypatch.delenv("CELLOP_RESTARTED", raising=False)
    for name, value in {
        "ROOT": tmp_path, "VENV": venv, "IS_CHECKOUT": True, "_STAMP": venv / "stamp",
        "_UNFINISHED": tmp_path / "runs" / ".unfinished", "_LOG": tmp_path / "runs" / "setup.log",
    }.items():  # fmt: skip
        monkeypatch.setattr(environment, name, value)
    calls = []

    def follow(command, log, status):
        calls.append(command)
        python = environment.venv_python()
        python.parent.mkdir(parents=True, exist_ok=True)
        if not python.exists():
            python.symlink_to(sys.executable)

    monkeypatch.setattr(packages, "_PROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(environment, "_follow", follow)
    monkeypatch.setattr(environment, "restart", lambda arguments: calls.append(["restart", *arguments]))
    return calls


def kinds(calls):
    return [next(word for word in call if word in {"venv", "pip", "restart"}) for call in calls]


def test_the_environment_is_made_once_and_redone_when_pyproject_changes(fresh):
    environment.ensure((), ["run"])
    assert kinds(fresh) == ["venv", "pip", "restart"]
    assert environment.is_ready(())
    environment.ensure((), ["run"])
    assert kinds(fresh)[3:] == ["restart"]
    with (environment.ROOT / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert not environment.is_ready(())
    environment.ensure((), ["run"])
    assert kinds(fresh)[4:] == ["pip", "restart"]


def test_a_broken_installation_is_redone_from_scratch(fresh, monkeypatch):
    follow = environment._follow

    def breaks(command, log, status):
        if "pip" in command:
            raise KeyboardInterrupt
        follow(command, log, status)

    monkeypatch.setattr(environment, "_follow", breaks)
    with pytest.raises(KeyboardInterrupt):
        environment.ensure((), ["run"])
    assert not environment.is_ready(())
    monkeypatch.setattr(environment, "_follow", follow)
    fresh.clear()
    environment.ensure((), ["run"])
    assert kinds(fresh) == ["venv", "pip", "restart"]
    assert "--clear" in fresh[0]


@pytest.mark.skipif(os.name == "nt", reason="files are not locked on Windows")
def test_a_second_setup_at_the_same_time_is_refused(fresh):
    environment._UNFINISHED.parent.mkdir()
    with environment._UNFINISHED.open("w") as mark:
        assert try_lock(mark.fileno())
        with pytest.raises(environment.SetupError, match="one set-up at a time"):
            environment.ensure((), ["run"])
    assert fresh == []


def test_an_environment_that_stays_incomplete_is_an_error_not_a_loop(fresh, monkeypatch):
    monkeypatch.setenv("CELLOP_RESTARTED", "1")
    with pytest.raises(environment.SetupError, match="no-such-package-xyz"):
        environment.ensure((), ["run"])
    assert fresh == []


def test_a_complete_interpreter_is_used_as_it_is(fresh):
    (environment.ROOT / "pyproject.toml").write_text('[project]\ndependencies = ["pytest>=1"]\n')
    environment.ensure((), ["run"])
    assert fresh == []


def test_a_failing_step_shows_its_output_and_what_to_do(fresh, monkeypatch, tmp_path, capsys):
    monkeypatch.undo()
    command = [sys.executable, "-c", "print('no space left'); raise SystemExit(1)"]
    refused = pytest.raises(environment.SetupError, match="Expected the set-up to succeed.*To fix it")
    with (tmp_path / "log").open("w") as log, environment.Status("setting up") as status, refused:
        environment._follow(command, log, status)
    assert "no space left" in capsys.readouterr().err
    assert "no space left" in (tmp_path / "log").read_text()


def test_help_works_without_any_package(root, tmp_path):
    """-I -S: no site-packages at all, from another folder."""
    start = "from cellop_nb.__main__ import main; main(['--help'])"
    code = f"import sys; sys.path.insert(0, {str(root)!r}); {start}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
