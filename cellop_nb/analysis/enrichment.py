"""Gene sets that a response moves: enrichment of its genes against sets that the user gives as GMT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from ..errors import DataError, LabelError, did_you_mean, three_beats
from ..packages import require
from .distances import benjamini_hochberg

_VALUES = ("effect", "lfc", "predicted", "score")


def enrich(
    changes: pd.DataFrame,
    gene_sets: str | Path | Mapping[str, Sequence[str]],
    *,
    value: str | None = None,
    min_genes: int = 5,
) -> pd.DataFrame:
    """Enrichment of gene sets in signed gene changes, by decoupler's univariate linear model.

    The score of a set is the t of the slope of all genes' changes on membership in the set: positive where the
    set's genes rise more than the others. No threshold on genes is needed.

    Parameters
    ----------
    changes
        One row per gene and profile, of :func:`axis_genes`, :func:`response_genes` with ``n_top=None``, or
        :func:`change_intervals`: ``gene``, the change, and what tells profiles apart (``axis``, ``group`` or
        ``context`` and ``perturbation``).
    gene_sets
        Path of a GMT file (a line per set: name, description, genes, separated by tabs), or name to genes.
    value
        Column of the change; ``effect``, ``lfc``, ``predicted`` or ``score`` where None.
    min_genes
        Sets with fewer genes among those of the table are left out.

    Returns
    -------
    DataFrame
        A row per profile and set, most significant first: the columns that name the profile,
        ``gene_set, score, p, fdr`` (Benjamini-Hochberg within the profile), ``n_genes`` (of the set in the table)
        and ``genes`` (its five most changed).

    Raises
    ------
    MissingExtraError
        Where decoupler is not installed.
    DataError
        Where the GMT file is missing or malformed, or no set shares `min_genes` genes with the table.
    LabelError
        Where a column is not known.

    References
    ----------
    Badia-i-Mompel et al. 2022, Bioinform Adv 2:vbac016 (decoupler).
    """
    column = _value_column(changes, value)
    sets = _gene_sets(gene_sets)
    by = [name for name in ("axis", "group", "context", "perturbation") if name in changes]
    if not by:
        changes, by = changes.assign(profile="all"), ["profile"]
    wide = changes.pivot(index=by, columns="gene", values=column).fillna(0.0)
    wide.columns = wide.columns.astype(str)
    _enough_overlap(sets, set(wide.columns), min_genes)
    names, wide.index = wide.index.to_frame(index=False), [str(k) for k in range(len(wide))]
    require("decoupler", "enrichment", of="enrichment")
    import decoupler

    scores, p = decoupler.mt.ulm(wide, sets, tmin=min_genes)[:2]
    members = {name: wide.columns.intersection(genes) for name, genes in sets.groupby("source")["target"]}
    rows = [
        {
            **names.iloc[k],
            "gene_set": name,
            "score": float(scores.loc[row, name]),
            "p": float(p.loc[row, name]),
            "n_genes": len(members[name]),
            "genes": ", ".join(wide.loc[row, members[name]].abs().nlargest(5).index),
        }
        for k, row in enumerate(wide.index)
        for name in scores.columns
    ]
    table = pd.DataFrame(rows)
    adjusted = table.groupby(by, sort=False)["p"].transform(lambda p: benjamini_hochberg(p.to_numpy()))
    table.insert(table.columns.get_loc("p") + 1, "fdr", adjusted)
    return table.sort_values([*by, "p"], ignore_index=True)


def _value_column(changes: pd.DataFrame, value: str | None) -> str:
    for column in ("gene", *filter(None, [value])):
        if column not in changes:
            hint = did_you_mean(column, changes.columns)
            raise LabelError(three_beats(f"a column {column!r}", "none", f"rename or add it ({hint})"))
    known = [name for name in _VALUES if name in changes]
    if value is None and not known:
        raise LabelError(three_beats("a column of changes", f"{list(changes.columns)}", "pass value=..."))
    return value or known[0]


def _gene_sets(gene_sets) -> pd.DataFrame:
    """Rows ``source, target`` without repeats."""
    if isinstance(gene_sets, Mapping):
        rows = [(str(name), str(gene)) for name, genes in gene_sets.items() for gene in genes]
    else:
        path = Path(gene_sets)
        if not path.is_file():
            raise DataError(three_beats("a GMT file", f"no file {path}", "give the path of a .gmt file"))
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            fields = line.rstrip().split("\t")
            if line.strip() and len(fields) < 3:
                found = f"line {number} of {path.name} with {len(fields)} fields"
                fix = "write name, description and genes separated by tabs"
                raise DataError(three_beats("lines of a GMT file", found, fix))
            rows += [(fields[0], gene) for gene in fields[2:] if gene]
    return pd.DataFrame(rows, columns=["source", "target"]).drop_duplicates(ignore_index=True)


def _enough_overlap(sets: pd.DataFrame, genes: set[str], min_genes: int) -> None:
    shared = sets[sets["target"].isin(genes)].groupby("source").size()
    largest = int(shared.max()) if len(shared) else 0
    if largest < min_genes:
        found = f"at most {largest} in any of {sets['source'].nunique()} sets, among {len(genes)} genes"
        fix = "use the same gene names (symbols or Ensembl), keep more genes, or lower min_genes"
        raise DataError(three_beats(f"a set that shares {min_genes} genes with the table", found, fix))
