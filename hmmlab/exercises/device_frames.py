"""Exercises on frames of device memory and the words that name them (notebook 04)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hmmlab.exercises.kinds import Story
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.model.entry import (
    SWP_DEVICE_WRITE,
    is_device_private,
    is_swap_type,
    swap_offset_pfn,
    swap_type,
)
from hmmlab.model.mm_types import mm_root
from hmmlab.model.mmu_notifier import Event, MmuNotifierRange
from hmmlab.model.page_table import read_range
from hmmlab.model.region import Pages
from hmmlab.model.state import State
from hmmlab.model.trace import Trace

__all__ = ["HomeOrder", "ReadWord", "device_private", "words_of"]


def words_of(state: State, pages: Pages) -> list[int]:
    """The words of pages in the CPU's page table."""
    words = read_range(state, mm_root(state, pages.mm), pages.start, pages.stop)
    found: list[int] = words.tolist()
    return found


def device_private(state: State, pages: Pages) -> list[tuple[int, bool] | None]:
    """What the words of pages say of device memory, by the model's own reading."""
    words = np.array(words_of(state, pages), np.uint64)
    private = is_swap_type(words) & is_device_private(words)
    columns = (private, swap_offset_pfn(words), swap_type(words) == SWP_DEVICE_WRITE)
    return [
        (pfn, writable) if is_private else None
        for is_private, pfn, writable in zip(*(c.tolist() for c in columns), strict=True)
    ]


class ReadWord(Exercise):
    """Write `read_word`, which reads a word of the CPU's page table.

    Where the word is a device-private entry, return `(pfn, writable)`: the frame of device memory
    that it names, and whether it lets the CPU write after the page has come home. For any other
    word return None.
    """

    answer = "read_word"
    starter = "def read_word(word):\n    ..."
    model_answer = """
        def read_word(word):
            kind = word >> 59
            if kind not in (26, 27):
                return None
            pfn = (~word >> 9) & ((1 << 34) - 1)
            return pfn, kind == 26
    """
    hints = (
        "Bits 59 to 63 are the type: 26 for a writable device-private entry, 27 for a read-only "
        "one. A word of 0 has no type, and a present word no type that counts.",
        "The frame stands in the bits from 9 on, each of them inverted. `~` inverts all bits of a "
        "number, so first invert, then shift, then cut off what is above.",
        "A frame number has 34 bits: `(~word >> 9) & ((1 << 34) - 1)`.",
    )
    rounds = 4

    def rule(self, answer: Any, trial: Trial) -> None:
        """Every word of a process whose pages are in all sorts of places."""
        process, rng = trial.process, trial.rng
        pages = process.mmap(12)
        process.store(pages[:10], 7)
        device = process.open()
        first = int(rng.integers(0, 4))
        process.mprotect(pages[first : first + 2], "r")
        device.to_dev(pages[:6])
        process.madvise(pages[7], "pageout")
        process.mprotect(pages[8], "none")
        last = pages[9]
        process.run("exclusive", device.make_exclusive(last.start, last.stop))
        truth = device_private(trial.machine, pages)
        for page, word in enumerate(words_of(trial.machine, pages)):
            said = answer(word)
            if said is not None and not (isinstance(said, tuple) and len(said) == 2):
                raise trial.wrong(
                    f"It returned {said!r}, neither None nor a pfn and True or False."
                )
            given = None if said is None else (int(said[0]), bool(said[1]))
            if given != truth[page]:
                raise trial.wrong(
                    f"Page {page}'s word is {word:#018x}: it returned {_shown(given)}, not "
                    f"{_shown(truth[page])}."
                )


def _shown(read: tuple[int, bool] | None) -> str:
    return "None" if read is None else f"({read[0]:#x}, {read[1]})"


class HomeOrder(Story):
    """Predict in which order the pages come home when the device is closed.

    `close` empties the device's memory from its lowest frame to its highest. Which page has which
    frame, the story tells: a fresh chunk is handed out from its highest frame downwards, and a
    frame that came back is handed out before all others. Give the page numbers as a list.
    """

    answer = "prediction"
    starter = "prediction = [...]"
    hints = (
        "Write the frames down as you go: the first page gets the top frame, the next the one "
        "below it, and so on.",
        "A page that the CPU touches comes home, and its frame goes on top of the free list. The "
        "page that is moved next takes it.",
        "At the end read your notes from the lowest frame up, without the pages that are at home.",
    )
    rounds = 1

    def story(self, trial: Trial) -> Pages:
        """Pages go to the device, some come home, others take their frames."""
        process, rng = trial.process, trial.rng
        device = process.open()
        pages = process.mmap(8)
        process.store(pages, range(100, 108))
        device.to_dev(pages[:5])
        first, *others = rng.permutation(5)[:3].tolist()
        for page in (first, *sorted(others)):  # so that frames and pages are not in one order
            process.load(pages[page])
        device.to_dev(pages[5:7])
        return pages

    def last_lines(self, told: Pages) -> list[str]:
        """The operation that is asked about."""
        return ["  close d0"]

    def solution(self) -> str:
        """The order that the model comes to."""
        trial = self.trial()
        return f"prediction = {self._order(trial, self.story(trial))}"

    def rule(self, answer: Any, trial: Trial) -> None:
        """The order of the notifier's calls while the device is closed."""
        where = self.story(trial)
        before = len(trial.trace)
        truth = self._order(trial, where)
        given = [int(page) for page in answer]
        if sorted(given) != sorted(truth):
            for page in sorted(set(given) ^ set(truth)):
                at = "on the device" if page in truth else "not on the device"
                raise trial.wrong(f"Page {page} is {at} when it is closed.", before)
            raise trial.wrong("Each page comes home once.", before)
        for turn, (said, is_) in enumerate(zip(given, truth, strict=True), 1):
            if said != is_:
                raise trial.wrong(
                    f"Number {turn} to come home is page {is_}, not page {said}: it has the lowest "
                    "frame that is left.",
                    before,
                )

    @staticmethod
    def _order(trial: Trial, where: Pages) -> list[int]:
        """Close the device, and note whose entries are cleared, in order."""
        since = len(trial.trace.operations)
        trial.process.files["d0"].close()
        return _cleared(trial.trace, since, where)


def _cleared(trace: Trace, operation: int, where: Pages) -> list[int]:
    """Offsets of the pages that an operation cleared, in the order of the notifier's ranges."""
    asked = trace.operations[operation]
    order: list[int] = []
    for event in trace.events[asked.first : asked.last]:
        told = event.step.detail
        if isinstance(told, MmuNotifierRange) and told.event is Event.CLEAR:
            order += (told.start - where.start).tolist()
    return order
