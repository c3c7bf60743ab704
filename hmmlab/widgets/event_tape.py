"""A tape of the notifier events of a trace: why each was raised, for which pages, who was told.

Time runs downwards and every kind of event has a lane of its own. The tape follows the playhead,
and moves it to the event that is clicked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anywidget
import numpy as np
from traitlets import Bunch, Dict, Int, List, TraitError, Unicode, validate

from hmmlab.model.entry import Words
from hmmlab.model.mmu_notifier import Event, MmuNotifierRange
from hmmlab.model.page_table import read_range
from hmmlab.model.state import State
from hmmlab.model.trace import Trace
from hmmlab.widgets.page_table_grid import front
from hmmlab.widgets.playhead import Playhead
from hmmlab.widgets.state_line import PlayheadLine

__all__ = ["EVENT_KINDS", "EventKind", "EventTape"]

#: Events that are listed at once, around the current one.
MAX_EVENTS = 128


@dataclass(frozen=True, slots=True)
class EventKind:
    """How a kind of event looks on the tape, and what it says."""

    event: Event
    glyph: str
    colour: str
    ink: str
    sentence: str


#: The kinds in the order of their numbers. A hue means what it means in the page tables: greys that
#: nothing is left, blues that something is allowed, green and pink that a device has a hand in it.
EVENT_KINDS = (
    EventKind(Event.UNMAP, "U", "#5c5c5c", "#ffffff",
              "The mapping goes, or moves away: these addresses mean nothing any more."),
    EventKind(Event.CLEAR, "C", "#bdbdbd", "#000000",
              "Page-table entries are emptied or replaced; the mapping stays."),
    EventKind(Event.PROTECTION_VMA, "V", "#0072b2", "#ffffff",
              "The mapping gets another protection."),
    EventKind(Event.PROTECTION_PAGE, "P", "#56b4e9", "#000000",
              "Entries lose the right to write; the mapping keeps its protection."),
    EventKind(Event.SOFT_DIRTY, "S", "#f0e442", "#000000",
              "Every write from now on must be noticed."),
    EventKind(Event.RELEASE, "R", "#d55e00", "#000000",
              "The address space ends."),
    EventKind(Event.MIGRATE, "M", "#009e73", "#000000",
              "A device moves pages; it names itself as the owner."),
    EventKind(Event.EXCLUSIVE, "E", "#cc79a7", "#000000",
              "A device gets pages to itself, or the CPU takes one back."),
)  # fmt: skip

#: A row: number of the event, position, number of its kind, where, where in its region (begin and
#: end, from 0 to 1; none where it has no name), who was told and what it did, owner, operation.
Row = tuple[int, int, int, str, list[float], str, str, str]


class EventTape(PlayheadLine, anywidget.AnyWidget):
    """The notifier events of a trace in order, with the last one before the playhead marked.

    Parameters
    ----------
    playhead
        The playhead to follow; :meth:`go` to an event, or a click on it, moves it.

    Attributes
    ----------
    shown
        Names of the kinds that are shown.
    rows
        The events around the current one, as the browser lists them.
    current
        Number of the last event that has been raised at the playhead, counted from 1 among those
        that are shown; 0 before the first.
    """

    _esm = front("make.js", "listbox.js", "tape.js")
    _css = front("style.css")

    kinds: List[Any] = List().tag(sync=True)
    shown: List[str] = List(Unicode(), [kind.event.name for kind in EVENT_KINDS]).tag(sync=True)
    rows: List[Row] = List().tag(sync=True)
    current = Int(0).tag(sync=True)
    prefix = Unicode().tag(sync=True)
    _total = Int(0).tag(sync=True)
    _told: Dict[int, Row] = Dict()

    def __init__(self, playhead: Playhead) -> None:
        self.playhead = playhead
        self._replay = playhead.trace.replay()  # its own: it goes where the playhead is not
        self._read_to = 0
        self._found: list[tuple[int, MmuNotifierRange]] = []
        super().__init__()
        self.prefix = f"hmm-tape-{self.model_id}"
        self._follow()
        playhead.observe(self._follow, ["position", "length"])
        self.observe(self._follow, "shown")
        self.on_msg(self._asked)

    def go(self, event: int) -> None:
        """Move the playhead to where an event has just been told, by its number from 1.

        Raises
        ------
        ValueError
            When no event that is shown has this number.
        """
        if not 1 <= event <= len(self._listed):
            raise ValueError(f"event {event}; expected 1 to {len(self._listed)}")
        self.playhead.position = self._found[self._listed[event - 1]][0]

    @validate("shown")
    def _known_kinds(self, proposal: Bunch) -> list[str]:
        names: list[str] = proposal["value"]
        unknown = [name for name in names if name not in Event.__members__]
        if unknown:
            raise TraitError(f"{unknown[0]!r}; expected {', '.join(Event.__members__)}")
        return names

    # --- following --------------------------------------------------------------------------------
    def _follow(self, change: Any = None) -> None:
        if self._read_on() or change is None or change["name"] == "shown":
            self._list()
        current = int(np.searchsorted(self._positions, self.playhead.position, side="right"))
        # Whole halves, so that most steps leave the list as it is.
        half = MAX_EVENTS // 2
        start = max(0, min(current // half * half - half // 2, len(self._listed) - MAX_EVENTS))
        stop = min(start + MAX_EVENTS, len(self._listed))
        with self.hold_sync():
            self.rows = [self._row(number + 1) for number in range(start, stop)]
            self.current = current

    def _read_on(self) -> bool:
        """Find the events of what the trace has gained; whether there are any."""
        before, events = len(self._found), self.playhead.trace.events
        for position in range(self._read_to + 1, len(events) + 1):
            detail = events[position - 1].step.detail
            if isinstance(detail, MmuNotifierRange):
                self._found.append((position, detail))
        self._read_to = len(events)
        return len(self._found) > before

    def _list(self) -> None:
        """Take note of the events of the kinds that are shown, and count those of every kind."""
        shown = {Event[name] for name in self.shown}
        self._listed = [at for at, (_, range) in enumerate(self._found) if range.event in shown]
        self._positions = np.array([self._found[at][0] for at in self._listed])
        raised = dict.fromkeys(Event, 0)
        for _, range in self._found:
            raised[range.event] += range.size
        with self.hold_sync():
            self._total = len(self._listed)
            self.kinds = [
                [kind.event.name, kind.glyph, kind.colour, kind.ink, kind.sentence,
                 raised[kind.event]]
                for kind in EVENT_KINDS
            ]  # fmt: skip

    def _row(self, number: int) -> Row:
        at = self._listed[number - 1]
        if at not in self._told:
            self._told[at] = self._describe(*self._found[at])
        return (number, *self._told[at][1:])

    def _describe(self, position: int, range: MmuNotifierRange) -> Row:
        trace = self.playhead.trace
        state = self._replay.seek(self._before_callbacks(position)).state
        told = _told(state, range)
        known = {row: _known(trace, state, file, range) for row, file in told.items() if file}
        state = self._replay.seek(position).state
        listeners = []
        for row, file in told.items():
            name = trace.names.files.get(file, f"file {file}") if file else f"interval {row}"
            after = _known(trace, state, file, range) if file else None
            listeners.append(f"{name}{_effect(known[row], after)}" if after is not None else name)
        for row in np.flatnonzero(state["notifier.mm"] == range.mm).tolist():
            listeners.append(f"notifier {row}")
        start, stop = int(range.start.min()), int(range.end.max())
        where = trace.names.place(range.mm, start, stop)
        if len({found.mm for _, found in self._found}) > 1:
            where = f"{trace.names.processes.get(range.mm, '?')}: {where}"
        if range.size > 1:
            where += f", {range.size} times"
        operation = trace.events[position - 1].operation
        return (
            0,
            position,
            int(range.event),
            where,
            _extent(trace, range.mm, start, stop),
            ", ".join(listeners) or "nobody",
            _owner(trace, state, range.owner),
            trace.operations[operation].text if operation >= 0 else "",
        )

    def _before_callbacks(self, position: int) -> int:
        """The position before the steps of those who were called back, which come before its own.

        What they did in no step of their own is in the event's step.
        """
        events = self.playhead.trace.events
        told = events[position - 1]
        at = position - 1
        while at and events[at - 1].operation == told.operation:
            if events[at - 1].step.depth <= told.step.depth:
                break
            at -= 1
        return at

    def _line(self) -> str:
        events = f"{self._total} event{'' if self._total == 1 else 's'}"
        kinds = len(set(self.shown))
        if kinds < len(EVENT_KINDS):
            events += f" of {kinds} kind{'' if kinds == 1 else 's'}"
        if not self.current:
            return f"before the first of {events}" if self._total else f"no {events[2:]}"
        _, position, kind, where, _, told, owner, operation = self._row(self.current)
        owned = f", owner {owner}" if owner else ""
        name = EVENT_KINDS[kind].event.name
        return (
            f"event {self.current} of {events}, step {position}: {name} of {where} by "
            f"{operation!r}, told: {told}{owned}"
        )

    def _asked(self, _: Any, message: dict[str, Any], __: Any) -> None:
        if 1 <= message.get("go", 0) <= len(self._listed):
            self.go(message["go"])


def _extent(trace: Trace, mm: int, start: int, stop: int) -> list[float]:
    """Where in its named region a range begins and ends, from 0 to 1."""
    for first, last in trace.names.of(mm).values():
        if first <= start < last:
            return [(start - first) / (last - first), (min(stop, last) - first) / (last - first)]
    return [0.0, 1.0] if start == 0 else []


def _told(state: State, range: MmuNotifierRange) -> dict[int, int]:
    """Subscriptions that a range hits, in the order in which they are called, and their files."""
    files = {
        int(state["device_file.subscription"][file]): file
        for file in np.flatnonzero(state["device_file.mm"]).tolist()
    }
    mine = (state["interval.mm"] == range.mm) & (state["interval.deferred"] != 1)
    told = {}
    for row in np.flatnonzero(mine).tolist():
        before, after = state["interval.end"][row], state["interval.start"][row]
        if ((range.start < before) & (range.end > after)).any():
            told[row] = files.get(row, 0)
    return told


def _known(trace: Trace, state: State, file: int, range: MmuNotifierRange) -> Words:
    """Words of a device page table for the pages of a range that have names, and one page more.

    The test driver forgets that one too.
    """
    start, stop = int(range.start.min()), int(range.end.max()) + 1
    root = int(state["device_file.root"][file])
    places = [(max(a, start), min(b, stop)) for a, b in trace.names.of(range.mm).values()]
    words = [read_range(state, root, a, b) for a, b in places if a < b]
    return np.concatenate([np.zeros(0, np.uint64), *words])


def _effect(before: Words, after: Words) -> str:
    """What a device did when it was told."""
    forgotten = int(np.count_nonzero((before != 0) & (after == 0)))
    if forgotten:
        return f" forgets {forgotten}"
    return " forgets nothing" if before.any() else " knows nothing"


def _owner(trace: Trace, state: State, owner: int) -> str:
    """The files of the device that makes the change itself; "" where none does."""
    if not owner:
        return ""
    files = np.flatnonzero((state["device_file.mm"] != 0) & (state["device_file.device"] == owner))
    names = [trace.names.files.get(file, f"file {file}") for file in files.tolist()]
    return ", ".join(names) or f"device {owner}"
