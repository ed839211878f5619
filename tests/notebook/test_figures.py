"""Figures: each draws, says what it shows, leaves no trace in global state, and survives odd labels."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import figures as speed
from cellop_nb.notebook import figures, style
from cellop_nb.notebook.figures import sheet
from cellop_nb.notebook.figures.quick_png import palette, quick_png
from cellop_nb.notebook.sweep import Sweep

GROUPS = ["B, IFNb", "CD14+ Mono, IFNb", "_hidden, $odd_label$"]
rng = np.random.default_rng(0)


def _table(**columns) -> pd.DataFrame:
    return pd.DataFrame({"group": GROUPS, **columns})


def _runs() -> pd.DataFrame:
    """A sweep of three parameters, one of them words."""
    table = pd.DataFrame([(w, r, k) for w in (8, 16) for r in (1e-3, 1e-1) for k in GROUPS])
    table.columns = ["width", "rate", "kind"]
    return table.assign(status="done", loss=rng.lognormal(size=len(table)))


COUNTS = rng.poisson(1.0, (60, 40))
FIGURES = {
    "sweep_map": lambda: figures.sweep_map(_runs(), ["width", "rate"], "loss"),
    "sweep_effects": lambda: figures.sweep_effects(
        Sweep(_runs(), ["width", "rate", "kind"], "loss").effects(), "loss"
    ),
    "parallel_coordinates": lambda: figures.parallel_coordinates(_runs(), ["width", "rate", "kind"], "loss"),
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
    assert set(FIGURES) == set(figures.__all__) | of_speed


def test_it_is_a_readable_white_picture(figure):
    picture = Image.open(io.BytesIO(style.png(figure, dpi=96))).convert("RGB")
    assert picture.width <= 800
    assert picture.getpixel((1, picture.height - 1)) == (255, 255, 255)
    assert len(picture.getcolors(1 << 24)) > 10, "something is drawn"


@pytest.mark.parametrize("level", [1, 6])
def test_a_quick_png_is_what_was_drawn(level):
    """What we draw with exactly, any other colour as the nearest of the palette."""
    fixed = [*style.CATEGORIES, style.INK, style.QUIET, "#ffffff"]
    exact = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in fixed], dtype=np.uint8)
    np.testing.assert_array_equal(_read_back(exact[None], level), exact[None])
    other = np.random.default_rng(1).integers(
        0, 256, (70, 5, 3), dtype=np.uint8
    )  # more than one block of rows
    nearest = np.linalg.norm(other.reshape(-1, 1, 3) - palette().astype(float), axis=-1).min(1)
    chosen = np.linalg.norm((_read_back(other, level) - other.astype(int)).reshape(-1, 3), axis=-1)
    assert (chosen <= nearest + 2 * 7).all(), "five bits tell a colour to 4 of 255 in each of three"


def _read_back(pixels: np.ndarray, level: int) -> np.ndarray:
    opaque = np.concatenate([pixels, np.full((*pixels.shape[:2], 1), 255, dtype=np.uint8)], axis=-1)
    written = quick_png(opaque, level)
    Image.open(io.BytesIO(written)).verify()  # the checksums
    read = Image.open(io.BytesIO(written))
    assert read.mode == "P" and read.size == pixels.shape[1::-1]
    return np.asarray(read.convert("RGB")).astype(int)


def test_figures_of_speed_name_their_bound_and_compare_what_took_turns():
    for name in ("energy_scaling", "cells_scaling", "training_rates", "gpu_times"):
        legends = [ax.get_legend() for ax in FIGURES[name]().axes if ax.get_legend()]
        assert any("bound" in text.get_text() for found in legends for text in found.get_texts()), name
    shown = [tick.get_text() for tick in FIGURES["step_times"]().axes[0].get_yticklabels()]
    assert len(shown) == 2 and not any("apart" in name for name in shown)


def test_a_value_lies_where_its_tick_says():
    board = sheet.Sheet(300, 200)
    plot = sheet.Plot(board, (50, 20, 200, 100), "loss")
    plot.limit(np.arange(10.0), np.array([0.01, 1.0]))
    pixels = plot.y([0.01, 0.1, 1.0])
    assert np.diff(pixels)[0] == pytest.approx(np.diff(pixels)[1]), "decades are equally long"
    assert (np.diff(pixels) < 0).all(), "larger is higher"
    assert pixels.min() >= 20
    assert pixels.max() <= 120
    for text in plot._y_texts:
        if text.get_text():
            assert text.get_position()[1] == pytest.approx(float(plot.y(float(text.get_text()))))
