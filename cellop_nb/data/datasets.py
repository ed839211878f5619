"""Data sets by name: the synthetic example, files of your own, and public screens through a checked cache.

Exported as ``cellop_nb.datasets``.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import anndata
import h5py
import pandas as pd
from anndata import AnnData

from ..errors import DataError, did_you_mean
from ..files import read_json, write_whole
from .on_disk import open_lazily, readable
from .synthetic import EXAMPLE, planted_operator, planted_proportions, synthetic

__all__ = ["cache_folder", "fetch", "list", "load", "planted_operator", "planted_proportions", "synthetic"]

logger = logging.getLogger("cellop_nb")

EXAMPLE_NAME = "synthetic_screen"
_RECORD = "checksums.json"


def load(
    name_or_path: str | os.PathLike = EXAMPLE_NAME, *, backed: bool = False, progress: bool = True
) -> AnnData:
    """A screen by name, or from a file.

    Parameters
    ----------
    name_or_path
        "synthetic_screen" (the example with known operators), a name of :func:`list`, "scperturb/NAME", or a
        path to `.h5ad` or `.zarr`.
    backed
        Leave the matrices (`X`, `layers`) on disk, for data larger than memory: training, embedding and
        prediction then read them in parts (:func:`cellop_nb.data.on_disk.open_lazily`).
    progress
        Show a progress bar while downloading.

    Returns
    -------
    AnnData
        A file as it is; a public screen with its columns named as in the contract (`perturbation`,
        `cell_type`, `donor`, `dose`, control cells "control", combinations "A+B"), where they came from in
        `uns["cellop_nb"]["source"]`. Run :func:`cellop_nb.setup` on it.

    Raises
    ------
    DataError
        If the name or file is unknown, the download fails, or a file differs from the first download.
    """
    if str(name_or_path) == EXAMPLE_NAME:
        path = example_path()
        return synthetic(**EXAMPLE) if path is None else _read(path, backed)
    screen = find(str(name_or_path))
    if screen is not None:
        return to_contract(_read(fetch(screen, progress=progress), backed), screen)
    path = Path(name_or_path)
    if not path.exists():
        hint = did_you_mean(name_or_path, [EXAMPLE_NAME, *(screen.name for screen in SCREENS)])
        fix = f"check the path, or give a name of cellop_nb.datasets.list() ({hint})"
        raise DataError("a file or the name of a data set", f"neither at {str(path)!r}", fix)
    return _read(path, backed)


def find(name: str) -> Screen | None:
    """The catalogue's screen of that name, or any file of scPerturb as "scperturb/NAME"."""
    for screen in SCREENS:
        if screen.name == name:
            return screen
    prefix, _, file = name.partition("/")
    return scperturb(file) if prefix == "scperturb" and file and "/" not in file else None


def example_path() -> Path | None:
    """The committed example: inside an installed package, or beside it in a clone; None where in neither."""
    package = Path(str(files("cellop_nb")))
    folders = (package / "_share" / "data", package.parent / "data")
    return next(
        (path for path in (folder / f"{EXAMPLE_NAME}.h5ad" for folder in folders) if path.is_file()),
        None,
    )


def cache_folder() -> Path:
    """Where downloads go: `$CELLOP_CACHE`, or the system's cache folder.

    Returns
    -------
    Path
        The folder; made at the first download.
    """
    import pooch

    return Path(os.environ.get("CELLOP_CACHE") or pooch.os_cache("cellop_nb"))


