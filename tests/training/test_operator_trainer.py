"""Training of the operators on true latents: planted operators come back, down to the noise floor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import Do, assert_same_run

from cellop_nb.data.contract import Keys
from cellop_nb.data.groups import Groups
from cellop_nb.data.splits import split
from cellop_nb.data.synthetic import planted_operator, synthetic
from cellop_nb.errors import LabelError
from cellop_nb.models.energy import energy_distance, noise_floor, self_distance
from cellop_nb.models.operators import Condition
from cellop_nb.models.vae import NBVAE
from cellop_nb.training.loop import Machine
from cellop_nb.training.operators import (
    OperatorTrainer,
    Penalties,
    new_operators,
)

REP = {"use_rep": "X_truth"}
QUIET = {"progress": False, "machine": Machine(accelerator="cpu")}


def screen_of(n_cells, n_contexts=2, combinations=0):
    sizes = {"n_genes": 10, "n_latent": 4, "combinations": combinations}
    adata = synthetic(n_contexts=n_contexts, n_perturbations=3, n_cells=n_cells, seed=1, **sizes)
    split(adata, test_fraction=0.3, val_fraction=0.15)
    return adata


def fitted(adata, epochs=12, **settings):
    """One affine map per perturbation for all contexts, as it was planted."""
    model = new_operators(adata, context_rank=None, **REP)
    given = {"max_epochs": epochs, "steps_per_epoch": 10, "cells_per_group": 96} | settings
    given = {"penalties": Penalties(ridge=0.01)} | given
    trainer = OperatorTrainer(adata, model, **given, **REP, **QUIET)
    trainer.fit()
    return trainer


def transported_means(adata, model):
    """Learned and planted means of all controls of each group's context, (group, d)."""
    is_control = adata.obs["perturbation"] == "control"
    learned, planted = [], []
    for group in Groups(adata, split="test", **REP).items:
        here = (is_control & (adata.obs["cell_type"] == group.context)).to_numpy()
        controls = torch.as_tensor(adata.obsm["X_truth"][here])
        matrix, shift = (
            torch.as_tensor(part).float() for part in planted_operator(adata, group.perturbation)
        )
        planted.append((controls @ matrix.T + shift).mean(0))
        learned.append(model.operator(group.condition(model.conditions.perturbations))(controls).mean(0))
    return torch.stack(learned), torch.stack(planted)


def mean_error(adata, model):
    """Relative error of the transported means over all groups."""
    learned, planted = transported_means(adata, model)
    return float((learned - planted).norm() / planted.norm())


@pytest.fixture(scope="module")
def screen():
    return screen_of(400, n_contexts=4)


@pytest.fixture(scope="module")
def trainer(screen):
    return fitted(screen)


@pytest.fixture(scope="module")
def small():
    return screen_of(60)


def small_trainer(adata, **settings):
    given = {"max_epochs": 4, "steps_per_epoch": 3, "cells_per_group": 16} | settings
    return OperatorTrainer(adata, new_operators(adata, **REP), **REP, **QUIET, **given)


# -- the science ------------------------------------------------------------------------------------------


def test_held_out_groups_are_at_the_noise_floor(screen, trainer):
    held_out = Groups(screen, split="test", control_split="train", **REP)
    for group in held_out.items:
        condition = group.condition(trainer.model.conditions.perturbations)
        moved = trainer.model.operator(condition)(held_out.control[group.context])
        found = float(energy_distance(moved, group.cells))
        # The unbiased estimate scatters around zero: the size of that scatter is the noise floor.
        halves = [noise_floor(group.cells, n_splits=1, seed=seed) for seed in range(30)]
        assert found < 2 * np.mean(np.abs(halves)), group.label
        before = float(energy_distance(held_out.control[group.context], group.cells))
        assert before < 0.5 or found < 0.1 * before, group.label


def test_validation_moves_training_controls(screen, trainer):
    """Controls that stay aside with the validation cells would make their distance that of another sample."""
    split_of = screen.obs["split"].to_numpy()
    for rows in trainer.held_out.control_rows.values():
        assert len(rows) and (split_of[rows] == "train").all()


def test_transported_means_are_within_five_percent(screen, trainer):
    assert mean_error(screen, trainer.model) < 0.05


