"""The package as a house: light at the door, rooms in one direction, every public name in its place."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cellop_nb

PACKAGE = Path(cellop_nb.__file__).parent

# what each room may import of ours, besides itself and errors
ALLOWED = {
    "models": set(),
    "data": {"models"},
    "training": {"models", "data"},
    "analysis": {"models", "data", "training"},
    "notebook": {"models", "data", "training", "analysis"},
    "commands": {"notebook", "data", "analysis", "training", "models"},
}


def ours(path: Path) -> set[str]:
    """Rooms of the package that a file imports, at its top or inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # from . import x: from the file's own package upwards
                package = path.relative_to(PACKAGE.parent).parts[: -node.level]
                base = ".".join([*package, *filter(None, [node.module])])
            else:
                base = node.module
            modules = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "cellop_nb":
                name = parts[1] if len(parts) > 1 else ""
                rooms.add(cellop_nb._PUBLIC.get(name, name).split(".")[0])
    return rooms - {"display", "errors", "files", "packages", "__version__", ""}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_one_way(room):
    for path in (PACKAGE / room).rglob("*.py"):
        extra = ours(path) - ALLOWED[room] - {room}
        assert not extra, f"{path.relative_to(PACKAGE)} imports {sorted(extra)}"


def test_what_fits_models_alone_ties_analysis_to_training():
    tied = {path.stem for path in (PACKAGE / "analysis").rglob("*.py") if "training" in ours(path)}
    assert tied == {"cellop", "diagnose", "uncertainty"}


def module_imports() -> dict[str, set[str]]:
    """Modules of ours that each module imports, inside functions and for type checkers too."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in sources()}
    files = {name: path for name, path in files.items() if not name.endswith("__init__")}
    graph = {}
    for name, path in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                above = name.split(".")[: -node.level] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                graph[name] |= {base, *(f"{base}.{alias.name}" for alias in node.names)} & set(files) - {name}
    return graph


def test_no_module_imports_itself_by_way_of_others():
    graph = module_imports()
    while free := [name for name, needed in graph.items() if not needed & set(graph)]:
        graph = {name: needed for name, needed in graph.items() if name not in free}
    assert not graph, sorted(graph)


def test_errors_import_nothing_of_ours():
    assert ours(PACKAGE / "errors.py") == set()


def test_importing_the_package_is_light():
    """By what it loads, which is the same on a busy machine: a handful of modules, none from outside."""
    code = (
        "import sys; before = set(sys.modules); import cellop_nb; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.split())
    outside = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"cellop_nb"}
    assert not outside
    assert len(loaded) < 40, sorted(loaded)


def test_the_command_line_is_standard_library_only():
    """No package beside ours is loaded for --help, so that a bare Python can run it."""
    code = (
        "import sys; import cellop_nb.__main__ as m; m.build_parser().format_help(); "
        "print(*sorted({n.split('.')[0] for n in sys.modules} - set(sys.stdlib_module_names)))"
    )
    # a measurement of coverage enters every process through these
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "COVERAGE"))}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare
    ).stdout.split()
    # a virtual environment may load small hooks of its own at start
    known = {
        "cellop_nb",
        "__main__",
        "__mp_main__",
        "_distutils_hack",
        "sitecustomize",
        "usercustomize",
        "_virtualenv",
    }
    assert {name for name in loaded if not name.startswith("__editable__")} <= known


@pytest.mark.parametrize("name", cellop_nb._PUBLIC)
def test_every_public_name_is_there(name):
    assert getattr(cellop_nb, name) is not None
    assert name in dir(cellop_nb)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        cellop_nb.no_such_name  # noqa: B018


def test_no_top_level_module_bears_a_public_name():
    """Importing it would put the module in the place of the function."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(cellop_nb._PUBLIC) - cellop_nb._MODULES


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_does_not_print(path):
    text = path.read_text(encoding="utf-8")
    called = {
        n.func.id
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    assert "print" not in called
