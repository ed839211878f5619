"""Which panels a history has, and where what was changed by hand is marked in them."""

from __future__ import annotations

import numpy as np
import pytest

from cellop_nb.notebook.figures import changes
from cellop_nb.notebook.figures.panels import Columns, pick_panels
from cellop_nb.notebook.live import LivePlot
from cellop_nb.training.callbacks import Callback


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
    found = titles(operator_rows(3, ["B, IFNb", "T, IFNb"]))
    assert "largest operator norm" in found
    assert found[-1] == "energy distance per group (validation)"


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
    curves = live._board.views[0]
    at = curves.plot.x([3.5, 15.0])
    np.testing.assert_allclose(curves.hand.get_xdata(), at)
    assert [text.get_text() for text in curves.named if text.get_text()] == [
        "learning rate 0.004",
        "kl weight 0.5",
    ]
    assert [round(text.get_position()[0]) for text in curves.named[:2]] == at.round().tolist()
    assert live._board._hand[1].get_text() == "changed by hand"
    assert all(len(view.hand.get_xdata()) == 2 for view in live._board.views), "every panel has the ticks"


def test_without_changes_nothing_is_said_of_them(fake_trainer, pictures):
    live = LivePlot(publish=pictures.append)
    fake_trainer(epochs=3, callbacks=[live]).fit()
    assert live._board._hand[1].get_text() == ""
    assert not any(text.get_text() for text in live._board.views[0].named)


def test_a_history_tells_its_changes_too():
    rows = [
        {"epoch": 0},
        {"epoch": 1, "by_hand": "lr 0.01 after step 12; kl_weight 0.5 after step 19"},
        {"epoch": 2},
    ]
    found = changes.of_history(rows)
    assert [(change.at, change.words) for change in found] == [(1.5, "lr 0.01"), (1.5, "kl weight 0.5")]


def test_quick_presses_are_one_change():
    pressed = [changes.Change(at, name, value) for at, name, value in
               [(1.0, "lr", 0.1), (1.2, "lr", 0.2), (1.4, "lr", 0.3), (3.0, "lr", 0.4), (3.1, "kl", 1.0)]]  # fmt: skip
    assert [change.value for change in changes.joined(pressed)] == [0.3, 0.4, 1.0]


def test_the_axis_counts_epochs_as_the_headline_does(vae_rows, pictures):
    live, rows = LivePlot(publish=pictures.append), vae_rows(30)
    live.finish(rows)
    best = 1 + int(np.argmin([row["val_loss"] for row in rows]))
    curves = live._board.views[0]
    assert f"best {best} (val_loss" in live._board._headline.get_text()
    assert curves.best.get_xdata()[0] == pytest.approx(float(curves.plot.x(best)))
    assert curves.lines["train_loss"].get_xdata()[-1] == pytest.approx(float(curves.plot.x(30)))
