"""A race as a learner runs it: whose turn it is, back, and every order of turns."""

import re

from playwright.sync_api import Locator, Page, expect

from harness import run_notebook, screenshot, theme, wait_until_it_fits

RACE = """
from hmmlab import Driver, Machine, Process
from hmmlab.widgets import RaceView


class Careless(Driver):
    def invalidate(self, subscription, range, cur_seq):
        return True


def build():
    process = Process(Machine(ram_pages=4096))
    pages = process.mmap(4)
    process.store(pages, 7)
    device = process.attach(Careless)
    return {"CPU": process.steps.madvise(pages[:2], "dontneed"), "device": device.steps.read(pages)}


RaceView(build)
"""


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=re.compile(f"^{name}"))


def turns(page: Page) -> Locator:
    return page.get_by_role("region", name="Turns so far").get_by_role("row")


def test_a_race_is_run_turn_by_turn_back_and_in_every_order(lab_server, page):
    run_notebook(page, lab_server.notebooks / "race.ipynb", RACE)
    expect(turns(page)).to_have_count(1)  # the heads of the lanes
    button(page, "device").focus()
    page.keyboard.press("Enter")
    expect(turns(page)).to_have_count(2)
    expect(turns(page).last).to_contain_text("d0 does not know A pages 0 to 3.")
    button(page, "CPU").click()
    expect(turns(page)).to_have_count(3)
    expect(page.locator(".hmm-answer").last).to_contain_text("A change is under way")
    button(page, "◀.* Back").click()
    expect(turns(page)).to_have_count(2)
    expect(page.locator(".hmm-summary")).to_contain_text("d: CPU 4 rw, device none")
    button(page, "Every order").click()
    expect(page.locator(".hmm-answer").first).to_contain_text("break the promise")
    expect(
        page.get_by_role("gridcell", name=re.compile("A page 0: .*device stale"))
    ).to_be_visible()
    expect(turns(page).last).to_be_in_viewport()
    page.set_viewport_size({"width": 1000, "height": 900})
    for name in ("light", "dark"):
        theme(page, name)
        wait_until_it_fits(page, ".hmm-race")
        screenshot(page, f"race-{name}")
    button(page, "Restart$").click()
    expect(turns(page)).to_have_count(1)
    expect(button(page, "Restart$")).to_be_disabled()
