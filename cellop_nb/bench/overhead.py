"""What watching a training costs: the non-finite guard's share of a step, and the live picture's of a fit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

from ..notebook.live import LivePlot
from ..training.guard import NonFiniteGuard
from ..training.loop import Trainer


class _Timed:
    """A guard whose calls are timed."""

    def __init__(self, guard) -> None:
        self._guard, self.seconds = guard, 0.0

    def __getattr__(self, name: str):
        function = getattr(self._guard, name)

        def call(*args):
            start = time.process_time()
            try:
                return function(*args)
            finally:
                self.seconds += time.process_time() - start

        return call


def guard_share(trainer: Trainer, steps: int = 200) -> dict[str, float | None]:
    """CPU seconds inside the guard's calls, and of a step without them.

    The difference of two runs, with and without guard, would drown in the noise of a busy machine: the calls
    themselves are timed. What they wait for is theirs.

    Returns
    -------
    ``cpu_seconds`` of a step without the guard, ``guard_seconds``, and ``share``, their ratio.
    """
    trainer.model.train()
    _steps(trainer, min(5, steps))
    own, trainer.guard = trainer.guard, cast(NonFiniteGuard, _Timed(trainer.guard))
    start = time.process_time()
    _steps(trainer, steps)
    total, inside = time.process_time() - start, trainer.guard.seconds  # type: ignore[attr-defined]
    trainer.guard = own
    step, guard = (total - inside) / steps, inside / steps
    return {"cpu_seconds": step, "guard_seconds": guard, "share": guard / step, "note": None}


def _steps(trainer: Trainer, steps: int) -> None:
    done = 0
    while done < steps:
        for batch in trainer.batches():
            trainer._run_step(batch)
            trainer.step, done = trainer.step + 1, done + 1
            if done >= steps:
                break


def live_share(make: Callable[..., Trainer], *args) -> dict[str, float | None]:
    """Share of a fit's seconds that drawing its picture took, the first and the last one included.

    Parameters
    ----------
    make
        ``make(*args, callbacks)`` gives the trainer.
    """
    picture = LivePlot(publish=lambda png: None)
    trainer = make(*args, (picture,))
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start
    return {
        "fit_seconds": seconds,
        "seconds": picture.cost_seconds,
        "pictures": picture.n_drawn,
        "share": picture.cost_seconds / seconds,
        "note": None,
    }
