"""`run`, `notebooks`, `params`: execute the numbered notebooks, copy them, show what can be set."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cellop_nb.commands import KEYS, add, add_data, environment, keys_told
from cellop_nb.commands.terminal import Status, Stopped, clock, complain, say, table
from cellop_nb.errors import DataError, LabelError, StorageError, counted, did_you_mean
from cellop_nb.files import storing, sweep, write_whole
from cellop_nb.notebook import parameters, runs
from cellop_nb.notebook.report import link_notebooks

RECORD = "run.json"
_ALONE = ("00_quickstart", "06_predict")  # they make all they need themselves


def add_commands(commands) -> None:
    """`run`, `notebooks` and `params` on the command line."""
    summary = "run the numbered notebooks, on the embedded data or on yours"
    parser = add(commands, "run", run, summary, check=check_run, extras=("notebook",))
    add_data(parser)
    what = parser.add_argument_group("what runs")
    what.add_argument("--only", metavar="00,02", help="these notebooks alone, by number or name")
    add_values(what)
    add_place(parser, "the project's runs/")

    summary = "copy the numbered notebooks and the example data into a folder of your own"
    parser = add(commands, "notebooks", notebooks, summary, check=check_notebooks, extras=None)
    content = "folder to make; notebooks/ and data/ go there"
    parser.add_argument("folder", metavar="DIR", type=Path, help=content)

    summary = "show the parameters of a notebook: name, type, default, range, meaning"
    parser = add(commands, "params", params, summary, extras=None)
    name = "name or number (02_train_vae, 02), or the path of an .ipynb file"
    parser.add_argument("notebook", nargs="?", help=name)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--yaml", action="store_true", help="as a file for `run -f`, to edit")
    form.add_argument("--cell", action="store_true", help="as the text of the notebook's parameters cell")


def add_values(group) -> None:
    """Options that set parameters."""
    group.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="values",
        help="a notebook parameter, in every notebook that has it; 02.NAME in one (see `params`)",
    )  # fmt: skip
    content = "parameters from a file (`params --yaml` prints one)"
    group.add_argument("-f", metavar="FILE.yaml", dest="file", help=content)


def add_place(parser: argparse.ArgumentParser, runs: str) -> None:
    """Options that say where results go, and where notebooks come from."""
    where = parser.add_argument_group("where")
    where.add_argument("--name", help="name of the folder of the results (default: the time or the notebook)")
    where.add_argument("--runs", metavar="FOLDER", help=f"parent of these folders (default: {runs})")
    where.add_argument("--notebooks", metavar="FOLDER", help="other numbered notebooks than the project's")


def check_run(args: argparse.Namespace) -> None:
    """Refuse what can be refused before the environment exists."""
    selected = select(args)
    settings(args, selected)
    folder(args)


def run(args: argparse.Namespace) -> int:
    """Run the selected notebooks; 0 when all ran to their end, 1 when one failed."""
    selected = select(args)
    values = settings(args, selected, with_file=True)
    check_data(values)
    target = claim(args)
    books = f"{counted(len(selected), 'notebook')} of {selected[0].parent}"
    say(f"Running {books} into {target}")
    start = time.monotonic()
    outcomes: list[runs.Outcome] = []
    state = "failed"
    try:
        _execute(selected, target, values, outcomes)
        state = "failed" if any(outcome.error for outcome in outcomes) else "done"
    except Stopped as stop:
        state = f"stopped by {stop.signal}"
        raise
    finally:
        is_recorded = _record(target, values, outcomes, state)
    _close(outcomes, selected, time.monotonic() - start)
    return 0 if state == "done" and is_recorded else 1


def select(args: argparse.Namespace) -> list[Path]:
    """Notebooks to run, in order."""
    notebooks = numbered(args.notebooks)
    if args.only is None:
        return notebooks
    chosen = {choose(word.strip(), notebooks, "notebooks after --only") for word in args.only.split(",")}
    return [path for path in notebooks if path in chosen]


def numbered(folder: str | None) -> list[Path]:
    """The numbered notebooks of a folder, by default the project's."""
    parent = Path(folder).resolve() if folder else environment.notebooks()
    notebooks = sorted(parent.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        fix = "give --notebooks a folder that has some"
        raise DataError("numbered notebooks such as 00_quickstart.ipynb", f"none in {parent}", fix)
    return notebooks


def choose(word: str, notebooks: list[Path], what: str) -> Path:
    """The notebook of that number or name."""
    for path in notebooks:
        if word.removesuffix(".ipynb") in (path.stem, path.stem.partition("_")[0]):
            return path
    fix = did_you_mean(word, [path.stem for path in notebooks])
    raise LabelError(f"numbers or names of {what}", repr(word), fix)


def settings(
    args: argparse.Namespace, selected: list[Path], *, with_file: bool = False
) -> dict[str, dict[str, Any]]:
    """Typed values for each notebook: those of the file, then `-p`, then the named options."""
    content = _from_file(args.file) if with_file and args.file else {}
    told = [("data", args.data)] if args.data is not None else []
    typed_in = [(name, value, True) for name, value in [*args.values, *told, *keys_told(args).items()]]
    names = [name for name, _, _ in typed_in]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LabelError("each parameter once", f"{twice[0]!r} twice", "leave one of them out")
    values: dict[str, dict[str, Any]] = {path.stem: {} for path in selected}
    for name, value, text in [(name, value, False) for name, value in content.items()] + typed_in:
        plain = name.rpartition(".")[2]
        if plain == "run_dir":
            fix = "use --runs and --name"
            raise LabelError("a parameter that is free", "'run_dir', set by the run", fix)
        for stem, typed in parameters.assign(selected, name, value, text=text).items():
            values[stem][plain] = locate(typed) if plain == "data" else typed
    return values


def _from_file(name: str) -> dict[str, Any]:
    import yaml

    path = Path(name)
    if not path.is_file():
        fix = "`python3 -m cellop_nb params NOTEBOOK --yaml` prints one"
        raise DataError("a YAML file after -f", f"no file {path}", fix)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError("a YAML file of `name: value`", reason, f"repair {path}") from error
    if not isinstance(content, dict):
        kind = f"a {type(content).__name__} in {path}"
        raise DataError("lines of `name: value`", kind, "see `params NOTEBOOK --yaml`")
    return {str(key): value for key, value in content.items()}


def folder(args: argparse.Namespace) -> Path:
    """Run folder; one that has results is used again only for chosen notebooks."""
    parent = Path(args.runs).resolve() if args.runs else environment.home() / "runs"
    target = parent / folder_name(args.name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    if args.name and args.only is None and target.exists() and any(target.iterdir()):
        raise _taken(target)
    return target


def _taken(target: Path) -> DataError:
    fix = "give another --name, or choose the notebooks to run again in it with --only"
    return DataError("a new run folder", f"results in {target}", fix)


def claim(args: argparse.Namespace) -> Path:
    """Make the run folder and its `run.json`; of two runs that begin together each has a folder of its own."""
    first = target = folder(args)
    for k in itertools.count(2):
        with storing(target):
            target.mkdir(parents=True, exist_ok=True)
            try:
                (target / RECORD).open("x").close()
                break
            except FileExistsError:
                if args.name and args.only is not None:
                    break
        if args.name:
            raise _taken(target)
        target = first.with_name(f"{first.name}_{k}")
    runs.write_json(target / RECORD, {"state": "running"})
    return target


def folder_name(name: str) -> str:
    """A plain name; refuses one that would lead elsewhere."""
    if not re.fullmatch(r"[\w.+-]{1,200}", name) or set(name) == {"."}:
        fix = "use at most 200 letters, digits, - and _; --runs sets the parent folder"
        raise LabelError("a folder name after --name", repr(name), fix)
    return name


def _execute(
    selected: list[Path], target: Path, values: dict[str, dict[str, Any]], outcomes: list[runs.Outcome]
) -> None:
    """Run two lanes side by side: notebooks that read what others wrote, in their order, and the rest.

    `outcomes` has, in the order of the notebooks, what there is at the end, or when a signal ends it.
    """
    lanes = [[p for p in selected if (p.stem in _ALONE) is alone] for alone in (False, True)]
    lanes = [lane for lane in lanes if lane]
    stages: dict[str, str] = {}

    def show(notebook: str, cell: int, of: int) -> None:
        stages[notebook] = f"{notebook} {cell}/{of}"
        status.update(", ".join(list(stages.values())))

    def run_lane(lane: list[Path], stopped: threading.Event) -> None:
        """Add outcomes up to the first failure: later notebooks of a lane read what earlier ones wrote."""
        for path in lane:
            outcome = runs.execute(path, target, values[path.stem], on_cell=partial(show, path.stem))
            if outcome.error and stopped.is_set():  # its kernel was ended
                outcome = replace(outcome, error="stopped", cell=None)
            outcomes.append(outcome)
            stages.pop(path.stem, None)
            say(f"  {path.stem}  {clock(outcome.seconds)}  {_headline(outcome)}")
            if outcome.error or stopped.is_set():
                break

    try:
        with Status("  running") as status, runs.lanes(len(lanes)) as (pool, stopped):
            for future in [pool.submit(run_lane, lane, stopped) for lane in lanes]:
                future.result()
    except Stopped:
        for folder in [target, *filter(Path.is_dir, target.rglob("*"))]:
            sweep(folder)
        raise
    finally:
        outcomes.sort(key=lambda outcome: outcome.notebook)


def _record(
    target: Path, values: dict[str, dict[str, Any]], outcomes: list[runs.Outcome], state: str
) -> bool:
    """Write `run.json`: what ran, with which values and versions; where the disk is full, to standard error."""
    from importlib.metadata import version

    packages = ("torch", "anndata", "scanpy", "numpy", "papermill")
    content = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "state": state,
        "notebooks": {
            outcome.notebook: {
                "seconds": round(outcome.seconds, 2),
                "error": outcome.error,
                "parameters": values[outcome.notebook],
            }
            for outcome in outcomes
        },
    }
    try:
        runs.write_json(target / RECORD, content)
    except StorageError as refusal:
        complain(f"{refusal}\nWhat it was to hold:\n{json.dumps(content, indent=2, default=str)}")
        return False
    return True


def _close(outcomes: list[runs.Outcome], selected: list[Path], seconds: float) -> None:
    """Say where the report is, and what failed."""
    ran = {outcome.notebook for outcome in outcomes}
    if left_out := [path.stem for path in selected if path.stem not in ran]:
        say(f"  not run: {', '.join(left_out)}")
    report = outcomes[0].folder / "report.html"
    if report.is_file():
        link_notebooks(report)
    what = report if report.is_file() else f"notebooks, figures, tables and models in {outcomes[0].folder}"
    say(f"{clock(seconds)} in all. {'Report: ' * report.is_file()}{what}")
    for outcome in outcomes:
        if outcome.error:
            where = f"cell In [{outcome.cell}]" if outcome.cell else "the kernel"
            complain(f"\n{outcome.notebook} failed in {where}: {outcome.error}\nSee {outcome.output}")


def _headline(outcome: runs.Outcome) -> str:
    """The first three numbers of `metrics.json`."""
    if outcome.error:
        return "FAILED"
    numbers = [(name, value) for name, value in outcome.metrics.items() if type(value) in (int, float)]
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers[:3])


