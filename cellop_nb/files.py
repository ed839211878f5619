"""Files written whole or not at all, and what to do when the disk refuses: standard library only."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cellop_nb.errors import StorageError, three_beats

_REASONS = {
    errno.ENOSPC: ("no space left on the device", "free some space, or choose another folder"),
    errno.EDQUOT: ("a quota that is used up", "free some space, or choose another folder"),
    errno.EACCES: ("no permission to write there", "choose a folder that you may write to"),
    errno.EPERM: ("no permission to write there", "choose a folder that you may write to"),
    errno.EROFS: ("a read-only file system", "choose a folder that can be written to"),
    errno.ENOENT: ("no such folder", "make the folder first, or check the path"),
    errno.ENOTDIR: ("a file where a folder should be", "choose another path"),
    errno.EISDIR: ("a folder of that name", "choose another name"),
    errno.EEXIST: ("a file of that name", "choose another name"),
}


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a temporary name beside `path`, and rename: no half file is ever seen.

    Parameters
    ----------
    path
        File to write; its folder is made where it is missing, an earlier file replaced at the last moment.
    write
        Writes everything to the path it is given, which has the same suffix.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    StorageError
        If the disk is full or the folder cannot be written; what stood at `path` is left as it was.
    """
    path = Path(path)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def inside(folder: str | Path, name: str) -> Path:
    """The path of `name` in `folder`; a name that leads out of it, as a label from data may, is refused.

    Raises
    ------
    StorageError
        If the path would lie outside of `folder`.
    """
    path = (Path(folder) / name).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        fix = "use a name without .. and without a leading slash"
        raise StorageError(three_beats(f"a file name inside {folder}", repr(name), fix))
    return Path(folder) / name


@contextmanager
def storing(path: str | Path) -> Iterator[None]:
    """Say in three beats what the disk refused while `path` was written."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        reason, fix = _REASONS.get(error.errno or 0, (str(error), "check the disk and the path"))
        raise StorageError(three_beats(f"to write {path}", reason, fix)) from error
