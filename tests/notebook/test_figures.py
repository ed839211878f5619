"""Figures of the benchmarks: each draws, says what it shows, leaves no trace in global state, and survives odd labels."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import figures as speed
from cellop_nb.notebook import style

FIGURES = {
    "energy_scaling": lambda: speed.energy_scaling(
        [
            {"variant": name, "n": n, "cpu_seconds": n**2 * 1e-8, "extra_mb": n / 10, "bound_seconds": bound}
            for name, bound in (("ours", 1e-4), ("$peer", None))
            for n in (200, 1000)
        ]
    ),
    "training_rates": lambda: speed.training_rates(
        [
            {
                "variant": name,
                "hidden": h,
                "batch": 128,
                "cells_per_cpu_s": rate,
                "bound_cells_per_cpu_s": bound,
            }
            for h in (128, 512)
            for name, rate, bound in (("ours", 9e3, 3e4), ("$peer", 3e3, None))
        ]
    ),
    "gpu_times": lambda: speed.gpu_times(
        [
            {
                "what": what,
                "variant": name,
                "seconds": s,
                "busy_seconds": 0.001,
                "bound_seconds": 1e-4,
                "gain": 0.01 / s,
            }
            | sizes
            for what, sizes in (
                ("VAE step", {"hidden": 128, "batch": 512}),
                ("operator step", {"groups": 16, "n": 128}),
            )
            for name, s in (("call by call", 0.01), ("recorded", 0.0012))
        ]
    ),
    "step_times": lambda: speed.step_times(
        [
            {"variant": name, "what": "step", "cpu_seconds": time, "bound_seconds": time / 3}
            for name, time in (("before", 0.2), ("$ours", 0.003))
        ]
        + [{"variant": "$ours, apart", "what": "step", "cpu_seconds": 0.004, "note": "in a run of its own"}]
    ),
    "cells_scaling": lambda: speed.cells_scaling(
        [
            {
                "variant": name,
                "stage": "train",
                "file": "h5ad",
                "cells": n,
                "cells_per_cpu_s": 5e3,
                "extra_mb": 90 + n / 1e4,
            }
            | ({"bound_seconds": n / 9e3, "bound": "training in memory"} if name == "ours" else {})
            for name in ("ours", "$peer")
            for n in (10_000, 100_000)
        ]
        + [
            {
                "variant": "ours",
                "stage": "train",
                "file": "h5ad",
                "time_exponent": 0.98,
                "bytes_per_cell": 300.0,
            }
        ]
    ),
    "peers": lambda: speed.peers(
        pd.DataFrame(
            {
                "context": "$held",
                "method": ["$peer", "ours", "no change"],
                "energy": [1.0, 0.5, 8.0],
                "fit_cpu_seconds": [80.0, 30.0, 0.1],
                "predict_cpu_seconds": [1.0, 0.2, 0.0],
            }
        )
    ),
    "stage_times": lambda: speed.stage_times(
        [{"what": "VAE", "stage_seconds": 20.0, "data": "$kang"}, {"what": "predict", "stage_seconds": 1.5}]
    ),
}


@pytest.fixture(params=FIGURES, ids=str)
def figure(request) -> Figure:
    return FIGURES[request.param]()


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_every_public_figure_is_tried_here():
    of_speed = {
        name for name, value in vars(speed).items() if getattr(value, "__module__", "") == speed.__name__
    }
    of_speed = {name for name in of_speed if not name.startswith("_")}
    assert set(FIGURES) == of_speed


def test_it_is_a_readable_white_picture(figure):
    picture = Image.open(io.BytesIO(style.png(figure, dpi=96))).convert("RGB")
    assert picture.width <= 800
    assert picture.getpixel((1, picture.height - 1)) == (255, 255, 255)
    assert len(picture.getcolors(1 << 24)) > 10, "something is drawn"


def test_figures_of_speed_name_their_bound_and_compare_what_took_turns():
    for name in ("energy_scaling", "cells_scaling", "training_rates", "gpu_times"):
        legends = [ax.get_legend() for ax in FIGURES[name]().axes if ax.get_legend()]
        assert any("bound" in text.get_text() for found in legends for text in found.get_texts()), name
    shown = [tick.get_text() for tick in FIGURES["step_times"]().axes[0].get_yticklabels()]
    assert len(shown) == 2 and not any("apart" in name for name in shown)


def test_a_letter_that_no_font_has_is_a_number_and_said_once(caplog):
    """Boxes would make labels alike. None of the fonts that we look for has Elymaic letters."""
    style._say_missing.cache_clear()
    assert [style.safe(f"drug {letter} \u03b2") for letter in ("\U00010fe0", "x")] == [
        "drug U+10FE0 \u03b2",
        "drug x \u03b2",
    ]
    assert "a font for every letter" in caplog.text and len(caplog.records) == 1
    style.safe("\U00010fe0")
    assert len(caplog.records) == 1
