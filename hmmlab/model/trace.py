"""What happened: steps, the changes each step made, and a replay that goes to any of them.

A trace is one observer of a machine. It keeps a copy of the columns from the moment it was
attached, then the steps of every operation with what each of them wrote. A :class:`Replay` owns a
copy of the columns and moves forwards with the new values and backwards with the old ones; the
machine itself never runs backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.names import Names
from hmmlab.model.rows import Rows, row_numbers, unique_rows
from hmmlab.model.state import State

__all__ = ["Event", "Observer", "Operation", "Replay", "Step", "Trace", "Write"]


@dataclass(frozen=True, slots=True)
class Step:
    """A point of an operation at which another CPU or the device could run.

    Attributes
    ----------
    function
        Kernel function that has just done what ``text`` says.
    depth
        How many functions of this model are open around it.
    actor
        Who runs it: a process or an open device file.
    mm, start, stop
        The address space and its half-open range of page numbers that the step is about;
        ``mm`` 0 when it is about none.
    text
        One sentence: what, and why. ``{range}`` stands for the range in the reader's own names;
        ``{are}`` and the ``{s}`` of a verb agree with how many pages it has.
    calls
        The kernel functions entered since the step before, each with its depth.
    lock
        Name of the lock that the actor waits for, or "".
    detail
        What the step raised or handled: an ``MmuNotifierRange`` or ``Faults``, a ``MigrateVma`` as
        it was then, or None.
    group
        Steps of one group other than 0 are iterations of one loop taken in bulk: the kernel does
        page after page what they do kind after kind. Details carry their pages, so whoever wants
        the kernel's order sorts by page, stably.
    """

    function: str
    depth: int
    actor: str
    mm: int
    start: int
    stop: int
    text: str
    calls: tuple[tuple[int, str], ...] = ()
    lock: str = ""
    detail: Any = None
    group: int = 0


@dataclass(frozen=True, slots=True)
class Write:
    """One change of one column: ``rows`` held ``old`` and hold ``new``."""

    column: str
    rows: Rows
    old: NDArray[Any]
    new: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Event:
    """A step with what was written since the step before it."""

    step: Step
    operation: int
    writes: tuple[Write, ...]


@dataclass(slots=True)
class Operation:
    """One operation of a trace: steps ``first`` to ``last - 1`` of ``trace.events``."""

    text: str
    actor: str
    first: int
    last: int = -1
    result: Any = None

    @property
    def finished(self) -> bool:
        """Whether the operation has returned."""
        return self.last >= 0


class Observer(Protocol):
    """Who listens to a machine. Every method is called as it happens, in order."""

    def began(self, number: int, text: str, actor: str) -> None:
        """An operation begins; its ``number`` is its own, for several may run by turns."""

    def ended(self, number: int, result: Any) -> None:
        """The operation ``number`` returns."""

    def wrote(self, column: str, rows: Rows, old: NDArray[Any], new: NDArray[Any]) -> None:
        """A column has changed; ``rows`` are unique."""

    def stepped(self, number: int, step: Step) -> None:
        """A step of the operation ``number`` is complete."""


@dataclass
class Trace:
    """A recording of a machine: where it started, and every step since.

    Attributes
    ----------
    base
        Copy of the columns at the moment of attaching.
    events
        One :class:`Event` a step. Position ``i`` of a replay is the state after ``i`` events.
    operations
        The operations in the order in which they began.
    """

    base: State
    events: list[Event] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    listeners: list[Callable[[], None]] = field(default_factory=list)
    _writes: list[Write] = field(default_factory=list)
    _open: dict[int, int] = field(default_factory=dict)

    @property
    def names(self) -> Names:
        """The reader's names."""
        return self.base.names

    def __len__(self) -> int:
        return len(self.events)

    def __repr__(self) -> str:
        return f"Trace({len(self.operations)} operations, {len(self.events)} steps)"

    def __getstate__(self) -> dict[str, Any]:
        """Everything but who listens."""
        return {**vars(self), "listeners": []}

    @property
    def unfinished(self) -> bool:
        """Whether an operation has begun and not ended."""
        return bool(self._open)

    # --- Observer ---------------------------------------------------------------------------------
    def began(self, number: int, text: str, actor: str) -> None:
        """Open a new operation."""
        self._open[number] = len(self.operations)
        self.operations.append(Operation(text, actor, len(self.events)))

    def ended(self, number: int, result: Any) -> None:
        """Close the operation; what was written after its last step belongs to that step."""
        index = self._open[number]
        operation = self.operations[index]
        if self._writes and self.events and self.events[-1].operation == index:
            last = self.events.pop()
            self.events.append(Event(last.step, index, (*last.writes, *self._writes)))
            self._writes.clear()
        elif self._writes:
            self.stepped(number, Step("", 0, operation.actor, 0, 0, 0, "It is done."))
        del self._open[number]
        operation.last, operation.result = len(self.events), result
        for listener in self.listeners:
            listener()

    def called(self, number: int, calls: tuple[tuple[int, str], ...]) -> None:
        """What an operation called after its last step belongs to that step."""
        if self.events and self.events[-1].operation == self._open[number]:
            last = self.events.pop()
            step = replace(last.step, calls=(*last.step.calls, *calls))
            self.events.append(Event(step, last.operation, last.writes))

    def wrote(self, column: str, rows: Rows, old: NDArray[Any], new: NDArray[Any]) -> None:
        """Keep one change for the event that is being made."""
        self._writes.append(Write(column, rows, old, new))

    def stepped(self, number: int, step: Step) -> None:
        """Turn the changes kept so far into one event."""
        self.events.append(Event(step, self._open.get(number, -1), tuple(self._writes)))
        self._writes.clear()

    # --- reading ----------------------------------------------------------------------------------
    def operation_at(self, position: int) -> int:
        """Index of the operation that a position (0 to ``len(trace)``) is in or has just ended."""
        if position == 0 or not self.events:
            return -1
        return self.events[position - 1].operation

    def replay(self) -> Replay:
        """A replay of this trace, at its beginning."""
        return Replay(self)


class Replay:
    """The columns of a trace at any position, from 0 (before it) to ``len(trace)``.

    Attributes
    ----------
    state
        The columns at ``position``; read them, never write.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.state = trace.base.copy()
        self.position = 0

    def __repr__(self) -> str:
        return f"Replay(at step {self.position} of {len(self.trace)})"

    def seek(self, position: int) -> Replay:
        """Go to ``position``.

        Raises
        ------
        ValueError
            When the trace has no such position.
        """
        if not 0 <= position <= len(self.trace):
            raise ValueError(f"position {position}: this trace has 0 to {len(self.trace)}")
        for event in self.trace.events[self.position : position]:
            for write in event.writes:
                self.state.put(write.column, write.rows, write.new)
        for event in reversed(self.trace.events[position : self.position]):
            for write in reversed(event.writes):
                self.state.put(write.column, write.rows, write.old)
        self.position = position
        return self

    @property
    def event(self) -> Event | None:
        """The event that led to this position."""
        return self.trace.events[self.position - 1] if self.position else None

    def changed(self, column: str) -> NDArray[np.int64]:
        """Rows of a column that the current step wrote."""
        event = self.event
        rows = [row_numbers(w.rows) for w in event.writes if w.column == column] if event else []
        return unique_rows(np.concatenate(rows)) if rows else np.zeros(0, np.int64)

    def __iter__(self) -> Iterator[Replay]:
        for position in range(self.position, len(self.trace) + 1):
            yield self.seek(position)
