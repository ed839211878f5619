"""Errors that say what was expected, what was found, and how to fix it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CellopError(ValueError):
    """Base class of every error that the package raises on bad input."""


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


class StorageError(CellopError, OSError):
    """A file could not be written: no room, no permission, no such folder."""


def three_beats(expected: str, found: str, fix: str) -> str:
    """Join the three beats of an error message: expected, found, how to fix it."""
    beats = {"Expected": expected, "Found": found, "To fix it:": fix}
    return " ".join(
        f"{word} {beat}" if beat.endswith((".", "?")) else f"{word} {beat}." for word, beat in beats.items()
    )


def did_you_mean(name: object, options: Iterable[object]) -> str:
    """Close matches of `name` among `options` as a phrase, or the first options where none is close."""
    known = [str(option) for option in options]
    by_lower = {option.lower(): option for option in known}
    close = [by_lower[match] for match in get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.6)]
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    shown = ", ".join(repr(option) for option in known[:8])
    return f"known: {shown}{', ...' if len(known) > 8 else ''}" if known else "there are none"
