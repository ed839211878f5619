"""A hold-out leaks nothing, scores every method, and finds planted operators; its complexity is chosen honestly."""

import numpy as np
import pandas as pd
import pytest
import torch

from cellop_nb import datasets, energy_distance, split
from cellop_nb.analysis.budget import STAGES, advice, error_budget
from cellop_nb.analysis.choices import strongest_group
from cellop_nb.analysis.fits import Fits, fit_response, latents_only
from cellop_nb.analysis.holdout import OPERATORS, holdout
from cellop_nb.analysis.selection import CANDIDATES as DEFAULTS
from cellop_nb.analysis.selection import choose, leave_contexts_out, leave_out, what_to_leave_out
from cellop_nb.analysis.transfer import Complexity, borrowing
from cellop_nb.analysis.views import CountView, LatentView
from cellop_nb.errors import HoldoutError, LabelError, ModelError

QUICK = {
    "vae": {"n_latent": 8, "n_hidden": 32},
    "training": {"max_epochs": 30, "lr": 5e-3, "batch_size": 48},
    "candidates": [Complexity(rank=0), Complexity(ridge=0.1)],
    "progress": False,
}
# where only the mechanics count
TINY = QUICK | {"training": {"max_epochs": 2}, "candidates": [Complexity(rank=0)], "metrics": ["e_distance"]}
HELD = {"cell_type": "type B", "perturbation": "drug 1"}


@pytest.fixture(scope="module")
def screen():
    return datasets.synthetic(n_perturbations=2, n_cells=80, n_genes=120, n_latent=4, library=200.0, seed=3)


@pytest.fixture(scope="module")
def result(screen):
    return holdout(screen, heldout=HELD, metrics=["e_distance", "pearson_delta", "library_ratio"], **QUICK)


def test_table_has_every_method_and_the_noise(result):
    methods = set(result.table["method"])
    assert {"no change", "mean shift", "nearest context", "latent shift", OPERATORS} <= methods
    assert any("floor" in method for method in methods)
    assert set(result.table["group"]) == {"type B, drug 1"}


def test_operators_are_nearer_than_no_change_and_no_farther_than_mean_shift(result):
    energy = result.summary()["e_distance"]
    assert energy[OPERATORS] < 0.3 * energy["no change"]
    assert energy[OPERATORS] < 0.7 * energy["mean shift"]


def test_predictions_are_cells_with_names_and_sources(result, screen):
    cells = result.predictions
    assert list(cells.var_names) == list(result.real.var_names)
    assert set(cells.obs["source_cell"]) <= set(screen.obs_names[screen.obs["perturbation"] == "control"])
    assert set(cells.obs["perturbation"]) == {"drug 1"} and set(cells.obs["cell_type"]) == {"type B"}
    assert (cells.X.data == np.round(cells.X.data)).all() and cells.obs_names.is_unique


def test_held_out_cells_change_nothing_that_is_trained(screen):
    """The held-out cells' counts are replaced by noise: the predictions stay bit for bit the same."""
    held = ((screen.obs["cell_type"] == "type B") & (screen.obs["perturbation"] == "drug 1")).to_numpy()
    dense = screen.X.toarray()
    dense[held] = np.random.default_rng(0).poisson(3.0, dense[held].shape)
    spoilt = screen.copy()
    spoilt.X = dense
    options = TINY | {"candidates": QUICK["candidates"]}
    before, after = (holdout(adata, heldout=HELD, **options) for adata in (screen, spoilt))
    assert after.complexity == before.complexity
    assert (after.predictions.X != before.predictions.X).nnz == 0


def test_same_seed_same_numbers(screen):
    first, again = (holdout(screen, heldout=HELD, **TINY) for _ in range(2))
    pd.testing.assert_frame_equal(again.table, first.table)


def test_seeds_are_pooled(screen):
    two = holdout(screen, heldout=HELD, n_seeds=2, **TINY)
    assert len(two.fits) == 2 and two.predictions.n_obs == 2 * two.predictions.obs["source_cell"].nunique()


