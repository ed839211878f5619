"""The virtual-cell explorer: choose, move a slider, and see where the cells go.

What the widgets do are plain methods that can be called without a widget; what is shown comes from
:class:`VirtualCells`.
"""

from __future__ import annotations

import textwrap
import threading
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ..analysis.cellop import CellOp
from ..analysis.combinations import RULES
from ..errors import CellopError, LabelError, StorageError, did_you_mean
from ..files import require_room, unused, write_whole
from . import style as s
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
    ):
        self.cells = VirtualCells(model)
        self.folder, self.gene = Path(folder), gene or None
        self._sheet, self._lock = ExplorerPicture(), threading.RLock()
        self._following = False
        first = perturbation or self.cells.perturbations[0]
        both, rule = combined(cast(str, first), second, together) if second else (first, "")
        start = context or self.cells.contexts[0]
        self._ask(Question(both, start, float(strength), rule or "axes", bool(reverse)), self.gene)
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
            return Image(s.png(self._sheet.figure), format="png", alt=self.answer.sentence)

    # -- inside

    def _ask(self, question: Question, gene: str | None) -> None:
        self.answer: Answer = self.cells.ask(question, gene=gene)
        self.question, self.gene, self.refusal = question, gene, ""
        shown = hasattr(self, "panel")
        if shown:  # the words first: the browser lays them out while the picture is drawn
            self._say(self.answer.sentence)
        self.picture = self._sheet.png(self.answer)
        if shown:
            self.image.value = self.picture

    def _follow(self) -> None:
        """Set the widgets to the question that a call has asked."""
        question, self._following = self.question, True
        try:
            self.context.value, self.strength.value = question.context, question.strength
            self.reverse.value, self.gene_box.value = question.reverse, self.gene or ""
            self.first.value, self.second.value, together = _parts(question, self.cells)
            self.together.value = together if self.second.value != NOTHING else self.together.value
        finally:
            self._following = False

    def _by_widget(self, _=None) -> None:
        """Ask what the widgets say; a refusal is said below them, and the picture stays.

        ipykernel 7.4 handles quick moves in two threads at once: each asks what all widgets say when its turn
        comes, so the last one has seen every move.
        """
        with self._lock:
            if self._following:  # the widget follows the question, not the other way round
                return
            try:
                perturbation, rule = combined(self.first.value, self.second.value, self.together.value)
                question = Question(
                    perturbation, self.context.value, self.strength.value, rule or "axes", self.reverse.value
                )
                gene = self.gene_box.value or None
                if (question, gene) != (self.question, self.gene) or self.refusal:
                    self._ask(question, gene)
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


# -- the picture of one answer: map, genes, one gene's counts, energy distance

N_GENES = 8  # a side
_BINS = 18
_WIDTH, _HEIGHT = 768, 620
_BOXES = {
    "map": (34, 98, 380, 300),
    "genes": (536, 98, 216, 300),
    "counts": (52, 462, 320, 108),
    "energy": (436, 462, 300, 50),
}
"""Left, top, width and height of each panel, in pixels of the page from the figure's top left corner."""
_LINES = {"start": ":", "real": "--", "moved": "-"}
_NAMES = {"start": "control cells", "real": "real perturbed cells", "moved": "control cells, moved"}
_REVERSED = {"start": "perturbed cells", "real": "real control cells", "moved": "perturbed cells, led back"}


def _looks(reverse: bool) -> dict[str, dict[str, str]]:
    """Colour and marker of each cloud: what cells are, not where they start, decides."""
    control, real = {"color": s.CONTROL, "marker": "X"}, {"color": s.REAL, "marker": "s"}
    start, target = (real, control) if reverse else (control, real)
    return {"start": start, "real": target, "moved": {"color": s.PREDICTED, "marker": "o"}}


