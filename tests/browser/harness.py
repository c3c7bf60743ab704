"""The eyes and hands of the browser tests: real servers, a watched page, a notebook driven by it.

Nothing here waits for a time; everything waits for a condition, and Playwright gives up on one
after its timeout.
"""

import collections
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import nbformat.v4 as nbf
from playwright.sync_api import Browser, Page, Request

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
KERNEL_TIMEOUT = 120_000  # ms


@contextmanager
def serve(
    command: Sequence[str], ready: re.Pattern[str], environment: Mapping[str, str]
) -> Iterator[str]:
    """Run a server; yield the address it prints, the first group of `ready`."""
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    assert server.stdout
    said = collections.deque[str](maxlen=100)
    try:
        for line in server.stdout:
            said.append(line)
            if match := ready.search(line):
                break
        else:
            raise AssertionError(f"{command[0]} ended before it served:\n{''.join(said)}")
        # Someone must go on reading, or the server stops at a full pipe.
        threading.Thread(target=said.extend, args=[server.stdout], daemon=True).start()
        wait_until_it_listens(server, match[1])
        yield match[1]
    finally:
        server.terminate()
        server.wait()


def wait_until_it_listens(server: subprocess.Popen[str], address: str) -> None:
    """Jupyter prints its address a moment before it listens there."""
    url = urlsplit(address)
    while True:
        try:
            return socket.create_connection((url.hostname, url.port)).close()
        except ConnectionRefusedError:
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=0.05)
                raise AssertionError(f"the server at {address} ended before it listened") from None


@contextmanager
def watched_page(
    browser: Browser, address: str, excused: Callable[[Request], bool] = lambda request: False
) -> Iterator[Page]:
    """Open a page logged in at `address`; at the end, assert that it behaved.

    It misbehaves by a console error, an uncaught exception, a crash, or a request to anywhere but
    `address`, unless `excused`.
    """
    home = urlsplit(address)
    context = browser.new_context(
        base_url=f"{home.scheme}://{home.netloc}", viewport={"width": 1280, "height": 900}
    )
    context.set_default_timeout(30_000)
    complaints: list[str] = []
    excuses: set[str] = set()

    def on_request(request: Request) -> None:
        if urlsplit(request.url).hostname in (None, home.hostname):  # None: data: and blob:
            return
        if excused(request):
            excuses.add(request.url)
        else:
            complaints.append(f"request off the machine: {request.url}")

    def on_page(page: Page) -> None:
        page.on("crash", lambda: complaints.append("page crashed"))
        page.on(
            "websocket",
            lambda socket: (
                None
                if urlsplit(socket.url).hostname == home.hostname
                else complaints.append(f"socket off the machine: {socket.url}")
            ),
        )

    def on_console(message) -> None:
        if message.type == "error" and message.location["url"] not in excuses:
            complaints.append(f"console error: {message.text} ({message.location['url']})")

    context.on("request", on_request)
    context.on("page", on_page)
    context.on("console", on_console)
    context.on("weberror", lambda error: complaints.append(f"uncaught: {error.error.stack}"))
    try:
        if home.query:
            context.request.get(address)  # leaves the token's cookie
        yield context.new_page()
        assert not complaints, "\n".join(complaints)
    finally:
        context.close()


def write_notebook(path: Path, *sources: str) -> None:
    """Write a notebook as if saved after a run that failed: what it holds is not what will come."""
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    stale = nbf.new_output("error", ename="Stale", evalue="from another day", traceback=[])
    cells = [nbf.new_code_cell(source, outputs=[stale], execution_count=1) for source in sources]
    notebook = nbf.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    path.write_text(nbf.writes(notebook))


def run_notebook(page: Page, path: Path, *sources: str) -> None:
    """Write a notebook into the lab's folder, open it, run it, and give it the lab's width."""
    write_notebook(path, *sources)
    open_notebook(page, path.stem)
    run_all(page)
    hide_sidebar(page)


def open_notebook(page: Page, name: str) -> None:
    """Open ``name.ipynb`` in the lab and wait until its kernel is idle."""
    page.goto(f"/lab/tree/{name}.ipynb")
    wait_for_notebook(page, f"{name}.ipynb")


