"""The live picture: right panels, within its budget, last picture always, from any thread."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from cellop_nb.notebook import live as module
from cellop_nb.notebook.live import LivePlot


def size(picture: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture)).size


# -- when to draw


def _run(live: LivePlot, trainer, clock, *, epoch_seconds: float, cost: float) -> float:
    """A training on a clock by hand, where each drawing takes `cost`; its length in seconds."""

    def draw(source, rows, last):
        clock.now += cost
        live.columns.extend(rows)
        live._publish(b"picture")
        return len(rows) == 1

    live._render = draw
    live.on_fit_start(trainer)
    for epoch in range(trainer.max_epochs):
        clock.now += epoch_seconds
        trainer.rows.append(trainer.row(epoch))
        live.on_step_end(trainer)
        live.on_epoch_end(trainer, trainer.rows[-1])
    live.on_fit_end(trainer)
    return clock.now


@pytest.mark.parametrize("cost", [0.01, 0.05])
def test_drawing_stays_within_two_percent(fake_trainer, clock, pictures, cost):
    live = LivePlot(clock=clock, publish=pictures.append)
    seconds = _run(live, fake_trainer(epochs=300), clock, epoch_seconds=0.1, cost=cost)
    assert live.n_drawn > 3
    assert live.cost_seconds == pytest.approx(cost * live.n_drawn)
    assert live.cost_seconds / seconds <= 0.02
    assert live.share == pytest.approx(live.cost_seconds / seconds, rel=0.05)


def test_never_more_often_than_every(fake_trainer, clock, pictures):
    live = LivePlot(clock=clock, publish=pictures.append, every=1.0)
    _run(live, fake_trainer(epochs=50), clock, epoch_seconds=0.1, cost=0.0)
    assert live.n_drawn <= 1 + 5 + 1


def test_last_epoch_is_drawn_however_short_the_run(fake_trainer, clock, pictures):
    live = LivePlot(clock=clock, publish=pictures.append)
    _run(live, fake_trainer(epochs=40), clock, epoch_seconds=0.001, cost=0.01)
    assert live.n_drawn == 1, "two pictures would be more than a fiftieth of this run"
    assert live.columns.n_rows == 40, "the last picture shows every epoch"
    assert live.picture == pictures[-1]


def test_a_run_that_can_afford_it_is_drawn_from_the_first_epoch(fake_trainer, clock):
    at = []
    live = LivePlot(clock=clock, publish=lambda _: at.append(live.columns.n_rows))
    _run(live, fake_trainer(epochs=40), clock, epoch_seconds=1.0, cost=0.01)
    assert 1 in at


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
    words = live._board._headline.get_text()
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
    assert size(live.path.read_bytes())[0] == 768
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
    live = LivePlot(publish=pictures.append)
    live.update(rows, source=type("Source", (), {"floors": {groups[1]: 0.02}})())
    assert size(live.picture)[1] > 400


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
    assert all(size(picture)[0] == 768 for picture in pictures)


def test_a_second_fit_begins_anew(fake_trainer, pictures):
    live, trainer = LivePlot(publish=pictures.append), fake_trainer(epochs=2)
    trainer.callbacks.append(live)
    trainer.fit()
    trainer.max_epochs = 4
    trainer.fit()
    assert live.columns.n_rows == 4


def test_pyplot_is_not_imported():
    modules = "sys, cellop_nb.notebook.live, cellop_nb.notebook.controls, cellop_nb.notebook.figures"
    code = f"import {modules}; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- other trainings


def test_standalone_rows(vae_rows, pictures):
    live, rows = LivePlot(publish=pictures.append), []
    for row in vae_rows(5):
        rows.append(row)
        live.update(rows)
    live.finish(rows)
    assert live.columns.n_rows == 5
    assert len(pictures) >= 2


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
        assert set(shown.data) == {"image/png", "text/plain"}
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


def test_on_a_busy_machine_a_short_run_gets_one_picture(fake_trainer, clock, pictures, monkeypatch):
    """What the line before the first epoch took tells how long a picture will take just now."""
    text = module.Sheet.png

    def slow(sheet, **options):
        clock.now += 0.1
        return text(sheet, **options)

    counts = {}
    for name, draw in (("idle", text), ("busy", slow)):
        monkeypatch.setattr(module.Sheet, "png", draw)
        live = LivePlot(clock=clock, publish=pictures.append)
        _run(live, fake_trainer(epochs=30), clock, epoch_seconds=1.0, cost=0.01)
        counts[name] = live.n_drawn
    assert counts["busy"] < counts["idle"]
