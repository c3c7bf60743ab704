"""Small drivers with device memory, era by era: they note how a place is found and pages move.

========== ===========================================================================
4.14       hmm_devmem_add; migrate_vma() with callbacks; the callbacks free and fault
5.2        the same; nobody removes it any more, for it goes with the device
5.3        a dev_pagemap instead: devm_memremap_pages, page_free, migrate_to_ram
5.4        migrate_vma_setup, _pages, _finalize, one called after another
5.7        the migration says whose device pages it takes (src_owner)
6.1        it says that as pgmap_owner, which kinds of pages, and on which the CPU faults
today      the callback that frees is folio_free
========== ===========================================================================

The patch of April 2017 has no device memory; other patches of its series had.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.entry import (
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    Pfns,
    Words,
    is_device_private,
    migrate_pfn,
    migrate_pfn_to_pfn,
)
from hmmlab.model.geometry import PAGE_SIZE, SECTION_PAGES
from hmmlab.model.history.calls import Calls
from hmmlab.model.history.devmem_2017 import (
    VM_FAULT_MINOR,
    VM_FAULT_SIGBUS,
    HmmDevmem,
    hmm_devmem_add,
    hmm_devmem_remove,
    hmm_vma_alloc_locked_page,
)
from hmmlab.model.history.era import Era
from hmmlab.model.history.migrate_2017 import MIGRATE_PFN_DEVICE, MIGRATE_PFN_LOCKED, migrate_vma
from hmmlab.model.machine import Routine
from hmmlab.model.memremap import free_mem_region, memremap_pages, memunmap_pages
from hmmlab.model.migrate import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from hmmlab.model.migrate_vma import SELECT_DEVICE_PRIVATE, SELECT_SYSTEM, MigrateVma
from hmmlab.model.mm_types import Vma, mm_lock, mm_root, vma_lookup
from hmmlab.model.page import PG_LOCKED, page_rows, set_flags
from hmmlab.model.page_ref import get_page
from hmmlab.model.page_table import read_range
from hmmlab.model.process import Process
from hmmlab.model.region import Pages
from hmmlab.model.rows import as_rows

__all__ = ["MEMORY_DRIVERS", "MemoryDriver"]

_OWNER = 99  # what the new pagemaps say; the test devices are 1 to 4
_NONE = np.zeros(0, np.int64)


class MemoryDriver(Calls):
    """The driver of a card with memory of its own, and no page table: it moves pages and notes how.

    Attributes
    ----------
    free_pages
        Frames of the card that nobody uses, int64; the first is handed out first.
    """

    era: Era
    #: What is called when a frame is free again, and when the CPU touches a page on the card.
    free_name, fault_name = "hmm_devmem_ops.free", "hmm_devmem_ops.fault"

    def __init__(self, process: Process) -> None:
        super().__init__(process.machine, process.mm)
        self.free_pages: Pfns = _NONE
        self._inside = -1  # place in the notes at which a page that the CPU faults on becomes free

    def add(self) -> Routine[None]:
        """Find the card's memory a place, and give it struct pages."""
        raise NotImplementedError

    def move(self, vma: Vma, start: int, end: int, to_card: bool, faulting: Pfns) -> Routine[int]:
        """Move pages as this kernel has it; the mmap_lock is held."""
        raise NotImplementedError

    def remove(self) -> Routine[None]:
        """Give the memory up."""
        raise NotImplementedError

    def take(self, pages: Pages) -> Routine[None]:
        """Move pages of one mapping to the card."""
        lock = mm_lock(self.machine, self.mm)
        yield from self.machine.down_read(lock)
        try:
            vma = vma_lookup(self.machine, self.mm, pages.start)
            assert vma is not None
            yield from self.move(vma, pages.start, pages.stop, True, _NONE)
        finally:
            self.machine.up_read(lock)

    def held(self, pages: Pages) -> int:
        """How many pages are on the card."""
        words = read_range(self.machine, mm_root(self.machine, self.mm), pages.start, pages.stop)
        return int(np.count_nonzero(is_device_private(words)))

    def copies(self, vma: Vma, vpns: Pfns, src: Words, to_card: bool) -> Words:
        """``dst`` for ``src``: new frames, locked, that hold what the old ones did."""
        wanted = (src & np.uint64(MIGRATE_PFN_MIGRATE)) != 0
        count = int(np.count_nonzero(wanted))
        if to_card:
            frames, self.free_pages = self.free_pages[:count], self.free_pages[count:]
            get_page(self.machine, frames)
            set_flags(self.machine, frames, PG_LOCKED)
        else:
            frames = hmm_vma_alloc_locked_page(self.machine, vma, vpns[wanted])
        valid = (src[wanted] & np.uint64(MIGRATE_PFN_VALID)) != 0
        content = self.machine["page.content"]
        old = page_rows(self.machine, migrate_pfn_to_pfn(src[wanted][valid]))
        new = page_rows(self.machine, frames[valid])
        self.machine.write("page.content", as_rows(new), content[old])
        dst = np.zeros(src.size, np.uint64)
        dst[wanted] = migrate_pfn(frames) | (src[wanted] & np.uint64(MIGRATE_PFN_WRITE))
        return dst

    def ends(self, call: str, answer: int | None = None) -> None:
        """Note the call that lets the old pages go.

        Here a fault holds the page it is about, as since 6.1. Before, the migration itself gives
        the last reference up, so that the frame is free before that call returns.
        """
        self._inside = len(self.calls)
        self.note(call, answer)

    def freed(self, pfns: Pfns) -> None:
        """Frames come back to the card."""
        self.free_pages = np.concatenate([pfns, self.free_pages])
        inside = self._inside if self.era < Era.V6_1 and self._inside >= 0 else len(self.calls)
        self.calls.insert(inside, f"{self.free_name} x {pfns.size}")

    def take_calls(self) -> tuple[str, ...]:
        """The calls since the last time."""
        self._inside = -1
        return super().take_calls()


