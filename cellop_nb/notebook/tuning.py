"""The tuning panel: hyper-parameters as widgets, short fits, and a table that compares them.

The widgets are made from the typed definitions in :mod:`parameters`, the ones behind the notebooks' parameters cells;
nothing about a parameter is written here.
"""

from __future__ import annotations

import contextvars
import html
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.ticker import MaxNLocator

from ..data.contract import keys_of
from ..display import styled
from ..errors import LabelError, counted, did_you_mean
from ..files import write_whole
from ..training.loop import Trainer
from ..training.operators import OperatorTrainer, Penalties, new_operators
from ..training.vae import VAETrainer, new_vae
from . import parameters
from . import style as s
from .controls import Panel, button, panel, readable, sized
from .parameters import Parameter

_FIXED = {*parameters.DATA, "seed", "run_dir", "max_epochs"}

NOTEBOOKS = {"vae": "02_train_vae", "operators": "04_train_operators"}
"""What can be tuned, and the notebook whose parameters it has."""


def vae_trainer(adata, values: Mapping) -> Trainer:
    """The trainer of 02_train_vae at these values."""
    vae = new_vae(
        adata, n_latent=values["latent_dim"], n_hidden=values["hidden"], n_layers=values["n_layers"],
        seed=values["seed"],
    )  # fmt: skip
    return VAETrainer(
        adata, vae, max_epochs=values["max_epochs"], batch_size=values["batch_size"], lr=values["learning_rate"],
        kl_weight=values["kl_weight"], seed=values["seed"], progress=False,
    )  # fmt: skip


def operator_trainer(adata, values: Mapping) -> Trainer:
    """The trainer of 04_train_operators at these values; the latents are there already."""
    penalties = Penalties(
        ridge=values["ridge"], stability_weight=values["stability_weight"], max_norm=values["max_norm"]
    )
    operators = new_operators(adata, n_axes=values["n_axes"], rank=values["rank"])
    return OperatorTrainer(
        adata, operators, max_epochs=values["max_epochs"], cells_per_group=values["cells_per_group"],
        penalties=penalties, lr=values["learning_rate"], seed=values["seed"], progress=False,
    )  # fmt: skip


TRAINERS: dict[str, Callable] = {"vae": vae_trainer, "operators": operator_trainer}


