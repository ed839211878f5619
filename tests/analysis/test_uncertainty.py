"""Intervals of operators: refits hold the planted maps, as often as they say."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from cellop_nb.analysis.uncertainty import bootstrap_operators, operator_intervals
from cellop_nb.data.contract import Keys
from cellop_nb.data.groups import Groups
from cellop_nb.data.splits import split
from cellop_nb.errors import DataError, ModelError
from cellop_nb.models.operators import Condition
from cellop_nb.training.operators import Penalties, new_operators


def screen(seed: int = 1):
    """One context, six perturbations whose affine maps are known; true latents."""
    rng = np.random.default_rng(seed)
    d, n, names = 4, 150, [f"p{k}" for k in range(6)]
    maps = {name: (np.eye(d) + 0.15 * rng.normal(size=(d, d)), rng.normal(size=d)) for name in names}
    z, obs = [rng.normal(size=(n, d)) + 1.0], ["control"] * n
    for name, (A, b) in maps.items():
        z.append((rng.normal(size=(n, d)) + 1.0) @ A.T + b)
        obs += [name] * n
    adata = ad.AnnData(
        obs=pd.DataFrame({"perturbation": obs}, index=[str(i) for i in range(len(obs))]),
        obsm={"X_nbvae": np.concatenate(z).astype(np.float32)},
    )
    Keys(context_key=None).write(adata)
    split(adata, test_fraction=0.0)
    return adata, maps


@pytest.fixture(scope="module")
def planted():
    return screen()


def family(adata, rank=None):
    return new_operators(adata, rank=rank, context_rank=None)


@pytest.mark.parametrize("rank", [0, None])
def test_intervals_of_the_operators_cover_the_planted_ones(rank):
    """Over four screens: the groups of one share their controls' chance."""
    wide, narrow = [], []
    for seed in range(1, 5):
        adata, maps = screen(seed)
        members = bootstrap_operators(
            adata,
            family(adata, rank),
            n_replicates=20 if rank == 0 else 10,
            max_epochs=1,
            penalties=Penalties(ridge=1e-3),
            progress=False,
        )
        mean = np.ones(4)  # of the control population
        truth = np.concatenate([(A - np.eye(4)) @ mean + b for A, b in maps.values()])
        for inside, data, level in ((wide, adata, 0.9), (narrow, Groups(adata, use_rep="X_nbvae"), 0.2)):
            table = operator_intervals(data, members, level=level)
            moves = table[table["quantity"].str.startswith("move")]
            inside.append(((moves["low"] <= truth) & (truth <= moves["high"])).mean())
    assert 0.8 <= np.mean(wide) <= 0.97
    assert np.mean(narrow) < 0.4


def test_a_level_is_a_share(planted):
    adata, _ = planted
    members = bootstrap_operators(adata, family(adata, 0), n_replicates=2, max_epochs=1, progress=False)
    with pytest.raises(DataError, match="between 0 and 1"):
        operator_intervals(adata, members, level=95)


def test_one_refit_is_refused(planted):
    with pytest.raises(ModelError, match="two refits"):
        bootstrap_operators(planted[0], family(planted[0]), n_replicates=1)


def test_members_differ_and_torch_seeds_do_not_leak(planted):
    state = torch.random.get_rng_state()
    members = bootstrap_operators(planted[0], family(planted[0], 0), n_replicates=2, progress=False)
    assert not torch.equal(members[0].axis_shift, members[1].axis_shift)
    assert torch.equal(state, torch.random.get_rng_state())


def test_quantities_are_those_of_the_operators_one_by_one(planted):
    adata, _ = planted
    members = bootstrap_operators(adata, family(adata, 0), n_replicates=2, progress=False)
    table = operator_intervals(adata, members).set_index(["perturbation", "quantity"])["estimate"]
    start = Groups(adata, use_rep="X_nbvae").control["all"].mean(0)
    for name in ("p0", "p5"):
        both = [member.operator(Condition((name,), "all")) for member in members]
        moves = torch.stack([operator(start[None])[0] - start for operator in both])
        assert table[name, "move[2]"] == pytest.approx(float(moves[:, 2].mean()), abs=1e-5)
        assert table[name, "length"] == pytest.approx(float(moves.norm(dim=1).mean()), rel=1e-4)
        assert table[name, "norm"] == pytest.approx(np.mean([operator.norm for operator in both]), rel=1e-5)
