"""A training that is killed at any moment goes on with the very numbers of one that was never interrupted."""

from __future__ import annotations

import random
import time

import numpy as np
import pandas as pd
import pytest
import torch
from toy import Do, LineTrainer, assert_same_run, small_operators, small_screen, small_vae, train

from cellop_nb.errors import CheckpointError
from cellop_nb.training.callbacks import EarlyStopping

MAKE = {"vae": small_vae, "operators": small_operators}


def rows(folder):
    path = folder / "history.csv"
    return len(pd.read_csv(path)) if path.exists() else 0


def kill_after(process, folder, n_rows, more):
    """kill -9 once `n_rows` epochs are written and `more` seconds have passed."""
    limit = time.monotonic() + 60
    while rows(folder) < n_rows and process.is_alive():
        assert time.monotonic() < limit, "the training does not get on"
        time.sleep(0.005)
    time.sleep(more)
    process.kill()
    process.join()


@pytest.mark.parametrize("kind", MAKE)
def test_kills_at_random_points_change_no_bit(kind, processes, tmp_path):
    plain = MAKE[kind](tmp_path / "plain")
    plain.fit()
    folder, source, kills = tmp_path / "killed", random.Random(kind), 0
    while rows(folder) < plain.max_epochs:
        process = processes.Process(target=train, args=(kind, folder, 0.004))
        process.start()
        kill_after(process, folder, rows(folder) + source.randint(0, 4), source.uniform(0, 0.06))
        kills += process.exitcode == -9
        last = folder / "last.pt"
        assert not last.exists() or torch.load(last, weights_only=True)["epoch"] >= rows(folder) - 1
    assert kills >= 3
    resumed = MAKE[kind](folder)
    resumed.fit(resume=True)
    assert_same_run(plain, resumed)
    best, ours = (torch.load(where / "best.pt", weights_only=True) for where in (tmp_path / "plain", folder))
    assert all(torch.equal(ours["model"][name], value) for name, value in best["model"].items())


def test_a_checkpoint_holds_all_that_a_run_is_made_of(tmp_path):
    trainer = small_vae(tmp_path, max_epochs=2, seed=3, weight_decay=np.float64(0.1))
    trainer.fit()
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert {"model", "optimizer", "generators", "rows", "schedule", "best_model", "changes"} <= set(state)
    assert state["optimizer"]["state"] and len(state["rows"]) == 2
    assert state["schedule"] == {"half_cosine_steps": 2 * trainer.steps_per_epoch()}
    wanted = {"max_epochs": 2, "lr": 1e-2, "seed": 3, "batch_size": 16, "kl_weight": 1.0, "weight_decay": 0.1}
    assert wanted.items() <= state["parameters"].items()
    made_from = state["made_from"]
    assert made_from["model"]["genes"] == list(small_screen().var_names)
    split = small_screen().obs["split"].to_numpy()
    assert np.array_equal(made_from["split"]["val"].numpy(), np.flatnonzero(split == "val"))


def test_the_same_call_starts_and_continues(tmp_path):
    first = small_vae(tmp_path, max_epochs=3)
    assert len(first.fit(resume=True)) == 3, "nothing to go on from yet"
    again = small_vae(tmp_path, max_epochs=3)
    assert len(again.fit(resume=True)) == 3 and again.step == first.step, "nothing left to do"
    longer = small_vae(tmp_path, max_epochs=5)
    assert longer.fit(resume=True)["epoch"].tolist() == [0, 1, 2, 3, 4]


def reseeded(adata):
    adata.obs["split"] = adata.obs["split"].to_numpy()[::-1]
    return adata


def other_counts(adata):
    adata.X = adata.X * 2
    return adata


def swapped_counts(adata):
    """Other counts of equal library sizes and gene sums."""
    dense = adata.X.toarray()
    rows = np.flatnonzero(adata.obs["split"] == "train")
    for one in rows[1:]:
        up = np.flatnonzero(dense[rows[0]] > dense[one])
        down = np.flatnonzero(dense[rows[0]] < dense[one])
        if len(up) and len(down):
            for cell, gene, change in (
                (rows[0], up[0], -1),
                (rows[0], down[0], 1),
                (one, up[0], 1),
                (one, down[0], -1),
            ):
                dense[cell, gene] += change
            break
    adata.X = type(adata.X)(dense)
    return adata


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adata": reseeded(small_screen())}, "split.train"),
        ({"adata": other_counts(small_screen())}, "counts"),
        ({"adata": swapped_counts(small_screen())}, "counts"),
        ({"adata": small_screen()[:, ::-1].copy()}, "model.genes"),
        ({"batch_size": 8}, "batch_size 8, not 16"),
        ({"kl_weight": 2.0}, "kl_weight 2.0, not 1.0"),
        ({"warmup_epochs": 3}, "warmup_epochs 3, not 5"),
    ],
    ids=["split", "counts", "counts of equal sums", "genes", "batch_size", "kl_weight", "warmup_epochs"],
)
def test_a_checkpoint_of_another_split_or_data_is_refused(tmp_path, settings, message):
    small_vae(tmp_path, max_epochs=1).fit()
    with pytest.raises(
        CheckpointError, match=f"{message}.*To fix it: build model and trainer as for that run"
    ):
        small_vae(tmp_path, **settings).fit(resume=True)


def test_operators_of_other_latents_are_refused(tmp_path):
    small_operators(tmp_path, max_epochs=1).fit()
    other = small_operators(tmp_path)
    other.made_from["latents"] = "0" * 16
    with pytest.raises(CheckpointError, match="latents '0000000000000000', not"):
        other.fit(resume=True)


def test_resuming_needs_a_folder():
    with pytest.raises(CheckpointError, match="a trainer without one.*folder="):
        LineTrainer().fit(resume=True)


def test_a_run_killed_after_early_stopping_has_no_epoch_left(tmp_path):
    script = [5.0, 4.0, 4.5, 4.4, 0.1, 0.1]

    def trainer():
        return LineTrainer(scripted=script, folder=tmp_path, callbacks=[EarlyStopping(2)])

    assert len(trainer().fit()) == 4
    again = trainer()
    assert len(again.fit(resume=True)) == 4
    assert (again.status, again.best_epoch) == ("stopped", 1)


def test_changes_by_hand_survive_a_crash(tmp_path):
    def trainer(*callbacks):
        return LineTrainer(folder=tmp_path, callbacks=callbacks)

    def crash(running):
        raise RuntimeError("power cut")

    slower = Do(lambda t: t.change("learning_rate", 0.01), step=5)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(slower, Do(crash, step=14)).fit()
    again = trainer()
    again.fit(resume=True)
    assert again.learning_rate == 0.01
    assert [change["name"] for change in again.changes] == ["learning_rate"]
    plain = LineTrainer(callbacks=[Do(lambda t: t.change("learning_rate", 0.01), step=5)])
    plain.fit()
    assert_same_run(plain, again)
