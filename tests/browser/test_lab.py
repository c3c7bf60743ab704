"""The lab as a newcomer meets it, and the widgets' foundations in it and in Voila."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from harness import (
    hide_sidebar,
    open_notebook,
    open_voila,
    run_all,
    screenshot,
    theme,
    wait_for_notebook,
    write_notebook,
)

HMMLAB = str(Path(sys.executable).with_name("hmmlab"))

# One widget on each of our three foundations, and a link from the first to the last.
FOUNDATIONS = """
import anywidget, bqplot, ipywidgets, traitlets

class Echo(anywidget.AnyWidget):
    _esm = '''export default { render({ model, el }) {
        const show = () => el.textContent = "page " + model.get("page");
        model.on("change:page", show);
        show();
    } }'''
    page = traitlets.Int(7).tag(sync=True)

slider = ipywidgets.IntSlider(7, description="page")
echo = Echo()
ipywidgets.link((slider, "value"), (echo, "page"))
scales = {"x": bqplot.OrdinalScale(), "y": bqplot.LinearScale()}
figure = bqplot.Figure(marks=[bqplot.Bars(x=["CPU", "device"], y=[3, 2], scales=scales)])
ipywidgets.VBox([slider, echo, figure])
"""


def check_foundations(page: Page) -> None:
    expect(page.locator(".bqplot rect.bar")).to_have_count(2)
    expect(page.get_by_text("page 7", exact=True)).to_be_visible()
    page.get_by_role("slider").press("ArrowRight")
    expect(page.get_by_text("page 8", exact=True)).to_be_visible()


def test_the_lab_opens_at_the_index_and_asks_nothing(lab_server, page):
    page.goto(lab_server.address)
    wait_for_notebook(page, "index.ipynb")
    page.wait_for_load_state("networkidle")
    expect(page.get_by_role("tab", name="index.ipynb")).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.locator(".Toastify__toast")).to_have_count(0)
    screenshot(page, "lab-first-sight")


def test_the_index_opens_notebooks_before_and_after_it_was_run(lab_server, page):
    for run in (False, True):
        open_notebook(page, "index")
        if run:
            run_all(page)
            expect(page.get_by_text("0 of 30 exercises")).to_be_visible()
        page.get_by_role("link", name="02 Why share an address space?").click()
        wait_for_notebook(page, "02_share_an_address_space.ipynb")


def test_progress_shows_in_the_index_and_can_be_started_again(lab_server, page):
    """An exercise is solved in one notebook; the index of another kernel tells of it."""
    solve = (
        "from hmmlab.exercises import exercise\n"
        "exercise('repoint').check(lambda n, s, t: n and n - s + t)"
    )
    write_notebook(lab_server.notebooks / "solve.ipynb", solve)
    open_notebook(page, "solve")
    run_all(page)
    expect(page.get_by_text("Right on 6 inputs")).to_be_visible()
    open_notebook(page, "index")
    run_all(page)
    expect(page.get_by_role("listitem").filter(has_text="repoint")).to_contain_text("✓")
    screenshot(page, "index-light")
    theme(page, "dark")
    screenshot(page, "index-dark")
    page.get_by_role("button", name="Start again").click()
    page.get_by_role("button", name="No, keep it").click()
    expect(page.get_by_text("1 of ")).to_be_visible()
    page.get_by_role("button", name="Start again").click()
    page.get_by_role("button", name="Yes, forget all").click()
    expect(page.get_by_text("0 of 30 exercises")).to_be_visible()
    expect(page.get_by_role("listitem").filter(has_text="repoint")).to_contain_text("○")


def test_a_link_into_the_glossary_goes_to_its_word(page):
    open_notebook(page, "00_take_the_tour")
    page.get_by_role("link", name="page", exact=True).click()
    wait_for_notebook(page, "glossary.ipynb")
    expect(page.get_by_role("heading", name=re.compile("^page¶?$"))).to_be_in_viewport()
    screenshot(page, "glossary")


@pytest.mark.parametrize(("name", "heading"), [("index", "One address space"), ("glossary", "PTE")])
def test_index_and_glossary_open_in_voila(voila_page, name, heading):
    open_voila(voila_page, name)
    expect(voila_page.get_by_role("heading", name=heading).first).to_be_attached()
    expect(voila_page.get_by_role("link", name=re.compile("^02")).first).to_be_attached()


def test_widgets_draw_and_answer_in_the_lab(lab_server, page):
    write_notebook(lab_server.notebooks / "foundations.ipynb", FOUNDATIONS)
    open_notebook(page, "foundations")
    run_all(page)
    check_foundations(page)
    hide_sidebar(page)
    screenshot(page, "foundations-light")
    theme(page, "dark")
    screenshot(page, "foundations-dark")


def test_widgets_draw_and_answer_in_voila(voila_server, voila_page):
    write_notebook(voila_server.notebooks / "foundations.ipynb", FOUNDATIONS)
    open_voila(voila_page, "foundations")
    check_foundations(voila_page)
    screenshot(voila_page, "foundations-voila")


def test_a_cell_that_raises_fails_the_run(lab_server, page):
    write_notebook(lab_server.notebooks / "raises.ipynb", "1 + 1", "{}['frame']", "2 + 2")
    open_notebook(page, "raises")
    with pytest.raises(AssertionError, match="KeyError: 'frame'"):
        run_all(page)


def test_a_busy_port_gives_one_line():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        done = lab("--no-browser", f"--port={port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert f"port {port} is in use" in done.stderr


def test_a_folder_without_notebooks_gives_one_line(tmp_path):
    done = lab("--no-browser", f"--notebook-dir={tmp_path}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert f"no notebook in {tmp_path}" in done.stderr


@pytest.mark.parametrize("arg", ["--ip=0.0.0.0", "--ServerApp.ip=0.0.0.0", "--LabApp.ip=0.0.0.0"])
def test_the_lab_serves_this_computer_alone(arg):
    done = lab("--no-browser", arg)
    assert (done.returncode, done.stdout) == (1, "")
    assert "it serves 127.0.0.1 alone" in done.stderr


def lab(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HMMLAB, "lab", *args], capture_output=True, text=True)
