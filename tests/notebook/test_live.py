"""The live picture: right panels, within its budget, last picture always, from any thread, beside any training."""

from __future__ import annotations

import importlib
import io
import logging
import subprocess
import sys
import threading

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import cellop_nb as co
from cellop_nb.data.synthetic import synthetic
from cellop_nb.notebook import live as module
from cellop_nb.notebook.live import (
    Columns,
    Dashboard,
    LivePlot,
    Marks,
    lightning_callback,
    pick_panels,
    row_from_metrics,
)
from cellop_nb.training.callbacks import Callback


def size(picture: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture)).size


# -- when to draw


def _run(live: LivePlot, trainer, clock, *, epoch_seconds: float, cost: float, steps: int = 1) -> float:
    """A training on a clock by hand, where each drawing takes `cost`; its length in seconds."""

    def draw(source, rows, running, last):
        clock.now += cost
        live.columns.extend(rows)
        live._publish(b"picture")
        return False

    live._render = draw
    live.on_fit_start(trainer)
    for epoch in range(trainer.max_epochs):
        for _ in range(steps):
            clock.now += epoch_seconds / steps
            live.on_step_end(trainer)
        trainer.rows.append(trainer.row(epoch))
        live.on_epoch_end(trainer, trainer.rows[-1])
    live.on_fit_end(trainer)
    return clock.now


