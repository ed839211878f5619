"""Which runs a sweep consists of: axes read from text, expanded to a grid or sampled; checked before anything runs.

Standard library only, as the command line refuses wrong values before the environment exists.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cellop_nb
from cellop_nb.errors import LabelError, three_beats
from cellop_nb.notebook import parameters
from cellop_nb.notebook.values import Parameter, ParameterError

FREE = "run_dir"  # the one parameter that does not change a result


@dataclass(frozen=True)
class Interval:
    """A continuous range to sample from, uniformly or (`log`) uniformly in the logarithm."""

    low: float
    high: float
    log: bool = False

    def draw(self, source: random.Random) -> float:
        """One value, to four digits: names and tables stay readable."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = source.uniform(low, high)
        value = float(f"{math.exp(value) if self.log else value:.4g}")
        return min(max(value, self.low), self.high)  # rounding must not leave the range


@dataclass(frozen=True)
class Axis:
    """A parameter and the values that it takes in a sweep."""

    name: str
    values: tuple | Interval


@dataclass(frozen=True)
class Run:
    """One execution of the notebook.

    Attributes
    ----------
    values
        Every parameter of the notebook with its value, the defaults included.
    key
        Digest of what the result depends on: values, the notebook's code, the data file, our version.
    """

    values: dict[str, Any]
    key: str


def read_axis(notebook: str | Path, text: str) -> Axis:
    """An axis from `name=values`.

    Values are `8,16,32`, whole numbers `0..4` (both ends included), or, for sampling, `1e-4..1e-2` and
    `log:1e-4..1e-2`. Values that are lists themselves are separated by `;`.

    Raises
    ------
    LabelError
        When the text is no axis, or the notebook has no such parameter.
    ParameterError
        When a value does not fit the parameter.
    """
    name, equals, given = (part.strip() for part in text.partition("="))
    if not equals or not given:
        fix = "write -g latent_dim=8,16,32 or -g seed=0..4"
        raise LabelError(three_beats("NAME=VALUES after -g", repr(text), fix))
    if name == FREE:
        fix = "leave it out: every run has a folder of its own"
        raise LabelError(three_beats("a parameter that is free", f"{FREE!r}, set by the sweep", fix))
    parameter = parameters.parameter(notebook, name)
    if ".." in given and "str" not in parameter.kinds:
        return Axis(name, _span(parameter, given))
    separator = ";" if any(kind.startswith("list") for kind in parameter.kinds) else ","
    values = tuple(parameter.parse(word) for word in given.split(separator))
    return Axis(name, _refuse_repeated(name, values))


def _span(parameter: Parameter, text: str) -> tuple | Interval:
    log = text.startswith("log:")
    first, _, last = text.removeprefix("log:").partition("..")
    low, high = parameter.parse(first), parameter.parse(last)
    if not low < high or (log and low <= 0):
        fix = "write LOW..HIGH with LOW below HIGH, and above 0 after log:"
        raise ParameterError(three_beats(f"a range for the parameter {parameter.name!r}", repr(text), fix))
    if isinstance(low, int) and isinstance(high, int):
        return tuple(range(low, high + 1))
    return Interval(float(low), float(high), log)


def _refuse_repeated(name: str, values: tuple) -> tuple:
    if len({json.dumps(value) for value in values}) < len(values):
        fix = "name each value once"
        raise LabelError(three_beats(f"different values of {name!r}", repr(list(values)), fix))
    return values


def expand(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Every combination of the axes' values, the last axis changing fastest."""
    endless = [axis.name for axis in axes if isinstance(axis.values, Interval)]
    if endless:
        fix = "add --random N to sample it, or list its values"
        raise LabelError(three_beats("values to go through", f"a continuous range of {endless[0]!r}", fix))
    combinations = itertools.product(*(axis.values for axis in axes))
    return [dict(zip([axis.name for axis in axes], chosen, strict=True)) for chosen in combinations]


def sample(axes: Sequence[Axis], n_runs: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """`n_runs` different random combinations; the same for the same axes and seed."""
    if n_runs < 1:
        raise LabelError(three_beats("--random of at least 1", str(n_runs), "ask for some runs"))
    source = random.Random(seed)
    if not any(isinstance(axis.values, Interval) for axis in axes):
        grid = expand(axes)
        return source.sample(grid, min(n_runs, len(grid)))
    chosen: dict[str, dict] = {}
    for _ in range(100 * n_runs):
        values = {axis.name: _draw(axis, source) for axis in axes}
        chosen.setdefault(json.dumps(values), values)
        if len(chosen) == n_runs:
            break
    return list(chosen.values())


def _draw(axis: Axis, source: random.Random) -> Any:
    return axis.values.draw(source) if isinstance(axis.values, Interval) else source.choice(axis.values)


def plan(
    notebook: str | Path,
    axes: Sequence[Axis],
    fixed: Mapping[str, Any] | None = None,
    *,
    n_random: int | None = None,
    seed: int = 0,
) -> list[Run]:
    """The runs of a sweep, all of their values checked.

    Parameters
    ----------
    notebook
        Path of the notebook.
    axes
        What varies.
    fixed
        Values of other parameters that differ from the defaults.
    n_random, seed
        Sample so many combinations instead of all.

    Raises
    ------
    LabelError
        When there is nothing to vary, or a parameter is named twice or unknown.
    ParameterError
        When a value does not fit.
    """
    names = [axis.name for axis in axes]
    twice = [name for name in names if names.count(name) > 1 or name in (fixed or {})]
    if not names or twice:
        found = f"{twice[0]!r} named twice" if twice else "none"
        raise LabelError(three_beats("parameters to vary, each named once", found, "see `sweep --help`"))
    chosen = expand(axes) if n_random is None else sample(axes, n_random, seed=seed)
    base = {**parameters.defaults(notebook), **(fixed or {})}
    base.pop(FREE, None)
    code = _code_of(Path(notebook))
    runs = []
    for values in chosen:
        full = parameters.validate(notebook, {**base, **values})
        runs.append(Run(full, _key(full, code)))
    return runs


def _code_of(notebook: Path) -> list[str]:
    """Source of the code cells; words and stored outputs change no result."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell.get("metadata", {}).get("tags", [])
    ]


def _key(values: Mapping[str, Any], code: list[str]) -> str:
    content = [values, code, _data_of(values), cellop_nb.__version__]
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _data_of(values: Mapping[str, Any]) -> list[int]:
    """Size and time of the file that `data` names: another file under an old name makes another run."""
    path = str(values.get("data", ""))
    return [os.stat(path).st_size, os.stat(path).st_mtime_ns] if os.path.isfile(path) else []