@pytest.mark.parametrize(
    ("heldout", "error", "text"),
    [
        ({"cell_type": "type Z", "perturbation": "drug 1"}, LabelError, "type Z"),
        ({"cell_type": "type B", "perturbation": "control"}, HoldoutError, "perturbed"),
        ({"celltype": "type B"}, LabelError, "cell_type"),
    ],
)
def test_bad_holdouts_are_refused(screen, heldout, error, text):
    with pytest.raises(error, match=text):
        holdout(screen, heldout=heldout, **QUICK)


def test_budget_names_the_stages(result):
    budget = error_budget(result)
    assert list(budget["stage"]) == list(STAGES)
    energy = budget.set_index("stage")["energy"]
    assert energy["noise floor"] < energy["operators"] < energy["no change"]
    assert len(advice(budget)) == 1


@pytest.mark.parametrize(
    ("energies", "words"),
    [
        ((0.0, 0.1, 0.1, 0.05, 5.0), "nothing to improve"),
        ((0.0, 0.1, 0.9, 1.0, 5.0), "90% of the error remains with the true latents: improve the VAE"),
        ((0.0, 0.1, 1.5, 1.0, 5.0), "no nearer (1.50) than the prediction is (1.00): improve the VAE"),
        ((0.0, 0.1, 0.1, 1.0, 5.0), "the operator's"),
        ((0.0, 0.1, 0.1, 0.1, 0.02), "hardly an effect"),
    ],
)
def test_advice_says_what_the_numbers_say(energies, words):
    budget = pd.DataFrame({"group": "g", "stage": STAGES, "energy": energies})
    assert words in advice(budget)["advice"].iloc[0]


def test_strongest_group_is_strong_and_repeated(screen):
    context, perturbation = strongest_group(screen)
    assert perturbation == "drug 1" or perturbation == "drug 2"
    alone = screen[screen.obs["cell_type"] == "type A"]
    with pytest.raises(HoldoutError, match="two contexts"):
        strongest_group(alone)


# -- the choice of complexity


def planted_latents(matrix_size: float, seed: int = 0):
    """Five contexts whose response is a shift, or (with `matrix_size`) an affine map, in two dimensions."""
    import anndata as ad

    rng = np.random.default_rng(seed)
    matrix = np.eye(2) + matrix_size * np.array([[0.0, 1.0], [-1.0, 0.5]])
    z, obs = [], []
    for context in "abcde":
        centre = 2 * rng.normal(size=2)
        for perturbation in ("control", "drug"):
            cells = centre + 0.5 * rng.normal(size=(120, 2))
            z.append(cells if perturbation == "control" else cells @ matrix.T + [1.0, -1.0])
            obs += [(context, perturbation)] * 120
    obs = pd.DataFrame(obs, columns=["cell_type", "perturbation"]).set_index(pd.Index(map(str, range(1200))))
    adata = ad.AnnData(obs=obs, obsm={"X_nbvae": np.concatenate(z).astype(np.float32)})
    split(adata, test_fraction=0.0)
    return adata


CANDIDATES = [Complexity(rank=0, ridge=0.0), Complexity(ridge=0.01)]


@pytest.mark.parametrize(("matrix_size", "rank"), [(0.0, 0), (0.6, None)])
def test_choice_follows_the_planted_form(matrix_size, rank):
    table = leave_contexts_out(planted_latents(matrix_size), CANDIDATES, progress=False)
    assert choose(table, CANDIDATES).rank == rank


def test_left_out_context_is_predicted_from_the_others():
    adata = planted_latents(0.6)
    table = leave_contexts_out(adata, CANDIDATES[1:], progress=False)
    assert (table["e_distance"] < 0.1 * table["no_change"]).all()


def choices(energies, no_change):
    """Table of two candidates on the groups a and b."""
    rows = [(c, g, e, no_change[g]) for g, pair in energies.items() for c, e in enumerate(pair)]
    return pd.DataFrame(rows, columns=["candidate", "group", "e_distance", "no_change"])


def test_a_tie_goes_to_the_simplest():
    table = choices({"a": (0.50, 0.40), "b": (0.30, 0.40)}, {"a": 5.0, "b": 5.0})
    assert choose(table, CANDIDATES) == CANDIDATES[0]


