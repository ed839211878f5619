"""One thread: sums in one order, so that runs can be compared bit by bit."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

from cellop_nb.models import host

sys.path.insert(0, str(Path(__file__).parent))  # toy.py, shared by the tests of this folder


@pytest.fixture(scope="session")
def processes():
    """New processes that have everything imported: starting and killing one costs milliseconds, not seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks for what it preloads there only
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        first = context.Process(target=print)
        first.start()
        first.join()
    return context


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def as_on_a_device(monkeypatch):
    monkeypatch.setattr(host, "looks_are_free", lambda device: False)
    monkeypatch.setattr("cellop_nb.training.loop.looks_are_free", lambda device: False)
    monkeypatch.setattr("cellop_nb.training.guard.looks_are_free", lambda device: False)
    # torch itself checks the codes on a CPU alone (aten/src/ATen/native/Onehot.cpp)
    monkeypatch.setattr(
        torch.nn.functional, "one_hot", lambda codes, n: (codes.unsqueeze(-1) == torch.arange(n)).long()
    )
