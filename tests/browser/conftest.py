"""Pages are tested in a real browser: Chromium, headless, as the system has it."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed")
    # Containers run as root, where Chromium has no sandbox.
    options = {"executable_path": found, "args": ["--no-sandbox"]}
    with sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a new, empty profile; an error or a request to elsewhere fails the test."""
    faults: list[str] = []
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    yield page
    asked = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    own = page.evaluate("location.origin")
    faults += [f"asked elsewhere: {url}" for url in asked if not url.startswith(own)]
    context.close()
    assert not faults
