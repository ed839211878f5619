"""Nothing that a test starts outlives it, and nothing it starts is waited for without a limit."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

_MARK = "CELLOP_TEST_FAMILY"


@contextmanager
def family(seconds: float = threading.TIMEOUT_MAX) -> Iterator[None]:
    """Whatever is started within ends with it, or after so many seconds if that is sooner.

    Processes are known by a mark in their environment: kernels, browsers and workers leave their parent's
    process group, and when the parent dies also its tree. A test that waits for one of them, as the calls of
    playwright do, is woken by its end.

    Raises
    ------
    TimeoutError
        When the time was up before; what that made of the test is its context.
    """
    before, mark = os.environ.get(_MARK, ""), uuid.uuid4().hex
    late = threading.Event()

    def give_up() -> None:
        late.set()
        end(mark)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    os.environ[_MARK] = before + mark  # within another family: of both
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        os.environ[_MARK] = before
        end(mark)
        if late.is_set():
            raise TimeoutError(f"not done within {seconds:g} s: all that it had started was ended")


def end(mark: str) -> None:
    """Kill every process of a family, those that are started meanwhile too."""
    for _ in range(5):
        found = members(mark)
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        if not psutil.wait_procs(found, timeout=5)[0]:
            return


def members(mark: str) -> list[psutil.Process]:
    """Living processes with the mark, other than this one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            inside = mark in process.environ().get(_MARK, "")
            if inside and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def call(command: list, *, seconds: float = 300, **surroundings) -> subprocess.CompletedProcess:
    """Run a command to its end, with all that it starts; `surroundings` are those of `subprocess.run`."""
    words = [str(word) for word in command]
    with family(seconds):
        if "env" in surroundings:
            surroundings["env"] = {**surroundings["env"], _MARK: os.environ[_MARK]}
        return subprocess.run(
            words,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=seconds + 10,
            **surroundings,
        )


def hangs_up() -> None:
    """In a child, before it starts: what a terminal sends when it closes counts, also where `nohup` ran us."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
