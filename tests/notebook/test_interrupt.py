"""The stop square: a kernel's interrupt ends a training, in whichever way it runs, and leaves it usable."""

from __future__ import annotations

import queue
import time
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel

from ..families import family

pytestmark = pytest.mark.timeout(180)

_SETUP = """
import sys
sys.path.insert(0, {folder!r})
from toy import LineTrainer
trainer = LineTrainer(max_epochs=10_000_000)
"""
_REPORT = "print(trainer.status, trainer.stop_reason, len(trainer.rows) > 0, len(trainer.fit(trainer.epoch + 2)) > 2)"


@pytest.fixture(scope="module")
def kernel():
    with family(150):
        manager, client = start_new_kernel(kernel_name="python3")
        yield manager, client
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def printed(client, code: str) -> str:
    """Run a cell to its end; what it printed, or its error."""
    texts = []
    hook = lambda message: texts.append(message["content"])  # noqa: E731
    client.execute_interactive(code, timeout=60, allow_stdin=False, output_hook=hook)
    return "".join(part.get("text", part.get("evalue", "")) for part in texts)


@pytest.mark.parametrize("call", ["trainer.fit()", "await trainer.fit_async()"])
def test_an_interrupt_ends_a_training_and_leaves_it_usable(kernel, call):
    manager, client = kernel
    folder = str(Path(__file__).resolve().parents[1] / "training")
    assert printed(client, _SETUP.format(folder=folder)) == ""
    running = client.execute(f"print('begins', flush=True); _ = {call}")
    wait_for_text(client, "begins")
    time.sleep(0.5)
    manager.interrupt_kernel()
    reply = answer(client, running)
    assert reply["content"]["status"] == "ok", "an interrupt ends the training, not the notebook"
    assert printed(client, _REPORT).split() == ["stopped", "interrupted", "True", "True"]


def answer(client, request: str) -> dict:
    """The kernel's reply to one request."""
    end = time.monotonic() + 30
    while (reply := client.get_shell_msg(timeout=30))["parent_header"].get("msg_id") != request:
        assert time.monotonic() < end, "no reply"
    return reply


def wait_for_text(client, text: str) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            message = client.get_iopub_msg(timeout=1)
        except queue.Empty:
            continue
        if text in message["content"].get("text", ""):
            return
    raise AssertionError(f"{text!r} was not printed")
