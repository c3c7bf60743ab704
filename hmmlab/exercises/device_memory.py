"""Exercises on how a driver gets memory with struct pages, and keeps it (notebook 04)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from hmmlab.exercises.card import Card
from hmmlab.exercises.device_frames import device_private
from hmmlab.exercises.rules import Exercise, Trial, Wrong
from hmmlab.model.geometry import PAGE_SIZE, SECTION_PAGES, align_up
from hmmlab.model.history.devmem_2017 import HmmDevmem, hmm_devmem_add
from hmmlab.model.machine import KernelError, Routine
from hmmlab.model.memremap import memunmap_pages
from hmmlab.model.page import PHYSICAL_PAGES, page_rows
from hmmlab.model.region import Pages
from hmmlab.model.state import State

__all__ = ["FreeAndFault", "Place"]


class Place(Exercise):
    """Write `place`, the search of `hmm_devmem_add` for free physical space.

    `size` is in bytes. `taken` lists what is occupied, RAM included, as pairs of frame numbers:
    the first, and the one past the last. Physical space ends before frame `1 << 34`. Return the
    first frame of the new device memory, or -34 (`-ERANGE`) where there is no place for it.
    """

    answer = "place"
    starter = """
SECTION = 1 << 15  # frames of a section, 128 MiB
PAGE = 4096


def place(size, taken):
    ...
