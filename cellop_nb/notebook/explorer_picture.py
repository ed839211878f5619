"""The picture of one answer about virtual cells: map, genes, one gene's counts, energy distance, spectrum.

Drawn on a :class:`Board`, where a change of strength moves only what it changes: a slider waits for it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from . import style as s
from .board import Board, Box, View
from .virtual import Answer, leading

N_GENES = 8  # a side
_BINS = 18
_CLOUDS = {"start": ":", "real": "--", "moved": "-"}
_NAMES = {"start": "control cells", "real": "real perturbed cells", "moved": "control cells, moved"}
_REVERSED = {"start": "perturbed cells", "real": "real control cells", "moved": "perturbed cells, led back"}


def _looks(reverse: bool) -> dict[str, dict[str, str]]:
    """Colour and marker of each cloud: what cells are, not where they start, decides."""
    control, real = {"color": s.CONTROL, "marker": "X"}, {"color": s.REAL, "marker": "s"}
    start, target = (real, control) if reverse else (control, real)
    return {"start": start, "real": target, "moved": {"color": s.PREDICTED, "marker": "o"}}


class ExplorerPicture(Board):
    """The picture; `update` takes an answer, `png` draws it."""

    def __init__(self) -> None:
        super().__init__(768, 620)
        self._head = self.text(12, 15, fontsize=s.TITLE)
        self._why = self.text(12, 35)
        self.map = _Map(self, (34, 98, 380, 300), "")
        self.genes = _Genes(self, (536, 98, 216, 300), "")
        self.counts = _Counts(self, (52, 462, 204, 108), "", "log1p counts per 10,000")
        self.energy = _Energy(self, (306, 462, 190, 74), "energy distance to the real cells", below=80)
        self.spectrum = _Spectrum(self, (556, 462, 196, 76), "eigenvalues (dashed: unit circle)", below=16)
        self._verdict = [self.text(556, 576 + 14 * i, fontsize=s.SMALL) for i in range(3)]

    def update(self, answer: Answer) -> None:
        """Bring every panel up to date."""
        question = answer.question
        self._head.set_text(s.safe(f"{question.context}: {question.label}", 90))
        self._why.set_text(s.safe(answer.why, 120))
        self._why.set_color(s.VERMILION if answer.standing == "prediction" else s.INK)
        for view in (self.map, self.genes, self.counts, self.energy, self.spectrum):
            view.show(answer)
        lines = textwrap.wrap(answer.verdict, 33)
        for i, text in enumerate(self._verdict):
            text.set_text(s.safe(lines[i], 60) if i < len(lines) else "")


class _Panel(View):
    """A panel whose axes stand still while one question's strength changes."""

    def __init__(self, board: Board, box: Box, title: str, x: str = "", *, below: int = 34) -> None:
        super().__init__(board, box, title, x, above=46 if not title else 22, below=below)
        self._question: tuple = ()
        self._limits: tuple = ()
        s.few_ticks(self.ax, n=4)

    def is_new(self, *question: Any) -> bool:
        """Whether something else is asked than before."""
        same, self._question = question == self._question, question
        return not same

    def limit(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        if (x, y) != self._limits:
            self._limits = (x, y)
            self.ax.set(xlim=x, ylim=y)
            self.board.stale(self)

    def show(self, answer: Answer) -> None:
        """Bring the panel up to date."""
        raise NotImplementedError


class _Map(_Panel):
    """Source cells, the same cells moved, and the real ones, in the plane that was fitted once."""

    def __init__(self, board: Board, box: Box, title: str) -> None:
        super().__init__(board, box, title, "response direction 1", below=30)
        self.ax.set(xticks=[], yticks=[])
        self.ax.set_ylabel("response direction 2", fontsize=s.SMALL, color=s.INK)
        self.ax.xaxis.set_label_coords(0.5, -12 / box[3])
        self.shape = box[2] / box[3]
        dots = {"linestyle": "", "markersize": 2.6, "alpha": 0.4, "markeredgewidth": 0}
        self.clouds = {name: self.ax.plot([], [])[0] for name in ("start", "real")}
        for cloud in self.clouds.values():
            cloud.update(dots)
        self.clouds["moved"] = self.line(dots)
        self.trail = self.line(color=s.INK, linewidth=1.2)
        big = {"linestyle": "", "markersize": 10, "markeredgecolor": "white", "markeredgewidth": 1.4}
        self.means = {name: self.line(big) for name in _CLOUDS}

    def show(self, answer: Answer) -> None:
        question = answer.question
        points = {name: getattr(answer, name) for name in _CLOUDS}
        new = self.is_new(question.context, question.perturbation, question.rule, question.reverse)
        if new:
            self._still(points, question.reverse)
        self._limit(points, new)
        for name, cloud in points.items():
            mean = cloud.mean(0) if len(cloud) else np.full(2, np.nan)
            self.means[name].set_data([mean[0]], [mean[1]])
        self.clouds["moved"].set_data(*points["moved"].T)
        self.trail.set_data(*np.stack([points["start"].mean(0), points["moved"].mean(0)]).T)

    def _still(self, points: dict[str, np.ndarray], reverse: bool) -> None:
        """Clouds and key that no strength changes."""
        names, handles = _REVERSED if reverse else _NAMES, []
        for name, look in _looks(reverse).items():
            self.clouds[name].update(look)
            self.means[name].update(look)
            if name != "moved":
                self.clouds[name].set_data(*points[name].T)
            text = f"{names[name]} ({len(points[name]):,})"
            handles.append(s.sample(text, look | {"linestyle": "", "markersize": 7}))
        self.key(
            *handles,
            columns=2,
            handlelength=0.8,
            loc="lower left",
            bbox_to_anchor=(-0.07, 1.0),
            frameon=False,
        )

    def _limit(self, points: dict[str, np.ndarray], new: bool) -> None:
        """The map stands still while the strength moves, unless cells leave it."""
        clouds = [cloud for cloud in points.values() if len(cloud)] if new else [points["moved"]]
        sides = [[_span(cloud[:, axis]) for cloud in clouds] for axis in (0, 1)]
        if not new:
            sides = [[*spans, limits] for spans, limits in zip(sides, self._limits, strict=True)]
        x, y = ((min(low for low, _ in spans), max(high for _, high in spans)) for spans in sides)
        self.limit(*_equal(x, y, self.shape))


class _Genes(_Panel):
    """The genes that rise and fall most, their interval, and what the real cells show."""

    def __init__(self, board: Board, box: Box, title: str) -> None:
        super().__init__(board, box, title, "change of mean log1p counts per 10,000")
        self.place = (box[0] - 110, *self.place[1:])  # names of genes
        rows = np.arange(2 * N_GENES)
        self.ax.tick_params(axis="y", length=0)
        self.ax.yaxis.set_label_coords(-0.5, 0.5)
        self.bars = [self.ax.add_patch(Rectangle((0, row - 0.35), 0, 0.7, animated=True)) for row in rows]
        self.moving += self.bars
        self.line(color=s.QUIET, linewidth=0.8).set_data([0, 0], [-0.5, len(rows) - 0.5])
        self.intervals = self.line(color=s.INK, linewidth=1.2)
        diamond = {"marker": "D", "linestyle": "", "markersize": 5, "color": s.REAL, "markeredgecolor": s.INK}
        self.measured = self.line(diamond, markeredgewidth=0.6)
        handles = [
            s.sample("change; calibrated 95 % interval at strength 1", {"color": s.INK, "linewidth": 1.2}),
            s.sample("measured in the real cells (full strength)", diamond),
        ]
        self.key(*handles, loc="lower left", bbox_to_anchor=(-0.4, 1.0), frameon=False)
        self.leaders: list[str] = []
        self._strength = self._top = 0.0

    def show(self, answer: Answer) -> None:
        question = answer.question
        new = self.is_new(question.context, question.perturbation, question.rule, question.reverse)
        if new or question.strength > self._strength:  # a weaker dose shows the genes of the stronger one
            self.leaders, self._strength = list(leading(answer.genes, N_GENES)["gene"]), question.strength
            self.ax.set_yticks(range(len(self.leaders)), [s.safe(gene, 14) for gene in self.leaders])
            for text in self.ax.get_yticklabels():
                text.set_fontfamily(s.families())
            self.board.stale(self)
        rows = pd.Index(answer.genes["gene"]).get_indexer(self.leaders)
        values = answer.genes[["change", "low", "high", "measured"]].to_numpy(dtype=float)[rows]
        top = rounded(max(float(np.nanmax(np.abs(values), initial=0.0)), 0.1))
        self._top = top if new else max(self._top, top)
        self.limit((-self._top, self._top), (2 * N_GENES - 0.5, -0.5))
        y = np.arange(len(rows))
        for i, bar in enumerate(self.bars):
            change = values[i, 0] if i < len(rows) else 0.0
            bar.set_width(change)
            bar.set_color(s.RISE if change > 0 else s.FALL)
        gap = np.full((len(rows), 1), np.nan)  # between the strokes of one line
        self.intervals.set_data(np.hstack([values[:, 1:3], gap]).ravel(), np.repeat(y, 3))
        self.measured.set_data(values[:, 3], y)


class _Counts(_Panel):
    """One gene in the three clouds: cells with counts by log1p-CP10k, and the share without in words."""

    def __init__(self, board: Board, box: Box, title: str, x: str) -> None:
        super().__init__(board, box, title, x)
        self.lines = {name: self.line(linestyle=style, linewidth=1.6) for name, style in _CLOUDS.items()}
        self.zeros = {name: self.text(0.61, 0.88 - 0.13 * i) for i, name in enumerate(_CLOUDS)}
        self.samples = {
            name: self.line(linestyle=style, linewidth=1.6, transform=self.ax.transAxes)
            for name, style in _CLOUDS.items()
        }
        for i, sample in enumerate(self.samples.values()):
            sample.set_data([0.48, 0.59], [0.915 - 0.13 * i] * 2)
        self._height = 0.0

    def show(self, answer: Answer) -> None:
        question, clouds = answer.question, answer.counts
        new = self.is_new(
            question.context, question.perturbation, question.rule, question.reverse, answer.gene
        )
        top = float(np.ceil(max(1.0, *(cells.max(initial=0.0) for cells in clouds.values()))))
        edges = np.linspace(0, top, _BINS + 1)
        shares = {
            name: np.histogram(cells[cells > 0], edges)[0] / max(len(cells), 1)
            for name, cells in clouds.items()
        }
        height = rounded(1.6 * max(share.max(initial=0.0) for share in shares.values()))
        self._height = height if new else max(self._height, height)
        if new:
            self.ax.set_title(f"{s.safe(answer.gene, 20)}: share of cells", loc="left", fontsize=s.TEXT)
            self.board.stale(self)
        self.limit((0.0, top), (0.0, self._height))
        looks = _looks(question.reverse)
        for name, share in shares.items():
            there = len(clouds[name]) > 0
            self.lines[name].set_color(looks[name]["color"])
            self.samples[name].set_color(looks[name]["color"])
            heights = np.r_[0, np.repeat(share, 2), 0]
            self.lines[name].set_data(*((np.repeat(edges, 2), heights) if there else ([], [])))
            zeros = f"{100 * np.mean(clouds[name] == 0):.0f} % zeros" if there else "none"
            self.zeros[name].set_text(f"{name}: {zeros}")


class _Energy(_Panel):
    """Where the moved cells lie between no change and the noise floor."""

    def __init__(self, board: Board, box: Box, title: str, *, below: int) -> None:
        super().__init__(board, box, title, below=below)
        self.ax.set_yticks([])
        looks = {
            "no change": {"color": s.CONTROL, "marker": "X"},
            "moved": {"color": s.PREDICTED, "marker": "o"},
        }
        self.marks = {name: self.line(look, linestyle="", markersize=8) for name, look in looks.items()}
        self.names = {name: self.text(0, 0, va="center", transform=self.ax.transData) for name in looks}
        self.floor = self.line(color=s.INK, linestyle=(0, (1, 2)), linewidth=1.4)
        self.lines = [self.text(0, -0.54 - 0.21 * i, va="center") for i in range(3)]

    def show(self, answer: Answer) -> None:
        question = answer.question
        values = {"no change": answer.energy_start, "moved": answer.energy}
        measured = bool(np.isfinite(list(values.values())).all())
        top = rounded(max(*values.values(), answer.floor, 0.05) * 1.1) if measured else 1.0
        low = -rounded(-min(values.values())) if measured and min(values.values()) < 0 else 0.0
        new = self.is_new(question.context, question.perturbation, question.rule, question.reverse)
        before = (low, top) if new else self._limits[0]
        low, top = min(low, before[0]), max(top, before[1])
        self.limit((low, top), (0.0, 1.0))
        for y, (name, value) in zip((0.8, 0.4), values.items(), strict=True):
            self.marks[name].set_data([value] if measured else [], [y] if measured else [])
            side = -1 if measured and (value - low) / (top - low) > 0.55 else 1
            self.names[name].set(
                text=f"{name} {value:.3f}" if measured else "", ha="left" if side > 0 else "right", y=y,
                x=value + side * 0.05 * (top - low) if measured else 0.0,
            )  # fmt: skip
        self.floor.set_data([answer.floor] * 2 if measured else [], [0, 1] if measured else [])
        cells = f"{answer.n_moved:,} moved and {answer.n_real:,} real cells" if measured else ""
        floor = f"dotted: noise floor {answer.floor:.3f}" if measured else "no real cells of this condition"
        for text, line in zip(
            self.lines, (floor, cells, "Euclidean, U-statistic, latent space"), strict=True
        ):
            text.set_text(line)


class _Spectrum(_Panel):
    """Eigenvalues of the operator's matrix, beside the unit circle."""

    def __init__(self, board: Board, box: Box, title: str, *, below: int) -> None:
        super().__init__(board, box, title, below=below)
        turn = np.linspace(-np.pi, np.pi, 241)
        self.ax.plot(np.cos(turn), np.sin(turn), color=s.QUIET, linestyle="--", linewidth=0.8)
        self.dots = self.line(linestyle="", markersize=4, alpha=0.7, color=s.PREDICTED, marker="o")

    def show(self, answer: Answer) -> None:
        question, values = answer.question, answer.eigenvalues
        low, high = min(float(values.real.min()), 0.75), max(float(values.real.max()), 1.25)
        low, high = float(np.floor(low * 4) / 4), float(np.ceil(high * 4) / 4)
        half = rounded(max(float(np.abs(values.imag).max()), 0.2))
        if not self.is_new(question.context, question.perturbation, question.rule, question.reverse):
            (old_low, old_high), (_, old_half) = self._limits
            low, high, half = min(low, old_low), max(high, old_high), max(half, old_half)
        self.limit((low, high), (-half, half))
        self.dots.set_data(values.real, values.imag)


def rounded(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 6, 8, 10 in the value's decade."""
    decade = 10.0 ** np.floor(np.log10(max(value, 1e-3)))
    return float(next(step * decade for step in (1, 1.5, 2, 3, 4, 6, 8, 10, 15) if step * decade >= value))


def _span(values: np.ndarray) -> tuple[float, float]:
    """Limits that hold 99 % of the cells, with a margin."""
    low, high = np.quantile(values, [0.005, 0.995])
    margin = 0.08 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def _equal(
    x: Sequence[float], y: Sequence[float], ratio: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The same limits, widened so that one unit is as long upwards as sideways."""
    wide = max(x[1] - x[0], (y[1] - y[0]) * ratio)
    middle, centre = sum(x) / 2, sum(y) / 2
    return (middle - wide / 2, middle + wide / 2), (centre - wide / ratio / 2, centre + wide / ratio / 2)
