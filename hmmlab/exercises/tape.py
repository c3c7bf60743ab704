"""Exercises on which events an operation raises, and who has to hear of them (notebook 06)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hmmlab.exercises.races import Subscriber
from hmmlab.exercises.rules import Exercise, Trial, Wrong
from hmmlab.model.mmu_notifier import (
    MmuNotifierRange,
    mmu_interval_notifier_insert,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
)
from hmmlab.model.region import Pages
from hmmlab.model.trace import Trace
from hmmlab.session import Session

__all__ = ["Intervals", "RaiseEvents", "ReadTheTape"]


def _lines(text: Any) -> list[str]:
    return [" ".join(line.split()) for line in str(text).splitlines() if line.strip()]


@dataclass(frozen=True)
class _Told:
    """An event: as a line, its kind, the operation that raised it, and where it was told."""

    line: str
    event: str
    by: str
    trace: Trace
    position: int

    @property
    def where(self) -> tuple[Trace, int]:
        """For a :class:`Wrong`."""
        return self.trace, self.position


def _session() -> Session:
    """A session in which every range is told by a step of its own."""
    return Session(grain=1)


def _told(session: Session) -> list[_Told]:
    trace = session.trace
    assert trace is not None
    steps = [
        position
        for position, event in enumerate(trace.events, 1)
        if isinstance(event.step.detail, MmuNotifierRange)
    ]
    heard = [
        (f"{e['event']} {e['region']} {e['start']} {e['end'] - e['start']}", e["event"], number)
        for number, answer in enumerate(session.answers)
        for e in answer.get("notify", [])
    ]
    if len(steps) != len(heard):  # some in memory that the scenario has no name for
        steps = [trace.operations[number].last for *_, number in heard]
    return [
        _Told(line, event, session.answers[number]["op"], trace, position)
        for (line, event, number), position in zip(heard, steps, strict=True)
    ]


def _end(session: Session) -> tuple[Trace, int]:
    assert session.trace is not None
    return session.trace, len(session.trace)


class RaiseEvents(Exercise):
    """Raise exactly these events, in this order, and no other.

    Write lines of the scenario language, as many as you like; more regions, if you like. Before
    them, these have run:

      open d0 0
      mmap A 4 rw private
      store A 0 4 100
    """

    answer = "lines"
    starter = 'lines = """\n...\n"""'
    hints = (
        "The tape above shows an operation for each of them. Only the order is new.",
        "An operation may raise more than one event: `mremap` tells of the old range twice, and "
        "`fork` once for each private mapping that was written. A store into what a living child "
        "shares copies, and a migration of an empty page is told twice too.",
        "Give each event a region of its own. `mmap S 1 rw shared` makes one that `fork` is silent "
        "about; let a child `exit` before you go on. `MIGRATE` wants `to_dev`, `EXCLUSIVE` "
        "`exclusive`, both of a private page that was written.",
    )
    rounds = 1
    before: ClassVar = ("open d0 0", "mmap A 4 rw private", "store A 0 4 100")
    ways: ClassVar = {
        "UNMAP": ("mmap U 1 rw shared", "munmap U 0 1"),
        "CLEAR": ("mmap C 1 rw shared", "madvise C 0 1 dontneed"),
        "PROTECTION_VMA": ("mmap V 1 rw shared", "store V 0 1 7", "mprotect V 0 1 r"),
        "PROTECTION_PAGE": ("fork c", "exit c"),
        "SOFT_DIRTY": ("clear_refs 4",),
        "MIGRATE": ("to_dev d0 A 0 1",),
        "EXCLUSIVE": ("exclusive d0 A 1 1",),
    }

    @property
    def wanted(self) -> list[str]:
        """The events of this seed, in order."""
        names = list(self.ways)
        return [names[which] for which in self.trial().rng.permutation(len(names))[:4].tolist()]

    def question(self) -> str:
        """What is asked, with the events of this seed."""
        told = [f"  {number}   {event}" for number, event in enumerate(self.wanted, 1)]
        return "\n".join([super().question(), "", "The tape must read:", "", *told])

    def solution(self) -> str:
        """One way for each event, one after another."""
        lines = [line for event in self.wanted for line in self.ways[event]]
        return "\n".join([f'{self.answer} = """', *lines, '"""'])

    def rule(self, answer: Any, trial: Trial) -> None:
        """Run the lines, and read what the notifier was told."""
        session = _session().play(self.before)
        for number, line in enumerate(_lines(answer), 1):
            try:
                ret = session.do(line).get("ret", 0)
            except ValueError as error:
                raise Wrong(f"Line {number}, {line!r}: {error}.", *_end(session)) from None
            if ret < 0:
                refused = f"Line {number}, {line!r}, was refused: it returned {ret}."
                raise Wrong(refused, *_end(session))
        told, wanted = _told(session), self.wanted
        for number, one in enumerate(told):
            if number == len(wanted):
                raise Wrong(f"One event too many: {one.event}, raised by {one.by!r}.", *one.where)
            if one.event != wanted[number]:
                what = f"Event {number + 1} is {one.event}, raised by {one.by!r}; "
                raise Wrong(f"{what}it should be {wanted[number]}.", *one.where)
        if len(told) < len(wanted):
            what = f"{len(told)} of {len(wanted)} events: {wanted[len(told)]} was not raised."
            raise Wrong(what, *_end(session))


class ReadTheTape(Exercise):
    """Predict the tape: all that the device is told of, in order.

    One line an event: its kind, the region, the first page, how many pages. The whole tape of
    `madvise A 0 2 dontneed` would be `CLEAR A 0 2`.
    """

    answer = "prediction"
    starter = 'prediction = """\n...\n"""'
    hints = (
        "Ask of each operation: what could a device hold that is no longer true afterwards? A "
        "first touch raises nothing.",
        "`fork` takes the right to write from all pages of each private mapping that was written, "
        "and it goes mapping by mapping. Where does one mapping end, after `mprotect` or `mremap`?",
        "While the child lives, a store into a page that it shares must copy that page: CLEAR. "
        "`mremap` tells twice of the pages that move, at their old place.",
    )
    rounds = 1
    blocks: ClassVar = (
        ("madvise A {page} 2 dontneed", "store A {page} 1 7"),
        ("mprotect A 4 2 r", "load A 4 2"),
        ("fork c", "store A {other} 1 9"),
        ("mremap A 6 2 B", "load B 0 2"),
    )

    @property
    def story(self) -> list[str]:
        """The operations of this seed."""
        rng = self.trial().rng
        page, other = int(rng.integers(0, 2)), int(rng.integers(2, 4))
        order = [which for which in rng.permutation(len(self.blocks)).tolist() if which != 2]
        chosen = [self.blocks[which] for which in order[:2]]
        chosen.insert(int(rng.integers(0, 3)), self.blocks[2])  # a fork there always is
        lines = [line.format(page=page, other=other) for block in chosen for line in block]
        return [*RaiseEvents.before[:1], "mmap A 8 rw private", "store A 0 8 100", *lines]

    def question(self) -> str:
        """What is asked, with the operations of this seed."""
        return "\n".join([super().question(), "", *(f"  {line}" for line in self.story)])

    def solution(self) -> str:
        """The tape that the model comes to."""
        tape = [one.line for one in _told(_session().play(self.story))]
        return "\n".join([f'{self.answer} = """', *tape, '"""'])

    def rule(self, answer: Any, trial: Trial) -> None:
        """Every line is the model's; a wrong one shows what was told there."""
        session = _session().play(self.story)
        told, given = _told(session), _lines(answer)
        for number, (said, one) in enumerate(zip(given, told, strict=False), 1):
            words = said.upper().split()
            if len(words) != 4:
                expected = "expected a kind, a region and two numbers"
                raise Wrong(f"Line {number}, {said!r}: {expected}.", *one.where)
            if " ".join(words) != one.line:
                kind = "The kind is right, the pages are not" if words[0] == one.event else "No"
                what = f"Event {number} is raised by {one.by!r}. {kind}: {said!r}."
                raise Wrong(what, *one.where)
        if len(given) > len(told):
            what = f"The tape ends after {len(told)} events; {given[len(told)]!r} is none."
            raise Wrong(what, *_end(session))
        if len(given) < len(told):
            one = told[len(given)]
            what = f"After event {len(given)} there is one more, raised by {one.by!r}."
            raise Wrong(what, *one.where)


