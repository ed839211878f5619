"""Callbacks: called in order, told of errors, and without a say in the numbers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
import torch
from toy import Do, LineTrainer, assert_same_run, weights_of

from cellop_nb.training.callbacks import (
    Callback,
    EarlyStopping,
    HistoryCSV,
    ProgressBar,
    Pruning,
    SaveCheckpoints,
)


def test_early_stopping_waits_and_the_best_state_is_put_back():
    seen = []
    record = Do(lambda t: seen.append(weights_of(t)), epoch=2)
    script = [5.0, 4.0, 1.0, 2.0, 1.5, 1.2, 0.1, 0.1]
    trainer = LineTrainer(scripted=script, max_epochs=8, callbacks=[record, EarlyStopping(3)])
    history = trainer.fit()
    assert len(history) == 6  # epochs 3, 4, 5 did not improve on epoch 2
    assert (trainer.status, trainer.best_epoch, trainer.best_value) == ("stopped", 2, 1.0)
    assert "val_loss has not improved for 3 epochs" in trainer.stop_reason
    assert torch.equal(trainer.model.slope, seen[0]["slope"])


def test_small_improvements_can_be_ignored():
    script = [1.0, 0.99, 0.98, 0.97, 0.96, 0.95]
    trainer = LineTrainer(scripted=script, callbacks=[EarlyStopping(2, min_delta=0.1)])
    assert len(trainer.fit()) == 3


class Recorder(Callback):
    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer):
        self.seen.append(f"start {trainer.status}")

    def on_step_end(self, trainer):
        self.seen.append("step")

    def on_epoch_end(self, trainer, row):
        assert trainer.rows[-1] is row
        self.seen.append(f"epoch {row['epoch']}")

    def on_exception(self, trainer, error):
        self.seen.append(f"error {error} {trainer.status}")

    def on_fit_end(self, trainer):
        self.seen.append(f"end {trainer.status}")


def test_one_callback_is_a_list_of_one():
    one = EarlyStopping(patience=2)
    assert one in LineTrainer(callbacks=one).callbacks


def test_hooks_are_called_in_order():
    recorder = Recorder()
    LineTrainer(max_epochs=2, steps=2, callbacks=[recorder]).fit()
    epochs = ["step", "step", "epoch 0", "step", "step", "epoch 1"]
    assert recorder.seen == ["start running", *epochs, "end finished"]


def test_hooks_hear_of_an_error_before_it_is_raised():
    def fail(trainer):
        raise RuntimeError("boom")

    recorder = Recorder()
    trainer = LineTrainer(max_epochs=2, callbacks=[recorder, Do(fail, step=2)])
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit()
    assert recorder.seen == ["start running", "step", "step", "error boom failed", "end failed"]
    assert (trainer.status, trainer.stop_reason) == ("failed", "boom")


def test_an_error_at_the_start_is_heard_too():
    class Bad(Callback):
        def on_fit_start(self, trainer):
            raise RuntimeError("boom")

    recorder = Recorder()
    trainer = LineTrainer(callbacks=[recorder, Bad()])
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit()
    assert recorder.seen == ["start running", "error boom failed", "end failed"]


def test_the_last_step_hears_the_loss_terms():
    heard = {}
    LineTrainer(max_epochs=1, callbacks=[Do(lambda t: heard.update(t.terms), step=2)]).fit()
    assert set(heard) == {"error", "ridge"}
    assert not heard["error"].requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: Callback(),
        lambda folder: EarlyStopping(100),
        lambda folder: ProgressBar(),
        lambda folder: HistoryCSV(folder / "deep" / "history.csv"),
        lambda folder: SaveCheckpoints(folder / "deep"),
    ],
    ids=["Callback", "EarlyStopping", "ProgressBar", "HistoryCSV", "SaveCheckpoints"],
)
def test_a_callback_changes_nothing_in_the_run(make, tmp_path):
    """The contract of a callback: it may look and write, and can serve two runs."""
    plain, watched = LineTrainer(), LineTrainer(callbacks=[make(tmp_path)])
    plain.fit()
    watched.fit(3)
    watched = LineTrainer(callbacks=[*watched.callbacks])
    watched.fit()
    assert_same_run(plain, watched)


def test_the_history_file_is_the_history(tmp_path):
    trainer = LineTrainer(folder=tmp_path)
    pd.testing.assert_frame_equal(trainer.fit(), pd.read_csv(tmp_path / "history.csv"))
    assert not list(tmp_path.glob("*.part"))


def test_a_progress_bar_is_on_by_default():
    assert any(isinstance(callback, ProgressBar) for callback in LineTrainer(progress=True).callbacks)


def run_of_a_study(study, folder, losses):
    """A run of a sweep whose validation curve is `losses`; whether it was given up."""
    trial = study.ask()
    about = {
        "journal": str(folder / "study.log"),
        "study": study.study_name,
        "number": trial.number,
        "sign": 1,
    }
    (folder / "trial.json").write_text(json.dumps(about))
    pruning, trainer = Pruning(folder), SimpleNamespace(monitor="val_loss", max_epochs=20)
    try:
        for epoch, loss in enumerate(losses):
            pruning.on_epoch_end(trainer, {"epoch": epoch, "val_loss": loss})
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return True
    study.tell(trial, losses[-1])
    return False


def test_a_poor_curve_ends_a_run_of_a_sweep_and_no_other(tmp_path):
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
    study = optuna.create_study(storage=optuna.storages.JournalStorage(backend), study_name="a study")
    assert not any(run_of_a_study(study, tmp_path, [10.0 - k] * 5) for k in range(5))
    assert run_of_a_study(study, tmp_path, [9.5] * 5)
    assert not run_of_a_study(study, tmp_path, [7.0] * 5)
    (tmp_path / "trial.json").unlink()
    trainer = SimpleNamespace(monitor="val_loss", max_epochs=20)
    for epoch in range(5):  # outside of a sweep
        Pruning(tmp_path).on_epoch_end(trainer, {"epoch": epoch, "val_loss": 99.0})
