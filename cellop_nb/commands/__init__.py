"""What the subcommands of `python3 -m cellop_nb` share: how one is added, and the options that name the user's data."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from cellop_nb.errors import DataError

MODULES = ("run", "lab", "sweep", "ask", "tools")
"""Modules of this folder that add subcommands; each imports only the standard library at its top."""

KEYS = ("perturbation_key", "context_key", "control", "layer")


def add(
    commands,
    name: str,
    main: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    check: Callable[[argparse.Namespace], None] = lambda args: None,
    extras: tuple[str, ...] | None = (),
) -> argparse.ArgumentParser:
    """A parser for one more subcommand among `commands`: `main` runs it and returns the exit code.

    `summary` is its line in ``--help``; `check` refuses bad input before the environment is made; `extras` are those of
    pyproject.toml that it needs beside the dependencies, None where it needs no environment.
    """
    title = f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=title, allow_abbrev=False)
    parser.set_defaults(parser=parser, main=main, check=check, extras=extras)
    return parser


def add_data(parser: argparse.ArgumentParser, *, with_file: bool = True) -> None:
    """Options that name the user's file and say which of its columns, labels and layers mean what."""
    group = parser.add_argument_group("your data")
    if with_file:
        group.add_argument(
            "--data", metavar="FILE", help="AnnData file with raw counts, or a data set's name"
        )
    group.add_argument("--perturbation-key", metavar="COLUMN", help="column of obs with the perturbation")
    group.add_argument(
        "--context-key", metavar="COLUMN", help="column of obs with the cell type; several: A,B"
    )
    group.add_argument("--control", metavar="LABEL", help="label of the unperturbed cells")
    group.add_argument("--layer", metavar="LAYER", help="layer with the raw counts (default: X)")


def keys_told(args: argparse.Namespace) -> dict[str, str]:
    """Those of the keys that are on the command line, as they are written there."""
    return {name: getattr(args, name) for name in KEYS if getattr(args, name) is not None}


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse numbers below the least that their options may be."""
    for option, low in least.items():
        value = getattr(args, option)
        if value is not None and value < low:
            fix = "leave it out for the default"
            raise DataError(f"--{option} of at least {low}", str(value), fix)


def check_new(option: str, path: Path | None, *, may_exist: bool = False) -> None:
    """Refuse a file to write whose folder is not there or not ours, or that is there: nobody's work is overwritten."""
    if path is None:
        return
    parent = path.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        what = f"an existing folder for {option} that you may write to"
        raise DataError(what, str(path.parent), "make the folder first, or name another one")
    if path.exists() and not may_exist:
        raise DataError(f"a new file for {option}", f"{path} is there", "name another one")
