"""Buttons that act on the live machine: each composes one line of the scenario language."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import ipywidgets

from hmmlab.model.names import free_name
from hmmlab.model.state import State
from hmmlab.model.trace import Trace
from hmmlab.widgets import reading
from hmmlab.widgets.parts import push_button, said
from hmmlab.widgets.playhead import Playhead

__all__ = ["Controls", "Session", "outcome"]

#: Most pages that one operation of the language may be about.
MAX_PAGES = 65_536


class Session(Protocol):
    """A live machine that takes lines of the scenario language (:mod:`hmmlab.scenario`)."""

    @property
    def machine(self) -> State:
        """The columns as they are now."""

    @property
    def trace(self) -> Trace:
        """What has happened so far."""

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The answers so far, one an operation."""

    def do(self, line: str) -> dict[str, Any]:
        """Run one line."""


#: What a button shows, what it says when pointed at, and the line it runs.
_CPU = (
    ("Map", "A new region: mmap", "mmap {new} {pages} {prot} {kind}"),
    ("Load", "The CPU reads the pages", "load {region} {page} {pages}"),
    ("Store", "The CPU writes the pages", "store {region} {page} {pages} {value}"),
    ("Protect", "Change the permissions: mprotect", "mprotect {region} {page} {pages} {prot}"),
    ("Discard", "Drop the contents: madvise dontneed", "madvise {region} {page} {pages} dontneed"),
    ("Unmap", "Unmap the pages: munmap", "munmap {region} {page} {pages}"),
)
_DEVICE = (
    ("Read", "The device reads the pages", "read {device} {region} {page} {pages}"),
    ("Write", "The device writes the pages", "write {device} {region} {page} {pages} {value}"),
    ("Snapshot", "What the CPU's table has", "snapshot {device} {region} {page} {pages}"),
    ("To device", "Migrate to device memory", "to_dev {device} {region} {page} {pages}"),
    ("To RAM", "Migrate back to RAM", "to_sys {device} {region} {page} {pages}"),
    ("Close", "Close the device file", "close {device}"),
)  # fmt: skip
_OPEN = ("Open d0", "Open the device file, which begins to mirror the process", "open d0 0")

_COMMANDS = {line: button for *button, line in (*_CPU, *_DEVICE, _OPEN)}


class Controls(ipywidgets.VBox):
    """Act on the machine, and see the line that does it and the answer.

    Parameters
    ----------
    session
        Who runs the lines.
    playhead
        Moves to the end of what a line did; its selected page fills in region and page.
    play
        How to play from a position, for those who want to watch the steps.
    """

    def __init__(
        self, session: Session, playhead: Playhead, play: Callable[[int], None] | None = None
    ) -> None:
        self.session, self.playhead, self._play = session, playhead, play
        self.region = _choice("Region", [], "100px")
        self.page = _number("Page", 0, 0)
        self.pages = _number("Pages", 4, 1)
        self.value = _number("Value", 100, 0)
        self.prot = _choice("Prot", ["rw", "r", "none", "rwx"], "98px")
        self.kind = _choice("Kind", ["private", "shared"], "122px")
        self.device = _choice("Device", [], "100px")
        self.buttons = {
            line: push_button(text, tooltip, partial(self._press, line))
            for line, (text, tooltip) in _COMMANDS.items()
        }
        self.line = ipywidgets.Text(
            description="Line", placeholder="or any operation of the scenario language, then Enter"
        )
        self.line.style.description_width = "initial"
        self.line.layout.flex = "1 1 240px"
        self.line.layout.width = "auto"
        self.run = push_button("Run", "Run the line", lambda: self.do(self.line.value))
        self.watch = ipywidgets.Checkbox(description="play its steps", indent=False, value=False)
        self.watch.layout.width = "auto"
        self.watch.disabled = play is None
        self.answer = ipywidgets.HTML(said("Choose what to do; the line it runs appears here."))
        self.line.on_msg(self._submitted)

        row = ipywidgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="2px 6px")
        inputs = [self.region, self.page, self.pages, self.value, self.prot, self.kind]
        self._device_buttons = [self.buttons[line] for *_, line in _DEVICE]
        super().__init__(
            [
                ipywidgets.HTML("<h3>Act on the machine</h3>"),
                ipywidgets.HBox(inputs, layout=row),
                ipywidgets.HBox(
                    [_caption("CPU"), *(self.buttons[line] for *_, line in _CPU)], layout=row
                ),
                ipywidgets.HBox(
                    [self.device, self.buttons[_OPEN[2]], *self._device_buttons], layout=row
                ),
                ipywidgets.HBox([self.line, self.run, self.watch], layout=row),
                self.answer,
            ]
        )
        self.add_class("hmm-controls")
        playhead.observe(self._follow, ["length"])
        playhead.observe(self._point, ["selected"])
        self._follow()

    def __repr__(self) -> str:
        return f"Controls({len(self.session.answers)} operations so far)"

    # --- acting -----------------------------------------------------------------------------------
    def compose(self, template: str) -> str:
        """Give the line that a button's template gives with the inputs as they are."""
        return template.format(
            region=self.region.value, page=self.page.value, pages=self.pages.value,
            value=self.value.value, prot=self.prot.value, kind=self.kind.value,
            device=self.device.value, new=free_name(self.session.trace.names.everywhere()),
        )  # fmt: skip

    def do(self, line: str) -> None:
        """Run one line, show its answer, and go to the end of what it did."""
        line = line.strip()
        if not line:
            return
        before = self.playhead.length
        self.playhead.position = before  # to be at the end is to move with the end
        try:
            answer = self.session.do(line)
        except ValueError as error:  # what was expected instead, or what the model lacks
            self.answer.value = said(f"{line}: {error}", bad=True)
            return
        self.playhead.refresh()  # the session puts its answer into the trace after the last step
        text, bad = outcome(answer)
        self.answer.value = said(text, bad)
        if self.watch.value and self._play and self.playhead.length > before + 1:
            self._play(before + 1)

    def _submitted(self, _: Any, message: dict[str, Any], __: Any) -> None:
        if message.get("event") == "submit":
            self.do(self.line.value)

    def _press(self, template: str) -> None:
        self.line.value = self.compose(template)
        self.do(self.line.value)

    # --- following --------------------------------------------------------------------------------
    def _follow(self, change: Any = None) -> None:
        """Offer the regions and devices that are there at the end of the trace."""
        regions = self.session.trace.names.everywhere()
        _offer(self.region, regions)
        files = reading.device_files(self.session.machine)
        _offer(self.device, [label for _, label, _ in files])
        for line, button in self.buttons.items():
            button.disabled = ("{region}" in line and not regions) or (
                "{device}" in line and not files
            )
        self.buttons[_OPEN[2]].layout.display = "none" if files else ""
        for button in self._device_buttons:
            button.layout.display = "" if files else "none"
        self.device.layout.display = "" if files else "none"

    def _point(self, change: Any) -> None:
        if change["new"] is None:
            return
        mm, vpn = change["new"]
        for name, (start, stop) in self.session.trace.names.of(mm).items():
            if start <= vpn < stop and name in self.region.options:
                self.region.value, self.page.value = name, vpn - start
                return


