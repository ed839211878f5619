"""`lab --data`: keys guessed and shown in one place, what does not fit refused, nobody's notebooks overwritten."""

from __future__ import annotations

import json
import re

import pytest

from cellop_nb.__main__ import main
from cellop_nb.commands import environment, lab
from cellop_nb.data import datasets
from cellop_nb.notebook import parameters


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Commands that `lab` would start; its home is a folder of the test's own."""
    commands = []
    monkeypatch.setattr(environment, "home", lambda: tmp_path)
    monkeypatch.setattr(environment, "ensure", lambda *_: None)
    monkeypatch.setattr(lab, "trust", lambda folder: commands.append(folder))
    monkeypatch.setattr(environment, "become", lambda command, **_: commands.append(command) or 0)
    monkeypatch.chdir(tmp_path)
    return commands


def values(path) -> dict:
    return {p.name: p.default for p in parameters.read_cell(parameters.cell_of(path))}


def test_keys_are_guessed_shown_and_written_into_every_notebook(renamed_screen, started, tmp_path, capsys):
    assert main(["lab", "--data", "my screen.h5ad"]) == 0
    out = capsys.readouterr().out
    keys = {"perturbation_key": "Treatment", "context_key": "CellType", "control": "DMSO", "layer": "counts"}
    for name, value in keys.items():
        (line,) = [line for line in out.splitlines() if line.startswith(name)]
        assert value in line and "guessed" in line
    folder = tmp_path / "runs" / "my_screen" / "notebooks"
    assert sorted(path.stem for path in folder.iterdir()) == parameters.names()
    for path in folder.iterdir():
        there = values(path)
        assert {name: there[name] for name in keys} == keys and there["data"] == str(renamed_screen)
        book = json.loads(path.read_text())
        assert not any(cell.get("outputs") for cell in book["cells"]), "outputs of other data"
    assert started[0] == folder, "what is opened is signed"
    assert (
        f"--LabApp.default_url=/lab/tree/runs/my_screen/notebooks/{parameters.names()[0]}.ipynb" in started[1]
    )


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--control", "DMS0", "DMSO"),
        ("--perturbation-key", "Treatmnt", "Treatment"),
        ("--layer", "count", "counts"),
    ],
)
def test_a_key_that_does_not_fit_is_refused(
    renamed_screen, started, tmp_path, capsys, option, value, complaint
):
    assert main(["lab", "--data", "my screen.h5ad", option, value]) == 2
    assert complaint in capsys.readouterr().err
    assert not started and not (tmp_path / "runs").exists()


def test_someones_work_is_opened_again_and_never_replaced(renamed_screen, started, tmp_path, capsys):
    assert main(["lab", "--data", "my screen.h5ad"]) == 0
    path = tmp_path / "runs" / "my_screen" / "notebooks" / "01_data.ipynb"
    path.write_text(path.read_text().replace("Is there an effect", "My own words"))
    assert main(["lab", "--data", "my screen.h5ad"]) == 0
    assert "My own words" in path.read_text()
    assert main(["lab", "--data", "my screen.h5ad", "--context-key", "donor"]) == 2
    assert "choose another folder with --name" in capsys.readouterr().err
    assert main(["lab", "--data", "my screen.h5ad", "--context-key", "donor", "--name", "by_donor"]) == 0
    (tmp_path / "other.h5ad").write_bytes((tmp_path / "my screen.h5ad").read_bytes())
    assert main(["lab", "--data", "other.h5ad", "--name", "my_screen"]) == 2
    assert "data = " in capsys.readouterr().err
    assert values(tmp_path / "runs" / "by_donor" / "notebooks" / "06_predict.ipynb")["context_key"] == "donor"


def test_nothing_that_looks_like_a_perturbation_is_said(renamed_screen, started, capsys, tmp_path):
    adata = datasets.load(str(renamed_screen))
    adata.obs = adata.obs.rename(columns={"Treatment": "xyz"})
    adata.write_h5ad(tmp_path / "odd é (2).h5ad")
    assert main(["lab", "--data", "odd é (2).h5ad"]) == 2
    assert "name it with --perturbation-key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "addresses"),
    [
        ([], ["--ServerApp.ip=127.0.0.1"]),
        (["--ip=0.0.0.0"], ["--ip=0.0.0.0"]),
        (["--ServerApp.ip=::1"], ["--ServerApp.ip=::1"]),
    ],
)
def test_it_is_reached_from_this_machine_unless_another_address_is_told(words, addresses, started):
    assert main(["lab", "--", *words]) == 0
    assert [word for word in started[1] if re.match(r"--(ServerApp\.)?ip", word)] == addresses


@pytest.mark.parametrize("words", [["--control", "DMSO"], ["--data", "absent.h5ad"]])
def test_what_cannot_be_is_refused_before_there_is_an_environment(words, started):
    assert main(["lab", *words]) == 2
    assert not started


def test_shipped_notebooks_are_signed(monkeypatch, tmp_path):
    import nbformat
    from nbformat.sign import NotebookNotary

    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    (tmp_path / "02_train_vae.ipynb").write_bytes((environment.NOTEBOOKS / "02_train_vae.ipynb").read_bytes())
    book = nbformat.read(tmp_path / "02_train_vae.ipynb", 4)
    assert not NotebookNotary().check_signature(book)
    lab.trust(tmp_path)
    assert NotebookNotary().check_signature(book)
