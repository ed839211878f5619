"""Work for local processes, one of which dies of it; nothing heavy is imported to do it."""

from __future__ import annotations

import os
import time
from pathlib import Path


def squared_or_dead(numbers: list[int], k: int, folder: Path) -> int:
    """The square of the shared number at k, noted by a file; the first who is asked for the last one dies of it."""
    if k == len(numbers) - 1 and not (folder / "dead").exists():
        while len([*folder.iterdir()]) < k:
            time.sleep(0.05)
        (folder / "dead").touch()
        os._exit(1)
    (folder / f"{k} by {os.getpid()}").touch()
    return numbers[k] ** 2
