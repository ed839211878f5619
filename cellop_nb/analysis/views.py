"""Training cells where predictions are judged: as decoded counts, or as latents where there is no decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.batches import model_counts
from ..data.contract import context_labels, obs_labels
from ..data.matrices import CountMatrix
from ..models.carry import Observed, Remainder, carry_counts
from ..models.energy import energy_distance
from ..models.likelihood import levels
from ..models.vae import NBVAE
from .formulas import e_distance
from .predict import latents
from .space import EvaluationSpace


class LatentView:
    """Latents, scored by their energy distance (Euclidean, U-statistic).

    Parameters
    ----------
    adata
        Training cells with latents in ``obsm[use_rep]``.
    max_cells
        Cells per group that are looked at.

    Attributes
    ----------
    z : Tensor
        (cell, d) latents.
    contexts, perturbations : ndarray
        (cell,) labels.
    groups : list
        Perturbed (context, perturbation) groups, sorted.
    """

    def __init__(
        self,
        adata,
        *,
        use_rep: str = "X_nbvae",
        perturbation_key: str = "perturbation",
        context_key: str | Sequence[str] | None = "cell_type",
        control: str = "control",
        max_cells: int = 300,
    ):
        self.z = latents(adata, use_rep)
        self.contexts = context_labels(adata, context_key).to_numpy()
        self.perturbations = obs_labels(adata, perturbation_key).to_numpy()
        self.control, self.max_cells = control, max_cells
        labels = pd.DataFrame({"context": self.contexts, "perturbation": self.perturbations})
        self._rows = dict(labels.groupby(["context", "perturbation"], sort=True).indices)
        self.groups = [group for group in self._rows if group[1] != control]
        self._means: dict[tuple[str, str], Tensor] = {}

    def rows(self, context: str, perturbation: str) -> np.ndarray:
        """Rows of a group, (cell,); the first `max_cells` of them."""
        return self._rows.get((context, perturbation), np.zeros(0, dtype=int))[: self.max_cells]

    def mean(self, context: str, perturbation: str) -> Tensor:
        """Mean latent of a group, (d,)."""
        key = (context, perturbation)
        if key not in self._means:
            self._means[key] = self.z[self.rows(*key)].mean(0)
        return self._means[key]

    def profiles(self) -> dict[str, np.ndarray]:
        """Mean control cell of each context, by which contexts are compared."""
        names = sorted(set(self.contexts[self.perturbations == self.control]))
        return {name: self.profile(self.rows(name, self.control)) for name in names}

    def profile(self, rows: np.ndarray) -> np.ndarray:
        """Mean of cells in the space where contexts are compared."""
        return self.z[rows].mean(0).numpy()

    def moved(self, rows: np.ndarray, z: Tensor, remainder: Remainder | None, seed: int = 0):
        """Cells `rows` with their latents at `z` (cell, d), and what is known to be missed added."""
        return z if remainder is None else z + torch.as_tensor(remainder.level).to(z)

    def cells(self, rows: np.ndarray):
        """Real cells, as :meth:`moved` gives predicted ones."""
        return self.z[rows]

    def level(self, cells, rows: np.ndarray) -> np.ndarray:
        """Mean level of cells (:meth:`moved`, :meth:`cells`) with the library sizes of `rows`."""
        return cells.mean(0).numpy()

    def expression(self, cells) -> np.ndarray:
        """Mean cell in the space of the scores."""
        return cells.mean(0).numpy()

    def size(self, cells) -> float:
        """Mean number of counts of a cell; latents have none to tell."""
        return 1.0

    def real_level(self, rows: np.ndarray) -> np.ndarray:
        """Mean level of real cells."""
        return self.level(self.cells(rows), rows)

    def real_size(self, rows: np.ndarray) -> float:
        """Mean number of counts of a real cell."""
        return self.size(self.cells(rows))

    def energy(self, cells, real: np.ndarray) -> float:
        """Energy distance (Euclidean, U-statistic) of :meth:`moved` cells to the real cells `real`."""
        return float(energy_distance(cells, self.z[real]))


class CountView(LatentView):
    """Counts carried by the decoder, scored in the principal components of log1p-CP10k.

    Parameters
    ----------
    adata
        Training cells with raw counts of the genes of `space` and latents in ``obsm[use_rep]``.
    vae
        The decoder; its genes are those of `space`.
    space
        Fitted on training cells.
    """

    def __init__(self, adata, vae: NBVAE, space: EvaluationSpace, *, layer: str | None = None, **keys):
        super().__init__(adata, **keys)
        matrix = model_counts(adata, vae, layer=layer)
        assert isinstance(matrix, CountMatrix), "hold-outs refuse counts on disk"
        self.vae, self.space = vae.eval(), space
        self.counts, self.library = matrix.csr[:, : vae.n_genes], matrix.library
        self.covariates: Mapping[str, Tensor] = matrix.covariates

    def profile(self, rows: np.ndarray) -> np.ndarray:
        return self.space.transform(self.counts[rows]).mean(0)

    @torch.no_grad()
    def moved(self, rows: np.ndarray, z: Tensor, remainder: Remainder | None, seed: int = 0):
        x, library = self.cells(rows), self.library[rows]
        given = {name: codes[rows] for name, codes in self.covariates.items()}
        before = self.vae.decode(self.z[rows], library, given)
        after = self.vae.decode(z, library, given)
        mean = Observed(x, library, before).mean(after, remainder)
        return carry_counts(mean, torch.Generator().manual_seed(seed))

    def cells(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.counts[rows].toarray())

    def level(self, cells, rows: np.ndarray) -> np.ndarray:
        return levels(cells, self.library[rows]).mean(0).numpy()

    def expression(self, cells) -> np.ndarray:
        return self.space.transform(cells.numpy()).mean(0)

    def size(self, cells) -> float:
        return float(cells.sum(1).mean())

    def energy(self, cells, real: np.ndarray) -> float:
        pair = (self.space.project(self.space.transform(x)) for x in (cells.numpy(), self.counts[real]))
        return e_distance(*pair)
