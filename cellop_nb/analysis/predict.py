"""From models to cells: embed counts, move control cells, carry them to a planned mean, and give them back as AnnData."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from ..data.contract import Keys, counts
from ..data.counts import TOTAL_KEY, CountLoader, has_other_genes, measured_totals, model_counts
from ..errors import DataError, counted, did_you_mean
from ..files import require_room, write_whole
from ..models.affine import AffineOperator
from ..models.carry import Observed, balanced_counts, carry_genes, carry_to_mean, levels, whole_levels
from ..models.vae import NBVAE
from .plan import Plan

REP = "X_nbvae"
"""Slot of ``obsm`` with latents."""


@torch.no_grad()
def embed(adata, vae: NBVAE, *, key_added: str = REP, batch_size: int = 2048) -> None:
    """Compute the latents of all cells: their posterior means.

    Parameters
    ----------
    adata
        Raw counts with the model's genes.
    vae
        A trained VAE.
    batch_size
        Cells that are encoded at a time.

    Returns
    -------
    None; writes ``obsm[key_added]``, (cell, latent) float32.

    Raises
    ------
    LabelError
        If the data were not set up.
    DataError
        If genes are missing, or a latent is not finite.
    """
    vae.eval()
    device = next(vae.parameters()).device
    matrix = model_counts(adata, vae)
    loader = CountLoader(matrix, batch_size=batch_size, shuffle=False, device=device)
    # A bar is for work that takes long enough to wonder about.
    loader = tqdm(loader, desc="embedding", disable=len(loader) < 20)
    latents, start = np.empty((adata.n_obs, vae.n_latent), dtype=np.float32), 0
    for batch in loader:
        z = vae.encode(batch.counts, batch.library, batch.covariates).loc
        latents[start : (start := start + len(z))] = z.float().cpu().numpy()
    broken = ~np.isfinite(latents).all(1)
    if broken.any():
        problem = (
            f"{counted(broken.sum(), 'cell')} with NaN or infinity, such as {adata.obs_names[broken][0]!r}"
        )
        raise DataError("finite latents", problem, "use a model whose weights are finite")
    adata.obsm[key_added] = latents


@dataclass(frozen=True, eq=False)
class Drawn:
    """Virtual cells before they are an AnnData: whole counts and expected counts (cell, gene), and latents (cell, d)."""

    counts: sparse.csr_matrix
    mean: sparse.csr_matrix
    latents: np.ndarray
    growth: float


class Start:
    """Control cells of one context as a model sees them, before any move.

    Parameters
    ----------
    vae
        The model.
    x, library, covariates
        Counts (cell, gene) of its genes, library sizes (cell,), and category codes.

    Attributes
    ----------
    z : (cell, d) latents
    mean_level : (gene,) mean log1p-CP10k
    """

    @torch.no_grad()
    def __init__(self, vae: NBVAE, batch) -> None:
        self.vae, self.library, self.covariates = vae.eval(), batch.library, batch.covariates
        self.z = vae.encode(batch.counts, batch.library, batch.covariates).loc
        self.x = batch.x[:, : vae.n_genes]
        self._observed = Observed(self.x, self.library, self._decode(self.z))
        self.mean_level = levels(self.x, self.library).mean(0).double().cpu().numpy()

    @classmethod
    def of(cls, cells: ad.AnnData, vae: NBVAE, rows: Sequence[int] | None = None) -> Start:
        """Some rows of the counts of :func:`modelled_counts`, all where None."""
        matrix = model_counts(cells, vae)
        rows = np.arange(len(matrix)) if rows is None else np.asarray(rows)
        return cls(vae, matrix.batch(rows, next(vae.parameters()).device))

    def _decode(self, z: Tensor):
        return self.vae.decode(z, self.library, self.covariates)

    @torch.no_grad()
    def expected(self, z: Tensor) -> Tensor:
        """Expected counts (cell, gene) of these cells with their latents at `z` (cell, d)."""
        return self._observed.mean(self._decode(z))

    def change(self, operator: AffineOperator) -> np.ndarray:
        """(gene,) change of mean log1p-CP10k when the cells are moved."""
        return self._change(self.expected(operator(self.z)))

    def _change(self, expected: Tensor) -> np.ndarray:
        return whole_levels(expected, self.library)[0].mean(0).double().cpu().numpy() - self.mean_level

    @torch.no_grad()
    def carried(
        self, expected: Tensor, change: np.ndarray, growth: float = 0.0, gained: Tensor | None = None
    ) -> Tensor:
        """Expected counts (cell, gene) of moved cells, carried to a `change` (gene,) of the cells' mean level.

        The level is that of cells whose log library changes by `growth`: in more counts a gene is rarer 0. Genes that are
        not modelled gain `gained` (cell,) counts at an equal library; as the decoder says where None.
        """
        left, factor = expected.sum(-1), math.exp(growth)
        others = self.library - (left if gained is None else self.x.sum(-1) - gained)
        others = torch.minimum(others, self.library - 0.5 * left).clamp_min(0.0)
        target = torch.as_tensor(self.mean_level + change)
        return carry_to_mean(factor * expected, factor * self.library, target, others=factor * others)

    @torch.no_grad()
    def fresh(self, z: Tensor, generator: torch.Generator) -> sparse.csr_matrix:
        """Counts (cell, gene) drawn anew from the decoder at latents `z` and these cells' library sizes."""
        return sparse.csr_matrix(self._decode(z).sample(generator).cpu().numpy())

    @torch.no_grad()
    def moved(
        self,
        operator: AffineOperator,
        strength: float = 1.0,
        planned: Plan | None = None,
        growth: float = 0.0,
        generator: torch.Generator | None = None,
        gained: Tensor | None = None,
    ) -> Drawn:
        r"""The cells moved by the operator at a strength, and carried to the planned mean.

        At a part strength t the planned change is what the moved cells change by there, and t times what the plan adds to
        them at full strength; without a plan they stay where the operator moves them. `growth` is the change of the log
        of the library, `gained` as in :meth:`carried`.
        """
        z = operator.power(strength)(self.z)
        expected = self.expected(z)
        if planned is None or strength == 0:
            expected = expected * math.exp(growth)
        else:
            change = planned.change
            if strength != 1:
                change = self._change(expected) + strength * (change - self.change(operator))
            expected = self.carried(expected, change, growth, gained)
        whole = balanced_counts(expected, generator)
        counts, mean = (sparse.csr_matrix(part.cpu().numpy()) for part in (whole, expected))
        return Drawn(counts, mean, z.cpu().numpy(), growth)


