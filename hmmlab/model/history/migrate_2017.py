"""migrate_vma() with callbacks, as 4.14 to 5.3 have it.

One function does the whole migration and calls the driver twice: to allocate and copy, and to take
over what has moved. 5.4 turned it upside down: the driver calls the three parts itself, so its own
errors are ordinary errors. The parts are those of :mod:`hmmlab.model.migrate`; what differs is who
calls whom, and the words of ``src`` and ``dst``:

    bit 0 VALID      bit 2 LOCKED     bit 4 DEVICE
    bit 1 MIGRATE    bit 3 WRITE      bit 5 ERROR      from bit 6 on: the frame

All kinds of pages are collected, and device memory of whichever driver.

Source: mm/migrate.c, include/linux/migrate.h of 4.14.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

import numpy as np

from hmmlab.model.entry import Pfns, Words, migrate_pfn_to_pfn
from hmmlab.model.history.devmem_2017 import HMM_DEVMEM_OWNER, HmmDevmem
from hmmlab.model.history.era import EINVAL
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.migrate import migrate_vma_finalize, migrate_vma_pages, migrate_vma_setup
from hmmlab.model.migrate_vma import (
    SELECT_DEVICE_COHERENT,
    SELECT_DEVICE_PRIVATE,
    SELECT_SYSTEM,
    MigrateVma,
)
from hmmlab.model.mm_types import VM_HUGETLB, VM_SPECIAL, Vma
from hmmlab.model.page import is_zone_device

__all__ = [
    "MIGRATE_PFN_DEVICE",
    "MIGRATE_PFN_ERROR",
    "MIGRATE_PFN_LOCKED",
    "MIGRATE_PFN_MIGRATE",
    "MIGRATE_PFN_SHIFT",
    "MIGRATE_PFN_VALID",
    "MIGRATE_PFN_WRITE",
    "MigrateVmaOps",
    "migrate_pfn",
    "migrate_vma",
]

MIGRATE_PFN_VALID = 1 << 0
MIGRATE_PFN_MIGRATE = 1 << 1
MIGRATE_PFN_LOCKED = 1 << 2
MIGRATE_PFN_WRITE = 1 << 3
MIGRATE_PFN_DEVICE = 1 << 4
MIGRATE_PFN_ERROR = 1 << 5
MIGRATE_PFN_SHIFT = 6

_SINCE_REMOVED = MIGRATE_PFN_LOCKED | MIGRATE_PFN_DEVICE | MIGRATE_PFN_ERROR


class MigrateVmaOps(Protocol):
    """What a driver provides (``struct migrate_vma_ops``); functions or generators of steps.

    ``start`` and ``end`` are page numbers, ``src`` and ``dst`` uint64 of one word a page.
    """

    def alloc_and_copy(
        self, vma: Vma, src: Words, dst: Words, start: int, end: int, private: Any
    ) -> Any:
        """Allocate, copy, and fill ``dst`` where ``src`` has MIGRATE; locked pages, with LOCKED.

        A word without VALID leaves the page where it is; so does ERROR, which says that the device
        could not copy it.
        """

    def finalize_and_map(
        self, vma: Vma, src: Words, dst: Words, start: int, end: int, private: Any
    ) -> Any:
        """Take over the pages that still have MIGRATE in ``src``: they have moved."""


def migrate_pfn(pfns: Pfns) -> Words:
    """Words that name frames, with VALID."""
    shifted = np.asarray(pfns, np.int64) << MIGRATE_PFN_SHIFT
    return shifted.astype(np.uint64) | np.uint64(MIGRATE_PFN_VALID)


@kernel("mm/migrate.c, 4.14")
def migrate_vma(
    machine: Machine,
    ops: MigrateVmaOps | None,
    vma: Vma | None,
    start: int,
    end: int,
    src: Words | None,
    dst: Words | None,
    private: Any = None,
) -> Routine[int]:
    """Migrate pages ``start`` to ``end - 1``; the caller holds the mmap_lock.

    ``src`` and ``dst`` are the driver's arrays of one word a page, filled in here. Where nothing
    can move the driver is not called.

    Returns
    -------
    0, however many have moved; -EINVAL where the mapping is missing, hugetlb or special, the range
    is empty or not inside it, or the callbacks or an array are missing.
    """
    if vma is None or vma.flags & (VM_HUGETLB | VM_SPECIAL):
        return -EINVAL
    if not (vma.start <= start < vma.end and vma.start < end <= vma.end):
        return -EINVAL
    if ops is None or src is None or dst is None or start >= end:
        return -EINVAL
    migrate = MigrateVma(
        vma,
        np.arange(start, end),
        HMM_DEVMEM_OWNER,
        SELECT_SYSTEM | SELECT_DEVICE_PRIVATE | SELECT_DEVICE_COHERENT,
        fault_pages=_faulting(machine),
    )
    yield from migrate_vma_setup(machine, migrate)
    dst[:] = 0
    src[:] = _in_2017(machine, migrate.src)
    if not migrate.cpages:
        return 0
    yield from _call(ops.alloc_and_copy(vma, src, dst, start, end, private))
    usable = (dst & np.uint64(MIGRATE_PFN_VALID | MIGRATE_PFN_ERROR)) == MIGRATE_PFN_VALID
    migrate.dst[:] = np.where(usable, dst & ~np.uint64(_SINCE_REMOVED), np.uint64(0))
    yield from migrate_vma_pages(machine, migrate)
    src[:] = _in_2017(machine, migrate.src)
    yield from _call(ops.finalize_and_map(vma, src, dst, start, end, private))
    yield from migrate_vma_finalize(machine, migrate)
    return 0


def _call(answer: Any) -> Routine[None]:
    if isinstance(answer, Generator):
        yield from answer


def _faulting(machine: Machine) -> Pfns:
    """Frames on which the CPU is faulting; see :class:`HmmDevmem`."""
    chunks: list[HmmDevmem] = list(machine.objects.get("hmm_devmem", {}).values())
    return np.concatenate([np.zeros(0, np.int64), *(chunk.faulting for chunk in chunks)])


def _in_2017(machine: Machine, src: Words) -> Words:
    """Today's words with the bits that have gone since: a collected page is locked."""
    valid = (src & np.uint64(MIGRATE_PFN_VALID)) != 0
    device = valid & is_zone_device(machine, np.where(valid, migrate_pfn_to_pfn(src), 0))
    words = src | np.where(valid, np.uint64(MIGRATE_PFN_LOCKED), np.uint64(0))
    return words | np.where(device, np.uint64(MIGRATE_PFN_DEVICE), np.uint64(0))
