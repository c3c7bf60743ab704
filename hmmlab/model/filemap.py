"""Files and their page cache: what shared and file mappings map.

Every file is one in memory (tmpfs), and so is the memory behind MAP_SHARED | MAP_ANONYMOUS. The
cache of a file is a run of rows of the ``cache.page`` column, one a page: 0 where there is none,
the frame where there is one, minus the slot where the page is in swap.

Source: mm/filemap.c, mm/shmem.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.entry import Pfns, Words
from hmmlab.model.lru import folio_add_lru, lru_add_drain
from hmmlab.model.machine import Machine
from hmmlab.model.page import PG_DIRTY, PG_SWAPBACKED, set_flags
from hmmlab.model.page_alloc import alloc_pages
from hmmlab.model.page_ref import get_page, put_page
from hmmlab.model.rows import Rows, as_rows
from hmmlab.model.state import State
from hmmlab.model.swap import (
    delete_from_swap_cache,
    free_swap_and_cache,
    note_swap_cache_hits,
    swap_cluster_readahead,
    swap_duplicate,
    swap_free,
)

__all__ = [
    "cache_rows",
    "cached",
    "device_file_of",
    "drop_from_cache",
    "get_file",
    "new_file",
    "open_mapped_file",
    "punch_hole",
    "put_file",
    "read_pages",
    "replace_in_cache",
    "swap_out_of_cache",
]

Machine.declare("file.pages", np.int64, "pages of the file; 0 is a free row")
Machine.declare("file.first", np.int64, "row of its first page in cache.page")
Machine.declare("file.users", np.int32, "mappings and descriptors of the file")
Machine.declare(
    "file.device_file", np.int32, "device file that it is; its pages come with mmap alone"
)
Machine.declare("device_file.mapped", np.int32, "the file's number while mapped; -1 once it is not")
Machine.declare("cache.page", np.int64, "frame of a file's page, or minus its slot of swap")
Machine.declare("cache.used", np.int64, "rows of cache.page given to files so far")


def new_file(machine: Machine, pages: int, content: Words | None = None) -> int:
    """Number of a new file with one user.

    Parameters
    ----------
    content
        uint64 of shape (pages,): the first word of each page as written to it; without it the
        file is all hole.
    """
    file = machine.take("file.pages")
    first = int(machine["cache.used"][0])
    machine.write("file.pages", file, pages)
    machine.write("file.first", file, first)
    machine.write("file.users", file, 1)
    machine.write("cache.used", 0, first + pages)
    machine.reserve("cache.page", slice(first, first + pages))
    if content is not None:
        pfns = read_pages(machine, file, np.arange(pages))
        machine.write("page.content", as_rows(pfns), content)
        set_flags(machine, pfns, PG_DIRTY)
    return file


def device_file_of(state: State, file: int) -> int:
    """Number of the device file that a mapping's file is; 0 for a file in memory, or none."""
    return int(state["file.device_file"][file]) if file else 0


def open_mapped_file(machine: Machine, device_file: int) -> int:
    """Number of the file that mappings of a device file map, with one more user.

    A device file that is mapped stays open until its last mapping goes.
    """
    file = int(machine["device_file.mapped"][device_file])
    if file > 0:
        get_file(machine, file)
        return file
    if not file:  # otherwise nobody has closed it yet
        machine.add("device_file.users", device_file, 1)
    file = new_file(machine, 1)
    machine.write("file.device_file", file, device_file)
    machine.write("device_file.mapped", device_file, file)
    return file


def get_file(machine: Machine, file: int) -> None:
    """One more user of a file."""
    machine.add("file.users", file, 1)


def put_file(machine: Machine, file: int) -> None:
    """One user less; a file that nobody uses is gone with its pages."""
    machine.add("file.users", file, -1)
    if machine["file.users"][file]:
        return
    punch_hole(machine, file, 0, int(machine["file.pages"][file]))
    device_file = device_file_of(machine, file)
    if device_file:  # it is closed as soon as the system call ends
        machine.write("device_file.mapped", device_file, -1)
        machine.write("file.device_file", file, 0)
    machine.write("file.pages", file, 0)
    machine.write("file.first", file, 0)


