"""Run controls: stop a training, pause it, change its learning rate and loss weights, draw or save now.

A widget's callback only sets a flag or a number, which the training reads at the end of its step. The same
methods can be called without any widget, and where there is no front end (papermill) the training simply
runs to its end. What other panels of widgets need as well stands at the end of this file.
"""

from __future__ import annotations

import html
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellop_nb.errors import CellopError
from cellop_nb.notebook.live import LivePlot, duration
from cellop_nb.training.callbacks import Callback

if TYPE_CHECKING:
    from ipywidgets import HTML, VBox

log = logging.getLogger("cellop_nb")

_RESTING = {"idle", "paused", "finished", "stopped", "failed"}


class Panel:
    """What a notebook shows of an object with widgets: its `panel`; a file or a printed page shows `about` instead."""

    about = ""
    panel: VBox
    status: HTML

    def _say(self, text: str) -> None:
        """A line that is read aloud."""
        self.status.value = status_line(text)

    def _safely(self, action: Callable[[], object]) -> None:
        """Run a widget's action; what is refused is said."""
        try:
            action()
        except (CellopError, ArithmeticError) as problem:
            self._say(f"refused: {problem}")

    def _repr_mimebundle_(self, include=None, exclude=None):
        bundle = self.panel._repr_mimebundle_(include=include, exclude=exclude)
        data, *rest = bundle if isinstance(bundle, tuple) else (bundle,)
        data = {**data, "text/plain": self.about}
        return (data, *rest) if rest else data


