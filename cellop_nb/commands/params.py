"""`params`: the typed parameters of a notebook."""

from __future__ import annotations

import argparse
from pathlib import Path

from cellop_nb.commands.terminal import say, table
from cellop_nb.notebook import parameters

SUMMARY = "show the parameters of a notebook: name, type, default, range, meaning"
EXTRAS = None  # standard library only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `params`."""
    parser.add_argument(
        "notebook", nargs="?", help="name or number (02_train_vae, 02), or the path of an .ipynb file"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--yaml", action="store_true", help="as a file for `run -f`, to edit")
    form.add_argument("--cell", action="store_true", help="as the text of the notebook's parameters cell")


def main(args: argparse.Namespace) -> int:
    """Print the parameters of one notebook, or the notebooks there are."""
    if args.notebook is None:
        for name in parameters.names():
            say(f"{name}: {', '.join(p.name for p in parameters.for_notebook(name))}")
        return 0
    if args.yaml:
        say(parameters.as_yaml(args.notebook).rstrip())
    elif args.cell:
        say(parameters.parameters_cell(args.notebook))
    else:
        known = parameters.for_notebook(args.notebook)
        rows = [[p.name, p.type, repr(p.default), p.limits, p.help] for p in known]
        say(table(["parameter", "type", "default", "range", "meaning"], rows))
        example = next((p for p in known if p.limits), known[0])
        where = Path(args.notebook).stem
        say(f"\nChange one:  python3 -m cellop_nb run --only {where} -p {example.name} {example.default}")
    return 0
