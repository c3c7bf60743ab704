"""Swap: slots, the swap cache, and reading ahead.

A slot is a page of the swap device; it counts the page-table words (and the files) that name it. A
frame that has a slot and is still, or again, in memory is in the swap cache, which holds one
reference to it. Slots are handed out in ascending order and not used twice.

Source: mm/swapfile.c, mm/swap_state.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.alike import any_of
from hmmlab.model.entry import Pfns
from hmmlab.model.geometry import PMD_PAGES, align_down
from hmmlab.model.lru import folio_add_lru
from hmmlab.model.machine import Machine
from hmmlab.model.page import (
    PG_DIRTY,
    PG_READAHEAD,
    PG_SWAPBACKED,
    page_rows,
    pfn_to_page,
    set_flags,
)
from hmmlab.model.page_alloc import alloc_pages
from hmmlab.model.page_ref import get_page, put_page
from hmmlab.model.rows import Rows, as_rows, unique_rows
from hmmlab.model.state import State

__all__ = [
    "add_to_swap_cache",
    "delete_from_swap_cache",
    "folio_alloc_swap",
    "folio_free_swap",
    "free_swap_and_cache",
    "free_swap_cache",
    "give_up_swap",
    "note_swap_cache_hits",
    "replace_in_swap_cache",
    "swap_cluster_readahead",
    "swap_duplicate",
    "swap_free",
    "swap_vma_window",
    "swapin_readahead",
]

#: The first slot that is handed out: the cluster with the header is never free as a whole.
_FIRST_SLOT = 256
#: Pages read at once at most (``page_cluster`` is 3).
_MAX_WINDOW = 8
_HITS_MAX = 63
#: What a mapping starts with instead of 0: four hits, so that the first read is a large one.
_NO_HISTORY = (0, 0, 4)

Machine.declare("swap.count", np.int32, "page-table words and files that name the slot")
Machine.declare("swap.cache", np.int64, "frame of the slot in the swap cache; 0 for none")
Machine.declare("swap.content", np.uint64, "first word of the page that was written there")
Machine.declare("swap.used", np.int64, "slots handed out so far")
Machine.declare(
    "swap.history", np.int64, "last offset, hits, window of reads for files; 1 after the first"
)


# --- slots ----------------------------------------------------------------------------------------


def folio_alloc_swap(machine: Machine, count: int) -> Pfns:
    """Numbers of ``count`` new slots, ascending."""
    used = int(machine["swap.used"][0])
    machine.write("swap.used", 0, used + count)
    return np.arange(_FIRST_SLOT + used, _FIRST_SLOT + used + count)


def swap_duplicate(machine: Machine, slots: Pfns) -> None:
    """One more user of each of ``slots``, which may repeat."""
    machine.add("swap.count", slots, 1)


def swap_free(machine: Machine, slots: Pfns) -> None:
    """One user less of each of ``slots``, which may repeat."""
    machine.add("swap.count", slots, -1)


def free_swap_and_cache(machine: Machine, slots: Pfns) -> None:
    """One user less of each of ``slots``; frames in the swap cache that nobody needs go."""
    swap_free(machine, slots)
    pfns = machine["swap.cache"][slots]
    free_swap_cache(machine, unique_rows(pfns[pfns > 0]))


# --- the swap cache -------------------------------------------------------------------------------


def add_to_swap_cache(machine: Machine, pfns: Pfns, slots: Pfns) -> None:
    """Put frames of RAM into the swap cache, which takes a reference to each."""
    get_page(machine, pfns)
    machine.write("page.swap", as_rows(pfns), slots)
    machine.write("swap.cache", as_rows(slots), pfns)


def delete_from_swap_cache(machine: Machine, pfns: Pfns) -> None:
    """Take frames out of the swap cache, and with them its reference to each."""
    if pfns.size:
        machine.write("swap.cache", machine["page.swap"][pfns], 0)
        machine.write("page.swap", as_rows(pfns), 0)
        put_page(machine, pfns)


def replace_in_swap_cache(machine: Machine, old: Pfns, new: Pfns) -> None:
    """Let new frames stand in the swap cache for old ones."""
    if old.size:
        slots = machine["page.swap"][old].copy()
        get_page(machine, new)
        machine.write("page.swap", as_rows(old), 0)
        machine.write("page.swap", as_rows(new), slots)
        machine.write("swap.cache", slots, new)
        put_page(machine, old)


def folio_free_swap(machine: Machine, pfns: Pfns) -> None:
    """Give up the slots of those of ``pfns`` (unique) whose slot nobody else names."""
    slots = machine["page.swap"][page_rows(machine, pfns)]
    idle = pfns[(slots != 0) & (machine["swap.count"][slots] == 0)]
    if idle.size:
        set_flags(machine, idle, PG_DIRTY)
        delete_from_swap_cache(machine, idle)


def free_swap_cache(machine: Machine, pfns: Pfns) -> None:
    """The same for those of ``pfns`` that no page table maps any more."""
    if pfns.size:
        unmapped = machine["page.mapcount"][page_rows(machine, pfns)] == 0
        folio_free_swap(machine, pfns[unmapped])


def give_up_swap(machine: Machine, pfns: Pfns, rows: Rows | None = None) -> None:
    """Take frames out of the swap cache where only that and one mapping hold them."""
    rows = pfn_to_page(machine, pfns) if rows is None else rows
    cached = machine.alike("page.swap", rows) != 0
    if any_of(cached):
        mine = cached & (machine["page.refcount"][rows] == 2)
        folio_free_swap(machine, unique_rows(pfns[mine]))


# --- reading --------------------------------------------------------------------------------------


def _read(machine: Machine, slots: Pfns, wanted: int) -> None:
    """Read slots into the swap cache; all but ``wanted`` are read ahead of their use."""
    slots = np.unique(slots[machine["swap.count"][slots] > 0])
    slots = slots[machine["swap.cache"][slots] == 0]
    if not slots.size:
        return
    pfns, rows = alloc_pages(machine, slots.size, content=machine["swap.content"][slots])
    folio_add_lru(machine, pfns, PG_SWAPBACKED, rows=rows)
    ahead = pfns[slots != wanted]
    if ahead.size:
        set_flags(machine, ahead, PG_READAHEAD)
    add_to_swap_cache(machine, pfns, slots)
    put_page(machine, pfns)


#: Reads ahead that count as useful before there was one (``swapin_readahead_hits``).
_FIRST_HITS = 4


def _window(last: int, place: int, hits: int, before: int) -> int:
    """How many pages to read, from how useful reading ahead was (``__swapin_nr_pages``)."""
    if hits == 0:
        pages = 2 if abs(place - last) == 1 else 1
    else:
        pages = max(4, 1 << (hits + 1).bit_length())
    return max(min(pages, _MAX_WINDOW), before // 2)


def _history(state: State, vma: int) -> tuple[int, int, int]:
    """Page, window and hits of the last read of a mapping (``swap_readahead_info``)."""
    page, window, hits = (int(state[f"vma.ra_{n}"][vma]) for n in ("page", "window", "hits"))
    return (page, window, hits) if page or window or hits else _NO_HISTORY


def _remember(machine: Machine, vma: int, page: int, window: int, hits: int) -> None:
    for name, value in (("page", page), ("window", window), ("hits", hits)):
        machine.write(f"vma.ra_{name}", vma, value)


def note_swap_cache_hits(machine: Machine, pfns: Pfns, vma: int = 0, page: int = 0) -> None:
    """Frames were found in the swap cache: those that had been read ahead were worth it.

    ``page`` is the last page of the mapping ``vma`` that was looked up; without a mapping it was
    for a file.
    """
    ahead = pfns[(machine["page.flags"][pfns] & PG_READAHEAD) != 0]
    if ahead.size:
        set_flags(machine, unique_rows(ahead), off=PG_READAHEAD)
    if vma:
        _, window, hits = _history(machine, vma)
        _remember(machine, vma, page, window, min(hits + ahead.size, _HITS_MAX))
    elif ahead.size:
        machine.add("swap.history", 1, ahead.size)


def swap_vma_window(machine: Machine, vma: int, page: int) -> tuple[int, int]:
    """Pages, first and one past the last, whose slots a fault on ``page`` reads; notes it.

    Source: mm/swap_state.c (``swap_ra_info``).
    """
    last, before, hits = _history(machine, vma)
    window = _window(last, page, hits, before)
    _remember(machine, vma, page, window, 0)
    if page == last + 1:
        low, high = page, page + window
    elif last == page + 1:
        low, high = page - window + 1, page + 1
    else:
        left = (window - 1) // 2
        low, high = page - left, page + window - left
    table = align_down(page, PMD_PAGES)
    start, end = int(machine["vma.start"][vma]), int(machine["vma.end"][vma])
    return max(low, start, table), min(high, end, table + PMD_PAGES)


def swapin_readahead(machine: Machine, slots: Pfns, wanted: int) -> None:
    """Read ``slots``, the one ``wanted`` among them, into the swap cache."""
    _read(machine, slots, wanted)


def swap_cluster_readahead(machine: Machine, slot: int) -> bool:
    """Read a slot for a file, and the aligned cluster around it when that seems worth while.

    Returns whether it did.
    """
    last, hits, before = (int(value) for value in machine["swap.history"][:3])
    if not machine["swap.history"][3]:  # the first read goes ahead as if four had been useful
        machine.write("swap.history", 3, 1)
        hits += _FIRST_HITS
    window = _window(last, slot, hits, before)
    machine.write("swap.history", slice(0, 3), [last if hits else slot, 0, window])
    first = align_down(slot, window)
    _read(machine, np.arange(first, first + window), slot)
    return window > 1