class Memory2017(MemoryDriver):
    """The patch of April 2017: mirrors, and no device memory."""

    era = Era.APRIL_2017

    def add(self) -> Routine[None]:
        """There is none to be had."""
        yield from ()
        self.note("(no device memory yet)")

    def take(self, pages: Pages) -> Routine[None]:
        """Nowhere to take them."""
        yield from ()

    def remove(self) -> Routine[None]:
        """Nothing to give up."""
        yield from ()


class Memory414(MemoryDriver):
    """4.14: HMM finds a place for the memory, and migrate_vma() calls the driver twice."""

    era = Era.V4_14

    def add(self) -> Routine[None]:
        """Ask HMM for a section."""
        size = SECTION_PAGES * PAGE_SIZE
        devmem = yield from hmm_devmem_add(self.machine, self, "card", size)
        assert isinstance(devmem, HmmDevmem)
        self.devmem = devmem
        self.free_pages = np.arange(devmem.pfn_first, devmem.pfn_last)
        self.note_added()

    def note_added(self) -> None:
        """Note what was called for a place."""
        self.note(f"hmm_devmem_add: {SECTION_PAGES} pages")

    def move(self, vma: Vma, start: int, end: int, to_card: bool, faulting: Pfns) -> Routine[int]:
        """One call, with callbacks; which pages the CPU faults on nobody needs to say."""
        src, dst = np.zeros((2, end - start), np.uint64)
        answer = yield from migrate_vma(self.machine, self, vma, start, end, src, dst, to_card)
        self.ends("migrate_vma", answer)
        return answer

    def remove(self) -> Routine[None]:
        """Wait until nobody uses it, and take it away."""
        yield from hmm_devmem_remove(self.machine, self.devmem)
        self.note_removed()

    def note_removed(self) -> None:
        """Note what was called to take it away."""
        self.note("hmm_devmem_remove")

    # --- struct migrate_vma_ops -------------------------------------------------------------------
    def alloc_and_copy(
        self, vma: Vma, src: Words, dst: Words, start: int, end: int, private: bool
    ) -> None:
        """Allocate and copy; ``private`` says whether to the card."""
        self.note(f"alloc_and_copy({self.pages(start, end)})")
        dst[:] = self.copies(vma, np.arange(start, end), src, private)
        bits = MIGRATE_PFN_LOCKED | (MIGRATE_PFN_DEVICE if private else 0)
        dst[dst != 0] |= np.uint64(bits)

    def finalize_and_map(
        self, vma: Vma, src: Words, dst: Words, start: int, end: int, private: bool
    ) -> None:
        """Nothing to map: the card has no page table."""
        self.note(f"finalize_and_map({self.pages(start, end)})")

    # --- struct hmm_devmem_ops --------------------------------------------------------------------
    def free(self, devmem: HmmDevmem, page: Pfns) -> None:
        """Frames come back to the card."""
        self.freed(page)

    def fault(
        self, devmem: HmmDevmem, vma: Vma, addr: int, page: int, flags: int, pmdp: int
    ) -> Routine[int]:
        """Bring the page home."""
        self.note(f"{self.fault_name}({self.pages(addr, addr + 1)})")
        answer = yield from self.move(vma, addr, addr + 1, False, np.array([page]))
        return VM_FAULT_SIGBUS if answer else VM_FAULT_MINOR


