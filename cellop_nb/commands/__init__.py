"""Subcommands of `python3 -m cellop_nb`: what one consists of, and where each is; standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

MODULES = {
    "run": "run",
    "test": "tools",
    "lab": "lab",
    "notebooks": "run",
    "params": "run",
    "sweep": "sweep",
    "predict": "predict",
    "holdout": "holdout",
    "bench": "tools",
    "docs": "tools",
}
"""Name of a subcommand to the module of this folder that has it, in capitals."""


def _accept(args: argparse.Namespace) -> None:
    """No complaint."""


@dataclass(frozen=True)
class Command:
    """A subcommand; its module imports only the standard library at its top.

    Attributes
    ----------
    summary
        One line for ``--help``.
    add_arguments
        Gives a parser its arguments.
    main
        Runs it; returns the exit code.
    extras
        Extras of pyproject.toml that it needs beside the dependencies; None: it needs no environment.
    check
        Refuses bad input before the environment is made.
    """

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace], int]
    extras: tuple[str, ...] | None = ()
    check: Callable[[argparse.Namespace], None] = _accept


def load(name: str) -> Command:
    """The subcommand of that name."""
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name.upper())
