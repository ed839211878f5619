"""`holdout`: hold out contexts, donors, perturbations or combinations in turn, and score every method."""

from __future__ import annotations

import argparse
from pathlib import Path

from cellop_nb.commands import Command
from cellop_nb.commands.terminal import say, table
from cellop_nb.errors import DataError, three_beats
from cellop_nb.files import write_whole

SHOWN = ("e_distance", "pearson_delta")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `holdout`."""
    parser.add_argument("data", help="a name in datasets.list(), or the path of an .h5ad file")
    parser.add_argument(
        "--over",
        default="context",
        metavar="WHAT",
        help="context, group, combination, or a column of obs such as donor (default: context)",
    )
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=LABEL", help="hold out only these; repeatable"
    )
    group = parser.add_argument_group("your data")
    group.add_argument("--layer", metavar="LAYER", help="layer with the raw counts (default: X)")
    group.add_argument("--perturbation-key", metavar="COLUMN", default="perturbation")
    group.add_argument(
        "--context-key", metavar="COLUMN", default="cell_type", help="several: A,B; 'none' for no contexts"
    )
    group.add_argument("--control", metavar="LABEL", default="control")
    how = parser.add_argument_group("how")
    how.add_argument("--genes", type=int, default=1000, help="variable genes; 0 keeps all (default: 1000)")
    how.add_argument("--epochs", type=int, default=120, help="passes of the VAE at most (default: 120)")
    how.add_argument(
        "--latent", type=_sizes, default=[], metavar="N[,N]",
        help="latent dimensions; of several, the one that predicts left-out training groups best (default: 32,16)",
    )  # fmt: skip
    how.add_argument("--seeds", type=int, default=1, help="runs of each hold-out (default: 1)")
    how.add_argument("--pooled", type=int, default=1, help="fits pooled in each run (default: 1)")
    how.add_argument("--seed", type=int, default=0, help="every random choice follows from it (default: 0)")
    how.add_argument(
        "--quick", action="store_true",
        help="choose in the latent space of the final VAE, which has seen the groups left out: three to four times "
        "faster, but flexible operators are flattered",
    )  # fmt: skip
    how.add_argument("--workers", type=int, help="processes side by side (default: one after the other)")
    parser.add_argument("--out", metavar="FILE.csv", type=Path, help="file for the whole table")


def check(args: argparse.Namespace) -> None:
    """Refuse what could not be written or understood, before hours of work."""
    for pair in args.where:
        if "=" not in pair:
            raise DataError(three_beats("--where COLUMN=LABEL", repr(pair), "write for instance donor=d1"))
    for option, least in (("genes", 0), ("epochs", 1), ("seeds", 1), ("pooled", 1), ("workers", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            fix = "leave it out for the default"
            raise DataError(three_beats(f"--{option} of at least {least}", str(value), fix))
    if args.out is not None and not args.out.resolve().parent.is_dir():
        fix = "make the folder first, or name another one"
        raise DataError(three_beats("an existing folder for --out", str(args.out.parent), fix))


def holdout(args: argparse.Namespace) -> int:
    """Run the hold-outs and show the methods side by side."""
    import cellop_nb as co

    result = co.holdout_all(
        co.datasets.load(args.data),
        over=args.over,
        where=dict(pair.split("=", 1) for pair in args.where),
        layer=args.layer,
        perturbation_key=args.perturbation_key,
        context_key=_contexts(args.context_key),
        control=args.control,
        n_genes=args.genes,
        vae=[{"n_latent": size} for size in args.latent] or None,
        training={"max_epochs": args.epochs},
        n_seeds=args.seeds,
        n_pooled=args.pooled,
        nested=not args.quick,
        seed=args.seed,
        cluster=args.workers,
    )
    if args.out is not None:
        write_whole(args.out, lambda part: result.table.to_csv(part, index=False))
    several = result.table.groupby("heldout", sort=False)["group"].nunique().max() > 1
    for metric in SHOWN:
        for by in ("group", "heldout") if several else ("group",):
            say(f"\n{metric} (mean over {args.seeds} seed{'s' if args.seeds > 1 else ''})")
            _show(result.summary(metric, by=by))
    chosen = result.choices[result.choices["chosen"]]
    say("\nchosen: " + ", ".join(f"{n} x {name}" for name, n in chosen["complexity"].value_counts().items()))
    say("VAE: " + ", ".join(f"{n} x {name}" for name, n in chosen["vae"].value_counts().items()))
    for row in result.left_out.itertuples():
        say(f"left out: {row.heldout}: {row.reason}")
    for row in result.behind().itertuples():
        say(f"behind: {row.group}: {row.operators:.2f} against {row.baseline:.2f} of {row.best_baseline}")
    return 0


def _show(wide) -> None:
    rows = [[str(name), *(f"{value:.2f}" for value in row)] for name, row in wide.iterrows()]
    say(table([wide.index.name, *map(_short, wide.columns)], rows, right=range(1, len(wide.columns) + 1)))


def _contexts(text: str) -> str | list[str] | None:
    if text.lower() == "none":
        return None
    return text.split(",") if "," in text else text


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers above 0 such as 16,32; found {text!r}")
    return sizes


def _short(method: str) -> str:
    return method.partition(" (")[0]


HOLDOUT = Command(
    "hold out contexts, donors, perturbations or combinations in turn; score all methods",
    add_arguments,
    holdout,
    check=check,
)
