"""The operations that are measured, on the model.

A story runs on one machine. After its first round columns have grown, and frames and tables come
from free lists, as they do in a kernel that has been up for a while.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from hmmlab.bench.rounds import Story
from hmmlab.model.hmm import HmmRange, hmm_range_fault
from hmmlab.model.machine import Machine, Routine
from hmmlab.model.mmu_notifier import (
    Event,
    MmuNotifierRange,
    invalidate_range_end,
    invalidate_range_start,
    mmu_interval_read_begin,
)
from hmmlab.model.process import Process
from hmmlab.model.region import Pages

__all__ = ["CALLS", "COLUMNS", "OPERATIONS", "a_process", "life_of_a_mapping", "life_of_a_mirror"]

#: Calls of ``invalidate_one_page`` in a round; it alone is measured per call.
CALLS = 64

#: The operations in the order of the table.
OPERATIONS = (
    *("store_first_touch", "snapshot", "mprotect", "fork", "store_cow", "dontneed", "munmap"),
    *("device_read", "to_dev", "cpu_fault_back", "invalidate_one_page"),
)

_FRAME = ("page.refcount", "page.mapcount", "page.flags")
_PLACE = ("page.mapping", "page.index")
#: A frame that is freed forgets all but its content. That it is small, in no swap cache and no
#: device's, nobody reads or writes: where a column was never written, it is known to be zero.
_FREED = (*_FRAME, *_PLACE, "zone.free_list.0")
#: A move between RAM and the device changes both page tables; one frame of RAM with all that it is;
#: the device's label of it, and the label's free list; and the frame of RAM behind the label. One
#: frame of RAM comes from the free list and one goes there, to the same place of it.
_MOVE = (
    *("pte", "pte", *_FREED, "page.content"),
    *(*_FRAME, *_PLACE, "page.private", "dmirror_device.free_list.0"),
    *("page.refcount", "page.content", "page.private"),
)

#: Columns whose words an operation must read or write for each page, each word once however often
#: the operation comes back to it. A column that stands twice is touched at two rows: parent and
#: child, old frame and new, CPU and device.
COLUMNS: dict[str, tuple[str, ...]] = {
    "store_first_touch": ("pte", *_FRAME, *_PLACE, "page.content", "zone.free_list.0"),
    "snapshot": ("pte",),
    "mprotect": ("pte",),
    "fork": ("pte", "pte", *_FRAME),
    "store_cow": (
        *("pte", *_FRAME, "page.content"),
        *(*_FRAME, *_PLACE, "page.content", "zone.free_list.0"),
    ),
    "dontneed": ("pte", *_FREED),
    "munmap": ("pte", *_FREED),
    "device_read": ("pte", "pte", "page.content"),
    "to_dev": _MOVE,
    "cpu_fault_back": _MOVE,
}


def a_process(pages: int) -> tuple[Process, Pages]:
    """A process that has mapped ``pages`` pages, on a machine with RAM enough."""
    process = Process(Machine(4 * pages + 8192))
    return process, process.mmap(pages)


def life_of_a_mapping(pages: int) -> Story:
    """Private anonymous memory, from mmap to munmap; the story that the host is told too."""
    process, where = a_process(pages)
    values = np.arange(pages, dtype=np.uint64)
    while True:
        yield "store_first_touch", partial(process.store, where, values)
        yield "mprotect", partial(process.mprotect, where, "r")
        process.mprotect(where, "rw")
        child = yield "fork", process.fork
        yield "store_cow", partial(process.store, where, values)
        child.exit()
        yield "dontneed", partial(process.madvise, where, "dontneed")
        process.store(where, values)
        yield "munmap", partial(process.munmap, where)
        where = process.mmap(pages, name=where.name)


def life_of_a_mirror(pages: int) -> Story:
    """The test device looks, reads, hears that some pages change, gets all, and gives them back."""
    process, where = a_process(pages)
    process.store(where, 1)
    device = process.open(0)
    answer = np.zeros(pages, np.uint64)
    some = [where[at] for at in np.linspace(0, pages - 1, CALLS).astype(int).tolist()]
    while True:
        range = HmmRange(process.mm, device.subscription, 0, where.start, where.stop, answer)
        yield "snapshot", partial(process.run, "snapshot", _look(process.machine, range))
        yield "device_read", partial(device.read, where)
        yield "invalidate_one_page", partial(_invalidate, process, *some)
        yield "to_dev", partial(device.to_dev, where)
        yield "cpu_fault_back", partial(process.load, where)
        _invalidate(process, where)


def _look(machine: Machine, range: HmmRange) -> Routine[None]:
    range.notifier_seq = yield from mmu_interval_read_begin(machine, range.notifier)
    yield from hmm_range_fault(machine, range)


def _invalidate(process: Process, *pages: Pages) -> None:
    """Tell everybody of one range after another that it changes, and change nothing."""
    for where in pages:
        range = MmuNotifierRange.one(where.mm, Event.CLEAR, where.start, where.stop)
        process.run("invalidate", _raise(process.machine, range))


def _raise(machine: Machine, range: MmuNotifierRange) -> Routine[None]:
    yield from invalidate_range_start(machine, range)
    yield from invalidate_range_end(machine, range)
