"""The documentation site builds without a warning and documents every public name."""

from __future__ import annotations

import re
import sys

import pytest

import cellop_nb
from cellop_nb.commands import environment
from docs import build


def test_every_public_name_stands_in_the_reference():
    text = "".join(build.reference().values())
    for name in set(cellop_nb.__all__) - {"__version__"} - cellop_nb._MODULES:
        assert f":: cellop_nb.{name}\n" in text, name
    for module in (getattr(cellop_nb, name) for name in cellop_nb._MODULES):
        for name in module.__all__:
            assert f":: {module.__name__}.{name}\n" in text, name
    for path in build.RESULTS:
        assert f":: cellop_nb.{path}\n" in text or f"`cellop_nb.{path}`: " in text, path


def test_the_keywords_are_explained_with_their_defaults():
    import importlib.util

    spec = importlib.util.spec_from_file_location("grammar", environment.ROOT / "tests" / "test_api.py")
    grammar = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grammar)
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\|", build.KEYWORDS, re.MULTILINE))
    assert set(rows) == grammar.GRAMMAR
    for name, defaults in grammar.DEFAULTS.items():
        assert rows[name].strip('"') == str(defaults[0])


def test_every_room_has_its_page():
    rooms = {room for group in build.ROOMS.values() for room in group}
    assert {module.partition(".")[0] for module in cellop_nb._PUBLIC.values()} <= rooms


def test_the_model_page_names_what_the_code_has():
    """Each name in the table of symbols is an attribute, a parameter or a function of the code."""
    text = (environment.ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    table = text.partition("## Symbols")[2].partition("## What is assumed")[0]
    operators = cellop_nb.OperatorModel(2, ["p"], ["c"])
    for name in (
        "axis_left",
        "axis_right",
        "axis_shift",
        "context_left",
        "context_right",
        "context_shift",
        "center",
    ):
        assert f"{name}" in table
        assert hasattr(operators, name)
    for name in ("embedding", "interaction", "modulation", "to_alpha"):
        assert name in table
        assert hasattr(operators.conditions, name)
    for name in re.findall(r"`(OperatorModel|NBVAE)\.(\w+)`", table):
        assert hasattr(getattr(cellop_nb, name[0]), name[1]), name


def test_progress_bars_are_left_out_and_nothing_else():
    bar = {
        "output_type": "display_data",
        "data": {"text/plain": ["VAE:   0%|          | 0/40 [00:00<?, ?epoch/s]"]},
    }
    shown = {"output_type": "execute_result", "data": {"text/plain": "100% | of 3 cells"}}
    picture = {"output_type": "display_data", "data": {"image/png": "iVBOR", "text/plain": "<IPython Image>"}}
    cells = [{"outputs": [bar, shown, picture, bar]}, {"outputs": [bar]}, {"source": "# text"}]
    kept = build.without_bars({"cells": cells})["cells"]
    assert [cell.get("outputs") for cell in kept] == [[shown, picture], [], None]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path, call):
    """`python3 -m cellop_nb docs`, in which Sphinx takes a warning for an error."""
    command = [sys.executable, "-m", "cellop_nb", "docs", "--out", tmp_path / "site"]
    done = call(command, cwd=environment.ROOT)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    wanted = {"index.html", "model.html", "errors.html", "guides/extend.html", "api/data.html"}
    wanted |= {f"notebooks/{path.stem}.html" for path in (environment.ROOT / "notebooks").glob("*.ipynb")} | {
        "notebooks/benchmark.html"
    }
    assert wanted <= pages
    style = (tmp_path / "site" / "_static" / "site.css").read_text(encoding="utf-8")
    font = re.search(r'url\("(.+?)"\)', style)[1]
    assert (tmp_path / "site" / "_static" / font).is_file()
    assert "0%|" not in (tmp_path / "site" / "notebooks" / "06_predict.html").read_text(encoding="utf-8")
    reference = (tmp_path / "site" / "api" / "training.html").read_text(encoding="utf-8")
    assert 'id="cellop_nb.VAETrainer"' in reference
