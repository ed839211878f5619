"""Every control of every panel has words, is reached by the keyboard, and says nothing by colour alone."""

from __future__ import annotations

from collections.abc import Iterator

import ipywidgets as w
import pytest

from cellop_nb.analysis.predict import embed
from cellop_nb.data.splits import split
from cellop_nb.data.synthetic import synthetic
from cellop_nb.notebook import style
from cellop_nb.notebook.controls import RunControls
from cellop_nb.notebook.explorer import Explorer
from cellop_nb.notebook.tuning import TuningPanel
from cellop_nb.training.operators import new_operators
from cellop_nb.training.vae import new_vae

SILENT = (w.Box, w.HTML, w.Image)  # hold other widgets, or show what cannot be operated


def walk(widget) -> Iterator[w.Widget]:
    yield widget
    for child in getattr(widget, "children", ()):
        yield from walk(child)


@pytest.fixture(scope="module")
def panels(tmp_path_factory, predictor):
    """The three panels, made as the notebooks make them."""
    adata = synthetic(
        n_contexts=2, n_perturbations=2, n_cells=30, n_genes=20, n_latent=4, library=200.0, seed=0
    )
    split(adata, seed=0)
    vae = new_vae(adata, n_latent=3, n_hidden=8)
    embed(adata, vae)
    trainer = type("Idle", (), {})()
    trainer.learning_rate, trainer.weights, trainer.callbacks = (
        1e-3,
        {"kl_weight": 1.0, "stability_weight": 0.1},
        [],
    )
    folder = tmp_path_factory.mktemp("run")
    return {
        "controls": RunControls(trainer).panel,
        "tuning": TuningPanel(adata, start={"latent_dim": 3}, folder=folder).panel,
        "explorer": Explorer(predictor(adata, vae, new_operators(adata))).panel,
    }


@pytest.fixture(params=["controls", "tuning", "explorer"])
def panel(request, panels):
    return panels[request.param]


def operated(panel) -> list[w.DOMWidget]:
    """Everything that a person can operate."""
    return [part for part in walk(panel) if not isinstance(part, SILENT)]


def test_the_walk_finds_the_controls(panel):
    assert len(operated(panel)) >= 6


def test_every_control_has_a_label_of_its_own(panel):
    labels = [part.description for part in operated(panel)]
    assert all(label.strip() for label in labels)
    assert len(set(labels)) == len(labels), "two controls with the same name cannot be told apart"


def test_labels_fit_beside_their_controls(panel):
    """A label of more letters than its room would be cut off with dots."""
    for part in operated(panel):
        width = getattr(part.style, "description_width", None)
        if width:
            assert len(part.description) * 8 <= int(width.removesuffix("px")), part.description


def test_every_control_is_in_the_tab_order_and_works(panel):
    for part in operated(panel):
        assert part.tabbable is not False, part.description
        assert not part.disabled, part.description


def test_every_button_says_more_when_asked(panel):
    buttons = [part for part in operated(panel) if isinstance(part, w.Button)]
    assert buttons
    assert all(part.tooltip and part.tooltip != part.description for part in buttons)
    assert all(part.icon == "" or part.description for part in buttons), "no button is a picture alone"


def test_what_happens_is_said_in_words_that_are_read_aloud(panel):
    """A status line for screen readers, above any picture: there stands what the picture shows.

    The picture itself can have none: ipywidgets makes no view of an Image with a tooltip, and knows no alt text.
    """
    parts = list(walk(panel))
    said = [i for i, part in enumerate(parts) if isinstance(part, w.HTML) and 'role="status"' in part.value]
    pictures = [i for i, part in enumerate(parts) if isinstance(part, w.Image)]
    assert said
    assert all(min(said) < i for i in pictures)
    assert all(parts[i].tooltip is None for i in pictures)


def test_no_control_is_told_by_its_colour(panel):
    for part in operated(panel):
        assert getattr(part, "button_style", "") == ""
        assert getattr(part.style, "button_color", None) is None


def test_series_differ_by_more_than_colour():
    for look in (style.mark, style.line):
        pairs = [tuple(look(i).values()) for i in range(4)]
        for part in zip(*pairs, strict=True):
            assert len(set(part)) == 4, "colour and shape both change from series to series"