def outcome(answer: dict[str, Any]) -> tuple[str, bool]:
    """Put an answer in one sentence, and say whether the kernel refused."""
    op, ret = str(answer.get("op", "")), int(answer.get("ret", 0))
    verb = op.split()[2 if op.startswith("on ") else 0] if op else ""
    if ret < 0 and verb in ("load", "store"):
        return f"{op}: {signal.Signals(-ret).name}: the process would be killed here.", True
    if ret < 0:
        name = errno.errorcode.get(-ret, f"errno {-ret}")
        return f"{op}: {ret}, {name} ({os.strerror(-ret)}).", True
    parts = [f"{op}: returned {ret}"]
    if answer.get("data"):
        parts.append(f"data {_short(answer['data'])}")
    if answer.get("snapshot"):
        parts.append(f"snapshot {_short(bytes.fromhex(answer['snapshot']).hex(' ').split())}")
    notified = answer.get("notify") or []
    if notified:
        told = [
            event["event"] if event["region"] == "*"
            else f"{event['event']} {event['region']} {event['start']}–{event['end'] - 1}"
            for event in notified
        ]  # fmt: skip
        parts.append(f"the device was told: {_short(told)}")
    faults = len(answer.get("faults_handled") or [])
    if faults:
        parts.append(f"{faults} page fault{'' if faults == 1 else 's'}")
    return "; ".join(parts) + ".", False


def _short(values: list[Any], most: int = 16) -> str:
    shown = ", ".join(str(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown}, and {len(values) - most} more"


def _caption(text: str) -> ipywidgets.Label:
    label = ipywidgets.Label(text)
    label.layout.width = "auto"
    return label


def _choice(description: str, options: list[str], width: str) -> ipywidgets.Dropdown:
    choice = ipywidgets.Dropdown(description=description, options=options)
    choice.style.description_width = "initial"
    choice.layout.width = width
    return choice


def _offer(choice: ipywidgets.Dropdown, options: list[str]) -> None:
    """Change what a dropdown offers and keep its choice."""
    if list(choice.options) == options:
        return
    chosen = choice.value
    choice.options = options
    if chosen in options:
        choice.value = chosen
    elif options:
        choice.value = options[0]


def _number(description: str, value: int, least: int) -> ipywidgets.BoundedIntText:
    most = MAX_PAGES if description != "Value" else (1 << 31) - 1
    number = ipywidgets.BoundedIntText(value=value, min=least, max=most, description=description)
    number.style.description_width = "initial"
    number.layout.width = "104px"
    return number
