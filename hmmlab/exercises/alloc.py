"""The exercise to write a driver's part of a migration (notebook 05)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hmmlab.exercises.migrate import pin
from hmmlab.exercises.rules import Exercise, Trial
from hmmlab.migrations import letters
from hmmlab.model.driver import backing
from hmmlab.model.entry import (
    DEVICE_VALID,
    DEVICE_WRITE,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    device_word,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.migrate import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from hmmlab.model.migrate_vma import SELECT_SYSTEM, MigrateVma
from hmmlab.model.mm_types import mm_lock, vma_lookup
from hmmlab.model.page import page_rows
from hmmlab.model.region import Pages
from hmmlab.model.test_hmm import Dmirror

__all__ = ["AllocAndCopy", "Card"]

#: What somebody else has left in every free frame of the card.
_LEFT_THERE = 666


class Card:
    """The card's memory, as a learner's ``alloc_and_copy`` sees it.

    Words are those of src and dst: whole numbers that name a frame.
    """

    def __init__(self, trial: Trial, device: Dmirror, migrate: MigrateVma, room: int) -> None:
        self.trial, self.device, self.migrate, self.room = trial, device, migrate, room
        self.taken: list[int] = []
        self.filled: set[int] = set()

    def take(self) -> int:
        """Take a free frame, locked. Returns its word for dst, or 0 when the card is full."""
        if len(self.taken) == self.room:
            return 0
        frame = self.device.mdevice.alloc_pages(1, self.device.file)
        self._write(int(frame[0]), _LEFT_THERE)
        self.taken.append(int(migrate_pfn(frame)[0]))
        return self.taken[-1]

    def copy(self, source: int, target: int) -> None:
        """Copy the page that ``source`` names into the frame that ``target`` names."""
        frame = self._mine(target)
        source = int(source)
        named = [int(word) for word in self.migrate.src.tolist()]
        if not source & MIGRATE_PFN_VALID:
            raise self.trial.wrong(
                f"It copied from {source:#x}, which names no frame: the page is empty."
            )
        if source not in named or not source & MIGRATE_PFN_MIGRATE:
            raise self.trial.wrong(f"It copied from {source:#x}, which may not move.")
        machine = self.trial.machine
        pfn = migrate_pfn_to_pfn(np.array([source], np.uint64))
        self._write(frame, int(machine["page.content"][page_rows(machine, pfn)][0]))

    def clear(self, target: int) -> None:
        """Fill the frame that ``target`` names with zeros."""
        self._write(self._mine(target), 0)

    def _mine(self, target: int) -> int:
        target = int(target)
        if target not in self.taken:
            what = "0, no frame: the card was full" if not target else f"{target:#x}, not its own"
            raise self.trial.wrong(f"It wrote to {what}.")
        return int(migrate_pfn_to_pfn(np.array([target], np.uint64))[0])

    def _write(self, frame: int, value: int) -> None:
        machine = self.trial.machine
        behind = backing(machine, np.array([frame]))
        machine.write("page.content", page_rows(machine, behind), value)


class AllocAndCopy(Exercise):
    """Write `alloc_and_copy`, the driver's part between setup and pages.

    `src` and `dst` are lists of words, one a page. `card.take()` gives a frame as a word for `dst`,
    or 0 when the card is full; `card.copy(src[i], word)` and `card.clear(word)` fill it. What
    somebody else left there is still in it. Give `dst` to all that may move, while there is room.
    """

    answer = "alloc_and_copy"
    starter = """
from hmmlab.model.entry import MIGRATE_PFN_MIGRATE, MIGRATE_PFN_VALID


def alloc_and_copy(src, dst, card):
    ...
