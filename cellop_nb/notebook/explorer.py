"""The virtual-cell explorer: choose, move a slider, and see where the cells go.

What the widgets do are plain methods that can be called without a widget; what is shown comes from
:class:`VirtualCells`. The picture is drawn on a :class:`Board`, where a change of strength moves only what it changes: a
slider waits for it.
"""

from __future__ import annotations

import textwrap
import threading
import time
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from ..analysis.cellop import CellOp
from ..analysis.combinations import RULES
from ..errors import CellopError, LabelError, StorageError, did_you_mean
from ..files import require_room, unused, write_whole
from . import style as s
from .board import Board, Box, View
from .controls import Panel, button, panel, sized
from .virtual import Answer, Question, VirtualCells, leading

NOTHING = "(none)"
TOGETHER = {
    "together: shared axes": "axes",
    "together: sum of generators": "generator",
    "first, then second": "sequence",
    "second, then first": "reverse sequence",
}
_AXES = next(iter(TOGETHER))
"""How two perturbations are combined, in words."""


class Explorer(Panel):
    """Widgets that ask :class:`VirtualCells`; show it as the last line of a cell.

    Parameters
    ----------
    model
        A fitted :class:`cellop_nb.CellOp`. What is shown are its predictions, with the calibrated intervals of
        :meth:`CellOp.intervals`; sequences, other rules and the way back have no plan, and show the
        moved cells' own change.
    context, perturbation, second, together, strength, reverse, gene
        Where to start; every one is a widget too, and an empty text is None. By default the first context and
        perturbation at full strength, and the gene that changes most.
    folder
        Where "export" writes; the working directory by default.
    prepare
        Seconds at most for which likely questions are answered beforehand, so that their first move does not wait.

    Attributes
    ----------
    answer
        What is shown: numbers, genes, coordinates.
    picture
        The same as PNG.
    refusal
        Why the last question was refused; empty where it was answered.
    panel
        The widget.

    Raises
    ------
    LabelError
        For a context, perturbation or gene that neither data nor model know.
    ModelError
        For a model that was not fitted.
    """

    about = "Virtual-cell explorer (it needs a running kernel)"

    def __init__(
        self,
        model: CellOp,
        *,
        context: str | None = None,
        perturbation: str | tuple[str, ...] | None = None,
        strength: float = 1.0,
        reverse: bool = False,
        second: str | None = None,
        together: str = _AXES,
        gene: str | None = None,
        folder: str | Path = ".",
        prepare: float = 1.0,
    ):
        self.cells = VirtualCells(model)
        self.folder, self.gene = Path(folder), gene or None
        self._sheet, self._lock = ExplorerPicture(), threading.RLock()
        self._following = False
        first = perturbation or self.cells.perturbations[0]
        both, rule = combined(cast(str, first), second, together) if second else (first, "")
        start = context or self.cells.contexts[0]
        self._ask(Question(both, start, float(strength), rule or "axes", bool(reverse)), self.gene)
        self._prepare(prepare)
        self._build()

    # -- what the widgets do: plain methods

    def show(self, **changes) -> Answer:
        """Ask the present question with some of it changed, and draw the answer.

        Parameters
        ----------
        **changes
            ``context``, ``perturbation``, ``strength``, ``rule``, ``reverse``, ``gene``.

        Raises
        ------
        CellopError
            Where the question is refused; the picture then stays as it was.
        """
        with self._lock:
            gene = changes.pop("gene", self.gene)
            self._ask(replace(self.question, **changes), gene)
            self._follow()
            return self.answer

    def export(self, path: str | Path | None = None) -> Path:
        """Write the moved cells as AnnData (``.h5ad``), in one step.

        Parameters
        ----------
        path
            A new file; where None ``virtual_cells.h5ad`` in the explorer's folder, or its next number that is free.

        Returns
        -------
        The file.

        Raises
        ------
        StorageError
            Where there is a file of that name already.
        """
        path = unused(self.folder / "virtual_cells.h5ad") if path is None else Path(path)
        if path.exists():
            raise StorageError("a new file for the cells", f"{path} is there", "name another file")
        cells = self.cells.to_adata(self.question)

        def write(part: Path) -> None:
            require_room(part, 2 * cells.__sizeof__())
            cells.write_h5ad(part)

        return write_whole(path, write)

    def figure(self):
        """The present picture as a static image with its words, for the page and for print."""
        from IPython.display import Image

        with self._lock:
            return Image(self._sheet.png(small=True), format="png", alt=self.answer.sentence)

    # -- inside

    def _ask(self, question: Question, gene: str | None) -> None:
        self.answer: Answer = self.cells.ask(question, gene=gene)
        self.question, self.gene, self.refusal = question, gene, ""
        shown = hasattr(self, "panel")
        if shown:  # the words first: the browser lays them out while the picture is drawn
            self._say(self.answer.sentence)
        self._sheet.update(self.answer)
        self.picture = self._sheet.png()
        if shown:
            self.image.value = self.picture

    def _prepare(self, seconds: float) -> None:
        """Ask what may be asked next, the nearest first; the cells keep what no strength changes."""
        here, end = self.question.context, time.monotonic() + seconds
        contexts = [here, *(context for context in self.cells.contexts if context != here)]
        for context, name in product(contexts, self.cells.perturbations):
            if time.monotonic() > end:
                break
            with suppress(CellopError):  # it is told when it is asked for
                self.cells.ask(Question(name, context))

    def _follow(self) -> None:
        """Set the widgets to the question that a call has asked."""
        question, self._following = self.question, True
        try:
            self.context.value, self.strength.value = question.context, question.strength
            self.reverse.value, self.gene_box.value = question.reverse, self.gene or ""
            perturbation, rule = combined(*self._lists())
            if perturbation != question.perturbation or (rule or question.rule) != question.rule:
                self.first.value, self.second.value, together = _parts(question, self.cells)
                if self.second.value != NOTHING:
                    self.together.value = together
            self._listed = self._lists()
        finally:
            self._following = False

    def _lists(self) -> tuple[str, str, str]:
        return self.first.value, self.second.value, self.together.value

    def _by_widget(self, _=None) -> None:
        """Ask what the widgets say; a refusal is said below them, and the picture stays.

        ipykernel 7.4 handles quick moves in two threads at once: each asks what all widgets say when its turn
        comes, so the last one has seen every move.
        """
        with self._lock:
            if self._following:  # the widget follows the question, not the other way round
                return
            try:
                lists, question = self._lists(), self.question
                # three perturbations that a call has asked for are more than the lists can say
                if lists != self._listed:
                    perturbation, rule = combined(*lists)
                    question = replace(question, perturbation=perturbation, rule=rule or question.rule)
                strength, reverse = self.strength.value, self.reverse.value
                question = replace(question, context=self.context.value, strength=strength, reverse=reverse)
                gene = self.gene_box.value or None
                if (question, gene) != (self.question, self.gene) or self.refusal:
                    self._ask(question, gene)
                self._listed = lists
            except CellopError as problem:
                self.refusal = str(problem)
                self._say(f"refused: {problem}")

    def _export_by_button(self) -> None:
        self._say(f"saved {self.export()}: {self.question.context}, {self.question.label}")

    def _build(self) -> None:
        import ipywidgets as w

        names, question = self.cells.perturbations, self.question
        first, second, together = _parts(question, self.cells)
        self.context = w.Dropdown(options=self.cells.contexts, value=question.context, description="context")
        self.first = w.Dropdown(options=names, value=first, description="perturbation")
        self.second = w.Dropdown(options=[NOTHING, *names], value=second, description="and")
        self.together = w.Dropdown(options=list(TOGETHER), value=together, description="how")
        self.strength = w.FloatSlider(
            value=question.strength, min=0, max=1.5, step=0.05, readout_format=".2f", description="strength"
        )
        self.reverse = w.Checkbox(
            value=question.reverse, description="reverse: lead perturbed cells back", indent=False
        )
        self.gene_box = w.Combobox(
            value=self.gene or "", options=tuple(self.cells.vae.genes), description="gene",
            placeholder="the one that changes most", continuous_update=False,
        )  # fmt: skip
        self.export_button = button(
            "Export", "Write the moved cells as AnnData (.h5ad)", lambda: self._safely(self._export_by_button)
        )
        layout = w.Layout(width="768px", max_width="100%", align_self="flex-start")
        self.image, self.status = w.Image(value=self.picture, format="png", layout=layout), w.HTML()
        self._say(self.answer.sentence)
        self._listed = self._lists()
        fields = [self.context, self.first, self.second, self.together, self.strength, self.gene_box]
        for widget in fields:
            sized(widget, "340px", "100px")
        for widget in (*fields, self.reverse):
            widget.observe(self._by_widget, "value")
        row = w.Layout(flex_flow="row wrap", align_items="center")
        controls = w.HBox([*fields, self.reverse, self.export_button], layout=row)
        self.panel = panel([controls, self.status, self.image])


