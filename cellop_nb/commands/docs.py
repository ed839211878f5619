"""`docs`: the documentation site, built by docs/build.py of a checkout."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from cellop_nb.commands import environment

SUMMARY = "build the documentation site, from the notebooks as they are committed"
EXTRAS = ("docs",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `docs`."""
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, help="where the site goes (default: docs/_build/html)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse where there is nothing to build from: an installed wheel has no pages."""
    environment.require_checkout("docs")


def main(args: argparse.Namespace) -> int:
    """Build the site."""
    folder = [args.out.resolve()] if args.out else []
    return subprocess.call([sys.executable, "-m", "docs.build", *folder], cwd=environment.ROOT)
