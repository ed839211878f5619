"""Series of questions: ways to a pair, part doses, and what is known where the truth was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from cellop_nb.analysis.predict import source_cells
from cellop_nb.data.groups import Groups
from cellop_nb.data.synthetic import planted_operator, planted_proportions
from cellop_nb.models.energy import energy_distance
from cellop_nb.notebook import scenarios
from cellop_nb.notebook.questions import Question
from cellop_nb.notebook.scenarios import dose_response, ways_to_combine
from cellop_nb.notebook.virtual import VirtualCells
from cellop_nb.training.operators import new_operators


def test_every_way_to_build_a_pair_is_compared_with_the_cells_that_got_both(cells):
    table = ways_to_combine(cells, "type A")
    energy = table.set_index("method")["energy"]
    assert set(table["group"]) == {"drug 1+drug 2"}
    assert energy["in the label's order"] == cells.ask(Question(("drug 1", "drug 2"), "type A")).energy
    assert energy["in the other order"] == cells.ask(Question(("drug 2", "drug 1"), "type A")).energy
    assert (
        energy["sum of generators"] == cells.ask(Question("drug 1+drug 2", "type A", rule="generator")).energy
    )
    assert energy["no change"] == cells.ask(Question("drug 1+drug 2", "type A")).energy_start
    assert table["floor"].nunique() == 1


def test_a_dose_leads_away_from_the_source_and_towards_the_real_cells(cells):
    distances, genes = dose_response(cells, Question("drug 1", "type A"), [0.0, 0.5, 1.0], n_genes=2)
    by_target = distances.pivot(index="strength", columns="target", values="energy")
    assert by_target["the unmoved cells"].is_monotonic_increasing
    assert by_target["the real cells aimed at"].is_monotonic_decreasing
    assert by_target.loc[0.0, "the unmoved cells"] < 0, "a U-statistic of a cloud with itself"
    assert genes.groupby("gene").size().tolist() == [3] * 4
    assert (genes.loc[genes["strength"] == 0, "lfc"].abs() < 1e-5).all()


def level_change(adata, before, after) -> np.ndarray:
    """Log2 fold change of the planted mean expression between two clouds of true latents."""
    levels = [1e4 * planted_proportions(adata, cloud).mean(0) + 1 for cloud in (before, after)]
    return np.log2(levels[1] / levels[0])


def test_errors_at_half_a_dose_are_those_to_the_planted_change(trained, cells):
    adata, vae, _ = trained
    errors = scenarios.half_dose_errors(cells, Question("drug 1", "type A"))
    z, (matrix, shift) = (
        adata.obsm["X_truth"][source_cells(adata, "type A")],
        planted_operator(adata, "drug 1", "type A"),
    )
    # the square root of the map in homogeneous coordinates, by another road than the operator's own power
    affine = np.block([[matrix, shift[:, None]], [np.zeros((1, len(shift))), np.ones((1, 1))]])
    root = linalg.sqrtm(affine).real
    half = level_change(adata, z, z @ root[:-1, :-1].T + root[:-1, -1])
    full = level_change(adata, z, z @ matrix.T + shift)
    for name, strength, true in ((scenarios.HALF, 0.5, half), (scenarios.FULL, 1.0, full)):
        said = cells.ask(Question("drug 1", "type A", strength)).genes.set_index("gene")["lfc"][vae.genes]
        assert errors[name] == pytest.approx(np.linalg.norm(said - true) / np.linalg.norm(true), rel=1e-3)
    share = adata.X.toarray() / adata.X.sum(1).A1[:, None]
    here = (adata.obs["cell_type"] == "type A").to_numpy()
    means = [
        1e4 * share[here & (adata.obs["perturbation"] == p).to_numpy()].mean(0) + 1
        for p in ("control", "drug 1")
    ]
    counted = np.linalg.norm(np.log2(means[1] / means[0]) - full) / np.linalg.norm(full)
    assert errors[scenarios.COUNTED] == pytest.approx(counted, rel=1e-3)


def test_the_vaes_own_part_takes_no_operator(trained, cells):
    adata, vae, _ = trained
    here = (adata.obs["cell_type"] == "type A").to_numpy()
    shares = []
    for name in ("control", "drug 1"):
        cloud = torch.from_numpy(adata.obsm["X_nbvae"][here & (adata.obs["perturbation"] == name).to_numpy()])
        with torch.no_grad():
            shares.append(vae.decode(cloud, torch.full((len(cloud),), 1e4)).mean.mean(0).numpy() + 1)
    found = cells.recalled(Question("drug 1", "type A"))
    np.testing.assert_allclose(found[vae.genes], np.log2(shares[1] / shares[0]), atol=1e-4)


def test_without_a_planted_truth_there_is_no_error_to_tell(trained):
    adata = trained[0].copy()
    del adata.uns["cellop_nb"]["truth"]
    assert scenarios.half_dose_errors(VirtualCells(adata, *trained[1:]), Question("drug 1", "type A")).empty


def test_lent_responses_are_compared_on_the_same_cells(trained, cells, controls):
    adata, vae, own = trained
    lent = new_operators(adata[adata.obs["cell_type"] == "type B"].copy())
    far = VirtualCells(adata, vae, lent, n_replicates=20)
    training = Groups(adata[adata.obs["cell_type"] == "type B"].copy(), use_rep="X_nbvae", split="train")
    table = scenarios.lent_responses(far, cells, training, "type A", ["drug 1"])
    energy = table.set_index("method")["energy"]
    (group,) = (g for g in training if g.perturbation == "drug 1")
    shift = group.cells.mean(0) - training.control["type B"].mean(0)
    real = torch.from_numpy(adata.obsm["X_nbvae"])[
        ((adata.obs["cell_type"] == "type A") & (adata.obs["perturbation"] == "drug 1")).to_numpy()
    ]
    expected = float(energy_distance(controls(adata) + shift, real))
    assert energy[scenarios.SHIFT] == pytest.approx(expected, abs=1e-5)
    assert energy[scenarios.OWN] == cells.ask(Question("drug 1", "type A")).energy
    assert energy[scenarios.LENT] == far.ask(Question("drug 1", "type A")).energy
    assert set(energy.index) == {scenarios.NO_CHANGE, scenarios.SHIFT, scenarios.LENT, scenarios.OWN}
