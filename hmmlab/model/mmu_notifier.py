"""MMU notifiers: who is told before a page table changes, and the sequence numbers of that.

Every change of an address space that a device could notice stands between a start and an end.
At the start each overlapping interval subscription is called back and should forget what it knows;
the sequence number is odd while any such change runs, so whoever looked meanwhile must look again.

A range here may be a whole series of ranges: the arrays ``start`` and ``end`` then say that the
kernel raises one start and one end after another, each around its own small change. The numbers
come out as if it had been done one at a time.

Source: include/linux/mmu_notifier.h, mm/mmu_notifier.c.
"""

from __future__ import annotations

import enum
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.alike import alike, all_of, any_of, how_many
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.state import State

__all__ = [
    "EVERYTHING",
    "Event",
    "IntervalSubscriber",
    "MmuNotifierRange",
    "Subscriber",
    "invalidate_range_end",
    "invalidate_range_start",
    "mm_has_notifiers",
    "mmu_interval_check_retry",
    "mmu_interval_notifier_insert",
    "mmu_interval_notifier_remove",
    "mmu_interval_read_begin",
    "mmu_interval_read_retry",
    "mmu_interval_set_seq",
    "mmu_notifier_register",
    "mmu_notifier_release",
    "mmu_notifier_unregister",
    "series_commute",
]

#: One more than the last page number of an address: the end of a range over everything.
EVERYTHING = 1 << 52

_FIRST_SEQ = 2

_EAGAIN = 11

Machine.declare("mm.has_notifiers", np.int32, "1 once anybody ever subscribed to the mm")
Machine.declare("mm.invalidate_seq", np.int64, "sequence number; odd while a hit is being made")
Machine.declare("mm.active_invalidations", np.int32, "starts that have no end yet")
Machine.declare("interval.mm", np.int32, "address space of an interval subscription; 0 is free")
Machine.declare("interval.start", np.int64, "first page of the interval")
Machine.declare("interval.end", np.int64, "page past the last of the interval")
Machine.declare("interval.seq", np.int64, "sequence number when the interval was last hit")
Machine.declare("interval.deferred", np.int32, "1 to insert, 2 to remove when the mm is quiet")
Machine.declare("notifier.mm", np.int32, "address space of a classic notifier; 0 is free")


class Event(enum.IntEnum):
    """Why a range is invalidated (``enum mmu_notifier_event``)."""

    UNMAP = 0
    CLEAR = 1
    PROTECTION_VMA = 2
    PROTECTION_PAGE = 3
    SOFT_DIRTY = 4
    RELEASE = 5
    MIGRATE = 6
    EXCLUSIVE = 7


@dataclass(frozen=True, slots=True)
class MmuNotifierRange:
    """A range that is about to change, or a series of them (``struct mmu_notifier_range``).

    Attributes
    ----------
    mm
        Address space.
    event
        Why.
    start, end
        int64 arrays of shape (n,): half-open ranges of page numbers, in the kernel's order.
    owner
        Number of the device that makes the change itself, for MIGRATE and EXCLUSIVE; 0 for none.
    vma
        Row of the mapping, 0 for none.
    blockable
        Whether a callback may sleep.
    order
        int64 array of shape (n,): in a loop that is taken in bulk, the iteration that raises each
        range; None where that is the page.
    """

    mm: int
    event: Event
    start: NDArray[np.int64]
    _end: NDArray[np.int64] | None  # of ranges of one page None, until somebody asks
    owner: int = 0
    vma: int = 0
    blockable: bool = True
    order: NDArray[np.int64] | None = None

    @classmethod
    def one(cls, mm: int, event: Event, start: int, end: int, **rest: Any) -> MmuNotifierRange:
        """A single range."""
        return cls(mm, event, np.array([start]), np.array([end]), **rest)

    @classmethod
    def each(cls, mm: int, event: Event, vpns: NDArray[np.int64], **rest: Any) -> MmuNotifierRange:
        """One range of one page for each of ``vpns``."""
        return cls(mm, event, vpns, None, **rest)

    @property
    def end(self) -> NDArray[np.int64]:
        """Where each range ends."""
        end = self._end
        if end is None:
            end = self.start + 1
            object.__setattr__(self, "_end", end)
        return end

    @property
    def size(self) -> int:
        """How many ranges."""
        return self.start.size

    def hits(self, start: int, end: int) -> NDArray[np.bool_]:
        """Which of the series touch pages ``start`` to ``end - 1``, or one for all."""
        if start <= self.start.min() and end >= self.end.max():
            return np.array([True])
        return alike((self.start < end) & (self.end > start))

    def __getitem__(self, which: Any) -> MmuNotifierRange:
        """Some of the series."""
        return replace(
            self,
            start=np.atleast_1d(self.start[which]),
            _end=None if self._end is None else np.atleast_1d(self._end[which]),
            order=None if self.order is None else np.atleast_1d(self.order[which]),
        )


