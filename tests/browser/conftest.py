"""Pages are tested in a real browser: Chromium, headless, as the system has it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Containers run as root, where Chromium has no sandbox. The rest keeps it from asking the network.
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# Not of the session: Playwright keeps an event loop in the main thread, where `asyncio.run` of a
# later test would fail.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is installed (make browser)")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=found, args=_ARGUMENTS) as browser,
    ):
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
    # Pages in files have no origin, and ask for nothing.
    own = page.evaluate("location.protocol === 'file:' ? 'file:' : location.origin")
    faults += [f"asked elsewhere: {url}" for url in asked if not url.startswith(own)]
    context.close()
    assert not faults


@pytest.fixture
def opened_file(page: Page):
    """Opens a page that is a file, at a width in pixels, in a scheme of colours."""

    def open_file(file: Path, width: int = 1000, scheme: str = "light") -> Page:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.goto(file.resolve().as_uri())
        return page

    return open_file