"""
    model_answer = """
        SECTION = 1 << 15  # frames of a section, 128 MiB
        PAGE = 4096


        def place(size, taken):
            sections = -(-size // (SECTION * PAGE))
            pages = sections * SECTION
            first = (1 << 34) - pages
            while first > pages:
                if not any(a < first + pages and first < b for a, b in taken):
                    return first
                first -= pages
            return -34
    """
    hints = (
        "Round the size up to sections. Then begin with the highest region of that size.",
        "Where something is in the way, the search does not look for its edge: it steps down by "
        "the whole size, and tries again.",
        "It goes on while `first > pages`. Two ranges overlap where each begins before the other "
        "ends.",
    )
    rounds = 8

    def rule(self, answer: Any, trial: Trial) -> None:
        """Add memory to a machine whose physical space is full of other things."""
        machine, rng = trial.machine, trial.rng
        others = []
        for number in range(int(rng.integers(2, 6))):
            size = int(rng.integers(1, 6)) * SECTION_PAGES * PAGE_SIZE
            others.append(self._add(trial, f"card {number}", size))
        for devmem in others:
            if isinstance(devmem, HmmDevmem) and rng.integers(3) == 0:
                memunmap_pages(machine, devmem.pagemap)
        size = int(rng.integers(1, 6 * SECTION_PAGES)) * PAGE_SIZE + int(rng.integers(PAGE_SIZE))
        if trial.round % 4 == 3:
            # Between a third and a half of physical space, whose top is taken: the search gives up.
            size = int(rng.integers((1 << 46) // 3 + (1 << 40), (1 << 45) - (1 << 40)))
        taken = _taken(machine)
        devmem = self._add(trial, "your card", size)
        truth = devmem if isinstance(devmem, int) else devmem.pfn_first
        said = answer(size, [*taken])
        if said == truth:
            return
        pages = align_up(-(-size // PAGE_SIZE), SECTION_PAGES)
        asked = f"For {size:,} bytes, which are {pages // SECTION_PAGES:,} sections,"
        there = "answers -34" if truth < 0 else f"finds frame {truth:#x}"
        found = self._judge(said, truth, pages, taken)
        # No step to show: no page is mapped anywhere.
        raise Wrong(f"{asked} hmm_devmem_add {there}, and `place` says {found}.")

    @staticmethod
    def _judge(said: Any, truth: int, pages: int, taken: list[tuple[int, int]]) -> str:
        """Say what is wrong with a place."""
        if said == -34:
            return "that there is none"
        if not isinstance(said, int | np.integer) or said < 0:
            return f"{said!r}, which is no frame"
        if said + pages > PHYSICAL_PAGES:
            return f"{said:#x}, from where it would reach beyond physical space"
        if said % SECTION_PAGES:
            return f"{said:#x}, which is not the beginning of a section"
        if any(first < said + pages and said < last for first, last in taken):
            return f"{said:#x}, where something is in the way"
        if said > truth > 0:
            return f"{said:#x}, which is free, and the search has stepped past it"
        if truth > 0:
            return f"{said:#x}, which is free, and there is a place above it"
        return f"{said:#x}, which is free, and the search ends before it"

    @staticmethod
    def _add(trial: Trial, name: str, size: int) -> HmmDevmem | int:
        adding = hmm_devmem_add(trial.machine, _Idle(), name, size)
        found: HmmDevmem | int = trial.process.run(f"hmm_devmem_add {name} {size}", adding)
        return found


class _Idle:
    """A driver whose memory nobody ever uses."""

    def free(self, *_: Any) -> None:
        """Take back what was never given."""

    def fault(self, *_: Any) -> int:
        """Refuse what never happens."""
        return 2


def _taken(state: State) -> list[tuple[int, int]]:
    """RAM, and every piece of device memory, as (first, past the last) frame."""
    rows = np.flatnonzero(state["pagemap.last"])
    ends = (state["pagemap.first"][rows].tolist(), state["pagemap.last"][rows].tolist())
    return [(0, state.ram_pages), *zip(*ends, strict=True)]


class FreeAndFault(Exercise):
    """Write the two callbacks that `hmm_devmem_add` asks of a driver.

    `self.free_pages` is the card's free list; its last frame is handed out first.
    `free` gets the frames that nobody uses any more, as an array.
    `fault` is called because the CPU touched page number `addr` of `vma`. It must bring that page
    home: `answer = yield from self.migrate(vma, first, past_the_last, "RAM")` moves pages, and
    answers 0 or an error. Then return VM_FAULT_MINOR or, where it went wrong, VM_FAULT_SIGBUS.
    """

    answer = "Mine"
    starter = """
from hmmlab.exercises.card import Card
from hmmlab.model.history.devmem_2017 import VM_FAULT_MINOR, VM_FAULT_SIGBUS


class Mine(Card):
    def free(self, devmem, page):
        ...

    def fault(self, devmem, vma, addr, page, flags, pmdp):
        ...
"""
    model_answer = """
        from hmmlab.exercises.card import Card
        from hmmlab.model.history.devmem_2017 import VM_FAULT_MINOR, VM_FAULT_SIGBUS


        class Mine(Card):
            def free(self, devmem, page):
                self.free_pages.extend(page.tolist())

            def fault(self, devmem, vma, addr, page, flags, pmdp):
                answer = yield from self.migrate(vma, addr, addr + 1, "RAM")
                return VM_FAULT_MINOR if answer == 0 else VM_FAULT_SIGBUS
    """
    hints = (
        "`free`: if you do not put a frame back on your list, nobody else will. Who calls it?",
        "`fault`: when you return, the CPU tries again. A page that is still away faults again.",
        "`fault` need not touch the free list: when the page has gone home, its old frame has no "
        "reference left, and the kernel calls your `free`.",
    )
    rounds = 4
    #: So few that a frame that is lost will soon be missed.
    frames = 5

    def rule(self, answer: Any, trial: Trial) -> None:
        """Pages go to the card and come home again, until every frame has been used twice."""
        process, rng = trial.process, trial.rng
        pages = process.mmap(8)
        values = rng.integers(100, 1000, 8).tolist()
        process.store(pages, values)
        card: Card = answer(process, self.frames)
        card.fault = self._asked(trial, card.fault)  # type: ignore[method-assign]
        whole = set(card.free_pages)
        for _ in range(4):
            for page in rng.permutation(8)[: self.frames].tolist():
                card.take(pages[page])
            away = [at for at, read in enumerate(device_private(trial.machine, pages)) if read]
            for page in rng.permutation(away)[: int(rng.integers(2, 5))].tolist():
                self._touch(trial, pages, page, values)
                self._account(trial, card, whole)
        process.munmap(pages)
        self._account(trial, card, whole)
        if len(card.free_pages) < len(whole):
            raise trial.wrong("All memory is unmapped, and the card's free list is not full again.")

    @staticmethod
    def _asked(trial: Trial, fault: Any) -> Any:
        """Pass a fault on, and see to it that a code comes back."""

        def asked(*arguments: Any) -> Routine[int]:
            code = fault(*arguments)
            if isinstance(code, Generator):
                code = yield from code
            if not isinstance(code, int):
                raise trial.wrong(f"`fault` returned {code!r}, which is no VM_FAULT code.")
            return code

        return asked

    @staticmethod
    def _touch(trial: Trial, pages: Pages, page: int, values: list[int]) -> None:
        """The CPU reads one page, which must come home with what it holds."""
        try:
            data = trial.finish(trial.process.steps.load(pages[page]))
        except KernelError as error:
            killed = f"The CPU touched page {page}: {error}."
            again = f"The CPU touched page {page}, which stays away: it faults there for ever."
            raise trial.wrong(again if "forever" in str(error) else killed) from None
        if data.tolist() != values[page : page + 1]:
            raise trial.wrong(f"The CPU reads {data.tolist()} in page {page}, not {values[page]}.")

    @staticmethod
    def _account(trial: Trial, card: Card, whole: set[int]) -> None:
        """Every frame is on the free list once, or in use, and never both."""
        listed = [int(pfn) for pfn in card.free_pages]
        frames = np.array(sorted(whole))
        busy = trial.machine["page.refcount"][page_rows(trial.machine, frames)] > 0
        used = set(frames[busy].tolist())
        for pfn in sorted(set(listed)):
            if pfn not in whole:
                raise trial.wrong(f"{pfn:#x} is on the free list, and no frame of the card.")
            if pfn in used:
                raise trial.wrong(f"Frame {pfn:#x} is on the free list, and a page is using it.")
            if listed.count(pfn) > 1:
                raise trial.wrong(f"Frame {pfn:#x} is on the free list {listed.count(pfn)} times.")
        for pfn in sorted(whole - used - set(listed)):
            raise trial.wrong(f"Frame {pfn:#x} is lost: no page uses it, and no list has it.")
