"""A graphics card of 2017: device memory made by hmm_devmem_add, and the moves to it and back.

What the card does when its memory is freed or faulted on (``struct hmm_devmem_ops``) is left to a
subclass, for that is what the patch asks of a driver.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hmmlab.model.entry import Pfns, Words
from hmmlab.model.geometry import PAGE_SIZE, SECTION_PAGES
from hmmlab.model.history.devmem_2017 import HmmDevmem, hmm_devmem_add, hmm_vma_alloc_locked_page
from hmmlab.model.history.migrate_2017 import (
    MIGRATE_PFN_DEVICE,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    migrate_pfn,
    migrate_vma,
)
from hmmlab.model.machine import Routine
from hmmlab.model.mm_types import Vma, mm_lock, vma_lookup
from hmmlab.model.page import PG_LOCKED, page_rows, set_flags
from hmmlab.model.page_ref import get_page
from hmmlab.model.process import Process
from hmmlab.model.region import Pages

__all__ = ["Card"]


class Card:
    """A driver with device memory; a subclass writes ``free`` and ``fault``.

    Parameters
    ----------
    process
        Whose pages go to the card.
    frames
        How many frames of its memory the card uses.

    Attributes
    ----------
    devmem
        Its memory, one section of it.
    free_pages
        The free list: frame numbers, of which the last is handed out first.
    """

    def __init__(self, process: Process, frames: int = SECTION_PAGES) -> None:
        self.process, self.machine = process, process.machine
        adding = hmm_devmem_add(self.machine, self, "card", SECTION_PAGES * PAGE_SIZE)
        devmem = process.run("hmm_devmem_add", adding)
        assert isinstance(devmem, HmmDevmem), "a machine has room for one section more"
        self.devmem, first = devmem, devmem.pfn_first
        self.free_pages: list[int] = list(range(first, first + frames))

    # --- struct hmm_devmem_ops --------------------------------------------------------------------
    def free(self, devmem: HmmDevmem, page: Pfns) -> Any:
        """Nobody uses these frames of the card any more."""
        raise NotImplementedError

    def fault(
        self, devmem: HmmDevmem, vma: Vma, addr: int, page: int, flags: int, pmdp: int
    ) -> Any:
        """The CPU touched page ``addr``, which is on the card."""
        raise NotImplementedError

    # --- moving pages -----------------------------------------------------------------------------
    def take(self, pages: Pages) -> int:
        """Move pages to the card, as an operation of its own; what ``migrate_vma`` answers."""
        answer: int = self.process.run(f"take {self.process.in_words(pages)}", self._take(pages))
        return answer

    def _take(self, pages: Pages) -> Routine[int]:
        lock = mm_lock(self.machine, self.process.mm)
        yield from self.machine.down_read(lock)
        try:
            vma = vma_lookup(self.machine, self.process.mm, pages.start)
            return (yield from self.migrate(vma, pages.start, pages.stop, "card"))
        finally:
            self.machine.up_read(lock)

    def migrate(self, vma: Vma | None, start: int, end: int, to: str) -> Routine[int]:
        """Move pages ``start`` to ``end - 1`` to the "card" or to "RAM"; the mmap_lock is held.

        Returns
        -------
        What ``migrate_vma`` answers: 0, also where a page stayed where it was.

        Raises
        ------
        ValueError
            When ``to`` is neither.
        """
        if to not in ("card", "RAM"):
            raise ValueError(f"migrate to {to!r}; expected 'card' or 'RAM'")
        src, dst = np.zeros((2, max(end - start, 0)), np.uint64)
        return migrate_vma(self.machine, self, vma, start, end, src, dst, to)

    # --- struct migrate_vma_ops -------------------------------------------------------------------
    def alloc_and_copy(
        self, vma: Vma, src: Words, dst: Words, start: int, end: int, private: str
    ) -> None:
        """Find a frame for each page that can move, and copy what it holds."""
        content = self.machine["page.content"]
        for at in np.flatnonzero(src & np.uint64(MIGRATE_PFN_MIGRATE)).tolist():  # over frames
            if private == "RAM":
                frame = hmm_vma_alloc_locked_page(self.machine, vma, np.array([start + at]))
                bits = MIGRATE_PFN_LOCKED
            else:
                frame = np.array([self.free_pages.pop()] if self.free_pages else [], np.int64)
                get_page(self.machine, frame)
                set_flags(self.machine, frame, PG_LOCKED)
                bits = MIGRATE_PFN_LOCKED | MIGRATE_PFN_DEVICE
            if not frame.size:
                continue  # no memory: the page stays where it is
            if src[at] & np.uint64(MIGRATE_PFN_VALID):
                old = page_rows(self.machine, np.array([int(src[at]) >> MIGRATE_PFN_SHIFT]))
                self.machine.write("page.content", page_rows(self.machine, frame), content[old])
            dst[at] = migrate_pfn(frame)[0] | np.uint64(bits)

    def finalize_and_map(
        self, vma: Vma, src: Words, dst: Words, start: int, end: int, private: str
    ) -> None:
        """Nothing to map: this card has no page table of its own."""
