"""The public names as a user meets them: documented in full, alike in their grammar, complete in `__all__`."""

from __future__ import annotations

import ast
import inspect
import re
import statistics
import textwrap
from pathlib import Path

import pytest

import cellop_nb

PACKAGE = Path(cellop_nb.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "_share" not in path.parts
}

# one meaning and one default wherever they stand, which a docstring need not explain again
DEFAULTS = {
    "layer": (None,),
    "perturbation_key": ("perturbation",),
    "context_key": ("cell_type",),
    "control": ("control",),
    "dose_key": (None,),
    "use_rep": ("X_nbvae", None),  # None: components of the counts
    "seed": (0, None),  # None: that of the model
    "progress": (True,),
}
GRAMMAR = {*DEFAULTS, "key_added", "ax", "show", "save"}
FOREIGN = {
    "random_state", "rng", "groupby", "pert_key", "pert_col", "cell_type_key", "celltype_key", "condition_key",
    "ctrl", "control_key", "control_label", "counts_layer", "obsm_key", "rep", "embedding_key", "inplace", "copy",
}  # fmt: skip


def public() -> dict[str, object]:
    """Every callable behind `cellop_nb.__all__`, with the functions of `datasets`."""
    names = {name: getattr(cellop_nb, name) for name in cellop_nb.__all__}
    for module in cellop_nb._MODULES - {"datasets", "pl"}:
        names.pop(module)
    for module in ("datasets", "pl"):
        part = names.pop(module)
        names |= {f"{module}.{name}": getattr(part, name) for name in part.__all__}
    return {name: value for name, value in names.items() if callable(value)}


PUBLIC = public()
every_name = pytest.mark.parametrize("name", PUBLIC)


def sections(doc: str) -> dict[str, str]:
    """NumPy sections of a docstring, the text before the first under the empty name."""
    found, current, lines = {}, "", doc.splitlines()
    found[current] = ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.fullmatch(r"-{3,}", line):
            continue
        if re.fullmatch(r"-{3,}", following) and len(following) == len(line):
            current = line
            found[current] = ""
        else:
            found[current] += line + "\n"
    return found


def documented(text: str) -> set[str]:
    """Names explained in a section: unindented lines of names, with or without types."""
    heads = [line for line in text.splitlines() if line and not line.startswith(" ")]
    return {name.strip().lstrip("*") for head in heads for name in head.partition(" : ")[0].split(",")}


def parameters(value) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(value).parameters)


def source_tree(value) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(value)))


def raises(value) -> bool:
    """Whether the function, or what a class does when it is made, raises or guards its input."""
    tree = source_tree(value)
    if inspect.isclass(value):
        makers = ("__init__", "__post_init__")
        tree = ast.Module([node for node in ast.walk(tree) if getattr(node, "name", "") in makers], [])
    guards = {"three_beats", "check_inputs", "check_points", "require_control", "groups", "rows_of", "counts"}
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree)) or bool(calls & guards)


@every_name
def test_a_public_name_is_documented(name):
    value = PUBLIC[name]
    doc = inspect.getdoc(value)
    assert doc, "no docstring"
    assert re.match(r"\w.*[.:]", doc.splitlines()[0] + " " + doc.partition("\n")[2][:200]), "no summary"
    found = sections(doc)
    wanted = {p for p in parameters(value) if p not in GRAMMAR and p not in {"adata", "self"}}
    explained = documented(found.get("Parameters", "")) | documented(found.get("Attributes", ""))
    assert not wanted - explained, f"not explained: {sorted(wanted - explained)}"
    known = set(parameters(value)) | {"adata"}
    assert not documented(found.get("Parameters", "")) - known, "explains what is no parameter"


@every_name
def test_what_is_returned_and_raised_is_said(name):
    value, found = PUBLIC[name], sections(inspect.getdoc(PUBLIC[name]))
    if inspect.isfunction(value):
        assert "Returns" in found, "what comes back?"
    if raises(value):
        assert "Raises" in found, "what is refused?"
    assert all(text.strip() for text in found.values()), "an empty section"


@every_name
def test_an_equation_has_its_source(name):
    doc = inspect.getdoc(PUBLIC[name])
    if ".. math::" in doc or ":math:" in doc:
        assert "References" in sections(doc)


ARRAYS = re.compile(r"Tensor|ndarray|DataFrame\b")
SHAPE = re.compile(
    r"\((?:\w+|\.\.\.)(?: [+*/-] \w+)?(?:, ?(?:\w+|\.\.\.))*,?\)|0-d|shape of|broadcast|same shape|[Oo]ne row per"
)