def combined(first: str, second: str, together: str) -> tuple[str | tuple[str, str], str]:
    """Perturbation and rule of a question about one perturbation or two; an empty rule where none applies."""
    if together not in TOGETHER:
        fix = did_you_mean(together, TOGETHER)
        raise LabelError(f"one of {list(TOGETHER)}", repr(together), fix)
    if second in (NOTHING, first):
        return first, ""
    rule = TOGETHER[together]
    if rule in RULES:
        return f"{first}+{second}", rule
    return ((first, second) if rule == "sequence" else (second, first)), ""


def _parts(question: Question, cells: VirtualCells) -> tuple[str, str, str]:
    """Values of the three lists that stand for a perturbation; of more than two parts the first two are shown."""
    perturbation, rule = question.perturbation, question.rule
    parts = cells.parts(perturbation)
    rule = rule if isinstance(perturbation, str) and rule != "composition" else "sequence"
    together = next(name for name, shown_rule in TOGETHER.items() if shown_rule == rule)
    return parts[0], parts[1] if len(parts) > 1 else NOTHING, together


# -- the picture of one answer: map, genes, one gene's counts, energy distance, spectrum

N_GENES = 8  # a side
_BINS = 18
_CLOUDS = {"start": ":", "real": "--", "moved": "-"}
_NAMES = {"start": "control cells", "real": "real perturbed cells", "moved": "control cells, moved"}
_REVERSED = {"start": "perturbed cells", "real": "real control cells", "moved": "perturbed cells, led back"}

