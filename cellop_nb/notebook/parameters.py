"""Typed parameters of the notebooks, for papermill, the command line, widgets and sweeps.

Every number that a user may change has its name, type, default, help and range in the cell of a notebook that is tagged
`parameters`, one assignment a line, as papermill reads it (``n: int = 8  # what it is (1 to 64)``), and nowhere else.
Standard library only, so that the command line can refuse a wrong value before the environment exists.
"""

from __future__ import annotations

import ast
import json
import math
import re
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import CellopError, LabelError, did_you_mean

_SWITCH = {"true": True, "yes": True, "on": True, "1": True}
_SWITCH |= {"false": False, "no": False, "off": False, "0": False}


_PACKAGE = Path(__file__).resolve().parents[1]
IS_CHECKOUT = (_PACKAGE.parent / "pyproject.toml").is_file()
FOLDER = (_PACKAGE.parent if IS_CHECKOUT else _PACKAGE / "_share") / "notebooks"
"""The package's notebooks: beside it in a checkout, inside of it in a wheel."""

DATA = ("data", "layer", "perturbation_key", "context_key", "control", "n_genes")
"""Parameters that make the prepared screen, in every notebook alike: each must be able to prepare it alone."""

WIDER = {"layer": "str | None", "context_key": "str | list[str] | None"}
"""Parameters that take more than the one kind that papermill reads."""


class ParameterError(CellopError):
    """A parameter's value has the wrong type or lies outside its range."""


