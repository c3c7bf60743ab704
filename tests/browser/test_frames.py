"""Physical memory as a learner uses it: frames and pages lead to each other, step by step."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from harness import run_notebook, screenshot, theme, wait_until_it_fits

STORY = """
from hmmlab import Session, show
from hmmlab.widgets import PhysicalMemory

lines = '''
open d0 0
open d1 1
mmap A 16 rw private
store A 0 16 100
to_dev d0 A 0 4
to_dev d1 A 8 2
load A 2 1
'''
session = Session().play(lines.strip().splitlines())
view = show(session.trace, charts=False)
view
"""


@pytest.fixture
def memory(lab_server, page: Page) -> Iterator[Page]:
    page.set_viewport_size({"width": 1280, "height": 2000})
    run_notebook(
        page, lab_server.notebooks / "frames.ipynb", STORY, "PhysicalMemory(view.playhead)"
    )
    yield page


def frame(page: Page, pfn: int, text: str = "") -> Locator:
    return page.get_by_role("option", name=re.compile(rf"^Frame {pfn:#x}: {text}"))


def page_cell(page: Page, offset: int) -> Locator:
    return page.get_by_role("gridcell", name=re.compile(rf"^A page {offset}:"))


def test_frames_and_pages_lead_to_each_other(memory):
    top = (1 << 34) - 1
    expect(frame(memory, top - 2, "free, next to be handed out")).to_be_visible()
    frame(memory, top - 3, "mapped by A 3").click()
    expect(page_cell(memory, 3)).to_have_attribute("aria-selected", "true")
    memory.keyboard.press("ArrowLeft")
    memory.keyboard.press("ArrowLeft")
    expect(frame(memory, top - 1)).to_be_focused()
    memory.keyboard.press("Enter")
    expect(page_cell(memory, 1)).to_have_attribute("aria-selected", "true")
    # The other way round, and to the other device's chunk.
    page_cell(memory, 9).click()
    other = top - 65536 - 1
    expect(frame(memory, other, "mapped by A 9")).to_have_attribute("aria-selected", "true")
    unit = memory.get_by_role("button", name=re.compile("^unit 1"))
    expect(unit).to_have_attribute("aria-pressed", "true")
    memory.get_by_role("button", name=re.compile("^unit 0")).click()
    expect(frame(memory, top, "mapped by A 0")).to_be_visible()
    memory.get_by_role("button", name="Lower ▶").click()
    expect(frame(memory, top - 24, r"free, 22nd")).to_be_visible()
    memory.get_by_role("button", name="◀ Higher").click()
    # A step back, and the frame that was freed is in use again.
    back = memory.get_by_role("button", name=re.compile("^◀.* Step$")).last
    while not frame(memory, top - 2, "mapped by A 2").count():
        line = memory.locator(".hmm-summary").last
        before = line.inner_text()
        back.click()
        expect(line).not_to_have_text(before)


def test_it_fits_in_both_themes_and_widths(memory):
    frame(memory, (1 << 34) - 2).click()
    for width in (1000, 1400):
        memory.set_viewport_size({"width": width, "height": 2000})
        for name in ("light", "dark"):
            theme(memory, name)
            wait_until_it_fits(memory, ".hmm-memory")
            screenshot(memory, f"frames-{name}-{width}")