@pytest.mark.parametrize("cost", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("seconds", [0.2, 3, 10, 45, 70, 600])
def test_drawing_keeps_its_budget(fake_trainer, clock, pictures, cost, seconds):
    """At most 2 % of a training of more than a minute, at most 1.2 seconds of a shorter one."""
    live = LivePlot(clock=clock, publish=pictures.append)
    whole = _run(live, fake_trainer(epochs=400), clock, epoch_seconds=seconds / 400, cost=cost)
    assert live.cost_seconds == pytest.approx(cost * live.n_drawn)
    assert live.cost_seconds <= 0.02 * max(whole, 60.0) + 1e-9
    assert live.share == pytest.approx(live.cost_seconds / (whole - cost)), (
        "of the time until the end of the fit"
    )


@pytest.mark.parametrize("cost", [0.01, 0.05, 0.1])
def test_ten_seconds_have_ten_pictures_and_the_first_comes_within_one(fake_trainer, clock, cost):
    at = []
    live = LivePlot(clock=clock, publish=lambda _: at.append(clock.now))
    trainer = fake_trainer(epochs=8)
    trainer.terms, trainer.steps_per_epoch = {"reconstruction": 1.0}, lambda: 50
    trainer.step = 25  # an epoch is always half way
    _run(live, trainer, clock, epoch_seconds=10 / 8, cost=cost, steps=50)
    assert at[0] <= 1.0
    assert len(at) >= 10


def test_a_long_training_is_never_still_for_long(fake_trainer, clock):
    at = []
    live = LivePlot(clock=clock, publish=lambda _: at.append(clock.now))
    _run(live, fake_trainer(epochs=3000), clock, epoch_seconds=0.1, cost=0.05)
    assert np.diff(at).max() <= 15


def test_never_more_often_than_every(fake_trainer, clock, pictures):
    live = LivePlot(clock=clock, publish=pictures.append, every=1.0)
    _run(live, fake_trainer(epochs=50), clock, epoch_seconds=0.1, cost=0.0)
    assert live.n_drawn <= 1 + 5 + 1


def test_last_epoch_is_drawn_however_short_the_run(fake_trainer, clock, pictures):
    live = LivePlot(clock=clock, publish=pictures.append)
    _run(live, fake_trainer(epochs=40), clock, epoch_seconds=0.001, cost=0.01)
    assert live.n_drawn == 1, "it was over before anyone could look"
    assert live.columns.n_rows == 40, "the last picture shows every epoch"
    assert live.picture == pictures[-1]


def test_draw_now_is_done_by_the_training(fake_trainer, clock, pictures):
    live, trainer = LivePlot(clock=clock, publish=pictures.append, every=1e9), fake_trainer()
    trainer.status = "running"
    trainer.rows.append(trainer.row(0))
    live.on_fit_start(trainer)
    before = live.n_drawn
    live.draw_now(trainer)
    assert live.n_drawn == before, "asking does not draw in the asking thread"
    live.on_step_end(trainer)
    assert live.n_drawn == before + 1
    live.on_step_end(trainer)
    assert live.n_drawn == before + 1, "one request, one picture"


def test_draw_now_works_while_paused(fake_trainer, pictures):
    live, trainer = LivePlot(publish=pictures.append, every=1e9), fake_trainer()
    trainer.rows.append(trainer.row(0))
    live.on_fit_start(trainer)
    trainer.status, before = "paused", live.n_drawn
    live.draw_now(trainer)
    assert live.n_drawn == before + 1


# -- what is said above the curves


def test_headline_tells_best_patience_speed_and_time_left(fake_trainer, clock, pictures):
    live, trainer = LivePlot(clock=clock, publish=pictures.append, every=1e9), fake_trainer(epochs=50)
    trainer.status = "running"
    live.on_fit_start(trainer)
    for epoch in range(30):
        clock.now += 2.0
        trainer.rows.append(trainer.row(epoch))
        live.on_epoch_end(trainer, trainer.rows[-1])
    live.draw_now(trainer)
    live.on_step_end(trainer)
    words = live.headline
    assert "epoch 30 of 50" in words
    assert "patience 3 of 10" in words, words
    assert "8k cells/s" in words
    assert "40 s left" in words
    assert "best 27 (val_loss" in words, "epochs count from one for people"


def test_duration_in_words():
    said = [module.duration(seconds) for seconds in (0.84, 12.3, 200, 3900)]
    assert said == ["0.8 s", "12 s", "3 min 20 s", "1 h 5 min"]


# -- where it draws


def test_without_a_notebook_nothing_is_drawn(fake_trainer, capsys):
    live = LivePlot()
    fake_trainer(callbacks=[live]).fit()
    assert live.n_drawn == 0
    assert live.cost_seconds == 0
    assert capsys.readouterr() == ("", "")


def test_a_path_gets_the_picture(fake_trainer, tmp_path):
    live = LivePlot(path=tmp_path / "new" / "live.png")
    fake_trainer(callbacks=[live]).fit()
    assert size(live.path.read_bytes())[0] == 1536
    assert list(live.path.parent.iterdir()) == [live.path], "no half-written file is left"


def test_only_the_first_process_draws(fake_trainer, pictures):
    trainer = fake_trainer(callbacks=[LivePlot(publish=pictures.append)])
    trainer.fabric = type("Fabric", (), {"is_global_zero": False})()
    trainer.fit()
    assert pictures == []


def test_a_failing_drawing_never_stops_the_training(fake_trainer, caplog):
    def broken(picture):
        raise OSError("no space left")

    trainer = fake_trainer(callbacks=[LivePlot(publish=broken)])
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    assert trainer.status == "finished"
    assert sum("could not draw" in record.message for record in caplog.records) == 1


def test_many_groups_and_odd_values_are_drawn(fake_trainer, operator_rows, pictures):
    groups = [f"type {i}, $drug_{i}$" for i in range(30)]
    rows = operator_rows(4, groups)
    rows[1] |= {
        "val_loss": float("nan"),
        f"val_energy[{groups[0]}]": float("inf"),
        "train_loss": float("-inf"),
    }
    live = LivePlot(publish=pictures.append, every=0.0)
    live.update(rows, source=type("Source", (), {"floors": {groups[1]: 0.02}})())
    assert size(live.picture)[1] > 800


def test_two_threads_may_ask_at_once(fake_trainer, pictures):
    live, trainer = LivePlot(publish=pictures.append, every=0.0, budget=1e9), fake_trainer(epochs=8)
    trainer.callbacks.append(live)
    worker = threading.Thread(target=trainer.fit)
    worker.start()
    while worker.is_alive():
        trainer.status = "paused"  # makes draw_now draw in this thread too
        live.draw_now(trainer)
    worker.join()
    assert live.columns.n_rows == 8
    assert all(size(picture)[0] == 1536 for picture in pictures)


def test_a_second_fit_begins_anew(fake_trainer, pictures):
    live, trainer = LivePlot(publish=pictures.append), fake_trainer(epochs=2)
    trainer.callbacks.append(live)
    trainer.fit()
    trainer.max_epochs = 4
    trainer.fit()
    assert live.columns.n_rows == 4


def test_pyplot_is_not_imported():
    modules = "sys, cellop_nb.notebook.live, cellop_nb.notebook.controls"
    code = f"import {modules}; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- other trainings


def test_standalone_rows(vae_rows, pictures):
    live, rows = LivePlot(publish=pictures.append, every=0.0), []
    for row in vae_rows(5):
        rows.append(row)
        live.update(rows)
    live.finish(rows)
    assert live.columns.n_rows == 5
    assert len(pictures) >= 2


# -- before the first epoch is over


def test_the_first_epoch_is_followed_by_its_steps(fake_trainer, clock, pictures):
    """What is drawn then are the steps' losses; the first row of the history takes their place."""
    live, trainer = LivePlot(clock=clock, publish=pictures.append, every=0.0), fake_trainer(epochs=50)
    trainer.status, trainer.steps_per_epoch = "running", lambda: 100
    live.on_fit_start(trainer)
    for trainer.step in (10, 20):
        clock.now += 1.0
        trainer.terms = {"reconstruction": torch.tensor(5.0 / trainer.step), "kl": 1.0}
        live.on_step_end(trainer)
    assert live.headline == "first epoch of 50, step 20"
    np.testing.assert_allclose(live.columns["epoch"] + 1, [0.1, 0.2])
    np.testing.assert_allclose(live.columns["train_loss"], [1.5, 1.25])
    trainer.rows.append(trainer.row(0))
    trainer.step = 150
    clock.now += 1.0
    live.on_step_end(trainer)
    np.testing.assert_allclose(live.columns.epochs() + 1, [1.0, 1.5])
    assert live.columns["train_kl"].tolist() == [10.0, 1.0]
    assert "epoch 1 of 50, step 150" in live.headline
    trainer.status = "finished"
    live.on_fit_end(trainer)
    assert live.columns.epochs().tolist() == [0.0], "the last picture shows whole epochs"


def test_a_live_frame_equals_a_fresh_drawing(vae_rows, operator_rows):
    """A panel whose limits changed is painted anew, the others are copied: the result is that of painting all."""
    for rows in (vae_rows(30), operator_rows(30, [f"type {i}" for i in range(9)])):
        columns = Columns()
        columns.extend(rows[:5])
        kept = Dashboard(pick_panels(columns.names()))
        for n in (5, 12, 30):
            columns.extend(rows[:n])
            kept.update(columns, Marks(f"{n} epochs", best_epoch=2))
            picture = kept.png()
        fresh = Dashboard(pick_panels(columns.names()))
        fresh.update(columns, Marks("30 epochs", best_epoch=2))
        np.testing.assert_array_equal(pixels(fresh.png()), pixels(picture))


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


@pytest.mark.parametrize(
    ("values", "scale"),
    [([1.0, 2.0], "linear"), ([0.01, 5.0], "log"), ([-0.01, 5.0], "symlog"), ([0.0, 0.0], "linear")],
)
def test_scales_follow_the_values(values, scale):
    chosen, low, high = module.scale_for(min(values), max(values), True)
    assert chosen == scale
    assert low <= min(values) <= max(values) <= high


def test_ticks_of_a_nearly_constant_setting_read_differently():
    rows = [{"epoch": i, "train_loss": 2.0, "learning_rate": 2e-3 - 1e-9 * i} for i in range(4)]
    figure = co.pl.training_curves(pd.DataFrame(rows))
    panel = next(ax for ax in figure.axes if ax.get_title(loc="left") == "learning rate")
    figure.canvas.draw()
    ticks = [text.get_text() for text in panel.get_yticklabels()]
    assert len(ticks) > 1 and len(set(ticks)) == len(ticks)


def test_a_history_is_drawn_as_one_figure(operator_rows, tmp_path):
    history = pd.DataFrame(operator_rows(12, ["B, IFNb", "$T$"]))
    figure = co.pl.training_curves(history, floors={"$T$": 0.1}, patience=3, save=tmp_path / "curves.svg")
    assert figure.texts[0].get_text() == "12 epochs, best epoch 12 (val_loss)"
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    shown = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert shown == ["B, IFNb", r"\$T\$", "split-half noise floor"]


# -- which panels a history has


def titles(rows) -> list[str]:
    columns = Columns()
    columns.extend(rows)
    return [panel.title for panel in pick_panels(columns.names(), columns.constant())]


# -- which panels


def test_panels_of_a_vae(vae_rows):
    assert titles(vae_rows(3)) == [
        "loss (sum of terms)",
        "reconstruction (nats per cell)",
        "KL (nats per cell)",
        "gradient norm",
        "learning rate",
        "cells per second",
    ]


def test_panels_of_operators_end_with_the_groups(operator_rows):
    shown = titles(operator_rows(3, ["B, IFNb", "T, IFNb"]))
    assert "largest operator norm" in shown
    assert shown[-1] == "energy distance per group (validation)"


def test_a_new_term_and_a_changed_weight_appear_by_themselves(vae_rows):
    rows = [row | {"train_adversary": 1.0 / (i + 1)} for i, row in enumerate(vae_rows(3))]
    assert "adversary" in titles(rows)
    assert "kl weight" not in titles(rows), "a setting that never changed is no curve"
    rows[-1]["kl_weight"] = 0.5
    assert "kl weight" in titles(rows)


def test_a_weight_named_as_its_term_is_told_apart(vae_rows):
    rows = [row | {"train_ridge": 0.1, "ridge": 0.1 + i} for i, row in enumerate(vae_rows(3))]
    assert {"ridge", "ridge (weight)"} <= set(titles(rows))


def test_columns_fill_gaps_and_read_each_row_once():
    columns = Columns()
    columns.extend([{"a": 1.0}])
    columns.extend([{"a": 1.0}, {"b": 2, "note": "text"}])
    np.testing.assert_array_equal(columns["a"], [1.0, np.nan])
    np.testing.assert_array_equal(columns["b"], [np.nan, 2.0])
    assert columns.names() == ["a", "b"], "a column without numbers is no curve"
    columns.extend([{"a": 5.0}])
    assert columns.n_rows == 1, "a shorter history is a new one"


# -- what was changed by hand


class Hand(Callback):
    """Changes settings at given steps, as a person at the sliders would."""

    def __init__(self, **at):
        self.at = at

    def on_step_end(self, trainer):
        for name, (step, value) in self.at.items():
            if trainer.step == step:
                trainer.change(name, value)


def test_changes_by_hand_are_marked_at_their_step_and_named(fake_trainer, pictures):
    live = LivePlot(publish=pictures.append)
    trainer = fake_trainer(
        epochs=20, steps=10, callbacks=[live, Hand(learning_rate=(35, 4e-3), kl_weight=(150, 0.5))]
    )
    trainer.steps_per_epoch = lambda: 10
    trainer.fit()
    view = live._board.views[0]
    assert view.hand.get_xdata().tolist() == [3.5, 15.0]
    assert [text.get_text() for text in view.named if text.get_text()] == [
        "learning rate 0.004",
        "kl weight 0.5",
    ]
    assert [text.get_position()[0] for text in view.named[:2]] == [3.5, 15.0]
    assert "changed by hand" in key_of(live)
    assert all(len(view.hand.get_xdata()) == 2 for view in live._board.views), "every panel has the ticks"


def key_of(live: LivePlot) -> list[str]:
    return [text.get_text() for text in live._board.figure.legends[0].get_texts()]


def test_without_changes_nothing_is_said_of_them(fake_trainer, pictures):
    live = LivePlot(publish=pictures.append)
    fake_trainer(epochs=3, callbacks=[live]).fit()
    assert key_of(live) == ["training", "validation", "best epoch", "patience"]
    assert not any(text.get_text() for text in live._board.views[0].named)


def test_a_history_tells_its_changes_too():
    rows = [
        {"epoch": 0},
        {"epoch": 1, "by_hand": "lr 0.01 after step 12; kl_weight 0.5 after step 19"},
        {"epoch": 2},
    ]
    marks = module.changes_of_history(rows)
    assert [(change.at, change.text) for change in marks] == [(1.5, "lr 0.01"), (1.5, "kl weight 0.5")]


def test_quick_presses_are_one_change():
    pressed = [module.Change(at, name, value) for at, name, value in
               [(1.0, "lr", 0.1), (1.2, "lr", 0.2), (1.4, "lr", 0.3), (3.0, "lr", 0.4), (3.1, "kl", 1.0)]]  # fmt: skip
    assert [change.value for change in module.joined(pressed)] == [0.3, 0.4, 1.0]


def test_the_axis_counts_epochs_as_the_headline_does(vae_rows, pictures):
    live, rows = LivePlot(publish=pictures.append), vae_rows(30)
    live.finish(rows)
    best = 1 + int(np.argmin([row["val_loss"] for row in rows]))
    view = live._board.views[0]
    assert f"best {best} (val_loss" in live.headline
    assert view.best.get_xdata()[0] == best
    assert view.lines["train_loss"].get_xdata()[-1] == 30


# -- other packages


def test_lightning_metrics_become_rows(pictures):
    callback = lightning_callback(LivePlot(publish=pictures.append, every=0.0))
    trainer = type("Trainer", (), {"max_epochs": 2, "current_epoch": 0})()
    metrics = {"train_loss_step": 9.0, "train_loss_epoch": 5.0, "elbo_validation": 4.0, "kl_local_train": 1.0}
    for trainer.current_epoch in range(2):
        trainer.callback_metrics = metrics
        callback.on_train_epoch_end(trainer, None)
    callback.on_train_end(trainer, None)
    assert callback.rows[-1] == {"epoch": 1, "train_loss": 5.0, "val_elbo": 4.0, "train_kl_local": 1.0}
    assert len(pictures) >= 2


def test_metric_names_of_several_packages():
    names = {"validation_loss": 1, "val_loss_epoch": 2, "reconstruction_loss_train": 3, "lr-Adam": 4}
    assert row_from_metrics(names) == {"val_loss": 2, "train_reconstruction_loss": 3, "lr-Adam": 4}


# -- real trainings of Lightning and scvi-tools


def line_module(package):
    """A line fitted to a line, which logs its losses as people do; the validation loss rises after epoch 3."""

    class Line(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch, i):
            loss = (self.weight * batch[0] - batch[0]).square().mean()
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch, i):
            self.log("validation_loss", abs(self.current_epoch - 3.0) + 1.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Line()


def lightning_trainer(package, **settings):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return package.Trainer(accelerator="cpu", devices=1, **quiet, **settings)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request):
    """Each package that goes by the name of Lightning."""
    package = pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    logging.getLogger(request.param).setLevel(logging.ERROR)
    return package