class IntervalSubscriber(Protocol):
    """Who is called back for an interval (``struct mmu_interval_notifier_ops``)."""

    #: Whether ``invalidate`` takes a series of ranges; if not, it is called for one after another.
    takes_series: bool

    def invalidate(
        self, subscription: int, range: MmuNotifierRange, cur_seq: int
    ) -> bool | Generator[Any, Any, bool]:
        """The pages of ``range`` are about to change; False where it would have to sleep."""


class Subscriber(Protocol):
    """A classic notifier (``struct mmu_notifier_ops``); its methods may be generators.

    ``invalidate_range_end(range)``, when a change is over, may be there too. The kernel warns of
    who may refuse a start and has an end: nobody can tell it whether its end belongs to a start.
    Who has ``unpaired`` True hears no end after a refusal, as in kernels before 5.12.
    """

    def invalidate_range_start(self, range: MmuNotifierRange) -> Any:
        """A change of one range begins. -EAGAIN where it would have to sleep and may not."""


def mm_has_notifiers(state: State, mm: int) -> bool:
    """Whether anybody ever subscribed to this address space; nothing is raised before."""
    return bool(state["mm.has_notifiers"][mm])


def series_commute(state: Machine, mm: int, start: int, stop: int) -> bool:
    """Whether several changes within pages ``start`` to ``stop - 1`` may be told kind after kind.

    They may where every subscriber takes series and is hit by all of the changes or by none: then
    the last change has the same sequence number in any order.
    """
    if state["mm.active_invalidations"][mm] or (state["notifier.mm"] == mm).any():
        return False
    mine = np.flatnonzero(state["interval.mm"] == mm)
    starts, ends = state["interval.start"][mine], state["interval.end"][mine]
    whole = ((starts <= start) & (ends >= stop)) | (starts >= stop) | (ends <= start)
    return all_of(whole) and all(
        state.objects["interval"][row].takes_series for row in mine.tolist()
    )


def _first_subscription(machine: Machine, mm: int) -> None:
    if not mm_has_notifiers(machine, mm):
        machine.write("mm.has_notifiers", mm, 1)
        machine.write("mm.invalidate_seq", mm, _FIRST_SEQ)


# --- start and end --------------------------------------------------------------------------------


def invalidate_range_start(machine: Machine, range: MmuNotifierRange) -> Routine[None]:
    """Tell everybody that ``range`` is about to change.

    Raises
    ------
    KernelError
        EAGAIN when the range is not blockable and somebody would have to sleep; no end must follow.
    """
    if mm_has_notifiers(machine, range.mm) and range.size:
        yield from _range_start(machine, range)


def invalidate_range_end(machine: Machine, range: MmuNotifierRange) -> Routine[None]:
    """Tell that the change of ``range`` is over."""
    if mm_has_notifiers(machine, range.mm) and range.size:
        yield from _range_end(machine, range)


@kernel("mm/mmu_notifier.c", "__mmu_notifier_invalidate_range_start")
def _range_start(machine: Machine, range: MmuNotifierRange) -> Routine[None]:
    yield from _hit_intervals(machine, range)
    refused = False
    for row in np.flatnonzero(machine["notifier.mm"] == range.mm).tolist():
        for single in _singles(range):
            answer = yield from _maybe(
                machine.objects["notifier"][row].invalidate_range_start(single)
            )
            refused |= bool(answer) and not range.blockable
    if refused:
        # All have been called, and those that did start expect an end. The intervals get none: as
        # in the kernel, the count of running changes stays one too high, for a process that dies.
        yield from _end_classic(machine, range, refused=True)
        raise KernelError(_EAGAIN, "a notifier cannot sleep now")


def _end_classic(
    machine: Machine, range: MmuNotifierRange, *, refused: bool = False
) -> Routine[None]:
    for row in np.flatnonzero(machine["notifier.mm"] == range.mm).tolist():
        subscriber = machine.objects["notifier"][row]
        end = getattr(subscriber, "invalidate_range_end", None)
        if end is None or (refused and getattr(subscriber, "unpaired", False)):
            continue
        for single in _singles(range):
            yield from _maybe(end(single))


