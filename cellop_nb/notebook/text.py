"""Sentences and tables of a notebook that show labels from data."""

from __future__ import annotations

from html import escape


def markdown(text: str):
    """Markdown for the end of a cell; markup of HTML in it, as a label may hold, shows as text.

    Parameters
    ----------
    text
        Markdown. Names from data may be put into it as they are: ``<`` and ``&`` begin no HTML.

    Returns
    -------
    `IPython.display.Markdown`
    """
    from IPython.display import Markdown

    return Markdown(text.replace("&", "&amp;").replace("<", "&lt;"))


def styled(
    frame,
    *,
    caption: str = "",
    form: str | dict[str, str] | None = None,
    precision: int | None = None,
    missing: str | None = None,
    index: bool = True,
):
    """A table for the end of a cell; markup of HTML in its labels and values shows as text.

    Parameters
    ----------
    frame
        A DataFrame; pandas' own `style` would write its labels into the page as they are.
    caption
        Sentence above the table.
    form, precision
        How numbers are written: a format such as ``"{:.1%}"``, one for each column, or a number of decimals.
    missing
        What stands for a missing value.
    index
        Whether to show the row labels.

    Returns
    -------
    `pandas.io.formats.style.Styler`
    """
    shown = frame.style.format(form, precision=precision, na_rep=missing, escape="html")
    shown = shown.format_index(escape="html").format_index(escape="html", axis="columns")
    shown = shown if index else shown.hide(axis="index")
    return shown.set_caption(escape(caption)) if caption else shown
