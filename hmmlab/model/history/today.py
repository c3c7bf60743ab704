"""What has changed since 6.1, as named variants of what the machine does.

- 6.15: breaking a device-exclusive entry is a CLEAR (:func:`event_since_6_15`).
- 6.16: an hmm_pfn has three more flags, which stay from the request to the answer, and its order
  lies lower (:func:`hmm_pfns_since_6_16`, :func:`hmm_range_fault`). A fault's own error is passed
  on. :mod:`~hmmlab.model.history.dma_today` is what the flags are for.
- 6.19: a huge page may migrate whole: its first src entry says so, the others are 0
  (:func:`migrate_pfns_since_6_19`), where MIGRATE_VMA_SELECT_COMPOUND asks for it.

    hmm_pfn since 6.16
    bit 63 VALID     bit 61 ERROR          bit 59 P2PDMA        bits 53-57 order
    bit 62 WRITE     bit 60 DMA_MAPPED     bit 58 P2PDMA_BUS    bits 0-52  frame

Gone are ``mmu_notifier_range_update_to_read_only`` and the range's ``vma`` (6.3),
``invalidate_range`` and ``mmu_notifier_invalidate_range_only_end`` (6.6), ``change_pte`` (6.10).

Told in these words only: ``make_device_exclusive`` takes one page, which stays mapped as its
mapcount says (6.15); huge entries of device memory, in page tables and in answers, and the folio
operations of a pagemap (6.19); an interval's callback in two passes, ``invalidate_start`` and
``invalidate_finish``.

Source: include/linux/hmm.h, mm/hmm.c, mm/memory.c, include/linux/migrate.h of 6.15 to 6.19.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hmmlab.model import hmm
from hmmlab.model.entry import (
    HMM_PFN_ERROR,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_VALID,
    Pfns,
    Words,
    migrate_pfn_to_pfn,
)
from hmmlab.model.entry import HMM_PFN_FLAGS as FLAGS_6_1
from hmmlab.model.entry import HMM_PFN_ORDER_SHIFT as ORDER_SHIFT_6_1
from hmmlab.model.geometry import PMD_PAGES
from hmmlab.model.history.era import EFAULT
from hmmlab.model.machine import KernelError, Machine, Routine, kernel
from hmmlab.model.mmu_notifier import Event, MmuNotifierRange

__all__ = [
    "HMM_PFN_DMA_MAPPED",
    "HMM_PFN_FLAGS",
    "HMM_PFN_ORDER_SHIFT",
    "HMM_PFN_P2PDMA",
    "HMM_PFN_P2PDMA_BUS",
    "HMM_PFN_STICKY",
    "MIGRATE_PFN_COMPOUND",
    "MIGRATE_VMA_SELECT_COMPOUND",
    "event_since_6_15",
    "hmm_pfn_to_map_order",
    "hmm_pfn_to_pfn",
    "hmm_pfns_since_6_16",
    "hmm_range_fault",
    "migrate_pfns_since_6_19",
]

HMM_PFN_DMA_MAPPED = 1 << 60
HMM_PFN_P2PDMA = 1 << 59
HMM_PFN_P2PDMA_BUS = 1 << 58
HMM_PFN_ORDER_SHIFT = 53
HMM_PFN_FLAGS = 0x7FF << HMM_PFN_ORDER_SHIFT

#: Flags that an answer keeps from what was there before.
HMM_PFN_STICKY = HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA | HMM_PFN_P2PDMA_BUS

MIGRATE_PFN_COMPOUND = 1 << 4
MIGRATE_VMA_SELECT_COMPOUND = 1 << 3

_ORDER_MASK = np.uint64(31)


# --- hmm_pfns -------------------------------------------------------------------------------------


def hmm_pfns_since_6_16(hmm_pfns: Words, before: Words | None = None) -> Words:
    """Answers of 6.1 in the layout since 6.16, with the sticky flags of ``before``."""
    flags = hmm_pfns & np.uint64(HMM_PFN_VALID | HMM_PFN_WRITE | HMM_PFN_ERROR)
    order = (hmm_pfns >> np.uint64(ORDER_SHIFT_6_1)) & _ORDER_MASK
    frames = hmm_pfns & ~np.uint64(FLAGS_6_1)
    words = frames | flags | (order << np.uint64(HMM_PFN_ORDER_SHIFT))
    if before is not None:
        words |= before & np.uint64(HMM_PFN_STICKY)
    return words


def hmm_pfn_to_pfn(hmm_pfns: Words) -> Pfns:
    """Frame numbers in words of the layout since 6.16."""
    return (hmm_pfns & ~np.uint64(HMM_PFN_FLAGS)).astype(np.int64)


def hmm_pfn_to_map_order(hmm_pfns: Words) -> Pfns:
    """Orders in words of the layout since 6.16: 9 where a huge page maps the frame."""
    return ((hmm_pfns >> np.uint64(HMM_PFN_ORDER_SHIFT)) & _ORDER_MASK).astype(np.int64)


@kernel("mm/hmm.c, 6.16")
def hmm_range_fault(machine: Machine, range: hmm.HmmRange) -> Routine[None]:
    """Answer a request in today's layout; the caller holds the mmap_lock.

    Where it is refused, pages before the refused one have answers and the others their requests,
    as in 6.1.

    Raises
    ------
    KernelError
        As in 6.1, but a failing fault says why itself: ENOMEM where memory is used up, and only
        where it has no number of its own EFAULT.
    """
    inner = replace(range, hmm_pfns=range.hmm_pfns & ~np.uint64(HMM_PFN_STICKY))
    asked = inner.hmm_pfns.copy()
    try:
        yield from hmm.hmm_range_fault(machine, inner)
    except KernelError as error:
        cause = error.__cause__
        if error.errno == EFAULT and isinstance(cause, KernelError) and cause.errno:
            raise cause from None
        raise
    finally:
        answered = inner.hmm_pfns != asked
        words = hmm_pfns_since_6_16(inner.hmm_pfns, range.hmm_pfns)
        range.hmm_pfns[:] = np.where(answered, words, range.hmm_pfns)


# --- events ---------------------------------------------------------------------------------------


def event_since_6_15(range: MmuNotifierRange) -> Event:
    """The event of a change: when exclusive access is broken, that is a CLEAR now.

    Making pages exclusive is still EXCLUSIVE, whether or not the device says its owner; the test
    device says none.
    """
    # make_device_exclusive raises it in a loop over pages, and so says of which iteration it is; a
    # CPU that touches a page has no loop.
    broken = range.event is Event.EXCLUSIVE and not range.owner and range.order is None
    return Event.CLEAR if broken else range.event


# --- migration ------------------------------------------------------------------------------------


def migrate_pfns_since_6_19(src: Words, vpns: Pfns) -> Words:
    """The src entries of pages ``vpns``, huge pages told as one entry each.

    Where 512 entries fill an aligned 2 MiB and name the frames of an aligned run of 512, as those
    of a huge page do, the first has COMPOUND and the others are 0.
    """
    words = src.copy()
    frames = migrate_pfn_to_pfn(src)
    flags = src & np.uint64(MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE)
    movable = flags == (MIGRATE_PFN_VALID | MIGRATE_PFN_MIGRATE)
    aligned = (vpns % PMD_PAGES == 0) & (frames % PMD_PAGES == 0) & movable
    heads = np.flatnonzero(aligned)
    heads = heads[heads + PMD_PAGES <= src.size]
    run = heads[:, None] + np.arange(PMD_PAGES)
    follow = (frames[run] - frames[run[:, :1]] == np.arange(PMD_PAGES)) & movable[run]
    follow &= vpns[run] - vpns[run[:, :1]] == np.arange(PMD_PAGES)
    whole = run[follow.all(axis=1)]
    words[whole[:, 1:]] = 0
    words[whole[:, 0]] |= np.uint64(MIGRATE_PFN_COMPOUND)
    return words
