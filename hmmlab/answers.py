"""What an answer tells of an operation besides its result: events and faults, in reader's names.

The keys are the recordings': ``notify`` has the notifier ranges that were started, and
``faults_handled`` the faults, both in the kernel's order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hmmlab.model.driver import Driver
from hmmlab.model.memory import Faults
from hmmlab.model.mmu_notifier import EVERYTHING, MmuNotifierRange
from hmmlab.model.process import Process
from hmmlab.model.region import REGION_PAGES
from hmmlab.model.rows import Rows
from hmmlab.model.trace import Step

__all__ = ["Heard", "Known"]


@dataclass
class Known:
    """What one process of a scenario has names for.

    Attributes
    ----------
    process
        The process, with its regions.
    devices
        Its open device files by name.
    mms
        Names of the address spaces that these files mirror.
    """

    process: Process
    devices: dict[str, Driver] = field(default_factory=dict)
    mms: dict[int, str] = field(default_factory=dict)

    def place(self, vpn: int) -> tuple[str, int] | None:
        """The region of a page and the page's number in it; None where no name reaches."""
        for name, first in self.process.regions.items():
            if first <= vpn < first + REGION_PAGES:
                return name, vpn - first
        return None


class Heard:
    """An observer that keeps what the steps of one operation tell: events, faults, calls.

    What a kernel thread does after it is not heard; what one does within it raises events, but its
    calls are not the operation's.

    Attributes
    ----------
    calls
        Depth and name of every kernel function that was called.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all, and follow the next operation."""
        self.calls: list[tuple[int, str]] = []
        self._steps: list[Step] = []
        self._number, self._actor = 0, ""

    # --- what a machine tells its observers -------------------------------------------------------
    def began(self, number: int, text: str, actor: str) -> None:
        """Follow the first that begins."""
        if not self._number:
            self._number, self._actor = number, actor

    def ended(self, number: int, result: Any) -> None:
        """Nothing to note."""

    def wrote(self, column: str, rows: Rows, old: Any, new: Any) -> None:
        """Nothing to note."""

    def stepped(self, number: int, step: Step) -> None:
        """Keep a step that tells something."""
        if number != self._number:
            return
        if step.actor == self._actor:
            self.calls.extend(step.calls)
        if step.detail is not None:
            self._steps.append(step)

    def called(self, number: int, calls: tuple[tuple[int, str], ...]) -> None:
        """Keep calls that belong to no step."""
        if number == self._number:
            self.calls.extend(calls)

    # --- in the reader's names --------------------------------------------------------------------
    def notify(self, known: Known) -> list[dict[str, Any]]:
        """Every notifier range that was started where ``known`` has a name for it."""
        events = []
        for range, start, end in self._ranges():
            place = known.place(start)
            if start == 0 and end == EVERYTHING:
                region, first, last = "*", 0, -1
            elif place:
                region, first = place
                last = first + end - start
            else:
                continue
            events.append(
                {
                    "mm": known.mms.get(range.mm, "?"),
                    "event": range.event.name,
                    "region": region,
                    "start": first,
                    "end": last,
                    "owner": int(range.owner != 0),
                }
            )
        return events

    def faults_handled(self, known: Known) -> list[list[Any]]:
        """Every call of ``handle_mm_fault`` as (region, page, write, remote)."""
        calls = []
        for faults, vpn in self._faults():
            place = known.place(vpn)
            if place:
                calls.append([*place, int(faults.write), int(faults.remote)])
        return calls

    def _ranges(self) -> Iterator[tuple[MmuNotifierRange, int, int]]:
        """Every range that was started: its series, first page, and page past the last."""
        found: list[_Found] = []
        for step in self._steps:
            if isinstance(step.detail, MmuNotifierRange):
                series = step.detail
                order = series.start if series.order is None else series.order
                rows = zip(order.tolist(), series.start.tolist(), series.end.tolist(), strict=True)
                found += [(step.group, key, (series, start, end)) for key, start, end in rows]
        return _in_kernel_order(found)

    def _faults(self) -> Iterator[tuple[Faults, int]]:
        """Every call of handle_mm_fault: what it was, and the page."""
        found = [
            (step.group, vpn, (step.detail, vpn))
            for step in self._steps
            if isinstance(step.detail, Faults)
            for vpn in step.detail.vpns.tolist()
        ]
        return _in_kernel_order(found)


_Found = tuple[int, int, Any]


def _in_kernel_order(found: list[_Found]) -> Iterator[Any]:
    """Sort what each loop that was taken in bulk did by iteration, and nothing else."""
    at = 0
    while at < len(found):
        end = at + 1
        while end < len(found) and found[end][0] == found[at][0] != 0:
            end += 1
        yield from (item for _, _, item in sorted(found[at:end], key=lambda entry: entry[1]))
        at = end
