"""Sequence numbers, and what a device believes of the CPU's table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hmmlab.invariants.look import MANY, Look, data_frames, frames_named, may_write
from hmmlab.model.entry import (
    DEVICE_VALID,
    DEVICE_WRITE,
    Bools,
    Words,
    device_pfn,
    is_migration,
    is_swap_type,
)
from hmmlab.model.mm_types import mm_is_alive
from hmmlab.model.page import PG_LOCKED, page_rows
from hmmlab.model.state import State

__all__ = ["mirrors", "sequences"]


def sequences(state: State) -> Iterator[str]:
    """A number is odd only while an invalidation runs; a subscription keeps odd ones, none newer.

    A number that a subscription keeps was odd when it was hit, so it never equals a quiet one.
    """
    for mm in np.flatnonzero(state["mm.root"] > 0).tolist():
        odd = bool(state["mm.invalidate_seq"][mm] & 1)
        if odd and not state["mm.active_invalidations"][mm]:
            yield f"the sequence number of mm {mm} is odd, and no invalidation runs"
    live = np.flatnonzero(state["interval.mm"])
    kept, now = state["interval.seq"][live], state["mm.invalidate_seq"][state["interval.mm"][live]]
    for row in live[(kept % 2 == 0) | (kept > now)].tolist():
        yield f"subscription {row} keeps sequence number {state['interval.seq'][row]}"


def mirrors(look: Look) -> Iterator[str]:
    """While no invalidation runs, a device entry names what the CPU's table names.

    The test driver breaks this between two files of one device in one address space: each takes
    the migrations of the other for its own.
    """
    state = look.state
    mirrored = [
        (int(state["device_file.mm"][file]), int(state["device_file.device"][file]))
        for file in look.files
    ]
    for file, (mm, device) in zip(look.files, mirrored, strict=True):
        busy = state["mm.active_invalidations"][mm] or not mm_is_alive(state, mm)
        if busy or mirrored.count((mm, device)) > 1:
            continue
        space = look.files[file]
        if not space.vpns.size:
            continue
        cpu = look.spaces[mm]
        at = np.searchsorted(cpu.vpns, space.vpns)
        words = np.append(cpu.words, np.uint64(0))
        there = np.append(cpu.vpns, -1)[at] == space.vpns
        stale = _stale(state, space.words, np.where(there, words[at], np.uint64(0)))
        for vpn in space.vpns[stale][:MANY].tolist():
            yield f"device file {file} keeps a stale entry for page {vpn:#x}"


def _stale(state: State, words: Words, cpu: Words) -> Bools:
    """Which device entries name another frame than the CPU's words, or may write where they not."""
    valid = (words & np.uint64(DEVICE_VALID)) != 0
    beyond = ((words & np.uint64(DEVICE_WRITE)) != 0) & ~may_write(cpu)
    # A device does not hear of its own migration, and looks again before the page is unlocked.
    rows = page_rows(state, np.where(cpu == 0, 0, frames_named(cpu)))
    locked = (state["page.flags"][rows] & PG_LOCKED) != 0
    moving = (is_swap_type(cpu) & is_migration(cpu)) | locked
    stale = (cpu == 0) | (data_frames(state, cpu) != device_pfn(words))
    return valid & ~moving & (stale | beyond)