def wait_for_notebook(page: Page, path: str) -> None:
    """Wait until the lab shows the notebook and its kernel is idle."""
    page.wait_for_function(
        """path => {
            const panel = window.jupyterapp?.shell.currentWidget;
            return panel?.context?.path === path && panel.context.isReady
                && panel.sessionContext.kernelDisplayStatus === 'idle';
        }""",
        arg=path,
        timeout=KERNEL_TIMEOUT,
    )


def run_all(page: Page) -> None:
    """Run all cells from the menu, and wait until the last is done; raise what a cell raised.

    The saved outputs go first, so that none of them passes for a new one.
    """
    menu(page, "Edit", "Clear Outputs of All Cells")
    menu(page, "Run", "Run All Cells")
    outcome = page.wait_for_function(
        """() => {
            const panel = window.jupyterapp.shell.currentWidget;
            const cells = panel.content.widgets.map(cell => cell.model)
                .filter(cell => cell.type === 'code' && cell.sharedModel.source.trim());
            for (const cell of cells)
                for (let i = 0; i < cell.outputs.length; i++) {
                    const output = cell.outputs.get(i).toJSON();
                    if (output.output_type === 'error')
                        return [output.ename + ': ' + output.evalue, ...output.traceback];
                }
            return cells.every(cell => cell.executionCount && cell.executionState === 'idle')
                && panel.sessionContext.kernelDisplayStatus === 'idle' && [];
        }""",
        timeout=KERNEL_TIMEOUT,
    )
    if raised := outcome.json_value():
        raise AssertionError(re.sub(r"\x1b\[[\d;]*m", "", "\n".join(raised)))


def menu(page: Page, *path: str) -> None:
    """Click through the lab's menus."""
    bar, *items = path
    page.get_by_role("menubar").get_by_role("menuitem", name=bar, exact=True).click()
    for item in items:
        page.get_by_role("menu").get_by_role("menuitem", name=item, exact=True).click()


def theme(page: Page, name: str) -> None:
    """Give the lab its "light" or "dark" theme.

    The lab fades a splash screen out at its start and after each theme; a theme that comes while
    one fades makes it take the same screen away twice, which it answers with an exception.
    """
    splash = page.locator("#jupyterlab-splash")
    splash.wait_for(state="detached")
    page.evaluate(
        "name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})",
        f"JupyterLab {name.title()}",
    )
    light = "true" if name == "light" else "false"
    page.locator(f"body[data-jp-theme-light={light}]").wait_for(state="attached")
    splash.wait_for(state="detached")


def hide_sidebar(page: Page) -> None:
    """Leave the lab's whole width to the notebook."""
    page.evaluate("""async () => {
        const {shell, commands} = window.jupyterapp;
        if (!shell.leftCollapsed) await commands.execute('application:toggle-left-area');
    }""")


def wait_until_it_fits(page: Page, selector: str) -> None:
    """Wait until nothing in an element is wider than its place; figures follow after a while."""
    page.wait_for_function(
        """selector => [...document.querySelectorAll(`${selector}, ${selector} *`)].every(
            e => e.scrollWidth <= e.clientWidth + 1 || !e.clientWidth
                || getComputedStyle(e).overflowX === 'visible')""",
        arg=selector,
    )


def open_voila(page: Page, name: str) -> None:
    """Open ``name.ipynb`` in Voila and wait until it has run and been drawn."""
    page.goto(f"/voila/render/{name}.ipynb", timeout=KERNEL_TIMEOUT)
    page.locator("#rendered_cells").wait_for()
    page.locator("#loading").wait_for(state="hidden")


def screenshot(page: Page, name: str) -> Path:
    """Keep what is on the screen as ``build/screenshots/name.png``, for a person to look at."""
    page.evaluate("""async () => {
        await document.fonts.ready;
        await new Promise(requestAnimationFrame);
        await new Promise(requestAnimationFrame);
    }""")
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path, animations="disabled")
    return path
