"""Frames: the columns of ``struct page``, their rows, and what they say.

    pfn   0 .. ram_pages            RAM, the first half node 0, the second half node 1
          .. 2**34                  free physical space
          2**34 - 65536 .. 2**34    the first chunk of device memory, then downwards

A frame's row is its pfn for RAM; device memory, which grows downwards from the top, follows
upwards: the frame below the top is the first row after RAM.

Source: include/linux/mm_types.h, include/linux/page-flags.h.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.alike import alike, all_of, any_of, some
from hmmlab.model.entry import Bools, Pfns, Words, pfns_beside
from hmmlab.model.geometry import MAX_PHYSMEM_BITS, PAGE_SHIFT, PMD_PAGES
from hmmlab.model.machine import Machine
from hmmlab.model.rows import Rows, as_rows, ascend, first_and_last, row_numbers
from hmmlab.model.state import State

__all__ = [
    "GUP_PIN_COUNTING_BIAS",
    "PAGE_FLAGS",
    "PG_ANON",
    "PG_ANON_EXCLUSIVE",
    "PG_DIRTY",
    "PG_KSM",
    "PG_LOCKED",
    "PG_LRU",
    "PG_READAHEAD",
    "PG_SWAPBACKED",
    "PHYSICAL_PAGES",
    "ZERO_PFN",
    "folio_maybe_dma_pinned",
    "frames_of",
    "is_zone_device",
    "page_mapping",
    "page_rows",
    "pfn_to_page",
    "pte_page",
    "set_flags",
    "some_rows",
]

#: One more than the last frame number that a physical address can have.
PHYSICAL_PAGES = 1 << (MAX_PHYSMEM_BITS - PAGE_SHIFT)

#: The frame of zeros that every read of untouched anonymous memory maps.
ZERO_PFN = 1

#: References from this many on may be pins.
GUP_PIN_COUNTING_BIAS = 1024

PG_LOCKED = 1 << 0
PG_DIRTY = 1 << 1
PG_LRU = 1 << 2
PG_ANON = 1 << 3
PG_ANON_EXCLUSIVE = 1 << 4
PG_SWAPBACKED = 1 << 5
PG_READAHEAD = 1 << 6
PG_KSM = 1 << 7

#: Names of the flag bits, from bit 0 up.
PAGE_FLAGS = ("locked", "dirty", "lru", "anon", "anon_exclusive", "swapbacked", "readahead", "ksm")

Machine.declare("page.refcount", np.int32, "references to the frame; 0 is free")
Machine.declare("page.mapcount", np.int32, "page-table entries that map the frame")
Machine.declare("page.flags", np.uint32, "PG_* bits")
Machine.declare("page.content", np.uint64, "the frame's first eight bytes")
Machine.declare("page.mapping", np.int32, "the anon_vma, file or KSM node that knows who maps it")
Machine.declare("page.index", np.int64, "offset of the page in its mapping, in pages")
Machine.declare("page.swap", np.int64, "slot of a frame in the swap cache; 0 for none")
Machine.declare("page.compound", np.int64, "first frame of the huge page; 0 for a page of its own")
Machine.declare("page.private", np.int64, "zone_device_data: the driver's own word")


# --- frame numbers and rows -----------------------------------------------------------------------


def page_rows(state: State, pfns: Pfns) -> Pfns:
    """Rows of the ``page.*`` columns for frame numbers (``pfn_to_page``)."""
    if pfns.size == 0 or pfns.max() < state.ram_pages:
        return pfns
    device = state.ram_pages + PHYSICAL_PAGES - 1 - pfns
    if pfns.min() >= state.ram_pages:
        return device
    return np.where(pfns < state.ram_pages, pfns, device)


def some_rows(rows: Rows, mask: Bools) -> Rows:
    """The masked ones of ``rows``."""
    if all_of(mask):
        return rows
    return as_rows(some(row_numbers(rows), mask))


def pfn_to_page(state: State, pfns: Pfns) -> Rows:
    """Rows of the ``page.*`` columns for frame numbers, a slice where they are contiguous."""
    numbers = as_rows(pfns)
    if not isinstance(numbers, slice):
        return page_rows(state, pfns)
    low, high = first_and_last(numbers)
    if high < state.ram_pages:
        return numbers
    if low < state.ram_pages:
        return page_rows(state, pfns)
    top, step = state.ram_pages + PHYSICAL_PAGES - 1, -(numbers.step or 1)
    return slice(top - numbers.start, top - numbers.stop, step if step < 0 else None)


def pte_page(state: State, words: Words, marks: Words) -> Rows:
    """Rows of the frames that present words name, one or more, whose marks these are."""
    if marks.size == 1 and ascend(words):  # to see them side by side, no number need be told
        low, high = pfns_beside(words[[0, -1]], marks).tolist()
        if high - low == words.size - 1 and high < state.ram_pages:
            return slice(low, high + 1)
    return pfn_to_page(state, pfns_beside(words, marks))


# Who has the rows of some frames at hand gives them too, here and below, for to find them takes
# half as long as to use them. Where they are a slice, one answer may stand for all of them.


def is_zone_device(state: State, pfns: Pfns, rows: Rows | None = None) -> Bools:
    """Whether frames are device memory, bool of the shape of ``pfns``, or one for all."""
    if isinstance(rows, slice):  # which is all RAM, or all device memory
        return np.array([rows.start >= state.ram_pages])
    return pfns >= state.ram_pages


def folio_maybe_dma_pinned(state: State, pfns: Pfns, rows: Rows | None = None) -> Bools:
    """Whether frames, or others of their huge page, may be pinned.

    Shaped as ``pfns`` are; where their ``rows`` are given, maybe one for all.
    """
    at = pfn_to_page(state, pfns) if rows is None else rows
    refcounts, heads = state["page.refcount"][at], state.alike("page.compound", at)
    if not any_of(heads) and rows is not None:
        return alike(refcounts) >= GUP_PIN_COUNTING_BIAS
    pinned: Bools = refcounts >= GUP_PIN_COUNTING_BIAS
    heads = np.broadcast_to(heads, pinned.shape)
    if any_of(heads):
        block = frames_of(heads[heads != 0]).reshape(-1, PMD_PAGES)
        mine = state["page.compound"][block] == heads[heads != 0][:, None]
        many = (state["page.refcount"][block] >= GUP_PIN_COUNTING_BIAS) & mine
        pinned[heads != 0] = many.any(axis=1)
    return pinned


def page_mapping(
    state: State,
    pfns: Pfns,
    rows: Rows | None = None,
    flags: NDArray[np.uint32] | None = None,
) -> Bools:
    """Whether frames are in the cache of a file or in the swap cache (``page_mapping``).

    Shaped as ``pfns`` are; where their ``rows`` are given, maybe one for all. ``flags`` are their
    PG_* bits, where known.
    """
    at = pfn_to_page(state, pfns) if rows is None else rows
    flags = state.alike("page.flags", at) if flags is None else flags
    found: Bools = (flags & np.uint32(PG_ANON)) == 0
    if any_of(found):
        found = found & (state["page.mapping"][at] != 0)
    found = found | (state.alike("page.swap", at) != 0)
    return np.broadcast_to(found, pfns.shape) if rows is None else found


def set_flags(
    machine: Machine, pfns: Pfns, on: int = 0, off: int = 0, rows: Rows | None = None
) -> None:
    """Set and clear PG_* bits of ``pfns`` (unique)."""
    rows = pfn_to_page(machine, pfns) if rows is None else rows
    flags = alike(machine.reserve("page.flags", rows)[rows])
    if on:
        flags = flags | np.uint32(on)
    if off:
        flags = flags & np.uint32(~off & 0xFFFFFFFF)
    machine.write("page.flags", rows, flags)


def frames_of(heads: Pfns) -> Pfns:
    """All frames of huge pages, in their order."""
    return (heads[:, None] + np.arange(PMD_PAGES)).ravel()
