"""The public figures: each draws, says what it shows, leaves no trace in global state, and survives odd labels."""

from __future__ import annotations

import base64
import inspect
import io
import logging

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import sparse

import cellop_nb as co
from cellop_nb.errors import LabelError
from cellop_nb.notebook import style

GROUPS = ["B, IFNb", "CD14+ Mono, IFNb", "_hidden, $odd_label$", "細胞 T, αβ " + "very long " * 30]
MANY = [f"type {i % 5}, drug {i}" for i in range(300)]
METHODS = ["no change", "mean shift", "near mean shift", "operator"]
STAGES = ["noise floor", "operator", "no change"]
rng = np.random.default_rng(0)
COUNTS = rng.poisson(1.0, (60, 40))


def by_group(groups: list[str], column: str, values: list[str]) -> pd.DataFrame:
    """Energies of each group in each of `values`, the groups from weak to strong."""
    rows = [(group, value, 0.01 + i, 0.01) for i, group in enumerate(groups) for value in values]
    return pd.DataFrame(rows, columns=["group", column, "energy", "floor"])


def of_genes(groups: list[str], effect: str = "true", n: int = 12) -> pd.DataFrame:
    table = pd.DataFrame(
        {"group": np.repeat(groups, n), "gene": [f"GENE{i}" for i in range(n)] * len(groups)}
    )
    table[effect] = np.tile(np.linspace(-1, 1, n), len(groups)) * np.repeat(np.arange(len(groups)) + 1, n)
    return table.assign(predicted=table[effect] * 0.8, is_de=True, low=-0.1, high=0.1, uncertainty=0.1)


def clouds(groups: list[str], by: float = 0.0) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)  # the same of each cloud, so that groups differ by the shift alone
    return {name: draws.normal(size=(30, 2)) + by * i for i, name in enumerate(groups)}


def cells(groups: list[str]) -> ad.AnnData:
    n = max(90, 2 * len(groups))
    obs = pd.DataFrame({"kind": [groups[i % len(groups)] for i in range(n)], "depth": rng.lognormal(size=n)})
    obs.index = obs.index.astype(str)
    return ad.AnnData(np.zeros((n, 1)), obs, obsm={"X_umap": rng.normal(size=(n, 2))})


def eigenvalues(groups: list[str]) -> pd.DataFrame:
    names = np.repeat(groups, 2)
    sizes = rng.lognormal(sigma=0.2, size=len(names))
    return pd.DataFrame({"condition": names, "real": 1.0, "imag": 0.1, "singular_value": sizes})


def audit(groups: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"parameter": groups, "reached": 1.0, "grad_norm": 2.0, "norm": 1.0})


