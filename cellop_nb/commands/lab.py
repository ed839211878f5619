"""`lab`: JupyterLab on the notebooks."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cellop_nb.commands import environment
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
    root = environment.ROOT if environment.IS_CHECKOUT else _own_copy()
    first = next((root / "notebooks").glob("00_*.ipynb"), None)
    start = f"/lab/tree/notebooks/{first.name}" if first else "/lab"
    say(f"JupyterLab on {root / 'notebooks'}; stop it with Ctrl-C here.")
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url={start}",
    ]
    return subprocess.call([*command, *args.jupyter], env={**os.environ, "JUPYTER_PREFER_ENV_PATH": "1"})


def _own_copy() -> Path:
    """An installed package's notebooks are copied out: people change notebooks, not the package."""
    target = Path.cwd() / "cellop_notebooks"
    if not target.exists():
        shutil.copytree(environment.NOTEBOOKS, target / "notebooks")
    return target
