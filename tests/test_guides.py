"""Every guide's code runs, page by page, as a reader would paste it."""

from __future__ import annotations

import inspect
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import cellop_nb
from cellop_nb.__main__ import build_parser
from cellop_nb.analysis import cellop
from cellop_nb.models.operators import Condition
from cellop_nb.training.checkpoint import read_models

from . import foreign

GUIDES = sorted((Path(__file__).resolve().parents[1] / "docs" / "guides").glob("*.md"))


@pytest.fixture
def quick(monkeypatch):
    """Two epochs a fit, of two steps, and two folds: what to call matters, not how good it gets."""
    fit, steps = cellop_nb.VAETrainer.fit, inspect.unwrap(cellop_nb.OperatorTrainer.__init__).__kwdefaults__
    monkeypatch.setattr(cellop, "RECIPE", replace(cellop.RECIPE, n_hidden=16, n_folds=2))
    monkeypatch.setattr("cellop_nb.training.loop.Trainer.fit", lambda self, *_, **__: fit(self, 2))
    monkeypatch.setitem(steps, "steps_per_epoch", 2)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file as people have them: other column names, log-normalised values in X, counts in raw."""
    adata = cellop_nb.datasets.synthetic(n_contexts=3, n_perturbations=2, n_cells=40, n_genes=40)
    adata.obs["condition"] = adata.obs.pop("perturbation").astype(str).replace({"control": "ctrl"})
    adata.obs["celltype"] = adata.obs.pop("cell_type")
    adata.raw = adata.copy()
    adata.X = adata.X.log1p()
    del adata.uns["cellop_nb"]
    adata.write_h5ad(tmp_path / "mine.h5ad")
    foreign.write(tmp_path)
    monkeypatch.chdir(tmp_path)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def run(page: Path) -> dict:
    names: dict = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


@pytest.mark.parametrize(
    "page", [page for page in GUIDES if page.stem != "extend"], ids=lambda page: page.stem
)
def test_a_guide_runs(page, quick, mine, capsys):
    run(page)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_commands_of_a_guide_are_accepted(page, quick, mine):
    for line in "".join(blocks(page, "bash")).splitlines():
        args = build_parser().parse_args(shlex.split(line)[3:])
        args.check(args)


def test_the_worked_examples_do_what_they_say(quick, mine, capsys):
    import torch

    names = run(next(page for page in GUIDES if page.stem == "extend"))
    form, again = names["Stretch"], names["again"]
    assert type(again) is form
    condition = Condition(("drug 1",), "type A")
    matrix = again.operator(condition).matrix
    torch.testing.assert_close(matrix, names["operators"].operator(condition).matrix)
    assert torch.equal(matrix, matrix.diag().diag())
    assert not torch.equal(matrix, torch.eye(6))
    torch.testing.assert_close(again.operator(Condition((), "type A")).matrix, torch.eye(6))
    moved = names["operators"]
    design = moved.conditions.design([condition])
    audit = cellop_nb.diagnose.gradient_audit(
        moved, lambda: sum(part.square().sum() for part in moved.affine(design))
    )
    assert audit.set_index("parameter").loc["axis_stretch", "status"] == "ok"
    assert (names["history"]["train_means"] > 0).all()
    assert set(names["history"]["means"]) == {0.5}
    assert "median shift" in names["result"].summary().columns
    assert isinstance(names["StopAtFloor"](), cellop_nb.callbacks.Callback)
    with pytest.raises(cellop_nb.errors.CheckpointError, match="pass form=Stretch"):
        read_models("stretch.safetensors")