def locate(data: str) -> str:
    """The absolute path where `data` is one: kernels work in the run folder, the caller elsewhere."""
    path = Path(data).expanduser()
    if path.exists():
        return str(path.resolve())
    if path.suffix in {".h5ad", ".h5", ".zarr"} or os.sep in data:
        near = [other.name for other in path.parent.glob("*") if other.suffix in {".h5ad", ".zarr"}]
        fix = did_you_mean(path.name, near) if near else "a relative path starts in the current folder"
        raise DataError("an AnnData file", f"no file {path}", fix)
    return data


def check_data(values: dict[str, dict[str, Any]]) -> None:
    """Look at the user's file before the first kernel starts: a wrong key shows now, not a minute later."""
    own = next((v for v in values.values() if Path(v.get("data", "")).suffix in (".h5ad", ".zarr")), None)
    if own is None:
        return
    import cellop_nb

    adata = cellop_nb.datasets.load(own["data"], backed=True)
    try:
        cellop_nb.setup(adata, **{key: own[key] for key in KEYS if key in own})
    except DataError as refusal:
        raise DataError(f"{refusal}{_counts_in_raw(Path(own['data']))}") from None


def _counts_in_raw(path: Path) -> str:
    """The command that takes the counts from the raw slot, which no option reaches, where they lie there."""
    import h5py

    from cellop_nb.data.contract import looks_raw

    if path.is_dir():  # a zarr
        return ""
    with h5py.File(path) as file:
        slot = file.get("raw/X")
        if slot is None or not looks_raw((slot["data"] if isinstance(slot, h5py.Group) else slot)[:1000]):
            return ""
    new = path.with_name(f"{path.stem}_counts.h5ad")
    lines = f"import anndata; anndata.read_h5ad({str(path)!r}).raw.to_adata().write_h5ad({str(new)!r})"
    quoted = shlex.quote(lines) if set(lines) & set('"$`\\!') else f'"{lines}"'  # the latter reads better
    command = f"{shlex.quote(sys.executable)} -c {quoted}"
    return (
        f" The raw slot has whole numbers; this writes them to a file of their own, for --data: `{command}`."
    )


