"""Moved controls against held-out cells: the noise floor, and operators that are right or do nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cellop_nb.analysis.transport import group_energies, noise_floor, transport_scores
from cellop_nb.data.groups import Groups
from cellop_nb.data.splits import split
from cellop_nb.data.synthetic import planted_operator, synthetic
from cellop_nb.models.affine import AffineOperator
from cellop_nb.models.energy import energy_distance


class Planted:
    """The planted operators, where a fitted model would stand."""

    def __init__(self, adata):
        self.adata = adata

    def operator(self, condition):
        matrix, shift = planted_operator(self.adata, condition.label, condition.context)
        return AffineOperator(torch.as_tensor(matrix).float(), torch.as_tensor(shift).float())


class Identity:
    def operator(self, condition):
        return AffineOperator.identity(6)


@pytest.fixture(scope="module")
def screen():
    adata = synthetic(n_contexts=2, n_perturbations=3, n_cells=200, n_genes=20, seed=1)
    split(adata, test_fraction=0.3)
    return adata


def test_the_planted_operators_reach_the_floor(screen):
    scores = transport_scores(screen, Planted(screen), use_rep="X_truth")
    wide = scores.pivot_table(index="perturbation", columns="method", values="energy")
    floor = scores["floor"].mean()
    assert set(wide.columns) == {"no change", "mean shift", "operator"}
    assert wide.loc["drug 1", "no change"] > 5 * floor
    assert wide["operator"].abs().max() < 2 * floor
    assert abs(wide.loc["drug 3", "no change"]) < 2 * floor, "the last drug does nothing"


def test_doing_nothing_is_no_change(screen):
    scores = transport_scores(screen, Identity(), use_rep="X_truth")
    wide = scores.pivot_table(index="group", columns="method", values="energy")
    np.testing.assert_allclose(wide["operator"], wide["no change"], rtol=1e-5)
    assert set(scores["cells"]) == {60}


def test_effects_stand_beside_their_floor(screen):
    data = Groups(screen, use_rep="X_truth", split="train")
    table = group_energies(data)
    first = data[0]
    expected = energy_distance(data.control[first.context], first.cells)
    assert table.loc[0, "energy"] == pytest.approx(float(expected), rel=1e-5)
    assert (table["energy"] > table["floor"]).groupby(table["perturbation"]).all()["drug 1"]


def test_two_samples_of_one_cloud_lie_below_the_floor_19_times_out_of_20():
    generator, below = torch.Generator().manual_seed(3), []
    for _ in range(100):
        cells = torch.randn(80, 3, generator=generator)
        below.append(float(energy_distance(cells[:20], cells[20:])) < noise_floor(cells, 20, repeats=40))
    assert 0.88 < np.mean(below) < 1.0


def test_the_floor_falls_with_more_cells_and_is_missing_for_too_few():
    cells = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    assert noise_floor(cells) < noise_floor(cells[:40])
    assert math.isnan(noise_floor(cells[:3]))


@pytest.mark.parametrize("n_cells", [10, 25])
def test_splits_are_energy_distances_of_their_parts(n_cells):
    cells = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(7):
        order = torch.randperm(50, generator=generator)
        values.append(energy_distance(cells[order[:n_cells]], cells[order[n_cells:]]))
    expected = float(torch.stack(values).quantile(0.9))
    found = noise_floor(cells, n_cells, repeats=7, quantile=0.9, seed=3)
    assert found == pytest.approx(expected, abs=1e-5)
