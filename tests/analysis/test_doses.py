"""Doses between the measured ones: planted curves are recovered, and cells at a dose that was left out are foreseen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import cellop_nb as co
from cellop_nb.analysis.doses import DoseCurve, dose_curves
from cellop_nb.analysis.metrics import EvaluationSpace, e_distance, log1p_cp10k
from cellop_nb.data.groups import Groups
from cellop_nb.errors import LabelError, ModelError

DOSES = np.array([0.3, 1.0, 3.0, 10.0, 30.0])


def hill(dose, scale: float = 2.0):
    return dose / (scale + dose) * (scale + 30.0) / 30.0


def dosed(strength, *, n_cells: int = 120):
    """A screen at five doses, whose strength along the planted generators is `strength` of the dose."""
    doses = dict(zip(np.round(strength(DOSES), 6), DOSES, strict=True))
    adata = co.datasets.synthetic(
        n_contexts=2,
        n_perturbations=2,
        doses=list(doses),
        n_cells=n_cells,
        n_genes=120,
        library=400.0,
        seed=4,
    )
    perturbed = (adata.obs["perturbation"] != "control").to_numpy()
    adata.obs["dose"] = np.where(perturbed, adata.obs["dose"].round(6).map(doses).fillna(1.0), 0.0)
    return adata[adata.obs["perturbation"].isin(["control", "drug 1"])].copy()


@pytest.fixture(scope="module")
def screen():
    return dosed(hill)


@pytest.fixture(scope="module")
def model(screen):
    """One dose in the middle is left out of one context and the other."""
    seen = screen[screen.obs["dose"] != 1.0].copy()
    model = co.CellOp(seen, n_latent=8, n_genes=None)
    model.recipe = replace(model.recipe, n_hidden=64, vae_epochs=20, finish_epochs=10)
    return model.fit(progress=False)


def linear(dose):
    return dose / 30.0


@pytest.mark.parametrize("strength", [hill, linear], ids=["saturating", "linear"])
def test_a_planted_curve_is_recovered(strength):
    adata = dosed(strength)
    curve = dose_curves(adata, Groups(adata))["drug 1"]
    grid = np.array([0.5, 1.0, 2.0, 5.0, 20.0])
    np.testing.assert_allclose(curve.strength(grid), strength(grid), atol=0.1)
    assert curve.strength(30.0) == pytest.approx(1) and curve.strength(0.0) == 0
    assert (np.diff(curve.strength(np.linspace(0, 60, 50))) >= 0).all()
    assert curve.dose(curve.strength(5.0)) == pytest.approx(5.0)
    assert (curve.form == "linear") == (strength is linear)


def test_the_form_can_be_said(screen):
    for form in ("linear", "log", "saturating"):
        assert dose_curves(screen, Groups(screen), form)["drug 1"].form == form
    with pytest.raises(ModelError, match="form of dose curves.*'cubic'"):
        dose_curves(screen, Groups(screen), "cubic")


def test_cells_at_a_dose_that_was_left_out_are_foreseen(model, screen):
    """Nearer to the real cells than no change, than the nearest measured doses, and than strength in proportion."""
    space = EvaluationSpace.fit(model.adata, seed=0)

    def points(cells):
        return space.project(log1p_cp10k(space.select(cells, "X")))

    def distance(**asked) -> float:
        ((name, value),) = asked.items()
        total = 0.0
        for context in ("type A", "type B"):
            table = pd.DataFrame({"context": [context], "perturbation": ["drug 1"], name: [value]})
            real = screen[(screen.obs["dose"] == 1.0) & (screen.obs["cell_type"] == context)]
            total += e_distance(points(model.predict(table, seed=1)), points(real))
        return total

    asked = distance(dose=1.0)
    rivals = distance(strength=0.0), distance(dose=0.3), distance(dose=10.0), distance(strength=1 / 30)
    assert asked < 0.6 * min(rivals)


def test_predicted_cells_carry_their_dose_and_a_dose_beyond_is_called_extrapolated(model):
    table = pd.DataFrame({"context": ["type A"] * 2, "perturbation": ["drug 1"] * 2, "dose": [2.0, 30.0]})
    cells = model.predict(table.assign(n_cells=5))
    np.testing.assert_allclose(cells.obs["dose"], [2.0] * 5 + [30.0] * 5, rtol=1e-4)
    said = model.verdict("type A", "drug 1", dose=60.0)
    assert "A dose of 60 is extrapolated: 0.3 to 30 were measured." in said
    assert "extrapolated" not in model.verdict("type A", "drug 1", dose=2.0)


def test_a_saved_model_keeps_its_curves(model, tmp_path):
    again = co.load(model.save(tmp_path / "dosed"), model.adata)
    assert again.dose_curve("drug 1").strength(2.0) == model.dose_curve("drug 1").strength(2.0)
    pd.testing.assert_frame_equal(again.dose_curve("drug 1").table, model.dose_curve("drug 1").table)


@pytest.mark.parametrize("dose", ["10 uM", -1.0, 0.0, np.nan])
def test_what_is_no_dose_is_refused(model, dose):
    table = pd.DataFrame({"context": ["type A"], "perturbation": ["drug 1"], "dose": [dose]})
    with pytest.raises(LabelError, match="positive numbers as doses"):
        model.predict(table)


def test_a_perturbation_without_doses_is_refused(model):
    with pytest.raises(LabelError, match="whose doses were measured.*'drug 9'"):
        model.dose_curve("drug 9")


def test_a_held_out_context_is_asked_at_the_doses_it_was_measured_at(screen):
    asked = co.CellOp(screen, n_latent=4, n_genes=None)
    asked.recipe = replace(asked.recipe, n_hidden=16, vae_epochs=2, finish_epochs=2, operator_epochs=1)
    result = co.holdout(asked, over="context", only=["type B"], metrics=["e_distance"], progress=False)
    assert sorted(result.predictions.obs["dose"].round(3).unique()) == pytest.approx(list(DOSES))


def test_a_curve_extrapolates_on_both_sides():
    curve = DoseCurve("linear", 0.1, 10.0, 1.0, 1.0, pd.DataFrame())
    doses = (0.05, 0.1, 3.0, 10.0, 11.0)
    assert [curve.extrapolates(dose) for dose in doses] == [True, False, False, False, True]