@pytest.fixture
def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 1)), batch_size=4)


def test_a_lightning_training_is_shown(package, loader, pictures):
    live = LivePlot(publish=pictures.append, every=0.0, budget=1e9)
    callback = lightning_callback(live)
    stopper = importlib.import_module(f"{package.__name__}.callbacks").EarlyStopping(
        "validation_loss", patience=2
    )
    trainer = lightning_trainer(package, max_epochs=20, callbacks=[callback, stopper])
    trainer.fit(line_module(package), loader, loader)
    assert [row["epoch"] for row in callback.rows] == list(range(6)), "epochs 0 to 3, and the two of patience"
    assert [row["val_loss"] for row in callback.rows] == [4.0, 3.0, 2.0, 1.0, 2.0, 3.0]
    losses = [row["train_loss"] for row in callback.rows]
    assert losses == sorted(losses, reverse=True)
    assert len(pictures) >= 6
    words = live.headline
    assert "finished" in words
    assert "best 4 (val_loss 1)" in words
    assert "patience 2 of 2" in words
    trainer = lightning_trainer(package, max_epochs=-1, max_steps=4, callbacks=[callback])
    trainer.fit(line_module(package), loader, loader)
    assert live.columns.n_rows == 2, "a second training begins anew"
    assert "epoch 2 " in live.headline, "no number of epochs where there is none"


