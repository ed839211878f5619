"""What watching a training costs: the non-finite guard's share of a step, and the live picture's of a fit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import cast

from ..notebook.live import LivePlot
from ..training.guard import NonFiniteGuard
from ..training.loop import Trainer
from .count import Counts, counts
from .limits import bandwidth, compared

GUARD = (
    "the random state copied before each step, so that a faulty one can be made again, loss terms and norm read into "
    "Python one by one, and Python itself"
)
LIVE = (
    "the panels are made once, and fonts and letters rendered once, which a drawing of the same picture finds ready; the "
    "line of words before the first epoch"
)


class _Watched:
    """A guard whose calls are timed, and counted where wanted."""

    def __init__(self, guard, *, count: bool = False) -> None:
        self._guard, self._count = guard, count
        self.seconds, self.made = 0.0, Counts()

    def __getattr__(self, name: str):
        function = getattr(self._guard, name)

        def call(*args):
            results = []
            start = time.process_time()
            try:
                if self._count:
                    self.made += counts(lambda: results.append(function(*args)))
                else:
                    results.append(function(*args))
            finally:
                self.seconds += time.process_time() - start
            return results[0]

        return call


def guard_share(trainer: Trainer, steps: int = 200) -> dict:
    """CPU seconds inside the guard's calls, and of a step without them.

    The difference of two runs, with and without guard, would drown in the noise of a busy machine: the calls
    themselves are timed. What they wait for is theirs.

    Returns
    -------
    ``cpu_seconds`` of a step without the guard, ``guard_seconds``, ``share``, their ratio, and the bound of the
    guard's seconds: the traffic with memory that its looks at the parameters and its copies take.
    """
    trainer.model.train()
    _steps(trainer, min(5, steps))
    own = trainer.guard
    start = time.process_time()
    inside = _watched(trainer, steps).seconds
    total = time.process_time() - start
    made = _watched(trainer, steps, count=True).made.per(steps)
    step, guard = (total - inside) / steps, inside / steps
    row = {"cpu_seconds": step, "guard_seconds": guard, "share": guard / step, "note": None}
    return row | compared(guard, memory=_guard_bytes(own) / bandwidth(), made=made, between=GUARD)


def _watched(trainer: Trainer, steps: int, *, count: bool = False) -> _Watched:
    """The watch of so many steps."""
    own, watch = trainer.guard, _Watched(trainer.guard, count=count)
    trainer.guard = cast(NonFiniteGuard, watch)
    _steps(trainer, steps)
    trainer.guard = own
    return watch


def _guard_bytes(guard: NonFiniteGuard) -> float:
    """Bytes of a step: each parameter is read now and then, and seldom it and its two moments are read and copied."""
    size = sum(parameter.nbytes for parameter in guard.model.parameters())
    return size / guard.check_every + 3 * 3 * size / guard.snapshot_every


def _steps(trainer: Trainer, steps: int) -> None:
    done = 0
    while done < steps:
        for batch in trainer.batches():
            trainer._run_step(batch)
            trainer.step, done = trainer.step + 1, done + 1
            if done >= steps:
                break


def live_share(make: Callable[..., Trainer], *args) -> dict:
    """Share of a fit's seconds that drawing its picture took, the first and the last one included.

    Parameters
    ----------
    make
        ``make(*args, callbacks)`` gives the trainer.

    Returns
    -------
    ``fit_seconds``, ``seconds`` of all pictures, ``pictures``, ``share``, and as bound the seconds that it takes to
    draw the last picture so many times again.
    """
    picture = LivePlot(publish=lambda png: None)
    trainer = make(*args, (picture,))
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start
    taken, again = picture.cost_seconds, _drawing(picture)
    row: dict = {
        "fit_seconds": seconds,
        "seconds": taken,
        "pictures": picture.n_drawn,
        "share": taken / seconds,
    }
    row |= {"bound_seconds": again, "bound": "drawing", "distance": taken / again, "note": None}
    return row | ({"between": LIVE} if taken > 2 * again else {})


def _drawing(picture: LivePlot) -> float:
    """Seconds to draw the pictures of a fit again: every artist, and the PNG; nothing is made or looked up."""
    board = picture._board
    assert board is not None

    def seconds(small: bool) -> float:
        taken = []
        for _ in range(5):
            board.sheet.stale = True
            start = time.perf_counter()
            board.png(small=small)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    return (picture.n_drawn - 1) * seconds(False) + seconds(True)
