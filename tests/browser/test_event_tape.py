"""The tape of notifier events as a learner uses it: click, keys, filter; beside the view."""

import re

import pytest
from playwright.sync_api import Locator, Page, expect

from harness import run_notebook, screenshot, theme

VIEW = """
from hmmlab import Session, show
from hmmlab.widgets import EventTape

story = Session().play("recordings/events.txt")
view = show(story.trace, charts=False)
view
"""


@pytest.fixture
def tape(lab_server, page: Page) -> Locator:
    run_notebook(page, lab_server.notebooks / "tape.ipynb", VIEW, "EventTape(view.playhead)")
    tape = page.locator(".hmm-tape")
    expect(tape.get_by_role("option")).to_have_count(13)
    return tape


def expect_current(tape: Locator, page: Page, says: str) -> None:
    """One event is marked, it says so, and the view stands at its step."""
    marked = tape.get_by_role("option", selected=True)
    expect(marked).to_have_count(1)
    expect(marked).to_have_accessible_name(re.compile(says))
    step = marked.locator(".hmm-tape-step").inner_text()
    expect(page.locator(".hmm-summary")).to_contain_text(f"step {step} of")


def test_a_click_and_the_keys_move_the_playhead_of_all_views(tape: Locator, page: Page) -> None:
    events = tape.get_by_role("listbox", name="Notifier events")
    events.press("End")
    expect_current(tape, page, "UNMAP of A pages 0 to 1, raised by munmap A 0 2, told: d0")
    tape.get_by_role("option", name="MIGRATE of A").click()
    expect_current(tape, page, "MIGRATE of A pages 8 to 11.*, told: d0 forgets nothing, owner d0$")
    events.press("ArrowUp")
    expect_current(tape, page, "SOFT_DIRTY of the whole address space")
    line = page.locator(".hmm-summary")
    there = line.inner_text()
    page.get_by_role("button", name="Step ▶").click()
    expect(line).not_to_have_text(there)
    expect(tape.get_by_role("option", selected=True)).to_contain_text("SOFT_DIRTY")
    events.press("Enter")
    expect_current(tape, page, "SOFT_DIRTY")
    events.press("Home")
    expect_current(tape, page, "CLEAR of A pages 0 to 3")
    page.get_by_role("button", name="First").click()
    expect(tape.get_by_role("option", selected=True)).to_have_count(0)


def test_a_kind_is_shown_alone_and_with_others(tape: Locator) -> None:
    def kind(name: str) -> Locator:
        return tape.get_by_role("button", name=name)

    kind("UNMAP 3").click()
    expect(tape.get_by_role("option")).to_have_count(3)
    expect(kind("CLEAR 2")).to_have_attribute("aria-pressed", "false")
    kind("CLEAR 2").press("Enter")
    expect(tape.get_by_role("option")).to_have_count(5)
    kind("UNMAP 3").click()
    kind("CLEAR 2").click()
    expect(tape.get_by_role("option")).to_have_count(13)
    kind("RELEASE 0").click()
    expect(tape.get_by_text("No event of these kinds")).to_be_visible()


def test_the_tape_fits_in_both_themes(tape: Locator, page: Page) -> None:
    tape.get_by_role("option", name="MIGRATE of A").click()
    for width in (1000, 1280):
        page.set_viewport_size({"width": width, "height": 1400})
        for name in ("light", "dark"):
            theme(page, name)
            expect(tape).to_be_in_viewport()
            page.wait_for_function(
                """() => [...document.querySelectorAll('.hmm-tape, .hmm-tape *')].every(
                    e => e.scrollWidth <= e.clientWidth + 1 || !e.clientWidth)"""
            )
            tape.scroll_into_view_if_needed()
            screenshot(page, f"tape-{name}-{width}")
