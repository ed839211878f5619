"""Differential expression of predicted cells against control cells, by scanpy's functions."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

from ..data.contract import counts
from ..errors import DataError, three_beats
from ..packages import same_threads
from .space import TARGET_SUM


@same_threads()
def predicted_expression(
    predicted, control, *, layer: str | None = None, key: str = "side", method: str = "wilcoxon"
) -> ad.AnnData:
    """Predicted and control cells in one AnnData, with scanpy's differential expression between them.

    Counts are scaled to 10,000 a cell and log1p-transformed; ``scanpy.tl.rank_genes_groups`` compares the
    predicted cells with the controls. All of scanpy's tools then work: ``sc.get.rank_genes_groups_df(found,
    "predicted")``, ``sc.pl.rank_genes_groups``, ``sc.tl.filter_rank_genes_groups``.

    Parameters
    ----------
    predicted
        Virtual cells (:func:`predict`, or ``holdout(...).predictions``), counts in ``X``.
    control
        Control cells, raw counts in `layer`.
    key
        Column of ``obs`` that tells the sides apart: ``"predicted"`` or ``"control"``.
    method
        ``"wilcoxon"``, ``"t-test"``, ``"t-test_overestim_var"`` or ``"logreg"`` of scanpy.

    Returns
    -------
    AnnData
        Over the genes that both share: log1p-CP10k in ``X``, counts in ``layers["counts"]``, ``obs[key]``,
        and ``uns["rank_genes_groups"]``.

    Raises
    ------
    DataError
        Where the two share no genes, or a side has fewer than two cells.
    """
    import scanpy as sc

    genes = [gene for gene in predicted.var_names if gene in set(control.var_names)]
    sizes = (predicted.n_obs, control.n_obs)
    if not genes or min(sizes) < 2:
        found = f"{len(genes)} shared genes, {sizes[0]} predicted and {sizes[1]} control cells"
        fix = "give cells over the same genes, at least two on each side"
        raise DataError(three_beats("predicted and control cells to compare", found, fix))
    sides = [ad.AnnData(counts(side[:, genes], slot)) for side, slot in ((predicted, None), (control, layer))]
    both = ad.concat(sides, index_unique="-")
    names: np.ndarray = np.repeat(["predicted", "control"], sizes)
    original = [*predicted.obs_names, *control.obs_names]
    both.obs = pd.DataFrame({key: pd.Categorical(names)}, index=pd.Index(original).astype(str))
    both.obs_names_make_unique()
    both.var_names = genes
    both.layers["counts"] = both.X.copy()
    sc.pp.normalize_total(both, target_sum=TARGET_SUM)
    sc.pp.log1p(both)
    options: dict[str, object] = {"reference": "control", "method": method, "key_added": "rank_genes_groups"}
    if method == "wilcoxon":
        options["tie_correct"] = True
    sc.tl.rank_genes_groups(both, key, groups=["predicted"], **options)
    return both