Span = tuple[float, float]


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
        self.counts = _Counts(self, (52, 462, 204, 108), " ", "log1p counts per 10,000")
        self.energy = _Energy(self, (306, 462, 190, 74), "energy distance to the real cells", below=80)
        self.spectrum = _Spectrum(self, (556, 462, 196, 76), "eigenvalues (dashed: unit circle)", below=22)
        self._verdict = self.text(556, 590, fontsize=s.SMALL)
        self._asked: Question | None = None

    def update(self, answer: Answer) -> None:
        """Bring every panel up to date."""
        question = answer.question
        self._head.set_text(s.safe(f"{question.context}: {question.label}", 90))
        self._why.set_text(s.safe(answer.why, 120))
        self._why.set_color(s.VERMILION if answer.standing == "prediction" else s.INK)
        self._verdict.set_text("\n".join(textwrap.wrap(s.safe(answer.verdict, 99), 33)))
        full = replace(question, strength=1.0)
        for view in (self.map, self.genes, self.counts, self.energy, self.spectrum):
            view.show(answer, full != self._asked)
        self._asked = full


class _Panel(View):
    """A panel whose limits only grow while the strength of one question changes."""

    def __init__(self, board: Board, box: Box, title: str, x: str = "", *, below: int = 34) -> None:
        super().__init__(board, box, title, x, above=22 if title else 46, below=below)
        self._limits: tuple[Span, Span] | None = None
        s.few_ticks(self.ax, n=4)

    def limit(self, x: Span, y: Span, new: bool, ratio: float = 0.0) -> None:
        """Show at least these spans; at equal scales, where the `ratio` of the sides is told."""
        if self._limits and not new:
            x, y = (
                (min(a, low), max(b, high)) for (a, b), (low, high) in zip((x, y), self._limits, strict=True)
            )
        if ratio:
            wide = max(x[1] - x[0], (y[1] - y[0]) * ratio)
            middle, centre = sum(x) / 2, sum(y) / 2
            x = (middle - wide / 2, middle + wide / 2)
            y = (centre - wide / ratio / 2, centre + wide / ratio / 2)
        if (x, y) != self._limits:
            self._limits = (x, y)
            self.ax.set(xlim=x, ylim=y)
            self.board.stale(self)

    def show(self, answer: Answer, new: bool) -> None:
        """Bring the panel up to date; `new` where more than the strength has changed."""
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

    def show(self, answer: Answer, new: bool) -> None:
        points = {name: getattr(answer, name) for name in _CLOUDS}
        if new:
            self._still(points, answer.question.reverse)
        spans = [_spans(cloud) for cloud in (points.values() if new else [points["moved"]]) if len(cloud)]
        lows, highs = np.min(spans, axis=0)[0], np.max(spans, axis=0)[1]
        self.limit((lows[0], highs[0]), (lows[1], highs[1]), new, self.shape)
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
        self.key(*handles, columns=2, corner=(-0.07, 1.0))