"""
    model_answer = """
        from hmmlab.model.entry import MIGRATE_PFN_MIGRATE, MIGRATE_PFN_VALID


        def alloc_and_copy(src, dst, card):
            for i, word in enumerate(src):
                frame = card.take() if word & MIGRATE_PFN_MIGRATE else 0
                if not frame:
                    continue
                if word & MIGRATE_PFN_VALID:
                    card.copy(word, frame)
                else:
                    card.clear(frame)
                dst[i] = frame
    """
    hints = (
        "One bit of src says whether a page wants a frame, another whether it has data.",
        "No MIGRATE: leave dst alone. MIGRATE without VALID: there is nothing to copy, and the "
        "process will read whatever you leave in the frame.",
        "`if word & MIGRATE_PFN_MIGRATE:` take; when you got one, copy if "
        "`word & MIGRATE_PFN_VALID`, else clear; then set dst.",
    )
    rounds = 8

    def rule(self, answer: Any, trial: Trial) -> None:
        """Pages of all kinds, and a card with too little room every other time."""
        process, rng = trial.process, trial.rng
        pages = process.mmap(10)
        kinds = rng.permutation(["w", "w", "w", "r", "r", "z", "e", "e", "p", "s"]).tolist()
        before = []
        for page, kind in enumerate(kinds):
            value = int(rng.integers(100, 200)) if kind not in "ze" else 0
            if kind == "z":
                process.load(pages[page])
            elif value:
                process.store(pages[page], value)
            if kind == "r":
                process.mprotect(pages[page], "r")
                process.mprotect(pages[page], "rw")  # of one mapping again, and still read-only
            before.append(value)
        process.madvise(pages[kinds.index("s")], "pageout")
        pin(process, pages[kinds.index("p")])
        device = process.open()
        room = len(kinds) if trial.round % 2 else int(rng.integers(2, 6))
        process.run("migrate_vma", _migrate(trial, device, pages, answer, room))
        read = process.load(pages).tolist()
        for page, (was, now) in enumerate(zip(before, read, strict=True)):
            if was == now:
                continue
            empty = f"Page {page} was empty, and the process reads {now}: "
            lost = f"Page {page} held {was}, and the process reads {now}: "
            why = "what somebody left on the card." if now == _LEFT_THERE else "its data is lost."
            raise trial.wrong((empty if was == 0 else lost) + why)


def _migrate(trial: Trial, device: Dmirror, pages: Pages, answer: Any, room: int) -> Routine[None]:
    """A migration to the device in which the learner's function has the driver's turn."""
    machine: Machine = trial.machine
    lock = mm_lock(machine, device.mm)
    yield from machine.down_read(lock)
    vma = vma_lookup(machine, device.mm, pages.start)
    migrate = MigrateVma(vma, np.arange(pages.start, pages.stop), device.device, SELECT_SYSTEM)
    yield from migrate_vma_setup(machine, migrate)
    yield from _turn_of(device, trial, migrate, pages, answer, room)
    yield from migrate_vma_pages(machine, migrate)
    done = migrate.migrating & (migrate.dst != 0)
    words = device.entries(pages.start, pages.stop)
    frames = device.backing(migrate.dst_pfns[done])
    words[done] = device_word(frames, DEVICE_VALID | DEVICE_WRITE)
    device.store_entries(pages.start, words)
    yield from migrate_vma_finalize(machine, migrate)
    machine.up_read(lock)


@kernel("your driver", "alloc_and_copy")
def _turn_of(
    device: Dmirror, trial: Trial, migrate: MigrateVma, pages: Pages, answer: Any, room: int
) -> Routine[None]:
    card = Card(trial, device, migrate, room)
    src, dst = migrate.src.tolist(), [0] * migrate.src.size
    answer(src, dst, card)
    _judge(trial, migrate, src, dst, card)
    migrate.dst[:] = np.array(dst, np.uint64)
    yield trial.machine.step(
        "Your driver has filled dst for {range}.",
        device.mm,
        pages.start,
        pages.stop,
        detail=migrate.now(trial.machine),
    )


def _judge(trial: Trial, migrate: MigrateVma, src: list[int], dst: list[int], card: Card) -> None:
    """The two lists as the driver hands them back."""
    if src != migrate.src.tolist():
        raise trial.wrong("src has changed. It is the kernel's; the driver only reads it.")
    if len(dst) != len(src):
        raise trial.wrong(f"dst has {len(dst)} words for {len(src)} pages.")
    flags = letters(migrate.src)
    for page, word in enumerate(dst):
        wants = bool(src[page] & MIGRATE_PFN_MIGRATE)
        if word and word not in card.taken:
            raise trial.wrong(f"dst[{page}] is {word!r}, which names no frame of the card.")
        if word and not wants:
            raise trial.wrong(
                f"dst[{page}] names a frame, and src[{page}] is {flags[page]!r}, without M: "
                "that page may not move."
            )
        if wants and not word and len(card.taken) < card.room:
            raise trial.wrong(f"Page {page} may move and there was room, but dst[{page}] is 0.")
    given = [word for word in dst if word]
    if len(set(given)) < len(given):
        raise trial.wrong("Two pages were given the same frame.")
    if len(given) < len(card.taken):
        raise trial.wrong(f"It took {len(card.taken)} frames and gave {len(given)}: some are lost.")
