"""The selected page taken apart: its words bit by bit, its frame, its VMA."""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets

from hmmlab.widgets.one_page import Section, inspect
from hmmlab.widgets.playhead import Page, Playhead

__all__ = ["Inspector"]

_NOTHING = (
    "<p>Select a page, by a click or with the arrow keys and Enter, to take its page-table entries "
    "apart bit by bit.</p>"
)


class Inspector(ipywidgets.HTML):
    """Everything that the machine holds about the selected page.

    Parameters
    ----------
    playhead
        The playhead whose selected page is shown.
    """

    def __init__(self, playhead: Playhead) -> None:
        self.playhead = playhead
        super().__init__()
        self.add_class("hmm-inspector")
        playhead.observe(self._follow, ["position", "length", "selected", "device"])
        self._follow()

    def __repr__(self) -> str:
        return f"Inspector({self._page() or 'no page'})"

    def _page(self) -> str:
        page: Page | None = self.playhead.selected
        if page is None:
            return ""
        mm, vpn = page
        place: str = self.playhead.trace.names.place(mm, vpn, vpn + 1)
        return place

    def _follow(self, change: Any = None) -> None:
        page: Page | None = self.playhead.selected
        if page is None:
            self.value = _NOTHING
            return
        mm, vpn = page
        file, _ = self.playhead.device_of(mm)
        sections = inspect(self.playhead.replay.state, mm, vpn, file)
        parts = "".join(_section(section) for section in sections)
        self.value = f"<h3>{escape(self._page())}</h3><div>{parts}</div>"


def _section(section: Section) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(label))}</th>'
        + (
            f"<td>{escape(str(value))}</td><td>{escape(explanation)}</td></tr>"
            if explanation
            else f'<td colspan="2">{escape(str(value))}</td></tr>'
        )
        for label, value, explanation in section.rows
    )
    facts = f'<table class="hmm-facts"><tbody>{rows}</tbody></table>' if rows else ""
    bits = _strip(section.bits) + _fields(section.bits) if section.bits else ""
    return f"<section><h4>{escape(section.title)}</h4>{facts}{bits}</section>"


def _strip(bits: list[tuple[int, int, str, int, str]]) -> str:
    """Draw the word from its highest bit to its lowest; the table after it says the same."""
    boxes = []
    for high, low, name, value, _ in bits:
        where = str(high) if high == low else f"{high}–{low}"
        kind = "hmm-one" if value else "hmm-zero"
        digits = value if high == low else f"{value:#x}"
        boxes.append(
            f'<span class="{kind}" title="{escape(name or "not used")}"><i>{where}</i>'
            f"<b>{digits}</b></span>"
        )
    return f'<div class="hmm-word" aria-hidden="true">{"".join(boxes)}</div>'


def _fields(bits: list[tuple[int, int, str, int, str]]) -> str:
    rows = []
    for high, low, name, value, meaning in bits:
        if not name:
            continue
        where = str(high) if high == low else f"{high}–{low}"
        shown = value if high == low else f"{value:#x}"
        kind = "hmm-one" if value else "hmm-zero"
        rows.append(
            f'<tr class="{kind}"><td>{where}</td><th scope="row">{escape(name)}</th>'
            f"<td>{shown}</td><td>{escape(meaning)}</td></tr>"
        )
    head = "".join(f'<th scope="col">{title}</th>' for title in ("bits", "field", "value", ""))
    return (
        f'<table class="hmm-fields"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
