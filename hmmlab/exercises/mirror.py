"""Exercises on keeping a mirror true (notebooks 00 and 01)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hmmlab.exercises.kinds import PredictStates
from hmmlab.exercises.promise import device_letters, first_break
from hmmlab.exercises.races import LockWatch, interrupt
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.model.driver import Driver
from hmmlab.model.machine import Machine
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
    mmu_interval_notifier_insert,
    mmu_interval_read_begin,
    mmu_interval_read_retry,
    mmu_interval_set_seq,
)
from hmmlab.model.region import Pages

__all__ = ["FourPages", "Invalidate", "MustRetry", "OrderOfCalls", "WhoIsTold"]


class FourPages(PredictStates):
    """Predict what the device's table holds at the end, one letter a page.

    `w` read-write, `r` read-only, `.` no entry. The driver forgets what it is told of, and no more.
    """

    hints = (
        "Go through it page by page: what did the device get, and what was taken from it since?",
        "`mprotect` and `madvise dontneed` both make it forget. Only its own read fetches again.",
        "What it fetches again has the rights that the process has by then.",
    )

    def story(self, trial: Trial) -> Pages:
        """The device reads four pages; one is protected, one discarded, and one is read again."""
        process = trial.process
        pages = process.mmap(4)
        process.store(pages, 7)
        device = trial.attach(Driver)
        device.read(pages)
        first, second, third = trial.rng.permutation(4)[:3].tolist()
        process.mprotect(pages[first], "r")
        process.madvise(pages[second], "dontneed")
        process.mprotect(pages[third], "r")
        device.read(pages[first])
        return pages


# --- who is told ----------------------------------------------------------------------------------

_LETTERS = {Event.UNMAP: "U", Event.CLEAR: "C", Event.PROTECTION_VMA: "P"}


class WhoIsTold(Exercise):
    """Say what the device is told of at each operation, one letter an operation.

    `U` an address goes (UNMAP), `C` a page goes or another takes its place (CLEAR), `P` a right
    goes (PROTECTION_VMA), `.` nothing.
    """

    answer = "prediction"
    starter = 'prediction = "..."'
    hints = (
        "Ask of each operation: could a device hold something that is no longer true afterwards?",
        "New pages and new data need no message. Who has no page tables has nothing to lose.",
        "A read of an untouched page maps the zero page that all share. The first write there "
        "puts another page in its place.",
    )
    rounds = 1

    def story(self, trial: Trial) -> list[tuple[int, str]]:
        """Run it. Returns the number of each operation that is asked about, and why it is so."""
        process, rng, asked = trial.process, trial.rng, []
        a, b = process.mmap(8), process.mmap(2)
        device = trial.attach(Driver)
        process.store(a[:4], 7)
        device.read(a[:4])
        pool: list[tuple[str, Callable[[], Any]]] = [
            ("The data are new, and the frame is the same.", lambda: process.store(a[0], 8)),
            ("A right goes, which the device has too.", lambda: process.mprotect(a[1], "r")),
            ("The page goes.", lambda: process.madvise(a[2], "dontneed")),
            ("The mapping goes.", lambda: process.munmap(a[3])),
            ("A first touch: nobody holds an outdated nothing.", lambda: process.store(a[4], 9)),
            ("The device asks, and a page is added.", lambda: device.write(a[5], 9)),
        ]
        must: list[tuple[str, Callable[[], Any]]] = [
            ("A first touch: the zero page is added.", lambda: process.load(a[6])),
            ("The zero page goes, and a frame takes its place.", lambda: process.store(a[6], 9)),
            (
                "Nobody has touched these pages: there are no page tables to change.",
                lambda: process.mprotect(b, "r"),
            ),
        ]
        some = [pool[which] for which in rng.permutation(len(pool))[:5].tolist()]
        places = sorted(rng.permutation(len(some) + len(must))[: len(must)].tolist())
        for place, one in zip(places, must, strict=True):
            some.insert(place, one)
        for why, act in some:
            asked.append((len(trial.trace.operations), why))
            act()
        return asked

    def letters(self, trial: Trial, asked: list[tuple[int, str]]) -> str:
        """What the notifier was told of at each operation."""
        return "".join(_letter(trial, number) for number, _ in asked)

    def question(self) -> str:
        """What is asked, with the operations of this seed."""
        trial = self.trial()
        asked = self.story(trial)
        lines = [operation.text for operation in trial.trace.operations]
        before = [f"       {line}" for line in lines[: asked[0][0]]]
        numbered = [f"  {row:2}   {lines[number]}" for row, (number, _) in enumerate(asked, 1)]
        return "\n".join([super().question(), "", *before, *numbered, "", f"{len(asked)} letters."])

    def solution(self) -> str:
        """The letters that the model comes to."""
        trial = self.trial()
        return f'{self.answer} = "{self.letters(trial, self.story(trial))}"'

    def rule(self, answer: Any, trial: Trial) -> None:
        """Every letter is the model's; a wrong one shows the operation."""
        asked = self.story(trial)
        truth = self.letters(trial, asked)
        given = str(answer).replace("·", ".").replace(" ", "").upper()
        if len(given) != len(truth):
            raise trial.wrong(f"{len(given)} letters for {len(truth)} operations.")
        for row, (said, is_) in enumerate(zip(given, truth, strict=True)):
            if said != is_:
                number, why = asked[row]
                operation = trial.trace.operations[number]
                what = f"Operation {row + 1}, `{operation.text}`, is {is_!r}, not {said!r}. {why}"
                raise trial.wrong(what, operation.last)


