"""The side-by-side view as a learner uses it: pointing, stepping, walking by keyboard, acting.

What is asserted is what a screen reader would say.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Locator, Page, expect

from harness import (
    hide_sidebar,
    open_notebook,
    open_voila,
    run_all,
    run_notebook,
    screenshot,
    theme,
    wait_until_it_fits,
    write_notebook,
)

SESSION = """
from hmmlab import Session, show

session = Session()
for line in '''
open d0 0
mmap A 40 rw private
store A 0 16 100
read d0 A 0 16
mprotect A 0 8 r
to_dev d0 A 10 4
'''.strip().splitlines():
    session.do(line)
view = show(session)
view
"""

LARGE = """
from hmmlab import Session, show

session = Session()
for line in ["open d0 0", "mmap A 2000 rw private", "store A 0 2000 1", "read d0 A 600 8"]:
    session.do(line)
show(session, charts=False)
"""


@pytest.fixture
def view(lab_server, page: Page) -> Page:
    run_notebook(page, lab_server.notebooks / "view.ipynb", SESSION)
    expect(cell(page, 0)).to_be_visible()
    return page


def cell(page: Page, offset: int, region: str = "A") -> Locator:
    return page.get_by_role("gridcell", name=re.compile(rf"^{region} page {offset}:"))


def expect_cell(page: Page, offset: int, state: str) -> None:
    expect(page.get_by_role("gridcell", name=f"A page {offset}: {state}")).to_be_visible()


def go_to(page: Page, operation: str) -> None:
    choice = page.get_by_label("Operation", exact=True)
    text = choice.locator("option", has_text=operation).inner_text()
    with moved(page):
        choice.select_option(label=text)


def use(page: Page) -> None:
    """What both a lab and a Voila must do: point and inspect, step there and back."""
    cell(page, 11).click()
    inspector = page.locator(".hmm-inspector")
    expect(inspector.get_by_role("heading", name="A page 11")).to_be_visible()
    expect(inspector).to_contain_text("DEVICE_WRITE")
    expect(cell(page, 11)).to_have_attribute("aria-selected", "true")
    cell(page, 2).click()
    expect(inspector.get_by_role("heading", name="A page 2")).to_be_visible()
    expect(inspector.get_by_role("row", name="0 PRESENT 1")).to_be_visible()
    expect(inspector.get_by_role("row", name="1 RW 0")).to_be_visible()

    go_to(page, "read d0 A 0 16")
    expect_cell(page, 2, "CPU read-write, device read-write")
    # Step by step until the device has forgotten the page, and the CPU's entry has changed.
    forward = page.get_by_role("button", name="Step ▶")
    back = page.get_by_role("button", name=re.compile("◀.* Step"))
    states = [
        "CPU read-write, device read-write",
        "CPU read-write, device not mapped; this step changed the device's entry",
        "CPU read-only, device not mapped; this step changed the CPU's entry",
    ]
    for button, ahead in ((forward, states[1:]), (back, states[1::-1])):
        for state in ahead:
            while not page.get_by_role("gridcell", name=f"A page 2: {state}").count():
                with moved(page):
                    button.click()


@contextmanager
def moved(page: Page) -> Iterator[None]:
    """Wait until the whole view shows another step: its last part to follow is the state line."""
    line = page.locator(".hmm-summary")
    before = line.inner_text()
    yield
    expect(line).not_to_have_text(before)


def test_pages_are_inspected_and_stepped_through_in_the_lab(view):
    use(view)


def test_pages_are_inspected_and_stepped_through_in_voila(voila_server, voila_page):
    write_notebook(voila_server.notebooks / "view.ipynb", SESSION)
    open_voila(voila_page, "view")
    expect(cell(voila_page, 0)).to_be_visible()
    use(voila_page)
    screenshot(voila_page, "view-voila")


def test_the_device_table_can_be_pointed_at_too(view):
    device = view.locator(".hmm-pair canvas").nth(1)
    box, target = device.bounding_box(), cell(view, 12).bounding_box()
    cpu = view.locator(".hmm-pair canvas").nth(0).bounding_box()
    at = {"x": target["x"] - cpu["x"] + 5, "y": target["y"] - box["y"] + 5}
    device.hover(position=at, force=True)
    expect(view.locator(".hmm-readout")).to_contain_text(
        "A page 12: CPU on the device (read-write), device read-write in device memory"
    )
    expect(view.locator(".hmm-readout")).to_contain_text("in device memory")
    device.click(position=at, force=True)
    expect(cell(view, 12)).to_have_attribute("aria-selected", "true")


def test_frames_and_tables_are_linked(view):
    ram = view.get_by_role("img", name="RAM: 16 frames in use")
    device = view.get_by_role("img", name="Device memory: 4 frames in use")
    for strip in (ram, device):
        strip.hover(position={"x": 50, "y": 10})
        page = {ram: 1, device: 11}[strip]
        expect(view.locator(".hmm-readout")).to_contain_text(f"A page {page}: CPU")
        strip.click(position={"x": 50, "y": 10})
        expect(cell(view, page)).to_have_attribute("aria-selected", "true")
        expect(view.locator(".hmm-inspector h3")).to_have_text(f"A page {page}")
    expect(view.locator(".hmm-readout")).to_contain_text("in device memory, behind it frame")


def test_the_grid_is_walked_by_keyboard(view):
    cell(view, 0).focus()
    for key, offset in [
        ("ArrowRight", 1),
        ("ArrowDown", 17),
        ("End", 31),
        ("ArrowDown", 39),
        ("Home", 32),
        ("ArrowUp", 16),
        ("ArrowLeft", 15),
        ("Control+Home", 0),
        ("Control+End", 39),
        ("PageUp", 0),
    ]:
        view.keyboard.press(key)
        expect(cell(view, offset)).to_be_focused()
    assert view.get_by_role("gridcell").and_(view.locator('[tabindex="0"]')).count() == 1
    view.keyboard.press("Enter")
    expect(cell(view, 0)).to_have_attribute("aria-selected", "true")
    expect(view.locator(".hmm-inspector h3")).to_have_text("A page 0")
    view.keyboard.press("Escape")
    expect(view.locator(".hmm-inspector")).to_contain_text("Select a page")


def test_a_step_of_the_list_is_gone_to(view):
    steps = view.get_by_role("listbox", name="Steps of the operation")
    row = steps.get_by_role("option", name="change_protection", disabled=False)
    go_to(view, "mprotect A 0 8 r")
    row.click()
    expect(row).to_have_attribute("aria-selected", "true")
    expect(row).to_be_in_viewport()
    expect_cell(view, 2, "CPU read-only, device not mapped; this step changed the CPU's entry")
    steps.press("ArrowUp")
    expect_cell(view, 2, "CPU read-write, device not mapped")


def test_play_walks_to_the_end(view):
    view.get_by_role("button", name="First").click()
    expect(view.get_by_text(re.compile(r"^0 of \d+$"))).to_be_visible()
    expect(view.get_by_role("gridcell")).to_have_count(0)
    view.get_by_label("Speed").select_option("very fast")
    view.get_by_role("button", name="Play").click()
    expect(view.get_by_role("button", name="Pause")).to_be_visible()
    expect(view.get_by_text(re.compile(r"^(\d+) of \1$"))).to_be_visible()
    expect(view.get_by_role("button", name="Play")).to_be_visible()
    expect_cell(view, 10, "CPU on the device (read-write), device read-write in device memory")


def test_buttons_act_on_the_machine(view):
    answer = view.locator(".hmm-answer")
    cell(view, 20).click()
    expect(view.get_by_label("Page", exact=True)).to_have_value("20")
    view.get_by_role("button", name="Store", exact=True).click()
    expect(answer).to_have_text("store A 20 4 100: returned 0; 4 page faults.")
    expect_cell(view, 23, "CPU read-write, device not mapped")
    view.get_by_role("button", name="Read", exact=True).click()
    expect(answer).to_contain_text("read d0 A 20 4: returned 0; data 100, 101, 102, 103")
    expect_cell(view, 23, "CPU read-write, device read-write")
    view.get_by_role("button", name="To device", exact=True).click()
    expect_cell(view, 23, "CPU on the device (read-write), device read-write in device memory")
    view.get_by_role("button", name="Unmap", exact=True).click()
    expect_cell(view, 23, "CPU no mapping, device not mapped")
    view.get_by_role("button", name="Load", exact=True).click()
    expect(answer).to_have_text("load A 20 4: SIGSEGV: the process would be killed here.")
    line = view.get_by_placeholder("any operation of the scenario language")
    line.fill("fly A")
    line.press("Enter")
    expect(answer).to_have_text(re.compile("fly A: expected an operation"))


def test_a_large_region_shows_one_page_table_at_a_time(lab_server, page):
    write_notebook(lab_server.notebooks / "large.ipynb", LARGE)
    open_notebook(page, "large")
    run_all(page)
    expect(page.get_by_role("gridcell")).to_have_count(512)
    page.get_by_role("button", name="next table").click()
    expect(page.get_by_text("page table 2 of 4")).to_be_visible()
    expect_cell(page, 600, "CPU read-write, device read-write")
    cell(page, 600).focus()
    page.keyboard.press("PageDown")
    expect(cell(page, 1112)).to_be_focused()
    page.get_by_role("img", name="Device page tables of A").click(position={"x": 200, "y": 22})
    expect_cell(page, 600, "CPU read-write, device read-write")
    # A click on the map chooses a page, from which the keys walk on.
    expect(page.locator(".hmm-inspector h3")).to_have_text(re.compile(r"^A page (5|6|7)\d\d$"))
    page.keyboard.press("Control+End")
    expect(cell(page, 1999)).to_be_focused()
    expect(cell(page, 1999)).to_be_in_viewport()
    hide_sidebar(page)
    expect(page.get_by_role("gridcell")).to_have_count(2000 - 3 * 512)
    expect(cell(page, 1999)).to_be_focused()
    expect(page.locator(".hmm-readout")).to_contain_text("A page 1999")
    screenshot(page, "view-large")


def test_the_view_in_both_themes_and_widths_has_no_overflow(view):
    cell(view, 11).click()
    go_to(view, "mprotect A 0 8 r")
    for width in (1000, 1400):
        # Tall enough for all of it: bqplot lays out only the figures that are on the screen.
        view.set_viewport_size({"width": width, "height": 2400})
        expect(view.locator(".hmm-summary")).to_be_in_viewport()
        for name in ("light", "dark"):
            theme(view, name)
            wait_until_it_fits(view, ".hmm-view")
            screenshot(view, f"view-{name}-{width}")


def test_text_is_large_enough_and_cells_stand_out_from_the_page(view):
    small = view.evaluate(
        """() => [...document.querySelectorAll('.hmm-view *')]
            .filter(e => e.childNodes.length && [...e.childNodes].some(n => n.nodeType === 3
                && n.data.trim()) && parseFloat(getComputedStyle(e).fontSize) < 11)
            .map(e => e.tagName + ' ' + e.className + ' ' + e.textContent.slice(0, 20))"""
    )
    assert not small
    for name in ("light", "dark"):
        theme(view, name)
        colours = view.evaluate(PIXELS)
        assert len(set(map(tuple, colours))) == 4, "empty, read-only, read-write, on the device"


#: Colours of four pages in the CPU's table, at a corner of their cells that no glyph reaches.
PIXELS = """async () => {
    await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    const canvas = document.querySelector('.hmm-pair canvas');
    const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
    return [2, 9, 11, 20].map(page => {
        const cell = document.querySelector(`[aria-label^="A page ${page}:"]`);
        const at = cell.getBoundingClientRect();
        const [x, y] = [at.left - box.left + 4, at.top - box.top + 4].map(v => v * scale);
        return [...canvas.getContext('2d').getImageData(x, y, 1, 1).data];
    });
}"""


def test_a_second_look_shows_the_present(view):
    """A browser that opens the widget later gets the state of now, not that of the display."""
    view.get_by_role("button", name="First").click()
    expect(view.get_by_role("gridcell")).to_have_count(0)
    go_to(view, "store A 0 16 100")
    expect_cell(view, 3, "CPU read-write, device not mapped")
    view.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    view.reload()
    expect_cell(view, 3, "CPU read-write, device not mapped")
