"""Baselines: one contract for the family, answers by hand, and refusals where nothing is known."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellop_nb.analysis.baselines import BASELINES, Prediction, Screen, Target, latent_shift, run
from cellop_nb.analysis.metrics import Undefined
from cellop_nb.analysis.space import EvaluationSpace
from cellop_nb.errors import DataError, LabelError

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
    return Screen(np.concatenate(cells), np.array(contexts), np.array(names))


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
    assert found.mean_only == (found.cells is None)
    if found.cells is not None:
        assert found.cells.shape[1] == 4
        np.testing.assert_allclose(found.cells.mean(axis=0), found.mean)
    np.testing.assert_array_equal(start.control, before)
    np.testing.assert_array_equal(training.cells, copy)
    again = BASELINES[method](training, start)
    np.testing.assert_array_equal(again.mean, found.mean)


@pytest.mark.parametrize("method", ["no change", "control mean", "mean shift", "nearest context"])
def test_the_targets_own_perturbed_cells_are_never_read(method):
    with_truth, without = screen(), screen(("T", "A"))
    np.testing.assert_allclose(
        BASELINES[method](with_truth, target()).mean, BASELINES[method](without, target()).mean
    )


@pytest.mark.parametrize("method", ["mean shift", "nearest context"])
def test_refuses_a_perturbation_of_no_other_context(method):
    training = screen(("T", "A"), ("B", "A"), ("mono", "A"))
    with pytest.raises(Undefined, match="no other training context has both 'A'"):
        BASELINES[method](training, target())
    empty = run(method, BASELINES[method], training, target())
    assert empty.mean is None and empty.cells is None and "no other training context" in empty.reason
    assert empty.method == method


def test_context_without_controls_is_no_source_of_shifts():
    training = screen(("T", "A"), ("B", "control"))
    np.testing.assert_allclose(BASELINES["mean shift"](training, target()).mean, 1.0 + 7.0)


@pytest.mark.parametrize("method", ["best single", "additive"])
def test_combination_rules_refuse_singles_and_unmeasured_parts(method):
    with pytest.raises(Undefined, match="not a combination"):
        BASELINES[method](screen(), target("A"))
    with pytest.raises(Undefined, match="no training cells of 'A' in 'T'"):
        BASELINES[method](screen(("T", "A")), target("A+C"))


def test_contexts_count_equally_whatever_their_size():
    small = screen(("T", "A"))
    extra = np.flatnonzero(small.rows("B", "A"))
    many = np.concatenate([np.arange(len(small.cells)), np.repeat(extra, 10)])
    large = Screen(small.cells[many], small.contexts[many], small.perturbations[many])
    np.testing.assert_allclose(BASELINES["mean shift"](large, target()).mean, EXPECTED["mean shift"])


def test_latent_shift_moves_latents_and_decodes():
    training, start = screen(("T", "A")), target()
    latents = training.cells[:, :2] * 10
    space = EvaluationSpace(np.array(list("abcd")), np.zeros(4), np.eye(4), 9)
    seen = {}

    def decode(z):
        seen["z"] = z
        return np.ones((len(z), 4))

    aimed = Target("T", "A", start.control, space=space)
    found = latent_shift(training, aimed, latents=latents, start=np.zeros((6, 2)), decode=decode)
    np.testing.assert_allclose(seen["z"], np.full((6, 2), 50.0))
    np.testing.assert_allclose(found.cells, np.log1p(2500), rtol=1e-6)
    assert found.counts.shape == (6, 4)


def test_predictions_that_are_not_finite_are_refused():
    cells = np.ones((3, 2))
    cells[1, 1] = np.nan
    with pytest.raises(DataError, match="1 NaN or infinite"):
        Prediction.of_cells("broken", cells)


def test_no_controls_to_start_from_and_unknown_control():
    with pytest.raises(Undefined, match="no control cells in 'T'"):
        Target("T", "A", np.zeros((0, 3)))
    obs = pd.DataFrame({"cell_type": ["T", "T"], "perturbation": ["ctrl", "A"]}, index=["0", "1"])
    with pytest.raises(LabelError, match="did you mean 'ctrl'"):
        Screen.of(ad.AnnData(np.zeros((2, 1)), obs=obs), np.zeros((2, 1)), control="control")