# --- intervals ------------------------------------------------------------------------------------


class Intervals(Exercise):
    """Choose at most two intervals, so that as few look-ups as possible are retried for nothing.

    An interval is `(first, stop)` in pages of A, half-open. Each look-up runs under an interval
    that covers all its pages; while it runs, one page of A changes. Then it is retried if that
    page lies in its interval, and for nothing if the page was not among those it looked at.
    """

    answer = "intervals"
    starter = "intervals = [...]"
    hints = (
        "Every look-up must be covered by one of the two. What is the least that covers them?",
        "The device works in two places. What lies between them need not be heard of.",
        "Begin each interval at the first page looked at in its place, and stop behind the last. "
        "Some needless retries may stay: a look-up does not always use its whole interval.",
    )
    rounds = 1
    pages: ClassVar = 64

    @property
    def story(self) -> list[tuple[int, int, int]]:
        """Look-ups of this seed: first page, page behind the last, and the page that changes."""
        rng = self.trial().rng
        low, high = int(rng.integers(2, 14)), int(rng.integers(36, 50))
        looks = []
        for place in rng.permutation([low, high] * 4).tolist():
            first = place + int(rng.integers(0, 6))
            stop = first + int(rng.integers(2, 5))
            inside = rng.random() < 0.3
            changed = int(rng.integers(first, stop) if inside else rng.integers(self.pages))
            looks.append((first, stop, changed))
        looks[0] = (*looks[0][:2], low + 16)  # between the two places
        return looks

    def fewest(self) -> tuple[int, list[tuple[int, int]]]:
        """Fewest needless retries, and intervals that reach it."""
        looks = sorted(self.story)
        return min(
            (sum(_needless(looks, each) for each in parts), parts)
            for cut in range(1, len(looks) + 1)
            for parts in [[_hull(part) for part in (looks[:cut], looks[cut:]) if part]]
        )

    def question(self) -> str:
        """What is asked, with the look-ups of this seed."""
        told = [
            f"  looks at pages {first:2} to {stop - 1:2}, and page {changed:2} changes"
            for first, stop, changed in self.story
        ]
        return "\n".join([super().question(), "", *told])

    def solution(self) -> str:
        """Intervals with the fewest needless retries."""
        return f"{self.answer} = {self.fewest()[1]}"

    def rule(self, answer: Any, trial: Trial) -> None:
        """Subscribe as the learner says, look, and count."""
        process, machine = trial.process, trial.machine
        a = process.mmap(self.pages)
        process.store(a, 7)
        try:
            intervals = [(int(first), int(stop)) for first, stop in answer]
        except TypeError:
            raise trial.wrong("Write a list of pairs, such as [(0, 64)].") from None
        if len(intervals) > 2:
            raise trial.wrong(f"{len(intervals)} intervals; this driver has room for two.")
        rows = {
            (first, stop): process.run(
                f"subscribe to pages {first} to {stop - 1}",
                mmu_interval_notifier_insert(
                    machine, process.mm, a.start + first, a.start + stop, Subscriber(machine)
                ),
            )
            for first, stop in intervals
        }
        needless: list[int] = []
        for first, stop, changed in self.story:
            covering = [each for each in intervals if each[0] <= first and stop <= each[1]]
            if not covering:
                what = f"No interval covers pages {first} to {stop - 1}: that look-up would miss "
                raise trial.wrong(f"{what}changes of its own pages.")
            row = rows[min(covering, key=lambda each: each[1] - each[0])]
            if self._looks_again(trial, row, a[changed]) and not first <= changed < stop:
                needless.append(len(trial.trace))
        best, _ = self.fewest()
        if len(needless) > best:
            what = f"{len(needless)} needless retries; {best} would do."
            raise trial.wrong(f"{what} Here is the first.", needless[0])

    @staticmethod
    def _looks_again(trial: Trial, subscription: int, page: Pages) -> bool:
        begin = mmu_interval_read_begin(trial.machine, subscription)
        seq = trial.process.run("look up", begin)
        trial.process.madvise(page, "dontneed")
        return mmu_interval_read_retry(trial.machine, subscription, seq)


def _hull(looks: list[tuple[int, int, int]]) -> tuple[int, int]:
    bounds = np.array(looks)
    return int(bounds[:, 0].min()), int(bounds[:, 1].max())


def _needless(looks: list[tuple[int, int, int]], interval: tuple[int, int]) -> int:
    """Retries for nothing of those look-ups that an interval covers."""
    first, stop = interval
    return sum(
        first <= a and b <= stop and first <= changed < stop and not a <= changed < b
        for a, b, changed in looks
    )