def test_the_planted_matrices_are_approached(screen, trainer):
    """Clouds near to Gaussian identify a matrix only up to a rotation; several contexts do better."""
    left = []
    for name in ("drug 1", "drug 2"):
        planted = torch.as_tensor(planted_operator(screen, name)[0]).float()
        learned = trainer.model.operator(Condition((name,))).matrix
        left.append(float((learned - planted).norm() / (planted - torch.eye(4)).norm()))
    assert np.mean(left) < 0.6


def test_the_error_falls_as_cells_grow():
    few, many = (
        mean_error(adata, fitted(adata, epochs=6).model) for adata in (screen_of(50), screen_of(1200))
    )
    # A factor of 24 in cells is about 5 in a standard error.
    assert many < 0.5 * few


def test_control_stays_the_identity(screen, trainer):
    z = torch.as_tensor(screen.obsm["X_truth"])
    for context in [None, *trainer.model.config["contexts"]]:
        assert torch.equal(trainer.model.operator(Condition((), context))(z), z)


def test_a_screen_without_effects_gives_the_identity(small):
    """Controls relabelled as a perturbation: what is learned is no more than noise."""
    null = small[small.obs["perturbation"] == "control"].copy()
    half = np.random.default_rng(0).random(null.n_obs) < 0.5
    null.obs["perturbation"] = np.where(half, "nothing", "control")
    split(null, test_fraction=0, val_fraction=0.2)
    model = fitted(null, epochs=6).model
    for context in model.config["contexts"]:
        before = torch.as_tensor(null.obsm["X_truth"][(null.obs["cell_type"] == context).to_numpy()])
        after = model.operator(Condition(("nothing",), context))(before)
        assert (after - before).norm(dim=1).mean() < 0.5 * before.std(0).norm()


def test_mixtures_are_not_enough(screen):
    """Two groups with their operators swapped match as a mixture; the loss per group must see it."""
    trainer = small_trainer(screen, cells_per_group=200)
    right = trainer.loss_terms(next(iter(trainer.batches())))["energy"].item()
    embedding = trainer.model.conditions.embedding.data
    rows = [trainer.model.config["perturbations"].index(name) for name in ("drug 1", "drug 2")]
    embedding[rows] = embedding[rows[::-1]]
    assert trainer.loss_terms(next(iter(trainer.batches())))["energy"].item() > 3 * right + 0.1


# -- the loss ---------------------------------------------------------------------------------------------


def plain_energies(trainer, batch, matrices, shifts):
    """(group,) energy distances by all pairs of the drawn cells, with autograd."""
    found = []
    x, y = batch.control.split(batch.control_sizes), batch.perturbed.split(batch.perturbed_sizes)
    for cells, target, matrix, shift in zip(x, y, matrices, shifts, strict=True):
        moved = cells @ matrix.T + shift
        n, m = len(moved), len(target)
        within = (
            torch.cdist(moved, moved).sum() / (n * (n - 1)),
            torch.cdist(target, target).sum() / (m * (m - 1)),
        )
        found.append(2 * torch.cdist(moved, target).sum() / (n * m) - sum(within))
    return torch.stack(found)


def test_the_loss_is_the_mean_energy_distance_of_the_groups(small):
    trainer = small_trainer(small, cells_per_group=10_000)  # whole groups: every term is exact
    batch = next(iter(trainer.batches()))
    terms = trainer.loss_terms(batch)
    maps = trainer.model.affine(trainer.design)
    expected = plain_energies(trainer, batch, *maps).mean()
    assert terms["energy"].item() == pytest.approx(expected.item(), abs=1e-4)
    own = trainer.weights["ridge"] * trainer.model.ridge(maps[0])
    own = own + trainer.weights["context_ridge"] * trainer.model.context_ridge()
    torch.testing.assert_close(terms["ridge"], own)
    assert set(terms) == {"energy", "ridge", "stability"}


