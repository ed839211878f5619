"""The virtual-cell explorer: choose, move a slider, and see where the cells go.

What the widgets do are plain methods that can be called without a widget. The picture is drawn by
:class:`ExplorerPicture`; what it shows comes from :class:`VirtualCells`.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import cast

from ..analysis.cellop import CellOp
from ..analysis.combinations import RULES
from ..errors import CellopError, LabelError, StorageError, did_you_mean, three_beats
from ..files import require_room, unused, write_whole
from .controls import Panel, button, panel, sized, status_line
from .explorer_picture import ExplorerPicture
from .virtual import Answer, Question, VirtualCells

log = logging.getLogger("cellop_nb")

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

    def choose(self, first: str, second: str = NOTHING, together: str = _AXES) -> Answer:
        """Choose one perturbation, or two and how they are combined (a key of :data:`TOGETHER`)."""
        perturbation, rule = combined(first, second, together)
        return self.show(perturbation=perturbation, rule=rule or self.question.rule)

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
            raise StorageError(
                three_beats("a new file for the cells", f"{path} is there", "name another file")
            )
        cells = self.cells.to_adata(self.question)

        def write(part: Path) -> None:
            require_room(part, 2 * cells.__sizeof__())
            cells.write_h5ad(part)

        return write_whole(path, write)

    def png(self) -> bytes:
        """The present picture, small enough to be kept in a notebook."""
        with self._lock:
            return self._sheet.png(small=True)

    def figure(self):
        """The present picture as a static image with its words, for the page and for print."""
        from IPython.display import Image

        return Image(self.png(), format="png", alt=self.answer.sentence)

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
                question = replace(
                    question,
                    context=self.context.value,
                    strength=self.strength.value,
                    reverse=self.reverse.value,
                )
                gene = self.gene_box.value or None
                if (question, gene) != (self.question, self.gene) or self.refusal:
                    self._ask(question, gene)
                self._listed = lists
            except CellopError as problem:
                self.refusal = str(problem)
                self._say(f"refused: {problem}")

    def _say(self, text: str) -> None:
        self.status.value = status_line(text)

    def _export_by_button(self) -> None:
        try:
            self._say(f"saved {self.export()}: {self.question.context}, {self.question.label}")
        except CellopError as problem:
            self._say(f"refused: {problem}")

    def _build(self) -> None:
        import ipywidgets as w

        names, question = self.cells.perturbations, self.question

        def choice(options, value: str, description: str):
            return w.Dropdown(options=list(options), value=value, description=description)

        first, second, together = _parts(question, self.cells)
        self.context = choice(self.cells.contexts, question.context, "context")
        self.first = choice(names, first, "perturbation")
        self.second = choice([NOTHING, *names], second, "and")
        self.together = choice(TOGETHER, together, "how")
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
            "Export", "Write the moved cells as AnnData (.h5ad)", self._export_by_button
        )
        layout = w.Layout(width="768px", max_width="100%", align_self="flex-start")
        self.image = w.Image(value=self.picture, format="png", layout=layout)
        self.status = w.HTML()
        self._say(self.answer.sentence)
        row = w.Layout(flex_flow="row wrap", align_items="center")
        fields = [self.context, self.first, self.second, self.together, self.strength, self.gene_box]
        self._listed = self._lists()
        for widget in fields:
            sized(widget, "340px", "100px")
        for widget in (*fields, self.reverse):
            widget.observe(self._by_widget, "value")
        controls = w.HBox([*fields, self.reverse, self.export_button], layout=row)
        self.panel = panel([controls, self.status, self.image])


def combined(first: str, second: str, together: str) -> tuple[str | tuple[str, str], str]:
    """Perturbation and rule of a question about one perturbation or two; an empty rule where none applies."""
    if together not in TOGETHER:
        fix = did_you_mean(together, TOGETHER)
        raise LabelError(three_beats(f"one of {list(TOGETHER)}", repr(together), fix))
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