class TuningPanel(Panel):
    """Widgets for the hyper-parameters of the VAE or the operators; show it as the last line of a cell.

    Parameters
    ----------
    adata
        A screen that was set up and split, with latents for the operators.
    part
        What is tuned: "vae" or "operators".
    start
        Where the widgets start: parameters of the notebook that trains this part, its defaults where None.
    epochs
        Length of a short fit.
    folder
        Where "copy as parameters" writes; the working directory by default.

    Attributes
    ----------
    results
        One row per fit: the hyper-parameters, ``best`` (lowest monitored value), ``best_epoch``, ``epochs``,
        ``seconds``.
    histories
        History of each fit, in the same order.
    panel
        The widget.

    Raises
    ------
    LabelError
        If the data were not set up, or for a part that is not known.
    """

    about = "Tuning panel (it needs a running kernel)"

    def __init__(
        self,
        adata,
        part: str = "vae",
        *,
        start: Mapping | None = None,
        epochs: int = 5,
        folder: str | Path = ".",
    ):
        if part not in NOTEBOOKS:
            fix = did_you_mean(part, NOTEBOOKS)
            raise LabelError(f"a part among {list(NOTEBOOKS)}", repr(part), fix)
        self.part, self.notebook, self.folder = part, NOTEBOOKS[part], Path(folder)
        of_the_data = {name: value for name, value in vars(keys_of(adata)).items() if name in parameters.DATA}
        columns = list(of_the_data["context_key"] or [])
        of_the_data["context_key"] = columns if len(columns) > 1 else columns[0] if columns else None
        self.start_values = parameters.defaults(self.notebook) | of_the_data | dict(start or {})
        self.adata, every = adata, parameters.for_notebook(self.notebook)
        self.parameters = {p.name: p for p in every if p.name not in _FIXED}
        self.results = pd.DataFrame()
        self.histories: list[pd.DataFrame] = []
        self.trainer: Trainer | None = None
        self._worker: threading.Thread | None = None
        self._starting = threading.Lock()
        self._build(epochs)

    # -- what the widgets do: plain methods

    @property
    def values(self) -> dict:
        """The chosen hyper-parameters, checked.

        Raises
        ------
        ParameterError
            For a value that does not fit.
        """
        return {name: read_value(p, self.widgets[name]) for name, p in self.parameters.items()}

    def train(self, **chosen) -> pd.DataFrame:
        """Run a short fit at the chosen values, and add it to the results.

        Parameters
        ----------
        **chosen
            Values to set the widgets to before.

        Returns
        -------
        The history of the fit.

        Raises
        ------
        LabelError
            For a name that no widget has.
        ParameterError
            For a value that does not fit.
        """
        self.choose(**chosen)
        values, epochs = self.values, int(self.epochs.value)
        whole = {**self.start_values, **values, "max_epochs": epochs}
        self.trainer = TRAINERS[self.part](self.adata, whole)
        history = self.trainer.fit()
        if len(history):
            self._collect(values, history)
        return history

    def choose(self, **chosen) -> None:
        """Set widgets by name, all of them or none."""
        for name in set(chosen) - set(self.parameters):
            fix = did_you_mean(name, self.parameters)
            raise LabelError("a hyper-parameter of the notebook", repr(name), fix)
        checked = {name: self.parameters[name].check(value) for name, value in chosen.items()}
        for name, value in checked.items():
            self.widgets[name].value = shown_value(self.parameters[name], value)

    def start(self) -> None:
        """Run :meth:`train` beside the page, one fit at a time; the button says what it does."""
        with self._starting:  # two quick clicks may be handled in two threads
            if self._worker is not None and self._worker.is_alive():
                self._say("a fit is running: wait for it, or stop it")
                return
            self._say(f"training {counted(int(self.epochs.value), 'epoch')}")
            # with the click's context: without it ipykernel 7.0 publishes nothing from a thread
            fit = partial(contextvars.copy_context().run, self._safely, self.train)
            self._worker = threading.Thread(target=fit, daemon=True)
            self._worker.start()

    def stop(self) -> None:
        """End the running fit after its step; what it has reached is kept."""
        if self.trainer is not None:
            self.trainer.stop()

    def copy(self) -> Path:
        """Show the YAML of the chosen values, and write it to ``parameters.yaml`` in the folder."""
        values = {**self.start_values, **self.values}
        text = parameters.as_yaml(self.notebook, values, without=("run_dir",))
        self.text.value = text
        self.text.layout.display = None
        path = self.folder / "parameters.yaml"
        write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
        self._say(f"saved {path}: python3 -m cellop_nb run --only {self.notebook} -f {path}")
        return path

    def table(self) -> pd.DataFrame:
        """The results with the parameters that differ between fits, best first."""
        if self.results.empty:
            return self.results
        shown = self.results[[*self._varied(), "best", "best_epoch", "epochs", "seconds"]].sort_values("best")
        return shown.rename(columns={"best": f"best {self.monitor}"})

    def figure(self):
        """The monitored value of every fit over its epochs."""
        fig, (ax,) = s.canvas(height=2.8, width=s.WIDTH)
        monitor = self.monitor
        for i, history in enumerate(self.histories):
            look = s.mark(i) | s.line(i)
            ax.plot(history["epoch"] + 1, history[monitor], label=self._name(i), markersize=4)[0].update(look)
        s.few_ticks(ax, "y")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        s.label(ax, "Short fits", "epoch", s.safe(monitor))
        if self.histories:
            s.legend(ax, outside=True)
        return fig

    # -- inside

    @property
    def monitor(self) -> str:
        """Column of the histories that fits are compared by."""
        return Trainer.monitor if self.trainer is None else self.trainer.monitor

    def _varied(self) -> list[str]:
        """Parameters that differ between fits."""
        return [name for name in self.parameters if self.results[name].astype(str).nunique() > 1]

    def _name(self, fit: int) -> str:
        """A fit by its number and what tells it from the others."""
        values = {name.replace("_", " "): self.results[name].iloc[fit] for name in self._varied()}
        differing = ", ".join(f"{name} {value}" for name, value in values.items())
        return s.safe(f"fit {fit + 1}: {differing}" if differing else f"fit {fit + 1}", 40)

    def _collect(self, values: dict, history: pd.DataFrame) -> None:
        monitored = history[self.monitor]
        row = {
            **values,
            "best": float(monitored.min()),
            "best_epoch": int(history.loc[monitored.idxmin(), "epoch"]) + 1,
            "epochs": len(history),
            "seconds": float(history["seconds"].sum()),
        }
        self.histories.append(history)
        self.results = pd.concat([self.results, pd.DataFrame([row])], ignore_index=True)
        self.results.index = pd.RangeIndex(1, len(self.results) + 1, name="fit")
        self.curves.value = s.png(self.figure())
        self.curves.layout.display = None
        self.compared.value = styled(self.table(), precision=4).to_html()
        self._say(f"fit {len(self.results)}: best {self.monitor} {row['best']:.4g}")

    def _build(self, epochs: int) -> None:
        import ipywidgets as w

        start = self.start_values
        self.widgets = {name: widget_for(p, start.get(name)) for name, p in self.parameters.items()}
        row, rows = w.Layout(flex_flow="row wrap", align_items="center"), []
        for name, box in self.widgets.items():
            help_line = f'<div style="line-height:1.4">{html.escape(self.parameters[name].comment)}</div>'
            rows.append(w.HBox([box, w.HTML(help_line)], layout=row))
        self.epochs = w.BoundedIntText(value=epochs, min=1, max=100, description="epochs of a fit")
        sized(self.epochs, "300px")
        actions = [
            button("Train", "Run a short fit at these values", self.start),
            button("Stop", "End the running fit; what it has reached is kept", self.stop),
            button("Copy as parameters", "The YAML for papermill", lambda: self._safely(self.copy)),
        ]
        self.status, self.compared = w.HTML(), w.HTML()
        self.curves = w.Image(format="png", layout=w.Layout(width="768px", max_width="100%", display="none"))
        self.text = w.Textarea(rows=14, description="YAML")
        self.text.layout = w.Layout(width="768px", max_width="98%", display="none")
        self._say("ready")
        below = [self.status, self.compared, self.curves, self.text]
        self.panel = panel([*rows, self.epochs, w.HBox(actions), *below])


