"""Descriptors of perturbations: tables (perturbation, descriptor), from which what was never measured can be foreseen.

A table describes genes, drugs or labels in any way: expression of the gene in control cells, the effects of another
screen, gene sets, a network, chemical structure, or an embedding that someone else made. A perturbation without a
descriptor has no row: nothing is filled with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from ..data.contract import keys_of
from ..data.counts import require_in_memory
from ..data.groups import Groups, controls_by_context
from ..data.splits import outside_test
from ..errors import DataError, LabelError, ModelError, checked, did_you_mean, three_beats
from ..models.operators import perturbation_parts
from ..packages import require
from .genes import gene_set_members
from .means import Means
from .metrics import log1p_cp10k
from .predict import modelled_counts

__all__ = [
    "cover",
    "coverage",
    "from_expression",
    "from_gene_sets",
    "from_network",
    "from_screen",
    "from_smiles",
    "from_table",
    "join",
]

MISSING = ("refuse", "drop", "nearest")


# -- readers ----------------------------------------------------------------------------------------------------------


@checked
def from_expression(
    adata: ad.AnnData, *, n_components: int = 50, symbols: str | None = None, seed: int = 0
) -> pd.DataFrame:
    r"""Describe each gene by its loadings on the principal components of the training controls.

    .. math:: f_g = \mathrm{cov}(x_g, t_k / \sigma_k)_{k = 1..K}

    with log1p-CP10k x of the control cells and their scores t: genes that go together in unperturbed cells are alike.

    Parameters
    ----------
    adata
        A screen that was set up. Cells with ``obs["split"] == "test"`` take no part.
    n_components
        K, fewer where there are fewer cells or genes.
    symbols
        Column of `var` with the names by which perturbations call their genes; None for ``var_names``.

    Returns
    -------
    DataFrame
        (gene, K); a row per gene that some control cell expresses.

    Raises
    ------
    LabelError
        If the data were not set up, or the column is missing.
    DataError
        If the counts lie on disk.

    References
    ----------
    Ahlmann-Eltze, Huber, Anders (2025), Nat. Methods 22:1657 (descriptors of the perturbed gene from the screen itself).
    """
    import scanpy as sc

    cells, keys = _training(adata), keys_of(adata)
    rows = np.sort(np.concatenate(list(controls_by_context(cells, keys).values())))
    counts = modelled_counts(cells[rows], list(cells.var_names), keys).X
    level = sparse.csr_matrix(log1p_cp10k(counts))
    heard = np.flatnonzero(np.asarray(level.sum(0)).ravel() > 0)
    k = min(n_components, len(rows) - 1, len(heard) - 1)
    space = ad.AnnData(level[:, heard])
    sc.pp.pca(space, n_comps=k, random_state=seed)
    loadings = space.varm["PCs"] * np.sqrt(space.uns["pca"]["variance"])
    if symbols is not None and symbols not in adata.var:
        fix = did_you_mean(symbols, adata.var.columns)
        raise LabelError(f"a column {symbols!r} in var", "no such column", fix)
    names = adata.var_names if symbols is None else adata.var[symbols].astype(str)
    return _table(loadings, np.asarray(names, dtype=object)[heard], "expression")


@checked
def from_screen(other: ad.AnnData, *, n_components: int = 20) -> pd.DataFrame:
    """Describe each perturbation by what it did in another screen: principal components of its mean effects.

    Parameters
    ----------
    other
        Another screen that was set up; its mean changes of log1p-CP10k, each context counting once.
    n_components
        Fewer where it has fewer perturbations.

    Returns
    -------
    DataFrame
        (perturbation, component), scores in the units of the effects.

    Raises
    ------
    LabelError
        If the data were not set up.
    DataError
        If the counts lie on disk, or fewer than 3 perturbations were measured.
    """
    cells = _training(other)
    groups = Groups(cells)
    means = Means.of(modelled_counts(cells, list(cells.var_names), groups.keys), groups)
    names = groups.perturbations
    effects = np.stack([means.of_perturbation(name).change.mean(0) for name in names])
    return _table(_principal(effects, n_components, "perturbations"), names, "effect")


@checked
def from_gene_sets(
    gene_sets: str | Path | Mapping[str, Sequence[str]], *, n_components: int = 50
) -> pd.DataFrame:
    r"""Describe each gene by the sets it is in, rare sets counting more.

    .. math:: f_{gs} = [g \in s]\, \log(N / n_s)

    with n of N genes in the set; more sets than `n_components` are brought to as many principal components.

    Parameters
    ----------
    gene_sets
        Path of a GMT file (a line per set: name, description, genes, separated by tabs), or name to genes.
    n_components
        Most columns.

    Returns
    -------
    DataFrame
        (gene, set or component); a row per gene that is in some set of two genes or more, but not in all of them.

    Raises
    ------
    DataError
        Where the file is missing or malformed, or no two genes share a set.

    References
    ----------
    Sparck Jones (1972), J. Documentation 28:11 (the weight of a set).
    """
    members = gene_set_members(gene_sets)
    n_genes, size = members["target"].nunique(), members.groupby("source")["target"].transform("size")
    some = members.assign(weight=np.log(n_genes / size))[(size > 1) & (size < n_genes)]
    if not len(some):
        problem = f"{members['source'].nunique()} sets of {n_genes} genes"
        fix = "give sets of which some, not all, genes are members"
        raise DataError("sets that two genes or more share", problem, fix)
    table = some.pivot(index="target", columns="source", values="weight").fillna(0.0)
    table = table.rename_axis(index=None, columns=None)
    if table.shape[1] <= n_components:
        return table
    return _table(_principal(table.to_numpy(), n_components, "genes"), table.index, "sets")


@checked
def from_network(edges: pd.DataFrame | str | Path, *, n_components: int = 32, seed: int = 0) -> pd.DataFrame:
    """Describe each gene by its place in a network: spectral embedding, in which neighbours are near.

    Parameters
    ----------
    edges
        Rows (edge, column): the first two columns name genes, a third, where there is one, weighs the edge. Or the path
        of such a table (.csv, .tsv, .txt, .parquet).
    n_components
        Fewer where the network has fewer genes.

    Returns
    -------
    DataFrame
        (gene, component) of the largest connected part; ``attrs["left_out"]`` names the genes outside of it, which
        have no place in relation to the others.

    Raises
    ------
    DataError
        Where the table has no two columns, weights are not positive numbers, or fewer than 4 genes are connected.

    References
    ----------
    Belkin and Niyogi (2003), Neural Computation 15:1373.
    """
    from sklearn.manifold import spectral_embedding

    table = edges if isinstance(edges, pd.DataFrame) else _read(Path(edges))
    if table.shape[1] < 2 or table.iloc[:, :2].isna().any(axis=None):
        fix = "give two columns of names, and a third of weights if there are any"
        raise DataError("edges between two named genes", f"columns {list(table)}", fix)
    weight = np.ones(len(table))
    if table.shape[1] > 2:
        weight = pd.to_numeric(table.iloc[:, 2], errors="coerce").to_numpy(dtype=float)
    bad = ~(np.isfinite(weight) & (weight > 0))
    if bad.any():
        problem = f"{table.iloc[np.flatnonzero(bad)[:1], 2].tolist()}"
        raise DataError("positive weights of edges", problem, "drop these edges")
    codes, names = pd.factorize(np.concatenate([table.iloc[:, 0], table.iloc[:, 1]]).astype(str), sort=True)
    ends = codes.reshape(2, -1)
    graph = sparse.csr_matrix((weight, (ends[0], ends[1])), (len(names), len(names)))
    graph = sparse.csr_matrix(graph.maximum(graph.T))
    graph.setdiag(0)
    part = sparse.csgraph.connected_components(graph)[1]
    inside = part == np.bincount(part).argmax()
    if inside.sum() < 4:
        raise DataError("4 connected genes or more", f"{int(inside.sum())}", "give a denser network")
    k = min(n_components, int(inside.sum()) - 2)
    coordinates = spectral_embedding(graph[inside][:, inside], n_components=k, random_state=seed)
    result = _table(coordinates, names[inside], "network")
    result.attrs["left_out"] = sorted(names[~inside])
    return result


def from_smiles(smiles: pd.Series | Mapping[str, str]) -> pd.DataFrame:
    """Describe each drug by its structure: counts of the circular substructures (radius 2) around its atoms.

    Parameters
    ----------
    smiles
        Drug to SMILES, one row per drug.

    Returns
    -------
    DataFrame
        (drug, substructure); those that no drug or all drugs have alike are left out.

    Raises
    ------
    MissingExtraError
        Where rdkit is not installed.
    DataError
        For a SMILES that cannot be read.

    References
    ----------
    Rogers and Hahn (2010), J. Chem. Inf. Model. 50:742 (extended-connectivity fingerprints).
    """
    require("rdkit", "chemistry", of="chemical structures")
    from rdkit import Chem, rdBase
    from rdkit.Chem import rdFingerprintGenerator

    series = pd.Series(smiles, dtype=object)
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    rows = []
    with rdBase.BlockLogs():
        for name, text in series.items():
            molecule = Chem.MolFromSmiles(text) if isinstance(text, str) and text.strip() else None
            if molecule is None:
                problem = f"{text!r} of {name!r}"
                raise DataError("SMILES", problem, "repair it, or leave this drug out")
            rows.append(generator.GetCountFingerprintAsNumPy(molecule))
    counts = np.log1p(np.stack(rows).astype(float))
    table = _table(counts, series.index, "bit")
    return table.loc[:, table.nunique() > 1]


def from_table(file: str | Path, *, scale: bool = True) -> pd.DataFrame:
    """Read descriptors that someone else made, such as ESM or GenePT embeddings.

    Parameters
    ----------
    file
        .csv, .tsv, .txt or .parquet: the first column names the perturbation, the others are numbers. .npz: an array
        for each perturbation, or two arrays, of names (perturbation,) and of values (perturbation, descriptor).
    scale
        Bring every column to variance 1, for columns of different units; False keeps the values.

    Returns
    -------
    DataFrame
        (perturbation, descriptor).

    Raises
    ------
    DataError
        For a missing file, another kind of file (pickles are never opened), a column that is no number, values that are
        not finite, or names that repeat.
    """
    path = Path(file)
    table = _read(path)
    if isinstance(table.index, pd.RangeIndex):  # parquet and npz keep an index of names
        table = table.set_index(table.columns[0])
    table.index = table.index.map(str)
    numbers = table.apply(pd.to_numeric, errors="coerce")
    bad = ~np.isfinite(numbers.to_numpy(dtype=float))
    if bad.any() or not table.shape[1]:
        row, column = np.argwhere(bad)[0] if bad.any() else (0, 0)
        problem = f"{table.iloc[row, column]!r} for {table.index[row]!r}" if bad.any() else "no column"
        fix = "drop these rows or columns; a first column names the perturbations"
        raise DataError(f"finite numbers in {path.name}", problem, fix)
    if not table.index.is_unique:
        problem = f"{table.index[table.index.duplicated()][0]!r} twice"
        raise DataError("one row per perturbation", problem, "keep one of them")
    if not scale:
        return numbers
    spread = numbers.std(ddof=0)
    return numbers.loc[:, spread > 0] / spread[spread > 0]


# -- several tables, and which perturbations they describe ---------------------------------------------------------------


def join(*tables: pd.DataFrame, missing: str = "refuse") -> pd.DataFrame:
    """Join several tables of descriptors into one, with equal weight.

    Parameters
    ----------
    tables
        Tables (perturbation, descriptor). Each is centred and brought to total variance 1.
    missing
        Of a perturbation that some tables lack: "refuse"; "drop" leaves it out; "nearest" gives it the row of the
        perturbation that is nearest in the tables that do describe it.

    Returns
    -------
    DataFrame
        (perturbation, descriptor), with the descriptors of all tables.

    Raises
    ------
    LabelError
        For a perturbation that not all tables describe, under "refuse", or another word for `missing`.
    DataError
        For no table, or tables that share no perturbation.
    """
    _check_missing(missing)
    names = list(dict.fromkeys(name for table in tables for name in table.index))
    shared = [name for name in names if all(name in table.index for table in tables)]
    if not shared:
        problem = f"{len(tables)} tables of {[len(table) for table in tables]} perturbations"
        raise DataError("tables with perturbations in common", problem, "name them alike")
    lacking = [name for name in names if name not in set(shared)]
    if lacking and missing == "refuse":
        raise LabelError(_not_described(lacking, "pass missing='drop' or missing='nearest'"))
    blocks = [_of_size_one(table) for table in tables]
    if missing == "nearest":
        twin = {name: _nearest(name, blocks, shared) for name in lacking}
        blocks = [_filled(block, twin) for block in blocks]
        shared = names
    joined = pd.concat([block.loc[shared] for block in blocks], axis=1)
    joined.columns = [f"{k} {column}" for k, block in enumerate(blocks, 1) for column in block]
    return joined


def coverage(features: pd.DataFrame, adata: ad.AnnData) -> pd.DataFrame:
    """List which perturbations of a screen have a descriptor.

    Parameters
    ----------
    features
        (perturbation, descriptor).

    Returns
    -------
    DataFrame
        A row per measured perturbation, combinations by their parts: ``perturbation, cells, described``, those
        without a descriptor first; ``attrs["share"]`` is the share of the perturbations that have one.

    Raises
    ------
    LabelError
        If the data were not set up.
    """
    groups = Groups(adata, min_cells=1)
    cells: dict[str, int] = {}
    for group in groups:
        parts = groups.parts(group.perturbation)
        if len(parts) == 1:  # a combination of what was not measured alone may be described by its parts
            parts = perturbation_parts(group.perturbation, features.index, features.index)
        for part in parts:
            cells[part] = cells.get(part, 0) + len(group)
    table = pd.DataFrame({"perturbation": list(cells), "cells": list(cells.values())})
    table["described"] = table["perturbation"].isin(described(features))
    table = table.sort_values("described", kind="stable", ignore_index=True)
    table.attrs["share"] = float(table["described"].mean())
    return table


def cover(
    features: pd.DataFrame,
    adata: ad.AnnData,
    *,
    missing: str = "refuse",
    by: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Give every perturbation of a screen a descriptor, or decide about those that have none.

    Parameters
    ----------
    features
        (perturbation, descriptor).
    missing
        Of measured perturbations without a descriptor: "refuse"; "drop" marks them (a row of NaN): they are measured
        and predicted as ever, but tell nothing of perturbations that were never measured; "nearest" gives them the row
        of the described perturbation that is nearest in `by`.
    by
        (perturbation, descriptor) for "nearest"; :func:`from_expression` of the screen's controls where None. What the
        perturbations did is not looked at: they could then not be left out to judge the descriptors.

    Returns
    -------
    DataFrame
        (perturbation, descriptor), with a row for each measured perturbation.

    Raises
    ------
    LabelError
        For perturbations without a descriptor under "refuse", or that `by` does not describe either; for another word
        for `missing`; or if the data were not set up.
    """
    _check_missing(missing)
    table = coverage(features, adata)
    lacking = table.loc[~table["described"], "perturbation"].tolist()
    features = features.set_axis(features.index.map(str), axis=0).drop(index=lacking, errors="ignore")
    if not lacking:
        return features
    if missing == "refuse":
        fix = f"pass missing='drop' or 'nearest', or name them alike ({did_you_mean(lacking[0], features.index)})"
        raise LabelError(_not_described(lacking, fix))
    if missing == "drop":
        return features.reindex([*features.index, *lacking])
    by = from_expression(adata) if by is None else by
    also_lacking = [name for name in lacking if name not in by.index]
    if also_lacking:
        raise LabelError(_not_described(also_lacking, "pass by=... that describes them, or missing='drop'"))
    shared = [name for name in features.index if name in by.index]
    if not shared:
        fix = "pass by=... that names perturbations as `features` does"
        raise LabelError("descriptors of the described perturbations in `by`", "none", fix)
    return _filled(features, {name: _nearest(name, [by], shared) for name in lacking})


