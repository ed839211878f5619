"""What is changed by hand takes effect between two steps, is written down, and can be repeated exactly."""

from __future__ import annotations

import json

import pytest

from cellop_nb.errors import LabelError, ModelError
from cellop_nb.training.callbacks import Replay

from .toy import Do, LineTrainer, assert_same_run


def steered(**settings) -> LineTrainer:
    """Learning rate after step 5, a weight after step 11, stopped after step 18 of 24."""
    hands = [
        Do(lambda trainer: trainer.change("learning_rate", 0.02), step=5),
        Do(lambda trainer: trainer.change("ridge", 0.3), step=11),
        Do(lambda trainer: trainer.stop(), step=18),
    ]
    trainer = LineTrainer(callbacks=hands, **settings)
    trainer.fit()
    return trainer


def test_changes_are_recorded_with_the_step_they_follow():
    trainer = steered()
    said = [(change["epoch"], change["step"], change["name"], change["value"]) for change in trainer.changes]
    assert said == [
        (1, 5, "learning_rate", 0.02), (2, 11, "ridge", 0.3), (5, 18, "stop", "stopped by hand"),
    ]  # fmt: skip


def test_the_history_says_what_was_changed_and_when():
    history = steered().history
    assert history["by_hand"].fillna("").tolist() == [
        "", "learning_rate 0.02 after step 5", "ridge 0.3 after step 11", "", "",
    ]  # fmt: skip
    assert history["ridge"].tolist() == [0.01, 0.01, 0.3, 0.3, 0.3]
    assert "by_hand" not in LineTrainer(max_epochs=1).fit()


def test_a_steered_run_is_repeated_exactly_from_its_changes():
    first = steered()
    written = json.loads(json.dumps(first.changes))
    again = LineTrainer(callbacks=[Replay(written)])
    again.fit()
    assert_same_run(first, again)
    assert again.changes == first.changes
    unsteered = LineTrainer()
    unsteered.fit()
    assert len(unsteered.history) != len(first.history)


def test_changes_before_the_first_step_are_repeated_too():
    first = LineTrainer()
    first.change("learning_rate", 0.5)
    first.fit()
    again = LineTrainer(callbacks=[Replay(first.changes)])
    again.fit()
    assert first.changes[0]["step"] == 0
    assert_same_run(first, again)


def test_changes_survive_a_checkpoint(tmp_path):
    trainer = steered()
    trainer.save_checkpoint(tmp_path / "now.pt")
    other = LineTrainer()
    other.load_checkpoint(tmp_path / "now.pt")
    assert other.changes == trainer.changes


@pytest.mark.parametrize(
    ("name", "value", "error", "said"),
    [
        ("ridgee", 1.0, LabelError, "ridge"),
        ("learning_rate", 0.0, ModelError, "learning_rate"),
        ("ridge", -1.0, ModelError, "ridge"),
        ("ridge", float("nan"), ModelError, "ridge"),
    ],
)
def test_a_wrong_change_is_refused_and_changes_nothing(name, value, error, said):
    trainer = LineTrainer()
    with pytest.raises(error, match=said):
        trainer.change(name, value)
    assert trainer.changes == []
    assert trainer.weights == {"ridge": 0.01}
