"""`notebooks`: a copy of the numbered notebooks and the example data, to work in."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from cellop_nb.commands import environment
from cellop_nb.commands.terminal import say
from cellop_nb.errors import StorageError, three_beats
from cellop_nb.files import storing

SUMMARY = "copy the numbered notebooks and the example data into a folder of your own"
EXTRAS = None  # standard library only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `notebooks`."""
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="folder to make; notebooks/ and data/ go there"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse a folder that already has notebooks or data: nobody's work is overwritten."""
    for name in ("notebooks", "data"):
        if (args.folder / name).exists():
            fix = "name another folder, or move that one away"
            raise StorageError(three_beats("a folder without notebooks", f"{args.folder / name}", fix))


def main(args: argparse.Namespace) -> int:
    """Copy, and say what to do next."""
    copy_to(args.folder)
    say(f"Notebooks and example data are in {args.folder.resolve()}")
    say(f"Next:  cd {args.folder} && python3 -m cellop_nb lab     (or: run)")
    return 0


def copy_to(folder: Path) -> None:
    """Copy both folders whole: each under another name first, then renamed."""
    for name in ("notebooks", "data"):
        target, part = folder / name, folder / f".{os.getpid()}.{name}"
        unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        with storing(target):
            try:
                shutil.copytree(environment.SHARE / name, part, ignore=unwanted)
                os.replace(part, target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
