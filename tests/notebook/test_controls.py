"""Run controls: every button and slider as a plain method, and what kernels allow."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from ipywidgets import Button, VBox

from cellop_nb.errors import StorageError
from cellop_nb.notebook import controls as module
from cellop_nb.notebook.controls import RunControls, free_comms, kernel_note
from cellop_nb.notebook.live import LivePlot


@pytest.fixture
def trainer(fake_trainer):
    return fake_trainer(epochs=3)


@pytest.fixture
def controls(trainer, tmp_path) -> RunControls:
    return RunControls(trainer, checkpoint=tmp_path / "now.pt")


def wait_until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_without_anybody_at_the_controls_training_runs_to_its_end(controls, trainer):
    trainer.fit()
    assert trainer.status == "finished"
    assert len(trainer.rows) == 3
    assert trainer.changes == []
    assert "finished" in controls.status.value


def test_stop_pause_and_resume_a_running_training(fake_trainer):
    trainer = fake_trainer(epochs=10_000, pause=0.002)
    controls = RunControls(trainer)
    worker = threading.Thread(target=trainer.fit)
    worker.start()
    controls.pause_button.click()
    wait_until(lambda: trainer.status == "paused")
    step = trainer.step
    assert controls.pause_button.description == "Resume"
    time.sleep(0.05)
    assert trainer.step == step, "nothing moves while paused"
    assert "paused" in controls.status.value
    trainer.change("learning_rate", 0.25)
    wait_until(lambda: "learning rate 0.25" in controls.status.value)
    controls.pause_button.click()
    wait_until(lambda: trainer.step > step)
    assert controls.pause_button.description == "Pause"
    controls.stop_button.click()
    worker.join(5)
    assert trainer.status == "stopped"
    assert trainer.rows, "the history stays"


def test_stop_ends_a_paused_training(fake_trainer):
    trainer = fake_trainer(epochs=10_000, pause=0.002)
    controls = RunControls(trainer)
    worker = threading.Thread(target=trainer.fit)
    worker.start()
    controls.pause()
    wait_until(lambda: trainer.status == "paused")
    controls.stop()
    worker.join(5)
    assert trainer.status == "stopped"


def test_sliders_reach_the_trainer_and_are_recorded(controls, trainer):
    controls.rate_slider.value = 1e-2
    controls.weight_sliders["stability_weight"].value = 0.15
    assert trainer.learning_rate == pytest.approx(1e-2)
    assert trainer.weights == {"kl_weight": 1.0, "stability_weight": pytest.approx(0.15)}
    trainer.fit()
    assert trainer.seen[0] == (pytest.approx(1e-2), trainer.weights)
    assert trainer.rows[0]["stability_weight"] == pytest.approx(0.15)
    assert [change["name"] for change in trainer.changes] == ["learning_rate", "stability_weight"]
    assert trainer.changes[0] == {
        "epoch": 0,
        "step": 0,
        "name": "learning_rate",
        "value": pytest.approx(1e-2),
    }


def test_there_is_a_slider_for_every_weight(fake_trainer):
    trainer = fake_trainer()
    trainer.weights = {"ridge": 0.03, "<b>new</b>": 0.0}
    controls = RunControls(trainer)
    assert set(controls.weight_sliders) == {"ridge", "<b>new</b>"}
    assert controls.weight_sliders["<b>new</b>"].description == "&lt;b&gt;new&lt;/b&gt;"


@pytest.mark.parametrize("rate", [1e-3, 3e-4, 0.02, 1.7e-5])
def test_the_first_rate_lies_on_the_grid(rate):
    slider = module.rate_slider(rate)
    steps = (np.log10(slider.value) - slider.min) / slider.step
    assert steps == pytest.approx(round(steps), abs=1e-6)
    assert slider.value == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.03, 0.0, 250.0])
def test_the_first_weight_lies_on_the_grid(weight):
    slider = module.weight_slider("weight", weight)
    steps = slider.value / slider.step
    assert steps == pytest.approx(round(steps), abs=1e-9)
    assert slider.value == pytest.approx(weight)
    assert slider.min <= slider.value < slider.max


def test_showing_a_slider_changes_nothing(controls, trainer):
    assert trainer.learning_rate == 1e-3
    assert trainer.changes == []


def test_save_waits_for_the_end_of_the_step(controls, trainer):
    trainer.status = "running"
    controls.save_button.click()
    assert trainer.saved == []
    controls.on_step_end(trainer)
    assert trainer.saved == [(controls.checkpoint, 0)]
    controls.on_step_end(trainer)
    assert len(trainer.saved) == 1


def test_save_is_done_at_once_while_paused(controls, trainer):
    trainer.status = "paused"
    controls.save_checkpoint()
    assert len(trainer.saved) == 1
    assert "now.pt" in controls.note.value


def test_a_checkpoint_that_cannot_be_written_is_said_and_ends_nothing(fake_trainer, monkeypatch):
    trainer = fake_trainer(epochs=2)

    def full(path):
        raise StorageError("Expected to write it. Found no space left. To fix it: make room.")

    monkeypatch.setattr(trainer, "save_checkpoint", full)
    controls = RunControls(trainer)
    controls._save.set()
    trainer.fit()
    assert trainer.status == "finished"
    assert "not saved: Expected to write it" in controls.note.value


def test_a_page_that_cannot_be_reached_is_logged_once_and_ends_nothing(fake_trainer, monkeypatch, caplog):
    trainer = fake_trainer(epochs=2)
    controls = RunControls(trainer)

    def gone(**_):
        raise LookupError("no parent")

    monkeypatch.setattr(controls.status.comm, "send", gone)
    trainer.fit()
    assert trainer.status == "finished"
    assert [record.getMessage() for record in caplog.records] == [
        "RunControls cannot write to the page; the training goes on."
    ]


def test_draw_now_asks_the_trainers_own_picture(fake_trainer):
    pictures: list[bytes] = []
    trainer = fake_trainer(callbacks=[LivePlot(publish=pictures.append)])
    trainer.rows.append(trainer.row(0))
    controls = RunControls(trainer)
    controls.draw_button.click()
    assert len(pictures) == 1


def test_draw_now_without_a_picture_does_nothing(controls):
    controls.draw_now()


def test_status_is_escaped_and_written_seldom(fake_trainer, clock):
    trainer = fake_trainer()
    controls = RunControls(trainer, clock=clock)
    said = []
    controls.status.observe(lambda change: said.append(change["new"]), "value")
    trainer.stop_reason = "<script>alert(1)</script>"
    controls.on_fit_start(trainer)
    for trainer.step in range(100):
        clock.now += 0.01
        controls.on_step_end(trainer)
    assert 3 <= len(said) <= 6, "four times a second, not at every step"
    assert "<script>" not in said[-1]
    assert "&lt;script&gt;" in said[-1]


def test_controls_themselves_say_nothing_during_a_fit(controls, trainer):
    """What a control publishes from the training's thread would turn it deaf on ipykernel 7.4."""
    spoken = []
    for widget in (controls.stop_button, controls.pause_button, controls.rate_slider):
        widget.observe(lambda change: spoken.append(change["name"]))
    trainer.fit()
    assert spoken == []


