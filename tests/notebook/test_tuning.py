"""The tuning panel without a browser: one source of parameters, short fits, a table, YAML that runs."""

from __future__ import annotations

import threading
import time

import ipywidgets
import pytest
import yaml

from cellop_nb.__main__ import build_parser
from cellop_nb.data.splits import split
from cellop_nb.data.synthetic import synthetic
from cellop_nb.errors import LabelError
from cellop_nb.notebook import parameters
from cellop_nb.notebook.parameters import Parameter, ParameterError
from cellop_nb.notebook.tuning import NOTEBOOKS, TRAINERS, TuningPanel, widget_for


@pytest.fixture(scope="module")
def screen():
    adata = synthetic(
        n_contexts=2, n_perturbations=2, n_cells=40, n_genes=30, n_latent=4, library=60.0, seed=0
    )
    split(adata, seed=0)
    adata.obsm["X_nbvae"] = adata.obsm["X_truth"]
    return adata


@pytest.fixture(params=TRAINERS)
def panel(request, screen, tmp_path) -> TuningPanel:
    small = {"latent_dim": 3, "hidden": 8, "n_axes": 2, "rank": 2}
    known = parameters.defaults(NOTEBOOKS[request.param])
    start = {name: value for name, value in small.items() if name in known}
    return TuningPanel(screen, request.param, start=start, epochs=2, folder=tmp_path)


@pytest.mark.parametrize("notebook", parameters.names())
def test_every_parameter_of_every_notebook_has_a_widget(notebook):
    for parameter in parameters.for_notebook(notebook):
        widget = widget_for(parameter)
        assert widget.description
        assert widget.tooltip == parameter.comment
        if parameter.minimum is not None and parameter.type in ("int", "float"):
            assert widget.min == parameter.minimum
        if parameter.maximum is not None and parameter.type in ("int", "float"):
            assert widget.max == parameter.maximum


def test_widgets_stand_for_the_hyper_parameters_of_the_notebook(panel):
    known = {p.name for p in parameters.for_notebook(panel.notebook)}
    data = set(parameters.DATA)
    assert set(panel.widgets) == known - data - {"seed", "run_dir", "max_epochs"}
    assert panel.values == {name: panel.start_values[name] for name in panel.widgets}


def test_fits_collect_in_a_table_and_curves(panel):
    panel.train()
    panel.widgets["learning_rate"].value = 0.02
    history = panel.train()
    assert len(history) == 2
    assert panel.results["learning_rate"].tolist()[1] == 0.02
    table = panel.table()
    best = next(name for name in table if name.startswith("best "))
    assert table.columns[0] == "learning_rate"
    assert table[best].is_monotonic_increasing
    assert table[best].min() == pytest.approx(min(h[panel.trainer.monitor].min() for h in panel.histories))
    assert len(panel.figure().axes[0].lines) == 2
    assert bytes(panel.curves.value).startswith(b"\x89PNG")
    assert "learning_rate" in panel.compared.value
    assert "fit 2" in panel.status.value


def test_a_value_reaches_the_trainer(panel):
    panel.widgets["learning_rate"].value = 0.0125
    panel.train()
    assert panel.trainer.learning_rate == 0.0125
    assert panel.trainer.max_epochs == 2


def test_yaml_is_what_the_command_reads(panel):
    panel.train()
    panel.widgets["learning_rate"].value = 0.03
    chosen = yaml.safe_load(panel.copy().read_text())
    expected = {**panel.start_values, "learning_rate": 0.03}
    assert chosen == {name: value for name, value in expected.items() if name != "run_dir"}
    assert parameters.validate(panel.notebook, chosen) == chosen
    assert yaml.safe_load(panel.text.value) == chosen


def test_the_copied_command_can_be_given_to_the_shell(panel):
    """Its options are those of the command line, and its file is read."""
    path = panel.copy()
    words = panel.status.value.split("python3 -m cellop_nb ")[1].split("<")[0].split()
    arguments = build_parser().parse_args(words)
    arguments.check(arguments)
    assert words[0] == "run"
    assert arguments.only == panel.notebook
    assert str(path) in words


def test_the_button_trains_beside_the_page_one_fit_at_a_time(panel):
    panel.epochs.value = 100
    panel.start()
    while panel.trainer is None or not panel.trainer.rows:
        panel._worker.join(0.01)
    panel.start()
    assert "a fit is running" in panel.status.value
    panel.stop()
    panel._worker.join(30)
    assert 1 <= len(panel.histories[0]) < 100
    assert len(panel.results) == 1


def test_two_clicks_that_two_threads_handle_at_once_start_one_fit(panel, monkeypatch):
    """As ipykernel 7.4 does; the first is between looking and starting when the second comes."""
    say, runs, done = panel._say, [], threading.Event()

    def slowly(text):
        time.sleep(0.2)
        say(text)

    def train():
        runs.append(1)
        done.wait(10)

    monkeypatch.setattr(panel, "_say", slowly)
    monkeypatch.setattr(panel, "train", train)
    clicks = [threading.Thread(target=panel.start) for _ in range(2)]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join(10)
    done.set()
    panel._worker.join(10)
    assert runs == [1]


def test_what_is_not_trained_is_refused(screen):
    with pytest.raises(LabelError, match="vae.*operators"):
        TuningPanel(screen, "data")


def test_text_is_parsed_and_refused_as_on_the_command_line(panel):
    parameter = Parameter("axes", "int | None", None, "how many", minimum=1)
    panel.parameters, panel.widgets = {"axes": parameter}, {"axes": widget_for(parameter)}
    assert panel.values == {"axes": None}
    panel.widgets["axes"].value = "3"
    assert panel.values == {"axes": 3}
    panel.widgets["axes"].value = "-1"
    with pytest.raises(ParameterError, match="axes"):
        _ = panel.values
    panel._safely(lambda: panel.values)
    assert "refused: " in panel.status.value


def test_choices_become_a_list():
    choice = parameters.parameter("07_virtual_cells", "together")
    assert isinstance(widget_for(choice), ipywidgets.Dropdown)


def test_a_call_sets_the_widgets_and_the_curves_say_what_differs(panel):
    panel.train(learning_rate=0.01)
    panel.train(learning_rate=0.03)
    assert panel.widgets["learning_rate"].value == 0.03
    assert panel.results["learning_rate"].tolist() == [0.01, 0.03]
    labels = [line.get_label() for line in panel.figure().axes[0].lines]
    assert labels == ["fit 1: learning rate 0.01", "fit 2: learning rate 0.03"]
    name = next(name for name in panel.parameters if panel.parameters[name].type == "int")
    panel.train(**{name: panel.values[name] + 1})
    last = panel.figure().axes[0].lines[-1].get_label()
    assert last.endswith(f"{name.replace('_', ' ')} {panel.values[name]}, learning rate 0.03"), last


def test_a_call_with_a_wrong_name_or_value_changes_nothing(panel):
    before = panel.values
    with pytest.raises(LabelError, match="learning_rate"):
        panel.choose(learnig_rate=0.1)
    with pytest.raises(ParameterError):
        panel.choose(batch_size=-1) if "batch_size" in panel.widgets else panel.choose(rank=-1)
    assert panel.values == before
    assert panel.results.empty