def described(features: pd.DataFrame) -> list[str]:
    """Perturbations with a row that is no mark of a missing one (all NaN); refuses rows that repeat or are broken."""
    names = features.index.map(str)
    try:
        values = features.to_numpy(dtype=float)
    except (TypeError, ValueError) as error:
        fix = "name the perturbations in the index, features.set_index(...), and drop columns of words"
        raise ModelError("columns of numbers in features", str(error), fix) from error
    marked = np.isnan(values).all(1)
    broken = (~np.isfinite(values).all(1) & ~marked) | names.duplicated()
    if broken.any() or not features.shape[1]:
        problem = f"{list(names[broken][:5])} with NaN, infinity or several rows"
        raise ModelError("one row of finite features per perturbation", problem, "repair the table")
    return list(names[~marked])


def _check_missing(missing: str) -> None:
    if missing not in MISSING:
        raise LabelError(f"missing among {MISSING}", repr(missing), "name one of them")


def _not_described(lacking: Sequence[str], fix: str) -> str:
    problem = f"none of {len(lacking)} of them, such as {list(lacking[:3])}"
    return three_beats("features of every perturbation", problem, fix)


def _of_size_one(table: pd.DataFrame) -> pd.DataFrame:
    """The table centred, and divided so that its columns' variances add up to 1."""
    centred = table - table.mean()
    size = float(np.sqrt(np.square(centred.to_numpy(dtype=float)).sum(1).mean()))
    return centred / (size or 1.0)


