"""The committed notebooks as documents: executed in order, complete, short, in step with the parameters.

That their results still hold is nbval's part: the test command runs every notebook again beside these tests.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest

from cellop_nb.notebook import parameters

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
BENCHMARK = FOLDER.parent / "benchmarks" / "benchmark.ipynb"
numbered = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
every_notebook = pytest.mark.parametrize("path", [*PATHS, BENCHMARK], ids=lambda path: path.stem)
MAX_CELLS, MAX_LINES, MAX_BYTES, MAX_FUNCTION = 28, 12, 1_000_000, 10
MAX_WORDS, MAX_CODE = 500, 100
IMPORTS = {"cellop_nb", "matplotlib", "matplotlib.pyplot", "numpy", "pandas", "scanpy"}


def complaints(path: Path) -> list[str]:
    """Everything that a committed notebook must not be."""
    book = nbformat.read(path, 4)
    code = [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]
    problems = [f"{len(book.cells)} cells, more than {MAX_CELLS}"] * (len(book.cells) > MAX_CELLS)
    problems += [f"{path.stat().st_size} bytes, more than {MAX_BYTES}"] * (path.stat().st_size > MAX_BYTES)
    problems += ["widget state is stored"] * ("widgets" in book.metadata)
    counts = [cell.execution_count for cell in code]
    if counts != list(range(1, len(code) + 1)):
        problems.append(f"not executed from top to bottom in a fresh kernel: {counts}")
    if not any(cell.outputs for cell in code):
        problems.append("no outputs: nbval would compare nothing")
    if any(output.output_type == "error" for cell in code for output in cell.outputs):
        problems.append("an error among the outputs")
    if any(output.get("name") == "stderr" for cell in code for output in cell.outputs):
        problems.append("text on stderr (warnings, progress bars)")
    problems += ["a picture without words for those who cannot see it"] * any(map(wordless, code))
    if not code or "parameters" not in code[0].metadata.get("tags", []):
        problems.append("the first code cell is not tagged 'parameters'")
    # the parameters cell is as long as the notebook has parameters; its text is compared below
    problems += [f"a cell of {n} lines: {start}" for n, start in long_cells(book.cells[:], code[:1])]
    return problems + [f"a function of {n} lines: {name}" for n, name in long_functions(code)]


def wordless(cell) -> bool:
    pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
    return any(not output.metadata.get("image/png", {}).get("alt") for output in pictures)


def long_cells(cells, exempt):
    lines = [
        (cell.source.splitlines(), cell) for cell in cells if cell.cell_type == "code" and cell not in exempt
    ]
    return [(len(text), text[0]) for text, _ in lines if len(text) > MAX_LINES]


def long_functions(code):
    for cell in code:
        for node in ast.walk(tree_of(cell)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION:
                    yield length, node.name


@every_notebook
def test_a_committed_notebook_is_complete_and_short(path):
    assert complaints(path) == []


@numbered
def test_the_parameters_cell_is_the_typed_one(path):
    fix = f"python3 -m cellop_nb params {path.stem} --cell prints the cell's text"
    assert parameters.cell_of(path).strip() == parameters.parameters_cell(path.stem), fix


@every_notebook
def test_a_notebook_opens_with_a_question_and_can_fail(path):
    book = nbformat.read(path, 4)
    title = book.cells[0].source.splitlines()[0]
    assert title.startswith("# ")
    assert title.rstrip().endswith("?")
    tags = [tag for cell in book.cells for tag in cell.metadata.get("tags", [])]
    assert "nbval-check-output" in tags, "no check cell, whose output nbval compares"


def code_of(book) -> list:
    return [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]


def tree_of(cell) -> ast.Module:
    """The cell as Python; magics are none."""
    source = re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", cell.source)
    return compile(source, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@numbered
def test_a_cell_can_be_copied_into_another_notebook(path):
    """Public names alone: `import cellop_nb as co` and what everybody has."""
    for cell in code_of(nbformat.read(path, 4)):
        for node in ast.walk(tree_of(cell)):
            assert not isinstance(node, ast.ImportFrom), ast.unparse(node)
            for name in node.names if isinstance(node, ast.Import) else []:
                assert name.name in IMPORTS, name.name
                assert name.name != "cellop_nb" or name.asname == "co"
            private = isinstance(node, ast.Attribute) and node.attr.startswith("_")
            assert not private, ast.unparse(node)


@numbered
def test_a_notebook_is_short(path):
    book = nbformat.read(path, 4)
    words = sum(len(cell.source.split()) for cell in book.cells if cell.cell_type == "markdown")
    lines = sum(
        len([line for line in cell.source.splitlines() if line.strip()]) for cell in code_of(book)[1:]
    )
    assert words < MAX_WORDS
    assert lines < MAX_CODE


@numbered
def test_a_notebook_ends_with_its_answer_a_check_and_a_way_on(path):
    book = nbformat.read(path, 4)
    assert any(cell.source.rstrip().endswith("## Answer") for cell in book.cells)
    *_, answer, check = code_of(book)
    assert "co.results.answer(" in answer.source
    written = "".join(output.get("data", {}).get("text/markdown", "") for output in answer.outputs)
    assert re.search(r"\d", written), "an answer has numbers"
    assert check.metadata["tags"] == ["nbval-check-output"]
    printed = "".join(output.get("text", "") for output in check.outputs).splitlines()
    assert printed
    assert all(line.startswith("as expected: ") for line in printed), "the check is of the committed defaults"
    assert re.search(r"\]\(\d\d_\w+\.ipynb\)", book.cells[-1].source)


@numbered
def test_a_view_that_needs_a_kernel_is_followed_by_its_picture(path):
    """On a page and in print there are no widgets: the next cell shows the same, standing still."""
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    for view, after in zip(code, [*code[1:], None], strict=True):
        text = "".join(o.get("data", {}).get("text/plain", "") for o in view.outputs)
        if "a running kernel" in text:
            assert after is not None, text
            assert any("image/png" in o.get("data", {}) for o in after.outputs), text


def test_the_views_that_need_a_kernel_are_all_there():
    text = "".join(path.read_text(encoding="utf-8") for path in PATHS)
    for view in ("Run controls", "Tuning panel", "Virtual-cell explorer"):
        assert re.search(view + r" \((it|they) needs? a running kernel\)", text), view


def executed():
    first = nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}, execution_count=1)
    text = nbformat.v4.new_output("stream", name="stdout", text="0\n")
    second = nbformat.v4.new_code_cell("print(seed)", execution_count=2, outputs=[text])
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# What?"), first, second])


def stripped(book):
    for cell in book.cells[1:]:
        cell.execution_count, cell.outputs = None, []


def swapped(book):
    book.cells[1].execution_count, book.cells[2].execution_count = 2, 1


def failed(book):
    book.cells[2].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])]


def noisy(book):
    book.cells[2].outputs = [nbformat.v4.new_output("stream", name="stderr", text="Warning")]


def untagged(book):
    book.cells[1].metadata["tags"] = []


def long(book):
    book.cells[2].source = "\n".join(["seed"] * 13)


def wordy(book):
    book.cells[2].source = "\n".join(["def f():"] + ["    seed"] * 10)


def crowded(book):
    book.cells += [nbformat.v4.new_markdown_cell("text") for _ in range(MAX_CELLS)]


def widgets(book):
    book.metadata["widgets"] = {"state": {}}


def heavy(book):
    book.cells[0].source = "# What?\n" + "x" * 1_000_001


def mute(book):
    picture = nbformat.v4.new_output("display_data", data={"image/png": "iVBO"})
    book.cells[-1].outputs.append(picture)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (stripped, "not executed"), (stripped, "no outputs"), (swapped, "not executed"), (failed, "an error"),
        (noisy, "stderr"), (untagged, "'parameters'"), (long, "13 lines"), (wordy, "function of 11 lines"),
        (crowded, "cells, more than"), (widgets, "widget state"), (heavy, "bytes"), (mute, "without words"),
    ],
)  # fmt: skip
def test_a_spoilt_notebook_is_noticed(spoil, message, tmp_path):
    book = executed()
    nbformat.write(book, tmp_path / "good.ipynb")
    assert complaints(tmp_path / "good.ipynb") == []
    spoil(book)
    nbformat.write(book, tmp_path / "bad.ipynb")
    assert any(message in complaint for complaint in complaints(tmp_path / "bad.ipynb"))
