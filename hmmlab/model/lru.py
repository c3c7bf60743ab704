"""Pages on their way to an LRU list: a CPU gathers fifteen before it moves them.

A page that waits in such a batch has one more reference. Of the batches only two can be seen from
outside, that of MADV_FREE and that of locked mappings: until it is drained, a write fault finds a
page held twice and copies it, and a page of the first still counts as backed by swap. The batch of
new pages is only heard: a write fault that finds its page there has it drained first. So it is no
column, and kept for who hears the calls.

Source: mm/swap.c (``folio_add_lru``, ``mark_page_lazyfree``, ``lru_add_drain``), mm/mlock.c.
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.entry import Bools, Pfns
from hmmlab.model.machine import Machine
from hmmlab.model.mm_types import VM_LOCKED, Vma
from hmmlab.model.page import (
    PG_ANON,
    PG_LRU,
    PG_SWAPBACKED,
    is_zone_device,
    page_rows,
    set_flags,
)
from hmmlab.model.page_ref import get_page, put_page
from hmmlab.model.rows import Rows, unique_rows

__all__ = [
    "drain_new",
    "fill_new",
    "folio_add_lru",
    "lru_add_drain",
    "lru_add_drain_all",
    "mark_page_lazyfree",
    "mlock_new_pages",
    "mlock_page_drain",
    "mlock_pages",
    "off_lru",
    "wait_for_lru",
    "waits_new",
]

#: Pages of one batch (``PAGEVEC_SIZE``).
_BATCH = 15

Machine.declare("lru.lazyfree", np.int64, "frames that wait in the batch of MADV_FREE")
Machine.declare("lru.lazyfree_count", np.int32, "how many do")
Machine.declare("lru.mlock", np.int64, "frames of locked mappings that wait, of new ones negative")
Machine.declare("lru.mlock_count", np.int32, "how many do")


def folio_add_lru(
    machine: Machine, pfns: Pfns, flags: int = 0, *, rows: Rows | None = None, huge: bool = False
) -> None:
    """Let frames be on the LRU lists, and have ``flags``; a ``huge`` page does not wait for it."""
    set_flags(machine, pfns, PG_LRU | flags, rows=rows)
    wait_for_lru(machine, pfns, huge=huge)


def wait_for_lru(machine: Machine, pfns: Pfns, *, huge: bool = False) -> None:
    """The same for frames that have their flags."""
    if machine.observed:
        before = _new(machine)
        rest = 0 if huge else (before.size + pfns.size) % _BATCH
        last = np.concatenate([before, pfns[-_BATCH:]])
        machine.objects["lru.add"] = {0: last[last.size - rest :]}


def off_lru(machine: Machine, pfns: Pfns, rows: Rows | None = None) -> Bools:
    """Which frames are on no LRU list yet, as far as can be told: device memory never is.

    Shaped as ``pfns`` are; where their ``rows`` are given, maybe one for all.
    """
    off, waiting = is_zone_device(machine, pfns, rows), _new(machine)
    return off | np.isin(pfns, waiting) if waiting.size else off


def waits_new(machine: Machine, pfns: Pfns) -> Bools:
    """Which frames are new pages of locked mappings, and wait; maybe one for all."""
    waiting = _waiting(machine, "mlock")
    return np.isin(-pfns, waiting) if waiting.size else np.array([False])


def drain_new(machine: Machine) -> None:
    """Let what is only heard be heard: new pages are on their lists now."""
    machine.called("lru_add_drain")
    fill_new(machine)


def fill_new(machine: Machine) -> None:
    """New pages are on their lists by now: others that no mapping here has filled the batch."""
    machine.objects.pop("lru.add", None)


def _new(machine: Machine) -> Pfns:
    waiting: Pfns = machine.objects.get("lru.add", {}).get(0, np.zeros(0, np.int64))
    return waiting


def mark_page_lazyfree(machine: Machine, pfns: Pfns) -> None:
    """Let private frames that are in no swap cache be freed lazily, batch by batch."""
    rows = page_rows(machine, pfns)
    usual = PG_ANON | PG_LRU | PG_SWAPBACKED
    suited = ((machine["page.flags"][rows] & usual) == usual) & (machine["page.swap"][rows] == 0)
    pfns = pfns[suited]
    get_page(machine, pfns)
    waiting = np.concatenate([_waiting(machine, "lazyfree"), pfns])
    huge = np.flatnonzero(machine["page.compound"][page_rows(machine, waiting)])
    at_once = int(huge[-1]) + 1 if huge.size else 0  # a huge page does not wait, and nobody before
    full = at_once + (waiting.size - at_once) // _BATCH * _BATCH
    _move(machine, waiting[:full])
    _wait(machine, "lazyfree", waiting[full:])


def mlock_new_pages(machine: Machine, pfns: Pfns, vma: Vma) -> None:
    """Let new small pages of a mapping wait, if it is locked."""
    if vma.flags & VM_LOCKED:
        mlock_pages(machine, -pfns)


def mlock_pages(machine: Machine, pfns: Pfns) -> None:
    """Let small pages wait that a locked mapping has gained or lost.

    In the order of ``pfns``; the number of a new page is negative, and 0 stands for none.
    """
    pfns = pfns[(pfns != 0) & (machine["page.compound"][page_rows(machine, abs(pfns))] == 0)]
    get_page(machine, pfns[pfns > 0])  # nobody sees that of a new page: whoever asks, drains first
    waiting = np.concatenate([_waiting(machine, "mlock"), pfns])
    full = waiting.size // _BATCH * _BATCH
    _wait(machine, "mlock", waiting[full:])
    put_page(machine, waiting[:full][waiting[:full] > 0])


def mlock_page_drain(machine: Machine) -> None:
    """Move the pages of locked mappings that wait (``mlock_page_drain_local``)."""
    waiting = _waiting(machine, "mlock")
    if waiting.size:
        _wait(machine, "mlock", waiting[:0])
        put_page(machine, waiting[waiting > 0])


def lru_add_drain(machine: Machine, times: int = 1) -> None:
    """Move all that wait to their lists, ``times`` times."""
    machine.called("lru_add_drain", times)
    _drain(machine)


def lru_add_drain_all(machine: Machine) -> None:
    """Let a kernel thread of every CPU do so."""
    machine.called("lru_add_drain_all")
    _drain(machine)


def _drain(machine: Machine) -> None:
    fill_new(machine)
    if machine["lru.lazyfree_count"][0]:
        waiting = _waiting(machine, "lazyfree")
        _wait(machine, "lazyfree", waiting[:0])
        _move(machine, waiting)
    mlock_page_drain(machine)


def _waiting(machine: Machine, batch: str) -> Pfns:
    return machine[f"lru.{batch}"][: int(machine[f"lru.{batch}_count"][0])].copy()


def _wait(machine: Machine, batch: str, pfns: Pfns) -> None:
    if pfns.size:
        machine.write(f"lru.{batch}", slice(0, pfns.size), pfns)
    machine.write(f"lru.{batch}_count", 0, pfns.size)


def _move(machine: Machine, pfns: Pfns) -> None:
    rows = page_rows(machine, pfns)
    lazy = pfns[machine["page.swap"][rows] == 0]
    if lazy.size:
        set_flags(machine, unique_rows(lazy), off=PG_SWAPBACKED)
    put_page(machine, pfns)