def _hit_intervals(machine: Machine, range: MmuNotifierRange) -> Routine[None]:
    mm = range.mm
    subscriptions = np.flatnonzero(
        (machine["interval.mm"] == mm) & (machine["interval.deferred"] != 1)
    )
    hits = {
        row: range.hits(machine["interval.start"][row], machine["interval.end"][row])
        for row in subscriptions.tolist()
    }
    hit = reduce(np.logical_or, hits.values(), np.array([False]))
    active = int(machine["mm.active_invalidations"][mm])
    # While something else runs, all share its odd number; otherwise each has one of its own.
    seq, step = int(machine["mm.invalidate_seq"][mm]) | 1, 0 if active else 2
    machine.write("mm.active_invalidations", mm, active + 1)
    if any_of(hit):
        machine.write("mm.invalidate_seq", mm, seq + step * (how_many(hit, range.size) - 1))
    refused = False
    for subscription, mine in hits.items():
        if any_of(mine):
            heard, before = range, None
            if mine.size > 1:
                heard, before = range[mine], (np.cumsum(hit) - 1)[mine]
            subscriber = machine.objects["interval"][subscription]
            refused |= not (
                yield from _call_back(subscriber, subscription, heard, seq, step, before)
            )
    if refused:
        _interval_end(machine, mm)
        raise KernelError(_EAGAIN, "a subscriber cannot sleep now")
    yield machine.step(
        _start_sentence(range, sum(any_of(mine) for mine in hits.values())),
        mm,
        int(range.start[0]),
        int(range.end[-1]),
        detail=range,
    )


@kernel("mm/mmu_notifier.c", "__mmu_notifier_invalidate_range_end")
def _range_end(machine: Machine, range: MmuNotifierRange) -> Routine[None]:
    _interval_end(machine, range.mm)
    yield from _end_classic(machine, range)
    yield machine.step(
        "{range}: the change is over, and who was told may look again.",
        range.mm,
        int(range.start[0]),
        int(range.end[-1]),
    )


def _interval_end(machine: Machine, mm: int) -> None:
    active = int(machine["mm.active_invalidations"][mm]) - 1
    machine.write("mm.active_invalidations", mm, active)
    seq = int(machine["mm.invalidate_seq"][mm])
    if active or not seq & 1:
        return
    machine.write("mm.invalidate_seq", mm, seq + 1)
    waiting = np.flatnonzero((machine["interval.mm"] == mm) & (machine["interval.deferred"] != 0))
    for row in waiting.tolist():
        if machine["interval.deferred"][row] == 2:
            _drop(machine, row)
        else:
            machine.write("interval.deferred", row, 0)


def _call_back(
    subscriber: IntervalSubscriber,
    subscription: int,
    range: MmuNotifierRange,
    seq: int,
    step: int,
    before: NDArray[np.int64] | None,
) -> Routine[bool]:
    """Tell a subscriber of a series, or of one range of it after another, each with its number.

    That is ``seq``, and ``step`` more for each range that came ``before``: None where they are the
    series' own.
    """
    if subscriber.takes_series:
        last = seq + step * (range.size - 1 if before is None else int(before[-1]))
        return (yield from _maybe(subscriber.invalidate(subscription, range, last)))
    seqs = seq + step * (np.arange(range.size) if before is None else before)
    willing = True
    for single, number in zip(_singles(range), seqs.tolist(), strict=True):
        willing &= bool((yield from _maybe(subscriber.invalidate(subscription, single, number))))
    return willing


def _singles(range: MmuNotifierRange) -> list[MmuNotifierRange]:
    return [range] if range.size == 1 else [range[i] for i in np.arange(range.size)]


def _maybe(answer: Any) -> Routine[Any]:
    """The answer of a callback that may be a plain function or a generator."""
    return (yield from answer) if isinstance(answer, Generator) else answer


def _start_sentence(range: MmuNotifierRange, told: int) -> str:
    who = {0: "No interval is hit", 1: "One subscription is told"}.get(
        told, f"{told} subscriptions are told"
    )
    series = "" if range.size == 1 else f", one page after another ({range.size} times)"
    return f"{who}: {range.event.name} of {{range}} begins{series}."


# --- interval subscriptions -----------------------------------------------------------------------


