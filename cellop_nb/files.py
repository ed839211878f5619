"""Files and folders written whole or not at all, and what to do when the disk refuses: standard library only."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cellop_nb.errors import CellopError, DataError, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FULL = "free some space, or choose another folder"
_REASONS = {
    errno.ENOSPC: ("no space left on the device", _FULL),
    errno.EDQUOT: ("a quota that is used up", _FULL),
    errno.EFBIG: ("a limit on the size of files", "raise the limit (ulimit -f), or choose another disk"),
    errno.EACCES: ("no permission to write there", "choose a folder that you may write to"),
    errno.EPERM: ("no permission to write there", "choose a folder that you may write to"),
    errno.EROFS: ("a read-only file system", "choose a folder that can be written to"),
    errno.ENOENT: ("no such folder", "make the folder first, or check the path"),
    errno.ENOTDIR: ("a file where a folder should be", "choose another path"),
    errno.EISDIR: ("a folder of that name", "choose another name"),
    errno.EEXIST: ("a file of that name", "choose another name"),
    errno.ENOTEMPTY: ("a folder of that name", "choose another name"),
    errno.ENAMETOOLONG: ("a name that is too long", "shorten it"),
    errno.EIO: ("an error of the device", "check the disk"),
}
_NOTHING = 100_000
"""Bytes; with fewer free a disk is full for a library that does not say why it failed."""
_RESERVE = 65_536
"""Bytes beside the values: headers and indices."""
_NUMBER = re.compile(r"(?:errno[ =]+|os error )(\d+)", re.IGNORECASE)
_WORKSHOP = ".cellop-"
_HERE = f"{_WORKSHOP}{re.sub(r'[^A-Za-z0-9]', '', platform.node())[:32]}-"
_LOCK, _OLD = "lock", 86_400.0
"""Name of the file that says that a writer lives, and seconds after which none does where locks do not tell."""


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a path of its own beside `path`, and rename: nothing half is ever seen.

    The path lies in a new folder of a random name that only this user can enter, so that writers never meet and a
    planted link is never followed. What is written is on the disk before the rename, the rename before the return.
    Folders that killed writers left are removed on the way.

    Parameters
    ----------
    path
        File or folder to write; its parent is made where it is missing, an earlier file replaced at the last moment. The
        new file has the earlier one's mode, or that of any new file; a link at `path` is replaced, not followed.
    write
        Writes everything to the path it is given, which has the same name.

    Returns
    -------
    Path
        The file or folder.

    Raises
    ------
    StorageError
        If the disk is full or the folder cannot be written; what stood at `path` is left as it was.
    """
    path = Path(path)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with _workshop(path.parent) as workshop, storing(path):  # here, where a full disk is still full
            part = workshop / path.name
            write(part)
            _keep_mode(part, path)
            _to_disk(part)
            os.replace(part, path)
        with suppress(OSError):  # a folder that cannot be listed, or a system that has no such call
            _flush(path.parent)
    return path


