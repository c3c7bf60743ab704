"""The interfaces of earlier and later years, over the same machine: variants, never mixed into it.

================ ===================================================================================
era              the kernels that are told apart, and their error numbers
sites            which kernel function raises a change
ranges           the list of looked-up ranges, 4.14 to 5.4
struct_hmm       struct hmm and its mirrors: the patch of April 2017, and 4.14
mirror_2018      the same in 4.20, 5.2 and 5.4: told at the start of a change
mirror_2017      hmm_mirror_register and hmm_mirror_unregister
found            what the lookups of 2017 to 2020 find in page tables
fault            the page fault that a lookup makes
lookup_2017      hmm_vma_get_pfns, hmm_vma_fault, hmm_vma_range_done with the hmm_pfn_t of 4.14
walk_2018        the walk with a driver's own flags[] and values[], 4.17 to 5.7
lookup_2018      the three functions again, as 4.17 has them
range_2019       hmm_range_register, _snapshot, _fault, _wait_until_valid, _unregister; 5.2 to 5.4
dma_2019         hmm_range_dma_map and hmm_range_dma_unmap
range_2020       hmm_range_fault under an interval subscription, 5.5 to 5.7
devmem_2017      hmm_devmem_add, hmm_devmem_add_resource, hmm_devmem_remove
device_2017      hmm_device_new and hmm_device_put
migrate_2017     migrate_vma() with callbacks
events_2019      the notifier events of February 2019, and change_pte
today            what has changed since 6.1
dma_today        hmm_dma_map_alloc, hmm_dma_map_pfn, hmm_dma_unmap_pfn of 6.16
calls            the notebook in which a driver notes what it calls
drivers          small drivers of 6.1 and today, which do so
mirror_drivers   the same for the eras of hmm_mirror
interval_drivers the same for 5.5 and 5.7
memory_drivers   the same with device memory, in all eras
eras             one scenario told in all eras side by side
================ ===================================================================================

What stays untold: the configuration options under which all this was built; a ``page_shift`` above
that of a page; whom DMA mappings belong to, and that they can fail; uprobes, which are the fourth
place at which ``change_pte`` would have told all; the pfns of the merge window of 4.17, which no
release had; and 5.8 to 6.0, which are 6.1 without one thing or another
(:class:`~hmmlab.model.history.era.Era`).

A machine has the columns of these rooms when it was made after they were imported. Page numbers
stand wherever the kernel has addresses.
"""

from hmmlab.model.history import mirror_2018 as _mirror_2018  # its struct hmms register themselves
from hmmlab.model.history.era import Era
from hmmlab.model.history.mirror_2017 import (
    hmm_mirror_register,
    hmm_mirror_unregister,
    mmu_notifier_invalidate_page,
)
from hmmlab.model.history.struct_hmm import (
    HmmMirror,
    HmmMirrorOps,
    HmmUpdateType,
    hmm_sequence,
)

__all__ = [
    "Era",
    "HmmMirror",
    "HmmMirrorOps",
    "HmmUpdateType",
    "hmm_mirror_register",
    "hmm_mirror_unregister",
    "hmm_sequence",
    "mmu_notifier_invalidate_page",
]

del _mirror_2018
