"""The front page is true: its commands are accepted, its code runs, and the Chinese version keeps step."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import cellop_nb
from benchmarks import peers
from cellop_nb.__main__ import build_parser
from cellop_nb.analysis import cellop

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
BOTH = pytest.mark.parametrize("page", [ENGLISH, CHINESE], ids=lambda page: page.name)
ELSEWHERE = {
    'python3 -m pip install ".[notebook]"',
    "cd mine",
}  # not ours; tests/test_installed.py does what they stand for


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(page: Path) -> list[list[str]]:
    """Words of each command line of ours."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    words = [shlex.split(line, comments=True) for line in lines if line not in ELSEWHERE]
    for each in words:
        assert each[0] == "cellop" or each[:3] == ["python3", "-m", "cellop_nb"], each
    return [each[1:] if each[0] == "cellop" else each[3:] for each in words]


@pytest.fixture
def quick(monkeypatch):
    """Two epochs a fit: the lines are the reader's, their patience is not a test's."""
    fit = cellop_nb.VAETrainer.fit
    monkeypatch.setattr(cellop, "RECIPE", replace(cellop.RECIPE, n_hidden=16, n_folds=2))
    monkeypatch.setattr("cellop_nb.training.loop.Trainer.fit", lambda self: fit(self, 2))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The reader's files: one with counts in raw, one whose CD14 monocytes are controls alone."""
    adata = cellop_nb.datasets.synthetic(n_contexts=3, n_perturbations=2, n_cells=30, n_genes=40)
    adata.obs["condition"] = adata.obs.pop("perturbation").astype(str)
    adata.obs["condition"] = adata.obs["condition"].replace({"control": "ctrl", "drug 1": "IFNb"})
    del adata.uns["cellop_nb"]
    screen = adata.copy()
    screen.obs["cell_type"] = screen.obs["cell_type"].astype(str).replace({"type C": "CD14 Mono"})
    screen = screen[(screen.obs["cell_type"] != "CD14 Mono") | (screen.obs["condition"] == "ctrl")]
    screen.write_h5ad(tmp_path / "screen.h5ad")
    adata.obs["celltype"] = adata.obs.pop("cell_type")
    adata.raw = adata.copy()
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / "mine.h5ad")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@BOTH
def test_every_line_of_python_runs(page, quick, mine, capsys):
    names: dict = {}
    code = blocks(page, "python")
    assert len(code) >= 2
    for block in code:
        exec(compile(block, page.name, "exec"), names)
    assert set(names["cells"].obs["condition"]) == {"IFNb"}
    assert set(names["cells"].obs["cell_type"]) == {"CD14 Mono"}
    assert (mine / "kang.safetensors").is_file()
    assert set(names["table"]["perturbation"]) == {"ctrl", "IFNb", "drug 2"}
    assert len(names["result"].summary()) == 5
    again = cellop_nb.CellOp(cellop_nb.datasets.load(mine / "screen.h5ad"))
    assert again.keys.context_key == ("celltype",)


def test_the_ten_lines_are_ten():
    code = [line for line in blocks(ENGLISH, "python")[0].splitlines() if line.strip()]
    assert len(code) == 10


@BOTH
def test_every_command_is_accepted(page, mine):
    given = commands(page)
    assert len(given) >= 4
    for words in given:
        args = build_parser().parse_args(words)
        args.check(args)


def rows(page: Path, heading: int) -> list[list[str]]:
    """Cells of the first table under a heading, counted from 0."""
    section = re.split(r"^## .*\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[heading + 1]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


@BOTH
def test_the_table_lists_every_notebook(page):
    listed = [row[0] for row in rows(page, 4)]
    assert listed == sorted(listed)
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(listed)


def test_the_questions_are_those_of_the_notebooks():
    for name, question in rows(ENGLISH, 4):
        title = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4).cells[0].source.splitlines()[0]
        assert title == f"# {question}"


@BOTH
def test_what_the_page_points_to_is_there(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"`((?:docs|data)/[\w./]+)`", text)
    assert "docs/images/held_out.png" in targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def outline(page: Path) -> list[str]:
    """Levels of headings, code blocks, table sizes and pictures, in their order."""
    text, parts = page.read_text(encoding="utf-8"), []
    pattern = r"^```(\w+)\n(.*?)^```|^(#+) |^((?:\|[^\n]*\n)+)|^!\[[^\]\n]*\]\(([^)\n]*)\)|^- "
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        code, level, table, picture = match[2], match[3], match[4], match[5]
        names = re.findall(r"`[^`]+`", table or "")
        parts.append(
            code or level or picture or (f"table {len(table.splitlines())} {names}" if table else "item")
        )
    return parts


def test_the_chinese_version_keeps_step():
    """The same headings, code, tables, pictures and lists in the same order."""
    assert outline(ENGLISH) == outline(CHINESE)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_table_of_held_out_types_is_that_of_its_file(page, root):
    table = pd.read_csv(root / "docs" / "kang_types.csv")
    energy = table.pivot_table(index="context", columns="method", values="energy")
    pearson = table[table["method"] == "CellOp"].groupby("context")["pearson"].mean()
    methods = ["no change", "mean shift", "near mean shift", "linear", "CellOp"]
    text = (root / page).read_text(encoding="utf-8")
    for context in energy.index:
        cells = [*(f"{energy.loc[context, name]:.2f}" for name in methods), f"{pearson[context]:.2f}"]
        assert f"| {' | '.join([context, *cells])} |" in text
    means = [*(f"{energy[name].mean():.2f}" for name in methods), f"{pearson.mean():.2f}"]
    assert f"| {' | '.join(means)} |" in text


@BOTH
def test_the_table_of_peers_is_that_of_its_file(page):
    table = pd.read_csv(peers.TABLE)
    text = page.read_text(encoding="utf-8")
    assert "\n".join(peers.page(table).splitlines()[1:]) in text, "all but the headings, which are translated"
    assert table["date"].max() in text and "docs/images/peers.png" in text
