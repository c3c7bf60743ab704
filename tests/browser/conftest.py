"""Fixtures: a lab and a Voila on a copy of the notebooks, and a page at each that must behave."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import pytest
from playwright import sync_api
from playwright.sync_api import Browser, Page, sync_playwright

import chromium
from harness import serve, watched_page

sync_api.expect.set_options(timeout=30_000)  # ms: a busy machine is slow, not wrong

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
BIN = Path(sys.executable).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the browser last: what is wrong in the model shows in seconds."""
    items.sort(key=lambda item: item.path.is_relative_to(Path(__file__).parent))


@dataclass(frozen=True)
class Server:
    """A running server: the address to open, the notebooks it serves, where its settings go."""

    address: str
    notebooks: Path
    home: Path

    def restore(self) -> None:
        """End all kernels, put the notebooks back as they are, and forget what a page has set."""
        for kernel in json.loads(self.api("GET", "kernels")):
            self.api("DELETE", f"kernels/{kernel['id']}")
        for left in (self.notebooks, self.home / "config" / "lab", self.home / "data" / "hmmlab"):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(NOTEBOOKS, self.notebooks)

    def api(self, method: str, path: str) -> bytes:
        """Ask Jupyter's REST API."""
        url = urlsplit(self.address)
        request = Request(f"http://{url.netloc}/api/{path}?{url.query}", method=method)
        with build_opener(ProxyHandler({})).open(request) as answer:
            return answer.read()


def environment(home: Path) -> dict[str, str]:
    """Keep Jupyter out of the home of whoever runs the tests."""
    return {
        **os.environ,
        "HMMLAB_PROGRESS": "",
        "PYTHONUNBUFFERED": "1",
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
    }


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("lab")
    notebooks = shutil.copytree(NOTEBOOKS, home / "notebooks")
    command = [
        str(BIN / "hmmlab"),
        "lab",
        "--no-browser",
        f"--notebook-dir={notebooks}",
        "--expose-app-in-browser",  # for the conditions that harness.py waits on
    ]
    ready = re.compile(r"(http://127\.0\.0\.1:\S+token=\w+)")
    with serve(command, ready, environment(home)) as address:
        yield Server(address, notebooks, home)


@pytest.fixture(scope="session")
def voila_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("voila")
    notebooks = shutil.copytree(NOTEBOOKS, home / "notebooks")
    command = [str(BIN / "voila"), "--no-browser", "--Voila.ip=127.0.0.1", str(notebooks)]
    with serve(command, re.compile(r"^(http://127\.0\.0\.1:\S+)"), environment(home)) as address:
        yield Server(address, notebooks, home)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = chromium.find()
    if path is None:
        pytest.fail(chromium.ADVICE, pytrace=False)
    flags = [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-gpu",
        "--disable-quic",
        "--disable-sync",
        "--no-first-run",
        # Off this machine no name is found, with a network or without one.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=flags, chromium_sandbox=not root
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, lab_server: Server) -> Iterator[Page]:
    """A page logged in to the lab, as a newcomer finds it."""
    lab_server.restore()
    with watched_page(browser, lab_server.address) as page:
        yield page


@pytest.fixture
def voila_page(browser: Browser, voila_server: Server) -> Iterator[Page]:
    """A page at Voila, which asks a CDN for two style sheets of icons whatever it shows."""

    def is_icon_sheet(request: sync_api.Request) -> bool:
        sheets = ("/css/all.min.css", "/css/v4-shims.min.css")
        return "fontawesome" in request.url and request.url.endswith(sheets)

    with watched_page(browser, voila_server.address, is_icon_sheet) as page:
        yield page
