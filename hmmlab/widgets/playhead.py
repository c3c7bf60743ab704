"""The playhead: which step of a trace is shown, and which page is looked at."""

from __future__ import annotations

from typing import Any

from traitlets import Bunch, HasTraits, Int, TraitError, Tuple, observe, validate

from hmmlab.model.trace import Trace
from hmmlab.widgets import reading

__all__ = ["Page", "Playhead"]

#: A page: its address space (``mm``) and its page number (``vpn``).
Page = tuple[int, int]


class Playhead(HasTraits):
    """The only state that views share; it owns the one replay that they read.

    Parameters
    ----------
    trace
        The trace to show. It may grow: a playhead that stands at its end moves with the end.
    position
        The step to begin at; the end when it is not given.

    Attributes
    ----------
    position
        0 is before the first step, ``len(trace)`` after the last.
    length
        How many steps there are.
    revision
        Goes up whenever the trace has news, which may be an answer and no step.
    selected, hovered
        A page as ``(mm, vpn)``, or None.
    device
        Which device's page table is shown: a number of :func:`~hmmlab.widgets.reading.device_files`
        or 0 for the first that is open.
    """

    position = Int(0)
    length = Int(0)
    revision = Int(0)
    selected = Tuple(Int(), Int(), default_value=None, allow_none=True)
    hovered = Tuple(Int(), Int(), default_value=None, allow_none=True)
    device = Int(0)

    def __init__(self, trace: Trace, position: int | None = None) -> None:
        self.trace = trace
        self.replay = trace.replay()
        super().__init__(length=len(trace))
        self.position = len(trace) if position is None else position
        trace.listeners.append(self.refresh)

    def __repr__(self) -> str:
        return f"Playhead(step {self.position} of {self.length})"

    @property
    def operation(self) -> int:
        """Index of the operation that the position is in or has just ended; -1 before the first."""
        return self.trace.operation_at(self.position)

    def span(self, operation: int) -> tuple[int, int]:
        """First and last position of an operation: after its first step, and after its last."""
        asked = self.trace.operations[operation]
        last = asked.last if asked.finished else self.length
        return min(asked.first + 1, self.length), max(last, min(asked.first + 1, self.length))

    def device_of(self, mm: int) -> tuple[int, str]:
        """Find the device file to show beside ``mm``: its number and label, or (0, "")."""
        files = reading.device_files(self.replay.state)
        found = [(file, label) for file, label, mirrored in files if mirrored == mm]
        wanted = [pair for pair in found if pair[0] == self.device]
        return (wanted or found or [(0, "")])[0]

    def refresh(self) -> None:
        """Take in what the trace has gained; it calls this itself when an operation ends."""
        at_end = self.position == self.length
        if self.position:
            # The last step may have gained writes when its operation ended: take it again.
            self.replay.seek(self.position - 1).seek(self.position)
        self.length = len(self.trace)
        if at_end:
            self.position = self.length
        self.revision += 1

    def turn_to(self, trace: Trace) -> None:
        """Look at another trace of the same address spaces, at its end."""
        self.close()
        self.trace, self.replay = trace, trace.replay().seek(len(trace))
        trace.listeners.append(self.refresh)
        before = self.position
        self.length = self.position = len(trace)
        if before == self.position:  # a number that is the same by chance: nobody was told
            self.notify_change(
                Bunch(name="position", old=before, new=before, owner=self, type="change")
            )
        self.revision += 1

    def close(self) -> None:
        """Follow the trace no more."""
        if self.refresh in self.trace.listeners:
            self.trace.listeners.remove(self.refresh)

    @validate("position")
    def _within(self, proposal: Bunch) -> int:
        position: int = proposal["value"]
        if not 0 <= position <= len(self.trace):
            raise TraitError(f"position {position}: this trace has 0 to {len(self.trace)}")
        return position

    # An observer of the class runs before those of the views, which then find the replay in place.
    @observe("position")
    def _seek(self, change: Any) -> None:
        self.replay.seek(self.position)