def test_a_lightning_training_that_fails_leaves_its_picture(package, loader, pictures):
    live = LivePlot(publish=pictures.append, every=1e9)
    module = line_module(package)

    def fail():
        if module.current_epoch == 2:
            raise RuntimeError("no more")

    module.on_train_epoch_start = fail
    with pytest.raises(RuntimeError, match="no more"):
        lightning_trainer(package, max_epochs=5, callbacks=[lightning_callback(live)]).fit(
            module, loader, loader
        )
    assert live.columns.n_rows == 2
    assert "failed" in live.headline


@pytest.mark.parametrize(("raised", "word"), [(KeyboardInterrupt(), "stopped"), (ValueError("x"), "failed")])
def test_an_end_by_hand_is_not_a_failure(raised, word):
    class Told:
        def update(self, rows, source):
            pass

        def finish(self, rows, source):
            self.status = source.status

    told = Told()
    lightning_callback(told).on_exception(object(), None, raised)
    assert told.status == word


@pytest.mark.slow
def test_an_scvi_training_is_shown(pictures):
    scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed (the extra 'benchmark')")
    adata = synthetic(n_contexts=1, n_perturbations=1, n_cells=60, n_genes=30, n_latent=4, seed=0)
    scvi.model.SCVI.setup_anndata(adata)
    live = LivePlot(publish=pictures.append, every=0.0, budget=1e9)
    callback = lightning_callback(live)
    model = scvi.model.SCVI(adata, n_hidden=8, n_latent=2)
    model.train(max_epochs=3, callbacks=[callback], accelerator="cpu", enable_progress_bar=False,
                check_val_every_n_epoch=1, batch_size=32)  # fmt: skip
    assert len(callback.rows) == 3
    known = model.history
    for ours, theirs in (("train_elbo", "elbo_train"), ("val_elbo", "elbo_validation")):
        expected = known[theirs].iloc[:, 0].astype(float).to_numpy()
        np.testing.assert_allclose([row[ours] for row in callback.rows], expected, rtol=1e-5)
    titles = [panel.title for panel in live._board_key[1:]]
    assert "elbo" in titles
    assert len(pictures) >= 3


