"""Lines, a status line that moves, and tables in the terminal; and the signals that it sends."""

from __future__ import annotations

import errno
import io
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from cellop_nb.errors import StorageError

_FRAMES = "|/-\\"
_GONE = {errno.EPIPE, errno.EIO}
"""What a system says when nobody reads any more: of a pipe (`| head`), of a terminal that was closed."""
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def say(text: str = "") -> None:
    """Write one line to standard output at once."""
    _write(sys.stdout, text + "\n")


def complain(text: str) -> None:
    """Write one line to standard error at once."""
    _write(sys.stdout, "")
    _write(sys.stderr, text + "\n")


def flush() -> None:
    """Write what Python, too, would write at its end, when a reader that has gone is an error."""
    _write(sys.stdout, "")


def _write(stream: TextIO, text: str) -> None:
    """Write, whoever reads: a reader that has gone ends the output, and not the work."""
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if error.errno not in _GONE:
            fix = "free some space, or send the output elsewhere"
            raise StorageError("to write the output", str(error.strerror), fix) from error


def settle() -> None:
    """Make both outputs take every letter: one that the terminal does not know is written as its number."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Stopped(SystemExit):
    """A signal asked this command to end: `signal` is its name, such as `SIGTERM`, the exit code says which."""

    code: int

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise :class:`Stopped` at the first signal that asks to end; further ones do not disturb the tidying up.

    A signal that is ignored, as SIGHUP after `nohup`, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def stop(number: int, frame: object) -> NoReturn:
        for one in heard:
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(number)

    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def clock(seconds: float) -> str:
    """Seconds as `12 s` or `2 min 05 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class Status:
    """A line that shows the current stage and the time gone by, redrawn in place on a terminal.

    Where the output is no terminal (a log file, CI) a line is written every `every` seconds instead.
    """

    def __init__(self, title: str, every: float = 20.0) -> None:
        self.title, self.every, self.stage = title, every, ""
        self.started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def update(self, stage: str) -> None:
        """Set the stage that the line shows."""
        self.stage = stage

    def __enter__(self) -> Status:
        self.started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if sys.stdout.isatty():
            _write(sys.stdout, "\r\033[K")

    def _draw(self) -> None:
        live = sys.stdout.isatty()
        frames = itertools.cycle(_FRAMES)
        while not self._over.wait(0.15 if live else self.every):
            line = f"{self.title}  {clock(self.seconds)}  {self.stage}"
            if live:
                width = shutil.get_terminal_size().columns - 3
                _write(sys.stdout, f"\r\033[K{next(frames)} {line[:width]}")
            else:
                say(line)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows as text in aligned columns; columns in `right` are set flush right, the last one is not padded."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * min(width, 40) for width in widths)
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])