def test_the_gradient_is_that_of_the_drawn_cells_and_the_constant_term_is_unbiased(small):
    trainer = small_trainer(small, cells_per_group=12)
    maps = trainer.model.affine(trainer.design)
    known, pairs = [], []
    for _ in range(300):
        batch = trainer.groups.sample(12, trainer.cpu_generator)
        known.append(trainer.within.of(batch))
        pairs.append(self_distance(batch.perturbed, batch.perturbed_sizes))
    found = torch.autograd.grad(trainer.loss_terms(batch)["energy"], trainer.model.axis_left)
    expected = torch.autograd.grad(plain_energies(trainer, batch, *maps).mean(), trainer.model.axis_left)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    known, pairs = torch.stack(known), torch.stack(pairs)
    error = (known - pairs).std(0) / 300**0.5
    assert ((known - pairs).mean(0).abs() < 4 * error + 1e-5).all()
    # It follows the draw: most of the variation of the term by pairs is in it.
    assert ((known - pairs).var(0) < 0.5 * pairs.var(0)).all()


def test_training_lowers_the_distance_from_the_identity_start(small):
    """From the identity, not from the moments: every sign of the energy distance is needed for this."""
    trainer = small_trainer(small, max_epochs=15, penalties=Penalties(ridge=0.0))
    with torch.no_grad():
        trainer.model.axis_left.zero_()
        trainer.model.axis_shift.zero_()
    start = trainer.validate()["val_loss"]
    assert trainer.fit()["val_loss"].min() < 0.3 * start


def test_the_stability_penalty_holds_the_norm_down(small):
    free, held = (
        small_trainer(small, penalties=Penalties(max_norm=1.0, stability_weight=w), max_epochs=10)
        .fit()["operator_norm"]
        .iloc[-1]
        for w in (0.0, 100.0)
    )
    assert held < min(free, 1.2)


def test_validation_names_each_group_and_caches_what_is_constant(small):
    trainer = small_trainer(small)
    row = trainer.fit(1).iloc[-1]
    labels = trainer.held_out.labels
    assert [f"val_energy[{label}]" in row for label in labels] == [True] * 6
    assert row["val_loss"] == pytest.approx(np.mean([row[f"val_energy[{label}]"] for label in labels]))
    torch.testing.assert_close(trainer.val_self, self_distance(trainer.val_perturbed, trainer.val_counts))
    norms = [trainer.model.operator(condition).norm for condition in trainer.conditions]
    assert row["operator_norm"] == pytest.approx(max(norms), rel=1e-5)


def test_the_validation_loss_is_that_of_all_held_out_cells_and_not_of_the_groups(small, monkeypatch):
    """Groups of unlike size: the mean over groups is another number."""
    monkeypatch.setattr("cellop_nb.training.operators.MIN_SHOWN", 1)
    adata = small.copy()
    crowded = (adata.obs["perturbation"] == "drug 1") & (adata.obs["cell_type"] == "type A")
    rare = (adata.obs["perturbation"] != "control") & ~crowded & (adata.obs["split"] == "val")
    adata.obs.loc[adata.obs_names[rare][::2], "split"] = "train"
    trainer = small_trainer(adata)
    row = trainer.fit(1).iloc[-1]
    sizes = trainer.val_counts
    energies = [row[f"val_energy[{label}]"] for label in trainer.held_out.labels]
    assert len({*sizes}) > 1 and np.mean(energies) != pytest.approx(
        np.average(energies, weights=sizes), rel=1e-3
    )
    assert row["val_loss"] == pytest.approx(np.average(energies, weights=sizes), rel=1e-6)


def test_validation_cells_are_spread_over_the_whole_group(small):
    trainer = small_trainer(screen_of(400))
    positions = trainer.held_out.control["type A"]
    assert torch.equal(trainer.val_control[0], positions[0])
    assert torch.equal(trainer.val_control[: trainer.val_sizes[0]][-1], positions[-1])
    assert max(trainer.val_sizes) <= 256


# -- what it reads ----------------------------------------------------------------------------------------


def test_genes_are_never_touched(small):
    """The same run without counts, and a VAE beside it that gets no gradient."""
    blind = small.copy()
    blind.X = None
    vae = NBVAE(10, n_latent=4)
    plain, without = small_trainer(small), small_trainer(blind)
    plain.fit()
    without.fit()
    assert_same_run(plain, without)
    assert all(p.grad is None for p in vae.parameters())
    owned = {id(p) for group in plain.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in plain.model.parameters() if p.requires_grad}


def test_test_cells_are_never_read(small):
    ruined = small.copy()
    ruined.obsm["X_truth"][(small.obs["split"] == "test").to_numpy()] = 1e6
    one, two = small_trainer(small), small_trainer(ruined)
    one.fit()
    two.fit()
    assert_same_run(one, two)


