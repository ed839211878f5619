"""An installed package gives out copies of its notebooks, and uses those that it gave."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellop_nb.__main__ import main
from cellop_nb.commands import environment


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """As an installed package sees itself: no checkout, two shipped folders, an empty current folder."""
    shipped = tmp_path / "shipped"
    for name, file in (("notebooks", "00_quickstart.ipynb"), ("data", "README.md")):
        (shipped / name).mkdir(parents=True)
        (shipped / name / file).write_text("{}")
    for name, value in {
        "SHARE": shipped, "NOTEBOOKS": shipped / "notebooks", "IS_CHECKOUT": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(environment, name, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return shipped


def test_an_installed_package_gives_out_copies_of_its_notebooks(installed):
    from cellop_nb.commands import run

    home = run.workplace()
    (home / "notebooks" / "00_quickstart.ipynb").write_text("changed")
    assert (run.workplace() / "notebooks" / "00_quickstart.ipynb").read_text() == "changed"
    assert (installed / "notebooks" / "00_quickstart.ipynb").read_text() == "{}"


def test_copied_notebooks_are_those_that_are_used(installed, tmp_path, monkeypatch, capsys):
    from cellop_nb.commands import run

    assert environment.notebooks() == installed / "notebooks"
    assert main(["notebooks", "mine"]) == 0
    assert "cd mine" in capsys.readouterr().out
    assert sorted(path.name for path in Path("mine").iterdir()) == ["data", "notebooks"]
    monkeypatch.chdir("mine")
    assert environment.notebooks() == tmp_path / "work" / "mine" / "notebooks"
    assert run.workplace() == tmp_path / "work" / "mine"


def test_notebooks_never_overwrites(installed, capsys):
    Path("mine/data").mkdir(parents=True)
    assert main(["notebooks", "mine"]) == 2
    assert "To fix it: name another folder" in capsys.readouterr().err
    assert not Path("mine/notebooks").exists()
