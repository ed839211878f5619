"""Recorded steps, with a recording that works on a CPU: what is replayed is what would have been made."""

from __future__ import annotations

import math

import pytest
import torch
from toy import LineTrainer, small_operators, small_vae

from cellop_nb.data.counts import ResidentCounts
from cellop_nb.errors import ModelError, NonFiniteError
from cellop_nb.training.cuda_graph import Recorder, recorder_of
from cellop_nb.training.guard import TrainingState
from cellop_nb.training.loop import Machine

MAKE = {"vae": small_vae, "operators": small_operators}


def recording_on_a_cpu(trainer):
    """A capture that makes the calls once, takes their effect back, and makes them at each replay.

    As a graph of the device it reads nothing but the tensors that were there, and writes its results to one place.
    """

    def capture(run, generators):
        numbers, rate = trainer.recorder.numbers, trainer.optimizer.param_groups[0]["lr"]
        assert all(isinstance(number, torch.Tensor) for number in (rate, *numbers.values()))
        before = TrainingState.of(trainer, trainer.model, trainer.optimizer)
        made, finite = run(), trainer.guard.finite
        before.restore(trainer.model, trainer.optimizer, trainer)

        def replay():
            trainer.recorder.numbers = numbers
            for group in trainer.optimizer.param_groups:
                group["lr"] = float(rate)
            again = run()
            trainer.recorder.numbers = {}
            finite.copy_(trainer.guard.finite)
            made[1].copy_(again[1])
            for name, term in made[0].items():
                term.copy_(again[0][name])

        return made, replay

    return capture


def recorded(trainer):
    trainer.recorder = Recorder(trainer, recording_on_a_cpu(trainer))
    return trainer


def without_dropout(trainer):
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer


@pytest.fixture
def held(as_on_a_device, monkeypatch):
    monkeypatch.setattr(
        "cellop_nb.training.vae.resident", lambda matrix, device: ResidentCounts(matrix, device)
    )


@pytest.mark.parametrize("kind", MAKE)
def test_a_recorded_fit_is_the_plain_one(kind, held):
    plain, other = MAKE[kind](None, max_epochs=4), recorded(MAKE[kind](None, max_epochs=4))
    expected, found = plain.fit(), other.fit()
    steps = sum(plain.shape_of(b) is not None for b in plain.batches()) * 4
    assert steps - 2 * Recorder.PLAIN <= other.recorder.replayed < steps
    columns = [name for name in expected if name not in ("seconds", "cells_per_s")]
    torch.testing.assert_close(
        torch.tensor(found[columns].to_numpy()),
        torch.tensor(expected[columns].to_numpy()),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("kind", MAKE)
def test_changes_by_hand_reach_a_recorded_step(kind, held):
    """Learning rate and weights are read at each replay, as is a clipping norm."""

    def history(trainer):
        trainer.fit(2)
        name = next(iter(trainer.weights))
        trainer.change("learning_rate", 1e-4)
        trainer.change(name, 3.0)
        trainer.clip_norm = 0.5
        return torch.tensor(trainer.fit(4)[["train_loss", "val_loss", "grad_norm"]].to_numpy())

    torch.testing.assert_close(
        history(recorded(MAKE[kind](None))), history(MAKE[kind](None)), rtol=1e-6, atol=1e-7
    )


def test_another_clipping_norm_is_another_recording(held):
    trainer = recorded(small_operators(None))
    trainer.model.train()
    batch = next(iter(trainer.batches()))
    for _ in range(Recorder.PLAIN + 2):
        trainer._run_step(batch)
    assert trainer.recorder.replayed == 2
    trainer.clip_norm /= 2
    trainer._run_step(batch)
    assert trainer.recorder.replayed == 2


def test_held_counts_train_as_those_that_travel(held, monkeypatch):
    """The cell more that takes the rest of the room counts nowhere; only the draw of its noise is another."""
    monkeypatch.setattr("cellop_nb.models.vae.sample_z", lambda posterior, generator: posterior.loc)
    there = without_dropout(small_vae(None, max_epochs=3)).fit()
    monkeypatch.setattr("cellop_nb.training.vae.resident", lambda matrix, device: matrix)
    here = without_dropout(small_vae(None, max_epochs=3)).fit()
    for column in ("train_loss", "val_loss", "grad_norm"):
        torch.testing.assert_close(
            *(torch.tensor(t[column].to_numpy()) for t in (there, here)), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("kind", MAKE)
def test_a_fault_in_a_replay_is_told_by_its_step(kind, held, monkeypatch):
    trainer = recorded(MAKE[kind](None, max_epochs=6))
    batches, wanted = trainer.batches, 2 * Recorder.PLAIN + 1

    def spoilt():
        for number, batch in enumerate(batches(), start=trainer.step):
            if number == wanted:
                trainer.weights[next(iter(trainer.weights))] = math.nan
            yield batch

    plain, seen = trainer.loss_terms, []
    monkeypatch.setattr(trainer, "batches", spoilt)
    monkeypatch.setattr(trainer, "loss_terms", lambda batch: seen.append(trainer.recorder) or plain(batch))
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit()
    assert caught.value.step == wanted
    assert seen[-1] is None  # made again call by call: a replay would check nothing
    assert trainer.recorder.replayed > 0
    assert all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())


def test_what_cannot_be_recorded_is_said(held):
    assert recorder_of(small_vae(None), None) is None
    with pytest.raises(ModelError, match="the device cpu"):
        small_vae(None, machine=Machine(accelerator="cpu", cuda_graphs=True))
    with pytest.raises(ModelError, match="recordable"):
        LineTrainer(machine=Machine(accelerator="cpu", cuda_graphs=True))

    class Own(type(small_vae(None))):
        """Adds a term, and does not say that it can be recorded."""

    trainer = small_vae(None)
    trainer.__class__ = Own
    with pytest.raises(ModelError, match="Own without recordable"):
        recorder_of(trainer, True)


def test_a_step_that_looks_is_refused_with_the_way_out(held):
    trainer = small_operators(None)

    def capture(run, generators):
        raise RuntimeError("operation not permitted when stream is capturing")

    trainer.recorder = Recorder(trainer, capture)
    with pytest.raises(ModelError, match="cuda_graphs=False"):
        trainer.fit()
