"""Threads of torch, which other libraries change in passing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def same_threads() -> Iterator[None]:
    """Leave torch with the number of threads it had; also a decorator.

    Parallel functions of numba (scanpy's, for one) share torch's OpenMP and set their own number for the calling
    thread: a process that was given one core would train on all of them from then on, and its threads would spend
    their time waiting for each other.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
