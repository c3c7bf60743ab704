"""The promise of a mirror, read from the columns: where a device's table breaks it, and when."""

from __future__ import annotations

import numpy as np

from hmmlab.invariants.look import data_frames, may_write
from hmmlab.model.entry import (
    DEVICE_VALID,
    DEVICE_WRITE,
    device_pfn,
    is_device_private,
    is_migration,
    is_present,
    is_swap_type,
)
from hmmlab.model.mm_types import mm_root
from hmmlab.model.page_table import read_range
from hmmlab.model.region import Pages
from hmmlab.model.state import State
from hmmlab.model.trace import Trace

__all__ = ["broken_promise", "device_letters", "first_break"]

#: The first device file that is opened on a machine, and often the only one.
FIRST_FILE = 1


def device_letters(state: State, where: Pages, file: int = FIRST_FILE) -> str:
    """One letter a page of a device's table: ``w`` read-write, ``r`` read-only, ``.`` none.

    ``W`` and ``R`` stand for pages in the device's own memory, ``!`` for an entry that names
    another frame than the CPU's table, and ``+`` for one that allows a write that it forbids.
    """
    words = read_range(state, int(state["device_file.root"][file]), where.start, where.stop)
    cpu = read_range(state, mm_root(state, where.mm), where.start, where.stop)
    known = (words & np.uint64(DEVICE_VALID)) != 0
    writes = known & ((words & np.uint64(DEVICE_WRITE)) != 0)
    away = is_swap_type(cpu)
    private, moving = away & is_device_private(cpu), away & is_migration(cpu)
    letters = np.where(known, np.where(writes, "w", "r"), ".")
    letters = np.where(known & private, np.char.upper(letters), letters)
    letters = np.where(writes & is_present(cpu) & ~may_write(cpu), "+", letters)
    lost = known & ~moving & ((cpu == 0) | (data_frames(state, cpu) != device_pfn(words)))
    return "".join(np.where(lost, "!", letters))


def first_break(
    trace: Trace, where: Pages, file: int = FIRST_FILE, *, since: int = 0
) -> tuple[int, str] | None:
    """The first position from ``since`` on at which the promise is broken, and how; or None.

    While an invalidation runs nothing is promised yet.
    """
    for replay in trace.replay().seek(since):
        if why := _broken(replay.state, where, file):
            return replay.position, why
    return None


def broken_promise(state: State) -> str:
    """How an open device breaks its promise now, in one sentence; "" where none does."""
    for file in np.flatnonzero(state["device_file.mm"]).tolist():
        mm = int(state["device_file.mm"][file])
        for name, (start, stop) in state.names.of(mm).items():
            if why := _broken(state, Pages(name, mm, start, stop), file):
                return why
    return ""


def _broken(state: State, where: Pages, file: int) -> str:
    """How a device's table breaks the promise now, or ""; nothing is promised during a change."""
    if state["mm.active_invalidations"][where.mm] or not state["device_file.mm"][file]:
        return ""
    for offset, letter in enumerate(device_letters(state, where, file)):
        place = f"{where.name} page {offset}"
        if letter == "!":
            return f"The device keeps an entry for {place} that is stale."
        if letter == "+":
            return f"The device may still write {place}; the CPU may not."
    return ""
