"""`lab`: JupyterLab on the notebooks."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from cellop_nb.commands import environment, notebooks
from cellop_nb.commands.terminal import say

SUMMARY = "open JupyterLab on the notebooks"
EXTRAS: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lab`."""
    parser.add_argument(
        "jupyter", nargs="*", metavar="-- ARGUMENTS", help="passed on to jupyter lab, e.g. -- --no-browser"
    )


def main(args: argparse.Namespace) -> int:
    """Start JupyterLab and wait for its end."""
    root = workplace()
    first = next((root / "notebooks").glob("00_*.ipynb"), None)
    start = f"/lab/tree/notebooks/{first.name}" if first else "/lab"
    say(f"JupyterLab on {root / 'notebooks'}; stop it with Ctrl-C here.")
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url={start}",
        "--ServerApp.ip=127.0.0.1",  # reached from this machine alone, and with the token that it prints
    ]
    return subprocess.call([*command, *args.jupyter], env={**os.environ, "JUPYTER_PREFER_ENV_PATH": "1"})


def workplace() -> Path:
    """The folder with notebooks to open; people change notebooks, so an installed package's are copied out."""
    home = environment.home()
    if environment.notebooks() != environment.NOTEBOOKS or environment.IS_CHECKOUT:
        return home
    target = home / "cellop_notebooks"
    if not target.exists():
        notebooks.copy_to(target)
    return target
