"""Baselines: one contract for the family, answers by hand, and refusals where nothing is known."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellop_nb.analysis.baselines import BASELINES, Prediction, Target, Training, run
from cellop_nb.analysis.metrics import Undefined
from cellop_nb.data.contract import Keys
from cellop_nb.data.groups import Groups
from cellop_nb.errors import DataError, LabelError, ModelError

BASE = {"T": 1.0, "B": 2.0, "mono": 9.0}
SHIFT = {
    ("T", "A"): 1.0,
    ("B", "A"): 3.0,
    ("mono", "A"): 7.0,
    ("T", "C"): -5.0,
    ("B", "C"): 2.0,
    ("mono", "C"): 2.0,
}


def screen(*left_out, n=5, genes=4):
    """Cells whose group means are BASE + SHIFT in each gene, exactly."""
    rng = np.random.default_rng(0)
    cells, contexts, names = [], [], []
    for context, base in BASE.items():
        for name in ("control", "A", "C"):
            if (context, name) in left_out:
                continue
            noise = rng.normal(size=(n, genes))
            cells.append(noise - noise.mean(axis=0) + base + SHIFT.get((context, name), 0.0))
            contexts += [context] * n
            names += [name] * n
    return training(np.concatenate(cells), contexts, names)


def training(cells, contexts, names):
    """Log-normalised cells (cell, gene) with their labels."""
    obs = pd.DataFrame({"cell_type": contexts, "perturbation": names}).rename(index=str)
    adata = ad.AnnData(obs=obs)
    Keys().write(adata)
    return Training(cells, Groups(adata, min_cells=1), adata)


def target(perturbation="A", context="T", n=6, genes=4):
    noise = np.random.default_rng(1).normal(size=(n, genes))
    control = noise - noise.mean(axis=0) + BASE[context]
    return Target(context, perturbation, control)


# what each baseline says of (T, A) in mean, when T's A cells are held out
EXPECTED = {
    "no change": 1.0,
    "control mean": 1.0,
    "mean of perturbed": 1.0 - 5.0,  # the other perturbation of the same context
    "mean shift": 1.0 + (3.0 + 7.0) / 2,
    "nearest context": 1.0 + 3.0,  # B
    "near mean shift": 1.0 + (3.0 + 7.0) / 2,  # two contexts choose no power
    "linear": 1.0 + (3.0 + 7.0) / 2,  # and no ridge
}


@pytest.mark.parametrize("method", EXPECTED)
def test_mean_by_hand(method):
    found = BASELINES[method](screen(("T", "A")), target())
    np.testing.assert_allclose(found.mean, EXPECTED[method])


@pytest.mark.parametrize(("method", "expected"), [("best single", 1.0 - 5.0), ("additive", 1.0 + 1.0 - 5.0)])
def test_combinations_by_hand(method, expected):
    found = BASELINES[method](screen(), target("A+C"))
    np.testing.assert_allclose(found.mean, expected)


@pytest.mark.parametrize("method", BASELINES)
def test_contract(method):
    combination = method in ("best single", "additive")
    start = target("A+C" if combination else "A")
    before = start.control.copy()
    training = screen() if combination else screen(("T", "A"))
    copy = training.cells.copy()
    found = BASELINES[method](training, start)
    assert found.method == method and found.reason == ""
    assert found.mean.shape == (4,) and found.mean.dtype == np.float64
    if found.cells is not None:
        assert found.cells.shape[1] == 4
        np.testing.assert_allclose(found.cells.mean(axis=0), found.mean)
    np.testing.assert_array_equal(start.control, before)
    np.testing.assert_array_equal(training.cells, copy)
    again = BASELINES[method](training, start)
    np.testing.assert_array_equal(again.mean, found.mean)


TRANSFERRED = ["mean shift", "nearest context", "near mean shift", "linear"]


@pytest.mark.parametrize("method", ["no change", "control mean", *TRANSFERRED])
def test_the_targets_own_perturbed_cells_are_never_read(method):
    with_truth, without = screen(), screen(("T", "A"))
    np.testing.assert_allclose(
        BASELINES[method](with_truth, target()).mean, BASELINES[method](without, target()).mean
    )


@pytest.mark.parametrize("method", TRANSFERRED)
def test_refuses_a_perturbation_of_no_other_context(method):
    training = screen(("T", "A"), ("B", "A"), ("mono", "A"))
    with pytest.raises(Undefined, match="no other training context has both 'A'"):
        BASELINES[method](training, target())
    empty = run(method, BASELINES[method], training, target())
    assert empty.mean is None and empty.cells is None and "no other training context" in empty.reason
    assert empty.method == method


def test_a_context_without_controls_is_refused():
    with pytest.raises(DataError, match="1 control cells in every context.*0 in context 'B'"):
        screen(("T", "A"), ("B", "control"))


@pytest.mark.parametrize("method", ["best single", "additive"])
def test_combination_rules_refuse_singles_and_unmeasured_parts(method):
    with pytest.raises(Undefined, match="not a combination"):
        BASELINES[method](screen(), target("A"))
    with pytest.raises(Undefined, match="no training cells of 'A' in 'T'"):
        BASELINES[method](screen(("T", "A")), target("A+C"))


def test_contexts_count_equally_whatever_their_size():
    small = screen(("T", "A"))
    many = np.concatenate([np.arange(len(small.cells)), np.repeat(small.rows("B", "A"), 10)])
    labels = small.adata.obs.iloc[many]
    large = training(small.cells[many], labels["cell_type"].to_numpy(), labels["perturbation"].to_numpy())
    np.testing.assert_allclose(BASELINES["mean shift"](large, target()).mean, EXPECTED["mean shift"])


def several(n_contexts=6, genes=7, seed=0):
    """Contexts that respond by their control profile and a part of their own, hardly any noise, and a target."""
    rng = np.random.default_rng(seed)
    profiles = rng.normal(size=(n_contexts + 1, 2)) @ rng.normal(size=(2, genes)) + 3
    slope, cells, contexts, names = 0.3 * rng.normal(size=(genes, genes)) / genes, [], [], []
    for k, profile in enumerate(profiles):
        for name in ("control", "A") if k < n_contexts else ("control",):
            response = 1 + profile @ slope + 0.2 * rng.normal(size=genes)
            cells.append(profile + (name == "A") * response + 1e-3 * rng.normal(size=(8, genes)))
            contexts += [f"c{k}"] * 8
            names += [name] * 8
    data = training(np.concatenate(cells), contexts, names)
    last = f"c{n_contexts}"
    return data, Target(last, "A", data.cells[data.rows(last, "control")])


def profiles_of(data, start):
    """Names, control means and shifts of the other contexts, by loops."""
    labels = data.adata.obs
    mean = {
        (c, p): np.mean(
            [
                cell
                for cell, a, b in zip(data.cells, labels["cell_type"], labels["perturbation"], strict=True)
                if (a, b) == (c, p)
            ],
            axis=0,
        )
        for c, p in set(zip(labels["cell_type"], labels["perturbation"], strict=True))
    }
    contexts = sorted(c for c, p in mean if p == start.perturbation)
    return [mean[c, "control"] for c in contexts], [mean[c, "A"] - mean[c, "control"] for c in contexts]


def weighted(controls, shifts, target, power):
    """Sum of the shifts, each by its distance to the power."""
    weights = [sum((a - b) ** 2 for a, b in zip(m, target, strict=True)) ** (-power / 2) for m in controls]
    return sum(w * shift for w, shift in zip(weights, shifts, strict=True)) / sum(weights)


def ridge_regression(controls, shifts, target, penalty):
    """Normal equations over genes (not over contexts): shift = mean + (control - mean) B."""
    centre, average = np.mean(controls, axis=0), np.mean(shifts, axis=0)
    x, y = np.array(controls) - centre, np.array(shifts) - average
    coefficients = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    return average + (target - centre) @ coefficients


def best(rule, choices, controls, shifts):
    """The choice with the smallest relative squared error on contexts left out, as a loop says."""

    def left(choice):
        total = 0.0
        for k in range(len(controls)):
            others = [i for i in range(len(controls)) if i != k]
            guess = rule([controls[i] for i in others], [shifts[i] for i in others], controls[k], choice)
            total += np.square(guess - shifts[k]).sum() / np.square(shifts[k]).sum()
        return total

    return min(choices, key=left)


@pytest.mark.parametrize("seed", range(3))
def test_near_mean_shift_is_the_loop(seed):
    data, start = several(seed=seed)
    controls, shifts = profiles_of(data, start)
    power = best(weighted, (0, 1, 2, 4, 8), controls, shifts)
    expected = start.control.mean(0) + weighted(controls, shifts, start.control.mean(0), power)
    np.testing.assert_allclose(BASELINES["near mean shift"](data, start).mean, expected)


@pytest.mark.parametrize("seed", range(3))
def test_linear_is_the_loop(seed):
    data, start = several(seed=seed)
    controls, shifts = profiles_of(data, start)
    target, usual = start.control.mean(0), np.var(controls, axis=0).sum()
    penalties = [ridge * usual for ridge in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e12)]
    penalty = best(ridge_regression, penalties, controls, shifts)
    expected = target + ridge_regression(controls, shifts, target, penalty)
    np.testing.assert_allclose(BASELINES["linear"](data, start).mean, expected, atol=1e-6)


def test_linear_extrapolates_where_weights_cannot():
    profile = np.linspace(1, 2, 5)
    cells, contexts, names = [], [], []
    for k in range(5):
        for name in ("control", "A") if k < 4 else ("control",):
            cells.append(np.tile(profile * (1 + k) + (k * profile if name == "A" else 0.0), (2, 1)))
            contexts += [f"c{k}"] * 2
            names += [name] * 2
    data = training(np.concatenate(cells), contexts, names)
    start = Target("c4", "A", data.cells[data.rows("c4", "control")])
    shift = {name: BASELINES[name](data, start).mean - start.mean for name in ("linear", "near mean shift")}
    np.testing.assert_allclose(shift["linear"], 4 * profile, rtol=0.1)
    assert shift["near mean shift"].max() <= 3 * profile.max()


def test_predictions_that_are_not_finite_are_refused():
    cells = np.ones((3, 2))
    cells[1, 1] = np.nan
    with pytest.raises(DataError, match="1 NaN or infinite"):
        Prediction.of_cells("broken", cells)


def test_no_controls_to_start_from_and_unknown_control():
    with pytest.raises(Undefined, match="no control cells in 'T'"):
        Target("T", "A", np.zeros((0, 3)))
    obs = pd.DataFrame({"cell_type": ["T", "T"], "perturbation": ["ctrl", "A"]}, index=["0", "1"])
    adata = ad.AnnData(np.zeros((2, 1)), obs=obs)
    Keys().write(adata)
    with pytest.raises(LabelError, match="did you mean 'ctrl'"):
        Groups(adata)


def test_a_method_must_give_back_a_prediction_of_the_genes():
    data, start = screen(), target()
    with pytest.raises(ModelError, match="a Prediction from 'mine'.*ndarray"):
        run("mine", lambda training, target: target.control, data, start)
    with pytest.raises(ModelError, match="4 genes predicted by 'mine'.*3"):
        run("mine", lambda training, target: Prediction.of_cells("x", target.control[:, :3]), data, start)
    renamed = run("mine", BASELINES["mean shift"], data, start)
    assert renamed.method == "mine"
