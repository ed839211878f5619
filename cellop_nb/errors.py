"""Errors that say what was expected, what was found, and how to fix it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
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
    names = [str(option) for option in options]
    by_lower = {option.lower(): option for option in names}
    close = [by_lower[match] for match in get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.6)]
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    shown = ", ".join(repr(option) for option in names[:8])
    return f"known: {shown}{', ...' if len(names) > 8 else ''}" if names else "there are none"


_OTHER_WORDS = {"learning_rate": "lr", "epochs": "max_epochs", "latent_dim": "n_latent", "beta": "kl_weight"}
"""What other programs call some of our settings."""


def check_settings(names: Iterable[str], *receivers: Callable, of: str, taken: Iterable[str] = ()) -> None:
    """Refuse the first of `names` that is no argument of a receiver.

    Parameters
    ----------
    names
        Names, or a mapping from names to values.
    receivers
        Functions, or classes with all that their bases take too.
    of
        What is set, for the message.
    taken
        Arguments that the caller fills in itself.

    Raises
    ------
    LabelError
        With the known names, and the nearest of them.
    """
    options = sorted(set().union(*map(_arguments, receivers)) - set(taken))
    for name in names:
        if name in options:
            continue
        likely = _OTHER_WORDS.get(name)
        hint = did_you_mean(likely if likely in options else name, options)
        fix = hint if hint.startswith("did you mean") else "use one of these, or leave it out"
        raise LabelError(three_beats(f"a setting of {of}: {', '.join(options)}", repr(name), fix))


def _arguments(receiver: Callable) -> set[str]:
    """Names that may be passed by keyword."""
    classes = receiver.__mro__[:-1] if inspect.isclass(receiver) else ()
    functions = [vars(one)["__init__"] for one in classes if "__init__" in vars(one)] or [receiver]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    arguments = {
        p.name for f in functions for p in inspect.signature(f).parameters.values() if p.kind in named
    }
    return arguments - {"self"}
