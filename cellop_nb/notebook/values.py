"""One typed value of a notebook: how it is declared, checked, read from text and from a `parameters` cell.

Standard library only, so that the command line can refuse a wrong value before the environment exists.
"""

from __future__ import annotations

import ast
import json
import math
import tokenize
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from cellop_nb.errors import CellopError, LabelError, three_beats

_WORDS = {"true": True, "yes": True, "on": True, "1": True}
_WORDS |= {"false": False, "no": False, "off": False, "0": False}


class ParameterError(CellopError):
    """A parameter's value has the wrong type or lies outside its range."""


@dataclass(frozen=True)
class Parameter:
    """One value that a notebook takes.

    Parameters
    ----------
    name
        Name of the variable in the notebook.
    type
        Annotation: `bool`, `int`, `float`, `str`, `None`, a `list[...]` of the first four, or several joined
        by `|`.
    default
        Value that the committed notebook holds.
    help
        What it means, in a few words, with its unit.
    choices, minimum, maximum
        Allowed values, or the allowed range (bounds included).
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
    def limits(self) -> str:
        """Choices or range in words; empty where anything of the type will do."""
        if self.choices:
            return " | ".join(map(str, self.choices))
        if self.minimum is None and self.maximum is None:
            return ""
        if self.maximum is None:
            return f">= {self.minimum}"
        return f"<= {self.maximum}" if self.minimum is None else f"{self.minimum} to {self.maximum}"

    @property
    def comment(self) -> str:
        """Help and limits as they stand beside the assignment."""
        return f"{self.help} ({self.limits})" if self.limits and self.help else self.help or self.limits

    def check(self, value: Any) -> Any:
        """The value in its declared type.

        Raises
        ------
        ParameterError
            When the type, the choice or the range does not fit.
        """
        for kind in self.kinds:
            fits, converted = _fit(kind, value)
            if fits:
                self._check_limits(converted)
                return converted
        raise self._refuse(value)

    def parse(self, text: str) -> Any:
        """The value written as text on a command line (`true`, `0.5`, `none`, `8,16,32`).

        Raises
        ------
        ParameterError
            When the text is no such value.
        """
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
        found = f"{type(value).__name__} {value!r}"
        return ParameterError(three_beats(expected, found, f"give a value such as {self.default!r}"))


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
        return _WORDS.get(text.lower(), _UNREADABLE)
    if kind == "str":
        return text
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        return _UNREADABLE


def cell_of(path: Path) -> str:
    """Source of the cell tagged `parameters` in a notebook file.

    Raises
    ------
    LabelError
        When the file is no notebook or has no such cell.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError) as error:
        expected = "a Jupyter notebook (nbformat 4)"
        raise LabelError(three_beats(expected, f"{path} that is not one", "name an .ipynb file")) from error
    for cell in cells:
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            return "".join(cell["source"])
    expected = f"a cell tagged 'parameters' in {path.name}"
    raise LabelError(three_beats(expected, "none", "tag the cell of typed assignments 'parameters'"))


def read_cell(text: str) -> tuple[Parameter, ...]:
    """Parameters that the text of a `parameters` cell declares, with the trailing comments as help."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    declared = [node for node in ast.parse(text).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    return tuple(_declared(node, comments.get(node.end_lineno, "")) for node in declared if node.value)


def _declared(node: ast.Assign | ast.AnnAssign, comment: str) -> Parameter:
    default = ast.literal_eval(node.value)
    if isinstance(node, ast.AnnAssign):
        return Parameter(ast.unparse(node.target), ast.unparse(node.annotation), default, comment)
    is_list = isinstance(default, list) and bool(default)
    kind = f"list[{type(default[0]).__name__}]" if is_list else type(default).__name__
    return Parameter(ast.unparse(node.targets[0]), kind.replace("NoneType", "None"), default, comment)
