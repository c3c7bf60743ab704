"""Physical memory: where RAM and device memory lie, and the frames of one chunk of device memory.

The page tables say which frame a page has; here it is the other way round: each frame of a chunk,
from its last downwards (the order in which the test driver hands out a fresh chunk), with the page
that maps it, its counts, or its place in the driver's free list.
"""

from __future__ import annotations

from typing import Any

import anywidget
import ipywidgets
from traitlets import Bool, Dict, Int, List, Tuple, Unicode, link

from hmmlab.model.geometry import PAGE_SHIFT, PAGE_SIZE
from hmmlab.model.page import PHYSICAL_PAGES
from hmmlab.model.state import State
from hmmlab.model.trace import Trace
from hmmlab.widgets import reading
from hmmlab.widgets.page_table_grid import front
from hmmlab.widgets.palette import CPU_STATES
from hmmlab.widgets.physical import Chunk, Frame, chunks, frames_of, free_list, ram_in_use
from hmmlab.widgets.playhead import Page, Playhead
from hmmlab.widgets.state_line import PlayheadLine
from hmmlab.widgets.timeline import Timeline

__all__ = ["WINDOW", "FrameGrid", "PhysicalMemory"]

#: Frames of a chunk that are drawn at once.
WINDOW = 24


class FrameGrid(anywidget.AnyWidget):
    """The map of physical space, and beside it the frames of one chunk of device memory.

    Parameters
    ----------
    playhead
        The playhead to follow; choosing a frame selects the page that maps it.

    Attributes
    ----------
    chunk
        Pagemap of the chunk whose frames are shown: the one that was clicked, or else the one that
        the selected page is in.
    window
        Which :data:`WINDOW` of its frames, from the chunk's last downwards.
    """

    _esm = front("make.js", "paint.js", "memory.js")
    _css = front("style.css")

    places = List(Dict()).tag(sync=True)
    facts = Unicode().tag(sync=True)
    cells = List(Dict()).tag(sync=True)
    chunk = Int(0).tag(sync=True)
    window = Int(0).tag(sync=True)
    more = Bool(False).tag(sync=True)
    selected = Tuple(Int(), Int(), default_value=None, allow_none=True).tag(sync=True)
    hovered = Tuple(Int(), Int(), default_value=None, allow_none=True).tag(sync=True)

    def __init__(self, playhead: Playhead) -> None:
        self.playhead = playhead
        super().__init__(selected=playhead.selected, hovered=playhead.hovered)
        link((playhead, "selected"), (self, "selected"))
        link((playhead, "hovered"), (self, "hovered"))
        self._look()
        playhead.observe(self._follow, ["position", "length"])
        playhead.observe(self._look, "selected")
        self.observe(self._turn, "chunk")
        self.observe(self._follow, "window")

    def __repr__(self) -> str:
        return f"FrameGrid({len(self.cells)} frames)"

    def _turn(self, change: Any) -> None:
        self.window = 0
        self._follow()

    def _look(self, change: Any = None) -> None:
        """Show the frame of the page that was just selected."""
        state, page = self.playhead.replay.state, self.playhead.selected
        named = reading.page_frames(state, *page)[:1] if page else []
        for chunk in chunks(state):
            for pfn in named:
                if chunk.first <= pfn < chunk.last:
                    with self.hold_sync():
                        self.chunk = chunk.pagemap
                        self.window = (chunk.last - 1 - pfn) // WINDOW
        self._follow()

    def _follow(self, change: Any = None) -> None:
        replay = self.playhead.replay
        self.chunks = chunks(replay.state)
        self.shown = self._choose()
        with self.hold_sync():
            self.places = self._map(replay.state)
            if self.shown is None:
                self.facts, self.cells, self.more = "No device memory.", [], False
                return
            self.facts = self._facts(self.shown)
            start = self.window * WINDOW
            self.frames = frames_of(replay, self.shown, start, start + WINDOW)
            self.cells = [self._cell(frame) for frame in self.frames]
            self.more = start + WINDOW < self.shown.last - self.shown.first

    def _choose(self) -> Chunk | None:
        """Choose the chunk that is asked for, or else the first in use, or else the first."""
        asked = [chunk for chunk in self.chunks if chunk.pagemap == self.chunk]
        used = [chunk for chunk in self.chunks if chunk.used]
        return next(iter([*asked, *used, *self.chunks]), None)

    # --- in words ---------------------------------------------------------------------------------
    def _map(self, state: State) -> list[dict[str, Any]]:
        """Put physical space into rows, the highest addresses first; gaps are told as such."""
        rows: list[dict[str, Any]] = []
        above = PHYSICAL_PAGES
        for chunk in self.chunks:
            rows += _gap(chunk.last, above)
            row = _place(chunk.owner, chunk.first, chunk.last, f"{chunk.used:,} in use")
            rows.append({**row, "kind": chunk.kind, "chunk": chunk.pagemap})
            above = chunk.first
        rows += _gap(state.ram_pages, above)
        half, (low, high) = state.ram_pages // 2, ram_in_use(state)
        for node, first, last, used in ((1, half, state.ram_pages, high), (0, 0, half, low)):
            rows.append({**_place(f"node {node}", first, last, f"{used:,} in use"), "kind": "RAM"})
        for row in rows:
            row["shown"] = self.shown is not None and row.get("chunk") == self.shown.pagemap
        return rows

    def _facts(self, chunk: Chunk) -> str:
        size = chunk.last - chunk.first
        return (
            f"{chunk.owner}: zone Device, pgmap {chunk.pagemap} ({chunk.kind}), "
            f"{size:,} struct pages, {chunk.used:,} in use, {size - chunk.used:,} free"
        )

    def _cell(self, frame: Frame) -> dict[str, Any]:
        """Describe a frame for the browser: three short lines, a colour, and a sentence."""
        state = self.playhead.replay.state
        names = [self._name(page) for page in frame.pages]
        colour = ""
        if frame.refcount:
            holder = " & ".join(names) or "in transit"
            counts = f"ref {frame.refcount} map {frame.mapcount}"
            how = "mapped by" if frame.mapcount else "its place is kept by a migration entry of"
            who = f"{how} {holder}" if names else "held, and no entry names it"
            if frame.pages:
                mm, vpn = frame.pages[0]
                code = int(reading.cpu_states(state, mm, vpn, vpn + 1)[0])
                colour = CPU_STATES[code].colour_light
        else:
            holder, counts = "free", _ordinal(frame.turn)
            who = f"free, {_ordinal(frame.turn)} to be handed out" if frame.turn else "free"
        assert self.shown is not None
        told = (
            f"Frame {frame.pfn:#x}: {who}; refcount {frame.refcount}, mapcount {frame.mapcount}, "
            f"pgmap {self.shown.pagemap}, zone Device"
        )
        told += ", locked" if frame.locked else ""
        told += f", its data in RAM frame {frame.behind:#x}" if frame.behind else ""
        return {
            "pfn": f"{frame.pfn:#x}",
            "holder": holder,
            "counts": counts,
            "colour": colour,
            "page": list(frame.pages[0]) if frame.pages else None,
            "pages": [list(page) for page in frame.pages],
            "told": told + ("; changed by this step" if frame.changed else ""),
            "changed": frame.changed,
        }

    def _name(self, page: Page) -> str:
        mm, vpn = page
        names, state = self.playhead.trace.names, self.playhead.replay.state
        where = names.place(mm, vpn, vpn + 1).replace(" page ", " ")
        several = len(reading.address_spaces(state)) > 1
        return f"{names.processes.get(mm, mm)} {where}" if several else where


