"""What was changed by hand during a training, and where that lies on the axis of epochs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_WORDS = re.compile(r"(\S+) (\S+) after step \d+")


@dataclass(frozen=True)
class Change:
    """One mark: `at`, the epochs done until then (parts of one count), and the setting's new value."""

    at: float
    name: str
    value: float | str

    @property
    def words(self) -> str:
        """The change as it is written beside its mark."""
        if isinstance(self.value, str):
            return self.value
        return f"{self.name.replace('_', ' ')} {self.value:.3g}"


def of_trainer(trainer: object) -> list[Change]:
    """What `trainer.changes` records, at its steps."""
    made = getattr(trainer, "changes", None) or []
    per_epoch = getattr(trainer, "steps_per_epoch", None)
    steps = per_epoch() if made and callable(per_epoch) else 0
    return joined(
        Change(c["step"] / steps if steps else c["epoch"] + 0.5, c["name"], c["value"]) for c in made
    )


def of_history(rows: Sequence[Mapping[str, object]]) -> list[Change]:
    """What the history's column `by_hand` tells; it knows the epoch, not where in it."""
    return joined(
        Change(float(row.get("epoch", i)) + 0.5, name, float(value))
        for i, row in enumerate(rows)
        for name, value in _WORDS.findall(str(row.get("by_hand", "")))
    )


def joined(changes: Iterable[Change]) -> list[Change]:
    """Presses that follow each other within half an epoch are one change, to the last value."""
    kept: list[Change] = []
    for change in changes:
        if kept and kept[-1].name == change.name and change.at - kept[-1].at <= 0.5:
            kept.pop()
        kept.append(change)
    return kept
