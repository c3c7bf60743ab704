"""hmm_dma_map_alloc, hmm_dma_map_pfn, hmm_dma_unmap_pfn: pages are mapped for DMA one by one, 6.16.

What 5.2 had in one call with the lookup (:mod:`~hmmlab.model.history.dma_2019`) stands beside it
now, and the hmm_pfn itself remembers: DMA_MAPPED stays from an answer to the next request. A page
that is faulted again, because it is to be written now, is not mapped again. So whoever hears that a
page changes must unmap it: the old address is what it would get again.

As in :mod:`~hmmlab.model.history.dma_2019` the bus address of a page is its physical one, and
addresses are page numbers. There is no IOMMU, no peer-to-peer memory, and no mapping that fails.

Source: mm/hmm.c, include/linux/hmm-dma.h of 6.16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hmmlab.model.entry import HMM_PFN_VALID, Bools, Pfns, Words
from hmmlab.model.history.era import ENOMEM
from hmmlab.model.history.mirror_2017 import kmalloc
from hmmlab.model.history.today import HMM_PFN_DMA_MAPPED, HMM_PFN_STICKY, hmm_pfn_to_pfn
from hmmlab.model.machine import Machine

__all__ = ["HmmDmaMap", "hmm_dma_map_alloc", "hmm_dma_map_pfn", "hmm_dma_unmap_pfn"]


@dataclass
class HmmDmaMap:
    """A driver's mappings for DMA (``struct hmm_dma_map``).

    Attributes
    ----------
    pfn_list
        hmm_pfns, uint64 of one word a page: what a lookup is given and answers.
    dma_list
        Where each page is mapped, int64; what stands where DMA_MAPPED is not set means nothing.
    """

    pfn_list: Words = field(default_factory=lambda: np.zeros(0, np.uint64))
    dma_list: Pfns = field(default_factory=lambda: np.zeros(0, np.int64))


def hmm_dma_map_alloc(machine: Machine, map: HmmDmaMap, nr_entries: int) -> int:
    """Make room for ``nr_entries`` pages. Returns 0, or -ENOMEM where the kernel has none."""
    if not kmalloc(machine):
        return -ENOMEM
    map.pfn_list = np.zeros(nr_entries, np.uint64)
    map.dma_list = np.zeros(nr_entries, np.int64)
    return 0


def hmm_dma_map_pfn(map: HmmDmaMap, idx: NDArray[np.int64]) -> Pfns:
    """Map the pages at ``idx`` for DMA, as their hmm_pfns name them; mapped ones stay as they are.

    Returns where they are, int64 of the shape of ``idx``.
    """
    known = (map.pfn_list[idx] & np.uint64(HMM_PFN_DMA_MAPPED)) != 0
    map.dma_list[idx] = np.where(known, map.dma_list[idx], hmm_pfn_to_pfn(map.pfn_list[idx]))
    map.pfn_list[idx] |= np.uint64(HMM_PFN_DMA_MAPPED)
    return map.dma_list[idx]


def hmm_dma_unmap_pfn(map: HmmDmaMap, idx: NDArray[np.int64]) -> Bools:
    """Take the mappings of the pages at ``idx`` away, and what their hmm_pfns say of them.

    Returns which of them were valid and mapped, bool of the shape of ``idx``.
    """
    both = np.uint64(HMM_PFN_VALID | HMM_PFN_DMA_MAPPED)
    mapped = (map.pfn_list[idx] & both) == both
    map.pfn_list[idx[mapped]] &= ~np.uint64(HMM_PFN_STICKY)
    return mapped