def _nearest(name: str, tables: list[pd.DataFrame], candidates: list[str]) -> str:
    """The candidate that is nearest to a perturbation (Euclid) in the tables that describe it."""
    telling = [table for table in tables if name in table.index]
    squares = sum(np.square(table.loc[candidates] - table.loc[name]).sum(axis=1) for table in telling)
    return str(squares.idxmin())


def _filled(table: pd.DataFrame, twin: Mapping[str, str]) -> pd.DataFrame:
    """The table with the rows of twins for perturbations that it lacks."""
    lacking = [name for name in twin if name not in table.index]
    rows = table.loc[[twin[name] for name in lacking]].set_axis(lacking, axis=0)
    return pd.concat([table, rows])


# -- files and matrices ----------------------------------------------------------------------------------------------


def _training(adata: ad.AnnData) -> ad.AnnData:
    require_in_memory(adata)
    return adata[outside_test(adata)]


def _table(values: np.ndarray, names, prefix: str) -> pd.DataFrame:
    columns = [f"{prefix} {k + 1}" for k in range(values.shape[1])]
    table = pd.DataFrame(
        np.asarray(values, dtype=float), index=pd.Index(names, dtype=object), columns=columns
    )
    return table[~table.index.duplicated()]


def _principal(matrix: np.ndarray, n_components: int, rows: str) -> np.ndarray:
    """Scores (row, component) of the centred matrix on its main directions, signs fixed."""
    from sklearn.decomposition import PCA

    if len(matrix) < 3:
        raise DataError(f"3 {rows} or more", f"{len(matrix)}", "describe more of them")
    k = min(n_components, len(matrix) - 1, matrix.shape[1])
    return PCA(k, svd_solver="full").fit_transform(matrix)


