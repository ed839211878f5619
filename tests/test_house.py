"""The papers of the house: types, change log, citation, contribution notes, hooks, other versions of Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import cellop_nb


@pytest.mark.slow
def test_types_are_checked_clean(root, tmp_path):
    """mypy with the configuration of pyproject.toml."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_form_of_the_code_is_clean(command, root):
    """ruff with the configuration of pyproject.toml."""
    command = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_change_log_keeps_its_form(root):
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", text, re.MULTILINE)
    assert releases[0] == ("Unreleased", "")
    assert all(date for _, date in releases[1:])
    assert cellop_nb.__version__ in dict(releases)
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_of_this_version(root):
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == cellop_nb.__version__
    assert citation["license"] == "BSD-3-Clause"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_the_papers_of_the_registry_agree(root):
    """The registry's entry, the addresses of the project, the versions of Python that are declared and tried."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entry = yaml.safe_load((root / "meta.yaml").read_text(encoding="utf-8"))
    required = {
        "name",
        "description",
        "project_home",
        "documentation_home",
        "install",
        "license",
        "tags",
        "version",
    }
    assert required <= set(entry)
    assert (entry["name"], entry["license"]) == (project["name"], project["license"])
    assert entry["version"] == f"v{cellop_nb.__version__}"
    urls = project["urls"]
    assert (entry["project_home"], entry["documentation_home"]) == (urls["Homepage"], urls["Documentation"])
    home = urls["Homepage"].removeprefix("https://github.com/")
    for path in (root / "notebooks").glob("*.ipynb"):
        for link in re.findall(r"github/([^/]+/[^/]+)/blob", path.read_text(encoding="utf-8")):
            assert link == home
    jobs = yaml.safe_load((root / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]
    tried = {job["python"] for job in jobs["test"]["strategy"]["matrix"]["include"]}
    declared = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert tried == set(declared)


def test_the_hooks_are_of_programs_that_are_here(root):
    hooks = yaml.safe_load((root / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0][
        "hooks"
    ]
    assert {hook["id"] for hook in hooks} >= {"ruff", "ruff-format", "mypy"}
    path = os.pathsep.join(
        [os.path.dirname(sys.executable), os.environ["PATH"]]
    )  # beside an inactive .venv's python
    assert all(shutil.which(hook["entry"].split()[0], path=path) for hook in hooks)


def interpreter(minor: int) -> str | None:
    """A Python 3.`minor` that runs: on the path (where pyenv's is a stand-in that may not), or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [shutil.which(f"python3.{minor}"), *sorted(pyenv.glob(f"3.{minor}.*/bin/python"))]
    for python in filter(None, found):
        if subprocess.run([python, "--version"], capture_output=True, timeout=60).returncode == 0:
            return str(python)
    return None


@pytest.mark.parametrize("minor", [12, 13])
def test_the_command_line_starts_on_a_newer_python(minor, root, tmp_path):
    """Every file compiles, and what needs no package runs; `.ci/versions` tries the rest."""
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"no Python 3.{minor} on this machine, on the path or in pyenv")
    code = "import sys; sys.dont_write_bytecode = True; [compile(open(p).read(), p, 'exec') for p in sys.argv[1:]]"
    files = [str(path) for path in (root / "cellop_nb").rglob("*.py")]
    subprocess.run([python, "-W", "error", "-c", code, *files], check=True, timeout=120)
    for words in (["--help"], ["params", "02"], ["notebooks", str(tmp_path / "mine")]):
        start = f"import sys; sys.path.insert(0, {str(root)!r}); from cellop_nb.__main__ import main; main({words!r})"
        command = [python, "-I", "-S", "-W", "error", "-c", start]
        subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, timeout=120)
    assert (tmp_path / "mine" / "notebooks" / "00_quickstart.ipynb").is_file()