@kernel("mm/mmu_notifier.c")
def mmu_interval_notifier_insert(
    machine: Machine, mm: int, start: int, end: int, subscriber: IntervalSubscriber
) -> Routine[int]:
    """Subscribe to pages ``start`` to ``end - 1``. Returns the number of the subscription.

    Raises
    ------
    KernelError
        EOVERFLOW when the interval is empty or leaves the address space.
    """
    if not 0 <= start < end <= EVERYTHING:
        raise KernelError(75, f"interval of pages {start:#x} to {end:#x}")
    _first_subscription(machine, mm)
    row = machine.take("interval.mm")
    seq = int(machine["mm.invalidate_seq"][mm])
    deferred = 0
    if not machine["mm.active_invalidations"][mm]:
        seq -= 1
    elif seq & 1:
        deferred = 1
    else:
        seq |= 1
        machine.write("mm.invalidate_seq", mm, seq)
    for column, value in (
        ("mm", mm),
        ("start", start),
        ("end", end),
        ("seq", seq),
        ("deferred", deferred),
    ):
        machine.write(f"interval.{column}", row, value)
    machine.objects.setdefault("interval", {})[row] = subscriber
    yield machine.step("A subscription to {range} is made.", mm, start, end)
    return row


@kernel("mm/mmu_notifier.c")
def mmu_interval_notifier_remove(machine: Machine, subscription: int) -> Routine[None]:
    """End a subscription; while an invalidation runs, wait for that to end first."""
    mm = int(machine["interval.mm"][subscription])
    if machine["mm.invalidate_seq"][mm] & 1:
        machine.write("interval.deferred", subscription, 2)
        while machine["interval.mm"][subscription]:
            yield machine.step("It waits until the invalidation ends.", mm, lock="invalidate_seq")
        return
    _drop(machine, subscription)
    yield machine.step("The subscription ends.", mm)


def _drop(machine: Machine, subscription: int) -> None:
    for column in ("mm", "start", "end", "seq", "deferred"):
        machine.write(f"interval.{column}", subscription, 0)


@kernel("mm/mmu_notifier.c")
def mmu_interval_read_begin(machine: Machine, subscription: int) -> Routine[int]:
    """Sequence number to look under; waits while the subscription is being hit.

    Raises
    ------
    ValueError
        When there is no such subscription, or no longer.
    """
    known = 0 < subscription < machine["interval.mm"].size
    mm = int(machine["interval.mm"][subscription]) if known else 0
    if not mm:
        raise ValueError(f"subscription {subscription} is not there: it was removed or never made")
    seq = int(machine["interval.seq"][subscription])
    while seq == machine["mm.invalidate_seq"][mm]:
        yield machine.step("It waits until the invalidation ends.", mm, lock="invalidate_seq")
    yield machine.step(f"From here on it looks under sequence number {seq}.", mm)
    return seq


def mmu_interval_set_seq(machine: Machine, subscription: int, cur_seq: int) -> None:
    """Note, inside ``invalidate`` and under the driver's own lock, that the interval is hit."""
    machine.write("interval.seq", subscription, cur_seq)


def mmu_interval_read_retry(machine: Machine, subscription: int, seq: int) -> bool:
    """Whether the interval was hit since ``read_begin``: the decisive test, under the lock."""
    return bool(machine["interval.seq"][subscription] != seq)


def mmu_interval_check_retry(machine: Machine, subscription: int, seq: int) -> bool:
    """The same test without the lock: may be stale, good for giving up early."""
    return mmu_interval_read_retry(machine, subscription, seq)


@kernel("mm/mmu_notifier.c", "__mmu_notifier_release")
def mmu_notifier_release(machine: Machine, mm: int) -> Routine[None]:
    """The address space ends: every interval is hit with RELEASE, and stays subscribed.

    A classic notifier that has ``release(mm)`` is called, and all of them are gone then.
    """
    if not mm_has_notifiers(machine, mm):
        return
    yield from _hit_intervals(machine, MmuNotifierRange.one(mm, Event.RELEASE, 0, EVERYTHING))
    _interval_end(machine, mm)
    rows = np.flatnonzero(machine["notifier.mm"] == mm)
    for row in rows.tolist():
        release = getattr(machine.objects["notifier"][row], "release", None)
        if release is not None:
            yield from _maybe(release(mm))
    machine.write("notifier.mm", rows, 0)


# --- classic notifiers ----------------------------------------------------------------------------


@kernel("mm/mmu_notifier.c")
def mmu_notifier_register(machine: Machine, mm: int, subscriber: Subscriber) -> Routine[int]:
    """Subscribe to a whole address space, to starts and to ends. Returns its number."""
    _first_subscription(machine, mm)
    row = machine.take("notifier.mm")
    machine.write("notifier.mm", row, mm)
    machine.objects.setdefault("notifier", {})[row] = subscriber
    yield machine.step("A notifier is registered.", mm)
    return row


@kernel("mm/mmu_notifier.c")
def mmu_notifier_unregister(machine: Machine, row: int) -> Routine[None]:
    """End a classic subscription."""
    mm = int(machine["notifier.mm"][row])
    machine.write("notifier.mm", row, 0)
    yield machine.step("The notifier is gone.", mm)
