"""Debian's Chromium, driven by playwright, and what it complains about."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from tests.integration import debian
from tests.integration.debian import RefusedError

_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 120_000
_CHECKS = (Path(__file__).parent / "page_checks.js").read_text()


def chromium() -> str:
    """Where it is; installed if it is missing and we may, else the tests that need it are skipped."""
    for name in ("chromium", "chromium-browser"):
        if found := shutil.which(name):
            return found
    try:
        debian.install({"chromium": "chromium"}, "fonts-dejavu-core")
    except RefusedError as error:
        pytest.skip(str(error))
    found = shutil.which("chromium")
    assert found, "apt-get has installed no chromium"
    return found


@contextmanager
def launched() -> Iterator[Browser]:
    """A browser without a window, whose pages have time: the machine may be busy."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


def look(page: Page, check: str) -> Any:
    """What one of page_checks.js finds on a page."""
    return page.evaluate(f"({_CHECKS.strip()}).{check}()")


class Watched:
    """A page, and everything that should not happen on it: errors, refused content, requests to elsewhere, dialogs."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        context.set_default_timeout(PATIENCE_MS)
        self.page: Page = context.new_page()
        self.wrong: list[str] = []
        self._url = url
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self._asked(request.url))

    def open(self, path: str) -> Page:
        """Go there."""
        self.page.goto(self._url + path)
        return self.page

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(f"{message.type}: {message.text}")

    def _asked(self, url: str) -> None:
        if not url.startswith(self._url):
            self.wrong.append(f"request to {url}")


@dataclass(frozen=True)
class Walker:
    """Somebody who has a keyboard and nothing else."""

    page: Page

    def focused(self) -> str:
        """The id of what has the focus, or its text."""
        found: str = self.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
        return found

    def walk_to(self, what: str, key: str = "Tab") -> None:
        """Press the key until that has the focus."""
        for _ in range(80):
            self.page.keyboard.press(key)
            if self.focused() == what:
                return
        raise AssertionError(f"{what} is not reached; the focus is on {self.focused()!r}")

    def follow(self, link: str, address: str) -> None:
        """Go where a link leads."""
        self.walk_to(link)
        self.page.keyboard.press("Enter")
        self.page.wait_for_url(address)

    def confirm(self, action: str, state: str) -> None:
        """Use one of a job's buttons, which ask first, and wait for the state that comes of it."""
        self.walk_to(f"{action}-open")
        self.page.keyboard.press("Enter")
        self.page.keyboard.press("Tab")
        assert self.focused() == f"{action}-sure"
        self.page.keyboard.press("Enter")
        expect(self.page.locator("#state .head .state")).to_have_text(state)