def test_freeing_comms_reaches_children():
    panel = VBox([VBox([Button()]), Button()])
    for widget in (panel, panel.children[0].children[0]):
        widget.comm._reply_subshell_id = None
    assert free_comms([panel]) == 2
    assert "_reply_subshell_id" not in vars(panel.comm)
    assert free_comms([panel]) == 0


def test_a_fit_frees_its_controls(controls, trainer):
    controls.stop_button.comm._reply_subshell_id = None
    controls.on_fit_start(trainer)
    assert "_reply_subshell_id" not in vars(controls.stop_button.comm)


@pytest.mark.parametrize(
    ("version", "blocking", "said"),
    [
        (None, True, ""),
        ("6.31.0", False, "Install ipykernel 7.1"),
        ("7.3.0", True, ""),
        ("7.4.0", False, ""),
        ("7.4.0", True, "await trainer.fit_async()"),
    ],
)
def test_kernels_that_hold_back_clicks_say_so(version, blocking, said):
    note = kernel_note(version, blocking=blocking)
    assert said in note
    assert bool(note) == bool(said)


def test_every_control_has_words(controls):
    widgets = [*controls.panel.children[0].children, controls.rate_slider, *controls.weight_sliders.values()]
    assert all(widget.description for widget in widgets)
    assert all(button.tooltip for button in controls.panel.children[0].children)


def test_the_panel_shows_itself(controls):
    assert "application/vnd.jupyter.widget-view+json" in controls._repr_mimebundle_()