class PhysicalMemory(PlayheadLine, ipywidgets.VBox):
    """Physical space from the top down, and the frames of device memory.

    Parameters
    ----------
    source
        A trace; or the playhead of another view, to move and to select together with it
        (``PhysicalMemory(view.playhead)``).
    position
        The step to begin at, for a trace; the end when it is not given.
    """

    def __init__(self, source: Trace | Playhead, position: int | None = None) -> None:
        self.playhead = Playhead(source, position) if isinstance(source, Trace) else source
        self.grid = FrameGrid(self.playhead)
        self.summary = ipywidgets.Label()
        self.summary.add_class("hmm-summary")
        self.timeline = Timeline(self.playhead)
        super().__init__([self.timeline, self.grid, self.summary])
        self.add_class("hmm-view")
        self.grid.observe(self._follow, ["cells", "places", "facts"])
        self.playhead.observe(self._follow, ["position", "length"])
        self._follow()

    def show_unit(self, unit: int) -> None:
        """Show the frames of a unit's first chunk.

        Raises
        ------
        ValueError
            When the unit has no memory at this step.
        """
        found = [chunk.pagemap for chunk in self.grid.chunks if chunk.unit == unit]
        if not found:
            raise ValueError(f"unit {unit} has no device memory at this step")
        self.grid.chunk = found[0]

    def _line(self) -> str:
        """Say the state in a line: who has which frame, and which frame comes next."""
        shown, line = self.grid.shown, f"{self._step()}: "
        if shown is None:
            return line + "no device memory"
        holders = [cell["holder"] for cell in self.grid.cells[: self._reach()]]
        more = f", {shown.used} in use" if shown.used > sum(h != "free" for h in holders) else ""
        told = ", ".join(holders)
        top = self.grid.frames[0].pfn
        line += f"{shown.owner}: "
        line += f"from {top:#x} down {told}{more}" if holders else f"no frame in use{more}"
        if shown.unit < 0:
            return line
        following = free_list(self.playhead.replay.state, shown.unit, 1)
        return f"{line}; next {following[0]:#x}" if following.size else line

    def _reach(self) -> int:
        """Count the frames from the first that is drawn to the last of them in use, 12 at most."""
        used = [at for at, frame in enumerate(self.grid.frames[:12]) if frame.refcount]
        return used[-1] + 1 if used else 0

    def _follow(self, change: Any = None) -> None:
        self.summary.value = self._line()


def _place(name: str, first: int, last: int, use: str) -> dict[str, Any]:
    return {
        "name": name,
        "address": f"{first << PAGE_SHIFT:#x}",
        "size": _bytes((last - first) * PAGE_SIZE),
        "use": use,
    }


def _gap(first: int, last: int) -> list[dict[str, Any]]:
    return [{**_place("nothing", first, last, ""), "kind": "gap"}] if first < last else []


def _bytes(number: int) -> str:
    """Write a size in the largest unit that leaves it above 1."""
    power = min(max(number.bit_length() - 1, 0) // 10, 4)
    return f"{number / (1 << 10 * power):.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _ordinal(turn: int) -> str:
    """Write a place in the free list: "next", "2nd", "3rd"."""
    if turn < 2:
        return "next" if turn else ""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(turn % 10, "th")
    return f"{turn}{'th' if turn % 100 in (11, 12, 13) else ending}"
