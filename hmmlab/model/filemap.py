"""Files and their page cache: what shared and file mappings map.

Every file is one in memory (tmpfs), and so is the memory behind MAP_SHARED | MAP_ANONYMOUS. The
cache of a file is a run of rows of the ``cache.page`` column, one a page: 0 where there is none,
the frame where there is one.

Source: mm/filemap.c, mm/shmem.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.entry import Pfns, Words
from hmmlab.model.machine import Machine
from hmmlab.model.page import PG_DIRTY, PG_LRU, alloc_pages, as_rows, put_page, set_flags
from hmmlab.model.state import Rows, State

__all__ = ["cache_rows", "cached", "get_file", "new_file", "put_file", "read_pages"]

Machine.declare("file.pages", np.int64, "pages of the file; 0 is a free row")
Machine.declare("file.first", np.int64, "row of its first page in cache.page")
Machine.declare("file.users", np.int32, "mappings and descriptors of the file")
Machine.declare("cache.page", np.int64, "frame of a file's page; 0 for none")
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


def get_file(machine: Machine, file: int) -> None:
    """One more user of a file."""
    machine.add("file.users", file, 1)


def put_file(machine: Machine, file: int) -> None:
    """One user less; a file that nobody uses is gone with its pages."""
    machine.add("file.users", file, -1)
    if machine["file.users"][file]:
        return
    rows = cache_rows(machine, file, np.arange(int(machine["file.pages"][file])))
    pfns = np.array(machine["cache.page"][rows])
    machine.write("cache.page", rows, 0)
    put_page(machine, pfns[pfns > 0])
    machine.write("file.pages", file, 0)
    machine.write("file.first", file, 0)


def cache_rows(state: State, file: int, pages: Pfns) -> Rows:
    """Rows of ``cache.page`` for pages of a file, int64 of any shape (n,)."""
    return as_rows(int(state["file.first"][file]) + pages)


def cached(state: State, file: int, pages: Pfns) -> Pfns:
    """Frames of pages of a file, 0 where the cache has none."""
    return np.array(state["cache.page"][cache_rows(state, file, pages)])


def read_pages(machine: Machine, file: int, pages: Pfns) -> Pfns:
    """Frames of pages of a file; a hole gets frames of zeros (``shmem_fault``)."""
    pfns = cached(machine, file, pages)
    missing = pfns == 0
    if missing.any():
        new = alloc_pages(machine, int(missing.sum()))
        pfns[missing] = new
        machine.write("page.mapping", as_rows(new), file)
        machine.write("page.index", as_rows(new), pages[missing])
        set_flags(machine, new, PG_LRU)
        machine.write("cache.page", cache_rows(machine, file, pages[missing]), new)
    return pfns
