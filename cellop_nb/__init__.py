"""Learn what a perturbation does: affine operators in the latent space of single-cell counts.

Names are loaded on first use, so that importing the package takes milliseconds; they stand in ``__init__.pyi``.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"


def _read_names() -> tuple[dict[str, str], set[str]]:
    """Public name to the module that defines it, or that it is; and the names that are modules."""
    public, modules = {}, set()
    with open(f"{__file__}i", encoding="utf-8") as stub:
        for line in stub:
            if not line.startswith("from ."):
                continue
            module, _, name = line[6:].split(" as ")[0].partition(" import ")
            public[name] = module
            if "." not in module:  # a room, or the package itself: the name is one of its modules
                public[name] = f"{module}.{name}".lstrip(".")
                modules.add(name)
    return public, modules


_PUBLIC, _MODULES = _read_names()

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .packages import refuse_outdated_once

    refuse_outdated_once()
    module = import_module(f"{__name__}.{_PUBLIC[name]}")
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
