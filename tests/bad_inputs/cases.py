"""A bad input: a few lines that do it, and the folder in which they are done."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import cellop_nb as co
from cellop_nb.training.checkpoint import write_models


@dataclass
class Place:
    """What a case works with: an empty folder, a small screen, models made for it."""

    folder: Path
    given: dict[str, bytes] = field(default_factory=dict)

    def put(self, name: str, content: str | bytes) -> Path:
        """A file that the case itself brings along; it must still be there, unchanged, in the end."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return self.keep(path)

    def keep(self, path: Path) -> Path:
        self.given[str(path.relative_to(self.folder))] = path.read_bytes()
        return path

    def cut(self, path: Path, share: float) -> Path:
        """The file, but only its first part."""
        content = path.read_bytes()
        return self.put(str(path.relative_to(self.folder)), content[: int(share * len(content))])

    @cached_property
    def adata(self):
        return screen()

    @cached_property
    def split(self):
        co.split(self.adata)
        return self.adata

    @cached_property
    def vae(self):
        return co.new_vae(self.split, n_latent=2, n_hidden=8)

    @cached_property
    def embedded(self):
        co.embed(self.split, self.vae)
        return self.adata

    @cached_property
    def operators(self):
        return co.new_operators(self.embedded, rank=1)

    @cached_property
    def predictor(self):
        model = co.CellOp(self.adata, n_latent=2)
        brief = {"n_hidden": 8, "vae_epochs": 1, "finish_epochs": 1, "operator_epochs": 1, "n_folds": 2}
        model.recipe = replace(model.recipe, **brief)
        return model.fit(progress=False)

    @cached_property
    def saved(self) -> Path:
        return self.keep(write_models(self.folder / "model.safetensors", vae=self.vae))

    @cached_property
    def h5ad(self) -> Path:
        path = self.folder / "screen.h5ad"
        self.adata.write_h5ad(path)
        return self.keep(path)


def screen():
    """A synthetic screen of 240 cells and 40 genes; the copy is the caller's to spoil."""
    return _SCREEN.copy()


_SCREEN = co.datasets.synthetic(
    n_contexts=2, n_perturbations=2, n_cells=40, n_genes=40, n_latent=4, library=200.0
)


@dataclass(frozen=True)
class Case:
    """One thing done wrong."""

    area: str
    title: str
    do: Callable[[Place], object]
    code: int | None = None  # exit code of the command line; None: an error of the library
    found: str = ""  # the second beat, word for word; empty where it is not compared


CASES: list[Case] = []


def case(area: str, title: str, *, code: int | None = None, found: str = ""):
    """Register the decorated function as a case."""

    def register(do):
        CASES.append(Case(area, title, do, code, found))
        return do

    return register


def command(place: Place, *words: object) -> int:
    """The command line, in the case's folder; its complaint goes to standard error."""
    from cellop_nb.__main__ import main

    before = Path.cwd()
    os.chdir(place.folder)
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        os.chdir(before)


def refuses(place: Place, name: str) -> Path:
    """A path below a file, where nobody can write, not even root."""
    return place.put(name, "")


COUNTS, LABELS, SPLIT, MODELS, FILES, NOTEBOOKS, COMMANDS, SWEEPS, HOLDOUTS, MACHINE = (
    "Counts", "Labels", "Splits and hold-outs", "Models and training", "Files", "Notebook parameters",
    "Command line", "The command sweep", "The command holdout", "The machine",
)  # fmt: skip
