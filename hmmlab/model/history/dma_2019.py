"""hmm_range_dma_map and hmm_range_dma_unmap: fault pages in and map them for DMA, 5.2 to 5.4.

All in one call, for the drivers of which each did the same. 5.5 took them away, for nobody used
them; the ``hmm_dma_map`` of 6.16 is a new design.

There is no IOMMU here: the bus address of a page is its physical one. Addresses are page numbers,
and 0 stands for a page that is not mapped. A mapping for DMA that fails, and the device whose it
is, are left out.

Source: mm/hmm.c of 5.2 and 5.4.
"""

from __future__ import annotations

import enum

import numpy as np

from hmmlab.model.entry import Bools, Pfns
from hmmlab.model.history.era import EBUSY, EINVAL
from hmmlab.model.history.range_2019 import hmm_range_fault, hmm_range_valid
from hmmlab.model.history.walk_2018 import HmmPfnValue, HmmRange
from hmmlab.model.machine import Machine, Routine, kernel
from hmmlab.model.page import PG_DIRTY, set_flags
from hmmlab.model.rows import unique_rows

__all__ = ["DmaDataDirection", "dma_direction", "hmm_range_dma_map", "hmm_range_dma_unmap"]


class DmaDataDirection(enum.IntEnum):
    """Which way data may go (``enum dma_data_direction``)."""

    DMA_BIDIRECTIONAL = 0
    DMA_TO_DEVICE = 1


def dma_direction(range: HmmRange) -> Pfns:
    """How each page of a looked-up range is mapped: both ways where it can be written."""
    writable = (range.pfns & range.write_bit) != 0
    both, one = DmaDataDirection.DMA_BIDIRECTIONAL, DmaDataDirection.DMA_TO_DEVICE
    return np.where(writable, int(both), int(one))


def _named(range: HmmRange) -> tuple[Bools, Pfns]:
    """Which words name a frame, and which."""
    frames = range.device_entry_to_pfn(range.pfns)
    return frames >= 0, frames


@kernel("mm/hmm.c, 5.2")
def hmm_range_dma_map(
    machine: Machine, range: HmmRange, daddrs: Pfns, how: bool | int
) -> Routine[int]:
    """Fault a registered range in and map it for DMA; the caller holds the mmap_lock.

    ``daddrs``, int64 of one value a page, is filled in; ``how`` is as for
    :func:`~hmmlab.model.history.range_2019.hmm_range_fault`.

    Returns
    -------
    How many pages were mapped; -EBUSY where none was looked at, or the range was invalidated
    meanwhile, and nothing is mapped then; what ``hmm_range_fault`` answers.
    """
    answer = yield from hmm_range_fault(machine, range, how)
    if answer <= 0:
        return answer or -EBUSY
    daddrs[:] = 0
    named, frames = _named(range)
    for first, last in machine.chunks(0, named.size):
        part = slice(first, last)
        if named[part].any() and not hmm_range_valid(machine, range):
            daddrs[:] = 0
            return -EBUSY
        daddrs[part] = np.where(named[part], frames[part], 0)
        yield machine.step(
            f"{int(named[part].sum())} pages of {{range}} are mapped for DMA.",
            int(machine["hmm.mm"][range.hmm]),
            range.start + first,
            range.start + last,
        )
    return int(named.sum())


def hmm_range_dma_unmap(
    machine: Machine, range: HmmRange, daddrs: Pfns | None, *, dirty: bool
) -> int:
    """Take the mappings for DMA away; writable pages become dirty where ``dirty``.

    Returns how many pages were unmapped, whose words are NONE now; -EINVAL for an empty range or
    without ``daddrs``. The ``vma`` that 5.2 and 5.3 pass is not used there either.
    """
    if range.end <= range.start or daddrs is None:
        return -EINVAL
    named, frames = _named(range)
    written = named & (dma_direction(range) == DmaDataDirection.DMA_BIDIRECTIONAL)
    if dirty and written.any():
        set_flags(machine, unique_rows(frames[written]), PG_DIRTY)
    range.pfns[named] = range.value(HmmPfnValue.HMM_PFN_NONE)
    daddrs[named] = 0
    return int(named.sum())