def fetch(screen: Screen | str, *, progress: bool = True) -> Path:
    """The screen's file in the cache, downloaded if needed.

    The SHA-256 of the first complete download is recorded; a file that differs later, in the cache or at the
    source, is refused.

    Parameters
    ----------
    screen
        A name of :func:`list`, or "scperturb/NAME".
    progress
        Show a progress bar while downloading.

    Returns
    -------
    Path
        The `.h5ad` file in :func:`cache_folder`.

    Raises
    ------
    DataError
        If there is no connection, or the file is damaged or has changed.
    """
    import pooch

    if isinstance(screen, str):
        entry = find(screen)
        if entry is None:
            fix = f"see cellop_nb.datasets.list() ({did_you_mean(screen, [one.name for one in SCREENS])})"
            raise DataError("the name of a public screen", repr(screen), fix)
        screen = entry
    path = screen.path
    record = path.with_name(_RECORD)
    fix = "delete it, and the downloads beside it"
    checksums = read_json(record, "checksums", fix) if record.exists() else {}
    checksum = checksums.get(path.name)
    if not path.exists():
        _download(screen, path, checksum, progress)
    if checksum is None:
        _refuse_damaged(path, screen)
        checksums[path.name] = pooch.file_hash(str(path))
        text = json.dumps(checksums, indent=1, sort_keys=True)
        write_whole(record, lambda part: part.write_text(text, encoding="utf-8"))
    elif pooch.file_hash(str(path)) != checksum:
        fix = f"delete it to download it again, or delete its line in {_RECORD} to accept it"
        raise DataError("the file of the first download", f"{path} has changed since", fix)
    return path


def to_contract(adata: AnnData, screen: Screen) -> AnnData:
    """Name a public screen's columns and labels as the contract does; what it lacks is left out."""
    source = {"name": screen.name, "url": screen.url, "citation": screen.citation}
    for ours, theirs in screen.sources.items():
        column_name = next((column for column in theirs if column in adata.obs), None)
        if column_name is not None:
            adata.obs[ours] = adata.obs[column_name]
            source[f"obs_{ours}"] = column_name
    if "perturbation" in adata.obs:
        labels = adata.obs["perturbation"]
        names = {label: "+".join(str(label).split(screen.joiner)) for label in labels.dropna().unique()}
        names |= dict.fromkeys(screen.control, "control")
        adata.obs["perturbation"] = labels.astype(object).map(names).astype("category")
    adata.uns.setdefault("cellop_nb", {})["source"] = source
    return adata


def list() -> pd.DataFrame:  # noqa: A001 - read as datasets.list()
    """The catalogue of screens.

    Returns
    -------
    DataFrame
        One row per screen: `name`, `cells` (about; missing where not stated), `title`, `citation`, `licence`,
        `url`, `keys` (our columns and what they are called at the source), `cached`, and `mb`, the size of the
        file in the cache.
    """
    own = example_path()
    rows = [(EXAMPLE_NAME, 4_800, "Synthetic screen with planted operators", "this package", "BSD-3-Clause", "",
             ", ".join(COLUMNS), True, own.stat().st_size / 1e6 if own else pd.NA)]  # fmt: skip
    for screen in SCREENS:
        size = screen.path.stat().st_size / 1e6 if screen.path.exists() else pd.NA
        facts = (
            screen.name,
            screen.cells or pd.NA,
            screen.title,
            screen.citation,
            screen.licence,
            screen.url,
        )
        keys = "; ".join(f"{ours}: {' | '.join(theirs)}" for ours, theirs in screen.sources.items())
        rows.append((*facts, keys, screen.path.exists(), size))
    names = ["name", "cells", "title", "citation", "licence", "url", "keys", "cached", "mb"]
    return pd.DataFrame(rows, columns=names).astype({"cells": "Int64", "mb": "Float64"}).round({"mb": 1})


def _read(path: Path, backed: bool) -> AnnData:
    if path.suffix not in (".h5ad", ".zarr"):
        fix = "convert it, for example with scanpy.read_10x_h5(...).write_h5ad(...)"
        raise DataError("a file .h5ad or .zarr", f"{path.name!r}", fix)
    if backed:
        return _writable(open_lazily(path))
    with readable(path):
        return _writable(anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path))


def _writable(adata: AnnData) -> AnnData:
    """The same with other names for columns that anndata reads but does not write: "_index", as Seurat's converters
    leave it, and names with a slash."""
    tables = [adata.obs, adata.var, *([] if adata.raw is None else [adata.raw.var])]
    columns = {str(column) for table in tables for column in table}
    names = {name: name.replace("/", "_").lstrip("_") for name in columns if name == "_index" or "/" in name}
    names = {name: new + "_" * (new in columns) for name, new in names.items()}
    if not names:
        return adata
    logger.warning("columns that no file can hold got other names: %s", names)
    adata.obs, adata.var = adata.obs.rename(columns=names), adata.var.rename(columns=names)
    if adata.raw is not None:
        raw = adata.raw.to_adata()
        raw.var = raw.var.rename(columns=names)
        adata.raw = raw
    return adata


