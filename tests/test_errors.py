"""Every bad input of the catalogue is refused in three beats, and leaves nothing half-written behind."""

from __future__ import annotations

import pytest

from cellop_nb.errors import did_you_mean, three_beats

from . import bad_inputs

CASES = bad_inputs.CASES


@pytest.mark.parametrize("one", CASES, ids=lambda one: f"{one.area}: {one.title}")
@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::PendingDeprecationWarning"
)
def test_a_bad_input_is_refused_in_three_beats_and_leaves_nothing(one, tmp_path):
    place = bad_inputs.Place(tmp_path.resolve())
    text = bad_inputs.message(one, place)
    beats = [text.find(beat) for beat in ("Expected ", " Found ", " To fix it: ")]
    assert beats == sorted(beats)
    assert min(beats) >= 0, text
    assert f" Found {one.found}" in text, text
    assert not one.found or f" Found {one.found}. To fix it: " in text, text
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1, text
    assert text.endswith((".", "?")), text
    left = {
        str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert left == place.given


def test_the_catalogue_covers_the_whole_surface():
    titles = [one.title for one in CASES]
    assert len(set(titles)) == len(titles) >= 40
    assert len({one.area for one in CASES}) == 10


def test_the_page_shows_what_a_person_sees():
    """The docs command writes this page from the cases themselves."""
    page = bad_inputs.page({"Files": [("a <script> of *stars*", "Expected a. Found <b>.")]})
    assert "## Files" in page
    assert "**A \\<script\\> of" in page
    assert "> Expected a. Found \\<b\\>." in page


def test_sentences_end_once():
    assert three_beats("a", "b", "did you mean 'c'?").endswith("'c'?")
    assert three_beats("a", "b", "pass layer=...").endswith("layer=...")
    assert three_beats("a", "b.", "c") == "Expected a. Found b. To fix it: c."


def test_close_matches_are_suggested():
    assert did_you_mean("celltype", ["cell_type", "donor"]) == "did you mean 'cell_type'?"
    assert did_you_mean("x", []) == "there are none"
    assert did_you_mean("zzz", ["a", "b"]) == "known: 'a', 'b'"
