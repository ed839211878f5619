"""Parts of a model compiled by torch while it trains: whole, or not at all."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..errors import ModelError, three_beats

_COMPILERS = ("g++", "clang++", "c++")


def check_compiler(device: torch.device) -> None:
    """Refuse where ``torch.compile`` would find no compiler for the device, before any step is made.

    Raises
    ------
    ModelError
        Without a C++ compiler for a CPU, or Triton for a GPU.
    """
    if device.type == "cpu":
        wanted = (os.environ["CXX"],) if os.environ.get("CXX") else _COMPILERS
        if not any(map(shutil.which, wanted)):
            fix = "install g++ or clang++ (conda install cxx-compiler), or leave compile=True out"
            raise ModelError(three_beats("a C++ compiler for compile=True", f"none of {list(wanted)}", fix))
    elif importlib.util.find_spec("triton") is None:
        fix = "install triton, or leave compile=True out"
        raise ModelError(three_beats("Triton for compile=True on a GPU", "no such package", fix))


@contextlib.contextmanager
def compiled(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the context, methods of the model (dotted names) run compiled.

    With ``fullgraph``: what cannot be compiled as a whole is an error, and never falls back to plain steps in silence.
    """
    owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    for owner, method in owners:
        setattr(owner, method, torch.compile(getattr(owner, method), fullgraph=True))
    try:
        yield
    finally:
        for owner, method in owners:
            delattr(owner, method)  # the class's own method is seen again
