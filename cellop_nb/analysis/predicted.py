"""Predicted cells of any package: counts or logarithms of expression, matched to a screen by the names of genes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from ..data.contract import counts as raw_counts
from ..data.contract import keys_of, library_size
from ..data.counts import measured_totals
from ..errors import DataError, LabelError, did_you_mean, three_beats
from .baselines import Prediction, Target, Training
from .metrics import Undefined, log1p_cp10k

logger = logging.getLogger("cellop_nb")

SPACES = ("counts", "log1p")
LARGEST_LOG = 30.0  # log1p of any count below 10^13
LEAST_LOG = -1.0  # what a decoder without a lower bound may say of a gene that is off


@dataclass(frozen=True, eq=False)
class Predicted:
    """Predicted cells of one package, and how they are read.

    Attributes
    ----------
    values : (cell, gene) counts or expression of the compared genes
    rows : rows of each (context, perturbation)
    space : "counts" or "log1p"
    guessed : whether nobody said so
    whole : whether they are drawn counts, so that zeros and libraries can be compared
    library : (cell,) counts over all measured genes, where they are known
    total : (cell,) what `values` of all measured genes sum to, and stands for 10,000
    below : share of values below 0, which count as 0
    missing : genes of the screen that it lacks
    """

    name: str
    values: Any
    rows: Mapping[tuple[str, str], np.ndarray]
    space: str
    guessed: bool
    whole: bool
    library: np.ndarray | None
    total: np.ndarray
    below: float
    missing: int

    @classmethod
    def of(
        cls,
        name: str,
        adata: AnnData,
        rows: Mapping[tuple[str, str], np.ndarray],
        real: AnnData,
        genes: Sequence[str],
        asked: str | None,
        alike: np.ndarray,
    ) -> Predicted:
        """Read ``X`` of `adata` as the space that was asked for, else as the one in which it is like the rows `alike` of
        `real`.

        Raises
        ------
        LabelError
            For a space that is not known.
        DataError
            For values that are neither counts nor logarithms, or not those that were asked for.
        """
        values = raw_counts(adata)
        numbers = values.data if sparse.issparse(values) else values
        _check(name, numbers, asked)
        chosen = values[:, adata.var_names.get_indexer(list(genes))]
        chosen = chosen.maximum(0) if sparse.issparse(chosen) else np.maximum(chosen, 0)
        drawn = bool((numbers >= 0).all() and (numbers == np.rint(numbers)).all())
        share = _share(real, genes)
        space = asked or ("counts" if drawn or numbers.max(initial=0) > LARGEST_LOG else "")
        if not drawn:
            space = _reading(name, chosen, real[alike, list(genes)], share, space)
        missing = int((~real.var_names.isin(adata.var_names)).sum())
        library = measured_totals(adata) if space == "counts" else None
        if space == "counts":
            if library is None and not missing:
                library = _sums(values)
            total = _sums(chosen) / share if library is None else library
        else:
            chosen = np.expm1(chosen)
            total = np.full(adata.n_obs, _target_sum(chosen, share))
        below, counts = (
            float((numbers < 0).sum() / max(np.prod(values.shape), 1)),
            drawn and space == "counts",
        )
        return cls(name, chosen, rows, space, asked is None, counts, library, total, below, missing)

    def predict(self, training: Training, target: Target) -> Prediction:
        """The predicted cells of the group of `target`: a method, as the baselines are."""
        rows = self.rows.get((target.context, target.perturbation))
        if rows is None:
            raise Undefined("no predicted cells of this group")
        cells = target.space.transform(self.values[rows], self.total[rows])
        if len(rows) == 1:
            return Prediction(self.name, cells[0].astype(np.float64))
        if not self.whole:
            return Prediction.of_cells(self.name, cells)
        library = None if self.library is None else self.library[rows]
        return Prediction.of_cells(self.name, cells, self.values[rows], library)

    def facts(self, groups: Sequence[tuple[str, str]]) -> dict[str, object]:
        """What a reader of its scores has to know."""
        return {
            "space": f"{self.space} ({'guessed' if self.guessed else 'as said'})",
            "normalised to": f"{self.total[0]:.0f}" if self.space == "log1p" else "",
            "cells": int(sum(len(rows) for rows in self.rows.values())),
            "missing genes": self.missing,
            "values below 0": self.below,
            "groups without predicted cells": [", ".join(pair) for pair in groups if pair not in self.rows],
            "groups without real cells": [", ".join(pair) for pair in self.rows if pair not in groups],
        }


def shared_genes(predictions: Mapping[str, AnnData], real: AnnData, genes: Sequence[str] | None) -> list[str]:
    """Names of the genes to compare, in the order of the screen.

    Raises
    ------
    LabelError
        Where one side has none of them, lacks one that was named, or names one twice.
    """
    shared = real.var_names if genes is None else pd.Index(list(genes))
    for name, adata in [("real", real), *predictions.items()]:
        if not adata.var_names.is_unique:
            fix = "run var_names_make_unique() on it"
            raise LabelError(three_beats(f"genes of {name!r} named once", "repeated names", fix))
        inside = shared.isin(adata.var_names)
        if not (inside.any() if genes is None else inside.all()):
            lost = shared[~inside][0]
            problem = f"{lost!r} of the screen, not in {list(adata.var_names[:3])}"
            fix = f"use the gene names of the screen ({did_you_mean(lost, adata.var_names)})"
            raise LabelError(three_beats(f"genes that {name!r} and the screen share", problem, fix))
        shared = shared[inside]
    return [str(gene) for gene in shared]


def _check(name: str, numbers: np.ndarray, asked: str | None) -> None:
    if asked not in (None, *SPACES):
        problem = f"{asked!r} ({did_you_mean(str(asked), SPACES)})"
        raise LabelError(three_beats(f"space to be one of {SPACES}, or None", problem, "name what X holds"))
    if not np.isfinite(numbers).all():
        fix = "find out where the model breaks; they are not replaced"
        raise DataError(three_beats(f"finite values in X of {name!r}", "NaN or infinite values", fix))
    least, most = numbers.min(initial=0), numbers.max(initial=0)
    if least < LEAST_LOG:
        problem, fix = (
            f"values down to {least:.3g}: scaled or centred data",
            "pass counts, or log1p of expression",
        )
        raise DataError(three_beats(f"counts or logarithms in X of {name!r}", problem, fix))
    if asked == "log1p" and most > LARGEST_LOG:
        problem = f"values up to {most:.4g}"
        raise DataError(three_beats(f"log1p of expression in X of {name!r}", problem, "pass space='counts'"))


def _reading(name: str, values, real: AnnData, share: float, space: str) -> str:
    """The space; where it is not known, that whose mean profile is nearer to the real one. A doubt is a warning.

    Expected and drawn counts agree in the mean of expression, logarithms of drawn and of smooth cells in that of the
    logarithms.
    """
    counts, expression = raw_counts(real, keys_of(real).layer), np.expm1(values)
    level, as_counts = log1p_cp10k(counts, _sums(counts) / share), log1p_cp10k(values, _sums(values) / share)
    as_logs = log1p_cp10k(expression, np.full(values.shape[0], _target_sum(expression, share)))
    pairs = {"counts": (np.expm1(as_counts), np.expm1(level)), "log1p": (as_logs, level)}
    means = {name: [_mean(cells) for cells in pair] for name, pair in pairs.items()}
    means["counts"] = [np.log1p(mean) for mean in means["counts"]]
    error = {reading: float(np.abs(one - other).mean()) for reading, (one, other) in means.items()}
    nearer = min(error, key=error.__getitem__)
    if space and nearer != space and error[nearer] < error[space] / 2:
        logger.warning("score: %s is read as %s, but its mean profile is that of %s", name, space, nearer)
    return space or nearer


def _target_sum(expression, share: float) -> float:
    """The power of ten, from 10,000, to which expression was normalised over all measured genes."""
    return float(10.0 ** max(4, np.rint(np.log10(max(np.median(_sums(expression)) / share, 1.0)))))


def _share(real: AnnData, genes: Sequence[str]) -> float:
    """Median share of the counts of a real cell that lies in the compared genes."""
    layer, totals = keys_of(real).layer, measured_totals(real)
    totals = library_size(real, layer) if totals is None else totals
    return float(np.median(library_size(real[:, list(genes)], layer)[totals > 0] / totals[totals > 0]))


def _sums(values) -> np.ndarray:
    """(cell,) sums of cells (cell, gene)."""
    return np.asarray(values.sum(axis=1), dtype=np.float64).ravel()


def _mean(values) -> np.ndarray:
    """(gene,) mean of cells (cell, gene)."""
    return np.asarray(values.mean(axis=0), dtype=np.float64).ravel()