def _letter(trial: Trial, number: int) -> str:
    operation = trial.trace.operations[number]
    steps = [event.step for event in trial.trace.events[operation.first : operation.last]]
    told = {step.detail.event for step in steps if isinstance(step.detail, MmuNotifierRange)}
    return "".join(_LETTERS[event] for event in told) or "."


# --- in what order --------------------------------------------------------------------------------


class _Diary:
    """An observer that notes what happens first to a number, a lock and two tables."""

    def __init__(self, trial: Trial, device: Driver) -> None:
        self.trial, self.device, self.machine = trial, device, trial.machine
        self.noted: list[tuple[str, int]] = []
        trial.machine.attach(self)

    def began(self, number: int, text: str, actor: str) -> None:
        """Nothing to note."""

    def ended(self, number: int, result: Any) -> None:
        """Nothing to note."""

    def stepped(self, number: int, step: Any) -> None:
        """Nothing to note."""

    def wrote(self, column: str, rows: Any, old: Any, new: Any) -> None:
        """Note it, with the position at which it shows."""
        for what in self._what(column, rows, new):
            if what not in dict(self.noted):
                self.noted.append((what, len(self.trial.trace) + 1))

    def _what(self, column: str, rows: Any, new: Any) -> Iterator[str]:
        if column == "mm.invalidate_seq":
            yield "The number becomes odd." if int(new) & 1 else "The number becomes even."
        elif column == "lock.writer" and rows == self.device.lock:
            yield (
                "The driver takes the lock of its page table."
                if int(new)
                else "The driver gives up its lock, and its callback returns."
            )
        elif column == "interval.seq":
            yield "The driver notes the number, and empties its entries."
        elif column == "pte" and not any(self.machine.holders(self.device.lock)):
            yield "The words of the CPU's table change."


class OrderOfCalls(Exercise):
    """Put what happens in an invalidation in its order.

    The device has an entry for each of the pages. Answer with the letters in their order.
    """

    answer = "order"
    starter = 'order = "..."'
    hints = (
        "What would a look-up that begins in the middle have to find, to know that it must wait?",
        "The driver does both of its things while nobody can map: under its lock.",
        "First the number says *running*, last it says *over*. The driver comes before the CPU.",
    )
    rounds = 1

    def story(self, trial: Trial) -> list[tuple[str, int]]:
        """Run it. Returns what happened in order, and where it shows."""
        process = trial.process
        pages = process.mmap(4)
        process.store(pages, 7)
        device = trial.attach(Driver)
        device.read(pages)
        diary = _Diary(trial, device)
        which = int(trial.rng.integers(3))
        (
            lambda: process.mprotect(pages, "r"),
            lambda: process.madvise(pages, "dontneed"),
            lambda: process.munmap(pages),
        )[which]()
        return diary.noted

    def lettered(self, trial: Trial) -> dict[str, tuple[str, int]]:
        """What happens by its letter, in the order of what happened."""
        happened = self.story(trial)
        letters = trial.rng.permutation(np.array(list("ABCDEF"[: len(happened)]))).tolist()
        return dict(zip(letters, happened, strict=True))

    def question(self) -> str:
        """What is asked, with this seed's operation and letters."""
        trial = self.trial()
        lettered = self.lettered(trial)
        line = trial.trace.operations[-1].text
        told = [f"  {letter}  {what}" for letter, (what, _) in sorted(lettered.items())]
        return "\n".join([super().question(), "", f"  {line}", "", *told])

    def solution(self) -> str:
        """The order in which it happens in the model."""
        return f'{self.answer} = "{"".join(self.lettered(self.trial()))}"'

    def rule(self, answer: Any, trial: Trial) -> None:
        """Every letter is where the model has it; the first that is not shows what comes there."""
        lettered = self.lettered(trial)
        given = str(answer).replace(" ", "").upper()
        if sorted(given) != sorted(lettered):
            raise trial.wrong(f"Each letter from A to {max(lettered)} stands in it once.")
        for said, (letter, (_, position)) in zip(given, lettered.items(), strict=True):
            if said != letter:
                early = lettered[said][0].rstrip(".")
                what = f"{said} ({early[0].lower() + early[1:]}) is too early."
                raise trial.wrong(f"{what} {letter} comes before it.", position)