class RunControls(Panel, Callback):
    """Buttons and sliders for a trainer; show it in a cell of its own, then ``await trainer.fit_async()``.

    Parameters
    ----------
    trainer
        Anything with `stop`, `pause`, `resume`, `change`, `learning_rate`, `weights` and `save_checkpoint`.
        The controls add themselves to its `callbacks`. It records what was changed: ``trainer.changes``.
    live
        Picture for "draw now"; the trainer's own `LivePlot` by default.
    checkpoint
        File for "save checkpoint"; `by_hand.pt` in the trainer's folder by default.
    clock
        Seconds as a function, for tests.

    Attributes
    ----------
    panel
        The widget.
    """

    about = "Run controls (they need a running kernel)"

    def __init__(
        self,
        trainer,
        *,
        live: LivePlot | None = None,
        checkpoint: str | Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.trainer, self._live = trainer, live
        self.checkpoint = Path(checkpoint or Path(getattr(trainer, "folder", None) or ".") / "by_hand.pt")
        self._clock, self._said, self._start = clock, -math.inf, clock()
        self._save, self._unheard = threading.Event(), False
        self._build()
        if self not in trainer.callbacks:
            trainer.callbacks.append(self)

    # -- what the controls do: plain methods

    def stop(self) -> None:
        """End after the current step; model and history stay usable."""
        self.trainer.stop()

    def pause(self) -> None:
        """Hold after the current step."""
        self.trainer.pause()
        self._label_pause("Resume", "Go on training")

    def resume(self) -> None:
        """Go on after a pause."""
        self.trainer.resume()
        self._label_pause("Pause", "Hold after the current step")

    def toggle_pause(self) -> None:
        """Pause or resume, whichever the button says."""
        (self.pause if self.pause_button.description == "Pause" else self.resume)()

    def draw_now(self) -> None:
        """Draw the live picture at the end of the current step."""
        if self.live is not None:
            self.live.draw_now(self.trainer)

    def save_checkpoint(self) -> None:
        """Save at the end of the current step, or at once while the training rests."""
        self._save.set()
        if self.trainer.status in _RESTING:
            self._save_if_asked()

    @property
    def live(self) -> LivePlot | None:
        """The picture that "draw now" draws."""
        return self._live or next((c for c in self.trainer.callbacks if isinstance(c, LivePlot)), None)

    # -- hooks, called by the training in its own thread

    def on_fit_start(self, trainer) -> None:
        """Make the controls answer during this fit, or say why they cannot."""
        self._start, self._said = self._clock(), -math.inf
        free_comms([self.panel])
        blocking = threading.current_thread() is threading.main_thread()
        self._write(self.note, kernel_note(ipykernel_version(), blocking=blocking))
        self._write(self.status, "training has started")

    def on_step_end(self, trainer) -> None:
        """Save if asked to; write the status a few times per second."""
        self._save_if_asked()
        if self._clock() - self._said >= 0.25:
            self._write_status(trainer)

    def on_pause(self, trainer) -> None:
        """Say that it holds, and with which settings it will go on."""
        self._write_status(trainer)

    def on_fit_end(self, trainer) -> None:
        """Say how it ended."""
        self._save_if_asked()
        self._write_status(trainer)

    # -- inside

    def _save_if_asked(self) -> None:
        if self._save.is_set():
            self._save.clear()
            try:
                self.trainer.save_checkpoint(self.checkpoint)
                self._write(self.note, f"saved {self.checkpoint} after step {self.trainer.step:,}")
            except CellopError as problem:  # a full disk: the training need not end for it
                self._write(self.note, f"not saved: {problem}")

    def _write_status(self, trainer) -> None:
        self._said = self._clock()
        monitor, rows = trainer.monitor, trainer.rows
        parts = [
            trainer.status,
            f"epoch {trainer.epoch} of {trainer.max_epochs}",
            f"step {trainer.step:,}",
            f"learning rate {trainer.learning_rate:.3g}",
            f"{monitor} {rows[-1][monitor]:.4g}" if rows and monitor in rows[-1] else "",
            duration(self._clock() - self._start),
            getattr(trainer, "stop_reason", ""),
        ]
        self._write(self.status, " | ".join(part for part in parts if part))

    def _write(self, label, text: str) -> None:
        """Write to a label that is no control: a control that speaks during the fit would go deaf."""
        try:
            label.value = status_line(text)
        except Exception:  # the page cannot be reached: no reason to end a training
            if not self._unheard:
                log.warning("RunControls cannot write to the page; the training goes on.", exc_info=True)
            self._unheard = True

    def _label_pause(self, description: str, tooltip: str) -> None:
        self.pause_button.description, self.pause_button.tooltip = description, tooltip

    def _build(self) -> None:
        from ipywidgets import HTML, HBox, Layout

        self.stop_button = button("Stop", "End after the current step; the model stays usable", self.stop)
        self.pause_button = button("Pause", "Hold after the current step", self.toggle_pause)
        self.draw_button = button("Draw now", "Draw the live picture at the end of the step", self.draw_now)
        self.save_button = button("Save checkpoint", "Save model and history", self.save_checkpoint)
        self.rate_slider = rate_slider(self.trainer.learning_rate)
        weights = self.trainer.weights.items()
        self.weight_sliders = {name: weight_slider(readable(name), value) for name, value in weights}
        sliders = {"learning_rate": self.rate_slider, **self.weight_sliders}
        for name, slider in sliders.items():
            slider.observe(lambda change, name=name: self.trainer.change(name, change["new"]), "value")
            sized(slider, "460px").continuous_update = False
        self.status, self.note = HTML(), HTML()
        self._say("ready")
        buttons = [self.stop_button, self.pause_button, self.draw_button, self.save_button]
        row = HBox(buttons, layout=Layout(flex_flow="row wrap"))
        self.panel = panel([row, *sliders.values(), self.status, self.note])


def rate_slider(rate: float):
    """From a thousandth to a hundredfold of the present rate, which lies on a step.

    A slider whose value is off its grid is moved onto it by the front end, and then refuses later changes.
    """
    from ipywidgets import FloatLogSlider

    low = round(math.log10(rate), 6) - 3
    return FloatLogSlider(
        base=10, min=low, max=low + 5, step=0.1, value=10 ** (low + 3), description="learning rate",
        readout_format=".2e",
    )  # fmt: skip


def weight_slider(name: str, value: float):
    """From zero to twice the present weight in forty steps, the twentieth of which is the present one."""
    from ipywidgets import FloatSlider

    step = (value if value > 0 else 1.0) / 20
    present = 20 * step if value > 0 else 0.0
    return FloatSlider(
        description=name, min=0.0, max=40 * step, step=step, value=present, readout_format=".3g"
    )


def free_comms(widgets: Iterable) -> int:
    """Let the clicks of `widgets` and their children be answered while a cell is awaited.

    ipykernel 7.4 sends a widget's messages to the loop that last spoke for it, which for a widget made in an
    ordinary cell is the main loop: busy until the cell ends. Forgetting that loop gives the messages back
    to the front end's own. Harmless elsewhere.

    Returns
    -------
    The number of widgets that had been tied to a loop.
    """
    freed = 0
    for widget in widgets:
        comm = getattr(widget, "comm", None)
        if comm is not None and "_reply_subshell_id" in vars(comm):
            del comm._reply_subshell_id
            freed += 1
        freed += free_comms(getattr(widget, "children", ()))
    return freed


def kernel_note(version: str | None, *, blocking: bool) -> str:
    """What the controls cannot do on this ipykernel; empty where everything works (or there is no kernel)."""
    if version is None:
        return ""
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if release < (7, 0):
        return (
            f"ipykernel {version} holds clicks back until the cell ends: only the stop square works. "
            "Install ipykernel 7.1 or later and restart the kernel."
        )
    if release >= (7, 4) and blocking:
        return (
            f"ipykernel {version} holds back clicks during trainer.fit(): "
            "use `await trainer.fit_async()`, or the stop square."
        )
    return ""


def ipykernel_version() -> str | None:
    """Version of the kernel that this code runs in; None outside a notebook."""
    import sys

    if "ipykernel" not in sys.modules or "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    return sys.modules["ipykernel"].__version__ if hasattr(get_ipython(), "kernel") else None


# -- what the panels share: buttons with names, lines that are read aloud, colours of either theme

_ARROW = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 18 18'>"
    "<path d='M5 7 L9 11 L13 7' fill='none' stroke='%23808080' stroke-width='2'/></svg>"
)
_LOOK = (
    f"""<style>.cellop-panel {{ --jp-widgets-dropdown-arrow: url("data:image/svg+xml,{_ARROW}"); }}</style>"""
)


def panel(children: Sequence):
    """The parts of a panel below each other.

    The arrow of a drop-down list is grey: that of ipywidgets is black in a dark theme too.
    """
    from ipywidgets import HTML, Layout, VBox

    box = VBox([*children, HTML(_LOOK, layout=Layout(display="none"))])
    box.add_class("cellop-panel")
    return box


def sized(widget, width: str, label_width: str = "140px"):
    """The widget, made so wide, with so much room for its label."""
    widget.layout.width, widget.style.description_width = width, label_width
    return widget


def status_line(text: str) -> str:
    """HTML of words that a screen reader reads out when they change."""
    return f'<div role="status" style="line-height:1.4">{html.escape(text)}</div>'


def button(description: str, tooltip: str, action: Callable[[], object]):
    """A button with words, and more words for who points at it."""
    from ipywidgets import Button, Layout

    button = Button(description=description, tooltip=tooltip, layout=Layout(width="auto"))
    button.on_click(lambda _: action())
    return button


def readable(name: str) -> str:
    """A setting's name for people; letters that HTML would read as markup are escaped."""
    return html.escape(name.replace("_", " "))
