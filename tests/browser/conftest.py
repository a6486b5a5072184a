"""A real browser before a real gateway, with a worker on the bundled model behind it; one of each for these tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

from calotype.embedded import EmbeddedServers
from tests.faults.harness import Forge
from tests.integration.gateway import Gateway, own_settings

_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE = 60_000  # milliseconds, on a busy machine


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Debian's Chromium. For these tests alone: while it is driven, this thread has a running event loop."""
    chromium = shutil.which("chromium")
    if chromium is None:
        missing = "Chromium is not installed; apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def hold_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hold") / "hold"


@pytest.fixture
def hold(hold_file: Path) -> Iterator[Path]:
    """Jobs stay at their third step while this file is there, however long the browser takes."""
    hold_file.touch()
    yield hold_file
    hold_file.unlink(missing_ok=True)


@pytest.fixture(scope="package")
def site(
    servers: EmbeddedServers, forge: Forge, hold_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    """The gateway; its worker has eight rows, and no time to measure whether fewer serve."""
    settings = own_settings(servers)
    own = {**settings.environment(), "OMP_NUM_THREADS": "1", "CALOTYPE_WORKER_PROFILE_SECONDS": "0"}
    environment = {**os.environ, **servers.environment, **own, "TEST_HOLD": str(hold_file)}
    log = tmp_path_factory.mktemp("browser") / "worker.log"
    options = ["--model", "demo", "--max-rows", "8"]
    worker = forge.start(options, environment=environment, log=log, stops=["held"])
    gateway = Gateway(settings)
    try:
        worker.wait_for("worker ready", 180)
        yield gateway
    finally:
        gateway.stop()
        worker.kill()


class Visit:
    """A page, and what is not to happen on it: errors, and requests that leave the gateway and its images."""

    def __init__(self, browser: Browser, site: Gateway, **options: object) -> None:
        self.site = site
        self.complaints: list[str] = []
        self.expected: list[str] = []  # complaints that a test asks for, by a part of them
        own = {urlsplit(site.url).netloc, urlsplit(str(site.settings.s3_endpoint_url)).netloc}
        self._origins = own
        self._context = browser.new_context(**options)  # type: ignore[arg-type]
        self._context.set_default_timeout(PATIENCE)
        self.page: Page = self._context.new_page()
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._on_request)

    def open(self, view: str = "create", url: str | None = None) -> Page:
        self.page.goto(f"{url or self.site.url}/#/{view}")
        return self.page

    def allow(self, url: str) -> None:
        """Another gateway."""
        self._origins.add(urlsplit(url).netloc)

    def close(self) -> None:
        self._context.close()
        left = [line for line in self.complaints if not any(part in line for part in self.expected)]
        assert left == []

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _on_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https") and parts.netloc not in self._origins:
            self.complaints.append(f"left for {request.url}")


@pytest.fixture
def visit(browser: Browser, site: Gateway) -> Iterator[Visit]:
    """A fresh profile at an ordinary size. What went wrong on the page fails the test."""
    visit = Visit(browser, site, viewport={"width": 1280, "height": 900})
    yield visit
    visit.close()