def punch_hole(machine: Machine, file: int, start: int, stop: int) -> None:
    """Let pages ``start`` to ``stop - 1`` of a file be a hole; nobody maps them."""
    rows = cache_rows(machine, file, np.arange(start, stop))
    pfns = np.array(machine["cache.page"][rows])
    machine.write("cache.page", rows, 0)
    put_page(machine, pfns[pfns > 0])
    free_swap_and_cache(machine, -pfns[pfns < 0])


def cache_rows(state: State, file: int, pages: Pfns) -> Rows:
    """Rows of ``cache.page`` for pages of a file, int64 of any shape (n,)."""
    return as_rows(int(state["file.first"][file]) + pages)


def cached(state: State, file: int, pages: Pfns) -> Pfns:
    """Frames of pages of a file, 0 where the cache has none."""
    if device_file_of(state, file):
        return np.zeros(pages.size, np.int64)
    return np.array(state["cache.page"][cache_rows(state, file, pages)])


def read_pages(machine: Machine, file: int, pages: Pfns) -> Pfns:
    """Frames of pages of a file; a hole gets frames of zeros (``shmem_fault``)."""
    pfns = cached(machine, file, pages)
    swapped = pfns < 0
    if swapped.any():
        pfns[swapped] = _swap_in(machine, file, pages[swapped], -pfns[swapped])
    missing = pfns == 0
    if missing.any():
        new, rows = alloc_pages(machine, int(missing.sum()))
        pfns[missing] = new
        machine.write("page.mapping", rows, file)
        machine.write("page.index", rows, pages[missing])
        folio_add_lru(machine, new, PG_SWAPBACKED, rows=rows)
        machine.write("cache.page", cache_rows(machine, file, pages[missing]), new)
    return pfns


# --- swap -----------------------------------------------------------------------------------------


def _rows_of_frames(state: State, pfns: Pfns) -> Pfns:
    """Row of ``cache.page`` for each frame of some files."""
    return state["file.first"][state["page.mapping"][pfns]] + state["page.index"][pfns]


def replace_in_cache(machine: Machine, old: Pfns, new: Pfns) -> None:
    """Let new frames stand in the caches of files for old ones."""
    if old.size:
        get_page(machine, new)
        machine.write("cache.page", _rows_of_frames(machine, old), new)
        put_page(machine, old)


def drop_from_cache(machine: Machine, pfns: Pfns) -> None:
    """Forget clean frames of files: what they hold is a hole, which zeros are."""
    if pfns.size:
        machine.write("cache.page", _rows_of_frames(machine, pfns), 0)
        put_page(machine, pfns)


def swap_out_of_cache(machine: Machine, pfns: Pfns, slots: Pfns) -> None:
    """Let files find the content of frames in ``slots`` from now on (``shmem_writepage``)."""
    machine.write("cache.page", _rows_of_frames(machine, pfns), -slots)
    machine.write("page.mapping", as_rows(pfns), 0)
    swap_duplicate(machine, slots)
    put_page(machine, pfns)


def _swap_in(machine: Machine, file: int, pages: Pfns, slots: Pfns) -> Pfns:
    """Bring pages of a file back from swap, and return their frames (``shmem_swapin_folio``).

    Whether a page must be read depends on what was read before it, and how far to read ahead
    depends on how many of those were used: so reads follow one another.
    """
    at = 0
    while at < slots.size:
        there = machine["swap.cache"][slots[at:]] > 0
        hits = int(np.argmin(there)) if not there.all() else there.size
        note_swap_cache_hits(machine, machine["swap.cache"][slots[at : at + hits]])
        at += hits
        if at < slots.size:
            if swap_cluster_readahead(machine, int(slots[at])):
                lru_add_drain(machine)
            at += 1
    pfns = machine["swap.cache"][slots]
    get_page(machine, pfns)
    machine.write("cache.page", cache_rows(machine, file, pages), pfns)
    machine.write("page.mapping", as_rows(pfns), file)
    machine.write("page.index", as_rows(pfns), pages)
    delete_from_swap_cache(machine, pfns)
    set_flags(machine, pfns, PG_DIRTY)
    swap_free(machine, slots)
    return pfns
