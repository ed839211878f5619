"""Kernels that execute notebooks without a browser: how they are found, reached and ended."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jupyter_client import AsyncKernelManager
from traitlets.config import Config

_PATIENCE = 2.0
"""Seconds that a kernel is given to end by itself; an idle one takes a fraction of a second."""


class PatientKernelManager(AsyncKernelManager):
    """Asks a kernel to end before it interrupts it.

    jupyter_client interrupts first. The kernel may then still be at the end of its last answer, which it has sent
    already, and says on the terminal that it was interrupted: an error message where nothing went wrong. A kernel that
    is busy (a cell was given up) does not end when asked, and is interrupted as ever.
    """

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]
        """End the kernel: by request, then by interrupt, then by force."""
        if self.has_kernel and not now:
            self.shutting_down = True
            await self.request_shutdown(restart)
            end = asyncio.get_running_loop().time() + _PATIENCE
            while await self.is_alive() and asyncio.get_running_loop().time() < end:
                await asyncio.sleep(0.02)
        await super().shutdown_kernel(now=now, restart=restart)


@contextmanager
def surroundings() -> Iterator[None]:
    """Kernels import this very package, and are those of this environment, not of the user's home."""
    package_home = str(Path(__file__).resolve().parents[2])
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "JUPYTER_PREFER_ENV_PATH")}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package_home, before["PYTHONPATH"]]))
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def options(sockets: str) -> dict:
    """Of a notebook client: its manager, and sockets in a folder of the run's own.

    No two kernels ever race for a port, and the path stays short.
    """
    wanted = {
        "kernel_name": "python3",
        "kernel_manager_class": PatientKernelManager,
        "store_widget_state": False,
    }
    if os.name == "nt":
        return wanted
    place = os.path.join(sockets, "kernel.json")
    return wanted | {"config": Config({"KernelManager": {"transport": "ipc", "connection_file": place}})}