def _read(path: Path) -> pd.DataFrame:
    """A table as it is stored; that of an .npz with the names of perturbations as index."""
    if not path.is_file():
        fix = "give the path of a .csv, .tsv, .parquet or .npz"
        raise DataError("a table", f"no file {path}", fix)
    if path.suffix == ".parquet":
        require("pyarrow", "notebook", of="parquet files")
        return pd.read_parquet(path)
    if path.suffix in (".csv", ".tsv", ".txt"):
        return pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t")
    if path.suffix != ".npz":
        fix = "write it as .csv, .tsv, .parquet or .npz (a pickle could run any code)"
        raise DataError("a table of text, parquet or npz", path.name, fix)
    expected = "an array per perturbation, or names (perturbation,) and values (perturbation, descriptor)"
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except ValueError as error:
        raise DataError(expected, f"objects in {path.name}", "save plain arrays") from error
    names = [array for array in arrays.values() if array.dtype.kind in "US"]
    values = [array for array in arrays.values() if array.ndim == 2]
    if len(arrays) == 2 and len(names) == len(values) == 1 and len(names[0]) == len(values[0]):
        return pd.DataFrame(values[0], index=names[0].astype(str))
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or names:
        raise DataError(expected, f"arrays of shapes {sorted(shapes)[:4]}", "save one of these")
    return pd.DataFrame(np.stack(list(arrays.values())), index=list(arrays))
