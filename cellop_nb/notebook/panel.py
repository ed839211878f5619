"""What the panels share: buttons with words, lines that are read aloud, colours of either theme."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

_ARROW = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 18 18'>"
    "<path d='M5 7 L9 11 L13 7' fill='none' stroke='%23808080' stroke-width='2'/></svg>"
)
_LOOK = (
    f"""<style>.cellop-panel {{ --jp-widgets-dropdown-arrow: url("data:image/svg+xml,{_ARROW}"); }}</style>"""
)


def panel(children: Sequence):
    """The parts of a panel below each other.

    The arrow of a drop-down list is grey: that of ipywidgets is black in a dark theme too.
    """
    from ipywidgets import HTML, Layout, VBox

    box = VBox([*children, HTML(_LOOK, layout=Layout(display="none"))])
    box.add_class("cellop-panel")
    return box


def spoken(widget, words: str, **kwargs) -> dict | tuple:
    """MIME bundle of a widget whose text, all that a file or a printed page shows of it, is `words`."""
    bundle = widget._repr_mimebundle_(**kwargs)
    data, *rest = bundle if isinstance(bundle, tuple) else (bundle,)
    data = {**data, "text/plain": words}
    return (data, *rest) if rest else data


def status_line(text: str) -> str:
    """HTML of words that a screen reader reads out when they change."""
    return f'<div role="status" style="line-height:1.4">{html.escape(text)}</div>'


def button(description: str, tooltip: str, action: Callable[[], object]):
    """A button with words, and more words for who points at it."""
    from ipywidgets import Button, Layout

    button = Button(description=description, tooltip=tooltip, layout=Layout(width="auto"))
    button.on_click(lambda _: action())
    return button


def words(name: str) -> str:
    """A setting's name for people; letters that HTML would read as markup are escaped."""
    return html.escape(name.replace("_", " "))