def require_room(path: Path, count: int) -> None:
    """Ask the disk for `count` more bytes in the file at `path`, and give them back; it says no by an OSError.

    For what HDF5 writes: it may end the process where it closes a file on a disk that has become full.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("ab") as file:
            size = file.tell()
            try:
                os.posix_fallocate(file.fileno(), size, count + _RESERVE)
            finally:
                file.truncate(size)
    elif shutil.disk_usage(path.parent).free < count + _RESERVE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _workshop(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, locked as long as its writer lives."""
    workshop = Path(tempfile.mkdtemp(prefix=_HERE, dir=parent))
    try:
        lock = os.open(workshop / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if fcntl is not None:
                try_lock(lock)
                os.rename(workshop / "new", workshop / _LOCK)  # nobody sees it unlocked
            inner = workshop / "part"
            inner.mkdir()
            yield inner
        finally:
            os.close(lock)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def try_lock(lock: int) -> bool | None:
    """Whether nobody else holds the file's lock, which this process then does; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sweep(folder: str | Path) -> None:
    """Remove what killed writers left in `folder`; what a living one works on stays."""
    with suppress(PermissionError), os.scandir(folder) as entries:
        left = [Path(entry.path) for entry in entries if entry.name.startswith(_WORKSHOP)]
        left = [path for path in left if path.is_dir() and not path.is_symlink()]
        for workshop in filter(_is_abandoned, left):
            shutil.rmtree(workshop, ignore_errors=True)


def _is_abandoned(workshop: Path) -> bool:
    try:
        lock = os.open(workshop / _LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:  # gone, or killed before it had a lock, or not yet so far
        lock = None
    try:
        is_old = time.time() - workshop.stat().st_mtime > _OLD
        if lock is None or not workshop.name.startswith(_HERE):
            return is_old  # locks may not reach from machine to machine
        return is_old if (free := try_lock(lock)) is None else free
    except FileNotFoundError:
        return False
    finally:
        if lock is not None:
            os.close(lock)


def _keep_mode(part: Path, path: Path) -> None:
    try:
        earlier = path.lstat().st_mode
    except FileNotFoundError:
        earlier = 0
    if stat.S_ISREG(earlier):
        part.chmod(stat.S_IMODE(earlier))
    elif part.is_file():  # some libraries make files that only their owner may read
        probe = part.parent.with_name("probe")
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        part.chmod(stat.S_IMODE(probe.stat().st_mode))


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on the disk."""
    for inner in path.iterdir() if path.is_dir() else ():
        _to_disk(inner)
    if os.name != "nt" or path.is_file():  # folders cannot be opened there
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has nothing to wait for
            raise
    finally:
        os.close(handle)


def read_json(path: str | Path, expected: str, fix: str) -> dict:
    """The object in a JSON file; what cannot be read, is damaged or holds something else is refused."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # lists in lists without end
        raise DataError(f"{expected} in {path}", f"{type(error).__name__}: {error}", fix) from error
    if not isinstance(content, dict):
        raise DataError(f"{expected} in {path}", f"a {type(content).__name__}", fix)
    return content


def unused(path: Path) -> Path:
    """The path, or the first of ``name_2``, ``name_3``, ... beside it that is not there: an export replaces none."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return free


def inside(folder: str | Path, name: str) -> Path:
    """The path of `name` in `folder`; a name that leads out of it, as a label from data may, is refused."""
    path = (Path(folder) / name).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        fix = "use a name without .. and without a leading slash"
        raise StorageError(f"a file name inside {folder}", repr(name), fix)
    return Path(folder) / name


@contextmanager
def storing(path: str | Path) -> Iterator[None]:
    """Say in three beats what the disk refused while `path` was written, whichever library wrote."""
    try:
        yield
    except CellopError:
        raise
    except Exception as error:
        number = _disk_error(error)
        if number is None:
            raise
        if not number and shutil.disk_usage(_folder_of(path)).free < _NOTHING:
            number = errno.ENOSPC
        reason, fix = _REASONS.get(number, (" ".join(str(error).split()), "check the disk and the path"))
        reason = f"{reason}{_room(path)}" if fix == _FULL else reason
        refusal = StorageError(f"to write {path}", reason, fix)
        refusal.errno = number or None
        raise refusal from error


def _disk_error(error: BaseException | None) -> int | None:
    """Number of the system's error in an exception or what led to it, 0 for an unknown one; None for another error.

    Libraries that write in another language have the number in their text alone.
    """
    if not isinstance(error, OSError) and type(error).__name__ not in {"RuntimeError", "SafetensorError"}:
        return None
    unknown = 0 if isinstance(error, OSError) or "inline_container" in str(error) else None  # torch.save
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if number := _NUMBER.search(str(error)):
            return int(number[1])
        error = error.__cause__ or error.__context__
    return unknown


def _folder_of(path: str | Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(parent for parent in Path(path).absolute().parents if parent.is_dir())


def _room(path: str | Path) -> str:
    """How much is free where `path` was to be written."""
    disk = shutil.disk_usage(_folder_of(path))
    return f": {_size(disk.free)} of {_size(disk.total)} are free"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
