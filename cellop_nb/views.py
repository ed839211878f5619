"""How an object shows itself at the end of a cell: a small table of facts. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_MANY, _LEFT = 6, 'style="text-align:left"'


def card(title: str, facts: Mapping[str, object], *, note: str = "") -> str:
    """A title, facts as rows, and a note, as HTML; every word is escaped, since labels come from data.

    Colours are those of the page, so that the card is as readable in a dark theme as in a light one.

    Parameters
    ----------
    title
        What the object is.
    facts
        Name of a fact to its value; None is left out. A list shows its first six items and how many there are.
    note
        A sentence below.

    Returns
    -------
    str
        HTML.
    """
    rows = "".join(
        f'<tr><th scope="row" {_LEFT}>{escape(name)}</th><td {_LEFT}>{_said(value)}</td></tr>'
        for name, value in facts.items()
        if value is not None
    )
    below = f"<div>{escape(note)}</div>" if note else ""
    return f"<div><strong>{escape(title)}</strong><table><tbody>{rows}</tbody></table>{below}</div>"


def grid(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table with a head, as HTML; every word is escaped.

    Parameters
    ----------
    head
        Names of the columns.
    rows
        Values of each row; numbers are written with four digits.

    Returns
    -------
    str
        HTML.
    """
    cell = 'style="text-align:left;padding:2px 16px 2px 0;line-height:1.4"'
    names = "".join(f'<th scope="col" {cell}>{escape(str(name))}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td {cell}>{_said(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def _said(value: object) -> str:
    if isinstance(value, (list, tuple)):
        more = f", ... ({len(value)} in all)" if len(value) > _MANY else ""
        return escape(", ".join(map(str, value[:_MANY])) + more)
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