# --- does an answer hold --------------------------------------------------------------------------


class _Subscriber:
    """Notes the number, as every driver must, and has no table."""

    takes_series = False

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def invalidate(self, subscription: int, range: MmuNotifierRange, cur_seq: int) -> bool:
        """Note the number."""
        mmu_interval_set_seq(self.machine, subscription, cur_seq)
        return True


class MustRetry(Exercise):
    """Write `must_retry`, which says whether a look-up must throw its answer away.

    A driver has subscribed to `interval`, a pair (first, stop) of page numbers. `history` lists in
    order what has happened until it holds its lock and is about to map: `("start", first, stop)`
    and `("end", first, stop)` of changes, and once `("begin", first, stop)`, when
    `mmu_interval_read_begin` let a look-up of these pages go. All ranges are half-open.
    """

    answer = "must_retry"
    starter = "def must_retry(history, interval):\n    ..."
    model_answer = """
        def must_retry(history, interval):
            begun = False
            for what, first, stop in history:
                if what == "begin":
                    begun = True
                elif what == "start" and begun and first < interval[1] and stop > interval[0]:
                    return True
            return False
    """
    hints = (
        "The number is compared, and nothing else. When does the driver note a new one?",
        "In its callback, which runs at a start. Ends do not matter, nor does what was over when "
        "the look-up began.",
        "The callback runs for every change that overlaps the *interval*, whichever pages were "
        "looked up. `(2, 4)` and `(4, 6)` do not overlap.",
    )
    rounds = 10

    def history(self, trial: Trial) -> tuple[list[tuple[str, int, int]], tuple[int, int]]:
        """Draw what happens to 16 pages, of which some are subscribed to and some looked up."""
        rng = trial.rng
        first = int(rng.integers(3, 5))
        stop = first + 8
        looked = (first + 3, first + 5)
        near = [looked, (first, first + 2), (stop - 2, stop + 1)]
        far = [(first - 2, first), (stop, stop + 2), (first - 3, first - 1)]
        before = [_draw(rng, near), _draw(rng, far)]
        after = [_draw(rng, far)]
        if trial.round % 2:  # something hits after the beginning; not always what is looked up
            after.append(near[trial.round // 2 % len(near)])
        events = [(what, *change) for change in before for what in ("start", "end")]
        if rng.integers(2):  # one of the far changes runs on
            events.remove(("end", *before[1]))
        events.append(("begin", *looked))
        events += [(what, *change) for change in after for what in ("start", "end")]
        if rng.integers(2):  # and the last is not over when the driver has its lock
            events.pop()
        return events, (first, stop)

    def rule(self, must_retry: Any, trial: Trial) -> None:
        """The answer is that of `mmu_interval_read_retry` after the same history in the model."""
        machine, process = trial.machine, trial.process
        pages = process.mmap(16)
        process.store(pages, 7)
        history, interval = self.history(trial)
        first, stop = (pages.start + page for page in interval)
        subscription = process.run(
            f"subscribe to pages {interval}",
            mmu_interval_notifier_insert(machine, process.mm, first, stop, _Subscriber(machine)),
        )
        seq, shown = 0, 0
        for what, *where in history:
            if what == "begin":
                seq = process.run(what, mmu_interval_read_begin(machine, subscription))
                shown = len(trial.trace)
                continue
            start, end = (pages.start + page for page in where)
            change = MmuNotifierRange.one(process.mm, Event.CLEAR, start, end)
            tell = invalidate_range_start if what == "start" else invalidate_range_end
            process.run(f"{what} of pages {tuple(where)}", tell(machine, change))
            if seq and what == "start" and machine["interval.seq"][subscription] != seq:
                shown = len(trial.trace)
        truth = mmu_interval_read_retry(machine, subscription, seq)
        said = must_retry(list(history), interval)
        if bool(said) != truth:
            how = "the number has changed" if truth else "the number is still the same"
            what = f"{said} for interval {interval} and {history}, but {how}."
            raise trial.wrong(what, shown)


def _draw(rng: np.random.Generator, ranges: list[tuple[int, int]]) -> tuple[int, int]:
    return ranges[int(rng.integers(len(ranges)))]


# --- the callback ---------------------------------------------------------------------------------


class Invalidate(Exercise):
    """Write the callback `invalidate` of a driver.

    `range.start[0]` and `range.end[0]` are the pages that are about to change, half-open.
    `self.forget(start, stop)` empties entries; `self.lock` guards them. Forget what must be
    forgotten, no more, and leave behind what a look-up that is under way needs to know.
    """

    answer = "Mine"
    starter = """
from hmmlab import Driver
from hmmlab.model.mmu_notifier import mmu_interval_set_seq


class Mine(Driver):
    def invalidate(self, subscription, range, cur_seq):
        ...
"""
    model_answer = """
        from hmmlab import Driver
        from hmmlab.model.mmu_notifier import mmu_interval_set_seq


        class Mine(Driver):
            def invalidate(self, subscription, range, cur_seq):
                yield from self.machine.down_write(self.lock)
                mmu_interval_set_seq(self.machine, subscription, cur_seq)
                self.forget(int(range.start[0]), int(range.end[0]))
                self.machine.up_write(self.lock)
                return True
    """
    hints = (
        "Three things: the entries, the number, the lock. And it answers True.",
        "A look-up that began before must find another number: "
        "`mmu_interval_set_seq(self.machine, subscription, cur_seq)`.",
        "Both happen between `yield from self.machine.down_write(self.lock)` and "
        "`self.machine.up_write(self.lock)`, so the callback is a generator.",
    )
    rounds = 8

    def rule(self, answer: Any, trial: Trial) -> None:
        """After any change nothing is stale, nothing else is lost, and no look-up is misled."""
        process, rng = trial.process, trial.rng
        pages = process.mmap(8)
        process.store(pages, range(100, 108))
        device = trial.attach(answer)
        device.read(pages)
        watch = LockWatch(trial, device, "interval.seq")
        first = int(rng.integers(1, 4))
        some = pages[first : first + int(rng.integers(2, 4))]
        if rng.integers(2):
            trial.finish(process.steps.mprotect(some, "r"))
        else:
            trial.finish(process.steps.madvise(some, "dontneed"))
        self._check_table(trial, pages, some)
        if watch.unlocked:
            raise trial.wrong("The number is noted while nobody holds the lock.", watch.unlocked[0])
        if any(trial.machine.holders(device.lock)):
            raise trial.wrong("The driver's lock is still held.")
        self._check_look_up(trial, device)

    @staticmethod
    def _check_table(trial: Trial, pages: Pages, changed: Pages) -> None:
        broken = first_break(trial.trace, pages)
        if broken:
            raise trial.wrong(broken[1], broken[0])
        letters = device_letters(trial.machine, pages)
        first, last = changed.start - pages.start, changed.stop - pages.start - 1
        for page, letter in enumerate(letters):
            if letter == "." and not first <= page <= last:
                what = f"Page {page} was forgotten, and only pages {first} to {last} changed."
                raise trial.wrong(f"{what} That is safe, but costs a fault.")

    @staticmethod
    def _check_look_up(trial: Trial, device: Driver) -> None:
        """A change in the middle of a look-up, wherever that may be."""
        process = trial.process
        fresh = process.mmap(2)
        process.store(fresh, 7)
        since = len(trial.trace)
        interrupt(
            trial,
            device.steps.read(fresh),
            1 + trial.round % 4,
            lambda: trial.finish(process.steps.madvise(fresh, "dontneed")),
        )
        broken = first_break(trial.trace, fresh, since=since)
        if broken:
            why = "A look-up that was under way did not notice the change. "
            raise trial.wrong(why + broken[1], broken[0])
