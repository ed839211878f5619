"""The limits that other tests rely on: nothing is waited for without end, and nothing is left."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from .families import call, family

SLEEP = "import time; time.sleep(60)"
# a grandchild in a session of its own, which holds the pipe of its parent open
LEAVES_ONE = (
    "import subprocess, sys; "
    f"print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True).pid, flush=True)"
)


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_command_that_never_ends_is_ended():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="not done within 1 s"):
        call([sys.executable, "-c", SLEEP], seconds=1)
    assert time.monotonic() - start < 30


def test_a_pipe_that_a_grandchild_holds_open_is_not_waited_for():
    with pytest.raises(TimeoutError, match="not done within 3 s"):
        call([sys.executable, "-c", LEAVES_ONE], seconds=3)


def test_what_left_its_parent_ends_with_the_family_and_nothing_else_does():
    command = [sys.executable, "-c", LEAVES_ONE]
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        with family(60):
            parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            pid = int(parent.stdout.readline())
            parent.wait(30)
            assert lives(pid)
        assert not lives(pid)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait(10)
        parent.stdout.close()


def test_the_result_of_a_command():
    done = call([sys.executable, "-c", "import sys; print(1); sys.exit(3)"])
    assert (done.returncode, done.stdout) == (3, "1\n")
