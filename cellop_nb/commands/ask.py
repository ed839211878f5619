"""`predict` and `holdout`: what a perturbation would do, and how well held-out groups are told beside baselines."""

from __future__ import annotations

import argparse
import os
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cellop_nb.commands import add, add_data, check_least, check_new, keys_told
from cellop_nb.commands.terminal import clock, say, table
from cellop_nb.errors import DataError, LabelError, ModelError
from cellop_nb.files import write_whole

if TYPE_CHECKING:
    from cellop_nb.data.contract import Keys

N_GENES, N_LEADING, N_SHOWN = 10, 5, 10
SHOWN = ("e_distance", "pearson_delta")


def add_commands(commands) -> None:
    """`predict` and `holdout` on the command line."""
    summary = "ask what a perturbation would do to the cells of a context, measured or not"
    parser = add(commands, "predict", predict, summary, check=check_predict)
    columns = "context (or one of each factor), perturbation, and n_cells and strength or dose"
    parser.add_argument(
        "conditions",
        nargs="?",
        type=Path,
        metavar="CONDITIONS.csv",
        help=f"a table with the columns {columns}",
    )
    parser.add_argument(
        "--context", metavar="LABEL", help="the context to predict; its control cells suffice"
    )
    parser.add_argument("--perturbation", metavar="LABEL", help="the perturbation; A+B for a combination")
    cells = "file for the predicted cells; the same command goes on where one was ended"
    parser.add_argument("--out", type=Path, metavar="CELLS.h5ad", help=cells)
    parser.add_argument("--data", required=True, help="a name in datasets.list(), or the path of a file")
    add_data(parser, with_file=False)
    model = parser.add_argument_group("the model")
    model.add_argument("--model", type=Path, metavar="PATH", help="a saved model; nothing is fitted then")
    model.add_argument("--save-model", type=Path, metavar="PATH", help="file for the fitted model")
    model.add_argument("--genes", type=int, help="variable genes; 0 keeps all (default: 2000)")
    model.add_argument("--seed", type=int, help="every random choice follows from it (default: 0)")
    _add_workers(model)

    summary = "hold out contexts, donors, perturbations or combinations in turn; score all methods"
    parser = add(commands, "holdout", holdout, summary, check=check_holdout)
    parser.add_argument("data", help="a name in datasets.list(), or the path of an .h5ad file")
    over = "context, group, combination, or a column of obs such as donor (default: context)"
    parser.add_argument("--over", default="context", metavar="WHAT", help=over)
    parser.add_argument("--only", action="append", metavar="NAME", help="ask only this question; repeatable")
    add_data(parser, with_file=False)
    how = parser.add_argument_group("how")
    how.add_argument("--genes", type=int, default=1000, help="variable genes; 0 keeps all (default: 1000)")
    how.add_argument("--latent", type=int, default=32, metavar="N", help="latent dimensions (default: 32)")
    how.add_argument("--seeds", type=int, default=1, help="fits of each hold-out (default: 1)")
    how.add_argument("--seed", type=int, default=0, help="every random choice follows from it (default: 0)")
    _add_workers(how)
    parser.add_argument("--out", metavar="FILE.csv", type=Path, help="file for the whole table")


def _add_workers(group) -> None:
    group.add_argument("--workers", type=int, help="processes side by side (default: one after the other)")
    where = "address tls://HOST:PORT of a Dask scheduler whose workers share the work"
    group.add_argument("--cluster", metavar="ADDRESS", help=where)


def _check_workers(args: argparse.Namespace) -> None:
    if args.workers is not None and args.cluster is not None:
        raise DataError("--workers or --cluster", "both", "leave one of the two out")
    check_least(args, workers=1)
    if args.cluster is not None:
        if "://" not in args.cluster:
            raise DataError(
                "an address tls://HOST:PORT after --cluster", args.cluster, "name the scheduler's"
            )
        from cellop_nb.notebook.sweep import check_where

        check_where(args.cluster)


@contextmanager
def _client(args: argparse.Namespace):
    """What shares the work out: processes on this machine, a Dask scheduler's, or None."""
    if args.cluster is not None:
        from cellop_nb.notebook.sweep import connected

        with connected(args.cluster) as client:
            yield client
    elif args.workers is not None:
        with LocalWorkers(args.workers) as workers:
            yield workers
    else:
        yield None


def set_up(adata, told: dict[str, str]) -> None:
    """Set the screen up; a key that is not told is that of the file, where it was set up, else the usual name."""
    import cellop_nb as co
    from cellop_nb.data.contract import is_set_up, keys_of

    keys: dict = vars(keys_of(adata)) | told if is_set_up(adata) else dict(told)
    if (context := told.get("context_key")) is not None:  # 'none' for no contexts
        keys["context_key"] = None if context.lower() == "none" else context.split(",")
    co.setup(adata, **keys)


