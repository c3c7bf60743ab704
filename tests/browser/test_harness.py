"""The watch over a page is only worth something if it can complain."""

import pytest

from harness import open_notebook, theme, watched_page

HOME = "http://127.0.0.1:9/"


@pytest.mark.parametrize(
    ("html", "complaint"),
    [
        ("<script>console.error('torn page')</script>", "console error: torn page"),
        ("<script>throw Error('lost frame')</script>", "uncaught: .*lost frame"),
        ("<img src='http://cdn.example/a.png'>", "request off the machine: http://cdn.example"),
        ("<script>new WebSocket('ws://cdn.example/')</script>", "socket off the machine"),
    ],
)
def test_misbehaviour_is_reported(browser, html, complaint):
    with pytest.raises(AssertionError, match=complaint), watched_page(browser, HOME) as page:
        page.set_content(html)
        page.wait_for_load_state("networkidle")


def test_a_quiet_page_passes(browser):
    with watched_page(browser, HOME) as page:
        page.set_content("<script>console.warn('fine')</script><img src='data:image/gif;base64,'>")


def test_what_is_excused_passes(browser):
    with watched_page(browser, HOME, lambda request: "icons" in request.url) as page:
        page.set_content("<link rel='stylesheet' href='http://cdn.example/icons.css'>")
        page.wait_for_load_state("networkidle")


def test_themes_may_follow_each_other_at_once(page):
    open_notebook(page, "index")
    for name in ("dark", "light", "dark"):
        theme(page, name)
    # The lab's own timers, of 200 ms, ring before this one does.
    page.evaluate("new Promise(ring => setTimeout(ring, 400))")