# -- widgets of typed parameters: range, choices and help come from the definition


def widget_for(parameter: Parameter, value: object = None):
    """The widget of a typed parameter: its range, its choices, its help; it starts at `value` or at the default."""
    import ipywidgets as w

    value = parameter.default if value is None else parameter.check(value)
    low = -(2**31) if parameter.minimum is None else parameter.minimum
    high = 2**31 if parameter.maximum is None else parameter.maximum
    if parameter.choices:
        widget = w.Dropdown(options=list(parameter.choices), value=value)
    elif parameter.type == "bool":
        widget = w.Checkbox(value=value)
    elif parameter.type == "int":
        widget = w.BoundedIntText(value=value, min=int(low), max=int(high))
    elif parameter.type == "float":
        step = abs(parameter.default) / 10 or 0.1
        widget = w.BoundedFloatText(value=value, min=float(low), max=float(high), step=step)
    else:
        widget = w.Text(value=shown_value(parameter, value))
    widget.description, widget.tooltip = readable(parameter.name), parameter.comment
    widget.layout.flex = "0 0 auto"
    return sized(widget, "300px")


def shown_value(parameter: Parameter, value: object) -> object:
    """A value as its widget holds it: what has no widget of its own is text."""
    if parameter.choices or parameter.type in ("bool", "int", "float"):
        return value
    return "none" if value is None else str(value)


def read_value(parameter: Parameter, widget) -> object:
    """The value that a widget holds, checked."""
    as_text = isinstance(widget.value, str) and not parameter.choices
    return parameter.parse(widget.value) if as_text else parameter.check(widget.value)
