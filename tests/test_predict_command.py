"""`python3 -m cellop_nb predict` as typed: verdict, genes, cells, and what is refused before anything is fitted."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import anndata
import pandas as pd
import pytest

import cellop_nb as co
from cellop_nb.__main__ import main
from cellop_nb.analysis import cellop
from cellop_nb.commands.ask import LocalWorkers
from cellop_nb.errors import ModelError

from .mortal import squared_or_dead

ONE = ("--context", "type C", "--perturbation", "drug 1")
KEYS = ("--perturbation-key", "condition", "--control", "ctrl")


@pytest.fixture
def screen(tmp_path, monkeypatch):
    """Three contexts, of which the last has controls alone; the reader's own names of columns."""
    adata = co.datasets.synthetic(
        n_contexts=3, n_perturbations=2, n_cells=30, n_genes=40, library=500.0, seed=2
    )
    adata = adata[~((adata.obs["cell_type"] == "type C") & (adata.obs["perturbation"] != "control"))].copy()
    adata.obs["condition"] = adata.obs.pop("perturbation").astype(str).replace({"control": "ctrl"})
    del adata.uns["cellop_nb"]
    adata.write_h5ad(tmp_path / "screen.h5ad")
    small = replace(cellop.RECIPE, n_hidden=16, vae_epochs=2, finish_epochs=1, operator_epochs=1, n_folds=2)
    monkeypatch.setattr(cellop, "RECIPE", small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(screen, capsys):
    def call(*words, data="screen.h5ad", keys=KEYS):
        code = main(["predict", "--data", data, *keys, *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_a_question_is_answered_by_a_verdict_genes_and_cells(run, screen):
    code, out, err = run(*ONE, "--out", "cells.h5ad", "--save-model", "model", "--genes", "30")
    assert code == 0, err
    assert out.isascii() and len(out.splitlines()) <= 25
    assert "drug 1 in type C: " in out
    genes = re.findall(r"^\S+ +[+-]\d\.\d\d  ", out, re.MULTILINE)
    assert len(genes) == 10
    cells = anndata.read_h5ad(screen / "cells.h5ad")
    assert set(cells.obs["condition"]) == {"drug 1"} and cells.obs["predicted"].all()

    code, again, err = run(*ONE, "--model", "model", keys=())
    assert code == 0, err
    assert [line for line in again.splitlines() if line] == [
        line for line in out.splitlines() if line and not line.startswith(("fitted", "model:", "cells:"))
    ]


def test_a_table_of_questions_writes_all_cells(run, screen):
    table = pd.DataFrame(
        {"context": ["type C", "type A", "type C"], "perturbation": ["drug 2", "drug 1", "drug 1"]}
    )
    table.assign(n_cells=[5, 6, 7], strength=[1, 1, 0.5]).to_csv("ask.csv", index=False)
    code, out, err = run("ask.csv", "--out", "cells.h5ad", "--genes", "0")
    assert code == 0, err
    assert len(out.splitlines()) <= 25
    assert out.count("leading genes") == 3
    cells = anndata.read_h5ad(screen / "cells.h5ad")
    assert cells.obs.groupby(["cell_type", "condition"], observed=True).size().to_dict() == {
        ("type A", "drug 1"): 6, ("type C", "drug 1"): 7, ("type C", "drug 2"): 5,
    }  # fmt: skip


def test_a_table_asks_for_doses_of_a_screen_that_has_them(run, screen):
    adata = co.datasets.synthetic(
        n_contexts=2, n_perturbations=1, doses=(0.5, 1.0, 2.0), n_cells=30, n_genes=40, library=500.0, seed=2
    )
    adata.write_h5ad("dosed.h5ad")
    table = pd.DataFrame({"context": "type A", "perturbation": "drug 1", "dose": [0.7, 2.2], "n_cells": 4})
    table.to_csv("ask.csv", index=False)
    code, out, err = run("ask.csv", "--out", "cells.h5ad", "--genes", "0", data="dosed.h5ad", keys=())
    assert code == 0, err
    assert out.count("is extrapolated: 0.5 to 2 were measured") == 1
    cells = anndata.read_h5ad(screen / "cells.h5ad")
    assert cells.obs["dose"].to_numpy() == pytest.approx([0.7] * 4 + [2.2] * 4, rel=1e-3)
    code, out, err = run("ask.csv", "--out", "again.h5ad")
    assert code == 2 and "no column of doses" in err and "fitted in" not in out


def test_a_table_names_contexts_by_their_factors_and_labels_as_they_are_written(run, screen):
    adata = anndata.read_h5ad(screen / "screen.h5ad")
    adata.obs["donor"] = ["01" if k % 2 else "NA" for k in range(adata.n_obs)]
    adata.write_h5ad(screen / "factors.h5ad")
    (screen / "ask.csv").write_text(
        "cell_type,donor,perturbation,n_cells\ntype C,01,drug 1,4\ntype A,NA,drug 2,\n"
    )
    keys = (*KEYS, "--context-key", "cell_type,donor")
    code, out, err = run("ask.csv", "--out", "cells.h5ad", "--genes", "0", data="factors.h5ad", keys=keys)
    assert code == 0, err
    assert "drug 1 in type C | 01: " in out
    cells = anndata.read_h5ad(screen / "cells.h5ad")
    assert (
        cells.obs.groupby(["cell_type", "donor", "condition"], observed=True).size()["type C", "01", "drug 1"]
        == 4
    )


REFUSED = [
    ((), "one question, or a table"),
    (("--context", "type C"), "one question, or a table"),
    (("ask.csv", *ONE), "one question, or a table"),
    (("absent.csv",), "no file absent.csv"),
    (("ask.csv",), "did you mean 'drug 1'"),
    (("columns.csv",), "columns context and perturbation"),
    (("numbers.csv",), "n_cells a whole number above 0"),
    (("strength.csv",), "a strength between 0"),
    (("empty.csv",), "a table of questions as CSV"),
    (("--context", "type D", "--perturbation", "drug 1"), "did you mean 'type"),
    (("--context", "type C", "--perturbation", "drug 1+drug 7"), "'drug 7'"),
    ((*ONE, "--genes", "1"), "--genes of at least 2"),
    ((*ONE, "--out", "cells.csv"), "ends in .h5ad"),
    ((*ONE, "--out", "away/cells.h5ad"), "an existing folder for --out"),
    ((*ONE, "--out", "screen.h5ad"), "a new file for --out"),
    ((*ONE, "--save-model", "kept"), "a new file for --save-model"),
    ((*ONE, "--model", "absent"), "no file absent"),
    ((*ONE, "--model", "ask.csv", "--genes", "30"), "--genes beside --model"),
    ((*ONE, "--model", "ask.csv"), "ask.csv"),
    ((*ONE, "--control", "contrl"), "did you mean 'ctrl'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"), REFUSED, ids=[" ".join(words) or "nothing" for words, _ in REFUSED]
)
def test_what_cannot_be_answered_is_refused_before_anything_is_fitted(
    words, message, run, screen, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("something was fitted although the input was wrong")

    monkeypatch.setattr(co.CellOp, "fit", never)
    (screen / "ask.csv").write_text("context,perturbation\ntype A,drug 1\ntype C,durg 1\n")
    (screen / "columns.csv").write_text("cell,perturbation\ntype A,drug 1\n")
    (screen / "numbers.csv").write_text("context,perturbation,n_cells\ntype A,drug 1,many\n")
    (screen / "strength.csv").write_text("context,perturbation,strength\ntype A,drug 1,9\n")
    (screen / "empty.csv").write_text("")
    (screen / "kept.safetensors").write_text("")
    keys = ("--perturbation-key", "condition") if "--control" in words else KEYS
    code, _, err = run(*words, keys=keys)
    assert code == 2, err
    assert message in err
    assert all(beat in err for beat in ("Expected ", "Found ", "To fix it: "))


def test_a_worker_that_dies_loses_nothing_that_is_done(tmp_path):
    with LocalWorkers(1) as workers:
        numbers = workers.scatter([1, 2, 3, 4])
        futures = [workers.submit(squared_or_dead, numbers, k, tmp_path) for k in (0, 1, 2, 3)]
        assert [future.result(timeout=300) for future in futures] == [1, 4, 9, 16]
        assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "d"]
        with pytest.raises(ModelError, match="dead ones"):
            workers.submit(os._exit, 1).result(timeout=300)
