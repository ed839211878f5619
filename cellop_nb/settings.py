"""Settings that are passed on by name: one that no receiver knows is refused before anything is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

from .errors import LabelError, did_you_mean, three_beats

_OTHER_WORDS = {"learning_rate": "lr", "epochs": "max_epochs", "latent_dim": "n_latent", "beta": "kl_weight"}
"""What other programs call some of our settings."""


def check_settings(given: Iterable[str], *receivers: Callable, of: str, taken: Iterable[str] = ()) -> None:
    """Refuse the first name in `given` that is no argument of a receiver.

    Parameters
    ----------
    given
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
    known = sorted(set().union(*map(_arguments, receivers)) - set(taken))
    for name in given:
        if name in known:
            continue
        likely = _OTHER_WORDS.get(name)
        hint = did_you_mean(likely if likely in known else name, known)
        fix = hint if hint.startswith("did you mean") else "use one of these, or leave it out"
        raise LabelError(three_beats(f"a setting of {of}: {', '.join(known)}", repr(name), fix))


def _arguments(receiver: Callable) -> set[str]:
    """Names that may be passed by keyword."""
    classes = receiver.__mro__[:-1] if inspect.isclass(receiver) else ()
    functions = [vars(one)["__init__"] for one in classes if "__init__" in vars(one)] or [receiver]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {p.name for f in functions for p in inspect.signature(f).parameters.values() if p.kind in named}
    return found - {"self"}
