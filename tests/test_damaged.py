"""A damaged file of any kind is refused with its path and a way out, whatever the damage: cuts, flips, other types."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import cellop_nb as co
from cellop_nb.analysis import genes
from cellop_nb.commands import ask, run
from cellop_nb.data.contract import Keys
from cellop_nb.errors import CellopError
from cellop_nb.notebook import parameters, runs, sweep
from cellop_nb.training.checkpoint import read_models, write_models


def screen():
    return co.datasets.synthetic(
        n_contexts=2, n_perturbations=1, n_cells=20, n_genes=20, n_latent=4, library=300.0
    )


def read_screen(path, **how):
    adata = co.datasets.load(path, **how)
    co.setup(adata, perturbation_key="perturbation", context_key="cell_type", control="control")
    return adata


def trainer():
    adata = screen()
    co.split(adata)
    return co.VAETrainer(adata, co.new_vae(adata, n_latent=2, n_hidden=4), progress=False)


def predictor():
    model = co.CellOp(screen(), n_latent=2)
    brief = {"n_hidden": 8, "vae_epochs": 1, "finish_epochs": 1, "operator_epochs": 1, "n_folds": 2}
    model.recipe = replace(model.recipe, **brief)
    return model.fit(progress=False)


def write_json(content):
    return lambda path: path.write_text(json.dumps(content))


RESULT = {"status": "done", "error": "", "seconds": 1.0, "values": {"seed": 0}, "metrics": {"loss": 1.0}}
CELL = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["n: int = 1  # how many"]}
NOTEBOOK = {"cells": [CELL], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
TABLE = "context,perturbation,n_cells\ntype A,drug 1,20\ntype B,drug 1,5\n"
VAE = co.NBVAE(["a", "b"], n_latent=2, n_hidden=4)

FILES = {
    "model.safetensors": (lambda path: write_models(path, VAE), read_models),
    "predictor.safetensors": (lambda path: predictor().save(path), co.load),
    "last.pt": (lambda path: trainer().save_checkpoint(path), lambda path: trainer().load_checkpoint(path)),
    "screen.h5ad": (lambda path: screen().write_h5ad(path), read_screen),
    "backed.h5ad": (lambda path: screen().write_h5ad(path), lambda path: read_screen(path, backed=True)),
    "screen.zarr": (lambda path: screen().write_zarr(path), read_screen),
    "backed.zarr": (lambda path: screen().write_zarr(path), lambda path: read_screen(path, backed=True)),
    "metrics.json": (write_json({"loss": 1.0}), lambda path: runs.read_metrics(path.parent.parent, path.parent.name)),
    "result.json": (write_json(RESULT), lambda path: sweep.result_of(path.parent)),
    "book.ipynb": (write_json(NOTEBOOK), lambda path: parameters.for_notebook(str(path))),
    "conditions.csv": (
        lambda path: path.write_text(TABLE),
        lambda path: ask.read_questions(argparse.Namespace(conditions=path), Keys()),
    ),
    "values.yaml": (lambda path: path.write_text("seed: 1\nlr: 0.1\n"), lambda path: run._from_file(str(path))),
    "sets.gmt": (lambda path: path.write_text("A\tfirst\tG1\tG2\nB\tsecond\tG3\n"), genes.gene_set_members),
}  # fmt: skip
SCREENS = {"screen.h5ad", "backed.h5ad", "screen.zarr", "backed.zarr"}
EXACT = {"model.safetensors", "predictor.safetensors", "last.pt"}
"""Files with a digest: any change of their bytes is noticed."""


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def flip(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def hole(content: bytes, chance: random.Random) -> bytes:
    place, length = chance.randrange(len(content)), chance.randrange(1, 200)
    return content[:place] + bytes(len(content[place : place + length])) + content[place + length :]


def other(content: bytes, chance: random.Random) -> bytes:
    """Something else in its place: no bytes, another type, lists in lists without end."""
    return chance.choice([
        b"", b"null", b"3", b"[]", b"{}", b'"text"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe\x00", b"\x00" * 64,
        b'{"cells": 3}', b'{"cells": [3]}', b'{"cells": [{"metadata": []}]}', b'{"status": "done", "metrics": []}',
        b"context\n", b"context,perturbation\n", b"context,perturbation,n_cells\na,b,many\n", b"a: [1\n",
        b"context,perturbation,strength\na,b,c\n", b"x\ty\n",
    ])  # fmt: skip


def swap(content: bytes, chance: random.Random) -> bytes:
    """A value of JSON of another type, or a name that is not there."""
    try:
        told = json.loads(content)
    except ValueError:
        told = None
    if not isinstance(told, dict) or not told:
        return other(content, chance)
    key = chance.choice(sorted(told))
    told[key] = chance.choice([None, 3, "text", [], {}, [[]], {"a": None}])
    if chance.random() < 0.3:
        del told[key]
    return json.dumps(told).encode()


DAMAGES = [cut, flip, hole, other, swap]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each file as it was written."""
    folder = tmp_path_factory.mktemp("whole")
    for name, (write, read) in FILES.items():
        write(folder / name)
        read(folder / name) if name not in ("metrics.json", "result.json") else None
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore")
def test_damage_is_refused_with_the_path_and_a_way_out(whole, tmp_path, name, damage):
    """What cannot be noticed may be read; nothing else than one of our errors may come of the rest."""
    path = tmp_path / "02_book" / name
    n_refused = 0
    for seed in range(12):
        chance = random.Random(f"{name} {damage.__name__} {seed}")
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        if (whole / name).is_dir():
            shutil.copytree(whole / name, path)
            parts = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
            used = [part for part in parts if part.parts[0] in {"X", "obs", ".zmetadata", "zarr.json"}]
            used = [
                part for part in used if part.name not in {".zarray", ".zattrs", ".zgroup"}
            ]  # of no use any more
            victim = path / chance.choice(sorted(used))
        else:
            victim = Path(shutil.copy(whole / name, path))
        before = victim.read_bytes()
        victim.write_bytes(damage(before, chance))
        if victim.read_bytes() == before:
            continue
        try:
            FILES[name][1](path)
        except CellopError as refusal:
            said = str(refusal)
            n_refused += 1
            of_the_gate = name in SCREENS and "readable" not in said  # it reads, and is no screen any more
            assert of_the_gate or str(path) in said, f"seed {seed}: no path in {said!r}"
            assert "Expected " in said and "Found " in said and "To fix it: " in said
        else:
            assert name not in EXACT, f"seed {seed}: read as if it were whole"
    assert n_refused or damage in (flip, hole, swap) or name == "result.json", "no damage was noticed"