def strengths(groups: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    table = pd.DataFrame(
        {"strength": [0, 1, 1.5] * 2, "energy": [0.0, 1, 2] * 2, "target": ["$x"] * 3 + ["_y"] * 3}
    )
    return table, of_genes(groups, "lfc", 3).assign(gene=lambda t: t["group"], strength=1.0)


def effects_of(groups: list[str]) -> pd.DataFrame:
    sizes, strength = rng.integers(10, 400, len(groups)), np.linspace(3, 0, len(groups))
    table = {"group": groups, "n_perturbed": sizes, "e_distance": strength, "detectable": 20 / sizes}
    return pd.DataFrame(table).assign(different=strength > 20 / sizes)


# each figure of any number of groups
FIGURES = {
    "library_sizes": lambda groups: co.pl.library_sizes(rng.lognormal(7, 1, 12 * len(groups)), groups * 12),
    "group_counts": lambda groups: co.pl.group_counts(
        pd.DataFrame({"context": "B", "perturbation": groups, "cells": np.arange(len(groups))})
    ),
    "noise_floor": lambda groups: co.pl.noise_floor(by_group(groups, "method", ["operator"])),
    "predictive_checks": lambda groups: co.pl.predictive_checks(sparse.csr_matrix(COUNTS), COUNTS[::-1]),
    "embedding": lambda groups: co.pl.embedding(cells(groups), ["kind", "depth"]),
    "transport": lambda groups: co.pl.transport(
        clouds(groups), clouds(groups, 0.1), clouds(groups, 0.1), notes={groups[0]: "E = 0.1"}
    ),
    "energy_bars": lambda groups: co.pl.energy_bars(by_group(groups, "method", METHODS)),
    "error_budget": lambda groups: co.pl.error_budget(by_group(groups, "stage", STAGES)),
    "predicted_vs_true": lambda groups: co.pl.predicted_vs_true(of_genes(groups)),
    "spectra": lambda groups: co.pl.spectra(eigenvalues(groups), limit=2),
    "response_axes": lambda groups: co.pl.response_axes(
        of_genes(groups, "effect").rename(columns={"group": "axis"})
    ),
    "response_genes": lambda groups: co.pl.response_genes(of_genes(groups, "lfc")),
    "screen_effects": lambda groups: co.pl.screen_effects(effects_of(groups)),
    "gradient_map": lambda groups: co.pl.gradient_map(audit(groups)),
    "shapes": lambda groups: co.pl.shapes(
        {name: rng.normal(size=(2 * len(groups), 2)) for name in ("real", "$odd_")},
        dict.fromkeys(("real", "$odd_"), groups * 2),
        notes={"real": "centred E 0.1"},
    ),
    "strength_curves": lambda groups: co.pl.strength_curves(*strengths(groups), floor=0.1),
}
SINGLE = [name for name in FIGURES if "ax" in inspect.signature(getattr(co.pl, name)).parameters]


@pytest.fixture(params=FIGURES, ids=str)
def figure(request) -> Figure:
    return figure_of(FIGURES[request.param](GROUPS))


def figure_of(drawn) -> Figure:
    return drawn if isinstance(drawn, Figure) else drawn.figure


def picture_of(drawn) -> Image.Image:
    data, _ = drawn._repr_mimebundle_()
    return Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def nothing_is_cut(figure: Figure) -> bool:
    """Whether all that is drawn lies within the picture."""
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02


# -- every figure


def test_every_public_figure_is_tried_here():
    assert {*FIGURES, "training_curves"} == set(co.pl.__all__), (
        "those of a training are tried with the live picture"
    )


@pytest.mark.filterwarnings("error")
def test_it_is_a_readable_white_picture_at_twice_its_size(figure, caplog):
    with caplog.at_level(logging.WARNING):
        data, about = figure._repr_mimebundle_()
    assert not caplog.records, "letters of all scripts are drawn"
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    assert picture.width <= 1600
    assert about["image/png"]["width"] == pytest.approx(picture.width / 2, abs=1)
    assert len(data["image/png"]) < 300_000, "a notebook keeps it"
    assert picture.getpixel((1, picture.height - 1)) == (255, 255, 255)
    assert len(picture.getcolors(1 << 24)) > 10, "something is drawn"
    labelled = [ax for ax in figure.axes if ax.get_visible() and (ax.get_xlabel() or ax.get_ylabel())]
    assert labelled or figure.get_supxlabel(), "units"
    assert nothing_is_cut(figure)


@pytest.mark.parametrize("name", FIGURES)
def test_three_hundred_groups_are_summarised(name):
    """The picture stays small and readable: few names, and where groups are named, the strongest and the weakest."""
    drawn = FIGURES[name](MANY)
    figure = figure_of(drawn)
    assert figure.get_figheight() <= 13
    shown = {text for text in words(figure) if text in MANY}
    assert len(shown) <= 42
    if name in {
        "noise_floor",
        "energy_bars",
        "error_budget",
        "response_genes",
        "transport",
        "predicted_vs_true",
    }:
        assert {MANY[0], MANY[-1]} <= shown
    if name in {"noise_floor", "energy_bars", "error_budget", "response_genes", "group_counts"}:
        assert any("others (median)" in text for text in words(figure))
    assert nothing_is_cut(figure)


@pytest.mark.parametrize("name", SINGLE)
def test_it_draws_into_the_users_axes_and_returns_them(name):
    mine = Figure(figsize=(7, 5), layout="constrained").subplots()
    calls = inspect.getclosurevars(FIGURES[name]).globals["co"].pl
    original = getattr(calls, name)
    assert isinstance(FIGURES[name](GROUPS), Axes)
    try:
        setattr(calls, name, lambda *args, **named: original(*args, ax=mine, **named))
        assert FIGURES[name](GROUPS) is mine
    finally:
        setattr(calls, name, original)
    assert mine.get_title(loc="left")


@pytest.mark.parametrize("name", co.pl.__all__)
def test_arguments_and_result_are_those_of_the_family(name):
    """`show` and `save` everywhere; one panel takes `ax` and is Axes, several are a Figure, and the help says so."""
    signature = inspect.signature(getattr(co.pl, name))
    assert sum(p.kind is not p.KEYWORD_ONLY for p in signature.parameters.values()) <= 3
    assert list(signature.parameters)[-2:] == ["show", "save"]
    returns = {True: "Axes", False: "Figure"}["ax" in signature.parameters]
    assert signature.return_annotation == returns
    text = inspect.getdoc(getattr(co.pl, name))
    assert text.count("Returns\n-------\n") == 1
    assert ("of several panels" in text) == (returns == "Figure")


def test_a_figure_is_saved_as_vectors_or_pixels(tmp_path):
    table = by_group(GROUPS, "method", METHODS)
    for suffix, start in (("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")):
        path = tmp_path / "new" / f"bars.{suffix}"
        ax = co.pl.energy_bars(table, save=path)
        assert path.read_bytes().startswith(start)
    assert Image.open(path).width == 2 * round(ax.figure.get_figwidth() * 96)


def test_a_figure_is_shown_at_once_where_it_is_asked_for(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    table = by_group(GROUPS, "method", METHODS)
    assert isinstance(co.pl.energy_bars(table), Axes) and not shown
    assert co.pl.energy_bars(table, show=True) is None and len(shown) == 1


def test_drawing_leaves_global_state_alone():
    before = dict(mpl.rcParams)
    for name in ("noise_floor", "embedding"):
        picture_of(FIGURES[name](GROUPS))
    assert dict(mpl.rcParams) == before


def test_a_dark_style_of_the_user_does_not_reach_it():
    with mpl.rc_context({"figure.facecolor": "black", "axes.facecolor": "black", "text.color": "white"}):
        ax = FIGURES["noise_floor"](GROUPS)
        picture = picture_of(ax)
    assert picture.getpixel((1, 1)) == (255, 255, 255)
    assert {text.get_color() for text in ax.get_yticklabels()} == {style.INK}


# -- labels, colours and words


def test_labels_from_data_are_literal_and_short():
    ax = co.pl.energy_bars(by_group(GROUPS, "method", ["_a $x_1$ method"]))
    ax.figure.canvas.draw()
    assert {text for text in words(ax.figure) if "x_1" in text} == {r" _a \$x_1\$ method"}
    assert any("_hidden" in text for text in words(ax.figure))
    assert style.safe("a\nb" + "c" * 50, 8) == "a bcccc…"
    assert style.short("細胞細胞細胞", 8) == "細胞細…", "such a letter is as wide as two"
    assert style.safe("a\x00b\u202ec") == "a b c", "no control characters"


def test_a_colour_means_the_same_everywhere():
    looks = style.of_method(
        ["no change", "mean shift", "operator", "measured cells", "of my own", "noise floor"]
    )
    colours = [look["color"] for look in looks.values()]
    assert colours[:4] == [style.CONTROL, style.GREEN, style.PREDICTED, style.REAL]
    assert len(set(colours)) == 6
    assert style.of_method(["operator, lent", "mean shift"])["mean shift"]["color"] == colours[1]
    bars = FIGURES["energy_bars"](GROUPS).containers
    assert [mpl.colors.to_hex(bar[0].get_facecolor()).upper() for bar in bars[:1]] == [style.CONTROL.upper()]


def test_no_category_is_told_by_colour_alone():
    marks = [tuple(style.mark(i).values()) for i in range(56)]
    assert len(set(marks)) == 56
    assert all(style.mark(i)["marker"] != style.mark(i + 1)["marker"] for i in range(20))
    looks = style.of_method(["operator", "operator, lent", "operator, own"]).values()
    assert len({look["hatch"] for look in looks}) == len({look["marker"] for look in looks}) == 3
    bars = FIGURES["energy_bars"](GROUPS).containers
    assert len({container[0].get_hatch() for container in bars}) == len(METHODS)


def test_thin_lines_keep_their_colour_in_the_palette():
    fig, (ax,) = style.canvas(height=2)
    for i, colour in enumerate(style.CATEGORIES):
        ax.axvline(i, color=colour, linewidth=3)
    shown = {colour for _, colour in picture_of(fig).getcolors(1 << 20)}
    for code in style.CATEGORIES:
        expected = np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)])
        assert min(np.abs(np.array(colour) - expected).max() for colour in shown) <= 2, code