# -- in a real kernel

_CELLS = """
import asyncio, sys, time
sys.path.insert(0, {folder!r})
from conftest import FakeTrainer
from cellop_nb.notebook.live import LivePlot
from cellop_nb.training.callbacks import Callback
live = LivePlot(every=0.0, budget=1e9)  # every epoch, however busy the machine
trainer = FakeTrainer(epochs=6, steps=1, pause=0.2, callbacks=[live])
---
trainer.fit()[-1]["epoch"]
---
trainer = FakeTrainer(epochs=6, steps=1, pause=0.2, callbacks=[live])
loop = asyncio.get_running_loop()
await asyncio.wait({{loop.run_in_executor(None, trainer.fit)}})
trainer.status
---
live.n_drawn
"""


def test_pictures_land_in_the_cell_that_trains(request):
    """One picture per training cell, replaced in place, from the main thread and from a worker."""
    text = _CELLS.format(folder=str(request.path.parent))
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(part.strip()) for part in text.split("---")]
    )
    NotebookClient(book, timeout=120, kernel_name="python3").execute()
    for cell, result in ((book.cells[1], "5"), (book.cells[2], "'finished'")):
        kinds = [output.output_type for output in cell.outputs]
        assert sorted(kinds) == ["display_data", "execute_result"], cell.outputs
        shown = next(output for output in cell.outputs if output.output_type == "display_data")
        assert set(shown.data) == {"image/png", "text/plain"}, "the words of the beginning are gone"
        assert next(o for o in cell.outputs if o.output_type == "execute_result").data["text/plain"] == result
    assert int(book.cells[3].outputs[0].data["text/plain"]) >= 3


def test_nbconvert_runs_the_cells_and_keeps_one_picture_with_words_for_each_training(request, tmp_path):
    text = _CELLS.format(folder=str(request.path.parent))
    cells = [nbformat.v4.new_code_cell(part.strip()) for part in text.split("---")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "live.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "live.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    outputs = [
        output
        for cell in nbformat.read(tmp_path / "live.nbconvert.ipynb", 4).cells
        for output in cell.outputs
    ]
    pictures = [output.metadata["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2 and all("training curves" in picture["alt"] for picture in pictures)
    assert {output.output_type for output in outputs} == {"display_data", "execute_result"}
