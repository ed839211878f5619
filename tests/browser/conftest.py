"""A JupyterLab and a Chromium for each browser test, skipped for one reason only: there is no Chromium."""

from __future__ import annotations

import os

import pytest

from ..families import family
from .lab import Lab, chromium, launch

SECONDS = 280
"""For one test, with what it starts; on two idle cores each takes less than 40."""


@pytest.fixture
def browser(tmp_path):
    """A headless browser, ended with the test and all that the test started, or after `SECONDS`.

    Where `CELLOP_REQUIRE_BROWSER` is 1, not having a Chromium is a failure.
    """
    path = chromium()
    if path is None:
        reason = "no Chromium is installed (Debian: apt-get install chromium)"
        if os.environ.get("CELLOP_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with family(SECONDS), sync_playwright() as playwright:
        yield launch(playwright, path, tmp_path / "home")


@pytest.fixture
def desk(browser, tmp_path):
    """A running :class:`Lab`, and the browser."""
    with Lab(tmp_path / "lab") as lab:
        yield lab, browser
