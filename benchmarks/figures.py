"""Figures of a benchmark's record: times and rates beside the peers', with the machine's bound drawn in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cellop_nb.notebook.style import (
    CATEGORIES,
    HATCHES,
    QUIET,
    canvas,
    label,
    legend,
    log_ticks,
    long_names,
    mark,
    note,
    safe,
)

Rows = Sequence[dict]
"""Rows of one section of a record, as `benchmarks.record` makes them."""


def energy_scaling(rows: Rows) -> Figure:
    """CPU seconds, and memory where it was taken, of value and gradient against cells per cloud."""
    rows = [row for row in rows if row.get("n") and not row.get("groups")]
    kinds = {"cpu_seconds": "CPU seconds", "extra_mb": "extra memory, MB"}
    shown = [kind for kind in kinds if any(row.get(kind) for row in rows)]
    fig, axes = canvas(1, len(shown), height=3.0)
    for ax, kind in zip(axes, shown, strict=True):
        for index, name in enumerate(dict.fromkeys(row["variant"] for row in rows)):
            points = [(row["n"], row[kind]) for row in rows if row["variant"] == name and row.get(kind)]
            if points:
                ax.plot(
                    *zip(*points, strict=True), **mark(index), label=safe(name), markersize=5, linewidth=1.5
                )
        if kind == "cpu_seconds":
            bound = [(row["n"], row["bound_seconds"]) for row in rows if row.get("bound_seconds")]
            ax.plot(*zip(*bound, strict=True), color=QUIET, linestyle=":", label="products alone (bound)")
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(sorted({row["n"] for row in rows if row.get(kind)}))
        for axis in "xy":
            log_ticks(ax, axis)
        label(
            ax, "Energy distance, value and gradient" if ax is axes[0] else "", "cells per cloud", kinds[kind]
        )
    _legend_of_the_first(axes)
    return fig


def training_rates(rows: Rows) -> Figure:
    """Cells per CPU second of training the VAE, for each size of the network and batch, with the bound."""
    rows = [row for row in rows if row.get("cells_per_cpu_s")]
    sizes = list(dict.fromkeys((row["hidden"], row["batch"]) for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    fig, (ax,) = canvas(height=3.0, width=7.0)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = {(row["hidden"], row["batch"]): row for row in rows if row["variant"] == name}
        places = [k + (index - (len(names) - 1) / 2) * width for k, size in enumerate(sizes) if size in found]
        heights = [found[size]["cells_per_cpu_s"] for size in sizes if size in found]
        style = {
            "color": CATEGORIES[index],
            "hatch": HATCHES[index],
            "edgecolor": "white",
            "label": safe(name),
        }
        ax.bar(places, heights, 0.9 * width, **style)
    for k, size in enumerate(sizes):
        bounds = [row["bound_cells_per_cpu_s"] for row in rows
                  if (row["hidden"], row["batch"]) == size and row.get("bound_cells_per_cpu_s")]  # fmt: skip
        for bound in bounds:
            ax.hlines(bound, k - 0.4, k + 0.4, color=QUIET, linestyle=":", label="bound" if k == 0 else None)
    long_names(ax, [f"hidden {hidden}, batch {batch}" for hidden, batch in sizes])
    ax.set_ylim(bottom=0)
    label(ax, "Training the VAE", "", "cells per CPU second")
    legend(ax, outside=True)
    return fig


def step_times(rows: Rows, what: str = "step") -> Figure:
    """CPU milliseconds of one step of the operators in each form that took turns, with the bound of ours."""
    # a note tells that a row was measured apart; beside the others its time would mislead
    apart = {"share", "note"}
    rows = [row for row in rows if row.get("what") == what and row.get("cpu_seconds")]
    rows = [row for row in rows if not any(row.get(key) for key in apart)]
    fig, (ax,) = canvas(height=0.5 * len(rows) + 1.0, width=7.0)
    times = np.array([1e3 * row["cpu_seconds"] for row in rows])
    for place, (row, time) in enumerate(zip(rows, times, strict=True)):
        ax.plot(
            time, place, markersize=9, linestyle="none", **mark(place)
        )  # no bars: a logarithm has no zero
        note(ax, 1.25 * time, place, f"{time:.3g} ms", transform=ax.transData, va="center")
        if row.get("bound_seconds"):
            ax.vlines(1e3 * row["bound_seconds"], place - 0.35, place + 0.35, color="black", linestyle=":")
    ax.set(xscale="log", xlim=(times.min() / 20, times.max() * 6))
    log_ticks(ax, "x")
    long_names(ax, [row["variant"] for row in rows], "y")
    ax.set_ylim(len(rows) - 0.5, -0.5)
    label(ax, "One step of the operators", "CPU milliseconds (dotted: products alone)")
    return fig


def stage_times(rows: Rows) -> Figure:
    """Seconds of each stage of the whole job, with its bound."""
    fig, (ax,) = canvas(height=0.4 * len(rows) + 1.0, width=7.0)
    seconds = [row["stage_seconds"] for row in rows]
    ax.barh(range(len(rows)), seconds, 0.6, color=CATEGORIES[0])
    for place, (row, value) in enumerate(zip(rows, seconds, strict=True)):
        note(ax, value, place, f" {value:.3g} s", transform=ax.transData, va="center")
        if row.get("bound_seconds"):
            ax.vlines(row["bound_seconds"], place - 0.4, place + 0.4, color="black", linestyle=":")
    ax.set_xlim(0, 1.2 * max(seconds))
    ax.invert_yaxis()
    long_names(ax, [row["what"] for row in rows], "y")
    label(ax, f"The whole job: {safe(rows[0].get('data', ''), 60)}", "seconds (dotted: bound)")
    return fig


def cells_scaling(rows: Rows) -> Figure:
    """CPU seconds and memory of one pass of training against the number of cells, with each slope and the bound."""
    rows = [row for row in rows if row.get("stage") == "train"]
    points = [row for row in rows if row.get("cells_per_cpu_s")]
    slopes = {(row["variant"], row["file"]): row for row in rows if row.get("time_exponent") is not None}
    fig, axes = canvas(1, 2, height=3.0)
    for index, (name, file) in enumerate(dict.fromkeys((row["variant"], row["file"]) for row in points)):
        own = [row for row in points if (row["variant"], row["file"]) == (name, file)]
        cells, slope = [row["cells"] for row in own], slopes.get((name, file))
        title = safe(name if file == "h5ad" else f"{name}, {file}")
        if slope is not None:
            title += f"\nslope {slope['time_exponent']:.2f}, {slope['bytes_per_cell']:,.0f} B/cell"
        style = mark(index) | {"label": title, "markersize": 5, "linewidth": 1.5}
        axes[0].plot(cells, [row["cells"] / row["cells_per_cpu_s"] for row in own], **style)
        axes[1].plot(cells, [row["extra_mb"] for row in own], **style)
    bound = [
        (row["cells"], row["bound_seconds"]) for row in points if row.get("bound") == "training in memory"
    ]
    if bound:
        axes[0].plot(
            *zip(*bound, strict=True), color=QUIET, linestyle=":", label="our rate in memory (bound)"
        )
    axes[0].set_yscale("log")
    log_ticks(axes[0], "y")
    axes[1].set_ylim(bottom=0)
    for ax, what in zip(axes, ("CPU seconds", "extra memory, MB"), strict=True):
        ax.set_xscale("log")
        ax.set_xticks(sorted({row["cells"] for row in points}))
        log_ticks(ax, "x")
        label(ax, "One epoch of the VAE, from the file" if ax is axes[0] else "", "cells", what)
    _legend_of_the_first(axes)
    return fig


def peers(table: pd.DataFrame) -> Figure:
    """Energy distance of each method against its CPU seconds; on the dotted line nothing is both better and cheaper."""
    rows = table.dropna(subset="energy")
    rows = rows.assign(seconds=(rows["fit_cpu_seconds"] + rows["predict_cpu_seconds"]).clip(lower=0.01))
    points = rows.groupby("method")[["seconds", "energy"]].mean().sort_values("seconds")
    fig, (ax,) = canvas(height=4.2, width=7.0)
    for index, (name, (seconds, energy)) in enumerate(points.iterrows()):
        ax.plot(seconds, energy, linestyle="none", markersize=8, **mark(index))
        distance = np.abs(np.log(points.iloc[:index] / points.loc[name])).max(axis=1).min()
        below = distance < 0.2  # another name stands there
        align = {"va": "top" if below else "bottom", "transform": ax.transData}
        note(ax, seconds * 1.15, energy * (0.97 if below else 1), safe(name), **align)
    front = points[points["energy"] == points["energy"].cummin()]
    ax.plot(front["seconds"], front["energy"], color=QUIET, linestyle=":", drawstyle="steps-post")
    ax.set(xscale="log", yscale="log", xlim=(points["seconds"].min() / 2, points["seconds"].max() * 8))
    for axis in "xy":
        log_ticks(ax, axis)
    held_out = ", ".join(rows["context"].unique())
    label(ax, f"Held out: {safe(held_out, 60)}", "CPU seconds of fit and prediction", "energy distance")
    return fig


def _legend_of_the_first(axes) -> None:
    """Beside the last panel what the first one shows: the bound of the time is drawn there alone."""
    legend(axes[-1], *axes[0].get_legend_handles_labels()[0], outside=True)


def gpu_times(rows: Rows) -> Figure:
    """Milliseconds of each step on a GPU, call by call and recorded, with the time it computes and the bound."""
    rows = [row for row in rows if row.get("gain")]
    steps = list(dict.fromkeys(_step_of(row) for row in rows))
    names = list(dict.fromkeys(row["variant"] for row in rows))
    fig, (ax,) = canvas(height=0.55 * len(steps) + 1.4)
    for index, name in enumerate(names):
        own = [(steps.index(_step_of(row)), 1e3 * row["seconds"]) for row in rows if row["variant"] == name]
        places = [place + 0.18 * (index - (len(names) - 1) / 2) for place, _ in own]
        ax.plot(
            [ms for _, ms in own],
            places,
            linestyle="none",
            markersize=8,
            label=safe(name),
            **mark(index),
        )
    for place, step in enumerate(steps):
        recorded = [row for row in rows if _step_of(row) == step][1:] or rows[:1]
        lines = {"bound_seconds": (":", "bound"), "busy_seconds": ("-", "the device computes (recorded)")}
        for key, (line, words) in lines.items():
            if recorded[0].get(key):
                ms = 1e3 * recorded[0][key]
                ax.vlines(
                    ms,
                    place - 0.4,
                    place + 0.4,
                    color=QUIET,
                    linestyle=line,
                    label=words if not place else None,
                )
    ax.set(xscale="log")
    log_ticks(ax, "x")
    long_names(ax, steps, "y")
    ax.set_ylim(len(steps) - 0.5, -0.5)
    label(ax, "One step on a GPU", "milliseconds")
    legend(ax, outside=True)
    return fig


def _step_of(row: dict) -> str:
    sizes = ("hidden", "batch") if row.get("hidden") else ("groups", "n")
    words = {"n": "cells"}
    return f"{row['what']}, " + ", ".join(f"{words.get(key, key)} {row[key]:,}" for key in sizes)
