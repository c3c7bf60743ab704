"""Exercises on invalidations (notebook 01): who is told of what, and in what order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hmmlab.exercises.races import WriteWatch
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.model.driver import Driver
from hmmlab.model.mmu_notifier import Event, MmuNotifierRange

__all__ = ["OrderOfCalls", "WhoIsTold"]

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


class _Diary(WriteWatch):
    """An observer that notes what happens first to a number, a lock and two tables."""

    def __init__(self, trial: Trial, device: Driver) -> None:
        self.trial, self.device, self.machine = trial, device, trial.machine
        self.noted: list[tuple[str, int]] = []
        trial.machine.attach(self)

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
