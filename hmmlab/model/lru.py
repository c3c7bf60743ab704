"""Pages on their way to another LRU list: a CPU gathers fifteen before it moves them.

A page that waits in such a batch has one more reference. Of the batches only that of MADV_FREE can
be seen from outside: until it is drained, a write fault finds a page held twice and copies it, and
the page still counts as backed by swap.

Source: mm/swap.c (``mark_page_lazyfree``, ``lru_add_drain``).
"""

from __future__ import annotations

import numpy as np

from hmmlab.model.entry import Pfns
from hmmlab.model.machine import Machine
from hmmlab.model.page import PG_ANON, PG_LRU, PG_SWAPBACKED, page_rows, set_flags
from hmmlab.model.page_ref import get_page, put_page
from hmmlab.model.state import unique_rows

__all__ = ["lru_add_drain", "lru_add_drain_all", "mark_page_lazyfree"]

#: Pages of one batch (``PAGEVEC_SIZE``).
_BATCH = 15

Machine.declare("lru.lazyfree", np.int64, "frames that wait in the batch of MADV_FREE")
Machine.declare("lru.lazyfree_count", np.int32, "how many do")


def mark_page_lazyfree(machine: Machine, pfns: Pfns) -> None:
    """Let private frames that are in no swap cache be freed lazily, batch by batch."""
    rows = page_rows(machine, pfns)
    usual = PG_ANON | PG_LRU | PG_SWAPBACKED
    suited = ((machine["page.flags"][rows] & usual) == usual) & (machine["page.swap"][rows] == 0)
    pfns = pfns[suited]
    get_page(machine, pfns)
    waiting = np.concatenate([_waiting(machine), pfns])
    huge = np.flatnonzero(machine["page.compound"][page_rows(machine, waiting)])
    at_once = int(huge[-1]) + 1 if huge.size else 0  # a huge page does not wait, and nobody before
    full = at_once + (waiting.size - at_once) // _BATCH * _BATCH
    _move(machine, waiting[:full])
    _wait(machine, waiting[full:])


def lru_add_drain(machine: Machine, times: int = 1) -> None:
    """Move all that wait to their lists, ``times`` times."""
    machine.called("lru_add_drain", times)
    _drain(machine)


def lru_add_drain_all(machine: Machine) -> None:
    """Let a kernel thread of every CPU do so."""
    machine.called("lru_add_drain_all")
    _drain(machine)


def _drain(machine: Machine) -> None:
    waiting = _waiting(machine)
    if waiting.size:
        _wait(machine, waiting[:0])
        _move(machine, waiting)


def _waiting(machine: Machine) -> Pfns:
    return machine["lru.lazyfree"][: int(machine["lru.lazyfree_count"][0])].copy()


def _wait(machine: Machine, pfns: Pfns) -> None:
    if pfns.size:
        machine.write("lru.lazyfree", slice(0, pfns.size), pfns)
    machine.write("lru.lazyfree_count", 0, pfns.size)


def _move(machine: Machine, pfns: Pfns) -> None:
    rows = page_rows(machine, pfns)
    lazy = pfns[machine["page.swap"][rows] == 0]
    if lazy.size:
        set_flags(machine, unique_rows(lazy), off=PG_SWAPBACKED)
    put_page(machine, pfns)