# -- predict


def check_predict(args: argparse.Namespace) -> None:
    """Refuse what can be seen from the words alone, before an environment is made."""
    question = (args.context is not None) + (args.perturbation is not None)
    if (args.conditions is None and question < 2) or (args.conditions is not None and question):
        problem = (
            f"{args.conditions or 'no table'}, --context {args.context}, --perturbation {args.perturbation}"
        )
        fix = "give --context and --perturbation, or the table alone"
        raise LabelError("one question, or a table of questions", problem, fix)
    if args.genes is not None and (args.genes < 0 or args.genes == 1):
        raise DataError("--genes of at least 2, or 0 for all", str(args.genes), "leave it out")
    for option, value in {"--genes": args.genes, "--save-model": args.save_model}.items():
        if args.model is not None and value is not None:
            problem, fix = f"{option} beside --model", "leave one of the two out"
            raise DataError("a saved model, or what a new one is to be", problem, fix)
    for path in (args.conditions, args.model):
        if path is not None and not (path.is_file() or path.with_name(f"{path.name}.safetensors").is_file()):
            raise DataError("a file", f"no file {path}", "check the path")
    if args.out is not None and args.out.suffix != ".h5ad":
        raise DataError("--out that ends in .h5ad", str(args.out), f"write {args.out}.h5ad")
    check_new("--out", args.out)
    _check_workers(args)
    if (saved := args.save_model) is not None:  # it gets the ending where it has none
        check_new("--save-model", saved.with_name(f"{saved.name.removesuffix('.safetensors')}.safetensors"))


def predict(args: argparse.Namespace) -> int:
    """Fit or load a model, print what it says of each question, and write the cells."""
    import cellop_nb as co

    told = keys_told(args)
    if args.model is None:
        adata = co.datasets.load(args.data)
        set_up(adata, told)
        n_genes = 2000 if args.genes is None else args.genes or None
        model = co.CellOp(adata, n_genes=n_genes, seed=args.seed or 0)
        questions = read_questions(args, model.keys)
    else:
        model, questions = _loaded(args, told)
    for one in questions.itertuples():
        model.check_question(one.context, one.perturbation)
    if "dose" in questions and model.keys.dose_key is None and not model.members:
        fix = "name their column once, co.setup(adata, dose_key=...), and write the file; or leave the column out"
        raise LabelError("doses in the screen, as the table asks for some", "no column of doses", fix)
    with _client(args) as client:
        if not model.members:
            started = time.monotonic()
            model.fit()
            say(f"fitted in {clock(time.monotonic() - started)}")
            if args.save_model is not None:
                say(f"model: {model.save(args.save_model)}")
        named = [column for column in ("context", "perturbation", "dose") if column in questions]
        asked = list(dict.fromkeys(questions[named].itertuples(index=False, name=None)))
        if len(asked) == 1:
            _show_one(model, *asked[0])
        else:
            _show_many(model, asked)
        if args.out is not None:
            say(f"cells: {model.predict(questions, out=args.out, client=client, seed=args.seed)}")
    return 0


def _loaded(args: argparse.Namespace, told: dict[str, str]):
    """A saved model on the control cells that the questions start from, and the questions; no other cell is read."""
    import numpy as np

    import cellop_nb as co
    from cellop_nb.data.contract import is_set_up, keys_of
    from cellop_nb.data.groups import controls_by_context

    model = cast(co.CellOp, co.load(args.model))
    adata = co.datasets.load(args.data, backed=True)
    if told:
        set_up(adata, told)
    keys = keys_of(adata) if is_set_up(adata) else model.keys
    questions = read_questions(args, keys)
    controls = controls_by_context(adata, keys)
    asked = set(questions["context"])
    rows = [rows for context, rows in controls.items() if context in asked or not asked <= set(controls)]
    if rows:
        adata = adata[np.sort(np.concatenate(rows))]
    return model.on(adata.to_memory()), questions


def read_questions(args: argparse.Namespace, keys: Keys):
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
        raise DataError("a table of questions as CSV", problem, fix) from error


def _show_one(model, context: str, perturbation: str, *dose: float) -> None:
    say(f"\n{model.verdict(context, perturbation, *dose)}\n")
    leading = model.intervals(context, perturbation).head(N_GENES)
    intervals = [
        "unknown" if low != low else f"{low:+.2f} to {high:+.2f}"
        for low, high in zip(leading["low"], leading["high"], strict=True)
    ]
    changes = [f"{change:+.2f}" for change in leading["change"]]
    rows = list(zip(leading["gene"], changes, intervals, strict=True))
    say(table(["gene", "change", "95 % interval"], rows, right=[1]))
    say("change of mean log1p counts per 10,000")