@dataclass(frozen=True)
class Parameter:
    """One value that a notebook takes; a range includes its bounds.

    The type is `bool`, `int`, `float`, `str`, `None`, a `list[...]` of the first four, or several joined by `|`.
    """

    name: str
    type: str
    default: Any
    help: str = ""
    choices: tuple | None = None
    minimum: float | None = None
    maximum: float | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The alternatives of the annotation."""
        return tuple(kind.strip() for kind in self.type.split("|"))

    @property
    def annotation(self) -> str:
        """The kind that stands in a notebook: papermill reads one only, and so no ``str | None``."""
        return next(kind for kind in self.kinds if kind != "None")

    @property
    def limits(self) -> str:
        """Choices or range in words; empty where anything of the type will do."""
        if self.choices:
            return " | ".join(map(str, self.choices))
        if self.minimum is None and self.maximum is None:
            return ""
        if self.maximum is None:
            return f"at least {self.minimum}"
        return f"at most {self.maximum}" if self.minimum is None else f"{self.minimum} to {self.maximum}"

    @property
    def comment(self) -> str:
        """Help and limits as they stand beside the assignment."""
        return f"{self.help} ({self.limits})" if self.limits and self.help else self.help or self.limits

    def check(self, value: Any) -> Any:
        """The value in its declared type; refused where type, choice or range does not fit."""
        for kind in self.kinds:
            fits, converted = _fit(kind, value)
            if fits:
                self._check_limits(converted)
                return converted
        raise self._refuse(value)

    def parse(self, text: str) -> Any:
        """The value written as text on a command line (`true`, `0.5`, `none`, `8,16,32`)."""
        for kind in sorted(self.kinds, key=_parsing_order):
            value = _read(kind, text.strip())
            if value is not _UNREADABLE:
                return self.check(value)
        raise self._refuse(text)

    def _check_limits(self, value: Any) -> None:
        for item in value if isinstance(value, list) else [value]:
            if self.choices and item not in self.choices:
                raise self._refuse(item)
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                continue
            low = self.minimum is not None and item < self.minimum
            if low or (self.maximum is not None and item > self.maximum):
                raise self._refuse(item)

    def _refuse(self, value: Any) -> ParameterError:
        limits = f" ({self.limits})" if self.limits else ""
        expected = f"{self.type}{limits} for the parameter {self.name!r}"
        received = f"{type(value).__name__} {value!r}"
        return ParameterError(expected, received, f"give a value such as {self.default!r}")


_UNREADABLE = object()
_PLAIN = {"bool": bool, "int": int, "str": str, "None": type(None)}


def _fit(kind: str, value: Any) -> tuple[bool, Any]:
    """Whether the value is of the kind, and the value in it: an int becomes a float where one is meant."""
    if kind.startswith("list["):
        items = list(value) if isinstance(value, (list, tuple)) else []
        fitted = [_fit(kind[5:-1], item) for item in items]
        return bool(fitted) and all(fits for fits, _ in fitted), [item for _, item in fitted]
    if kind == "float":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (True, float(value)) if number and math.isfinite(value) else (False, value)
    return type(value) is _PLAIN[kind], value


def _parsing_order(kind: str) -> int:
    """Narrow kinds before wide ones: any text is a str."""
    return ["None", "bool", "int", "float", "list", "str"].index(kind.split("[")[0])


def _read(kind: str, text: str) -> Any:
    if kind.startswith("list["):
        items = [_read(kind[5:-1], item.strip()) for item in text.split(",")]
        # one word without a comma is a plain str where the annotation offers both
        return items if _UNREADABLE not in items and (len(items) > 1 or kind != "list[str]") else _UNREADABLE
    if kind == "None":
        return None if text.lower() in {"none", "null"} else _UNREADABLE
    if kind == "bool":
        return _SWITCH.get(text.lower(), _UNREADABLE)
    if kind == "str":
        return text
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        return _UNREADABLE


def cell_of(path: Path) -> str:
    """Source of the cell tagged `parameters` in a notebook file; refused where there is none."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            if "parameters" in cell.get("metadata", {}).get("tags", []):
                return "".join(cell["source"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = "a Jupyter notebook (nbformat 4)"
        raise LabelError(expected, f"{path} that is not one", "name an .ipynb file") from error
    expected = f"a cell tagged 'parameters' in {path}"
    raise LabelError(expected, "none", "tag the cell of typed assignments 'parameters'")


def read_cell(text: str) -> tuple[Parameter, ...]:
    """Parameters that the text of a `parameters` cell declares, with the trailing comments as help and limits."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    declared = [node for node in ast.parse(text).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    return tuple(_declared(node, comments.get(node.end_lineno or 0, "")) for node in declared if node.value)


def _declared(node: ast.Assign | ast.AnnAssign, comment: str) -> Parameter:
    default: Any = None if node.value is None else ast.literal_eval(node.value)
    if isinstance(node, ast.AnnAssign):
        name, kind = ast.unparse(node.target), ast.unparse(node.annotation)
        kind = WIDER.get(name, kind) if kind == "str" else kind
    else:
        is_list = isinstance(default, list) and bool(default)
        kind = f"list[{type(default[0]).__name__}]" if is_list else type(default).__name__
        name, kind = ast.unparse(node.targets[0]), kind.replace("NoneType", "None")
    return Parameter(name, kind, default, *_help_and_limits(comment))


def _help_and_limits(comment: str) -> tuple[str, tuple | None, float | None, float | None]:
    """Help, choices, minimum and maximum from the comment beside an assignment."""
    match = re.fullmatch(r"(.*?)\s*\(([^()]*)\)", comment)
    help_, limits = (match[1], match[2]) if match else ("", "")
    if match and " | " in limits:
        return help_, tuple(limits.split(" | ")), None, None
    if span := re.fullmatch(rf"({_NUMBER}) to ({_NUMBER})", limits):
        return help_, None, _number(span[1]), _number(span[2])
    if end := re.fullmatch(rf"at (least|most) ({_NUMBER})", limits):
        value = _number(end[2])
        return (help_, None, value, None) if end[1] == "least" else (help_, None, None, value)
    return comment, None, None, None


_NUMBER = r"-?[\d.]+(?:e[+-]?\d+)?"


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def names() -> list[str]:
    """Names of the package's numbered notebooks, in reading order."""
    return sorted(path.stem for path in FOLDER.glob("[0-9][0-9]_*.ipynb"))


def find(notebook: str | Path) -> str:
    """Full name of a notebook from its name, its number, its path or the words after the number."""
    stem = Path(notebook).name.removesuffix(".ipynb")
    for name in names():
        number, _, title = name.partition("_")
        if stem in (name, title) or stem.zfill(2) == number:
            return name
    fix = f"{did_you_mean(stem, names())} (`python3 -m cellop_nb params` lists them)"
    raise LabelError("the name or number of a notebook", repr(str(notebook)), fix)


def for_notebook(notebook: str | Path) -> tuple[Parameter, ...]:
    """Parameters that a notebook declares: a file, or one of the package's by its name."""
    path = Path(notebook)
    if path.suffix != ".ipynb" or not path.is_file():
        path = FOLDER / f"{find(notebook)}.ipynb"
    return _of_file(path, path.stat().st_mtime_ns)


@cache
def _of_file(path: Path, _written: int) -> tuple[Parameter, ...]:
    return read_cell(cell_of(path))


def defaults(notebook: str | Path) -> dict[str, Any]:
    """Default value of every parameter of a notebook."""
    return {parameter.name: parameter.default for parameter in for_notebook(notebook)}


def parameter(notebook: str | Path, name: str) -> Parameter:
    """One parameter of a notebook; an unknown name is refused."""
    by_name = {p.name: p for p in for_notebook(notebook)}
    if name in by_name:
        return by_name[name]
    fix = did_you_mean(name, by_name)
    raise LabelError(f"a parameter of {Path(notebook).stem}", repr(name), fix)


def validate(notebook: str | Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The given values, each in its declared type; raises as `parameter` and `Parameter.check` do."""
    return {name: parameter(notebook, name).check(value) for name, value in values.items()}


def assign(notebooks: Iterable[str | Path], name: str, value: Any, *, text: bool = False) -> dict[str, Any]:
    """Value of one parameter for each notebook that has it: `{notebook name: typed value}`.

    The name may be `NOTEBOOK.parameter` (`02.max_epochs`) for one notebook alone. With `text` the value comes from a
    command line, where `none` and `8,16` have a meaning; text is parsed too where the parameter is none.
    """
    books = [Path(notebook) for notebook in notebooks]
    where, _, plain = name.rpartition(".")
    chosen = [book for book in books if not where or where in (book.stem, book.stem.partition("_")[0])]
    homes = {book.stem: p for book in chosen for p in for_notebook(book) if p.name == plain}
    if not homes:
        options = [p.name for book in chosen or books for p in for_notebook(book)]
        named = ", ".join(book.stem for book in books)
        fix = did_you_mean(plain, dict.fromkeys(options))
        raise LabelError(f"a parameter of {named}", repr(name), fix)
    # YAML reads 1e-3 as text
    parsed = {stem for stem, p in homes.items() if text or (isinstance(value, str) and "str" not in p.kinds)}
    return {stem: p.parse(value) if stem in parsed else p.check(value) for stem, p in homes.items()}


def as_yaml(
    notebook: str | Path, values: Mapping[str, Any] | None = None, *, without: Iterable[str] = ()
) -> str:
    """Parameters as a YAML file for `run -f`, with their help as comments; those named in `without` are left out."""
    values = {**defaults(notebook), **(values or {})}
    shown = [p for p in for_notebook(notebook) if p.name not in without]
    return "".join(f"{p.name}: {json.dumps(values[p.name])}  # {p.comment}\n" for p in shown)


def parameters_cell(notebook: str | Path, values: Mapping[str, Any] | None = None) -> str:
    """Text of the notebook's `parameters` cell: one typed, commented assignment a line; `values` in place of defaults."""
    values = {**defaults(notebook), **(values or {})}
    return "\n".join(
        f"{p.name}: {p.annotation} = {_literal(values[p.name])}" + (f"  # {p.comment}" if p.comment else "")
        for p in for_notebook(notebook)
    )


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
