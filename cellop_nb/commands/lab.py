"""`lab`: open the notebooks in JupyterLab, on the embedded screen or on the user's own file."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from cellop_nb.commands import Command, environment, run
from cellop_nb.commands.terminal import say, table
from cellop_nb.errors import LabelError, three_beats
from cellop_nb.files import write_whole
from cellop_nb.notebook import parameters

USUAL = {
    "perturbation_key": (
        "perturbation", "condition", "treatment", "stimulation", "stim", "drug", "compound", "cytokine", "target_gene",
        "target", "gene", "guide", "knockout", "label",
    ),
    "context_key": (
        "cell_type", "celltype", "cell_line", "cell_label", "cell", "tissue", "cluster", "leiden", "louvain", "donor",
        "patient", "sample",
    ),
    "control": (
        "control", "ctrl", "untreated", "unstimulated", "unstim", "vehicle", "dmso", "pbs", "mock", "non-targeting",
        "nontargeting", "ntc", "nt", "resting", "wt",
    ),
    "layer": ("counts", "raw_counts", "raw", "umi"),
}  # fmt: skip
"""Words that columns, labels and layers usually have, the likeliest first."""


def add_lab_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lab`."""
    run.add_data(parser.add_argument_group("your data"))
    parser.add_argument(
        "--name", help="name of the folder in runs/ for notebooks and results (default: that of the file)"
    )
    parser.add_argument(
        "jupyter", nargs="*", metavar="-- ARGUMENTS", help="passed on to jupyter lab, e.g. -- --no-browser"
    )


def check_lab(args: argparse.Namespace) -> None:
    """Refuse a file that is not there, and keys without a file."""
    options = [f"--{name.replace('_', '-')}" for name in (*run.KEYS, "name") if getattr(args, name)]
    if args.data is None and options:
        raise LabelError(three_beats("--data beside it", options[0], "name the file: --data screen.h5ad"))
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
        "--ServerApp.ip=127.0.0.1",  # reached from this machine alone, and with the token that it prints
    ]
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

    Copies that are there are opened as they are, where they are of the same file and keys.

    Raises
    ------
    CellopError
        Where the file does not fit the keys, or the copies are of other ones.
    """
    import cellop_nb as co

    data = run.locate(args.data)
    adata = co.datasets.load(data, backed=data.endswith((".h5ad", ".zarr")))
    told = {name: getattr(args, name) for name in run.KEYS if getattr(args, name) is not None}
    keys, others = guess(adata, told)
    rows = [
        [name, keys[name] or "X", "as told" if name in told else "guessed", ", ".join(others[name][:6])]
        for name in run.KEYS
    ]
    say(table(["key", "value", "", "others there are"], rows))
    context = parameters.parameter("00_quickstart", "context_key").parse(str(keys["context_key"]))
    values = {**keys, "context_key": context, "data": data, "run_dir": ".."}
    co.setup(adata, **{name: values[name] for name in run.KEYS})
    target = environment.home() / "runs" / _folder_name(args) / "notebooks"
    if target.exists():
        _require_same(target, values)
    else:
        _copy(target, values)
    say("Other keys: stop, and start again with --perturbation-key, --context-key, --control or --layer.")
    return target


def guess(adata, told: dict[str, str]) -> tuple[dict[str, str | None], dict[str, list[str]]]:
    """Keys of a screen from the names of its columns, labels and layers, and what else could be meant.

    Parameters
    ----------
    adata
        The screen; keys that it was set up with come first.
    told
        Keys that are known.

    Raises
    ------
    LabelError
        Where nothing looks like a perturbation or a control.
    """
    from cellop_nb.data.contract import is_set_up, keys_of, obs_labels

    texts = [
        str(name) for name, column in adata.obs.items() if column.nunique() > 1 and not _is_number(column)
    ]
    contexts = [name for name in adata.obs if adata.obs[name].nunique() < 0.2 * adata.n_obs]
    keys: dict[str, str | None] = dict(told)
    if is_set_up(adata):
        kept = keys_of(adata)
        context = None if kept.context_key is None else ",".join(kept.context_key)
        own = {"perturbation_key": kept.perturbation_key, "context_key": context}
        keys = {**own, "control": kept.control, "layer": kept.layer, **keys}
    options = {"perturbation_key": texts, "layer": list(adata.layers)}
    _guess(keys, "perturbation_key", texts, "a column of perturbations")
    options["control"] = sorted(set(obs_labels(adata, str(keys["perturbation_key"]))))
    _guess(keys, "control", options["control"], f"a label of controls in {keys['perturbation_key']!r}")
    options["context_key"] = [n for n in map(str, contexts) if n in texts and n != keys["perturbation_key"]]
    if "context_key" not in keys:
        keys["context_key"] = next(iter(_likely(options["context_key"], USUAL["context_key"])), "none")
    if "layer" not in keys:
        whole = _whole(adata.X)
        keys["layer"] = None if whole else next(iter(_likely(options["layer"], USUAL["layer"])), None)
    others = {name: [o for o in options[name] if o != keys[name]] for name in run.KEYS}
    return keys, others


def _guess(keys: dict, name: str, options: list[str], what: str) -> None:
    if name in keys:
        return
    likely = _likely(options, USUAL[name])
    if not likely:
        shown = ", ".join(map(repr, options[:8])) or "none"
        fix = f"name it with --{name.replace('_', '-')}"
        raise LabelError(three_beats(what, f"no usual name among {shown}", fix))
    keys[name] = likely[0]


def _likely(options: list[str], usual: tuple[str, ...]) -> list[str]:
    """Options that are a usual word, or contain one; the likeliest first."""
    plain = {option: re.sub(r"[^a-z0-9]", "", option.lower()) for option in options}
    names = [re.sub(r"[^a-z0-9]", "", name) for name in usual]
    same = [option for name in names for option in options if plain[option] == name]
    within = [option for name in names for option in options if len(name) > 3 and name in plain[option]]
    return list(dict.fromkeys([*same, *within]))


def _is_number(column) -> bool:
    return column.dtype.kind in "fiu" and column.nunique() > 50


def _whole(values) -> bool:
    """Whether the first stored values are whole numbers."""
    import numpy as np

    block = values[:200]
    block = np.asarray(block.data if hasattr(block, "data") and hasattr(block, "nnz") else block)
    return bool((block == np.rint(block)).all())


def _require_same(folder: Path, values: dict) -> None:
    """Refuse copies that were made for another file or other keys: what is in them may be someone's work."""
    for path in sorted(folder.glob("*.ipynb")):
        if path.stem not in parameters.names():
            continue
        there = {p.name: p.default for p in parameters.read_cell(parameters.cell_of(path))}
        for name in ("data", *run.KEYS):
            if there.get(name) != values[name]:
                problem = f"{name} = {there.get(name)!r} in {path}, and {values[name]!r} now"
                fix = "choose another folder with --name, or move that one away"
                raise LabelError(three_beats("notebooks of the same file and keys", problem, fix))


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


LAB = Command(
    "open JupyterLab on the notebooks, for the embedded screen or yours (--data)",
    add_lab_arguments,
    lab,
    extras=("notebook",),
    check=check_lab,
)
