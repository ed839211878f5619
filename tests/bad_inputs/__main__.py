"""Write the page of the docs: `python -m tests.bad_inputs docs/errors.md`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from . import CASES, Place, message, page

found: dict[str, list[tuple[str, str]]] = {}
for one in CASES:
    with tempfile.TemporaryDirectory() as folder:
        found.setdefault(one.area, []).append((one.title, message(one, Place(Path(folder).resolve()))))
Path(sys.argv[1]).write_text(page(found), encoding="utf-8")
