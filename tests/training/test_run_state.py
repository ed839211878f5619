"""The state of a run, in memory and in files: written whole, taken up exactly, refused where it is damaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import Do, Line, LineTrainer, assert_same_run, comparable, weights_of

from cellop_nb.errors import CheckpointError
from cellop_nb.training.checkpoint import write_state


@pytest.mark.parametrize("where", ["memory", "file"])
def test_a_resumed_run_equals_one_that_was_never_interrupted(tmp_path, where):
    plain = LineTrainer(seed=1)
    plain.fit()
    kept = []
    LineTrainer(
        seed=1,
        callbacks=[
            Do(lambda t: kept.append(t.state()), epoch=2),
            Do(lambda t: t.save_checkpoint(tmp_path / "three.pt"), epoch=2),
        ],
    ).fit()
    resumed = LineTrainer(Line(seed=5), seed=1)
    if where == "file":
        resumed.load_checkpoint(tmp_path / "three.pt")
    else:
        resumed.load_state(kept[0])
    assert resumed.epoch == 3
    resumed.fit()
    assert_same_run(plain, resumed)


def test_last_and_best_checkpoints_are_kept(tmp_path):
    script = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    seen = []
    LineTrainer(
        scripted=script, folder=tmp_path, callbacks=[Do(lambda t: seen.append(weights_of(t)), epoch=1)]
    ).fit()
    best, last = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (2, 6)
    assert torch.equal(best["model"]["slope"], seen[0]["slope"])
    assert torch.equal(last["best_model"]["slope"], seen[0]["slope"])
    again = LineTrainer(Line(seed=5), scripted=script)
    again.load_checkpoint(tmp_path / "last.pt")
    again.restore_best()
    assert torch.equal(again.model.slope, seen[0]["slope"])


def test_of_equal_epochs_the_first_is_the_best():
    trainer = LineTrainer(scripted=[3.0, 1.0, 1.0, 2.0, 1.0, 1.0])
    trainer.fit()
    assert (trainer.best_epoch, trainer.best_value) == (1, 1.0)


def test_all_that_a_run_depends_on_is_restored(tmp_path):
    """Weights and rate that were changed by hand, seed, best epoch and both generators: none as in a new trainer."""
    first = LineTrainer(seed=3, scripted=[3.0, 1.0, 2.0, 2.0])
    first.callbacks.append(Do(lambda t: (t.change("ridge", 0.5), t.change("learning_rate", 0.02)), step=2))
    first.fit(3)
    first.rows[-1]["by_hand"] = "noted"
    other = LineTrainer(seed=3)
    other.load_checkpoint(first.save_checkpoint(tmp_path / "now.pt"))
    assert other.weights == first.weights == {"ridge": 0.5}
    assert other.learning_rate == first.learning_rate == 0.02
    assert other._base_lr == first._base_lr
    assert (other.best_epoch, other.best_value) == (first.best_epoch, first.best_value) == (1, 1.0)
    assert (other.seed, other.epoch, other.step) == (3, 3, 12) and other.changes == first.changes
    assert other.rows == first.rows
    for name in ("generator", "cpu_generator"):
        assert torch.equal(getattr(other, name).get_state(), getattr(first, name).get_state())
        assert not torch.equal(
            getattr(other, name).get_state(), getattr(LineTrainer(seed=3), name).get_state()
        )


def test_numbers_of_numpy_do_not_break_a_checkpoint(tmp_path):
    trainer = LineTrainer(lr=np.float64(0.1), weight_decay=np.float64(0.1))
    trainer.weights["ridge"] = np.float64(0.5)
    trainer.fit(1)
    LineTrainer(weight_decay=0.1).load_checkpoint(trainer.save_checkpoint(tmp_path / "one.pt"))


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    trainer = LineTrainer()
    path = trainer.save_checkpoint(tmp_path / "last.pt")
    before = path.read_bytes()

    def half(state, where):
        where.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"half a file", "cut"])
def test_a_damaged_or_missing_checkpoint_is_refused(tmp_path, content):
    path = LineTrainer().save_checkpoint(tmp_path / "last.pt")
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-200] if content == "cut" else content)
    with pytest.raises(CheckpointError, match="a checkpoint of this Line.*last.pt.*To fix it"):
        LineTrainer().load_checkpoint(path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "other.pt"
    write_state(path, {"model": {"weight": torch.ones(2)}})
    with pytest.raises(CheckpointError, match="names and sizes of the run"):
        LineTrainer().load_checkpoint(path)


def test_a_second_fit_goes_on_where_the_first_ended():
    trainer = LineTrainer()
    trainer.fit(2)
    assert comparable(trainer)["epoch"].tolist() == [0, 1]
    assert trainer.fit(4)["epoch"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "other", [{"lr": 9.0}, {"seed": 8}, {"weight_decay": 0.5}, {"clip_norm": 1.0}], ids=lambda one: [*one][0]
)
def test_a_run_with_other_settings_is_refused_and_not_gone_on_with_the_old_ones(tmp_path, other):
    LineTrainer(folder=tmp_path).fit(2)
    ((name, value),) = other.items()
    with pytest.raises(CheckpointError, match=f"{name} {value}, not .*start anew in another folder"):
        LineTrainer(folder=tmp_path, **other).fit(resume=True)
    assert len(LineTrainer(folder=tmp_path, max_epochs=4).fit(resume=True)) == 4, "a longer run goes on"


def test_every_flipped_bit_of_a_checkpoint_is_seen(tmp_path):
    path = LineTrainer().save_checkpoint(tmp_path / "last.pt")
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match="a checkpoint of this Line.*last.pt.*To fix it"):
            LineTrainer().load_checkpoint(path)
    path.write_bytes(whole)
    LineTrainer().load_checkpoint(path)
