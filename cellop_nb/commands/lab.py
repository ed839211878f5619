"""`lab`: open the notebooks in JupyterLab, on the embedded screen or on the user's own file."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from cellop_nb.commands import KEYS, add, add_data, environment, keys_told, run
from cellop_nb.commands.terminal import say, table
from cellop_nb.errors import LabelError
from cellop_nb.files import write_whole
from cellop_nb.notebook import parameters


def add_commands(commands) -> None:
    """`lab` on the command line."""
    summary = "open JupyterLab on the notebooks, for the embedded screen or yours (--data)"
    parser = add(commands, "lab", lab, summary, check=check_lab, extras=("notebook",))
    add_data(parser)
    folder = "name of the folder in runs/ for notebooks and results (default: that of the file)"
    parser.add_argument("--name", help=folder)
    words = "passed on to jupyter lab, e.g. -- --no-browser"
    parser.add_argument("jupyter", nargs="*", metavar="-- ARGUMENTS", help=words)


def check_lab(args: argparse.Namespace) -> None:
    """Refuse a file that is not there, and keys without a file."""
    options = [f"--{name.replace('_', '-')}" for name in (*KEYS, "name") if getattr(args, name)]
    if args.data is None and options:
        raise LabelError("--data beside it", options[0], "name the file: --data screen.h5ad")
    if args.data is not None:
        run.locate(args.data)
        _folder_name(args)


def _folder_name(args: argparse.Namespace) -> str:
    """The one given, or the file's with what no folder name should have as lines."""
    return run.folder_name(args.name or re.sub(r"[^\w.+-]+", "_", Path(args.data).stem))


def lab(args: argparse.Namespace) -> int:
    """Go on as JupyterLab."""
    root = run.workplace()
    folder = root / "notebooks" if args.data is None else own_notebooks(args)
    first = next(folder.glob("00_*.ipynb"), None)
    inside = folder.relative_to(root) if folder.is_relative_to(root) else Path(folder.name)
    start = f"/lab/tree/{(inside / first.name).as_posix()}" if first else "/lab"
    trust(folder)
    say(f"JupyterLab on {folder}; stop it with Ctrl-C here.")
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={root if folder.is_relative_to(root) else folder.parent}",
        f"--LabApp.default_url={start}",
    ]
    if not any(re.match(r"--(ServerApp\.)?ip\b", word) for word in args.jupyter):
        command.append("--ServerApp.ip=127.0.0.1")  # reached from this machine alone, and with a token
    return environment.become([*command, *args.jupyter], env={"JUPYTER_PREFER_ENV_PATH": "1"})


def trust(folder: Path) -> None:
    """Sign the numbered notebooks, so that JupyterLab shows their widgets and tables without a question."""
    import nbformat
    from nbformat.sign import NotebookNotary

    notary = NotebookNotary()
    for name in parameters.names():
        path = folder / f"{name}.ipynb"
        if path.is_file():
            notary.sign(nbformat.read(path, 4))
    notary.store.close()


# -- the user's own file


def own_notebooks(args: argparse.Namespace) -> Path:
    """Copies of the notebooks with the file and its keys in their `parameters` cells; shows what was guessed.

    Copies that are there are opened as they are, where they are of the same file and keys, else refused.
    """
    import cellop_nb as co

    data = run.locate(args.data)
    adata = co.datasets.load(data, backed=data.endswith((".h5ad", ".zarr")))
    told = keys_told(args)
    keys, options = guess(adata, told)
    rows = [
        [
            name,
            keys[name] or "X",
            "as told" if name in told else "guessed",
            _others(options[name], keys[name]),
        ]
        for name in KEYS
    ]
    say(table(["key", "value", "", "others there are"], rows))
    context = parameters.parameter("00_quickstart", "context_key").parse(str(keys["context_key"]))
    values = {**keys, "context_key": context, "data": data, "run_dir": ".."}
    co.setup(adata, **{name: values[name] for name in KEYS})
    target = environment.home() / "runs" / _folder_name(args) / "notebooks"
    if target.exists():
        _require_same(target, values)
    else:
        _copy(target, values)
    say("Other keys: stop, and start again with --perturbation-key, --context-key, --control or --layer.")
    return target


