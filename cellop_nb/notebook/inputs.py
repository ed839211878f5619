"""Widgets of typed parameters: range, choices and help come from the definition, nothing is written here."""

from __future__ import annotations

from .panel import words
from .parameters import Parameter


def widget_for(parameter: Parameter, value: object = None):
    """The widget of a typed parameter: its range, its choices, its help; it starts at `value` or at the default."""
    import ipywidgets as w

    value = parameter.default if value is None else parameter.check(value)
    look = {
        "description": words(parameter.name),
        "tooltip": parameter.comment,
        "style": {"description_width": "140px"},
    }
    look["layout"] = w.Layout(width="300px", flex="0 0 auto")
    if parameter.choices:
        return w.Dropdown(options=list(parameter.choices), value=value, **look)
    if parameter.type == "bool":
        return w.Checkbox(value=value, **look)
    if parameter.type not in ("int", "float"):
        return w.Text(value=shown_value(parameter, value), **look)
    low = -(2**31) if parameter.minimum is None else parameter.minimum
    high = 2**31 if parameter.maximum is None else parameter.maximum
    if parameter.type == "int":
        return w.BoundedIntText(value=value, min=int(low), max=int(high), **look)
    return w.BoundedFloatText(
        value=value, min=float(low), max=float(high), step=abs(parameter.default) / 10 or 0.1, **look
    )


def shown_value(parameter: Parameter, value: object) -> object:
    """A value as its widget holds it: what has no widget of its own is text."""
    if parameter.choices or parameter.type in ("bool", "int", "float"):
        return value
    return "none" if value is None else str(value)


def read_value(parameter: Parameter, widget) -> object:
    """The value that a widget holds, checked.

    Raises
    ------
    ParameterError
        For a value that does not fit.
    """
    value = widget.value
    return (
        parameter.parse(value) if isinstance(value, str) and not parameter.choices else parameter.check(value)
    )