def test_a_group_counts_by_its_share_of_the_effect():
    """The second candidate gains 1.0 of 20 in one group and loses 0.4 of 1 in the other."""
    table = choices({"a": (3.0, 2.0), "b": (0.1, 0.5)}, {"a": 20.0, "b": 1.0})
    assert choose(table, CANDIDATES) == CANDIDATES[0]
    even = choices({"a": (3.0, 2.0), "b": (0.1, 0.5)}, {"a": 20.0, "b": 20.0})
    assert choose(even, CANDIDATES) == CANDIDATES[1]


def test_a_group_without_effect_decides_nothing():
    table = choices({"a": (3.0, 2.0), "b": (0.00, 0.004)}, {"a": 20.0, "b": -0.01})
    assert choose(table, CANDIDATES) == CANDIDATES[1]


def test_one_context_leaves_nothing_to_choose_by():
    adata = planted_latents(0.0)
    with pytest.raises(ModelError, match="two or more contexts"):
        leave_contexts_out(adata[adata.obs["cell_type"] == "a"].copy(), CANDIDATES, progress=False)


def test_borrowing_prefers_the_near():
    sources = {"near": np.zeros(2), "far": np.full(2, 9.0)}
    shares = borrowing(np.ones(2), sources, 4.0)
    assert shares["near"] > 0.99 and sum(shares.values()) == pytest.approx(1.0)
    assert borrowing(np.ones(2), sources, 0.0)["far"] == pytest.approx(0.5)
    assert borrowing(np.zeros(2), sources, 2.0) == pytest.approx({"near": 1.0, "far": 0.0})


def test_shares_fall_with_the_power_of_the_distance():
    shares = borrowing(np.zeros(1), {"one": np.ones(1), "three": np.full(1, 3.0)}, 2.0)
    assert shares["one"] / shares["three"] == pytest.approx(9.0)


def two_families():
    """Contexts a and b respond in one way, the far c, d and e in the opposite one."""
    adata = planted_latents(0.0)
    z = adata.obsm["X_nbvae"].copy()
    far = adata.obs["cell_type"].isin(["c", "d", "e"]).to_numpy()
    drug = (adata.obs["perturbation"] == "drug").to_numpy()
    z[far] += 30.0
    z[far & drug] -= [4.0, -4.0]
    adata.obsm["X_nbvae"] = z
    return adata, drug


def test_a_new_context_responds_as_its_neighbours():
    adata, drug = two_families()
    local = Complexity(rank=0, ridge=0.0, locality=4.0)
    for left_out in ("a", "c"):
        here = (adata.obs["cell_type"] == left_out).to_numpy()
        response = fit_response(adata[~(here & drug)].copy(), local)
        start, real = (torch.as_tensor(adata.obsm["X_nbvae"][here & side]) for side in (~drug, drug))
        moved = response.operator("drug", left_out)(start)
        assert energy_distance(moved, real) < 0.2 * energy_distance(start, real)


def test_a_measured_context_has_its_own_mean():
    """With departures, the mean moved cell of a measured group is the group's mean."""
    adata, drug = two_families()
    response = fit_response(adata, Complexity(rank=0, ridge=0.0, locality=2.0))
    for context in ("a", "e"):
        here = (adata.obs["cell_type"] == context).to_numpy()
        start, real = (torch.as_tensor(adata.obsm["X_nbvae"][here & side]) for side in (~drug, drug))
        moved = response.operator("drug", context)(start)
        torch.testing.assert_close(moved.mean(0), real.mean(0), atol=1e-3, rtol=0)
        assert response.shares("drug", context) == {context: 1.0}


def test_parts_of_a_combination_are_borrowed_each():
    adata, drug = two_families()
    obs = adata.obs.copy()
    obs["perturbation"] = np.where(drug & (np.arange(len(obs)) % 2 == 0), "other", obs["perturbation"])
    adata.obs = obs
    response = fit_response(adata, Complexity(rank=0, ridge=0.0, locality=2.0))
    both = response.operator("drug+other", "a").shift
    alone = [response.operator(name, "a").shift for name in ("drug", "other")]
    torch.testing.assert_close(both, alone[0] + alone[1])


KEYS = {
    "use_rep": "X_nbvae",
    "perturbation_key": "perturbation",
    "context_key": "cell_type",
    "control": "control",
}


class Biased(LatentView):
    """A decoder that misses a known change of level in every perturbed cell, and a third of its counts."""

    missed = np.array([0.5, -1.0])

    def real_level(self, rows):
        return super().real_level(rows) + self.missed

    def real_size(self, rows):
        return 1.5