def test_a_picture_says_in_words_what_stands_in_it():
    fig = Figure()
    left, right = fig.subplots(1, 2)
    style.label(left, "Energy by group", x="distance", y="group\nof cells")
    right.plot([0, 1], label=style.safe("$operators"))
    right.legend()
    fig.suptitle("Held out")
    fig.supxlabel("axis 1")
    alt = "Held out | Energy by group; x: distance; y: group of cells | $operators | x: axis 1"
    assert style.described(fig) == alt


@pytest.mark.parametrize(("low", "high"), [(90, 210), (2.6, 3.4), (1e-9, 1e9), (0.5, 40)])
def test_a_logarithmic_axis_has_a_few_ticks(low, high):
    ticks = style.decades(low, high, 6)
    assert 2 <= len(ticks) <= 6
    assert low <= ticks.min() < ticks.max() <= high


# -- what single figures show


def test_a_missing_column_is_named():
    with pytest.raises(LabelError, match=r"no column 'energy'.*did you mean 'Energy'"):
        co.pl.noise_floor(pd.DataFrame({"Energy": [1.0], "floor": [0.1]}))


def test_groups_without_cells_count_as_zero_and_are_framed():
    table = {"context": ["B", "T", "T"], "perturbation": ["ctrl", "ctrl", "$x"], "cells": [5, 100, 3000]}
    ax = co.pl.group_counts(pd.DataFrame(table))
    assert "0" in words(ax.figure)
    assert len(ax.patches) == 2, "5 cells, and none"
    assert "fewer than 10 (2 of 4" in ax.get_title(loc="left")


