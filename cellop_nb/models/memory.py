"""Freed memory that stays with the process, so that a training step does not fetch its arrays anew each time."""

from __future__ import annotations

import functools

import torch

_LARGEST = 30 << 20


@functools.cache
def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed blocks up to about 30 MB, instead of returning each to the system.

    It learns its thresholds from the largest block freed so far. Until then every array of a training step above
    128 kB may cost a page fault per 4 kB, each time: a third of the time of some steps. The block here is never
    written to, so that it takes no memory. Other allocators do not mind.
    """
    torch.empty(_LARGEST, dtype=torch.uint8)
