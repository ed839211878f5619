"""`holdout`: hold out contexts, donors, perturbations or combinations in turn, and score every method."""

from __future__ import annotations

import argparse
import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import active_children, connection, get_context, parent_process
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
        "--only", action="append", default=[], metavar="NAME", help="ask only this question; repeatable"
    )
    add_data_options(parser.add_argument_group("your data"))
    how = parser.add_argument_group("how")
    how.add_argument("--genes", type=int, default=1000, help="variable genes; 0 keeps all (default: 1000)")
    how.add_argument("--latent", type=int, default=32, metavar="N", help="latent dimensions (default: 32)")
    how.add_argument("--seeds", type=int, default=1, help="fits of each hold-out (default: 1)")
    how.add_argument("--seed", type=int, default=0, help="every random choice follows from it (default: 0)")
    how.add_argument("--workers", type=int, help="processes side by side (default: one after the other)")
    parser.add_argument("--out", metavar="FILE.csv", type=Path, help="file for the whole table")


def add_data_options(group) -> None:
    """The keys of a screen; one that is left out is that of the file, where it was set up, else the usual name."""
    group.add_argument("--layer", metavar="LAYER", help="layer with the raw counts (default: X)")
    group.add_argument("--perturbation-key", metavar="COLUMN", help="default: perturbation")
    group.add_argument(
        "--context-key", metavar="COLUMN", help="several: A,B; 'none' for no contexts (default: cell_type)"
    )
    group.add_argument("--control", metavar="LABEL", help="default: control")


def set_up(adata, args: argparse.Namespace, *, only_if_told: bool = False) -> None:
    """Set the screen up with the keys of the command line; with `only_if_told` not without any."""
    import cellop_nb as co
    from cellop_nb.data.contract import Keys, is_set_up, keys_of

    told = [name for name in ("layer", "perturbation_key", "context_key", "control") if getattr(args, name)]
    if only_if_told and not told:
        return
    keys = keys_of(adata) if is_set_up(adata) else Keys()
    co.setup(
        adata,
        layer=args.layer or keys.layer,
        perturbation_key=args.perturbation_key or keys.perturbation_key,
        context_key=_contexts(args.context_key) if args.context_key else keys.context_key,
        control=args.control or keys.control,
        dose_key=keys.dose_key,
        time_key=keys.time_key,
        batch_key=keys.batch_key,
        singles=keys.singles,
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what could not be written or understood, before hours of work."""
    for option, least in (("genes", 0), ("latent", 2), ("seeds", 1), ("workers", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            fix = "leave it out for the default"
            raise DataError(three_beats(f"--{option} of at least {least}", str(value), fix))
    check_new("--out", args.out)


def check_new(option: str, path: Path | None) -> None:
    """Refuse a file to write whose folder is not there or not ours, or that is there."""
    if path is None:
        return
    parent = path.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        fix = "make the folder first, or name another one"
        what = f"an existing folder for {option} that you may write to"
        raise DataError(three_beats(what, str(path.parent), fix))
    if path.exists():
        raise DataError(three_beats(f"a new file for {option}", f"{path} is there", "name another one"))


def holdout(args: argparse.Namespace) -> int:
    """Run the hold-outs and show the methods side by side."""
    import cellop_nb as co

    adata = co.datasets.load(args.data)
    set_up(adata, args)
    model = co.CellOp(adata, n_latent=args.latent, n_genes=args.genes or None, seed=args.seed)
    client = None if args.workers is None else LocalWorkers(args.workers)
    result = co.holdout(
        model, args.over, only=args.only or None, n_seeds=args.seeds, client=client, seed=args.seed
    )
    if args.out is not None:
        write_whole(args.out, lambda part: result.table.to_csv(part, index=False))
    for metric in SHOWN:
        say(f"\n{metric} (mean over {args.seeds} seed{'s' if args.seeds > 1 else ''})")
        summary = result.summary(metric)
        _show(summary)
        for what, names in summary.attrs["left_out"].items():
            if names:
                say(f"not in the mean, {what}: {', '.join(names)}")
    for row in result.refused.itertuples():
        say(f"not asked: {row.question}: {row.reason}")
    for row in result.behind().itertuples():
        say(f"behind: {row.group}: {row.cellop:.2f} against {row.baseline:.2f} of {row.best_baseline}")
    return 0


class LocalWorkers:
    """Processes on this machine behind the calls of a Dask client that a hold-out makes; no port is opened."""

    def __init__(self, number: int) -> None:
        self._pool = ProcessPoolExecutor(number, get_context("spawn"), _end_with_parent)

    def scatter(self, value, broadcast: bool = True, hash: bool = False):  # noqa: A002 - a client's word
        """What the workers share: it travels with each task."""
        return value

    def submit(self, work, *arguments, pure: bool = False) -> Future:
        """A task for the next worker that is free."""
        return self._pool.submit(work, *arguments)

    def cancel(self, futures) -> None:
        """Drop the tasks that have not begun, and end the workers, also one that is in the middle of a task."""
        for future in futures:
            future.cancel()
        if not all(future.done() for future in futures):
            for worker in active_children():
                worker.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker with the process that started it, also one that was killed and could not say so."""
    parent = parent_process()
    assert parent is not None, "started by a pool"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _show(wide) -> None:
    rows = [[str(name), *(f"{value:.2f}" for value in row)] for name, row in wide.iterrows()]
    say(table([wide.index.name, *map(_short, wide.columns)], rows, right=range(1, len(wide.columns) + 1)))


def _contexts(text: str) -> str | list[str] | None:
    if text.lower() == "none":
        return None
    return text.split(",") if "," in text else text


def _short(method: str) -> str:
    return method.partition(" (")[0]


HOLDOUT = Command(
    "hold out contexts, donors, perturbations or combinations in turn; score all methods",
    add_arguments,
    holdout,
    check=check,
)
