"""The arrays of a migration as a learner uses them: phases by their buttons, a page by its name."""

import pytest
from playwright.sync_api import Locator, Page, expect

from harness import run_notebook, screenshot, theme

STORY = """
from hmmlab import Session, show
from hmmlab.widgets import MigrateArrays

session = Session().play(["open d0 0", "mmap A 4 rw private", "store A 0 2 100", "hold A 1 1",
                          "to_dev d0 A 0 4"])
view = show(session.trace, charts=False, position=session.trace.operations[-1].first + 1)
display(view)
MigrateArrays(view.playhead)
"""


@pytest.fixture
def arrays(lab_server, page: Page) -> Locator:
    run_notebook(page, lab_server.notebooks / "arrays.ipynb", STORY)
    widget = page.locator(".hmm-view").filter(has=page.locator(".hmm-stepper"))
    expect(widget).to_be_visible()
    return widget


def row(arrays: Locator, title: str) -> list[str]:
    """What a reader finds in a row of the table, cell by cell."""
    found = arrays.get_by_role("row").filter(has=arrays.page.get_by_role("rowheader", name=title))
    return [text.split("\n")[0] for text in found.get_by_role("cell").all_inner_texts()]


def test_phases_move_the_view_and_a_page_is_selected_by_its_name(page, arrays):
    expect(arrays.get_by_role("status")).to_contain_text("migrate_vma_setup, collect")
    arrays.get_by_role("button", name="collect", exact=True).click()
    expect(arrays.get_by_role("cell", name="V M W").first).to_be_visible()
    assert row(arrays, "src") == ["V M W", "V M W", "M", "M"]
    button = arrays.get_by_role("button", name="unmap", exact=True)
    button.focus()
    page.keyboard.press("Enter")
    expect(arrays.get_by_role("cell", name="given back")).to_be_visible()
    assert row(arrays, "src") == ["V M W", "0", "M", "M"]
    arrays.get_by_role("button", name="put in place").click()
    expect(arrays.get_by_role("cell", name="moved", exact=True)).to_be_visible()
    assert row(arrays, "so far") == ["moved", "given back", "filled", "filled"]
    # The view beside it shows the same step, and follows the choice of a page.
    expect(page.get_by_role("gridcell", name="A page 0: CPU on the device")).to_be_visible()
    arrays.get_by_role("button", name="A 1", exact=True).click()
    expect(page.get_by_role("heading", name="A page 1")).to_be_visible()


def test_it_fits_a_narrow_page_in_both_themes(page, arrays):
    page.set_viewport_size({"width": 1000, "height": 900})
    arrays.get_by_role("button", name="hand over").click()
    for name in ("light", "dark"):
        theme(page, name)
        wide = arrays.evaluate("box => box.scrollWidth - box.clientWidth")
        assert wide <= 0
        arrays.scroll_into_view_if_needed()
        screenshot(page, f"migrate-arrays-{name}")