@every_name
def test_arrays_have_shapes(name):
    """Each parameter that is an array, and a returned one, is described with its axes: `(cell, gene)`."""
    value, found = PUBLIC[name], sections(inspect.getdoc(PUBLIC[name]))
    for parameter in parameters(value).values():
        if ARRAYS.search(str(parameter.annotation)) and parameter.name not in GRAMMAR:
            text = entry(found["Parameters"], parameter.name)
            assert SHAPE.search(text), f"{parameter.name}: which axes? {text!r}"
    if inspect.isfunction(value) and re.search(
        r"Tensor|ndarray", str(inspect.signature(value).return_annotation)
    ):
        assert SHAPE.search(found["Returns"]), "which axes come back?"


def entry(section: str, name: str) -> str:
    """Text of one parameter."""
    blocks = re.split(r"\n(?=\S)", section)
    return next(block for block in blocks if name in documented(block.splitlines()[0]))


@every_name
def test_the_grammar_of_signatures(name):
    given = list(parameters(PUBLIC[name]).values())
    positional = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not (inspect.isclass(PUBLIC[name]) and hasattr(PUBLIC[name], "__dataclass_fields__")):
        assert len(positional) <= 3
    names = [p.name for p in given]
    assert "adata" not in names or names[0] == "adata" or name == "load"  # a file comes first there
    assert not FOREIGN & set(names)


def signatures():
    """Every function and method of the package, private ones aside: (where, its arguments with defaults)."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                yield f"{module}.{node.name}", {a.arg: d for a, d in pairs}


def test_the_same_keyword_has_the_same_default_everywhere():
    """Keyword arguments alone: internal functions may take a key without a default."""
    odd = []
    for where, keywords in signatures():
        for keyword, default in keywords.items():
            if isinstance(default, ast.Constant) and default.value not in DEFAULTS.get(
                keyword, (default.value,)
            ):
                odd.append(f"{where}({keyword}={default.value!r})")
    assert not odd


MOST_NAMES = 40


def test_what_there_is_to_learn_stays_small():
    """Few names, and few parameters each; whatever else is asked for comes as an object or by its name."""
    assert len(cellop_nb._PUBLIC) <= MOST_NAMES
    own = {name: value for name, value in PUBLIC.items() if "." not in name}
    sizes = {name: len(parameters(value)) for name, value in own.items()}
    trainers = {"VAETrainer", "OperatorTrainer"}
    assert {name: n for name, n in sizes.items() if n > (15 if name in trainers else 10)} == {}
    assert statistics.median(sizes.values()) <= 6
    open_ended = {
        name: value for name, value in own.items()
        if any(p.kind is p.VAR_KEYWORD for p in parameters(value).values())
    }  # fmt: skip
    assert not open_ended


def test_all_is_exact():
    assert cellop_nb.__all__ == sorted({*cellop_nb._PUBLIC, "__version__"})
    assert [name for name in cellop_nb.__all__ if not hasattr(cellop_nb, name)] == []
    for module in map(str, [*MODULES]):
        declared = declared_all(MODULES[module])
        defined = names_of(MODULES[module])
        assert set(declared) <= defined, f"{module}.__all__ names what is not there"


def declared_all(path: Path) -> list[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value) if isinstance(node.value, ast.List) else []
    return []


def names_of(path: Path) -> set[str]:
    """Names that a module defines or imports at its top."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def imports(module: str, path: Path) -> set[str]:
    """Modules of ours that a file imports at its top, `TYPE_CHECKING` blocks aside."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{name}.{alias.name}"
                found.add(whole if whole in MODULES else name)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & set(MODULES)) - {module}


def test_no_import_cycle():
    graph = {module: imports(module, path) for module, path in MODULES.items()}
    assert len(graph) > 50
    assert sum(map(len, graph.values())) > 100
    done: set[str] = set()
    while ready := {module for module, needs in graph.items() if module not in done and needs <= done}:
        done |= ready
    assert not set(graph) - done, f"a cycle among {sorted(set(graph) - done)}"


def test_every_public_function_of_every_module_has_a_docstring():
    bare = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            bare.append(module)
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                bare += [] if ast.get_docstring(node) else [f"{module}.{node.name}"]
    assert not bare


def test_type_checkers_see_the_lazy_names():
    """The stub that the package reads its names from marks each as exported: `from .MODULE import NAME as NAME`."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    names = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert {alias.asname for alias in names} == {alias.name for alias in names} == set(cellop_nb._PUBLIC)
    assert (PACKAGE / "py.typed").is_file()