def workplace() -> Path:
    """The folder with notebooks to open; people change notebooks, so an installed package's are copied out."""
    home = environment.home()
    if environment.notebooks() != environment.NOTEBOOKS or environment.IS_CHECKOUT:
        return home
    target = home / "cellop_notebooks"
    if not target.exists():
        copy_notebooks(target)
    return target


def check_notebooks(args: argparse.Namespace) -> None:
    """Refuse a folder that already has notebooks or data: nobody's work is overwritten."""
    for name in ("notebooks", "data"):
        if (args.folder / name).exists():
            fix = "name another folder, or move that one away"
            raise DataError("a folder without notebooks", f"{args.folder / name}", fix)


def notebooks(args: argparse.Namespace) -> int:
    """Copy, and say what to do next."""
    copy_notebooks(args.folder)
    say(f"Notebooks and example data are in {args.folder.resolve()}")
    say(f"Next:  cd {shlex.quote(str(args.folder))} && python3 -m cellop_nb lab     (or: run)")
    return 0


def copy_notebooks(folder: Path) -> None:
    """Copy both folders whole: each under another name first, then renamed."""
    for name in ("notebooks", "data"):
        unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        write_whole(folder / name, partial(shutil.copytree, environment.SHARE / name, ignore=unwanted))


def params(args: argparse.Namespace) -> int:
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
        notebook_parameters = parameters.for_notebook(args.notebook)
        rows = [[p.name, p.type, repr(p.default), p.limits, p.help] for p in notebook_parameters]
        say(table(["parameter", "type", "default", "range", "meaning"], rows))
        example = next((p for p in notebook_parameters if p.limits), notebook_parameters[0])
        where = Path(args.notebook).stem
        say(f"\nChange one:  python3 -m cellop_nb run --only {where} -p {example.name} {example.default}")
    return 0
