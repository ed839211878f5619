"""Other packages: which versions are needed, which are here, and the threads that some of them change."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from cellop_nb.errors import MissingExtraError, SetupError

_PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(*extras: str) -> list[str]:
    """Requirement strings: the dependencies and those of the named extras.

    In a checkout they are those of pyproject.toml; an installed package reads what it was installed with.
    """
    if _PROJECT.is_file():
        import tomllib

        project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
        return [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]
    lines = []
    for line in requires("cellop_nb") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"](.+?)['\"]", marker)
        if not extra or extra[1] in extras:
            lines.append(requirement.strip())
    return lines


def missing(needed: list[str]) -> list[str]:
    """Those of the requirements that the running interpreter does not meet."""
    return [requirement for requirement in needed if not _met(requirement, absent=False)]


def require(module: str, extra: str, *, of: str) -> None:
    """Refuse where the package `module` of an extra, which `of` needs, is not installed; the error names the extra."""
    if find_spec(module) is None:
        fix = f'run `pip install "cellop_nb[{extra}]"`'
        raise MissingExtraError(f"the package {module} for {of}", "it is not installed", fix)


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    leading = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def refuse_outdated() -> None:
    """Refuse packages that are too old, of notebooks too, before they fail in some other way."""
    old = [requirement for requirement in requirements("notebook") if not _met(requirement, absent=True)]
    if old:
        versions = ", ".join(f"{_name(r)} {version(_name(r))}" for r in old)
        command = " ".join(["pip install", *(f'"{requirement}"' for requirement in old)])
        raise SetupError(", ".join(old), versions, f"run `{command}`")


@cache
def refuse_outdated_once() -> None:
    """:func:`refuse_outdated`, the first time that a public name is asked for."""
    refuse_outdated()


def _name(requirement: str) -> str:
    return re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0]


def _met(requirement: str, *, absent: bool) -> bool:
    """Whether an installed version is high enough; `absent` is the answer for a package that is not there."""
    try:
        present = version(_name(requirement))
    except PackageNotFoundError:
        return absent
    lowest = re.search(r">=\s*([\d.]+)", requirement)
    return lowest is None or numbers(present) >= numbers(lowest[1])


@contextlib.contextmanager
def same_threads() -> Iterator[None]:
    """Leave torch with the number of threads it had; also a decorator.

    Parallel functions of numba (scanpy's, for one) share torch's OpenMP and set their own number for the calling
    thread: a process that was given one core would train on all of them from then on, and its threads would spend
    their time waiting for each other.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
