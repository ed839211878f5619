"""What a move does to the genes: decoded changes with their intervals, measured ones, and one gene's counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.matrices import CountMatrix
from ..errors import LabelError, did_you_mean, three_beats
from ..models.affine import AffineOperator
from ..models.carry import Observed, carry_counts
from ..models.likelihood import COUNTS_PER_CELL, NegativeBinomial
from ..models.vae import NBVAE
from .clouds import Clouds

_WITH_INTERVAL = 40
"""Genes that get an interval, those that change most: quantiles of all would take longer than the rest."""


class Expression:
    """Genes of the cells that a question moves.

    Parameters
    ----------
    vae
        Trained model.
    matrix
        Counts of the screen, as the model reads them.
    clouds
        The cells.
    n_replicates
        Bootstrap replicates of an interval, over cells.
    """

    def __init__(self, vae: NBVAE, matrix: CountMatrix, clouds: Clouds, *, n_replicates: int):
        self.vae, self.clouds, self.n_replicates = vae, clouds, n_replicates
        self._matrix, self._keep = matrix, clouds.memory.keep
        self._genes = np.array(vae.genes, dtype=object)
        self._column = {gene: i for i, gene in enumerate(vae.genes)}

    @torch.no_grad()
    def changes(self, source: np.ndarray, target: np.ndarray, moving: AffineOperator):
        """What :class:`~cellop_nb.notebook.questions.Answer` calls `genes`, and the moved cells decoded.

        Returns
        -------
        DataFrame, and the distribution (cell, gene) after the move.
        """
        start, weights = self._decoded(source), self._weights(source)
        z = moving(self.clouds.latents(source, "decode"))
        after = self.vae.decode(z, start["library"], start["covariates"])
        shares = after.mean / start["library"][:, None]
        lfc = torch.log2(_level(shares.mean(0)) / _level(start["shares"].mean(0))).numpy()
        order = np.argsort(-np.abs(lfc), kind="stable")
        top, (low, high) = order[:_WITH_INTERVAL], np.full((2, len(lfc)), np.nan)
        ends = (_level(weights @ cells[:, top]) for cells in (shares, start["shares"]))
        replicates = torch.log2(torch.div(*ends)).numpy()
        low[: len(top)], high[: len(top)] = np.quantile(replicates, [0.025, 0.975], axis=0)
        ranked = {"gene": self._genes[order], "lfc": lfc[order], "low": low, "high": high}
        return pd.DataFrame({**ranked, "measured": self._measured(source, target)[order]}), after

    def recalled(self, source: np.ndarray, target: np.ndarray) -> pd.Series:
        """Log2 fold change (gene,) between the real cells of both sides, as the VAE gives them back.

        No operator takes part: what is wrong here is what encoder and decoder lose.
        """
        before, after = (_level(self._decoded(rows)["shares"].mean(0)) for rows in (source, target))
        return pd.Series(torch.log2(after / before).numpy(), index=self.vae.genes)

    def named(self, gene: str | None, genes: pd.DataFrame) -> str:
        """The gene that is asked for, or the first of a table.

        Raises
        ------
        LabelError
            For a gene that the model does not know.
        """
        if gene is None:
            return str(genes["gene"].iloc[0])
        if gene not in self._column:
            raise LabelError(three_beats("a gene of the model", repr(gene), did_you_mean(gene, self._column)))
        return gene

    def counts(
        self, gene: str, source: np.ndarray, target: np.ndarray, after: NegativeBinomial
    ) -> dict[str, np.ndarray]:
        """Log1p-CP10k of one gene: source cells, the same moved (counts sampled), real cells."""
        column, start = self._column[gene], self._decoded(source)
        expected = start["observed"].mean(after)[:, column]
        sampled = carry_counts(expected, torch.Generator().manual_seed(self.clouds.seed)).numpy()
        return {
            "start": self._log_counts(column, source),
            "moved": np.log1p(sampled / start["library"].numpy() * COUNTS_PER_CELL),
            "real": self._log_counts(column, target),
        }

    def _decoded(self, group: np.ndarray) -> dict:
        """The cells that stand for a group, decoded as they are."""

        @torch.no_grad()
        def decode() -> dict:
            rows = self.clouds.take(group, "decode")
            library = self._matrix.library[rows]
            covariates = {name: codes[rows] for name, codes in self._matrix.covariates.items()}
            x = torch.from_numpy(self._matrix.csr[rows][:, : self.vae.n_genes].toarray())
            before = self.vae.decode(self.clouds.latents(group, "decode"), library, covariates)
            observed, shares = Observed(x, library, before), before.mean / library[:, None]
            return {"library": library, "covariates": covariates, "observed": observed, "shares": shares}

        return self._keep(("decoded", group.tobytes()), decode)

    def _weights(self, group: np.ndarray) -> Tensor:
        """Bootstrap weights (replicate, cell) over the decoded cells of a group."""

        def draw() -> Tensor:
            n = len(self._decoded(group)["library"])
            random = np.random.default_rng(self.clouds.seed)
            draws = random.multinomial(n, np.full(n, 1 / n), size=self.n_replicates)
            return torch.from_numpy((draws / n).astype(np.float32))

        return self._keep(("weights", group.tobytes()), draw)

    def _measured(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Measured log2 fold change (gene,) between the real cells of both sides."""
        if not len(target):
            return np.full(len(self._column), np.nan)
        before, after = (_level(self._mean_share(rows)) for rows in (source, target))
        return np.log2(after / before)

    def _mean_share(self, rows: np.ndarray) -> np.ndarray:
        """Mean share (gene,) of the cells' own counts."""

        def find() -> np.ndarray:
            shares = self._matrix.csr[rows].T @ (1 / self._matrix.library[rows].numpy())
            return shares[: self.vae.n_genes] / len(rows)

        return self._keep(("share", rows.tobytes()), find)

    def _log_counts(self, column: int, rows: np.ndarray) -> np.ndarray:
        every = self._keep(("gene", column), lambda: self._matrix.csr[:, [column]].toarray().ravel())
        return np.log1p(every[rows] / self._matrix.library[rows].numpy() * COUNTS_PER_CELL)


def _level(share):
    """Counts per 10,000, plus one: what fold changes are taken of."""
    return COUNTS_PER_CELL * share + 1
