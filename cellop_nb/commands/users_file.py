"""The user's file, looked at before the first kernel starts: where it is, its keys, its counts."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from cellop_nb.errors import DataError, did_you_mean, three_beats

KEYS = ("perturbation_key", "context_key", "control", "layer")


def locate(data: str) -> str:
    """The absolute path where `data` is one: kernels work in the run folder, the caller elsewhere."""
    path = Path(data).expanduser()
    if path.exists():
        return str(path.resolve())
    if path.suffix in {".h5ad", ".h5", ".zarr"} or os.sep in data:
        near = [other.name for other in path.parent.glob("*") if other.suffix in {".h5ad", ".zarr"}]
        fix = did_you_mean(path.name, near) if near else "a relative path starts in the current folder"
        raise DataError(three_beats("an AnnData file", f"no file {path}", fix))
    return data


def check_data(values: dict[str, dict[str, Any]]) -> None:
    """Look at the user's file before the first kernel starts: a wrong key shows now, not a minute later."""
    asked = next((v for v in values.values() if Path(v.get("data", "")).suffix == ".h5ad"), None)
    if asked is None:
        return
    import cellop_nb

    adata = cellop_nb.datasets.load(asked["data"], backed=True)
    try:
        cellop_nb.setup(adata, **{key: asked[key] for key in KEYS if key in asked})
    except DataError as refusal:
        raise DataError(f"{refusal}{_counts_in_raw(Path(asked['data']))}") from None


def _counts_in_raw(path: Path) -> str:
    """The command that takes the counts from the raw slot, which no option reaches, where they lie there."""
    import h5py

    with h5py.File(path) as file:
        slot = file.get("raw/X")
        part = None if slot is None else (slot["data"] if isinstance(slot, h5py.Group) else slot)[:1000]
    if part is None or part.size == 0 or (part < 0).any() or (part % 1 != 0).any():
        return ""
    new = path.with_name(f"{path.stem}_counts.h5ad")
    lines = f"import anndata; anndata.read_h5ad({str(path)!r}).raw.to_adata().write_h5ad({str(new)!r})"
    quoted = shlex.quote(lines) if set(lines) & set('"$`\\!') else f'"{lines}"'  # the latter reads better
    command = f"{shlex.quote(sys.executable)} -c {quoted}"
    return (
        f" The raw slot has whole numbers; this writes them to a file of their own, for --data: `{command}`."
    )
