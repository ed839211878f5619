"""Folders of a sweep: one per run, named by what the run depends on, complete or not there.

A run works in a hidden folder beside the others and is renamed as a whole when it has ended, well or badly.
Whatever dies half-way leaves a hidden folder that counts for nothing. Standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellop_nb.errors import DataError, three_beats
from cellop_nb.notebook.batch import write_json

RESULT = "result.json"
_DRAFT = ".unfinished-"


def result_of(folder: Path) -> dict[str, Any] | None:
    """What a finished run left: `values`, `status` (done, failed), `error`, `seconds`, `metrics`; None without."""
    path = folder / RESULT
    return read(path) if path.is_file() else None


def read(path: Path) -> dict[str, Any]:
    """Content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def draft(parent: Path, key: str) -> Path:
    """A hidden folder for a run to work in."""
    folder = parent / f"{_DRAFT}{key}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def finish(folder: Path, target: Path, result: dict[str, Any]) -> bool:
    """Turn a draft into the run's folder in one step; False where another worker was first."""
    write_json(folder / RESULT, result)
    if (result_of(target) or {}).get("status") == "failed":  # tried again
        old = target.with_name(f"{_DRAFT}old-{uuid.uuid4().hex[:8]}")
        os.rename(target, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(folder, target)  # refuses a folder that is there and not empty
    except OSError:
        if result_of(target) is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def sweep_up(parent: Path, *, older_than: float = 0.0) -> None:
    """Remove what interrupted runs left behind, if untouched for so many seconds."""
    limit = time.time() - older_than
    for folder in parent.glob(f"{_DRAFT}*"):
        newest = max((path.stat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)
        if newest <= limit:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(parent: Path) -> Iterator[None]:
    """Only one sweep at a time works in a folder; the lock of a killed one is gone with it.

    Raises
    ------
    DataError
        When another sweep is at work there.
    """
    from filelock import FileLock, Timeout

    parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(parent / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        fix = "wait until it has ended, or give this one another --name"
        raise DataError(three_beats(f"one sweep at a time in {parent}", "another at work", fix)) from None
    try:
        yield
    finally:
        lock.release()
