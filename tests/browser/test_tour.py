"""The first screen of the tour, as the README shows it."""

import re

from playwright.sync_api import expect

from harness import SCREENSHOTS, hide_sidebar, open_notebook, run_all, theme


def test_the_tour_stands_halfway_through_an_invalidation(page):
    open_notebook(page, "00_take_the_tour")
    run_all(page)
    hide_sidebar(page)
    view = page.locator(".hmm-view").first
    view.scroll_into_view_if_needed()
    expect(view.locator(".hmm-verdict")).to_contain_text("operations as Linux 6.1.192")
    told = view.get_by_role("gridcell", name=re.compile("this step changed the device's entry"))
    step = view.get_by_role("button", name="Step ▶")
    line = view.locator(".hmm-summary")
    while not told.count():
        before = line.inner_text()
        step.click()
        expect(line).not_to_have_text(before)
    told.nth(2).click()
    page.mouse.move(0, 0)
    expect(view.locator(".hmm-inspector h3")).to_have_text("A page 2")
    page.set_viewport_size({"width": 1280, "height": 1200})
    view.evaluate("view => view.scrollIntoView({block: 'center'})")
    for name in ("light", "dark"):
        theme(page, name)
        x, y, width, height = view.bounding_box().values()
        around = {"x": x - 6, "y": y - 4, "width": width + 12, "height": height + 8}
        path = SCREENSHOTS / f"tour-{name}.png"
        page.screenshot(path=path, clip=around, animations="disabled")
