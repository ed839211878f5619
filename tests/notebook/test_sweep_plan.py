"""Which runs a sweep consists of: read from text, refused where wrong, named by their content."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellop_nb.errors import LabelError
from cellop_nb.notebook.sweeps import plan as p
from cellop_nb.notebook.values import ParameterError

PARAMETERS = """width: int = 2  # how many
rate: float = 0.1
keys: list[str] = ["a"]
layer: str | None = None
data: str = "synthetic_screen"
seed: int = 0
run_dir: str = "." """


@pytest.fixture
def book(tmp_path, write_notebook):
    return write_notebook(tmp_path / "90_mine.ipynb", PARAMETERS, "width * rate")


def axes(book, *texts):
    return [p.read_axis(book, text) for text in texts]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("width=8,16, 32", (8, 16, 32)),
        ("width=0..3", (0, 1, 2, 3)),
        ("rate=1e-3,1", (1e-3, 1.0)),
        ("rate=1e-4..1e-2", p.Interval(1e-4, 1e-2)),
        ("rate=log:1e-4..1e-2", p.Interval(1e-4, 1e-2, log=True)),
        ("keys=a,b;b,c", (["a", "b"], ["b", "c"])),
        ("layer=none,counts", (None, "counts")),
    ],
)
def test_axes_are_read_in_their_types(book, text, values):
    assert p.read_axis(book, text).values == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width", "NAME=VALUES"),
        ("width=", "NAME=VALUES"),
        ("witdh=1,2", "did you mean 'width'"),
        ("width=1.5,2", "Expected int.*'1.5'"),
        ("width=4..1", "LOW below HIGH"),
        ("rate=log:-1..1", "above 0"),
        ("width=1,1", "different values"),
        ("run_dir=a,b", "set by the sweep"),
    ],
)
def test_wrong_axes_are_refused(book, text, message):
    with pytest.raises((LabelError, ParameterError), match=message):
        p.read_axis(book, text)


def test_limits_of_the_typed_parameters_hold_here_too():
    with pytest.raises(ParameterError, match="1 to 512"):
        p.read_axis("02_train_vae", "latent_dim=8,1024")


def test_a_grid_is_every_combination_and_carries_the_defaults(book):
    runs = p.plan(book, axes(book, "width=1,2", "seed=0..2"), {"rate": 0.5})
    assert [(run.values["width"], run.values["seed"]) for run in runs] == [
        (w, s) for w in (1, 2) for s in (0, 1, 2)
    ]
    assert all(run.values["rate"] == 0.5 and run.values["layer"] is None for run in runs)
    assert all("run_dir" not in run.values for run in runs)
    assert len({run.key for run in runs}) == 6


def test_a_continuous_axis_needs_sampling(book):
    with pytest.raises(LabelError, match="--random N"):
        p.plan(book, axes(book, "rate=0..1"))


@pytest.mark.parametrize("named", [[], ["width=1,2", "width=3,4"]])
def test_nothing_or_the_same_twice_is_refused(book, named):
    with pytest.raises(LabelError, match="each named once"):
        p.plan(book, axes(book, *named))
    with pytest.raises(LabelError, match="'width' named twice"):
        p.plan(book, axes(book, "width=1,2"), {"width": 3})


def test_sampling_is_seeded_and_without_repetition(book):
    chosen = axes(book, "width=0..9", "seed=0..4")
    one, two = (p.sample(chosen, 20, seed=1) for _ in range(2))
    assert one == two != p.sample(chosen, 20, seed=2)
    assert len({json.dumps(values) for values in one}) == 20
    assert len(p.sample(chosen, 500)) == 50, "a grid has no more"
    mixed = p.sample(axes(book, "rate=log:1e-4..1e-2", "width=1,2"), 30)
    assert len({json.dumps(values) for values in mixed}) == 30
    assert {values["width"] for values in mixed} == {1, 2}


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e4), st.booleans(), st.integers(0, 1000))
def test_draws_stay_inside_their_interval(low, factor, log, seed):
    import random

    interval = p.Interval(low, low * factor, log)
    source = random.Random(seed)
    assert all(interval.low <= interval.draw(source) <= interval.high for _ in range(20))


def test_log_draws_are_uniform_in_the_logarithm(book):
    import math
    import random

    interval, source = p.Interval(1e-4, 1e0, log=True), random.Random(0)
    decades = [math.floor(math.log10(interval.draw(source))) for _ in range(4000)]
    assert all(abs(decades.count(d) / 4000 - 0.25) < 0.03 for d in (-4, -3, -2, -1))


def test_a_run_is_named_by_what_its_result_depends_on(book, tmp_path, write_notebook, monkeypatch):
    def key(notebook=book, fixed=None):
        return p.plan(notebook, axes(notebook, "width=3,4"), fixed)[0].key

    first = key()
    other_grid = p.plan(book, axes(book, "seed=0..3", "width=4,3"))
    assert first in {run.key for run in other_grid}, "the same run in another grid is the same run"
    assert key(fixed={"rate": 0.1}) == first, "a default that is spelt out changes nothing"
    assert key(fixed={"rate": 0.2}) != first
    edited = write_notebook(tmp_path / "91_mine.ipynb", PARAMETERS, "width + rate")
    assert key(edited) != first
    screen = tmp_path / "screen.h5ad"
    screen.write_bytes(b"one")
    before = key(fixed={"data": str(screen)})
    screen.write_bytes(b"other")
    assert key(fixed={"data": str(screen)}) != before != first
    monkeypatch.setattr(p.cellop_nb, "__version__", "99.0.0")
    assert key() != first


def test_words_and_outputs_of_a_notebook_do_not_change_a_run(book):
    import nbformat

    before = p.plan(book, axes(book, "width=3,4"))[0].key
    notebook = nbformat.read(book, 4)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("# More words"))
    notebook.cells[-1].execution_count = 7
    nbformat.write(notebook, book)
    assert p.plan(book, axes(book, "width=3,4"))[0].key == before
