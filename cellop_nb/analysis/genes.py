"""What responses do to genes: genes of each response and of the shared axes, which are alike, gene sets, and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData, concat
from scipy import stats
from torch import Tensor

from ..data.contract import counts, keys_of
from ..data.counts import CountMatrix, count_matrix, model_counts
from ..data.groups import Group, Groups, evenly
from ..errors import DataError, LabelError, checked, did_you_mean
from ..models.likelihood import COUNTS_PER_CELL
from ..models.operators import Condition, OperatorModel
from ..models.vae import NBVAE
from ..packages import require, same_threads

__all__ = [
    "axis_genes",
    "enrich",
    "measured_genes",
    "predicted_expression",
    "response_genes",
    "response_profiles",
    "response_similarity",
]

_MOST_CELLS = 1000
_VALUES = ("effect", "lfc", "predicted", "score")


# -- genes of responses ---------------------------------------------------------------------------------------------


@checked
@torch.no_grad()
def response_genes(
    adata: AnnData,
    vae: NBVAE,
    operators: OperatorModel,
    *,
    n_top: int | None = 10,
    pseudocount: float = 1.0,
    use_rep: str = "X_nbvae",
) -> pd.DataFrame:
    r"""Genes that each learned response changes most.

    The control cells of a context (1,000 of more, evenly spread) are moved by the operator. With p their mean decoded
    counts per 10,000 before (0) and after (1):

    .. math:: \mathrm{lfc}_g = \log_2 \frac{p_{1g} + c}{p_{0g} + c}

    Parameters
    ----------
    adata
        A screen that was set up, with raw counts and latents (:func:`cellop_nb.embed`).
    n_top
        Genes per group, by absolute change; all of them where None.
    pseudocount
        c, in counts per 10,000; it keeps genes with hardly any counts from leading.

    Returns
    -------
    DataFrame
        The columns ``context, perturbation`` (and ``dose``, where doses were measured), ``gene, lfc``, for every group
        of the data in a context that the operators know, largest absolute change first.
    """
    groups, covariates = Groups(adata, use_rep=use_rep, min_cells=1), _one_hot(adata, vae)
    names, starts, tables = operators.conditions.perturbations, {}, []
    for group in groups:
        context = group.context
        if context not in operators.conditions.contexts:
            continue
        if context not in starts:
            chosen = evenly(len(groups.control_rows[context]), _MOST_CELLS)
            z, rows = groups.control[context][chosen], groups.control_rows[context][chosen.numpy()]
            own = None if covariates is None else covariates[rows]
            starts[context] = z, own, _mean_proportions(vae, z, own)
        z, own, before = starts[context]
        after = _mean_proportions(vae, operators.operator(group.condition(names))(z), own)
        tables.append(_table(vae.genes, before, after, pseudocount, group, groups, n_top))
    return pd.concat(tables, ignore_index=True)


@checked
def measured_genes(
    adata: AnnData, *, n_top: int | None = None, split: str | None = "test", pseudocount: float = 1.0
) -> pd.DataFrame:
    """What :func:`response_genes` predicts, measured: means of the cells' own counts per 10,000.

    Perturbed cells are those of `split` (all of them where None); groups without such cells are left out.
    Control cells are all of the context. The columns are the same.
    """
    groups, controls = Groups(adata, split=split, min_cells=1), Groups(adata, min_cells=1).control_rows
    matrix, genes, before, tables = count_matrix(adata), adata.var_names, {}, []
    for group in groups:
        if group.context not in before:
            before[group.context] = _mean_shares(matrix, controls[group.context])
        after = _mean_shares(matrix, group.rows)
        tables.append(_table(genes, before[group.context], after, pseudocount, group, groups, n_top))
    return pd.concat(tables, ignore_index=True)


@checked
def axis_genes(
    adata: AnnData, vae: NBVAE, operators: OperatorModel, *, n_axes: int = 4, use_rep: str = "X_nbvae"
) -> pd.DataFrame:
    r"""Main directions of all learned responses, and what each does to every gene.

    The model's own axes are known only up to an invertible mixture. What they span is: the displacement of
    each context's mean control cell,
    :math:`\delta_\theta = (A_\theta - I) \bar z_c + b_\theta`. Their singular vectors are the axes here, with
    the sign that makes most responses positive and the length of a typical response. The decoder's Jacobian
    of log proportions, at the mean control cell of all contexts, carries them to genes.

    Returns
    -------
    DataFrame
        The columns ``axis`` (1, 2, ...), ``share`` (of the squared length of all displacements),
        ``gene``, ``effect`` (signed, log2 fold change to first order).
    """
    groups, covariates = Groups(adata, use_rep=use_rep, min_cells=1), _one_hot(adata, vae)
    means = {
        c: z.mean(0, keepdim=True) for c, z in groups.control.items() if c in operators.conditions.contexts
    }
    members = [group for group in groups if group.context in means]
    names = operators.conditions.perturbations
    with torch.no_grad():
        moved = [operators.operator(g.condition(names))(means[g.context]) for g in members]
    steps = [after - means[g.context] for after, g in zip(moved, members, strict=True)]
    scores, size, axes = torch.linalg.svd(torch.cat(steps), full_matrices=False)
    sign = torch.where(scores.sum(0) < 0, -1.0, 1.0)
    directions = axes * (sign * size / len(steps) ** 0.5).unsqueeze(1)
    contexts = sorted({group.context for group in members})
    rows = np.concatenate([groups.control_rows[context] for context in contexts])
    centre = torch.cat([groups.control[context] for context in contexts]).mean(0, keepdim=True)
    own = None if covariates is None else covariates[rows].mean(0, keepdim=True)
    effects = _log2_slopes(vae, centre, directions[:n_axes], own)
    share = (size.square() / size.square().sum()).tolist()
    tables = [
        pd.DataFrame({"axis": k + 1, "share": share[k], "gene": vae.genes, "effect": effect.numpy()})
        for k, effect in enumerate(effects)
    ]
    return pd.concat(tables, ignore_index=True)


def _mean_shares(matrix: CountMatrix, rows: np.ndarray) -> np.ndarray:
    """Each gene's share of a cell's counts, mean over the cells `rows`, (gene,); read in parts."""
    total, library = np.zeros(matrix.shape[1]), matrix.library.double().numpy()
    for part, block in matrix.blocks(rows):
        total += np.asarray(block.multiply(1.0 / library[part, None]).sum(0)).ravel()
    return total / len(rows)


def _one_hot(adata: AnnData, vae: NBVAE) -> Tensor | None:
    matrix = model_counts(adata, vae)
    return vae.one_hot(matrix.covariates, len(matrix))


def _mean_proportions(vae: NBVAE, z: Tensor, covariates: Tensor | None) -> np.ndarray:
    return vae.log_proportions(z, covariates).exp().mean(0).numpy()


def _log2_slopes(vae: NBVAE, z: Tensor, directions: Tensor, covariates: Tensor | None) -> Tensor:
    """(direction, gene) derivative of the log2 proportions at z (1, d) along each direction (d,)."""

    def log_proportions(cell: Tensor) -> Tensor:
        return vae.log_proportions(cell, covariates)[0]

    jacobian = torch.autograd.functional.jacobian(log_proportions, z)[:, 0]
    return (directions @ jacobian.T / np.log(2)).detach()


def _table(genes, before, after, pseudocount: float, group: Group, groups: Groups, n_top: int | None):
    before, after = (COUNTS_PER_CELL * mean.astype(float) + pseudocount for mean in (before, after))
    lfc = np.log2(after / before)
    order = np.argsort(-np.abs(lfc), kind="stable")[:n_top]
    names: dict[str, object] = {"context": group.context, "perturbation": group.perturbation}
    names |= {} if groups.keys.dose_key is None else {"dose": group.dose}
    return pd.DataFrame(names | {"gene": np.asarray(genes)[order], "lfc": lfc[order]})


# -- which responses are alike --------------------------------------------------------------------------------------


def response_profiles(
    operators: OperatorModel, conditions: Sequence[Condition | str] | None = None
) -> pd.DataFrame:
    r"""Coefficients of conditions on orthonormal axes that span what the model's own axes span.

    The model's axes are known only up to an invertible mixture, and so are its coefficients
    :math:`\alpha, \beta`. With the QR decompositions of the axes, :math:`[u_k] = Q R` for the shifts and the same
    for the flattened matrices :math:`U_k V_k^\top`, the coefficients :math:`R\beta` and :math:`R\alpha` have
    lengths and angles that no mixture changes.

    Parameters
    ----------
    operators
        Fitted operators.
    conditions
        Conditions or labels (``"A"``, ``"A+B"``), a context's own part left aside; every perturbation and every
        measured pair where None.

    Returns
    -------
    DataFrame
        A row per condition: ``alpha_1 ...`` (matrix part) and ``beta_1 ...`` (shift part).

    References
    ----------
    Golub and Van Loan 2013, Matrix Computations, section 5.2 (QR).
    """
    encoder = operators.conditions
    if conditions is None:
        conditions = [Condition(parts) for parts in [*((p,) for p in encoder.perturbations), *encoder.pairs]]
    parsed = [
        Condition.parse(c, perturbations=encoder.perturbations) if isinstance(c, str) else c
        for c in conditions
    ]
    with torch.no_grad():
        alpha, beta = encoder(encoder.design(parsed))
        matrices = (operators.axis_left @ operators.axis_right.mT).flatten(1)
        parts = [
            (coefficients @ torch.linalg.qr(axes.T)[1].T).double().cpu().numpy()
            for coefficients, axes in ((alpha, matrices), (beta, operators.axis_shift))
        ]
    names = [
        f"{kind}_{k + 1}"
        for kind, part in zip(("alpha", "beta"), parts, strict=True)
        for k in range(part.shape[1])
    ]
    return pd.DataFrame(np.concatenate(parts, axis=1), index=[str(c) for c in parsed], columns=names)


def response_similarity(
    operators: OperatorModel,
    conditions: Sequence[Condition | str] | None = None,
    *,
    part: str = "both",
) -> pd.DataFrame:
    r"""Cosine of the angle between the responses of conditions: 1 alike, 0 unrelated, -1 opposite.

    Parameters
    ----------
    operators, conditions
        As in :func:`response_profiles`.
    part
        ``"shift"``, ``"matrix"``, or ``"both"``: both are displacements of a typical cell of a standard normal latent.

    Returns
    -------
    DataFrame
        (condition, condition), symmetric with ones on the diagonal; NaN for a condition without a response.
    """
    prefix = {"both": ("alpha", "beta"), "matrix": "alpha", "shift": "beta"}[part]
    profiles = response_profiles(operators, conditions)
    values = profiles.loc[:, profiles.columns.str.startswith(prefix)].to_numpy()
    size = np.linalg.norm(values, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = np.where(size > 1e-9, values / size, np.nan)
    return pd.DataFrame(unit @ unit.T, index=profiles.index, columns=profiles.index)


# -- gene sets ------------------------------------------------------------------------------------------------------


@checked
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
    usual = next((name for name in _VALUES if name in changes), None)
    for column in ("gene", value or usual or "effect"):
        if column not in changes:
            hint = did_you_mean(column, changes.columns)
            fix = f"rename or add it ({hint}), or pass value=..."
            raise LabelError(f"a column {column!r}", f"{list(changes.columns)}", fix)
    sets = gene_set_members(gene_sets)
    by = [name for name in ("axis", "group", "context", "perturbation", "dose") if name in changes]
    if not by:
        changes, by = changes.assign(profile="all"), ["profile"]
    wide = changes.pivot(index=by, columns="gene", values=value or usual).fillna(0.0)
    wide.columns = wide.columns.astype(str)
    largest = sets[sets["target"].isin(wide.columns)].groupby("source").size().max()
    if not largest >= min_genes:
        n_sets = sets["source"].nunique()
        problem = f"at most {np.nan_to_num(largest):g} in any of {n_sets} sets, among {wide.shape[1]} genes"
        fix = "use the same gene names (symbols or Ensembl), keep more genes, or lower min_genes"
        raise DataError(f"a set that shares {min_genes} genes with the table", problem, fix)
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
    adjusted = table.groupby(by, sort=False)["p"].transform(stats.false_discovery_control)
    table.insert(table.columns.get_loc("p") + 1, "fdr", adjusted)
    return table.sort_values([*by, "p"], ignore_index=True)


def gene_set_members(gene_sets) -> pd.DataFrame:
    """Rows ``source, target`` without repeats."""
    if isinstance(gene_sets, Mapping):
        rows = [(str(name), str(gene)) for name, genes in gene_sets.items() for gene in genes]
    else:
        path = Path(gene_sets)
        if not path.is_file():
            raise DataError("a GMT file", f"no file {path}", "give the path of a .gmt file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError("a GMT file", f"{path}: {error}", "save it as UTF-8 text") from error
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            fields = line.rstrip().split("\t")
            if line.strip() and len(fields) < 3:
                problem = f"line {number} of {path} with {len(fields)} fields"
                fix = "write name, description and genes separated by tabs"
                raise DataError("lines of a GMT file", problem, fix)
            rows += [(fields[0], gene) for gene in fields[2:] if gene]
    return pd.DataFrame(rows, columns=["source", "target"]).drop_duplicates(ignore_index=True)


# -- differential expression of predicted cells ----------------------------------------------------------------------


@same_threads()
def predicted_expression(predicted: AnnData, control: AnnData) -> AnnData:
    """Predicted and control cells in one AnnData, with scanpy's differential expression between them.

    Counts are scaled to 10,000 a cell and log1p-transformed; ``scanpy.tl.rank_genes_groups`` compares the
    predicted cells with the controls. All of scanpy's tools then work: ``sc.get.rank_genes_groups_df(both,
    "predicted")``, ``sc.pl.rank_genes_groups``, ``sc.tl.filter_rank_genes_groups``.

    Parameters
    ----------
    predicted
        Virtual cells (:func:`predict`, or ``holdout(...).predictions``), counts in ``X``.
    control
        Control cells of a screen that was set up.

    Returns
    -------
    AnnData
        Over the genes that both share: log1p-CP10k in ``X``, counts in ``layers["counts"]``, ``"predicted"`` or
        ``"control"`` in ``obs["side"]``, and Wilcoxon tests in ``uns["rank_genes_groups"]``.

    Raises
    ------
    DataError
        Where the two share no genes, or a side has fewer than two cells.
    """
    import scanpy as sc

    genes = [gene for gene in predicted.var_names if gene in set(control.var_names)]
    sizes = (predicted.n_obs, control.n_obs)
    if not genes or min(sizes) < 2:
        problem = f"{len(genes)} shared genes, {sizes[0]} predicted and {sizes[1]} control cells"
        fix = "give cells over the same genes, at least two on each side"
        raise DataError("predicted and control cells to compare", problem, fix)
    slots = ((predicted, None), (control, keys_of(control).layer))
    both = concat([AnnData(counts(side[:, genes], slot)) for side, slot in slots], index_unique="-")
    side = pd.Categorical(np.repeat(["predicted", "control"], sizes))
    both.obs = pd.DataFrame({"side": side}, index=[*predicted.obs_names, *control.obs_names])
    both.obs_names_make_unique()
    both.var_names = genes
    both.layers["counts"] = both.X.copy()
    sc.pp.normalize_total(both, target_sum=COUNTS_PER_CELL)
    sc.pp.log1p(both)
    sc.tl.rank_genes_groups(
        both, "side", groups=["predicted"], reference="control", method="wilcoxon", tie_correct=True
    )
    return both
