"""Debian's chromium, driven by playwright; tests that want it are skipped where one of them is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def browser() -> Iterator[Any]:
    """A running browser, as playwright's object; closed in the end."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, chromium_sandbox=False)
        try:
            yield running
        finally:
            running.close()


@contextmanager
def opened(running: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page that must have no error of its own.

    Args:
        running: The browser.
        url: What to open.
        options: What `new_page` takes: viewport, color_scheme, ...
    """
    page = running.new_page(**options)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    try:
        page.goto(url, wait_until="load")
        yield page
    finally:
        page.close()
    assert errors == []
