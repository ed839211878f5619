"""What a person sees, and the page of the docs that shows it."""

from __future__ import annotations

import contextlib
import io
import re

from cellop_nb.errors import CellopError

from .cases import Case, Place


def message(one: Case, place: Place) -> str:
    """Do it, and return what a person reads: the error's text, or what the command line complains."""
    folder, complaint = place.folder, io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            code = one.do(place)
    except CellopError as error:
        assert one.code is None, f"a traceback on the command line: {error}"
        text = str(error)
    else:
        assert one.code is not None, "nothing was refused"
        assert code == one.code, f"exit code {code}: {complaint.getvalue()}"
        text = complaint.getvalue().strip()
    text = re.sub(
        r"runs/\d{4}-[\d_-]+", "runs/2026-01-31_12-00-00", text.replace(str(folder), "/home/you/work")
    )
    return re.sub(r"\b(tests\.)?bad_inputs\.(\w+\.)?", "", text)


def page(messages: dict[str, list[tuple[str, str]]]) -> str:
    """The catalogue as a page."""
    head = (
        "# Errors, and how to fix them\n\n"
        "Bad input is refused before anything is computed or written, with an error that says what was expected, "
        "what was found,\nand how to fix it. These are the messages as a person sees them; a test does each of "
        "these things wrong and compares.\n"
    )
    parts = [head]
    for area, rows in messages.items():
        parts.append(f"\n## {area}\n")
        for title, text in rows:
            lines = "\n".join(f"> {line}" if line else ">" for line in escape(text).splitlines())
            parts.append(f"\n**{escape(title[0].upper() + title[1:])}**\n\n{lines}\n")
    return "".join(parts)


def escape(text: str) -> str:
    for mark in "\\`*_[]<>#$|":
        text = text.replace(mark, "\\" + mark)
    return text
