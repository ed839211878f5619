"""Lines, a status line that moves, and tables in the terminal."""

from __future__ import annotations

import itertools
import shutil
import sys
import threading
import time
from collections.abc import Sequence

_FRAMES = "|/-\\"


def say(text: str = "") -> None:
    """Write one line to standard output at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """Write one line to standard error at once."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def clock(seconds: float) -> str:
    """Seconds as `12 s` or `2 min 05 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class Status:
    """A line that shows the current stage and the time gone by, redrawn in place on a terminal.

    Where the output is no terminal (a log file, CI) a line is written every `every` seconds instead.

    Parameters
    ----------
    title
        What is being done, such as `"setting up"`.
    every
        Seconds between two lines where the output is not a terminal.
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
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()

    def _draw(self) -> None:
        live = sys.stdout.isatty()
        frames = itertools.cycle(_FRAMES)
        while not self._over.wait(0.15 if live else self.every):
            line = f"{self.title}  {clock(self.seconds)}  {self.stage}"
            if live:
                width = shutil.get_terminal_size().columns - 3
                sys.stdout.write(f"\r\033[K{next(frames)} {line[:width]}")
            else:
                sys.stdout.write(line + "\n")
            sys.stdout.flush()


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
