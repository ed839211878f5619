"""The picture of one answer about virtual cells: map, genes, one gene's counts, energy distance, spectrum.

Drawn on a :class:`Sheet`, where a change of strength moves only what it changes: a slider waits for it.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .. import style as s
from ..virtual import Answer, leading
from .frame import Frame, bar, equal, rounded, say, span
from .sheet import Sheet

WIDTH, HEIGHT = 768, 620
N_GENES = 8  # a side
_CLOUDS = (("start", 6, ":"), ("real", 1, "--"), ("moved", 0, "-"))
_UP, _DOWN, _MEASURED = s.CATEGORIES[3], s.CATEGORIES[5], s.CATEGORIES[1]
_BINS = 18


@dataclass(frozen=True)
class Words:
    """What the clouds are called, by direction."""

    start: str = "control cells"
    moved: str = "control cells, moved"
    real: str = "real perturbed cells"

    @classmethod
    def of(cls, reverse: bool) -> Words:
        return cls("perturbed cells", "perturbed cells, led back", "real control cells") if reverse else cls()


class ExplorerSheet:
    """The picture; `update` takes an answer, `png` draws it."""

    def __init__(self) -> None:
        self.sheet = sheet = Sheet(WIDTH, HEIGHT)
        self._head = sheet.text(12, 15, moving=True, fontsize=s.TITLE, fontweight="bold")
        self._why = sheet.text(12, 35, moving=True, fontsize=s.TEXT)
        self._map = _Map(sheet)
        self._genes = _Genes(sheet)
        self._counts = _Counts(sheet)
        self._energy = _Energy(sheet)
        self._spectrum = _Spectrum(sheet)
        self._verdict = [sheet.text(556, 576 + 14 * i) for i in range(3)]

    def update(self, answer: Answer) -> None:
        """Bring every panel up to date."""
        asked = answer.question
        self._head.set_text(s.safe(f"{asked.context}: {asked.label}", 90))
        self._why.set_text(s.safe(answer.why, 120))
        self._why.set_color(s.CATEGORIES[3] if answer.standing == "prediction" else s.INK)
        words = Words.of(asked.reverse)
        for view in (self._map, self._genes, self._counts, self._energy, self._spectrum):
            view.update(answer, words)
        lines = textwrap.wrap(answer.verdict, 33)[:3]
        for i, text in enumerate(self._verdict):
            say(self.sheet, text, s.safe(lines[i], 60) if i < len(lines) else "")

    def png(self, *, small: bool = False) -> bytes:
        """The picture as PNG; `small` takes longer and holds fewer bytes."""
        return self.sheet.png(small=small)


class _Map:
    """Source cells, the same cells moved, and the real ones, in the plane that was fitted once."""

    def __init__(self, sheet: Sheet) -> None:
        self.frame = Frame(
            sheet, (34, 98, 380, 300), "", "response direction 1", "response direction 2", ticks=""
        )
        self._key: tuple = ()
        self.clouds, self.means, self.keys = {}, {}, {}
        dots = {"linestyle": "", "markersize": 2.6, "alpha": 0.4, "markeredgewidth": 0}
        self.trail = sheet.line(moving=True, color=s.INK, linewidth=1.2)
        for i, (name, index, _) in enumerate(_CLOUDS):
            look = s.mark(index)
            self.clouds[name] = sheet.line(moving=name == "moved", **dots, **look)
            big = {"linestyle": "", "markersize": 10, "markeredgecolor": "white", "markeredgewidth": 1.4}
            self.means[name] = sheet.line(moving=True, **big, **look)
            x, y = ((12, 58), (220, 58), (12, 77))[i]
            sheet.line([x + 6], [y], linestyle="", markersize=7, **look)
            self.keys[name] = sheet.text(x + 16, y)
        self.moved_on_top()

    def moved_on_top(self) -> None:
        for mean in self.means.values():
            mean.set_zorder(3)

    def update(self, answer: Answer, words: Words) -> None:
        points = {name: getattr(answer, name) for name, *_ in _CLOUDS}
        self._limit(_key(answer), points)
        for name, cloud in points.items():
            if name == "moved" or self.frame.sheet.stale:  # the others stand on the ground
                seen = cloud[self.frame.holds(cloud)]
                self.clouds[name].set_data(self.frame.x(seen[:, 0]), self.frame.y(seen[:, 1]))
            mean = cloud.mean(0) if len(cloud) else np.full(2, np.nan)
            self.means[name].set_data([self.frame.x(mean[0])], [self.frame.y(mean[1])])
            say(self.frame.sheet, self.keys[name], f"{getattr(words, name)} ({len(cloud):,})")
        ends = np.stack([points["start"].mean(0), points["moved"].mean(0)])
        self.trail.set_data(self.frame.x(ends[:, 0]), self.frame.y(ends[:, 1]))

    def _limit(self, key: tuple, points: dict[str, np.ndarray]) -> None:
        """Choose the limits; the map stands still while the strength moves, unless cells leave it."""
        same = key == self._key
        fresh = [points["moved"]] if same else [cloud for cloud in points.values() if len(cloud)]
        sides = [[span(cloud[:, axis]) for cloud in fresh] for axis in (0, 1)]
        if same:
            old = self.frame._limits
            sides = [[*spans, limits] for spans, limits in zip(sides, (old[:2], old[2:]), strict=True)]
        x, y = ((min(low for low, _ in spans), max(high for _, high in spans)) for spans in sides)
        self.frame.limit(*equal(x, y, self.frame.box[2] / self.frame.box[3]))
        self.frame.sheet.stale |= not same
        self._key = key


class _Genes:
    """The genes that rise and fall most, their interval, and what the real cells show."""

    def __init__(self, sheet: Sheet) -> None:
        self.frame = Frame(sheet, (536, 98, 216, 300), "", "log2 fold change", ticks="x")
        sheet.text(460, 58, "genes that change most, 95 % interval over cells")
        sheet.line(
            [466], [77], marker="D", markersize=5, color=_MEASURED, markeredgecolor=s.INK, linestyle=""
        )
        sheet.text(476, 77, "measured in the real cells (full strength)")
        self.frame.limit((-1, 1), (0, 1))
        self.bars = [sheet.area(color=_UP), sheet.area(color=_DOWN)]
        self.zero = sheet.line(moving=True, color=s.QUIET, linewidth=0.8)
        rows = range(2 * N_GENES)
        self.names = [sheet.text(528, 0, ha="right") for _ in rows]
        self.spans = sheet.line(moving=True, color=s.INK, linewidth=1.2)
        dots = {"marker": "D", "markersize": 5, "color": _MEASURED, "markeredgecolor": s.INK, "linestyle": ""}
        self.measured = sheet.line(moving=True, markeredgewidth=0.6, **dots)
        self._top, self._key = 0.0, ()
        self._shown: list = []
        self._strength = 0.0

    def update(self, answer: Answer, words: Words) -> None:
        key, strength = _key(answer), answer.question.strength
        if key != self._key or strength > self._strength:  # a weaker dose shows the genes of the stronger one
            self._shown, self._strength = list(leading(answer.genes, N_GENES)["gene"]), strength
        rows = pd.Index(answer.genes["gene"]).get_indexer(self._shown)
        values = answer.genes[["lfc", "low", "high", "measured"]].to_numpy(dtype=float)[rows]
        top = rounded(max(float(np.nanmax(np.abs(values), initial=0.0)), 0.25))
        self._top, self._key = max(self._top if key == self._key else 0.0, top), key
        self.frame.limit((-self._top, self._top), (0, 1))
        centre = self.frame.box[1] + (np.arange(len(rows)) + 0.5) * self.frame.box[3] / (2 * N_GENES)
        zero, ends = float(self.frame.x(0.0)), self.frame.x(values[:, 0])
        for area, sign in zip(self.bars, (1, -1), strict=True):
            here = np.flatnonzero(np.sign(values[:, 0]) == sign)
            area.set_verts([bar(zero, ends[i], centre[i]) for i in here])
        self.zero.set_data([zero, zero], [self.frame.box[1], self.frame.box[1] + self.frame.box[3]])
        for i, name in enumerate(self.names):
            there = i < len(rows)
            say(self.frame.sheet, name, s.safe(self._shown[i], 14) if there else "")
            if there:
                name.set_y(centre[i])
        gap = np.full((len(rows), 1), np.nan)  # between the strokes of one line
        strokes = np.hstack([self.frame.x(values[:, 1:3]), gap])
        self.spans.set_data(strokes.ravel(), np.repeat(centre, 3))
        self.measured.set_data(self.frame.x(values[:, 3]), centre)


class _Counts:
    """One gene in the three clouds: cells with counts by log1p-CP10k, and the share without in words."""

    def __init__(self, sheet: Sheet) -> None:
        self.frame = Frame(sheet, (52, 462, 204, 108), "", "log1p counts per 10,000", "", ticks="xy")
        self.lines, self.words = {}, {}
        for i, (name, index, style) in enumerate(_CLOUDS):
            look = {"color": s.mark(index)["color"], "linestyle": style, "linewidth": 1.6}
            self.lines[name], y = sheet.line(moving=True, **look), 470 + 14 * i
            sheet.line([150, 172], [y, y], **look)
            self.words[name] = sheet.text(177, y, moving=True)
        self._height, self._key = 0.0, ()

    def update(self, answer: Answer, words: Words) -> None:
        clouds, key = answer.counts, (*_key(answer), answer.gene)
        top = float(np.ceil(max(1.0, *(cells.max(initial=0.0) for cells in clouds.values()))))
        edges = np.linspace(0, top, _BINS + 1)
        shares = {
            n: np.histogram(cells[cells > 0], edges)[0] / max(len(cells), 1) for n, cells in clouds.items()
        }
        highest = max(share.max(initial=0.0) for share in shares.values())
        self._height = max(self._height if key == self._key else 0.0, rounded(1.6 * highest))
        if key != self._key:
            self.frame.title.set_text(f"{s.safe(answer.gene, 20)}: share of cells")
            self.frame.sheet.stale, self._key = True, key
        self.frame.limit((0.0, top), (0.0, self._height))
        for name, share in shares.items():
            x, y = self.frame.x(np.repeat(edges, 2)), self.frame.y(np.r_[0, np.repeat(share, 2), 0])
            there = len(clouds[name]) > 0
            self.lines[name].set_data((x, y) if there else ([], []))
            zeros = f"{100 * np.mean(clouds[name] == 0):.0f} % zeros" if there else "none"
            self.words[name].set_text(f"{name}: {zeros}")


class _Energy:
    """Where the moved cells lie between no change and the noise floor."""

    def __init__(self, sheet: Sheet) -> None:
        self.frame = Frame(sheet, (306, 462, 190, 74), "energy distance to the real cells", ticks="x")
        self.words = sheet.text(306, 576)
        self.source = sheet.text(306, 592)
        sheet.text(306, 608, "Euclidean, U-statistic, latent space")
        self.names, self.marks = {}, {}
        for i, (name, index) in enumerate((("no change", 6), ("moved", 0))):
            self.marks[name] = sheet.line(moving=True, linestyle="", markersize=8, **s.mark(index))
            self.names[name] = sheet.text(0, 478 + 30 * i, name, moving=True)
        self.floor = sheet.line(moving=True, color=s.CATEGORIES[3], linestyle=(0, (1, 2)), linewidth=1.4)
        self._limits, self._key = (0.0, 0.0), ()

    def update(self, answer: Answer, words: Words) -> None:
        values = {"no change": answer.energy_start, "moved": answer.energy}
        known = np.isfinite(list(values.values())).all()
        top = rounded(max(*values.values(), answer.floor, 0.05) * 1.1) if known else 1.0
        low = -rounded(-min(values.values())) if known and min(values.values()) < 0 else 0.0
        old, key = self._limits if _key(answer) == self._key else (0.0, 0.0), _key(answer)
        self._limits, self._key = (min(low, old[0]), max(top, old[1])), key
        self.frame.limit(self._limits, (0, 1))
        for i, (name, value) in enumerate(values.items()):
            x = float(self.frame.x(value)) if known else np.nan
            self.marks[name].set_data([x], [478 + 30 * i])
            left = known and x > self.frame.box[0] + 110
            self.names[name].set(
                text=f"{name} {value:.3f}" if known else "",
                x=x - 9 if left else x + 9,
                ha="right" if left else "left",
            )
        ends = [self.frame.box[1], self.frame.box[1] + self.frame.box[3]]
        self.floor.set_data([self.frame.x(answer.floor)] * 2 if known else [], ends if known else [])
        said = f"dotted: noise floor {answer.floor:.3f}" if known else "no real cells of this condition"
        say(self.frame.sheet, self.words, said)
        said = f"{answer.n_moved:,} moved and {answer.n_real:,} real cells" if known else ""
        say(self.frame.sheet, self.source, said)


class _Spectrum:
    """Eigenvalues of the operator's matrix, beside the unit circle."""

    def __init__(self, sheet: Sheet) -> None:
        self.frame = Frame(sheet, (556, 462, 196, 76), "eigenvalues (dashed: unit circle)", ticks="xy")
        self.circle = sheet.line(moving=True, color=s.QUIET, linestyle="--", linewidth=0.8)
        self.dots = sheet.line(moving=True, linestyle="", markersize=4, alpha=0.7, **s.mark(0))
        self._limits, self._key = (1.0, 1.0, 0.0), ()

    def update(self, answer: Answer, words: Words) -> None:
        values = answer.eigenvalues
        low, high = min(float(values.real.min()), 0.75), max(float(values.real.max()), 1.25)
        half = rounded(max(float(np.abs(values.imag).max()), 0.2))
        wide = (np.floor(low * 4) / 4, np.ceil(high * 4) / 4)
        old = self._limits if _key(answer) == self._key else (1.0, 1.0, 0.0)
        low, high, half = min(wide[0], old[0]), max(wide[1], old[1]), max(half, old[2])
        self._limits, self._key = (low, high, half), _key(answer)
        self.frame.limit((low, high), (-half, half))
        turn = np.linspace(-np.pi, np.pi, 241)
        circle = np.stack([np.cos(turn), np.sin(turn)])
        inside = (circle[0] >= low) & (circle[0] <= high) & (np.abs(circle[1]) <= half)
        circle[:, ~inside] = np.nan
        self.circle.set_data(self.frame.x(circle[0]), self.frame.y(circle[1]))
        self.dots.set_data(self.frame.x(values.real), self.frame.y(values.imag))


def _key(answer: Answer) -> tuple:
    """While this stays the same, axes stand still: the strength moves cells, not the ground."""
    asked = answer.question
    return asked.context, asked.perturbation, asked.rule, asked.reverse