def modelled_counts(
    adata: ad.AnnData,
    model: NBVAE | Sequence[str],
    keys: Keys,
    missing_genes: str = "refuse",
    shares: np.ndarray | None = None,
) -> ad.AnnData:
    """Counts of the modelled genes in their order, with the labels of the cells: all that training and moving read.

    Parameters
    ----------
    model
        The VAE, or the genes of one that is to be trained. Counts over all measured genes go to ``obs["total_counts"]``
        where some are not modelled.
    missing_genes
        What becomes of genes that the data lack: "refuse", "zero", or "impute": their `shares` (gene,) of a cell's
        counts, rounded.
    """
    genes = list(model.genes if isinstance(model, NBVAE) else model)
    column = adata.var_names.get_indexer(genes)
    lacking = column < 0
    if lacking.any() and missing_genes == "refuse":
        names = np.asarray(genes, dtype=object)[lacking]
        problem = f"{len(names)} of {len(genes)} missing, such as {list(names[:3])}"
        likely = did_you_mean(names[0], adata.var_names)
        fix = f"use data with these genes ({likely}), or missing_genes='zero' or 'impute'"
        raise DataError("all genes of the model in var_names", problem, fix)
    x = sparse.csr_matrix(counts(adata, keys.layer), dtype=np.float32)
    chosen = x[:, column]
    if lacking.any():
        chosen = sparse.csr_matrix(chosen @ sparse.diags((~lacking).astype(np.float32)))
        chosen.eliminate_zeros()
    if lacking.any() and missing_genes == "impute":
        library = np.asarray(x.sum(1), dtype=np.float32).ravel()
        chosen = sparse.csr_matrix(
            chosen + sparse.csr_matrix(np.rint(np.outer(library, np.where(lacking, shares, 0.0))))
        )
    cells = ad.AnnData(chosen, obs=adata.obs.copy(), var=pd.DataFrame(index=pd.Index(genes, dtype=str)))
    sums, total = np.asarray(chosen.sum(1), dtype=float).ravel(), measured_totals(adata)
    if total is None or not has_other_genes(adata):
        total = np.asarray(x.sum(1), dtype=float).ravel()
    cells.obs = cells.obs.drop(columns=[TOTAL_KEY], errors="ignore")
    has_others = model.total_key is not None if isinstance(model, NBVAE) else (total - sums > 0.5).any()
    if has_others:
        cells.obs[TOTAL_KEY] = np.maximum(total, sums)
    Keys(None, *list(vars(keys).values())[1:]).write(cells)
    return cells


_AT_ONCE = 250_000
"""Counts (cells times genes) of genes that are not modelled which are carried together."""