def guess(adata, told: dict[str, str]) -> tuple[dict[str, str | None], dict[str, list[str]]]:
    """Keys of a screen from the names of its columns, labels and layers, and what could be meant by each.

    Those that are told come first, then those that it was set up with; refused where nothing looks like a perturbation or
    a control.
    """
    from cellop_nb.data.contract import is_set_up, keys_of, likely, looks_raw, obs_labels

    keys: dict[str, str | None] = dict(told)
    if is_set_up(adata):
        kept = keys_of(adata)
        context = None if kept.context_key is None else ",".join(kept.context_key)
        own = {"perturbation_key": kept.perturbation_key, "context_key": context}
        keys = {**own, "control": kept.control, "layer": kept.layer, **keys}
    columns = {str(name): column for name, column in adata.obs.items()}
    labels = [
        n for n, c in columns.items() if c.nunique() > 1 and (c.dtype.kind not in "fiu" or c.nunique() <= 50)
    ]
    options = {"perturbation_key": labels, "layer": list(adata.layers)}
    _choose(keys, "perturbation_key", labels, "a column of perturbations")
    key = str(keys["perturbation_key"])
    options["control"] = sorted(set(obs_labels(adata, key)))
    _choose(keys, "control", options["control"], f"a label of controls in {key!r}")
    few = [n for n in labels if n != key and columns[n].nunique() < 0.2 * adata.n_obs]
    options["context_key"] = few
    keys.setdefault("context_key", next(iter(likely("context_key", few)), "none"))
    layers = [] if looks_raw(adata.X[:200]) else likely("layer", options["layer"])
    keys.setdefault("layer", next(iter(layers), None))
    return keys, options


def _choose(keys: dict, name: str, options: list[str], what: str) -> None:
    from cellop_nb.data.contract import likely

    if name in keys:
        return
    names = likely(name, options)
    if not names:
        shown = ", ".join(map(repr, options[:8])) or "none"
        fix = f"name it with --{name.replace('_', '-')}"
        raise LabelError(what, f"no usual name among {shown}", fix)
    keys[name] = names[0]


def _others(options: list[str], chosen: str | None) -> str:
    return ", ".join([option for option in options if option != chosen][:6])


def _require_same(folder: Path, values: dict) -> None:
    """Refuse copies that were made for another file or other keys: what is in them may be someone's work."""
    for path in sorted(folder.glob("*.ipynb")):
        if path.stem not in parameters.names():
            continue
        there = {p.name: p.default for p in parameters.read_cell(parameters.cell_of(path))}
        for name in ("data", *KEYS):
            if there.get(name) != values[name]:
                problem = f"{name} = {there.get(name)!r} in {path}, and {values[name]!r} now"
                fix = "choose another folder with --name, or move that one away"
                raise LabelError("notebooks of the same file and keys", problem, fix)


def _copy(target: Path, values: dict) -> None:
    """The notebooks without their outputs, which are of other data, and with these values as their defaults."""

    def write(part: Path) -> None:
        part.mkdir()
        for name in parameters.names():
            book = json.loads((environment.notebooks() / f"{name}.ipynb").read_text(encoding="utf-8"))
            for cell in book["cells"]:
                if cell["cell_type"] == "code":
                    cell |= {"outputs": [], "execution_count": None}
                if "parameters" in cell["metadata"].get("tags", []):
                    cell["source"] = parameters.parameters_cell(name, values)
            text = json.dumps(book, indent=1, ensure_ascii=False)
            (part / f"{name}.ipynb").write_text(text, encoding="utf-8")

    write_whole(target, write)
