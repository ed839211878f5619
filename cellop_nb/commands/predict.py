"""`predict`: ask what a perturbation would do to the cells of a context, and print the verdict and the leading genes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cellop_nb.commands import Command
from cellop_nb.commands.holdout import add_data_options, check_new, set_up
from cellop_nb.commands.terminal import clock, say, table
from cellop_nb.errors import DataError, LabelError, ModelError, three_beats

if TYPE_CHECKING:
    from cellop_nb.data.contract import Keys

N_GENES, N_LEADING, N_SHOWN = 10, 5, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `predict`."""
    parser.add_argument(
        "conditions",
        nargs="?",
        type=Path,
        metavar="CONDITIONS.csv",
        help="a table with the columns context (or one of each factor), perturbation, and n_cells or strength",
    )
    parser.add_argument(
        "--context", metavar="LABEL", help="the context to predict; its control cells suffice"
    )
    parser.add_argument(
        "--perturbation", metavar="LABEL", help="the perturbation to predict; A+B for a combination"
    )
    parser.add_argument("--out", type=Path, metavar="CELLS.h5ad", help="file for the predicted cells")
    group = parser.add_argument_group("your data")
    group.add_argument("--data", required=True, help="a name in datasets.list(), or the path of a file")
    add_data_options(group)
    how = parser.add_argument_group("the model")
    how.add_argument("--model", type=Path, metavar="PATH", help="a saved model; nothing is fitted then")
    how.add_argument("--save-model", type=Path, metavar="PATH", help="file for the fitted model")
    how.add_argument("--genes", type=int, help="variable genes; 0 keeps all (default: 2000)")
    how.add_argument("--seed", type=int, help="every random choice follows from it (default: 0)")


def check(args: argparse.Namespace) -> None:
    """Refuse what can be seen from the words alone, before an environment is made."""
    question = (args.context is not None) + (args.perturbation is not None)
    if (args.conditions is None and question < 2) or (args.conditions is not None and question):
        problem = (
            f"{args.conditions or 'no table'}, --context {args.context}, --perturbation {args.perturbation}"
        )
        fix = "give --context and --perturbation, or the table alone"
        raise LabelError(three_beats("one question, or a table of questions", problem, fix))
    if args.genes is not None and (args.genes < 0 or args.genes == 1):
        raise DataError(three_beats("--genes of at least 2, or 0 for all", str(args.genes), "leave it out"))
    for option in ("genes", "save_model"):
        if args.model is not None and getattr(args, option) is not None:
            problem, fix = f"--{option.replace('_', '-')} beside --model", "leave one of the two out"
            raise DataError(three_beats("a saved model, or what a new one is to be", problem, fix))
    for path in (args.conditions, args.model):
        if path is not None and not (path.is_file() or path.with_name(f"{path.name}.safetensors").is_file()):
            raise DataError(three_beats("a file", f"no file {path}", "check the path"))
    if args.out is not None and args.out.suffix != ".h5ad":
        raise DataError(three_beats("--out that ends in .h5ad", str(args.out), f"write {args.out}.h5ad"))
    check_new("--out", args.out)
    if (saved := args.save_model) is not None:  # it gets the ending where it has none
        check_new("--save-model", saved.with_name(f"{saved.name.removesuffix('.safetensors')}.safetensors"))


def predict(args: argparse.Namespace) -> int:
    """Fit or load a model, print what it says of each question, and write the cells."""
    import cellop_nb as co

    adata = co.datasets.load(args.data)
    if args.model is None:
        set_up(adata, args)
        seed = 0 if args.seed is None else args.seed
        model = co.CellOp(adata, n_genes=2000 if args.genes is None else args.genes or None, seed=seed)
    else:
        set_up(adata, args, only_if_told=True)
        model = cast(co.CellOp, co.load(args.model, adata))  # with data it is one
    questions = _conditions(args, model.keys)
    for one in questions.itertuples():
        model.check_question(one.context, one.perturbation)
    if not model.members:
        started = time.monotonic()
        model.fit()
        say(f"fitted in {clock(time.monotonic() - started)}")
        if args.save_model is not None:
            say(f"model: {model.save(args.save_model)}")
    pairs = list(dict.fromkeys(zip(questions["context"], questions["perturbation"], strict=True)))
    if len(pairs) == 1:
        _show_one(model, *pairs[0])
    else:
        _show_many(model, pairs)
    if args.out is not None:
        say(f"cells: {model.predict(questions, out=args.out, seed=args.seed)}")
    return 0


def _conditions(args: argparse.Namespace, keys: Keys):
    """The questions, as a DataFrame; labels as they are written, "01" and "NA" too."""
    import pandas as pd

    from cellop_nb.analysis.cellop import question_table

    if args.conditions is None:
        return question_table(pd.DataFrame({"context": [args.context], "perturbation": [args.perturbation]}))
    try:
        numbers = {"n_cells": [""], "strength": [""]}
        labels = ["context", "perturbation", *(keys.context_key or ())]
        questions = pd.read_csv(
            args.conditions, dtype=dict.fromkeys(labels, str), keep_default_na=False, na_values=numbers
        )
        return question_table(questions, keys=keys)
    except (LabelError, ModelError) as refusal:
        raise type(refusal)(f"{refusal} The table is {args.conditions}.") from None
    except (OSError, ValueError) as error:
        problem, fix = f"{args.conditions}: {error}", "write it with commas and a first line of column names"
        raise DataError(three_beats("a table of questions as CSV", problem, fix)) from error


def _show_one(model, context: str, perturbation: str) -> None:
    say(f"\n{model.verdict(context, perturbation)}\n")
    leading = model.intervals(context, perturbation).head(N_GENES)
    rows = [
        [
            row.gene,
            f"{row.change:+.2f}",
            "unknown" if row.low != row.low else f"{row.low:+.2f} to {row.high:+.2f}",
        ]
        for row in leading.itertuples()
    ]
    say(table(["gene", "change", "95 % interval"], rows, right=[1]))
    say("change of mean log1p counts per 10,000")


def _show_many(model, pairs: list[tuple[str, str]]) -> None:
    for pair in pairs[:N_SHOWN]:
        leading = model.intervals(*pair).head(N_LEADING)
        genes = ", ".join(f"{row.gene} {row.change:+.2f}" for row in leading.itertuples())
        say(f"{model.verdict(*pair)}\n  leading genes: {genes}")
    if len(pairs) > N_SHOWN:
        say(f"and {len(pairs) - N_SHOWN} more questions; a shorter table shows them")


PREDICT = Command(
    "ask what a perturbation would do to the cells of a context, measured or not",
    add_arguments,
    predict,
    check=check,
)
