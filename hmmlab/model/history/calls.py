"""The notebook of a driver: what it calls and what it is called, in the words of its kernel."""

from __future__ import annotations

from hmmlab.model.history.era import error_name
from hmmlab.model.machine import Machine
from hmmlab.model.names import Names

__all__ = ["Calls"]


class Calls:
    """Calls that are noted.

    Attributes
    ----------
    calls
        What was called since :meth:`take_calls`, in order.
    """

    def __init__(self, machine: Machine, mm: int) -> None:
        self.machine, self.mm = machine, mm
        self.calls: list[str] = []

    def note(self, call: str, answer: object = None) -> None:
        """Note a call; an int below 0 is written as an error."""
        if answer is not None:
            number = isinstance(answer, int) and not isinstance(answer, bool)
            call += f" = {error_name(answer) if number else answer}"  # type: ignore[arg-type]
        self.calls.append(call)

    def take_calls(self) -> tuple[str, ...]:
        """The calls since the last time."""
        calls, self.calls = tuple(self.calls), []
        return calls

    def pages(self, start: int, end: int) -> str:
        """A range as arguments: page numbers counted from the beginning of their region."""
        names: Names = self.machine.names
        for first, last in names.of(self.mm).values():
            if first <= start < last:
                return f"{start - first}, {end - first}"
        return f"{start:#x}, {end:#x}"
