"""One Chromium for the browser tests, skipped for one reason only: there is none."""

from __future__ import annotations

import os

import pytest

from .lab import _FLAGS, chromium


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; where `CELLOP_REQUIRE_BROWSER` is 1, not having one is a failure."""
    path = chromium()
    if path is None:
        reason = "no Chromium is installed (Debian: apt-get install chromium)"
        if os.environ.get("CELLOP_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield chrome
        chrome.close()
