"""Parameters: typed once, parsed from text, refused when wrong."""

from __future__ import annotations

import pytest
import yaml

from cellop_nb.errors import LabelError
from cellop_nb.notebook import explorer, parameters
from cellop_nb.notebook.parameters import Parameter, ParameterError

ALL = [(name, p) for name in parameters.names() for p in parameters.for_notebook(name)]


@pytest.mark.parametrize(("notebook", "parameter"), ALL, ids=[f"{n}.{p.name}" for n, p in ALL])
def test_every_default_is_valid_and_explained(notebook, parameter):
    assert parameter.check(parameter.default) == parameter.default
    assert parameter.help
    assert len(parameters.parameters_cell(notebook).splitlines()) == len(parameters.for_notebook(notebook))


@pytest.mark.parametrize("notebook", parameters.names())
def test_the_cell_and_the_yaml_give_back_the_definitions(notebook):
    declared = parameters.for_notebook(notebook)
    assert parameters.read_cell(parameters.parameters_cell(notebook)) == declared
    assert yaml.safe_load(parameters.as_yaml(notebook)) == parameters.defaults(notebook)
    namespace = {}
    exec(parameters.parameters_cell(notebook), namespace)
    assert all(namespace[p.name] == p.default for p in declared)


@pytest.mark.parametrize("notebook", parameters.names())
def test_papermill_reads_every_parameter_and_its_help(notebook, root):
    papermill = pytest.importorskip("papermill")
    path = str(root / "notebooks" / f"{notebook}.ipynb")
    read = papermill.inspect_notebook(path)
    assert list(read) == [p.name for p in parameters.for_notebook(notebook)]
    for parameter in parameters.for_notebook(notebook):
        told = read[parameter.name]
        assert told["inferred_type_name"] == parameter.annotation
        assert told["help"] == parameter.comment
    from click.testing import CliRunner
    from papermill.cli import papermill as command

    page = CliRunner().invoke(command, ["--help-notebook", path])
    assert page.exit_code == 0 and all(f"  {name}: " in page.output for name in read)


def test_a_notebook_of_ours_that_lies_elsewhere_keeps_the_full_types(root, tmp_path):
    book = tmp_path / "01_data.ipynb"
    book.write_bytes((root / "notebooks" / "01_data.ipynb").read_bytes())
    assert parameters.for_notebook(book) == parameters.for_notebook("01_data")
    assert parameters.validate(book, {"layer": None, "context_key": ["donor", "cell_type"]})


@pytest.mark.parametrize(
    ("comment", "help_", "limits"),
    [
        ("of cells (2 to 512)", "of cells", (None, 2, 512)),
        ("rate (1e-07 to 1.5)", "rate", (None, 1e-7, 1.5)),
        ("cells, each (at least -1)", "cells, each", (None, -1, None)),
        ("(at most 0.5)", "", (None, None, 0.5)),
        ("how (one | the other)", "how", (("one", "the other"), None, None)),
        ("the wait (seconds)", "the wait (seconds)", (None, None, None)),
    ],
)
def test_limits_are_read_from_the_comment(comment, help_, limits):
    (p,) = parameters.read_cell(f"x: float = 1.0  # {comment}")
    assert (p.help, (p.choices, p.minimum, p.maximum)) == (help_, limits)
    assert p.comment == comment.strip("()") or p.comment == comment


def test_the_explorer_knows_the_ways_to_combine_that_its_notebook_offers():
    assert parameters.parameter("07_virtual_cells", "together").choices == tuple(explorer.TOGETHER)


def test_no_notebook_names_a_parameter_twice():
    for name in parameters.names():
        own = [p.name for p in parameters.for_notebook(name)]
        assert len(own) == len(set(own)), name


