"""Build the documentation site from the committed notebooks and the docstrings: `python -m docs.build [FOLDER]`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cellop_nb.commands import environment
from cellop_nb.commands.terminal import Status, complain, say

# heading of the reference -> rooms whose public names stand below it
ROOMS = {
    "Data": ("data",),
    "Models": ("models",),
    "Training": ("training",),
    "Predict, evaluate, diagnose": ("analysis",),
    "Notebooks": ("notebook",),
    "Errors": ("errors",),
}

RESULTS = (
    "analysis.holdout.Holdout",
    "analysis.baselines.Prediction",
    "analysis.cellop.Choice",
    "analysis.plan.Plan",
    "analysis.doses.DoseCurve",
    "training.checkpoint.Saved",
    "analysis.scores.METRICS",
)
"""What public functions give back, and the table of metrics; they have no name of their own in `co`."""

KEYWORDS = """\
## Keywords that mean the same everywhere

| keyword | default | meaning |
|---|---|---|
| `layer` | `None` | layer with the raw counts; `None`: `X` |
| `perturbation_key` | `"perturbation"` | column of `obs` with the perturbation; combinations are `A+B` |
| `context_key` | `"cell_type"` | column, or columns, of `obs` inside which controls are matched; `None`: one context |
| `control` | `"control"` | label of the unperturbed cells |
| `dose_key` | `None` | column of `obs` with the dose |
| `use_rep` | `"X_nbvae"` | key of `obsm` with the latents |
| `key_added` | | where the result is written |
| `seed` | `0` | every random choice follows from it |
| `progress` | `True` | show a progress bar |
| `ax` | | Axes to draw into; a figure of its own without |
| `show` | | show the figure at once |
| `save` | | path to write the figure to: vector or PNG |
"""


def main(*folder: str) -> int:
    """Write the generated pages and build the site into a folder; a warning is an error."""
    source = environment.ROOT / "docs"
    out = Path(*folder).resolve() if folder else source / "_build" / "html"
    with Status("building the site"):
        prepare(source)
        command = [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-j",
            "auto",
            str(source),
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=_surroundings())
    if done.returncode:
        complain(done.stderr)
        return 1
    say(f"Open {out / 'index.html'}")
    return 0


def prepare(source: Path) -> None:
    """Write what is made from elsewhere: the reference, the notebooks, the messages of the errors."""
    for name in ("api", "notebooks"):
        shutil.rmtree(source / name, ignore_errors=True)
        (source / name).mkdir()
    notebooks = environment.ROOT / "notebooks"
    for path in [*notebooks.glob("[0-9][0-9]_*.ipynb"), environment.ROOT / "benchmarks" / "benchmark.ipynb"]:
        book = without_bars(json.loads(path.read_text(encoding="utf-8")))
        (source / "notebooks" / path.name).write_text(json.dumps(book), encoding="utf-8")
    for name, text in reference().items():
        (source / "api" / f"{name}.md").write_text(text, encoding="utf-8")
    errors = [sys.executable, "-m", "tests.bad_inputs", str(source / "errors.md")]
    subprocess.run(errors, cwd=environment.ROOT, check=True, capture_output=True, env=_surroundings())


def without_bars(book: dict) -> dict:
    """A notebook without its progress bars: outside a kernel they stand at zero for ever."""
    for cell in book["cells"]:
        shown = cell.get("outputs", [])
        cell |= {"outputs": [output for output in shown if not _is_bar(output)]} if shown else {}
    return book


def _is_bar(output: dict) -> bool:
    text = "".join(output.get("data", {}).get("text/plain", ""))
    return re.search(r"\d%\|.*\|.*\[\d\d:\d\d<", text) is not None


def _surroundings() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(environment.ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def reference() -> dict[str, str]:
    """Pages of the reference: an index, and one for each room with its public names."""
    import cellop_nb

    pages, index = {}, ["# Reference", "", "All names are those of `import cellop_nb as co`.", ""]
    for title, rooms in ROOMS.items():
        page = "_".join(word for word in title.lower().replace(",", "").split())
        names = sorted(n for n, module in cellop_nb._PUBLIC.items() if module.partition(".")[0] in rooms)
        pages[page] = "\n\n".join([f"# {title}", *(_entry(name) for name in names)]) + "\n"
        index.append(f"- [{title}]({page}.md): {', '.join(f'`{name}`' for name in names)}")
    pages["results"] = "\n\n".join(["# What comes back", *map(_result, RESULTS)]) + "\n"
    index.append(f"- [What comes back](results.md): {', '.join(path.rpartition('.')[2] for path in RESULTS)}")
    toctree = "\n".join(["```{toctree}", ":hidden:", "", *pages, "```"])
    pages["index"] = "\n".join([*index, "", KEYWORDS, toctree]) + "\n"
    return pages


def _entry(name: str) -> str:
    """Directive for one public name; a module's own names follow it."""
    import inspect

    import cellop_nb

    value = getattr(cellop_nb, name)
    if inspect.ismodule(value):
        parts = [
            _directive(_kind(getattr(value, each)), f"{value.__name__}.{each}") for each in value.__all__
        ]
        about = (inspect.getdoc(value) or "").partition("\n")[0]
        return "\n\n".join([f"## {name}\n\n`co.{name}`: {about}", *parts])
    return _directive(_kind(value), f"cellop_nb.{name}", *[":members:"] * inspect.isclass(value))


def _kind(value: object) -> str:
    import inspect

    return "autoclass" if inspect.isclass(value) else "autofunction"


def _result(path: str) -> str:
    """Directive for what has its name in a module alone."""
    from importlib import import_module

    module, _, name = f"cellop_nb.{path}".rpartition(".")
    value = getattr(import_module(module), name)
    if isinstance(value, dict):
        return f"## {name}\n\n`{module}.{name}`: {', '.join(f'`{key}`' for key in value)}"
    return _directive(_kind(value), f"{module}.{name}", *[":members:"] * isinstance(value, type))


def _directive(kind: str, target: str, *options: str) -> str:
    return "\n".join(
        ["```{eval-rst}", f".. {kind}:: {target}", *(f"   {option}" for option in options), "```"]
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
