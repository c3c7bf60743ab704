"""Pages: a named range of one address space, sliced like an array."""

from __future__ import annotations

from dataclasses import dataclass

from hmmlab.model.geometry import PAGE_SHIFT

__all__ = ["REGION_PAGES", "REGION_START", "Pages"]

#: First page of the first region, and pages from one region to the next (the recordings' layout).
REGION_START = 0x2_0000_0000 >> PAGE_SHIFT
REGION_PAGES = 0x1000_0000 >> PAGE_SHIFT


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages ``start`` to ``stop - 1`` of the address space ``mm``.

    ``pages[3]`` is one page of them, ``pages[2:6]`` are four; the numbers count from its start.

    Attributes
    ----------
    name
        What the reader calls the region.
    mm
        Number of the address space.
    start, stop
        Page numbers.
    """

    name: str
    mm: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def va(self) -> int:
        """Virtual address of the first byte."""
        return self.start << PAGE_SHIFT

    def __getitem__(self, which: int | slice) -> Pages:
        if isinstance(which, slice):
            if which.step not in (None, 1):
                raise ValueError(f"{self.name}[{which}]: pages lie side by side, step must be 1")
            first, last, _ = which.indices(len(self))
            return Pages(self.name, self.mm, self.start + first, self.start + max(first, last))
        if not -len(self) <= which < len(self):
            raise IndexError(f"{self.name}[{which}]: it has {len(self)} pages")
        first = which % len(self)
        return Pages(self.name, self.mm, self.start + first, self.start + first + 1)

    def __repr__(self) -> str:
        return f"Pages({self.name!r}, {len(self)} pages from {self.va:#x})"