@pytest.mark.parametrize(
    ("type_", "text", "value"),
    [
        ("bool", "true", True),
        ("bool", "False", False),
        ("bool", "0", False),
        ("bool", "no", False),
        ("int", " 16 ", 16),
        ("float", "1e-3", 1e-3),
        ("float", "2", 2.0),
        ("str", "true", "true"),
        ("str", "12", "12"),
        ("str | None", "none", None),
        ("str | None", "counts", "counts"),
        ("str", "none", "none"),
        ("int | None", "null", None),
        ("list[int]", "8,16, 32", [8, 16, 32]),
        ("list[int]", "8", [8]),
        ("str | list[str] | None", "cell_type", "cell_type"),
        ("str | list[str] | None", "cell_type,donor", ["cell_type", "donor"]),
        ("int | str", "auto", "auto"),
        ("int | str", "4", 4),
    ],
)
def test_text_becomes_a_value_of_the_declared_type(type_, text, value):
    parsed = Parameter("x", type_, None).parse(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("parameter", "text", "message"),
    [
        (
            Parameter("flag", "bool", False),
            "perhaps",
            "Expected bool.*'flag'.*Found str 'perhaps'.*such as False",
        ),
        (Parameter("n", "int", 1), "1.5", "Expected int"),
        (Parameter("n", "int", 1, minimum=1), "0", r"Expected int \(at least 1\).*Found int 0"),
        (Parameter("n", "int", 1, maximum=9), "10", r"at most 9"),
        (Parameter("r", "float", 0.5, minimum=0, maximum=1), "1.1", r"0 to 1.*Found float 1.1"),
        (Parameter("r", "float", 0.5), "nan", "Expected float"),
        (Parameter("r", "float", 0.5), "inf", "Expected float"),
        (Parameter("k", "str", "U", choices=("U", "V")), "W", r"U \| V.*'W'"),
        (Parameter("n", "list[int]", [1], minimum=0), "1,-1", "Found int -1"),
        (Parameter("n", "list[int]", [1]), "1,x", r"Expected list\[int\]"),
    ],
)
def test_wrong_text_is_refused(parameter, text, message):
    with pytest.raises(ParameterError, match=message):
        parameter.parse(text)


@pytest.mark.parametrize(
    ("type_", "value"), [("int", True), ("int", 1.0), ("bool", 1), ("str", 3), ("float", "1")]
)
def test_values_of_another_type_are_refused(type_, value):
    with pytest.raises(ParameterError, match=f"Expected {type_}"):
        Parameter("x", type_, None).check(value)


@pytest.mark.parametrize("name", ["02_train_vae", "02", "2", "train_vae", "notebooks/02_train_vae.ipynb"])
def test_a_notebook_is_found_by_name_number_and_path(name):
    assert parameters.find(name) == "02_train_vae"


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(LabelError, match="did you mean '02_train_vae'"):
        parameters.find("02_train_vea")
    with pytest.raises(LabelError, match="did you mean 'latent_dim'"):
        parameters.validate("02", {"latent_dims": 3})


def test_a_value_goes_to_every_notebook_that_has_the_parameter():
    books = ["00_quickstart", "02_train_vae", "04_train_operators"]
    assert set(parameters.assign(books, "seed", "3", text=True).values()) == {3}
    assert parameters.assign(books, "latent_dim", "8", text=True) == {"02_train_vae": 8}
    assert parameters.assign(books, "04.max_epochs", "5", text=True) == {"04_train_operators": 5}
    assert parameters.assign(books, "learning_rate", "1e-3") == {
        "02_train_vae": 1e-3,
        "04_train_operators": 1e-3,
    }
    with pytest.raises(LabelError, match="did you mean 'latent_dim'"):
        parameters.assign(books, "latent_dmi", "8", text=True)
    with pytest.raises(LabelError, match="parameter of 00_quickstart"):
        parameters.assign(books[:1], "latent_dim", "8", text=True)


def test_a_foreign_notebook_declares_its_own(tmp_path, write_notebook):
    source = 'width: float = 0.5  # of the kernel\nnames = ["a"]\nflag = True  # on or off\n'
    book = write_notebook(tmp_path / "90_mine.ipynb", source, "width")
    width, names, flag = parameters.for_notebook(book)
    assert (width.type, width.default, width.help) == ("float", 0.5, "of the kernel")
    assert (names.type, flag.type) == ("list[str]", "bool")
    assert parameters.validate(book, {"flag": False}) == {"flag": False}


def test_a_notebook_without_a_parameters_cell_is_refused(tmp_path):
    (tmp_path / "90_mine.ipynb").write_text('{"cells": []}')
    with pytest.raises(LabelError, match="tagged 'parameters'"):
        parameters.for_notebook(tmp_path / "90_mine.ipynb")
    (tmp_path / "91_mine.ipynb").write_text("no notebook")
    with pytest.raises(LabelError, match="Jupyter notebook"):
        parameters.for_notebook(tmp_path / "91_mine.ipynb")
