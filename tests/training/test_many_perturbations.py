"""Many perturbations: their effects are learned better than from each one's own mean, in memory that does not grow."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from scipy.stats import ortho_group

from cellop_nb.data.contract import Keys
from cellop_nb.data.groups import Groups
from cellop_nb.models.operators import Condition, ConditionEncoder
from cellop_nb.training.loop import Machine
from cellop_nb.training.operators import GROUPS_AT_ONCE, OperatorTrainer, Penalties, new_operators


def planted(n_perturbations, n_cells=50, d=32, directions=20, size=2.1, n_controls=500):
    """Latents of a screen whose shifts lie in some directions; the shifts, (perturbation, d)."""
    rng = np.random.default_rng(0)
    basis = ortho_group(d, seed=1).rvs()[:directions]
    shifts = rng.normal(0, size / directions**0.5, (n_perturbations, directions)) @ basis
    own = np.concatenate([np.zeros((n_controls, d)), np.repeat(shifts, n_cells, 0)])
    names = ["control"] * n_controls + [f"gene {k}" for k in range(n_perturbations) for _ in range(n_cells)]
    split = np.where(np.arange(len(own)) % 12 == 0, "val", "train")
    obs = pd.DataFrame({"perturbation": names, "split": split}, index=[f"cell {k}" for k in range(len(own))])
    adata = AnnData(sparse.csr_matrix(np.ones((len(own), 1), "f4")), obs=obs)
    adata.obsm["X_nbvae"] = (own + rng.normal(size=own.shape)).astype("f4")
    Keys(context_key=None).write(adata)
    return adata, shifts


def trained(adata, **settings):
    model = new_operators(adata, context_rank=None, **settings)
    quiet = {"progress": False, "machine": Machine(accelerator="cpu")}
    OperatorTrainer(
        adata,
        model,
        max_epochs=2,
        steps_per_epoch=5,
        lr=2e-2,
        cells_per_group=24,
        penalties=Penalties(),
        **quiet,
    ).fit()
    return model


@torch.no_grad()
def learned_shifts(model):
    conditions = [Condition((name,)) for name in model.conditions.perturbations]
    matrices, shifts = model.affine(model.conditions.design(conditions))
    names = [int(c.perturbations[0].split()[1]) for c in conditions]
    moves = (matrices @ model.center + shifts - model.center).numpy()
    return moves[np.argsort(names)]


def own_means(adata):
    groups = Groups(adata, use_rep="X_nbvae", split="train")
    moves = [g.cells.mean(0) - groups.control[g.context].mean(0) for g in groups]
    names = [int(g.perturbation.split()[1]) for g in groups]
    return torch.stack(moves).numpy()[np.argsort(names)]


def cosine(left, right):
    return float(
        np.mean((left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1))
    )


def test_pooled_effects_are_nearer_to_the_truth_than_each_ones_own_mean():
    adata, shifts = planted(300)
    model = trained(adata)
    assert model.config["n_axes"] == 20, "the rank that was planted"
    plain, pooled = (cosine(moves, shifts) for moves in (own_means(adata), learned_shifts(model)))
    assert pooled > plain + 0.01
    assert pooled > 0.94
    few = cosine(learned_shifts(trained(adata, n_axes=8)), shifts)
    assert few < plain, "too few axes lose to the means: the rank matters"


def test_without_effects_there_is_one_axis_and_hardly_any_shift():
    adata, _ = planted(300, size=0.0)
    model = new_operators(adata, context_rank=None)
    assert model.config["n_axes"] == 1
    assert np.square(learned_shifts(model)).sum() < 0.05 * np.square(own_means(adata)).sum()


def test_a_perturbation_of_few_cells_is_shrunk_more():
    adata, _ = planted(200, n_cells=60)
    few = adata.obs["perturbation"] == "gene 7"
    kept = adata[~(few & (few.cumsum() > 6)).to_numpy()].copy()
    shares = [
        np.linalg.norm(learned_shifts(new_operators(part, context_rank=None))[7])
        / np.linalg.norm(own_means(part)[7])
        for part in (adata, kept)
    ]
    assert shares[1] < 0.8 * shares[0]


@pytest.mark.parametrize("doses", [False, True])
def test_least_squares_over_parts_is_that_of_the_whole_matrix(doses):
    rng = np.random.default_rng(0)
    encoder = ConditionEncoder([f"p{k}" for k in range(12)], [], 2).double()
    conditions = [
        Condition(tuple(f"p{k}" for k in rng.choice(10, rng.integers(1, 4), replace=False)))
        for _ in range(40)
    ]
    if doses:
        conditions = [
            Condition(c.perturbations, None, tuple(rng.uniform(0.2, 2, len(c.doses)))) for c in conditions
        ]
    design, target = encoder.design(conditions), torch.as_tensor(rng.normal(size=(40, 5)))
    whole = design.sums(torch.eye(12, dtype=torch.float64))
    expected = torch.linalg.pinv(whole) @ target
    torch.testing.assert_close(design.least_squares(target, 12), expected, rtol=1e-6, atol=1e-8)
    assert not expected[10:].any(), "what is in no condition has no effect"


def held_by(loss):
    """Bytes of all tensors that the graph of a loss holds."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = loss()
    assert kept.requires_grad
    return sum(sizes.values())


def test_memory_of_a_step_does_not_grow_with_the_groups():
    kept = []
    for n in (GROUPS_AT_ONCE, 3 * GROUPS_AT_ONCE):
        adata, _ = planted(n, n_cells=24, d=8, directions=4, n_controls=100)
        model = new_operators(adata, context_rank=None, n_axes=4)
        trainer = OperatorTrainer(adata, model, progress=False, machine=Machine(accelerator="cpu"))
        batch = next(iter(trainer.batches()))
        assert len(batch.which) == GROUPS_AT_ONCE
        kept.append(held_by(lambda t=trainer, b=batch: sum(t.loss_terms(b).values())))
        assert len([name for name in trainer.validate() if name.startswith("val_energy[")]) <= GROUPS_AT_ONCE
    assert kept[1] < 1.1 * kept[0]


def test_each_group_has_its_turn():
    adata, _ = planted(3 * GROUPS_AT_ONCE, n_cells=24, d=4, directions=2, n_controls=50)
    model = new_operators(adata, context_rank=None, n_axes=2, rank=0)
    trainer = OperatorTrainer(
        adata, model, steps_per_epoch=6, progress=False, machine=Machine(accelerator="cpu")
    )
    times = np.bincount([k for batch in trainer.batches() for k in batch.which])
    assert set(times) == {2}