def _show_many(model, asked: list[tuple]) -> None:
    for question in asked[:N_SHOWN]:
        leading = model.intervals(*question[:2]).head(N_LEADING)
        genes = ", ".join(f"{row.gene} {row.change:+.2f}" for row in leading.itertuples())
        say(f"{model.verdict(*question)}\n  leading genes: {genes}")
    if len(asked) > N_SHOWN:
        say(f"and {len(asked) - N_SHOWN} more questions; a shorter table shows them")


# -- holdout


def check_holdout(args: argparse.Namespace) -> None:
    """Refuse what could not be written or understood, before hours of work."""
    check_least(args, genes=0, latent=2, seeds=1)
    _check_workers(args)
    check_new("--out", args.out)


def holdout(args: argparse.Namespace) -> int:
    """Run the hold-outs and show the methods side by side."""
    import cellop_nb as co

    adata = co.datasets.load(args.data)
    set_up(adata, keys_told(args))
    model = co.CellOp(adata, n_latent=args.latent, n_genes=args.genes or None, seed=args.seed)
    with _client(args) as client:
        result = co.holdout(
            model, args.over, only=args.only, n_seeds=args.seeds, client=client, seed=args.seed
        )
    if args.out is not None:
        write_whole(args.out, lambda part: result.table.to_csv(part, index=False))
    for metric in SHOWN:
        say(f"\n{metric} (mean over {args.seeds} seed{'s' if args.seeds > 1 else ''})")
        summary = result.summary(metric)
        short = summary.rename(columns=lambda method: method.partition(" (")[0])
        say(short.to_string(float_format="{:.2f}".format))
        for what, names in summary.attrs["left_out"].items():
            if names:
                say(f"not in the mean, {what}: {', '.join(names)}")
    for row in result.refused.itertuples():
        say(f"not asked: {row.question}: {row.reason}")
    for row in result.behind().itertuples():
        say(f"behind: {row.group}: {row.cellop:.2f} against {row.baseline:.2f} of {row.best_baseline}")
    return 0


class Shared:
    """Stands in a task for what a worker got when it began."""

    value: Any = None


class LocalWorkers:
    """Processes on this machine behind the calls of a Dask client that this package makes; no port is opened.

    What one worker holds when it dies is done again by a new one; what is done is kept.
    """

    def __init__(self, number: int) -> None:
        self._number, self._value = number, None
        self._lock, self._ending = threading.Lock(), False
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(self, *_) -> None:
        self._end()

    def scatter(self, value, broadcast: bool = True, hash: bool = False):  # noqa: A002 - a client's word
        """What the tasks that follow share: every worker gets it once."""
        self._end()
        self._value = value
        return Shared()

    def submit(self, work, *arguments, pure: bool = False) -> Future:
        """A task for the next worker that is free."""
        answer: Future = Future()
        self._start(answer, (work, *arguments), lives=3)
        return answer

    def _start(self, answer: Future, task: tuple, lives: int) -> None:
        """Hand the task to the pool, to a new one where a worker of the last one died."""
        with self._lock:
            try:
                pool = self._pool = self._pool or self._new_pool()
                future = pool.submit(_work, *task)
            except BrokenProcessPool:
                pool = self._pool = self._new_pool()
                future = pool.submit(_work, *task)

        def done(future: Future) -> None:
            if future.cancelled():
                answer.cancel()
            elif isinstance(error := future.exception(), BrokenProcessPool) and lives and not self._ending:
                self._start(answer, task, lives - 1)
            elif isinstance(error, BrokenProcessPool):
                fix = "give fewer --workers, or the machine more memory"
                answer.set_exception(
                    ModelError("workers that live until their task is done", "dead ones", fix)
                )
            elif error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(future.result())

        future.add_done_callback(done)

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._number, get_context("spawn"), _begin, (self._value,))

    def cancel(self, futures) -> None:
        """Drop tasks whose results nobody waits for, and end the workers where some are not done."""
        if not all(future.done() for future in futures):
            self._end()

    def _end(self) -> None:
        """End the workers, also one that is in the middle of a task."""
        pool, self._pool, self._ending = self._pool, None, True
        if pool is not None:
            for worker in list((pool._processes or {}).values()):
                worker.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
        self._ending = False


def _work(work, *arguments):
    """In a worker: do a task with what is shared."""
    return work(*(Shared.value if isinstance(one, Shared) else one for one in arguments))


def _begin(value) -> None:
    """In a worker: keep what tasks share, and end with the process that started it."""
    Shared.value = value
    _end_with_parent()


def _end_with_parent() -> None:
    """End this worker with the process that started it, also one that was killed and could not say so."""
    from tqdm import tqdm

    parent = parent_process()
    assert parent is not None, "started by a pool"

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # a worker that is ended would leave the lock of all processes behind