def _download(screen: Screen, path: Path, checksum: str | None, progress: bool) -> None:
    import pooch

    try:
        pooch.retrieve(screen.url, checksum, fname=path.name, path=path.parent, progressbar=progress)
    except ValueError as error:  # pooch's word for another checksum
        fix = f"if the new file is wanted, delete its line in {path.parent / _RECORD}"
        raise DataError(f"{screen.name} as first downloaded", "another file at its source", fix) from error
    except OSError as error:  # those of requests, which pooch uses, are some of them
        problem = f"{type(error).__name__} at {screen.url}"
        names = [EXAMPLE_NAME, *sorted(file.stem for file in path.parent.glob("*.h5ad"))]
        fix = f"check the connection and try again; without one these can be loaded: {', '.join(names)}"
        raise DataError(f"a complete download of {screen.name}", problem, fix) from error


def _refuse_damaged(path: Path, screen: Screen) -> None:
    """A first download has no checksum to meet, but it must open."""
    try:
        with h5py.File(path) as file:
            complete = "obs" in file and "var" in file
    except OSError:
        complete = False
    if not complete:
        path.unlink()
        problem = f"{screen.url} gave a file that is truncated or no AnnData"
        raise DataError(f"a complete {screen.name}", problem, "try again; the file was removed")


# -- public screens: where they are, whom to cite, how their columns map to ours ---------------------------------------

SCPERTURB = "https://zenodo.org/records/13350497/files/{}.h5ad"

# our column -> columns that other collections use for it, in order of preference
COLUMNS = {
    "perturbation": ("perturbation_name", "condition", "label"),
    "cell_type": ("celltype", "cell_line", "seurat_annotations"),
    "donor": ("replicate", "patient", "ind"),
    "dose": ("dose_value",),
}


@dataclass(frozen=True)
class Screen:
    """A public screen.

    Attributes
    ----------
    cells
        About how many; 0 where the source does not say.
    columns
        Our column to theirs, where the general table `COLUMNS` would choose another.
    control
        Their labels of control cells, written "control" on loading.
    joiner
        What separates the parts of a combination, written "+" on loading.
    """

    name: str
    title: str
    citation: str
    url: str
    cells: int = 0
    licence: str = "none stated; see the publication"
    columns: dict[str, str] = field(default_factory=dict)
    control: tuple[str, ...] = ("control",)
    joiner: str = "+"

    @property
    def path(self) -> Path:
        """Its file in the cache, whether it is there or not."""
        return cache_folder() / f"{self.name.replace('/', '-')}.h5ad"

    @property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """How the source calls our columns: the one that is named, or those that are looked for."""
        named = {ours: (column,) for ours, column in self.columns.items()}
        return {ours: named.get(ours, (ours, *theirs)) for ours, theirs in COLUMNS.items()}


def scperturb(name: str) -> Screen:
    """A file of the scPerturb collection that the catalogue does not have."""
    citation, licence = "see Peidli et al., Nat. Methods 21:531 (2024)", "see the Zenodo record"
    return Screen(f"scperturb/{name}", name, citation, SCPERTURB.format(name), licence=licence)


def _read_catalogue() -> tuple[Screen, ...]:
    with Path(__file__).with_name("screens.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Screen(
                name=row["name"],
                title=row["title"],
                citation=row["citation"],
                url=row["url"],
                cells=int(row["cells"] or 0),
                licence=row["licence"],
                columns={ours: row[ours] for ours in COLUMNS if row.get(ours)},
                control=tuple(row["control"].split()),
                joiner=row["joiner"],
            )
            for row in csv.DictReader(file)
        )


SCREENS = _read_catalogue()