class Memory417(Memory414):
    """4.17: the same."""

    era = Era.V4_17


class Memory420(Memory414):
    """4.20: the same, for the last time with a function that removes it."""

    era = Era.V4_20


class Memory52(Memory414):
    """5.2: the device's resources go with the device (since 5.0)."""

    era = Era.V5_2

    def note_removed(self) -> None:
        """Nothing is called."""
        self.note("(goes with the device)")


class Memory53(Memory52):
    """5.3: the wrapper is gone, for it did not save much ("mm: remove hmm_devmem_add").

    The driver fills in a dev_pagemap; underneath nothing has changed.
    """

    era = Era.V5_3
    free_name, fault_name = "dev_pagemap_ops.page_free", "dev_pagemap_ops.migrate_to_ram"

    def note_added(self) -> None:
        """Two calls instead of one."""
        self.note("devm_request_free_mem_region")
        self.note(f"devm_memremap_pages: {SECTION_PAGES} pages")


class Memory54(MemoryDriver):
    """5.4: the driver calls the three parts of a migration itself."""

    era = Era.V5_4
    free_name, fault_name = "dev_pagemap_ops.page_free", "dev_pagemap_ops.migrate_to_ram"
    #: Arguments of ``migrate_vma_setup`` that say what is collected; the last only in a fault.
    selection: tuple[str, ...] = ()

    def add(self) -> Routine[None]:
        """Find a free place, and map it."""
        yield from ()
        first = free_mem_region(self.machine, SECTION_PAGES)
        self.note("request_free_mem_region")
        self.pagemap = memremap_pages(self.machine, first, SECTION_PAGES, _OWNER, self)
        self.note(f"memremap_pages: {SECTION_PAGES} pages")
        self.free_pages = np.arange(first, first + SECTION_PAGES)

    def move(self, vma: Vma, start: int, end: int, to_card: bool, faulting: Pfns) -> Routine[int]:
        """Collect, copy, move, let go."""
        kinds = SELECT_SYSTEM if to_card else SELECT_DEVICE_PRIVATE
        migrate = MigrateVma(vma, np.arange(start, end), _OWNER, kinds, faulting)
        yield from migrate_vma_setup(self.machine, migrate)
        said = [name for name in self.selection if faulting.size or name != "fault_page"]
        self.note(f"migrate_vma_setup({', '.join(said)}): cpages = {migrate.cpages}")
        migrate.dst[:] = self.copies(vma, migrate.vpns, migrate.src, to_card)
        self.note("(allocates and copies)")
        yield from migrate_vma_pages(self.machine, migrate)
        self.note("migrate_vma_pages")
        yield from migrate_vma_finalize(self.machine, migrate)
        self.ends("migrate_vma_finalize")
        return 0

    def remove(self) -> Routine[None]:
        """Unmap it; nobody uses a page of it any more."""
        yield from ()
        memunmap_pages(self.machine, self.pagemap)
        self.note("memunmap_pages")

    # --- struct dev_pagemap_ops -------------------------------------------------------------------
    def page_free(self, machine: object, pfns: Pfns) -> None:
        """Frames come back to the card."""
        self.freed(pfns)

    def migrate_to_ram(
        self, machine: object, vma: Vma, vpns: Pfns, pfns: Pfns, flags: int
    ) -> Routine[None]:
        """Bring pages home, one fault after another."""
        for addr, page in zip(vpns.tolist(), pfns.tolist(), strict=True):  # over faults
            self.note(f"{self.fault_name}({self.pages(addr, addr + 1)})")
            yield from self.move(vma, addr, addr + 1, False, np.array([page]))


class Memory55(Memory54):
    """5.5 and 5.6: the same."""

    era = Era.V5_5


class Memory57(Memory54):
    """5.7: only device pages of the owner that is named are collected."""

    era = Era.V5_7
    selection = ("src_owner",)


class Memory61(Memory54):
    """6.1: owner and kinds of pages; a fault says which page it holds."""

    era = Era.V6_1
    selection = ("pgmap_owner", "flags", "fault_page")


class MemoryToday(Memory61):
    """Today: whole folios are freed."""

    era = Era.TODAY
    free_name = "dev_pagemap_ops.folio_free"


#: The driver of each era.
MEMORY_DRIVERS: dict[Era, type[MemoryDriver]] = {
    kind.era: kind
    for kind in (
        Memory2017,
        Memory414,
        Memory417,
        Memory420,
        Memory52,
        Memory53,
        Memory54,
        Memory55,
        Memory57,
        Memory61,
        MemoryToday,
    )
}