def test_validation_cells_never_train_and_controls_among_them_are_not_moved(small):
    ruined, perturbed = small.copy(), (small.obs["perturbation"] != "control").to_numpy()
    validation = (small.obs["split"] == "val").to_numpy()
    ruined.obsm["X_truth"][validation & ~perturbed] += 1e3
    one, two = small_trainer(small), small_trainer(ruined)
    one.fit()
    two.fit()
    assert_same_run(one, two)
    ruined.obsm["X_truth"][validation] += 1e3
    other = small_trainer(ruined).fit()
    assert one.history["train_loss"].equals(other["train_loss"])
    assert (other["val_loss"] > one.history["val_loss"] + 100).all()


def test_equal_seeds_give_bit_equal_runs(small):
    one, two, other = (small_trainer(small, seed=seed) for seed in (1, 1, 2))
    for trainer in (one, two, other):
        trainer.fit()
    assert_same_run(one, two)
    assert not one.history["train_loss"].equals(other.history["train_loss"])


def test_a_resumed_run_equals_an_uninterrupted_one(small, tmp_path):
    plain = small_trainer(small)
    plain.fit()
    small_trainer(small, callbacks=[Do(lambda t: t.save_checkpoint(tmp_path / "two.pt"), epoch=1)]).fit()
    resumed = small_trainer(small)
    resumed.load_checkpoint(tmp_path / "two.pt")
    resumed.fit()
    assert_same_run(plain, resumed)


def test_unknown_split_and_representation_are_refused(small):
    bare = small.copy()
    del bare.obs["split"]
    with pytest.raises(LabelError, match="'split'"):
        new_operators(bare, **REP)
    with pytest.raises(ValueError, match="'X_true'.*did you mean 'X_truth'"):
        new_operators(small, use_rep="X_true")


def test_doses_and_combinations_get_conditions():
    adata = synthetic(
        n_contexts=1, n_perturbations=2, combinations=1, doses=(0.5, 1.0), n_cells=40, n_genes=10, n_latent=4
    )
    split(adata)
    model = new_operators(adata, **REP)
    assert model.config["pairs"] == [["drug 1", "drug 2"]]
    trainer = OperatorTrainer(adata, model, max_epochs=2, **REP, **QUIET)
    trainer.fit()
    assert {condition.doses for condition in trainer.conditions} == {(0.5,), (1.0,), (1.0, 1.0)}


def test_names_with_a_plus_are_one_perturbation_from_the_data_to_the_model():
    names = {"drug 1": "(+)-JQ1", "drug 2": "anti-CD3+CD28", "drug 1+drug 2": "(+)-JQ1+anti-CD3+CD28"}
    adata = screen_of(60, combinations=1)
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).replace(names)
    model = new_operators(adata, **REP)
    assert model.conditions.perturbations == ["(+)-JQ1", "anti-CD3+CD28", "drug 3"]
    assert model.conditions.pairs == [("(+)-JQ1", "anti-CD3+CD28")]
    trainer = OperatorTrainer(adata, model, max_epochs=2, **REP, **QUIET)
    trainer.fit()
    whole = {"(+)-JQ1", "anti-CD3+CD28", "drug 3", "(+)-JQ1+anti-CD3+CD28"}
    assert {condition.label for condition in trainer.conditions} == whole
    assert f"val_energy[type A, {names['drug 1']}]" in trainer.history


def test_a_label_that_was_declared_single_has_an_operator_of_its_own():
    adata = screen_of(60, combinations=1)
    Keys(singles=("drug 1+drug 2",)).write(adata)
    model = new_operators(adata, **REP)
    assert "drug 1+drug 2" in model.conditions.perturbations and not model.conditions.pairs
    trainer = OperatorTrainer(adata, model, max_epochs=1, **REP, **QUIET)
    assert ("drug 1+drug 2",) in {condition.perturbations for condition in trainer.conditions}


def test_the_trainer_knows_the_floor_of_each_group(small):
    floors = small_trainer(small).floors
    assert list(floors) == small_trainer(small).groups.labels
    assert all(abs(floor) < 1 for floor in floors.values())
    assert floors == small_trainer(small).floors
