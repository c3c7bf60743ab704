"""Every notebook as a learner goes through it: run to its end, and its first widget stepped."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from harness import hide_sidebar, open_notebook, open_voila, run_all, screenshot, theme

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("[0-9][0-9]_*.ipynb"))
TOUR = "00_take_the_tour"


def open_and_run(page: Page, name: str) -> None:
    open_notebook(page, name)
    run_all(page)
    hide_sidebar(page)


def view_of_cell(page: Page, index: int) -> Locator:
    """Scroll to a code cell, counted from either end, and return the view below it."""
    page.evaluate(
        """async index => {
            const notebook = window.jupyterapp.shell.currentWidget.content;
            const code = notebook.widgets.filter(cell => cell.model.type === 'code');
            await notebook.scrollToCell(code.at(index), 'start');
        }""",
        index,
    )
    # Cells out of sight lose their place in the document, not their order.
    view = page.locator(".jp-CodeCell:visible").locator(".hmm-view:visible")
    return view.first if index >= 0 else view.last


def cells(view: Locator) -> list[str]:
    """What a screen reader says of each page."""
    labels = view.get_by_role("gridcell").evaluate_all(
        "cells => cells.map(cell => cell.getAttribute('aria-label'))"
    )
    assert labels
    return [label.partition(";")[0] for label in labels]  # without what this step changed


def step(view: Locator, name: str) -> None:
    """Press a button and wait until the view shows another step."""
    line = view.locator(".hmm-summary")
    before = line.inner_text()
    view.get_by_role("button", name=re.compile(name)).click()
    expect(line).not_to_have_text(before)


def step_there_and_back(view: Locator) -> None:
    """Step until a page changes, and back until it is as before."""
    expect(view.get_by_role("gridcell").first).to_be_visible()
    before = cells(view)
    steps = 0
    while cells(view) == before:
        step(view, "^Step ▶")
        steps += 1
    for _ in range(steps):
        step(view, "^◀.* Step$")
    assert cells(view) == before


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_to_its_end_and_its_first_widget_answers(page: Page, name: str) -> None:
    open_and_run(page, name)
    step_there_and_back(view_of_cell(page, 0))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_under_voila(voila_page: Page, name: str) -> None:
    open_voila(voila_page, name)
    expect(voila_page.locator(".hmm-view").first).to_be_visible()
    expect(voila_page.get_by_role("heading", name="Read next")).to_be_visible()
    step_there_and_back(voila_page.locator(".hmm-view").first)


def test_one_step_into_the_tour_the_device_has_forgotten(page: Page) -> None:
    """And the CPU has changed nothing yet; the whole screen, as a learner sees it."""
    page.set_viewport_size({"width": 1280, "height": 1300})
    open_and_run(page, TOUR)
    view = view_of_cell(page, 0)
    step(view, "^Step ▶")
    view.get_by_role("gridcell", name="A page 2: CPU read-write, device not mapped").click()
    expect(view.get_by_role("heading", name="A page 2")).to_be_visible()
    for name in ("light", "dark"):
        theme(page, name)
        screenshot(page, f"tour-screen-{name}")


def test_the_dares_of_the_tour_can_be_met(page: Page) -> None:
    open_and_run(page, TOUR)
    view = view_of_cell(page, -2)

    def press(button: str, offset: int, state: str) -> None:
        view.get_by_role("gridcell", name=re.compile(rf"^A page {offset}:")).click()
        expect(view.get_by_label("Page", exact=True)).to_have_value(str(offset))
        view.get_by_role("button", name=button, exact=True).click()
        expect(view.get_by_role("gridcell", name=f"A page {offset}: {state}")).to_be_visible()

    # The buttons act on four pages from the selected one on.
    press("Discard", 0, "CPU empty, device not mapped")
    press("Write", 4, "CPU read-write, device read-write")
    press("To device", 4, "CPU on the device")
    press("Load", 4, "CPU read-write, device not mapped")