def test_the_others_are_their_median():
    ax = co.pl.noise_floor(by_group(MANY, "method", ["operator"]), max_groups=9)
    rows = [text.get_text() for text in ax.get_yticklabels()]
    assert rows[0] == MANY[-1] and rows[-1] == MANY[0]
    others = rows.index("292 others (median)")
    effects = next(line for line in ax.lines if "effect" in line.get_label()).get_xdata()
    assert effects[others] == pytest.approx(0.01 + np.median(np.arange(3, 295)))


def test_predictive_checks_agree_for_sparse_and_dense():
    one = co.pl.predictive_checks(sparse.csr_matrix(COUNTS), COUNTS)
    two = co.pl.predictive_checks(COUNTS, sparse.csc_matrix(COUNTS))
    for first, second in zip(one.axes[1].lines[:2], two.axes[1].lines[:2], strict=True):
        np.testing.assert_allclose(first.get_xydata(), second.get_xydata())
    variances = np.sort(one.axes[1].lines[0].get_ydata())
    np.testing.assert_allclose(variances, np.sort(COUNTS.var(axis=0)[COUNTS.any(axis=0)]))


def test_a_frozen_parameter_is_not_shown_as_a_fault():
    table = pd.DataFrame({"parameter": ["a", "b"], "reached": 0.0, "grad_norm": 0.0, "norm": 1.0})
    shown = words(co.pl.gradient_map(table.assign(status=["frozen", "not reached"])))
    assert shown.count("frozen") == 1 and shown.count("no gradient") == 1


def test_ranks_stand_in_the_cells_of_the_genes_that_lead():
    table = pd.DataFrame({"group": "g", "gene": list("abcd"), "lfc": [0.1, -3.0, 2.0, 0.0]})
    shown = words(co.pl.response_genes(table, n_top=3, n_named=2).figure)
    assert [shown.count(rank) for rank in "123"] == [1, 1, 0] and "d" not in shown
