"""Errors that say what was expected, what was found, and how to fix it; settings are checked here, before work."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

__all__ = [
    "CellopError",
    "CheckpointError",
    "DataError",
    "HoldoutError",
    "LabelError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "SetupError",
    "StorageError",
]


class CellopError(ValueError):
    """Base class of every error that the package raises on bad input: what was expected, what was found, how to fix it.

    One argument alone is a sentence that has the three beats already.
    """

    def __init__(self, expected: str, found: str | None = None, fix: str = "") -> None:
        super().__init__(expected if found is None else three_beats(expected, found, fix))


class DataError(CellopError):
    """The AnnData object does not hold what the call needs (counts, cells, genes, files)."""


class LabelError(CellopError, KeyError):
    """A column, category, parameter or option name is not known."""

    # KeyError prints the repr of its argument; a person wants the sentence.
    __str__ = ValueError.__str__


class HoldoutError(CellopError):
    """A hold-out matches nothing, leaks into training, or leaves too few cells."""


class ModelError(CellopError):
    """A model was asked for something that it cannot know or do."""


class CheckpointError(CellopError):
    """A saved file is damaged, of another version, or made for other genes or keys."""


class SetupError(CellopError):
    """The environment could not be made, lacks packages, or has packages that are too old."""


class MissingExtraError(CellopError, ImportError):
    """A function needs a package that one of the extras brings."""


class StorageError(CellopError, OSError):
    """A file could not be written: no room, no permission, no such folder."""


class NonFiniteError(CellopError):
    """A loss term, a gradient or a parameter is NaN or infinite.

    Attributes
    ----------
    stage
        Which check found it: `loss` (before backward), `gradient` (after it), `parameter` (after the step).
    epoch, step
        When, both counted from 0.
    tensor
        The loss term, parameter or input that is not finite.
    origin
        :class:`~cellop_nb.training.locate.Origin`: operation, source line, ranges of its inputs; None where a
        second run of the same batch was finite.
    cells, genes, groups
        Names of those involved, as far as they are known.
    terms
        The loss terms.
    reproducer
        File for :func:`~cellop_nb.training.guard.replay`, or None.
    """

    stage: str
    epoch: int
    step: int
    tensor: str | None = None
    origin: Any = None
    cells: Sequence[str] = ()
    genes: Sequence[str] = ()
    groups: Sequence[str] = ()
    terms: Mapping[str, float] = MappingProxyType({})
    reproducer: Path | None = None

    @property
    def module(self) -> str | None:
        """Module that first gave a non-finite value; None where the data did, or a loss function outside of all."""
        return self.origin.module if self.origin is not None else None


def three_beats(expected: str, found: str, fix: str) -> str:
    """Join the three beats of an error message: expected, found, how to fix it."""
    beats = {"Expected": expected, "Found": found, "To fix it:": fix}
    return " ".join(
        f"{word} {beat}" if beat.endswith((".", "?")) else f"{word} {beat}." for word, beat in beats.items()
    )


def did_you_mean(name: object, options: Iterable[object]) -> str:
    """Close matches of `name` among `options` as a phrase, or the first options where none is close."""
    names = [str(option) for option in options]
    by_lower = {option.lower(): option for option in names}
    close = [by_lower[match] for match in get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.6)]
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    shown = ", ".join(repr(option) for option in names[:8])
    return f"known: {shown}{', ...' if len(names) > 8 else ''}" if names else "there are none"


_OTHER_WORDS = {"learning_rate": "lr", "epochs": "max_epochs", "latent_dim": "n_latent", "beta": "kl_weight"}
"""What other programs call some of our settings."""


def _unknown(name: str, options: list[str], owner: str) -> LabelError:
    likely = _OTHER_WORDS.get(name)
    hint = did_you_mean(likely if likely in options else name, options)
    fix = hint if hint.startswith("did you mean") else "use one of these, or leave it out"
    return LabelError(f"a setting of {owner}: {', '.join(options)}", repr(name), fix)


@dataclass(frozen=True)
class _Numbers:
    """The numbers that a setting may be."""

    low: float
    high: float = math.inf
    whole: bool = True
    above: bool = False  # whether the lower end itself is left out
    finite: bool = True

    def __contains__(self, value: object) -> bool:
        kind = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind) or (self.finite and math.isinf(value)):
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high  # type: ignore[operator]

    def __str__(self) -> str:
        start = "a whole number" if self.whole else "a number"
        end = "" if math.isinf(self.high) else f" and at most {self.high:,}"
        return f"{start} {'above' if self.above else 'of at least'} {self.low:g}{end}"


_POSITIVE, _WEIGHT = _Numbers(0, whole=False, above=True), _Numbers(0, whole=False)
_VALUES = {
    # sizes; one latent dimension has no axes to rotate into each other
    "n_latent": _Numbers(2), "n_hidden": _Numbers(1), "n_layers": _Numbers(1),
    "dropout": _Numbers(0, 0.99, whole=False),
    "n_axes": _Numbers(1), "rank": _Numbers(0), "context_rank": _Numbers(0),
    # training
    "max_epochs": _Numbers(1), "steps_per_epoch": _Numbers(1), "warmup_epochs": _Numbers(0),
    "batch_size": _Numbers(1), "cells_per_group": _Numbers(2), "patience": _Numbers(1),
    "lr": _POSITIVE,
    "weight_decay": _WEIGHT, "kl_weight": _WEIGHT, "ridge": _WEIGHT, "context_ridge": _WEIGHT,
    "stability_weight": _WEIGHT, "max_norm": _POSITIVE,
    "clip_norm": _Numbers(0, whole=False, above=True, finite=False),  # infinity: never clipped
    # several draws of one call are seeded by numbers made from it
    "seed": _Numbers(0, 2**32 - 1),
    "num_nodes": _Numbers(1),
    # what is looked at, and how often it is drawn
    "n_genes": _Numbers(2), "n_members": _Numbers(1), "min_cells": _Numbers(0), "max_cells": _Numbers(2),
    "n_seeds": _Numbers(1),
    "min_genes": _Numbers(1), "n_components": _Numbers(1), "n_top": _Numbers(1), "max_pairs": _Numbers(1),
    "n_permutations": _Numbers(1), "alpha": _Numbers(0, 1, whole=False, above=True),
    "min_delta": _WEIGHT, "pseudocount": _WEIGHT, "tile": _Numbers(1),
    # a synthetic screen
    "library": _POSITIVE, "batch_effect": _WEIGHT, "context_deviation": _WEIGHT,
}  # fmt: skip
"""What a setting of a name may be, wherever it stands."""


def counted(number: int, thing: str) -> str:
    """A number and what it counts: ``1 cell``, ``2,000 cells``."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def check_values(settings: dict[str, object]) -> None:
    """Refuse the first setting whose value cannot be; None, where a default is chosen, and other names pass."""
    for name, value in settings.items():
        if value is not None and name in _VALUES and value not in _VALUES[name]:
            problem = f"{name}={value!r}"
            raise ModelError(f"{name} to be {_VALUES[name]}", problem, "give such a number")


def checked(call: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a public function or ``__init__``: names and values of its settings are checked before it runs."""
    parameters = inspect.signature(call).parameters
    never_none = {
        p.name for p in parameters.values() if p.name in _VALUES and "None" not in str(p.annotation)
    }
    keywords = [p.name for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    named = [*parameters]
    owner = call.__qualname__.removesuffix(".__init__")

    @functools.wraps(call)
    def wrapper(*args: P.args, **settings: P.kwargs) -> R:
        for name in settings.keys() - {*named}:
            raise _unknown(name, keywords, owner)
        values = dict(zip(named, args, strict=False)) | settings
        for name in values:
            if values[name] is None and name in never_none:
                raise ModelError(
                    f"{name} to be {_VALUES[name]}", f"{name}=None", "leave it out for the default"
                )
        check_values(values)
        return call(*args, **settings)

    return wrapper
