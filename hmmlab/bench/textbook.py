"""What a textbook would write: objects for frames, mappings and entries, and a loop over pages.

It keeps of private anonymous memory what the model keeps of it: each bit of an entry, each column
of ``struct page``, the two references that a shared frame has, the free list, frames that are freed
only after the TLB is flushed. A test holds the two to the same words. There are no locks, events,
steps or huge pages, no swap, no file, and nobody can look on: here it is the better off of the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from hmmlab.bench.rounds import Story
from hmmlab.model.entry import (
    ACCESSED,
    DIRTY,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    NX,
    PRESENT,
    RW,
    SOFT_DIRTY,
    USER,
)
from hmmlab.model.page import PG_ANON, PG_ANON_EXCLUSIVE, PG_LRU, PG_SWAPBACKED

__all__ = ["Entry", "Frame", "Memory", "Space", "life_of_a_mapping"]

_READ_ONLY = PRESENT | USER | ACCESSED | NX


class Frame:
    """A frame of RAM, as ``struct page`` knows it, and its first word."""

    __slots__ = (
        *("pfn", "refcount", "mapcount", "flags", "content", "mapping", "index"),
        *("swap", "compound", "private"),
    )

    def __init__(self, pfn: int) -> None:
        self.pfn = pfn
        self.refcount = self.mapcount = self.flags = self.content = 0
        self.mapping = self.index = self.swap = self.compound = self.private = 0


class Entry:
    """A page-table entry: a frame, and the bits of its word."""

    __slots__ = ("flags", "frame")

    def __init__(self, frame: Frame, flags: int) -> None:
        self.frame, self.flags = frame, flags


class Memory:
    """RAM: the frames that nobody has, and the anon_vmas so far."""

    def __init__(self) -> None:
        self.free: list[Frame] = []
        self.frames = self.anon_vmas = 0

    def new_anon_vma(self) -> int:
        """Number of an anon_vma that no page belongs to yet."""
        self.anon_vmas += 1
        return self.anon_vmas

    def alloc_page(self) -> Frame:
        """A frame of zeros with one reference."""
        if self.free:
            frame = self.free.pop()
            frame.content = 0
        else:
            self.frames += 1
            frame = Frame(self.frames)
        frame.refcount = 1
        return frame

    def put_page(self, frame: Frame) -> None:
        """Drop a reference; free the frame with the last."""
        frame.refcount -= 1
        if frame.refcount == 0:
            frame.flags = frame.mapping = frame.index = frame.compound = frame.private = 0
            self.free.append(frame)


class Mapping:
    """Pages ``start`` to ``stop - 1`` of an address space, and who may do what there."""

    def __init__(self, start: int, stop: int, anon_vma: int, writable: bool = True) -> None:
        self.start, self.stop, self.writable = start, stop, writable
        self.anon_vma = anon_vma


class Space:
    """An address space.

    Attributes
    ----------
    mappings
        What is mapped, by address.
    root
        Tables of tables of tables of entries, by index.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.mappings: list[Mapping] = []
        self.root: dict[int, dict[int, dict[int, dict[int, Entry]]]] = {}

    def mmap(self, start: int, stop: int) -> None:
        """Promise pages ``start`` to ``stop - 1``."""
        self.mappings.append(Mapping(start, stop, self.memory.new_anon_vma()))

    # --- tables -----------------------------------------------------------------------------------
    def entry(self, vpn: int) -> Entry | None:
        """Walk to the entry of a page; None where there is none."""
        pud = self.root.get(vpn >> 27)
        if pud is None:
            return None
        pmd = pud.get(vpn >> 18 & 511)
        if pmd is None:
            return None
        table = pmd.get(vpn >> 9 & 511)
        if table is None:
            return None
        return table.get(vpn & 511)

    def _set(self, vpn: int, entry: Entry) -> None:
        pud = self.root.setdefault(vpn >> 27, {})
        pmd = pud.setdefault(vpn >> 18 & 511, {})
        table = pmd.setdefault(vpn >> 9 & 511, {})
        table[vpn & 511] = entry

    # --- accesses ---------------------------------------------------------------------------------
    def store(self, vpn: int, value: int) -> None:
        """Write a page's first word, as the CPU does.

        Raises
        ------
        PermissionError
            When nothing is mapped there that may be written.
        """
        entry = self.entry(vpn)
        if entry is None or not entry.flags & RW:
            entry = self._fault(vpn, entry)
        entry.flags |= ACCESSED | DIRTY
        entry.frame.content = value

    def _fault(self, vpn: int, entry: Entry | None) -> Entry:
        """Handle a write fault: a fresh page, or copy on write."""
        for mapping in self.mappings:
            if mapping.start <= vpn < mapping.stop:
                break
        else:
            raise PermissionError(f"nothing is mapped at page {vpn}")
        if not mapping.writable:
            raise PermissionError(f"page {vpn} is read-only")
        if entry is None:
            entry = Entry(self._new_anon_page(mapping, vpn), _READ_ONLY | RW | DIRTY | SOFT_DIRTY)
            self._set(vpn, entry)
        else:
            self._copy_on_write(mapping, vpn, entry)
        return entry

    def _new_anon_page(self, mapping: Mapping, vpn: int) -> Frame:
        """A frame that is this page's alone."""
        frame = self.memory.alloc_page()
        frame.mapcount = 1
        frame.mapping, frame.index = mapping.anon_vma, vpn
        frame.flags = PG_ANON | PG_ANON_EXCLUSIVE | PG_SWAPBACKED | PG_LRU
        return frame

    def _copy_on_write(self, mapping: Mapping, vpn: int, entry: Entry) -> None:
        """Copy the frame for this page, unless nobody else has it."""
        old = entry.frame
        if old.flags & PG_ANON_EXCLUSIVE:
            entry.flags |= RW | SOFT_DIRTY
        elif old.refcount == 1 and not old.compound and not old.swap:
            old.mapping, old.flags = mapping.anon_vma, old.flags | PG_ANON_EXCLUSIVE
            entry.flags |= RW | SOFT_DIRTY
        else:
            new = self._new_anon_page(mapping, vpn)
            new.content = old.content
            entry.frame, entry.flags = new, _READ_ONLY | RW | DIRTY | SOFT_DIRTY
            old.mapcount -= 1
            self.memory.put_page(old)

    # --- operations -------------------------------------------------------------------------------
    def snapshot(self, start: int, stop: int) -> list[int]:
        """The hmm_pfns of pages, 0 where nothing is."""
        pfns = []
        for vpn in range(start, stop):
            entry = self.entry(vpn)
            if entry is None:
                pfns.append(0)
            elif entry.flags & RW:
                pfns.append(entry.frame.pfn | HMM_PFN_VALID | HMM_PFN_WRITE)
            else:
                pfns.append(entry.frame.pfn | HMM_PFN_VALID)
        return pfns

    def mprotect(self, mapping: Mapping, writable: bool) -> None:
        """Give a mapping, and so each of its entries, other rights."""
        mapping.writable = writable
        for vpn in range(mapping.start, mapping.stop):
            entry = self.entry(vpn)
            if entry is None:
                continue
            if not writable:
                entry.flags &= ~RW
            elif entry.flags & DIRTY and entry.frame.flags & PG_ANON_EXCLUSIVE:
                entry.flags |= RW  # its next write need not be seen

    def fork(self) -> Space:
        """A child that shares every frame, read-only in both."""
        child = Space(self.memory)
        for mapping in self.mappings:
            anon_vma = self.memory.new_anon_vma()
            child.mappings.append(Mapping(mapping.start, mapping.stop, anon_vma, mapping.writable))
            for vpn in range(mapping.start, mapping.stop):
                entry = self.entry(vpn)
                if entry is None:
                    continue
                frame = entry.frame
                frame.refcount += 1
                frame.mapcount += 1
                frame.flags &= ~PG_ANON_EXCLUSIVE
                entry.flags &= ~RW
                child._set(vpn, Entry(frame, entry.flags & ~ACCESSED))
        return child

    def dontneed(self, start: int, stop: int) -> None:
        """Throw pages away; their frames are free once the TLB is flushed."""
        gathered = []
        for vpn in range(start, stop):
            entry = self.entry(vpn)
            if entry is not None:
                del self.root[vpn >> 27][vpn >> 18 & 511][vpn >> 9 & 511][vpn & 511]
                entry.frame.mapcount -= 1
                gathered.append(entry.frame)
        for frame in gathered:
            self.memory.put_page(frame)

    def munmap(self, mapping: Mapping) -> None:
        """Throw a mapping away, its pages, and the tables that only it needed."""
        self.dontneed(mapping.start, mapping.stop)
        self.mappings.remove(mapping)
        if not self.mappings:
            self.root.clear()


def life_of_a_mapping(pages: int) -> Story:
    """From mmap to munmap, as the model and the host are told it."""
    space = Space(Memory())

    def store(values: Iterable[int]) -> None:
        for vpn, value in enumerate(values):
            space.store(vpn, value)

    while True:
        space.mmap(0, pages)
        mapping = space.mappings[0]
        yield "store_first_touch", partial(store, range(pages))
        yield "snapshot", partial(space.snapshot, 0, pages)
        yield "mprotect", partial(space.mprotect, mapping, False)
        space.mprotect(mapping, True)
        child = yield "fork", space.fork
        yield "store_cow", partial(store, range(pages))
        child.munmap(child.mappings[0])
        yield "dontneed", partial(space.dontneed, 0, pages)
        store(range(pages))
        yield "munmap", partial(space.munmap, mapping)
