"""A GPU under measurement: its limits, seconds of a call with all that it started, and how often the host waits."""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from ..errors import ModelError, three_beats


class Card:
    """What a device can do at best, and what a call takes there.

    Parameters
    ----------
    device
        A CUDA device; a CPU stands in for one in tests, without a count of waits and of busy time.

    Raises
    ------
    ModelError
        If there is no such device.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.device, self.is_gpu = torch.device(device), device.startswith("cuda")
        if self.is_gpu and not torch.cuda.is_available():
            fix = "run this section where torch.cuda.is_available()"
            raise ModelError(three_beats("a CUDA device", "none on this machine", fix))

    @property
    def name(self) -> str:
        """Of the device, as its driver tells it."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else "CPU"

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], *, least: float = 0.1, turns: int = 5) -> float:
        """Median seconds of a call and all that it started on the device, after some that warm up.

        A turn makes the call until `least` seconds are over, and waits once, at its end.
        """
        for _ in range(3):
            once = self._turn(call, 1)
        times = max(1, round(least / max(once, 1e-6)))
        return statistics.median(self._turn(call, times) / times for _ in range(turns))

    def _turn(self, call: Callable[[], object], times: int) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return time.perf_counter() - start

    def busy(self, call: Callable[[], object], times: int = 20) -> float | None:
        """Seconds of a call in which the device computes or copies, by its own clock."""
        if not self.is_gpu:
            return None
        from torch.profiler import ProfilerActivity, profile

        call()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(times):
                call()
            self.wait()
        return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6 / times

    def waits(self, call: Callable[[], object], times: int = 20) -> int | None:
        """How often the host waits for the device in so many calls."""
        if not self.is_gpu:
            return None
        self.wait()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(times):
                    call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in found)

    def extra_mb(self, call: Callable[[], object]) -> float | None:
        """Peak memory of the device above what is held, in MB."""
        if not self.is_gpu:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.wait()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    # -- limits ------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019 (a card lives as long as the process)
    def product_rate(
        self, rows: int, inner: int, columns: int, groups: int = 1, dtype: torch.dtype = torch.float32
    ) -> float:
        """Operations per second of products (rows x inner) (inner x columns), so many at once."""
        a = torch.randn(groups, rows, inner, device=self.device).to(dtype)
        b = torch.randn(groups, inner, columns, device=self.device).to(dtype)
        out = torch.empty(groups, rows, columns, dtype=dtype, device=self.device)
        seconds = self.seconds(lambda: torch.bmm(a, b, out=out), least=0.02)
        return 2.0 * groups * rows * inner * columns / seconds

    @functools.cache  # noqa: B019
    def bandwidth(self, mbyte: int = 1024) -> float:
        """Bytes read and written per second by a copy within the device's memory."""
        source = torch.ones(mbyte << 18, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * source.nbytes / self.seconds(lambda: target.copy_(source), least=0.02)

    @functools.cache  # noqa: B019
    def call_seconds(self) -> float:
        """Seconds of one call on a handful of numbers: what every call costs beside its arithmetic."""
        small = torch.ones(8, device=self.device)
        out = torch.empty_like(small)
        return self.seconds(lambda: torch.add(small, small, out=out), least=0.02)

    def limits(self, size: int = 8192) -> dict[str, float]:
        """The limits, for the file of a run."""
        rates = {
            f"gpu_{name}_gflops": self.product_rate(size, size, size, dtype=dtype) / 1e9
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64))
        }
        return rates | {
            "gpu_bandwidth_gb_s": self.bandwidth() / 1e9,
            "gpu_call_us": self.call_seconds() * 1e6,
        }