def carry_others(
    x: sparse.csc_matrix,
    library: Tensor,
    change: np.ndarray,
    growth: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[sparse.csc_matrix, Tensor]:
    """Genes that are not modelled, each carried by its planned `change` (gene,) of mean log1p-CP10k, block by block.

    From counts `x` (cell, gene) of control cells and their `library` (cell,) over all genes, whose log changes by
    `growth`: whole counts (cell, gene), and (cell,) expected counts that they gained before the library grew.
    """
    total, parts, gained = library.double().cpu().numpy(), [x[:, :0]], np.zeros(x.shape[0])
    for start in range(0, x.shape[1], width := max(1, _AT_ONCE // max(x.shape[0], 1))):
        block = x[:, start : start + width]
        carried = carry_genes(block, total, change[start : start + width], growth)
        gained += carried.sum(1) / math.exp(growth) - np.asarray(block.sum(1)).ravel()
        whole = balanced_counts(torch.from_numpy(carried), generator, one_order=True)
        parts.append(sparse.csc_matrix(whole.numpy().astype(np.float32)))
    return sparse.csc_matrix(sparse.hstack(parts, "csc")), torch.from_numpy(gained).to(library)


def assemble(
    source: ad.AnnData,
    keys: Keys,
    genes: Sequence[str],
    drawn: Drawn,
    perturbation: str,
    others: sparse.csr_matrix | None = None,
    with_mean: bool = True,
) -> ad.AnnData:
    """Virtual cells over all genes of the data: modelled ones as drawn, of the rest the counts `others` (cell, gene),
    those of the control cells where None; with expected counts in ``layers["mean"]``.
    """
    column = source.var_names.get_indexer(list(genes))
    there = np.flatnonzero(column >= 0)
    width = source.n_vars
    put = sparse.csr_matrix((np.ones(len(there), np.float32), (there, column[there])), (len(genes), width))
    modelled = np.zeros(width, dtype=bool)
    modelled[column[there]] = True
    if others is None:
        others = sparse.csr_matrix(counts(source, keys.layer), dtype=np.float32)
    others = others @ sparse.diags((~modelled).astype(np.float32))
    whole = sparse.csr_matrix(drawn.counts @ put + others)
    obs = source.obs.copy()
    obs[keys.perturbation_key] = perturbation
    obs["source_cell"], obs["predicted"] = source.obs_names.to_numpy(), True
    if TOTAL_KEY in obs:
        obs[TOTAL_KEY] = obs[TOTAL_KEY].to_numpy(float) * math.exp(drawn.growth)
    repeat = obs.groupby(source.obs_names.to_numpy()).cumcount().to_numpy()
    obs.index = [
        f"{name}, {perturbation}" + (f", {k}" if k else "")
        for name, k in zip(source.obs_names, repeat, strict=True)
    ]
    cells = ad.AnnData(whole, obs=obs, var=source.var[[]].assign(modelled=modelled))
    cells.obsm[REP] = drawn.latents
    if with_mean:
        cells.layers["mean"] = sparse.csr_matrix(drawn.mean @ put + others)
    return cells


def kept_parts(
    folder: Path, names: Sequence[str], make: Callable[[list[int]], Iterator[ad.AnnData]]
) -> Iterator[ad.AnnData]:
    """Parts in their order, each kept in a file of its name in `folder`: read where it is there, else made.

    `make` is called with the positions of those that are to be made.
    """
    files = [folder / f"{name}.h5ad" for name in names]
    fresh = make([k for k, file in enumerate(files) if not file.is_file()])
    for file in files:
        if file.is_file():
            yield ad.read_h5ad(file)
            continue
        cells = next(fresh)
        write_whole(file, partial(_write, parts=[cells], about={}))
        yield cells


def write_parts(path: str | Path, parts: Iterable[ad.AnnData], about: dict, *, total: int) -> Path:
    """Write virtual cells to one .h5ad, part by part; the file is whole or not there.

    Raises
    ------
    DataError
        For a path that is no .h5ad.
    """
    if Path(path).suffix != ".h5ad":
        raise DataError("the path of an .h5ad file", repr(str(path)), "end it in .h5ad")
    bar = tqdm(parts, "predicting", total=total, disable=total < 20)
    return write_whole(path, lambda part: _write(part, bar, about))


def _write(path: Path, parts: Iterable[ad.AnnData], about: dict) -> None:
    obs = []  # a few labels per cell: all that is kept
    with h5py.File(path, "w") as file:
        for number, cells in enumerate(parts):
            latents = np.asarray(cells.obsm[REP])
            file.flush()
            require_room(path, 2 * (cells.X.data.nbytes + cells.X.indices.nbytes + latents.nbytes))
            if number == 0:
                # Rows are appended below; all else is written with the first part.
                ad.io.write_elem(file, "/", ad.AnnData(X=cells.X, var=cells.var, uns={"cellop_nb": about}))
                growing = {"maxshape": (None, latents.shape[1])}
                ad.io.write_elem(file["obsm"], REP, latents, dataset_kwargs=growing)
            else:
                ad.io.sparse_dataset(file["X"]).append(cells.X)
                stored = file["obsm"][REP]
                stored.resize(len(stored) + len(latents), axis=0)
                stored[-len(latents) :] = latents
            obs.append(cells.obs)
        labels = pd.concat(obs)
        file.flush()
        require_room(path, 2 * int(labels.memory_usage(deep=True).sum()))
        ad.io.write_elem(file, "obs", labels)
