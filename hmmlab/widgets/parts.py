"""Small parts of several widgets: a button, and a sentence that a screen reader hears."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import ipywidgets

__all__ = ["TEXT", "push_button", "said"]

#: Asks for a glyph as text: without it, browsers may draw the arrows as coloured pictures.
TEXT = "\N{VARIATION SELECTOR-15}"


def push_button(text: str, tooltip: str, action: Callable[[], Any]) -> ipywidgets.Button:
    """A button as wide as its text."""
    button = ipywidgets.Button(description=text, tooltip=tooltip)
    button.layout.width = "auto"
    button.on_click(lambda _: action())
    return button


def said(text: str, bad: bool = False) -> str:
    """A sentence that is read aloud when it changes, with a bar beside it: red where it is bad."""
    return f'<p role="status" class="hmm-answer{" hmm-bad" if bad else ""}">{escape(text)}</p>'
