"""Figures: each draws, says what it shows, leaves no trace in global state, and survives odd labels."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import sparse

from benchmarks import figures as speed
from cellop_nb.errors import LabelError
from cellop_nb.notebook import figures
from cellop_nb.notebook.figures import sheet, style
from cellop_nb.notebook.figures.quick_png import palette, quick_png
from cellop_nb.notebook.sweep import Sweep

GROUPS = ["B, IFNb", "CD14+ Mono, IFNb", "_hidden, $odd_label$"]
rng = np.random.default_rng(0)


def _table(**columns) -> pd.DataFrame:
    return pd.DataFrame({"group": GROUPS, **columns})


def _long(name: str, values: list[str], **columns) -> pd.DataFrame:
    parts = [_table(**{name: value}, energy=rng.lognormal(size=3), floor=0.01) for value in values]
    return pd.concat(parts, ignore_index=True).assign(**columns)


def _history() -> list[dict]:
    return [
        {"epoch": i, "train_loss": 5 / (i + 1), "val_loss": 6 / (i + 1), "val_energy[B, IFNb]": 1 / (i + 1)}
        for i in range(5)
    ]


def _genes(column: str) -> pd.DataFrame:
    table = pd.DataFrame({"gene": [f"GENE{i}" for i in range(30)], "effect": rng.normal(size=30)})
    return table.assign(**{column: np.repeat([1, 2], 15)}, uncertainty=0.1)


def _clouds() -> dict[str, np.ndarray]:
    return {name: rng.normal(size=(50, 2)) for name in GROUPS}


def _alike(n: int = 5) -> pd.DataFrame:
    """Two families, and one condition without a response."""
    unit = rng.normal(size=(n, 3)) + 3 * np.eye(3)[np.arange(n) % 2]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    names = [*GROUPS, *(f"condition {k}" for k in range(n))][:n]
    table = pd.DataFrame(unit @ unit.T, index=names, columns=names)
    table.iloc[0], table.iloc[:, 0] = np.nan, np.nan
    return table


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
    "coverage": lambda: figures.coverage(
        pd.concat([_table(level=level, coverage=[0.3, 0.6, level]) for level in (0.5, 0.8, 0.95)])
    ),
    "condition_similarity": lambda: figures.condition_similarity(_alike()),
    "library_sizes": lambda: figures.library_sizes(rng.lognormal(7, 1, 90), GROUPS * 30),
    "group_counts": lambda: figures.group_counts(
        pd.DataFrame(
            {"context": ["B", "T", "T"], "perturbation": ["ctrl", "ctrl", "$x"], "cells": [5, 100, 3000]}
        )
    ),
    "noise_floor": lambda: figures.noise_floor(_table(energy=[9.0, 0.1, 0.0], floor=[-0.01, 0.02, 0.0])),
    "training_curves": lambda: figures.training_curves(_history(), floors={"B, IFNb": 0.1}, patience=3),
    "predictive_checks": lambda: figures.predictive_checks(sparse.csr_matrix(COUNTS), COUNTS[::-1]),
    "embedding": lambda: figures.embedding(
        rng.normal(size=(90, 2)), pd.DataFrame({"cell_type": GROUPS * 30, "depth": rng.lognormal(size=90)})
    ),
    "transport": lambda: figures.transport(_clouds(), _clouds(), _clouds(), notes={GROUPS[0]: "E = 0.1"}),
    "energy_bars": lambda: figures.energy_bars(_long("method", ["no change", "mean shift", "operator"])),
    "error_budget": lambda: figures.error_budget(_long("stage", ["noise floor", "operator", "no change"])),
    "predicted_vs_true": lambda: figures.predicted_vs_true(
        _genes("group").rename(columns={"effect": "true"}).assign(predicted=0.1, is_de=True)
    ),
    "spectra": lambda: figures.spectra(
        pd.DataFrame(
            {"condition": GROUPS * 2, "real": 1.0, "imag": 0.1, "singular_value": [1, 2, 1, 2, 1, 2]}
        ),
        limit=2,
    ),
    "response_axes": lambda: figures.response_axes(_genes("axis")),
    "response_genes": lambda: figures.response_genes(
        _genes("context").rename(columns={"effect": "lfc"}).assign(gene=[f"$G{i % 15}" for i in range(30)])
    ),
    "gradient_map": lambda: figures.gradient_map(
        pd.DataFrame(
            {"parameter": ["a.weight", "b.bias"], "reached": [1.0, 0.0], "grad_norm": [2.0, 0.0], "norm": 1.0}
        )
    ),
    "strength_curves": lambda: figures.strength_curves(
        pd.DataFrame(
            {"strength": [0, 1, 1.5] * 2, "energy": [0.0, 1, 2] * 2, "target": ["$x"] * 3 + ["_y"] * 3}
        ),
        _genes("group").assign(gene="$G", lfc=0.1, strength=1.0),
        floor=0.1,
    ),
    "planted_vs_learned": lambda: figures.planted_vs_learned({"$g_": np.eye(4)}, {"$g_": np.eye(4) + 0.1}),
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
    tools = {"canvas", "label", "legend", "png", "safe", "show"}
    of_speed = {
        name for name, value in vars(speed).items() if getattr(value, "__module__", "") == speed.__name__
    }
    of_speed = {name for name in of_speed if not name.startswith("_")}
    assert set(FIGURES) == {name for name in figures.__all__ if name.islower()} - tools | of_speed


def test_it_is_a_readable_white_picture(figure):
    picture = Image.open(io.BytesIO(figure._repr_png_())).convert("RGB")
    assert picture.width <= 800
    assert picture.getpixel((1, picture.height - 1)) == (255, 255, 255)
    assert len(picture.getcolors(1 << 24)) > 10, "something is drawn"


def test_drawing_leaves_global_state_alone():
    before = dict(mpl.rcParams)
    for name in ("noise_floor", "embedding", "training_curves"):
        figures.png(FIGURES[name]())
    assert dict(mpl.rcParams) == before


def test_a_dark_style_of_the_user_does_not_reach_it():
    with mpl.rc_context({"figure.facecolor": "black", "axes.facecolor": "black", "text.color": "white"}):
        fig = figures.noise_floor(_table(energy=[9.0, 0.1, 0.0], floor=0.01))
        picture = Image.open(io.BytesIO(figures.png(fig))).convert("RGB")
    assert picture.getpixel((1, 1)) == (255, 255, 255)
    assert {text.get_color() for text in fig.axes[0].get_yticklabels()} == {style.INK}


def test_labels_from_data_are_literal():
    fig = figures.energy_bars(_long("method", ["_a $x_1$ method"]))
    fig.canvas.draw()
    shown = [text for text in words(fig) if "x_1" in text]
    assert set(shown) == {r" _a \$x_1\$ method"}
    assert any("_hidden" in text for text in words(fig))
    assert style.safe("a\nb" + "c" * 50, 8) == "a bcccc…"


def test_axes_carry_units(figure):
    labelled = [ax for ax in figure.axes if ax.get_visible() and (ax.get_xlabel() or ax.get_ylabel())]
    assert labelled or "epoch" in words(figure)


def test_show_writes_and_returns_the_picture(tmp_path):
    fig = FIGURES["noise_floor"]()
    image = figures.show(fig, tmp_path / "figures" / "floor.png", alt="effect against floor")
    assert (tmp_path / "figures" / "floor.png").read_bytes() == image.data
    assert image._repr_mimebundle_()[1]["image/png"]["alt"] == "effect against floor"


@pytest.mark.parametrize("level", [1, 6])
def test_a_quick_png_is_what_was_drawn(level):
    """What we draw with exactly, any other colour as the nearest of the palette."""
    fixed = [*style.OKABE_ITO, style.INK, style.QUIET, "#ffffff"]
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


def test_a_picture_says_in_words_what_stands_in_it():
    fig = Figure()
    left, right = fig.subplots(1, 2)
    style.label(left, "Energy by group", x="distance", y="group\nof cells")
    right.plot([0, 1], label="operators")
    right.legend()
    fig.suptitle("Held out")
    words = figures.show(fig)._repr_mimebundle_()[1]["image/png"]["alt"]
    assert words == "Held out | Energy by group; x: distance; y: group of cells | operators"


def test_a_missing_column_is_named():
    with pytest.raises(LabelError, match=r"no column 'energy'.*did you mean 'Energy'"):
        figures.noise_floor(pd.DataFrame({"Energy": [1.0], "floor": [0.1]}))


def test_groups_without_cells_count_as_zero_and_are_framed():
    fig = FIGURES["group_counts"]()
    assert "0" in words(fig)
    assert len(fig.axes[0].patches) == 2, "5 cells, and none"
    assert "2 with fewer than 10" in fig.axes[0].get_title(loc="left")


def test_no_category_is_told_by_colour_alone():
    marks = [tuple(style.mark(i).values()) for i in range(56)]
    assert len(set(marks)) == 56
    neighbours = [style.mark(i)["marker"] != style.mark(i + 1)["marker"] for i in range(20)]
    assert all(neighbours)
    bars = FIGURES["energy_bars"]().axes[0]
    assert len({container[0].get_hatch() for container in bars.containers}) == 3


def test_thin_lines_keep_their_colour_in_the_palette():
    fig, (ax,) = style.canvas(height=2)
    for i, colour in enumerate(style.OKABE_ITO):
        ax.axvline(i, color=colour, linewidth=3)
    shown = {colour for _, colour in Image.open(io.BytesIO(style.png(fig))).convert("RGB").getcolors(1 << 20)}
    for code in style.OKABE_ITO:
        wanted = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)])
        assert min(np.abs(np.array(colour) - wanted).max() for colour in shown) <= 2, code


def test_predictive_checks_agree_for_sparse_and_dense():
    one = figures.predictive_checks(sparse.csr_matrix(COUNTS), COUNTS)
    two = figures.predictive_checks(COUNTS, sparse.csc_matrix(COUNTS))
    for first, second in zip(one.axes[1].lines[:2], two.axes[1].lines[:2], strict=True):
        np.testing.assert_allclose(first.get_xydata(), second.get_xydata())
    np.testing.assert_allclose(one.axes[1].lines[0].get_ydata(), COUNTS.var(axis=0)[COUNTS.any(axis=0)])


@pytest.mark.parametrize(
    ("values", "scale"),
    [([1.0, 2.0], "linear"), ([0.01, 5.0], "log"), ([-0.01, 5.0], "symlog"), ([0.0, 0.0], "linear")],
)
def test_scales_follow_the_values(values, scale):
    found, low, high = sheet.scale_for(min(values), max(values), True)
    assert found == scale
    assert low <= min(values) <= max(values) <= high


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


def test_a_live_frame_equals_a_fresh_drawing(vae_rows):
    from cellop_nb.notebook.figures.dashboard import Dashboard, Marks
    from cellop_nb.notebook.figures.panels import Columns, pick_panels

    columns = Columns()
    columns.extend(vae_rows(5))
    kept = Dashboard(pick_panels(columns.names()))
    for n in (5, 12, 30):
        columns.extend(vae_rows(n))
        kept.update(columns, Marks(f"{n} epochs", best_epoch=2))
        picture = kept.png()
    fresh = Dashboard(pick_panels(columns.names()))
    fresh.update(columns, Marks("30 epochs", best_epoch=2))
    assert fresh.png() == picture


def test_a_frozen_parameter_is_not_shown_as_a_fault():
    table = pd.DataFrame({"parameter": ["a", "b"], "reached": 0.0, "grad_norm": 0.0, "norm": 1.0})
    shown = words(figures.gradient_map(table.assign(status=["frozen", "not reached"])))
    assert shown.count("frozen") == 1 and shown.count("no gradient") == 1


def test_ranks_stand_in_the_cells_of_the_genes_that_lead():
    table = pd.DataFrame({"group": "g", "gene": list("abcd"), "lfc": [0.1, -3.0, 2.0, 0.0]})
    shown = words(figures.response_genes(table, n_top=3, n_named=2))
    assert [shown.count(rank) for rank in "123"] == [1, 1, 0] and "d" not in shown


def test_similar_conditions_stand_together_and_silent_ones_last():
    table = _alike(7).iloc[1:, 1:]
    ax = figures.condition_similarity(table).axes[1]
    rows = [text.get_text() for text in ax.get_yticklabels()]
    family = [list(map(style.safe, table.index)).index(name) % 2 for name in rows]
    assert family in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    silent = figures.condition_similarity(_alike()).axes[1].get_yticklabels()[-1].get_text()
    assert silent == GROUPS[0]
    with pytest.raises(LabelError, match="rows and columns"):
        figures.condition_similarity(table.iloc[1:])