def test_the_remainder_is_what_the_decoder_misses():
    cells = latents_only(planted_latents(0.0), "X_nbvae", "split")
    view = Biased(cells, **KEYS)
    fits = Fits(cells, view, keys=KEYS | {"split_key": "split"}, training={})
    found = fits.response(frozenset(), Complexity(rank=0, ridge=0.0, remainder=True)).remainders["drug"]
    np.testing.assert_allclose(found.level, Biased.missed, atol=0.1)
    assert found.growth == pytest.approx(np.log(1.5))


def test_one_context_has_no_remainder():
    cells = latents_only(planted_latents(0.0), "X_nbvae", "split")
    cells = cells[cells.obs["cell_type"].isin(["a", "b"])].copy()
    fits = Fits(cells, LatentView(cells, **KEYS), keys=KEYS | {"split_key": "split"}, training={})
    alone = frozenset({("b", "drug")})
    assert not fits.response(alone, Complexity(rank=0, ridge=0.0, remainder=True)).remainders


def test_groups_are_left_out_where_the_context_is_known():
    groups = [(c, p) for c in "xyz" for p in "AB"]
    assert what_to_leave_out(groups, [("x", "C")]) == "group"
    assert what_to_leave_out(groups, [("w", "A")]) == "context"
    adata, drug = two_families()
    obs = adata.obs.copy()
    obs["perturbation"] = np.where(drug & (np.arange(len(obs)) % 2 == 0), "other", obs["perturbation"])
    adata.obs = obs
    table = leave_out(
        adata, [Complexity(rank=0), Complexity(rank=0, locality=4.0)], over="group", progress=False
    )
    assert set(table["group"]) == {f"{c}, {p}" for c in "abcde" for p in ("drug", "other")}
    assert choose(table, [Complexity(rank=0), Complexity(rank=0, locality=4.0)]).locality == 4.0


def test_few_folds_are_enough():
    table = leave_out(planted_latents(0.0), CANDIDATES[:1], max_folds=3, progress=False)
    assert table["group"].nunique() == 3


def test_the_pure_shift_is_tried_first():
    assert DEFAULTS[0] == Complexity(rank=0, ridge=0.0, locality=0.0) and len(set(DEFAULTS)) == len(DEFAULTS)


def test_counts_are_viewed_as_they_are_scored(result, screen):
    """The view used for the choice gives the numbers of the table."""
    fitted = result.fits[0]
    train = screen[:, list(result.real.var_names)].copy()
    train = train[~train.obs_names.isin(result.real.obs_names)].copy()
    train.obsm["X_nbvae"] = fitted.latents
    view = CountView(train, fitted.vae, result.space)
    rows = view.rows("type A", "control")
    unmoved = view.moved(rows, view.z[rows], None)
    np.testing.assert_array_equal(unmoved.numpy(), train[rows].X.toarray())
    np.testing.assert_allclose(view.level(unmoved, rows), view.real_level(rows), rtol=1e-5)
    assert view.energy(unmoved, rows) <= 0


def test_a_group_of_a_few_cells_is_refused_with_its_number(screen):
    held = ((screen.obs["cell_type"] == "type B") & (screen.obs["perturbation"] == "drug 1")).to_numpy()
    kept = ~held
    kept[np.flatnonzero(held)[:3]] = True
    with pytest.raises(HoldoutError, match=r"4 cells or more.*Found 3 of type B, drug 1"):
        holdout(screen[kept].copy(), heldout=HELD, **TINY)


def test_a_small_group_beside_larger_ones_has_its_reason(screen):
    small = ((screen.obs["cell_type"] == "type B") & (screen.obs["perturbation"] == "drug 1")).to_numpy()
    kept = ~small
    kept[np.flatnonzero(small)[:1]] = True
    result = holdout(screen[kept].copy(), heldout={"cell_type": "type B"}, **TINY)
    values = result.table.set_index(["group", "method"])[["value", "reason"]]
    assert np.isfinite(values.loc["type B, drug 2", OPERATORS]["value"])
    assert np.isnan(values.loc["type B, drug 1", OPERATORS]["value"])
    assert values.loc["type B, drug 1", OPERATORS]["reason"].startswith("1 held-out cells")