def _bounds(box: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
    left, top, width, height = box
    return left / _WIDTH, 1 - (top + height) / _HEIGHT, width / _WIDTH, height / _HEIGHT


class ExplorerPicture:
    """The picture of an answer; its limits only grow, and its genes stay, while the strength alone changes."""

    def __init__(self) -> None:
        size = _WIDTH / s.DPI, _HEIGHT / s.DPI
        self.figure = s.NotebookFigure(figsize=size, dpi=2 * s.DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = {name: s.plain_axes(self.figure.add_axes(_bounds(box))) for name, box in _BOXES.items()}
        self.leaders: list[str] = []
        self._asked: Question | None = None
        self._strength = 0.0
        self._limits: dict[str, np.ndarray] = {}

    def png(self, answer: Answer) -> bytes:
        """Draw an answer, as PNG at twice its size on the page."""
        question = answer.question
        full = replace(question, strength=1.0)
        if full != self._asked:
            self._asked, self._strength, self._limits = full, -1.0, {}
        if question.strength > self._strength:  # a weaker dose shows the genes of the stronger one
            self.leaders, self._strength = list(leading(answer.genes, N_GENES)["gene"]), question.strength
        for part in (self.figure, *self.axes.values()):
            for artist in [*part.lines, *part.patches, *part.texts, *getattr(part, "collections", ())]:
                artist.remove()
        self._words(answer)
        for name, draw in zip(_BOXES, (self._map, self._genes, self._counts, self._energy), strict=True):
            draw(self.axes[name], answer)
        file = BytesIO()
        s.finish(self.figure).savefig(file, format="png", pil_kwargs={"compress_level": 1})
        return file.getvalue()

    def _words(self, answer: Answer) -> None:
        """What was asked, what is known about the answer, and how stable the operator is."""
        question = answer.question
        colour = s.VERMILION if answer.standing == "prediction" else s.INK
        lines = [
            (12, 15, s.safe(f"{question.context}: {question.label}", 90), s.TITLE, s.INK),
            (12, 35, s.safe(answer.why, 120), s.TEXT, colour),
            (436, 598, "\n".join(textwrap.wrap(s.safe(answer.verdict, 99), 50)), s.SMALL, s.INK),
        ]
        for x, y, text, size, ink in lines:
            self.figure.text(x / _WIDTH, 1 - y / _HEIGHT, text, fontsize=size, color=ink, va="center")

    def _limit(self, ax: Axes, name: str, x: tuple[float, float], y: tuple[float, float]) -> None:
        """Show at least these spans, and what was shown since more than the strength changed."""
        spans = np.array([x, y], dtype=float)
        before = self._limits.get(name, spans)
        low, high = np.minimum(spans[:, 0], before[:, 0]), np.maximum(spans[:, 1], before[:, 1])
        self._limits[name] = np.stack([low, high], axis=1)
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))

    def _map(self, ax: Axes, answer: Answer) -> None:
        """Source cells, the same cells moved, and the real ones, in the plane that was fitted once."""
        names, handles = _REVERSED if answer.question.reverse else _NAMES, []
        clouds = {name: getattr(answer, name) for name in _NAMES}
        for name, look in _looks(answer.question.reverse).items():
            dots = {"linestyle": "", "markersize": 2.6, "alpha": 0.4, "markeredgewidth": 0, **look}
            ax.plot(*clouds[name].T)[0].update(dots)
            handles.append(s.sample(f"{names[name]} ({len(clouds[name]):,})", {**look, "linestyle": ""}))
        means = {name: cloud.mean(0) for name, cloud in clouds.items() if len(cloud)}
        ax.plot(*np.stack([means["start"], means["moved"]]).T, color=s.INK, linewidth=1.2)
        big = {"linestyle": "", "markersize": 10, "markeredgecolor": "white", "markeredgewidth": 1.4}
        for name, mean in means.items():
            ax.plot(*mean)[0].update(_looks(answer.question.reverse)[name] | big)
        spans = np.array(
            [np.quantile(cloud, [0.005, 0.995], axis=0) for cloud in clouds.values() if len(cloud)]
        )
        low, high = spans[:, 0].min(0), spans[:, 1].max(0)
        _, _, width, height = _BOXES["map"]
        half = 0.58 * max(
            (high - low)[0] / width, (high - low)[1] / height, 1e-9
        )  # of one pixel: equal scales
        across, up = (low + high) / 2
        x, y = (across - half * width, across + half * width), (up - half * height, up + half * height)
        self._limit(ax, "map", x, y)
        s.label(ax, "", "response direction 1", "response direction 2").set(xticks=[], yticks=[])
        s.legend(ax, *handles, columns=2, loc="lower left", bbox_to_anchor=(-0.07, 1.0))

    def _genes(self, ax: Axes, answer: Answer) -> None:
        """The genes that rise and fall most, their interval, and what the real cells show."""
        rows = answer.genes.set_index("gene").loc[self.leaders]
        y, change = np.arange(len(rows)), rows["change"].to_numpy()
        ax.barh(y, change, height=0.7, color=np.where(change > 0, s.RISE, s.FALL))
        ax.hlines(y, rows["low"], rows["high"], color=s.INK, linewidth=1.2)
        diamond = {"marker": "D", "linestyle": "", "markersize": 5, "color": s.REAL, "markeredgecolor": s.INK}
        ax.plot(rows["measured"], y, markeredgewidth=0.6)[0].update(diamond)
        ax.axvline(0, color=s.QUIET, linewidth=0.8)
        values = rows[["change", "low", "high", "measured"]].abs().to_numpy(dtype=float)
        top = s.rounded(max(float(np.nanmax(values, initial=0.0)), 0.1))
        self._limit(ax, "genes", (-top, top), (-0.5, 2 * N_GENES - 0.5))
        ax.invert_yaxis()
        s.few_ticks(ax, "x", 4)
        s.long_names(ax, rows.index, "y", 14)
        handles = [
            s.sample("change; calibrated 95 % interval at strength 1", {"color": s.INK, "linewidth": 1.2}),
            s.sample("measured in the real cells (full strength)", diamond),
        ]
        s.label(ax, "", "change of mean log1p counts per 10,000").xaxis.label.set_size(s.SMALL)
        s.legend(ax, *handles, loc="lower left", bbox_to_anchor=(-0.4, 1.0))

    def _counts(self, ax: Axes, answer: Answer) -> None:
        """One gene in the three clouds: cells with counts by log1p-CP10k, and the share without in words."""
        top = float(np.ceil(max(1.0, *(cells.max(initial=0.0) for cells in answer.counts.values()))))
        edges, height = np.linspace(0, top, _BINS + 1), 0.0
        for name, look in _looks(answer.question.reverse).items():
            cells = answer.counts[name]
            share = np.histogram(cells[cells > 0], edges)[0] / max(len(cells), 1)
            zeros = f"{100 * np.mean(cells == 0):.0f} % zeros" if len(cells) else "none"
            style = {"color": look["color"], "linestyle": _LINES[name], "linewidth": 1.6}
            ax.stairs(share, edges, label=f"{name}: {zeros}", **style)
            height = max(height, share.max())
        self._limit(ax, f"counts of {answer.gene}", (0.0, top), (0.0, s.rounded(1.8 * height)))
        s.few_ticks(ax, n=4)
        s.legend(ax, loc="upper right")
        s.label(ax, f"{s.safe(answer.gene, 20)}: share of cells", "log1p counts per 10,000")

    def _energy(self, ax: Axes, answer: Answer) -> None:
        """Where the moved cells lie between no change and the noise floor."""
        s.label(ax, "energy distance to the real cells").set(yticks=[])
        text = "no real cells of this condition"
        if np.isfinite(answer.energy):
            values = answer.energy, answer.energy_start, answer.floor
            self._limit(ax, "energy", (min(0.0, *values), s.rounded(1.1 * max(0.05, *values))), (0.0, 1.0))
            dots = {"linestyle": "", "markersize": 8}
            ax.plot(answer.energy, 0.35, color=s.PREDICTED, marker="o")[0].update(dots)
            ax.plot(answer.energy_start, 0.7, color=s.CONTROL, marker="X")[0].update(dots)
            ax.axvline(answer.floor, color=s.INK, linestyle=(0, (1, 2)), linewidth=1.4)
            text = (
                f"moved (o) {answer.energy:.3f}, no change (x) {answer.energy_start:.3f}\n"
                f"dotted: noise floor {answer.floor:.3f}; Euclidean, U\n"
                f"latent space, {answer.n_moved:,} moved and {answer.n_real:,} real cells"
            )
        s.few_ticks(ax, "x", 4)
        s.note(ax, 0, -0.45, text)
