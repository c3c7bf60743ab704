"""What a textbook would write: a loop over pages, a walk and an object for each.

It does the bookkeeping that the model does for private anonymous memory, and nothing besides:
four levels of tables, VMAs' rights, frames with counts, owner and content, a free list of them,
copy on write. The tests hold the two to the same state.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from hmmlab.bench.rounds import Story

__all__ = ["Frame", "Space", "life_of_a_mapping"]

_BITS = 9
_PRESENT, _WRITE, _DIRTY = 1, 2, 4


class Frame:
    """A frame of RAM: its counts, whether one mapping owns it alone, where it is mapped, its word.

    ``index`` is the page of the mapping, -1 while the frame is free.
    """

    __slots__ = ("content", "exclusive", "index", "mapcount", "refcount")

    def __init__(self) -> None:
        self.refcount = self.mapcount = self.content = 0
        self.index, self.exclusive = -1, False


class Entry:
    """A page-table entry."""

    __slots__ = ("flags", "frame")

    def __init__(self, frame: Frame, flags: int) -> None:
        self.frame, self.flags = frame, flags


class Space:
    """An address space of one mapping, pages 0 to ``pages - 1``.

    Attributes
    ----------
    free
        Frames that nothing maps.
    root
        Tables of tables of tables of entries, by index.
    writable
        Whether the mapping may be written.
    """

    def __init__(self, pages: int, writable: bool = True) -> None:
        self.pages, self.writable = pages, writable
        self.free: list[Frame] = []
        self.root: dict[int, dict[int, dict[int, dict[int, Entry]]]] = {}

    def _new_frame(self, vpn: int) -> Frame:
        """A frame that nobody has, mapped once."""
        frame = self.free.pop() if self.free else Frame()
        frame.refcount = frame.mapcount = 1
        frame.index, frame.exclusive, frame.content = vpn, True, 0
        return frame

    def _drop(self, frame: Frame) -> None:
        """Let a frame be mapped once less; free it when nobody has it any more."""
        frame.mapcount -= 1
        frame.refcount -= 1
        if not frame.refcount:
            frame.index, frame.exclusive = -1, False
            self.free.append(frame)

    def _table(self, vpn: int) -> dict[int, Entry]:
        """The last table on the way to a page, made where there is none."""
        pud = self.root.setdefault(vpn >> 3 * _BITS, {})
        pmd = pud.setdefault(vpn >> 2 * _BITS & 511, {})
        return pmd.setdefault(vpn >> _BITS & 511, {})

    def entry(self, vpn: int) -> Entry | None:
        """The entry of a page, None where there is none."""
        return self._table(vpn).get(vpn & 511)

    def store(self, values: Iterable[int]) -> None:
        """Write one value to each page; fault where that is needed.

        Raises
        ------
        PermissionError
            When the mapping may not be written.
        """
        for vpn, value in enumerate(values):
            if not self.writable:
                raise PermissionError(f"page {vpn}")
            table = self._table(vpn)
            entry = table.get(vpn & 511)
            if entry is None:
                entry = table[vpn & 511] = Entry(self._new_frame(vpn), _PRESENT | _WRITE)
            elif not entry.flags & _WRITE:
                self._write_fault(vpn, entry)
            entry.flags |= _DIRTY
            entry.frame.content = value

    def _write_fault(self, vpn: int, entry: Entry) -> None:
        """Copy on write, unless nobody else has the frame."""
        old = entry.frame
        if not old.exclusive and old.refcount > 1:
            entry.frame = self._new_frame(vpn)
            entry.frame.content = old.content
            self._drop(old)
        entry.frame.exclusive = True
        entry.flags |= _WRITE

    def snapshot(self) -> list[int]:
        """Flags of each page, 0 where nothing is."""
        flags = []
        for vpn in range(self.pages):
            entry = self.entry(vpn)
            flags.append(entry.flags & (_PRESENT | _WRITE) if entry else 0)
        return flags

    def mprotect(self, writable: bool) -> None:
        """Give the mapping, and so every entry, another protection."""
        self.writable = writable
        for vpn in range(self.pages):
            entry = self.entry(vpn)
            if entry is None:
                continue
            if not writable:
                entry.flags &= ~_WRITE
            elif entry.flags & _DIRTY and entry.frame.exclusive:
                entry.flags |= _WRITE

    def fork(self) -> Space:
        """A child that shares every frame, read-only in both."""
        child = Space(self.pages, self.writable)
        child.free = self.free
        for vpn in range(self.pages):
            entry = self.entry(vpn)
            if entry is None:
                continue
            entry.flags &= ~_WRITE
            entry.frame.refcount += 1
            entry.frame.mapcount += 1
            entry.frame.exclusive = False
            child._table(vpn)[vpn & 511] = Entry(entry.frame, entry.flags)
        return child

    def dontneed(self) -> None:
        """Throw every page away."""
        for vpn in range(self.pages):
            entry = self._table(vpn).pop(vpn & 511, None)
            if entry:
                self._drop(entry.frame)

    def munmap(self) -> None:
        """Throw every page away, and the tables."""
        self.dontneed()
        self.root.clear()


def life_of_a_mapping(pages: int) -> Story:
    """From mmap to munmap, as the model and the host are told it."""
    while True:
        space = Space(pages)
        yield "store_first_touch", partial(space.store, range(pages))
        yield "snapshot", space.snapshot
        yield "mprotect", partial(space.mprotect, False)
        space.mprotect(True)
        child = yield "fork", space.fork
        yield "store_cow", partial(space.store, range(pages))
        child.munmap()
        yield "dontneed", space.dontneed
        space.store(range(pages))
        yield "munmap", space.munmap