class _Genes(_Panel):
    """The genes that rise and fall most, their interval, and what the real cells show."""

    def __init__(self, board: Board, box: Box, title: str) -> None:
        super().__init__(board, box, title, "change of mean log1p counts per 10,000")
        self.place = (box[0] - 110, *self.place[1:])  # names of genes
        rows = np.arange(2 * N_GENES)
        self.ax.tick_params(axis="y", length=0)
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
        self.key(*handles, corner=(-0.4, 1.0))
        self.leaders: list[str] = []
        self._strength = 0.0

    def show(self, answer: Answer, new: bool) -> None:
        strength = answer.question.strength
        if new or strength > self._strength:  # a weaker dose shows the genes of the stronger one
            self.leaders, self._strength = list(leading(answer.genes, N_GENES)["gene"]), strength
            self.ax.set_yticks(range(len(self.leaders)), [s.safe(gene, 14) for gene in self.leaders])
            for text in self.ax.get_yticklabels():
                text.set_fontfamily(s.families())
            self.board.stale(self)
        rows = pd.Index(answer.genes["gene"]).get_indexer(self.leaders)
        values = answer.genes[["change", "low", "high", "measured"]].to_numpy(dtype=float)[rows]
        top = s.rounded(max(float(np.nanmax(np.abs(values), initial=0.0)), 0.1))
        self.limit((-top, top), (2 * N_GENES - 0.5, -0.5), new)
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
        self._gene = ""

    def show(self, answer: Answer, new: bool) -> None:
        clouds = answer.counts
        new |= answer.gene != self._gene
        if new:
            self._gene = answer.gene
            self.ax.set_title(f"{s.safe(answer.gene, 20)}: share of cells", loc="left", fontsize=s.TEXT)
            self.board.stale(self)
        top = float(np.ceil(max(1.0, *(cells.max(initial=0.0) for cells in clouds.values()))))
        edges, height = np.linspace(0, top, _BINS + 1), 0.0
        for name, look in _looks(answer.question.reverse).items():
            cells = clouds[name]
            share = np.histogram(cells[cells > 0], edges)[0] / max(len(cells), 1)
            height = max(height, share.max())
            steps = (np.repeat(edges, 2), np.r_[0, np.repeat(share, 2), 0])
            self.lines[name].set_data(*(steps if len(cells) else ([], [])))
            self.lines[name].set_color(look["color"])
            self.samples[name].set_color(look["color"])
            zeros = f"{100 * np.mean(cells == 0):.0f} % zeros" if len(cells) else "none"
            self.zeros[name].set_text(f"{name}: {zeros}")
        self.limit((0.0, top), (0.0, s.rounded(1.6 * height)), new)


class _Energy(_Panel):
    """Where the moved cells lie between no change and the noise floor."""

    def __init__(self, board: Board, box: Box, title: str, *, below: int) -> None:
        super().__init__(board, box, title, below=below)
        self.ax.set_yticks([])
        self.start = self.line(color=s.CONTROL, marker="X", linestyle="", markersize=8)
        self.moved = self.line(color=s.PREDICTED, marker="o", linestyle="", markersize=8)
        self.floor = self.line(color=s.INK, linestyle=(0, (1, 2)), linewidth=1.4)
        self.lines = [self.text(0, -0.54 - 0.21 * i, va="center") for i in range(3)]

    def show(self, answer: Answer, new: bool) -> None:
        measured = bool(np.isfinite(answer.energy))
        values = [answer.energy, answer.energy_start, answer.floor] if measured else []
        top, low = max([0.05, *values]), min([0.0, *values])
        self.limit((-s.rounded(-low) if low < 0 else 0.0, s.rounded(1.1 * top)), (0.0, 1.0), new)
        for line, value, y in ((self.moved, answer.energy, 0.35), (self.start, answer.energy_start, 0.7)):
            line.set_data([value] if measured else [], [y] if measured else [])
        self.floor.set_data([answer.floor] * measured * 2, [0, 1] * measured)
        texts = ("no real cells of this condition", "", "")
        if measured:
            texts = (
                f"moved (o) {answer.energy:.3f}, no change (x) {answer.energy_start:.3f}",
                f"dotted: noise floor {answer.floor:.3f}; Euclidean, U",
                f"latent space, {answer.n_moved:,} moved and {answer.n_real:,} real cells",
            )
        for line, text in zip(self.lines, texts, strict=True):
            line.set_text(text)


class _Spectrum(_Panel):
    """Eigenvalues of the operator's matrix, beside the unit circle."""

    def __init__(self, board: Board, box: Box, title: str, *, below: int) -> None:
        super().__init__(board, box, title, below=below)
        turn = np.linspace(-np.pi, np.pi, 241)
        self.ax.plot(np.cos(turn), np.sin(turn), color=s.QUIET, linestyle="--", linewidth=0.8)
        self.dots = self.line(linestyle="", markersize=4, alpha=0.7, color=s.PREDICTED, marker="o")

    def show(self, answer: Answer, new: bool) -> None:
        values = answer.eigenvalues
        low, high = min(float(values.real.min()), 0.75), max(float(values.real.max()), 1.25)
        half = s.rounded(max(float(np.abs(values.imag).max()), 0.2))
        self.limit((np.floor(low * 4) / 4, np.ceil(high * 4) / 4), (-half, half), new)
        self.dots.set_data(values.real, values.imag)


def _spans(cloud: np.ndarray) -> np.ndarray:
    """(low and high, axis) that hold 99 % of the cells, with a margin."""
    low, high = np.quantile(cloud, [0.005, 0.995], axis=0)
    margin = np.where(high > low, 0.08 * (high - low), 1.0)
    return np.stack([low - margin, high + margin])
